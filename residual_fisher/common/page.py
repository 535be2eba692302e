"""The page of a run, report.html: one file that opens without a server, a network or another file.

It is made from the parts in page_parts/ and a block of JSON. The parts use no library, which keeps a page small, and
leaves nothing of others to be trusted. Texts of the data are only in the JSON, where `<` is escaped, and the script
shows them as text nodes. The page's policy lets no other script or style run, by their hashes, and loads nothing.
"""

import base64
from functools import cache
import hashlib
from html import escape
from pathlib import Path
import re

from residual_fisher.common import drawing
from residual_fisher.common.files import atomic_open, json_text

PAGE = "report.html"
PARTS = Path(__file__).with_name("page_parts")
SCRIPTS = {  # by view, in this order
    "pipeline": ("page.js", "prompt.js", "pipeline.js"),
    "experiment": ("page.js", "experiment.js"),
    "map": ("page.js", "map.js"),
}
COLOURS = ("orange", "blue", "green", "pink", "yellow", "grey")  # of the pictures, for the style sheet
DIGITS = 4  # significant digits of a number: more than a page shows


def write_page(folder: Path, view: str, data: dict) -> None:
    """Writes report.html.

    Args:
        view: what shows the data, of SCRIPTS.
        data: in JSON's types; `title` is the page's.
    Raises:
        UserError: the folder cannot be written to.
    """
    with atomic_open(folder / PAGE) as file:
        file.write(page(view, data))


def page(view: str, data: dict) -> bytes:
    """The page of some data, see `write_page`."""
    colours = "".join(f"--{name}: {getattr(drawing, name.upper())}; " for name in COLOURS)
    style = f":root {{ {colours}}}\n{_part('page.css')}"
    script = "\n".join(map(_part, SCRIPTS[view]))
    places = {
        "title": escape(data["title"]).encode("utf-8", "replace"),
        "data": embedded(data),
        **{name: text.encode() for name, text in (("style", style), ("script", script))},
        **{f"{name}_hash": _source(text) for name, text in (("style", style), ("script", script))},
    }
    return re.sub(rb"{{(\w+)}}", lambda match: places[match[1].decode()], _part("page.html").encode())


@cache
def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def _source(text: str) -> bytes:
    """What a content security policy calls a script or style by."""
    return b"sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest())


def embedded(value) -> bytes:
    """A value as JSON within a page, where nothing in it can end the block that it stands in."""
    return json_text(value).strip().replace(b"<", b"\\u003c")


def short(value):
    """A value whose floats are rounded to DIGITS; what is longer is not seen on a page."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list | tuple):
        return [short(item) for item in value]
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return value


def signed_shares(tokens: list[dict]) -> list[list]:
    """[text, share of λ] of each token of a direction; the share is negative if the token loses."""
    return [[token["token"], short(token["share"] if token["slope"] > 0 else -token["share"])] for token in tokens]

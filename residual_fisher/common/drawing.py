"""What all pictures share: style, colours, parts of panels, and how they are saved."""

from collections.abc import Callable, Sequence
import os
from pathlib import Path
import sys
from typing import TypeVar
import warnings

import matplotlib

if "MPLBACKEND" not in os.environ and "matplotlib.pyplot" not in sys.modules:
    matplotlib.use("Agg")  # files only: no display is needed; but a notebook's own choice stays

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator
import numpy as np

from residual_fisher.common.files import atomic_open
from residual_fisher.common.program import UserError
from residual_fisher.common.text import excerpt, printable

T = TypeVar("T")

# Fonts with the scripts and symbols that matplotlib's own font, DejaVu Sans, lacks: Chinese, Japanese and Korean,
# Devanagari, emoji, and whatever else there is. Those that are installed are asked for a missing character, in order.
FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Malgun Gothic",
    "Droid Sans Fallback", "Noto Sans Devanagari", "Lohit Devanagari", "Nirmala UI", "Mangal", "Devanagari Sangam MN",
    "Noto Emoji", "Segoe UI Emoji", "Symbola", "Noto Sans Thai", "Noto Sans Bengali", "Noto Sans Tamil",
    "Arial Unicode MS", "FreeSans", "Unifont",
)  # fmt: skip


def font_families() -> list[str]:
    """DejaVu Sans, and the fallback fonts that are installed: matplotlib complains of every other at each text."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]


DPI = 150
STYLE = {
    "font.family": font_families(),
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 14,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # letters that can be selected, and edited
    "svg.fonttype": "none",
}
# Okabe and Ito's colours, told apart with any colour vision
BLACK, ORANGE, BLUE, GREEN, PINK, YELLOW, GREY = (
    "#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#7A7A7A",
)  # fmt: skip
DISTINCT = [BLACK, ORANGE, BLUE, GREEN, PINK, YELLOW]
# Glyph: a token of a script that no font has is drawn as a box. The others: NaN, which leaves a gap in the picture.
EXPECTED_WARNINGS = "Glyph|All-NaN|Mean of empty"


def save(folder: Path, figures: dict[str, Callable[[], Figure]], kind: str = "png") -> None:
    """Draws figures into files of these names, one at a time.

    Args:
        kind: "png", "pdf" or "svg", which the names then end in. Text stays text.
    Raises:
        UserError: the folder cannot be written to.
    """
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", EXPECTED_WARNINGS)
        for name, make in figures.items():
            figure = make()
            with atomic_open(folder / of_kind(name, kind)) as file:
                figure.savefig(file, format=kind, dpi=DPI)
            plt.close(figure)


def known_panel(known: dict[str, T], name: str) -> T:
    """A panel by its name. Raises UserError: there is none."""
    if name not in known:
        raise UserError(f"no panel {excerpt(repr(name), 40)}: these results have {', '.join(known)}")
    return known[name]


def save_panel(folder: Path, picture: str, words: Sequence[str], make: Callable[[], Figure], kind: str = "png") -> str:
    """Draws a panel of a picture into a file of its own, named after the picture and these words; returns its name."""
    name = "_".join([picture.removesuffix(".png"), *words]) + ".png"
    save(folder, {name: make}, kind)
    return of_kind(name, kind)


def of_kind(name: str, kind: str) -> str:
    """The name of a picture, of another kind than its ending says."""
    return f"{name.removesuffix('.png')}.{kind}"


def label(text: str) -> str:
    """`text` without what matplotlib, or a terminal, would take for an instruction."""
    return printable(text).replace("$", r"\$")


def thin_log_labels(axis: Axis) -> None:
    """Of a logarithmic axis, marks 2 and 5 times the powers of ten, whose labels leave each other room."""
    axis.set_minor_locator(LogLocator(subs=(2, 5)))


def longest_bars(directions: Sequence[list[dict]]) -> list[float]:
    """The lengths of the longest of `token_bars` to the left of 0 and to the right."""
    return [max(sum(t["share"] for t in tokens if sign * t["slope"] > 0) for tokens in directions) for sign in (-1, 1)]


def token_bars(panel: Axes, directions: Sequence[list[dict]], colours: Sequence, character: float) -> None:
    """Each direction's tokens as one bar: to the left of 0 those that it lowers, to the right those that it raises.

    Args:
        directions: the tokens of each, the largest share first: a token's length in the bar.
        colours: of either side, a pair for each direction; the tokens further out are paler.
        character: share as wide as a character; a token with less room is drawn without its text.
    """
    for height, (tokens, pair) in enumerate(zip(directions, colours, strict=True)):
        for sign, colour in zip((-1, 1), pair, strict=True):
            end = 0.0
            for place, token in enumerate(t for t in tokens if sign * t["slope"] > 0):
                share, text = token["share"], label(token["token"])
                alpha = max(0.5 - 0.1 * place, 0.2)
                panel.barh(height, sign * share, 0.8, sign * end, color=colour, alpha=alpha, edgecolor="white")
                if share > character * (len(text) + 1):
                    panel.text(sign * (end + share / 2), height, text, ha="center", va="center", fontsize=11)
                end += share
    panel.axvline(0, color=BLACK, linewidth=1)


def median_band(panel: Axes, x: Sequence[float], samples: list, floor: float = 0.0, **style) -> None:
    """The median of each of `samples` against x as a line, and their quartiles as a band around it; NaN is left out."""
    quartiles = [np.nanpercentile(values, [25, 50, 75]) for values in samples]
    low, median, high = np.maximum(quartiles, floor).T
    panel.plot(x, median, **style)
    panel.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)

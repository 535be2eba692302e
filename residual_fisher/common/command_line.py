"""Both command lines: one table of options for flags and YAML, one-line errors, text that is safe to print."""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, field, fields
import difflib
import math
import os
from pathlib import Path
import re
import sys
import warnings

from residual_fisher.common.console import INTERRUPTED, consoles, interruptible
from residual_fisher.common.memory import is_out_of_memory

EMBEDDED = "smollm2-135m"  # the default model, which needs no hub: see model/embedded.py
HUB = "https://huggingface.co"  # the default of HF_ENDPOINT
MAX_TEXT = 4000  # characters of a value: a path may have 4096 bytes, and Python reads numbers of 4300 digits
MAX_NAME = 255  # bytes of a file's name, everywhere
MAX_CONFIG = 100_000  # characters: a YAML file of settings has a thousand


class UserError(Exception):
    """What is wrong and what to do about it, in one line."""


# --- types of values -----------------------------------------------------------------------------


def positive(text: str) -> int:
    if not _is_whole(text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not a positive whole number")
    return int(text)


def count(text: str) -> int:
    if not _is_whole(text):
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not a whole number, 0 or more")
    return int(text)


def _is_whole(text: str) -> bool:
    """Few enough digits that whatever is computed from it fits 64 bits."""
    return re.fullmatch("0*[0-9]{1,15}", text) is not None


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not a number")
    return value + 0.0  # -0.0 becomes 0.0


def positive_number(text: str) -> float:
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not above 0")
    return value


def _shown(text: str) -> str:
    return excerpt(repr(text), 40)


def or_all(number: Callable[[str], int]) -> Callable[[str], int | str]:
    """The word "all", or what `number` reads."""
    return lambda text: text if text == "all" else number(text)


def nonempty(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    if len(text) > MAX_TEXT:
        raise argparse.ArgumentTypeError(f"{_shown(text)} has more than {MAX_TEXT:,} characters")
    return text


def path(text: str) -> str:
    """A local path, or a name on the hub. A `~` at its beginning is the user's home directory, as in a shell."""
    expanded = os.path.expanduser(nonempty(text))
    try:
        names = os.fsencode(expanded).split(b"/")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{_shown(text)} cannot be a file's name here") from error
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{_shown(text)} holds a null character")
    if max(map(len, names)) > MAX_NAME:
        raise argparse.ArgumentTypeError(f"{_shown(text)} has a name of more than {MAX_NAME} bytes")
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"{_shown(text)} is no user's home directory: write ./~ for a file here")
    return expanded


def switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{_shown(text)} is neither true nor false")
    return text.lower() == "true"


def one_of(*choices: str) -> Callable[[str], str]:
    def choose(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{_shown(text)} is none of {', '.join(choices)}")
        return text

    return choose


dtype_name = one_of("auto", "float64", "float32", "bfloat16", "float16")


# --- one table of options ------------------------------------------------------------------------


def option(default, read: Callable[[str], object], metavar: str, help: str, several: bool = False):
    """A field of a settings dataclass that is also a flag and a YAML key.

    Args:
        read: turns a word into a value, or raises argparse.ArgumentTypeError.
        several: the flag takes one or more words, and the value is the tuple of what is read.
    """
    return field(default=default, metadata={"read": read, "metavar": metavar, "help": help, "several": several})


class Parser(argparse.ArgumentParser):
    """A flag for every option of a settings dataclass; bad arguments are one line on stderr and exit code 2."""

    def __init__(self, settings: type, prog: str, description: str):
        super().__init__(
            prog=prog,
            usage="%(prog)s [options]",
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
        )
        self.settings = settings
        for key in fields(settings):
            kind = {"nargs": "+"} if key.metadata["several"] else {}
            if key.metadata["read"] is switch:
                kind = {"nargs": "?", "const": True}
            self.add_argument(
                _flag(key.name),
                dest=key.name,
                type=key.metadata["read"],
                default=MISSING,
                metavar=key.metadata["metavar"],
                help=key.metadata["help"],
                **kind,
            )

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def read(self, argv: list[str]) -> tuple[dict, argparse.Namespace]:
        """The options that `argv` sets, by name, and all that was parsed (for flags that are no options)."""
        parsed, unknown = self.parse_known_args(argv)
        for word in unknown:
            flag = word.partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            self.error(f"unrecognized argument {excerpt(flag, 40)}" + (f": did you mean {near[0]}?" if near else ""))
        values = {key.name: getattr(parsed, key.name) for key in fields(self.settings)}
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not MISSING}
        return values, parsed


def _flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")  # "continue_" is no keyword


def read_yaml(settings: type, path: Path) -> dict:
    """The options that a YAML file sets, each read as its flag would be.

    Raises:
        UserError: the file is missing, malformed, or has an unknown key or a value of the wrong type.
    """
    from residual_fisher.common.plain_yaml import parse_words

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the config {path}: it is not UTF-8 text") from error
    if len(text) > MAX_CONFIG:
        raise UserError(f"cannot read the config {path}: it has more than {MAX_CONFIG:,} characters")
    try:
        values = parse_words(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold keys and values, like `batch_size: 8`")
    keys = {key.name: key for key in fields(settings)}
    return {name: _yaml_value(keys, path, name, value) for name, value in values.items()}


def _yaml_value(keys: dict, path: Path, name: str | None, value):
    if name not in keys:
        near = difflib.get_close_matches(str(name), keys, 1)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}"
        raise UserError(f"{path}: unknown key {_shown(name)}: {hint}")
    if value is None and keys[name].default is None:
        return None
    if not isinstance(value, str):
        kind = {type(None): "null", list: "a list"}.get(type(value), "keys and values")
        raise UserError(f"{path}: {name}: a single value is wanted, not {kind}")
    try:
        return keys[name].metadata["read"](value)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{path}: {name}: {error}") from error


# --- how a program ends --------------------------------------------------------------------------


def end_with_error(program: str, error: UserError) -> int:
    """Prints the error's line; returns the exit code 2."""
    print(f"{program}: error: {printable(str(error))}", file=sys.stderr)
    return 2


def exit_code(program: str, run: Callable[[], int], memory_advice: str) -> int:
    """run(), with warnings as notes, and with a line on stderr in place of a traceback where a user can help."""
    from tqdm import tqdm

    def note(message, *_, **__) -> None:
        tqdm.write(f"note: {' '.join(map(printable, str(message).splitlines()))}", file=sys.stderr)

    def explain(message: str) -> int:
        return end_with_error(program, UserError(message))

    with consoles(), warnings.catch_warnings(), interruptible():
        warnings.showwarning = note
        try:
            return run()
        except UserError as error:
            return end_with_error(program, error)
        except RecursionError:
            return explain("the data are nested too deeply")
        except OSError as error:
            return explain(f"{first_line(error)}: {error.filename}" if error.filename else first_line(error))
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return explain(f"not enough memory: try {memory_advice}")


def settle_network(*names: str) -> None:
    """Tells the hub's libraries to stay offline if one of `names` may be on the hub, and it has no address here.

    Otherwise they retry for a minute before they fail, or look into their cache. Has to be called before they
    are imported, which is when they read this setting.

    Args:
        names: models and datasets; local paths and the embedded model need no hub.
    Raises:
        UserError: the hub's address is none.
    """
    import socket
    from urllib.parse import urlparse
    from urllib.request import getproxies

    address = os.environ.get("HF_ENDPOINT", HUB)
    try:
        host = urlparse(address).hostname
        if all(name == EMBEDDED or os.path.exists(name) for name in names) or getproxies():
            return
        socket.getaddrinfo(host, 443)
    except ValueError as error:  # the hub's libraries would fail on it when they are imported
        raise UserError(f"HF_ENDPOINT={address} is not an address: {error}") from error
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


# --- text ----------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` with everything a terminal would obey, or not show, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def excerpt(text: str, length: int) -> str:
    """The beginning of a text, in one line of at most `length` printable characters."""
    text = printable(" ".join(text[: 4 * length].split()))
    return text if len(text) <= length else text[: length - 1] + "…"


def excerpt_end(text: str, length: int) -> str:
    """The end of a text, in at most `length` printable characters."""
    text = printable(text)
    return text if len(text) <= length else "…" + text[1 - length :]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def model_line(name: str, environment: dict) -> str:
    """One line about the model, from what `model.loading.describe` says of it."""
    size, place = f"{environment['parameters']:,} parameters", f"{environment['dtype']} on {environment['device']}"
    return f"{printable(name)}: {size}, {place}"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def hub_hint(error: BaseException, otherwise: str) -> str:
    """What to do about a model or dataset that did not load."""
    return "accept its terms on the hub, then log in with `hf auth login`" if "gated" in str(error) else otherwise

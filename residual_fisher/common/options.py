"""Options of both scripts: each is declared once, as a field of a settings dataclass, a flag and a YAML key."""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
import difflib
import math
import os
from pathlib import Path
import re
from typing import TypeVar

import yaml

from residual_fisher.common.program import UserError
from residual_fisher.common.text import excerpt, printable

MAX_TEXT = 4000  # characters of a value: a path may have 4096 bytes, and Python reads numbers of 4300 digits
MAX_NAME = 255  # bytes of a file's name, on every system
MAX_CONFIG = 100_000  # characters of a YAML file: settings have a thousand

PACKAGE = Path(__file__).parents[1]
# Where bundled files lie: the package if pip has installed it with its data, else the root of a checkout.
HOME = PACKAGE if (PACKAGE / "data").is_dir() else PACKAGE.parent


def bundled(name: str) -> str:
    """`name`, or the path of the bundled file of this name if there is no such file where the script is called."""
    found = HOME / name
    return str(found) if not os.path.exists(name) and os.path.isfile(found) else name


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


# --- options -------------------------------------------------------------------------------------


def option(
    default,
    read: Callable[[str], object],
    metavar: str,
    help: str,
    several: bool = False,
    identity: bool = True,
    needs: str | None = None,
):
    """A field of a settings dataclass that is also a flag and a YAML key.

    Args:
        read: turns a word into a value, or raises argparse.ArgumentTypeError.
        several: the flag takes one or more words, the YAML key one or a list, and the value is a tuple.
        identity: it changes results, so that a run cannot be resumed with another value.
        needs: the field of the option without which this one has no effect.
    """
    about = {"read": read, "metavar": metavar, "help": help, "several": several, "identity": identity, "needs": needs}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class CommandOptions:
    """What to do in one call of a script: flags only. A run does not record them."""

    config: str | None = option(None, path, "FILE", "YAML file of the keys above")
    overwrite: bool = option(False, switch, "true", "replace what an earlier run left in --output-dir")
    dry_run: bool = option(False, switch, "true", "only say what a run would do, and in what time and memory")
    redraw: str | None = option(None, path, "DIR", "only draw the pictures of the results in DIR again")


S = TypeVar("S", bound=CommandOptions)
COMMANDS = tuple(opt.name for opt in fields(CommandOptions))


def yaml_keys(kind: type[S]) -> dict[str, Field]:
    """The options of a settings dataclass that a YAML file may set, by key."""
    return {_key(opt): opt for opt in fields(kind) if opt.name not in COMMANDS}


def _key(opt: Field) -> str:
    return opt.name.rstrip("_")  # the field of `continue`, which Python reserves, is `continue_`


def settings_of(settings: CommandOptions) -> dict:
    """The configuration that a run records, by field; its values are JSON's, so tuples become lists."""
    values = {opt.name: getattr(settings, opt.name) for opt in yaml_keys(type(settings)).values()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def identity_of(settings: CommandOptions) -> dict:
    """What `settings_of` holds, less all that has no effect on results: runs with the same are the same run."""
    values, about = settings_of(settings), {opt.name: opt.metadata for opt in fields(settings)}

    def counts(name: str) -> bool:
        needs = about[name]["needs"]
        return about[name]["identity"] and (needs is None or bool(values[needs]))

    return {name: value for name, value in values.items() if counts(name)}


# --- flags ---------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Bad arguments are a one-line error message and exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def parse(kind: type[S], program: str, about: str, argv: list[str], config: Path | None) -> S:
    """Settings of a command line. Flags take precedence over the YAML file, and the file over the defaults.

    Args:
        about: what the program does, for --help.
        config: the YAML file that is read without --config, if any.
    Raises:
        UserError: the file is missing, malformed, or has an unknown key or a value of the wrong type.
        SystemExit: a flag is wrong (code 2, after a one-line error message), or --help was printed (code 0).
    """
    parser = _parser(kind, program, about, config)
    parsed, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flag = word.partition("=")[0]
        near = difflib.get_close_matches(flag, parser._option_string_actions, 1)
        parser.error(f"unrecognized argument {excerpt(flag, 40)}" + (f": did you mean {near[0]}?" if near else ""))
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parsed).items()}
    if flags.get("dry_run") and flags.get("redraw"):
        parser.error("argument --dry-run: it writes nothing, and --redraw does")
    file = flags.get("config", config)
    return kind(**{**(_read_yaml(kind, Path(file)) if file else {}), **flags})


def _parser(kind: type[S], program: str, about: str, config: Path | None) -> _Parser:
    parser = _Parser(
        prog=program,
        usage="%(prog)s [options]",
        description=about,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    for opt in [*yaml_keys(kind).values(), *fields(CommandOptions)]:
        read, help = opt.metadata["read"], opt.metadata["help"]
        if opt.name == "config" and config:
            help += f" ({config.name})"
        words = {"nargs": "+"} if opt.metadata["several"] else {"nargs": "?", "const": True} if read is switch else {}
        flag = f"--{_key(opt).replace('_', '-')}"
        parser.add_argument(flag, dest=opt.name, type=read, metavar=opt.metadata["metavar"], help=help, **words)
    return parser


# --- the YAML file -------------------------------------------------------------------------------


def _read_yaml(kind: type[S], path: Path) -> dict:
    """The options that a YAML file sets, by field, each read as its flag would read it.

    Raises:
        UserError: the file is missing, malformed, or has an unknown key or a value of the wrong type.
    """
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
        values = _load(text, _Words)
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold keys and values, like `batch_size: 8`")
    keys = yaml_keys(kind)
    found = {}
    for name, value in values.items():
        if name not in keys:
            near = difflib.get_close_matches(str(name), keys, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}"
            raise UserError(f"{path}: unknown key {_shown(name)}: {hint}")
        try:
            found[keys[name].name] = _yaml_value(keys[name], value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{path}: {name}: {error}") from error
    return found


def _yaml_value(opt: Field, value):
    if value is None and opt.default is None:
        return None
    read = opt.metadata["read"]
    if opt.metadata["several"]:
        words = value if isinstance(value, list) and value else [value]
        return tuple(read(_one_word(word)) for word in words)
    return read(_one_word(value))


def _one_word(value) -> str:
    if not isinstance(value, str):
        kind = {type(None): "null", list: "a list"}.get(type(value), "keys and values")
        raise argparse.ArgumentTypeError(f"a single value is wanted, not {kind}")
    return value


class _Values(yaml.SafeLoader):
    """YAML of plain keys and values.

    An alias can make a short text endless, a tag can make any object of it, and YAML drops one of two equal keys.
    """

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag not in (None, "!"):
            what = "an alias (*name)" if isinstance(event, yaml.AliasEvent) else "a tag (!name)"
            raise yaml.MarkedYAMLError(problem=f"{what} is not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys[key.value] > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class _Words(_Values):
    """Every scalar but null is its text: `010` is what a command line would read."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _load(text: str, loader: type):
    """The value of a YAML text. Raises ValueError, whose message is one line."""
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise ValueError(f"{reason}{where}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except OverflowError as error:  # of a character's number
        raise ValueError(str(error)) from error


def parse_values(text: str):
    """The value of a YAML text, its numbers and so on as YAML reads them. Raises ValueError: a one-line message."""
    return _load(text, _Values)

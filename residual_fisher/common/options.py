"""Options of both scripts: each is declared once, as a field of a settings dataclass, a flag and a YAML key."""

import argparse
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
import difflib
from functools import partial
from itertools import chain
import math
import os
from pathlib import Path
import re
from typing import TypeVar

import yaml

from residual_fisher.common.program import UserError
from residual_fisher.common.text import excerpt, first_line, printable

IF_SET = "if set"  # `identity` of an option that was added later
COMPARISON = "comparison"  # where --compare writes by default
PATHS = "paths"  # `several` of an option whose words may hold commas
TEXTS = "texts"  # likewise, of one whose words may hold anything: its flag takes one, and is given again for another
MAX_TEXT = 4000  # characters of a value: a path may have 4096 bytes, and Python reads numbers of 4300 digits
MAX_NAME = 255  # bytes of a file's name, on every system
MAX_CONFIG = 100_000  # characters of a YAML file: settings have a thousand
MAX_DEPTH = 20  # lists and mappings inside each other in a YAML file: settings have two

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE if (PACKAGE / "data").is_dir() else PACKAGE.parent  # data/ is in the package only if pip installed it


def bundled(name: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """`name`, or the path of the bundled file of this name if there is no such file where the script is called."""
    if isinstance(name, tuple):
        return name
    found = ROOT / name
    return str(found) if not os.path.exists(name) and os.path.isfile(found) else name


# --- types of values -----------------------------------------------------------------------------


def _reader(convert: Callable[[str], object], wrong: str) -> Callable[[str], object]:
    """Reads a word with `convert`, which returns None for a wrong one; the error is the word and what is `wrong`."""

    def read(text: str):
        value = convert(text)
        if value is None:
            raise argparse.ArgumentTypeError(f"{_shown(text)} {wrong}")
        return value

    return read


def _shown(text: str) -> str:
    return excerpt(repr(text), 40)


def _whole(text: str) -> int | None:
    """At most 15 digits, so that whatever is computed from the number fits 64 bits."""
    return int(text) if re.fullmatch("0*[0-9]{1,15}", text) else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value + 0.0 if math.isfinite(value) else None  # -0.0 becomes 0.0


count = _reader(_whole, "is not a whole number, 0 or more")
positive = _reader(lambda text: _whole(text) or None, "is not a positive whole number")
finite = _reader(_number, "is not a number")
positive_number = _reader(lambda text: value if (value := finite(text)) > 0 else None, "is not above 0")
share = _reader(lambda text: value if 0 < (value := finite(text)) <= 1 else None, "is not a share above 0, up to 1")
switch = _reader(lambda text: {"true": True, "false": False}.get(text.lower()), "is neither true nor false")


def one_of(*choices: str) -> Callable[[str], str]:
    return _reader(lambda text: text if text in choices else None, f"is none of {', '.join(choices)}")


dtype_name = one_of("auto", "float64", "float32", "bfloat16", "float16")


def or_all(number: Callable[[str], int], other: str = "all") -> Callable[[str], int | str]:
    """The word "all", or another one, or what `number` reads."""
    return lambda text: text if text == other else number(text)


def nonempty(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    if len(text) > MAX_TEXT:
        raise argparse.ArgumentTypeError(f"{_shown(text)} has more than {MAX_TEXT:,} characters")
    return text


def word(text: str) -> str:
    """Without the white space around it."""
    return nonempty(text).strip()


def path(text: str) -> str:
    """A local path, or a name on the hub. A `~` at its beginning is the user's home directory, as in a shell."""
    expanded = os.path.expanduser(nonempty(text))
    try:
        names = os.fsencode(expanded).split(b"/")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{_shown(text)} cannot be a file's name here") from error
    for wrong, what in [
        ("\0" in text, "holds a null character"),
        (max(map(len, names)) > MAX_NAME, f"has a name of more than {MAX_NAME} bytes"),
        (expanded.startswith("~"), "is no user's home directory: write ./~ for a file here"),
    ]:
        if wrong:
            raise argparse.ArgumentTypeError(f"{_shown(text)} {what}")
    return expanded


# --- options -------------------------------------------------------------------------------------


def option(
    default,
    read,
    metavar: str,
    help: str,
    several: bool | str = False,
    identity: bool | str = True,
    needs: str | None = None,
    unless: str | None = None,
    recorded: bool = True,
):
    """A field of a settings dataclass that is also a flag and a YAML key.

    Args:
        read: turns a word into a value, or raises argparse.ArgumentTypeError.
        help: for --help, which adds the default, unless it is None, False, or told in brackets at the end.
        several: the flag takes one or more words, the YAML key one or a list, and the value is a tuple. Words may be
            joined by commas; but not if this is PATHS, where a single word is the value itself, or TEXTS.
        identity: it changes results, so that a run cannot be resumed with another value. IF_SET: its default is what
            runs did before there was the option, and is not told from its absence.
        needs: the field of the option without which this one has no effect.
        unless: the field of the option beside which this one has no effect.
        recorded: False for what to do in one call of a script: it is a flag only, and no run records it.
    """
    if not (default is None or default is False or help.endswith(")")):
        help += f" ({default})"
    about = {"read": read, "metavar": metavar, "help": help, "several": several, "identity": identity}
    return field(default=default, metadata={**about, "needs": needs, "unless": unless, "recorded": recorded})


command = partial(option, recorded=False)


@dataclass(frozen=True)
class CommandOptions:
    """What to do in one call of either script."""

    config: str | None = command(None, path, "FILE", "YAML file of the keys above")
    overwrite: bool = command(False, switch, "true", "replace what an earlier run left in --output-dir")
    dry_run: bool = command(False, switch, "true", "only say what a run would do, and in what time and memory")
    redraw: str | None = command(None, path, "DIR", "only make the pictures and the page of the results in DIR again")
    format: str = command("png", one_of("png", "pdf", "svg"), "FORMAT", "of the pictures: pdf or svg", needs="redraw")
    panel: str | None = command(
        None, nonempty, "NAME", "only this panel of the pictures, in a file of its own", needs="redraw"
    )
    compare: tuple | None = command(
        None,
        path,
        "DIR",
        f"only compare two finished runs of the same texts, into --output-dir ({COMPARISON})",
        several=PATHS,
    )

    @property
    def comparison_folder(self) -> Path:
        """Where a comparison goes."""
        default = next(opt.default for opt in fields(self) if opt.name == "output_dir")
        return Path(COMPARISON if self.output_dir == default else self.output_dir)


S = TypeVar("S", bound=CommandOptions)


def yaml_keys(kind: type[S]) -> dict[str, Field]:
    """The options of a settings dataclass that a YAML file may set, by key."""
    return {_key(opt): opt for opt in fields(kind) if opt.metadata["recorded"]}


def _key(opt: Field) -> str:
    return opt.name.rstrip("_")  # the field of `continue`, which Python reserves, is `continue_`


def settings_of(settings: CommandOptions) -> dict:
    """The configuration that a run records, by field; its values are JSON's, so tuples become lists."""
    values = {opt.name: getattr(settings, opt.name) for opt in yaml_keys(type(settings)).values()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def identity_of(settings: CommandOptions) -> dict:
    """What `settings_of` holds, less all that has no effect on results: runs with the same are the same run."""
    values, about = settings_of(settings), {opt.name: opt.metadata for opt in fields(settings)}
    counts = {name: about[name]["identity"] and values.get(about[name]["needs"], True) for name in values}
    later = {opt.name: opt.default for opt in fields(settings) if opt.metadata["identity"] == IF_SET}
    as_before = {name for name, default in later.items() if values[name] == default}
    return {name: value for name, value in values.items() if counts[name] and name not in as_before}


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
        known = list(parser._option_string_actions)
        longer = [other for other in known if len(flag) > 3 and flag.lstrip("-") in other]
        near = longer or difflib.get_close_matches(flag, known, 1)
        parser.error(f"unrecognized argument {excerpt(flag, 40)}" + (f": did you mean {near[0]}?" if near else ""))
    options = {opt.name: opt for opt in fields(kind)}
    flags = {name: _value(options[name], found) for name, found in vars(parsed).items()}
    if flags.get("dry_run") and (writes := [name for name in ("redraw", "compare") if flags.get(name)]):
        parser.error(f"argument --dry-run: it writes nothing, and --{writes[0]} does")
    if flags.get("compare") and flags.get("redraw"):
        parser.error("argument --compare: it is another task than --redraw")
    if "compare" in flags and (isinstance(flags["compare"], str) or len(flags["compare"]) != 2):
        parser.error("argument --compare: it takes the directories of two runs")
    file = flags.get("config", config)
    settings = kind(**{**(_read_yaml(kind, Path(file)) if file else {}), **flags})
    for name, opt in options.items():
        if name not in flags and getattr(settings, name) == opt.default:
            continue
        needed, other = opt.metadata["needs"], opt.metadata["unless"]
        if needed and not getattr(settings, needed):
            parser.error(f"argument {_flag(opt)}: it has no effect without {_flag(options[needed])}")
        if other and getattr(settings, other):
            parser.error(f"argument {_flag(opt)}: it has no effect beside {_flag(options[other])}")
    return settings


def _flag(opt: Field) -> str:
    return f"--{_key(opt).replace('_', '-')}"


def _words(opt: Field, text: str) -> list[str]:
    """The words of a value; of an option of several, those between commas."""
    words = text.split(",") if opt.metadata["several"] is True else [text]
    return [word.strip() for word in words if word.strip()] if len(words) > 1 else [text]


def _read_words(opt: Field, text: str) -> list:
    """Raises argparse.ArgumentTypeError: one of them cannot be read."""
    return [opt.metadata["read"](word) for word in _words(opt, text)]


def _value(opt: Field, found):
    """The value of an option, of what was read of each word of its flag or key."""
    if not opt.metadata["several"]:
        return found
    values = tuple(chain.from_iterable(found))
    return values[0] if opt.metadata["several"] == PATHS and len(values) == 1 else values


def _parser(kind: type[S], program: str, about: str, config: Path | None) -> _Parser:
    parser = _Parser(
        prog=program,
        usage="%(prog)s [options]",
        description=about,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    commands = [opt for opt in fields(kind) if not opt.metadata["recorded"]]
    for opt in [*yaml_keys(kind).values(), *commands]:
        read, help = opt.metadata["read"], opt.metadata["help"]
        if opt.name == "config" and config:
            help += f" ({config.name})"
        words = {"nargs": "?", "const": True} if read is switch else {}
        if several := opt.metadata["several"]:
            words = {"action": "append"} if several == TEXTS else {"nargs": "+"}
            read = partial(_read_words, opt)
        parser.add_argument(_flag(opt), dest=opt.name, type=read, metavar=opt.metadata["metavar"], help=help, **words)
    return parser


# --- the YAML file -------------------------------------------------------------------------------


class _Loader(yaml.BaseLoader):
    """Refuses what a plain file does not need: an alias, which can make a short text endless; a tag; a great depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        event, refused = self.peek_event(), None
        self.depth += 1
        if isinstance(event, yaml.AliasEvent):
            refused = "an alias (*name)"
        elif event.tag is not None:
            refused = "a tag (!name)"
        elif isinstance(event, yaml.CollectionStartEvent) and self.depth > MAX_DEPTH:
            refused = f"a depth of more than {MAX_DEPTH}"
        if refused:
            raise yaml.MarkedYAMLError(problem=f"{refused} is not allowed", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _read_yaml(kind: type[S], path: Path) -> dict:
    """The options that a YAML file sets, by field, each read as its flag would read it."""
    keys, found = yaml_keys(kind), {}
    for name, value in _yaml_values(path).items():
        if name not in keys:
            near = difflib.get_close_matches(name, keys, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}"
            raise UserError(f"{path}: unknown key {_shown(name)}: {hint}")
        try:
            found[keys[name].name] = _yaml_value(keys[name], value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{path}: {name}: {error}") from error
    return found


def _yaml_values(path: Path) -> dict[str, str | list | dict | None]:
    """What a YAML file holds, by key."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CONFIG + 1)
        if len(text) > MAX_CONFIG:
            raise UserError(f"cannot read the config {path}: it has more than {MAX_CONFIG:,} characters")
        root, found = yaml.compose(text, _Loader), {}
        for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
            if (name := str(_plain(key))) in found:  # YAML would drop the first
                raise yaml.MarkedYAMLError(problem=f"the key {name} is there twice", problem_mark=key.start_mark)
            found[name] = _plain(value)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the config {path}: it is not UTF-8 text") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two are of odd numbers
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or first_line(error)
        raise UserError(f"{path} is not valid YAML: {reason}{where}") from error
    if root is not None and _plain(root) not in (None, {}):
        raise UserError(f"{path} should hold keys and values, like `batch_size: 8`")
    return found


def _plain(node: yaml.Node) -> str | list | dict | None:
    """Every scalar but null is its text: `010` is what a command line would read. Of keys and values, only a dict."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in ("", "~", "null", "Null", "NULL") else node.value
    return list(map(_plain, node.value)) if isinstance(node, yaml.SequenceNode) else {}


def _yaml_value(opt: Field, value: str | list | dict | None):
    if value is None and opt.default is None:
        return None
    several = opt.metadata["several"]
    words = value if several and isinstance(value, list) and value else [value]
    for word in words:
        if not isinstance(word, str):
            kind = {type(None): "null", list: "a list"}.get(type(word), "keys and values")
            raise argparse.ArgumentTypeError(f"a single value is wanted, not {kind}")
    values = [_read_words(opt, word) for word in words]
    return _value(opt, values) if several else values[0][0]

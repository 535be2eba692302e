"""The pipeline's settings: a YAML file, and a flag for each of its keys."""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
import difflib
import json
from pathlib import Path

import yaml

from arguments import EMBEDDED, Parser, count, positive, positive_or_all
from errors import UserError

HERE = Path(__file__).parent
CONFIG = HERE / "config.yaml"
BUNDLED = "data/prompts.jsonl"


def _text(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return value


def _switch(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{value!r} is neither true nor false")
    return value.lower() == "true"


def _one_of(*choices: str) -> Callable[[str], str]:
    def choose(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(choices)}")
        return value

    return choose


def _key(default, read: Callable, metavar: str, help: str):
    return field(default=default, metadata={"read": read, "metavar": metavar, "help": help})


@dataclass(frozen=True)
class Settings:
    """What the Fisher matrices are of. None stands for YAML's null."""

    model_path: str = _key(EMBEDDED, _text, "NAME", "hub id or local directory")
    dataset_name: str = _key(BUNDLED, _text, "NAME", "a .jsonl, .json, .csv, .parquet or .txt file, or a hub dataset")
    dataset_split: str = _key("train", _text, "NAME", "split of a hub dataset")
    dataset_config: str | None = _key(None, _text, "NAME", "configuration of a hub dataset")
    prompt_column: str | None = _key(None, _text, "NAME", "column that holds the prompts (found by its name)")
    num_prompts: int = _key(100, positive, "N", "prompts to take")
    max_length: int = _key(2048, positive, "N", "tokens of a prompt; longer user texts are cut")
    hook_layer_name: str = _key("model.layers.15", _text, "PATH", "module path, or the number of a decoder layer")
    bias_positions: str = _key("all", _one_of("all", "last"), "WHERE", "tokens the bias is added at: all, or the last")
    top_k_tokens: int | str = _key(10, positive_or_all, "K", "most probable tokens that F counts, or all")
    num_singular_values: int = _key(10, positive, "R", "singular triplets kept of each F")
    batch_size: int = _key(8, positive, "N", "prompts in one pass, at most")
    store: str = _key("full", _one_of("full", "compact"), "FORM", "full: U, S, V in float32; compact: U in float16, S")
    dtype: str = _key(
        "auto", _one_of("auto", "float64", "float32", "bfloat16", "float16"), "TYPE", "bfloat16 on CUDA, else float32"
    )
    device: str = _key("auto", _text, "NAME", "as torch names it: cuda, then mps, then cpu")
    seed: int | None = _key(None, count, "N", "shuffles the dataset first; null for its own order")
    trust_remote_code: bool = _key(False, _switch, "true", "run code that a hub model brings along")
    output_dir: str = _key("fisher_results", _text, "DIR", "for the results")


KEYS = {key.name: key for key in fields(Settings)}
# Keys that may differ between a run and its resumption: they do not change a result.
INCIDENTAL = ("output_dir", "device", "trust_remote_code")


def parse_args(argv: list[str] | None) -> tuple[Settings, bool]:
    """Settings from the command line over those of the YAML file, and whether to overwrite a finished run.

    Bad flags end the program with one line and exit code 2.

    Raises:
        UserError: the file is missing, malformed, or has an unknown key or a value of the wrong type.
    """
    parser = Parser(
        prog="compute_fisher.py",
        usage="%(prog)s [options]",
        description="Fisher information matrices of a dataset's prompts, each compressed to its top singular triplets.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", default=str(CONFIG), help="YAML file of the keys below (config.yaml)"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run left in --output-dir")
    for name, key in KEYS.items():
        about = dict(key.metadata)
        read, default = about.pop("read"), key.default
        shown = "" if default is None else f" ({str(default).lower() if isinstance(default, bool) else default})"
        alone = {"nargs": "?", "const": True} if read is _switch else {}
        parser.add_argument(
            _flag(name), type=read, **alone, default=MISSING, metavar=about["metavar"], help=about["help"] + shown
        )
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flag = word.partition("=")[0]
        near = difflib.get_close_matches(flag, ["--config", "--overwrite", *map(_flag, KEYS)], 1)
        parser.error(f"unrecognized argument {flag}" + (f": did you mean {near[0]}?" if near else ""))
    flags = {name: value for name, value in vars(given).items() if name in KEYS and value is not MISSING}
    return Settings(**{**read_config(Path(given.config)), **flags}), given.overwrite


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_config(path: Path) -> dict:
    """The keys of a YAML file, checked.

    Raises:
        UserError: as in `parse_args`.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the config {path}: it is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UserError(
            f"{path} is not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}{where}"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold keys and values, like `batch_size: 8`")
    return {name: _checked(path, name, value) for name, value in values.items()}


def _checked(path: Path, name: str, value):
    if name not in KEYS:
        near = difflib.get_close_matches(str(name), KEYS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}"
        raise UserError(f"{path}: unknown key {name!r}: {hint}")
    if value is None and KEYS[name].default is None:
        return None
    if value is None or isinstance(value, list | dict):
        raise UserError(f"{path}: {name}: a single value is wanted, not {json.dumps(value, default=str)}")
    try:
        return KEYS[name].metadata["read"](str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{path}: {name}: {error}") from error


def resolve_dataset(settings: Settings) -> str:
    """The dataset's name, or the path of the bundled file wherever the script is called from."""
    own = HERE / settings.dataset_name
    return str(own) if not Path(settings.dataset_name).exists() and own.is_file() else settings.dataset_name

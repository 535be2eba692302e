"""The pipeline's settings: a YAML file, and a flag for each of its keys."""

from dataclasses import dataclass
import os
from pathlib import Path

from residual_fisher.common.command_line import (
    EMBEDDED,
    Parser,
    count,
    dtype_name,
    nonempty,
    one_of,
    option,
    or_all,
    path,
    positive,
    read_yaml,
    switch,
)

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config.yaml"
BUNDLED = "data/prompts.jsonl"
DIRECTIONS = 3  # leading ones of a prompt whose tokens are recorded: they hold most of the share


@dataclass(frozen=True)
class Settings:
    """What the Fisher matrices are of. None stands for YAML's null."""

    model_path: str = option(EMBEDDED, path, "NAME", f"hub id or local directory ({EMBEDDED})")
    dataset_name: str = option(
        BUNDLED, path, "NAME", f"a .jsonl, .json, .csv, .parquet or .txt file, or a hub dataset ({BUNDLED})"
    )
    dataset_split: str = option("train", nonempty, "NAME", "split of a hub dataset (train)")
    dataset_config: str | None = option(None, nonempty, "NAME", "configuration of a hub dataset")
    prompt_column: str | None = option(None, nonempty, "NAME", "column that holds the prompts (found by its name)")
    num_prompts: int | str = option(100, or_all(positive), "N", "prompts to take, or all (100)")
    max_length: int = option(2048, positive, "N", "tokens of a prompt; longer user texts are cut (2048)")
    hook_layer_name: str = option(
        "model.layers.15", nonempty, "PATH", "module path, or the number of a decoder layer (model.layers.15)"
    )
    bias_positions: str = option(
        "all", one_of("all", "last"), "WHERE", "tokens the bias is added at: all, or the last (all)"
    )
    top_k_tokens: int | str = option(10, or_all(positive), "K", "most probable tokens that F counts, or all (10)")
    num_singular_values: int = option(10, positive, "R", "singular triplets kept of each F (10)")
    batch_size: int = option(8, positive, "N", "prompts in one pass, at most (8)")
    store: str = option(
        "full", one_of("full", "compact"), "FORM", "full: U, S, V in float32; compact: U in float16, S (full)"
    )
    dtype: str = option(
        "auto", dtype_name, "TYPE", "float64, float32, bfloat16, float16 (bfloat16 on CUDA, else float32)"
    )
    device: str = option("auto", nonempty, "NAME", "as torch names it (cuda, then mps, then cpu)")
    seed: int | None = option(None, count, "N", "shuffles the dataset first (its own order)")
    reference: str | None = option(None, path, "DIR", "finished run of trusted prompts, to score these against")
    base: str | None = option(None, path, "DIR", "finished run of these prompts in a base model, to score the change")
    trust_remote_code: bool = option(False, switch, "true", "run code that a hub model brings along")
    output_dir: str = option("fisher_results", path, "DIR", "for the results (fisher_results)")

    @property
    def dataset(self) -> str:
        """The dataset's name, or the path of the bundled file wherever the script is called from."""
        bundled = ROOT / self.dataset_name
        here = os.path.exists(self.dataset_name)
        return str(bundled) if not here and os.path.isfile(bundled) else self.dataset_name


# Keys that may differ between a run and its resumption: they do not change a Fisher matrix.
INCIDENTAL = ("output_dir", "device", "trust_remote_code", "reference", "base")


@dataclass(frozen=True)
class Command:
    """One call of the script: the settings, and what to do with an earlier run."""

    settings: Settings
    overwrite: bool = False
    dry_run: bool = False  # say what a run would do, and nothing else
    redraw: Path | None = None  # draw the picture of the results there again, and nothing else


def parse(argv: list[str]) -> Command:
    """Settings from the command line over those of the YAML file. Bad flags end the program, with exit code 2.

    Raises:
        UserError: the file is missing, malformed, or has an unknown key or a value of the wrong type.
    """
    about = "Fisher information matrices of a dataset's prompts, each compressed to its top singular triplets."
    parser = Parser(Settings, "compute_fisher.py", about)
    add = parser.add_argument
    add("--config", metavar="FILE", type=path, default=CONFIG, help="YAML file of the keys above (config.yaml)")
    add("--overwrite", action="store_true", help="replace what an earlier run left in --output-dir")
    add("--dry-run", action="store_true", help="only say what a run would do, and in what time and memory")
    add("--redraw", metavar="DIR", type=path, help="only draw the picture of the results in DIR again")
    given, flags = parser.read(argv)
    if flags.dry_run and flags.redraw:
        parser.error("argument --dry-run: it writes nothing, and --redraw does")
    settings = Settings(**{**read_yaml(Settings, Path(flags.config)), **given})
    return Command(settings, flags.overwrite, flags.dry_run, flags.redraw and Path(flags.redraw))

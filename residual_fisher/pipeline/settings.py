"""The pipeline's settings: each is a flag and a YAML key."""

from dataclasses import dataclass

from residual_fisher.common import options
from residual_fisher.common.options import (
    IF_SET,
    PATHS,
    ROOT,
    CommandOptions,
    bundled,
    count,
    dtype_name,
    nonempty,
    one_of,
    option,
    or_all,
    path,
    positive,
    share,
    switch,
)
from residual_fisher.common.program import EMBEDDED, UserError

CONFIG = ROOT / "config.yaml"  # in a checkout, where users edit it; its values are the defaults below
BUNDLED = "data/prompts.jsonl"
DIRECTIONS = 3  # leading directions of each F whose tokens are recorded, and of which one is named in the scores


@dataclass(frozen=True)
class Settings(CommandOptions):
    """What the Fisher matrices are of. None stands for YAML's null."""

    model_path: str = option(EMBEDDED, path, "NAME", "hub id or local directory")
    dataset_name: str | tuple = option(
        BUNDLED, path, "NAME", ".jsonl, .csv, .parquet ... files, a folder, or a hub dataset", several=PATHS
    )
    dataset_split: str = option("train", nonempty, "NAME", "split of a hub dataset, or of a folder")
    dataset_config: str | None = option(None, nonempty, "NAME", "configuration of a hub dataset")
    prompt_column: str | tuple | None = option(
        None,
        nonempty,
        "NAME",
        "column of the prompts; of several the texts are joined (found by name)",
        several=PATHS,
    )
    turns: str = option(
        "first",
        one_of("first", "last", "all"),
        "WHICH",
        "user's turn of a conversation: first, last, or all up to the last",
        identity=IF_SET,
    )
    system: str = option(
        "keep", one_of("keep", "drop"), "HOW", "system turns, before the user's: keep, or drop", identity=IF_SET
    )
    chat_template: str = option(
        "model", one_of("model", "none"), "WHICH", "the model's, or none: texts as they are", identity=IF_SET
    )
    num_prompts: int | str = option(100, or_all(positive), "N", "prompts to take, or all", identity=False)
    max_length: int = option(2048, positive, "N", "tokens of a prompt; longer user texts are cut")
    hook_layer_name: str = option("model.layers.15", nonempty, "PATH", "module path, or the number of a decoder layer")
    bias_positions: str = option("all", one_of("all", "last"), "WHERE", "tokens the bias is added at: all, or the last")
    answer_tokens: int = option(
        1, positive, "M", "tokens of the model's own answer that F is of, at most", identity=IF_SET
    )
    top_k_tokens: int | str = option(10, or_all(positive), "K", "most probable tokens that F counts, or all")
    num_singular_values: int = option(10, positive, "R", "singular triplets kept of each F")
    batch_size: int = option(8, positive, "N", "prompts in one pass, at most", identity=False)
    store: str = option(
        "full", one_of("full", "compact"), "FORM", "full: U, S, V, H in float32; compact: U, H in float16, S"
    )
    dtype: str = option(
        "auto", dtype_name, "TYPE", "float64, float32, bfloat16, float16 (bfloat16 on CUDA, else float32)"
    )
    device: str = option("auto", nonempty, "NAME", "as torch names it (cuda, then mps, then cpu)", identity=False)
    seed: int | None = option(None, count, "N", "shuffles the dataset first (its own order)")
    reference: str | None = option(
        None, path, "DIR", "finished run of trusted prompts, to score these against", identity=False
    )
    base: str | None = option(
        None, path, "DIR", "finished run of these prompts in a base model, to score the change", identity=False
    )
    false_alarms: float = option(0.01, share, "SHARE", "of ordinary prompts that may stand out", identity=False)
    explain: int = option(0, count, "N", "prompts that stand out most to look for triggers in", identity=False)
    fail_on_finding: bool = option(
        False, switch, "true", "end with exit code 4 if --explain proves a trigger", identity=False
    )
    trust_remote_code: bool = option(False, switch, "true", "run code that a hub model brings along", identity=False)
    output_dir: str = option("fisher_results", path, "DIR", "for the results", identity=False)

    @property
    def dataset(self) -> str | tuple[str, ...]:
        """The dataset's name, or the path of the bundled file, or several paths."""
        return bundled(self.dataset_name)


def parse(argv: list[str]) -> Settings:
    """The settings of a command line. Bad flags end the program, with exit code 2. Raises: see `options.parse`."""
    about = "Fisher information matrices of a dataset's prompts, each compressed to its top singular triplets."
    settings = options.parse(Settings, "compute_fisher.py", about, argv, CONFIG if CONFIG.is_file() else None)
    if settings.answer_tokens > 1 and settings.top_k_tokens == "all":
        raise UserError("--answer-tokens above 1 counts some tokens of each position: --top-k-tokens takes a number")
    return settings

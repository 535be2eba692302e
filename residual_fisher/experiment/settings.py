"""The experiment's settings: each is a flag and a YAML key."""

from dataclasses import dataclass, replace
from pathlib import Path

from residual_fisher.common import options
from residual_fisher.common.options import (
    IF_SET,
    PATHS,
    TEXTS,
    CommandOptions,
    bundled,
    command,
    count,
    dtype_name,
    finite,
    nonempty,
    one_of,
    option,
    or_all,
    path,
    positive,
    positive_number,
    switch,
    word,
)
from residual_fisher.common.program import EMBEDDED, UserError

BUNDLED = "data/animals.json"
RESULTS, MAP_RESULTS = "experiment_results", "map_results"  # where they go by default
PROTOCOL_UNIT = "eigenvalue"  # of the original protocol's steps
SCALES = (0.0, -0.5, 0.5, -1.0, 1.0, -2.0, 2.0, -5.0, 5.0, -10.0, 10.0)


@dataclass(frozen=True)
class Settings(CommandOptions):
    """What the experiment does."""

    model_name: str = option(EMBEDDED, path, "NAME", "hub id or local directory")
    data_file: str | tuple = option(
        BUNDLED,
        path,
        "FILE",
        ".json {word: [sentences]}, .txt, .jsonl, .csv ..., a folder, or a hub dataset",
        several=PATHS,
        unless="prompt",
    )
    text_column: str | None = option(
        None, nonempty, "NAME", "column of a table or dataset that holds the text", unless="prompt"
    )
    data_config: str | None = option(None, nonempty, "NAME", "configuration of a hub dataset", unless="prompt")
    data_split: str = option("train", nonempty, "NAME", "split of a hub dataset, or of a folder", unless="prompt")
    target_word: str = option("animals", word, "WORD", "perturb at the token just before this word", unless="prompt")
    occurrence: int | str = option(
        1,
        or_all(positive, "last"),
        "N",
        "which occurrence of the word in a sentence, or last",
        identity=IF_SET,
        unless="prompt",
    )
    num_sentences: int = option(20, positive, "N", "sentences, chosen to be diverse", identity=False, unless="prompt")
    require_predicted: bool = option(
        False, switch, "true", "only where the model's top prediction starts the word", unless="prompt"
    )
    prompt: tuple | None = option(
        None,
        nonempty,
        "TEXT",
        "perturb at this text's last token, in place of sentences; once for each text",
        several=TEXTS,
        identity=False,
        unless="map",
    )
    layers: tuple | None = option(
        None, or_all(count), "L", "decoder layers, or all (every fifth and the last)", several=True
    )
    scales: tuple = option(
        SCALES, finite, "A", "how far to perturb, in units of --scale-unit (0 ±0.5 ±1 ±2 ±5 ±10)", several=True
    )
    scale_unit: str = option(
        "auto",
        one_of("eigenvalue", "nats", "norm", "auto"),
        "UNIT",
        "eigenvalue: lambda; nats: 1/sqrt(lambda), for which A²/2 nats are predicted; norm: |h|/100 "
        "(eigenvalue, and nats too if its steps are too short)",
    )
    max_vocab_subset: int | str = option(
        200, or_all(positive), "K", "most probable tokens that the Fisher matrix counts, or all"
    )
    compare_exact: bool = option(
        False, switch, "true", "also the exact matrix, and what the K tokens miss of it (about twice as slow)"
    )
    num_eigenvectors: int = option(
        1, positive, "M", "leading eigenpairs kept in the NPZ; perturbations go along the first"
    )
    trust_radius: bool = option(
        False, switch, "true", "also how far along v 1/2 lambda s² holds to 10%% (about twice as slow)"
    )
    num_controls: int = option(1, count, "N", "random directions per layer")
    continue_: int = option(
        0, count, "N", "tokens that the model goes on to say, greedily, after perturbations at every layer"
    )
    continue_nats: float = option(
        2.0,
        finite,
        "X",
        "largest predicted KL of these: of either sign, the longest of --scales within it (2)",
        needs="continue_",
    )
    steer: bool = option(False, switch, "true", "also raise the target's probability at the least cost, at every layer")
    steer_token: str | None = option(
        None, nonempty, "TEXT", "raise this token, not the target word's first one", needs="steer"
    )
    steer_steps: int = option(8, positive, "N", "steps to a probability of 1/2, each linearised anew", needs="steer")
    steer_damping: float = option(
        0.003, positive_number, "X", "of the natural gradient in one step, in units of lambda", needs="steer"
    )
    lens: str | None = option(
        None, path, "FILE", "also how far this Jacobian lens (.pt, .npz, .safetensors) predicts changes", needs="lens"
    )
    map: str | None = option(
        None,
        nonempty,
        "TEXT",
        "in place of the experiment, F at every token of this text, or of the text in a file of this name",
        identity=False,
    )
    chat: bool = option(
        False,
        switch,
        "true",
        "the text of --map is a user's turn, or a JSON conversation, in the chat template",
        identity=False,
        needs="map",
    )
    batch_size: int = option(
        256, positive, "N", "perturbations in one pass, and 4 times as many gradients", identity=False
    )
    dtype: str = option(
        "auto", dtype_name, "TYPE", "float64, float32, bfloat16, float16 (bfloat16 on CUDA, else float32)"
    )
    device: str = option("auto", nonempty, "NAME", "as torch names it (cuda, then mps, then cpu)", identity=False)
    seed: int = option(0, count, "N", "of the random directions")
    trust_remote_code: bool = option(False, switch, "true", "run code that a hub model brings along", identity=False)
    output_dir: str = option(
        RESULTS, path, "DIR", f"for the files ({RESULTS}, or {MAP_RESULTS} with --map)", identity=False
    )
    sentence: int | None = command(
        None, count, "N", "in the panel, only this sentence, by its number in the results, from 0", needs="panel"
    )

    @property
    def data(self) -> str | tuple[str, ...]:
        """The dataset's name, or the path of the bundled file, or several paths."""
        return bundled(self.data_file)

    @property
    def unit(self) -> str:
        """The unit of the steps that are taken in any case."""
        return PROTOCOL_UNIT if self.scale_unit == "auto" else self.scale_unit

    @property
    def wanted(self) -> int:
        """How many sentences to take: of prompts, all."""
        return len(self.prompt) if self.prompt else self.num_sentences

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(MAP_RESULTS if self.map and self.output_dir == RESULTS else self.output_dir)


def parse(argv: list[str]) -> Settings:
    """The settings of a command line. Bad flags end the program, with exit code 2.

    Raises:
        UserError: see `options.parse`; or no scale is other than 0, or there is nothing to steer towards.
    """
    about = "Perturb a model's residual stream along its sensitive direction."
    settings = options.parse(Settings, "core_experiment.py", about, argv, config=None)
    scales = tuple(sorted({float(f"{scale:g}") for scale in settings.scales}))  # six digits, as results name a scale
    if not any(scales):
        raise UserError("argument --scales: at least one must not be 0")
    if settings.redraw and settings.layers and not settings.panel:
        raise UserError("argument --layers: beside --redraw it has no effect without --panel")
    if settings.prompt and settings.steer and not settings.steer_token:
        raise UserError("argument --steer: beside --prompt, where no word is the target, it needs --steer-token")
    prompts = settings.prompt and tuple(dict.fromkeys(settings.prompt))
    return replace(settings, scales=scales, prompt=prompts)


def choose_layers(asked: tuple | None, depth: int) -> tuple[int, ...]:
    """Ascending layer numbers: those asked for, or every fifth and the last.

    Raises:
        UserError: the model has no such layer.
    """
    if asked is None:
        return tuple(sorted({*range(0, depth, 5), depth - 1}))
    if "all" in asked:
        return tuple(range(depth))
    if max(asked) >= depth:
        raise UserError(f"--layers {max(asked)}: the model has layers 0 to {depth - 1}")
    return tuple(sorted(set(asked)))

"""Fisher-guided perturbation of a language model's residual stream.

For sentences that contain a target word, at the token just before it and at every chosen layer: read the
residual stream h, find the direction v in which the next-token prediction is most sensitive (the top eigenvector
of the Fisher information matrix), perturb h along v, and record what the model predicts instead. Perturbations
of the same length along random directions, and towards another sentence's activation, are the controls.

    python core_experiment.py --num-sentences 10
    python core_experiment.py --model-name meta-llama/Llama-3.1-8B --scale-unit nats

Writes experiment_results.json, fisher_eigenvectors.npz, fisher_similarity_matrix.png and
perturbation_analysis.png to --output-dir.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
import sys

from common.command_line import (
    EMBEDDED,
    Parser,
    UserError,
    before_imports,
    count,
    dtype_name,
    exit_code,
    finite,
    nonempty,
    one_of,
    option,
    or_all,
    positive,
    settle_network,
    switch,
)

HERE = Path(__file__).parent
BUNDLED = "data/animals.json"
SCALES = (0.0, -0.5, 0.5, -1.0, 1.0, -2.0, 2.0, -5.0, 5.0, -10.0, 10.0)


@dataclass(frozen=True)
class Settings:
    """What the experiment does: a flag each."""

    model_name: str = option(EMBEDDED, nonempty, "NAME", f"hub id or local directory ({EMBEDDED})")
    data_file: str | None = option(
        None, str, "FILE", f".json {{word: [sentences]}}, .txt, .jsonl, .csv, .parquet, or a hub dataset ({BUNDLED})"
    )
    text_column: str | None = option(None, str, "NAME", "column of a table or dataset that holds the text")
    data_config: str | None = option(None, str, "NAME", "configuration of a hub dataset")
    data_split: str = option("train", str, "NAME", "split of a hub dataset (train)")
    target_word: str = option("animals", str, "WORD", "perturb at the token just before this word (animals)")
    num_sentences: int = option(20, positive, "N", "sentences, chosen to be diverse (20)")
    require_predicted: bool = option(False, switch, "true", "only where the model's top prediction starts the word")
    layers: tuple | None = option(
        None, or_all(count), "L", "decoder layers, or all (every fifth and the last)", several=True
    )
    scales: tuple = option(SCALES, finite, "A", "how far to perturb, in units (0 ±0.5 ±1 ±2 ±5 ±10)", several=True)
    scale_unit: str = option(
        "eigenvalue",
        one_of("eigenvalue", "nats", "norm"),
        "UNIT",
        "eigenvalue: lambda; nats: 1/sqrt(lambda), for which A²/2 nats are predicted; norm: |h|/100 (eigenvalue)",
    )
    max_vocab_subset: int | str = option(
        200, or_all(positive), "K", "most probable tokens that the Fisher matrix counts, or all (200)"
    )
    compare_exact: bool = option(
        False, switch, "true", "also the exact matrix, and what the K tokens miss of it (about twice as slow)"
    )
    num_eigenvectors: int = option(
        1, positive, "M", "leading eigenpairs kept in the NPZ; perturbations go along the first (1)"
    )
    trust_radius: bool = option(
        False, switch, "true", "also how far along v 1/2 lambda s² holds to 10%% (about twice as slow)"
    )
    num_controls: int = option(1, count, "N", "random directions per layer (1)")
    batch_size: int = option(256, positive, "N", "perturbations in one pass, and 4 times as many gradients (256)")
    dtype: str = option(
        "auto", dtype_name, "TYPE", "float64, float32, bfloat16, float16 (bfloat16 on CUDA, else float32)"
    )
    device: str = option("auto", str, "NAME", "as torch names it (cuda, then mps, then cpu)")
    seed: int = option(0, count, "N", "of the random directions (0)")
    trust_remote_code: bool = option(False, switch, "true", "run code that a hub model brings along")
    output_dir: str = option("experiment_results", str, "DIR", "for the four files (experiment_results)")
    redraw: str | None = option(None, str, "DIR", "only draw the pictures of the results in DIR again")

    @property
    def data(self) -> str:
        return self.data_file or str(HERE / BUNDLED)


def parse(argv: list[str]) -> Settings:
    """The settings, or the end of the program: one line and exit code 2."""
    parser = Parser(Settings, "core_experiment.py", "Perturb a model's residual stream along its sensitive direction.")
    given, _ = parser.read(argv)
    settings = Settings(**given)
    # six digits, as the results name a scale
    scales = tuple(sorted({float(f"{scale:g}") for scale in settings.scales}))
    if not any(scales):
        parser.error("argument --scales: at least one must not be 0")
    return replace(settings, scales=scales)


if __name__ == "__main__":  # before the imports below, which take seconds: --help need not wait for torch
    before_imports()
    from_command_line = parse(sys.argv[1:])
    settle_network(from_command_line.model_name, from_command_line.data)

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
import math
import time

import torch
from tqdm import tqdm

from common.files import check_writable
from experiment import figures, report
from experiment.perturbation import control_directions, step_lengths, sweep, trust_radii_along
from experiment.results import EIGENVECTORS, RESULTS, SPECTRUM, TOP, Measured, Results, rank
from experiment.sentences import Context, diverse_order, locate, read_sentences
import fisher
from model.loading import decoder_layers, describe, dtype_advice, load, longest_prompt, vocabulary_size
from model.passes import require_known_tokens
from model.reading import Way, choose_way

FILES = (RESULTS, EIGENVECTORS, figures.SIMILARITY, figures.PERTURBATION)
SAVE_EVERY = 30.0  # seconds of work that a crash may cost; or more, so that saving takes a twentieth of the time


class Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():  # kernels run on after the call that asked for them
            torch.cuda.synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class Batches:
    """How many rows go through the model in one pass; halved, they stay so for all sentences."""

    def __init__(self, size: int, tokens: int = 1):
        """`tokens`: how many a row has."""
        size = max(1, size // tokens)
        self.gradients = fisher.Chunks(4 * size)  # more of them: they carry no vocabulary along
        self.perturbations = fisher.Chunks(size)


# --- what is asked for, and what the model has ---------------------------------------------------


def clamp_to_model(settings: Settings, model: torch.nn.Module) -> Settings:
    """The settings with no more tokens than the vocabulary has, eigenvectors than F has, and layers that there are.

    Raises:
        UserError: it has no such layer.
    """
    k, vocabulary = settings.max_vocab_subset, vocabulary_size(model)
    if k != "all" and k > vocabulary:
        print(f"note: --max-vocab-subset {k} is more than the vocabulary: counting all {vocabulary} tokens")
        k = vocabulary
    layers = choose_layers(settings.layers, len(decoder_layers(model)))
    count, width = settings.num_eigenvectors, model.config.get_text_config(decoder=True).hidden_size
    most = width if k == "all" else min(k, width)
    if count > most:
        print(f"note: --num-eigenvectors {count} is more than a matrix of {k} tokens and width {width} has: {most}")
        count = most
    return replace(settings, max_vocab_subset=k, num_eigenvectors=count, layers=layers)


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


@contextmanager
def explain_failures(model: torch.nn.Module, context: Context, layers: tuple[int, ...]) -> Iterator[None]:
    """Says which sentence and layer a numerical failure belongs to."""
    try:
        yield
    except fisher.UnsupportedModelError as error:
        raise UserError(f"this model is not supported: {error}") from error
    except fisher.NumericalError as error:
        where = "" if error.layer is None else f" at layer {layers[error.layer]}"
        raise UserError(f"{error}{where} of sentence {context.sentence!r}{dtype_advice(model)}") from error


# --- the experiment ------------------------------------------------------------------------------


def find_contexts(settings: Settings, model: torch.nn.Module, tokenizer, texts: list[str]) -> list[Context]:
    """The sentences in which the tokenizer lets the word be found, within the model's longest prompt; diverse first.

    Raises:
        UserError: there are none.
    """
    longest = longest_prompt(model) or math.inf
    located = [context for text in texts if (context := locate(tokenizer, text, settings.target_word))]
    if not located:
        raise UserError(f"in none of {len(texts)} sentences does a token stand before {settings.target_word!r}")
    contexts = [context for context in located if len(context.ids) <= longest]
    if not contexts:
        least = min(len(context.ids) for context in located)
        raise UserError(
            f"the model has positions for {longest} tokens, and every sentence has more before "
            f"{settings.target_word!r}, {least} at least: give it shorter ones, or choose another model"
        )
    return [contexts[index] for index in diverse_order([context.prompt for context in contexts])]


def tokens_a_row(model: torch.nn.Module, contexts: list[Context], layers: tuple[int, ...]) -> int:
    """How many tokens one row of a pass has: the last alone, unless the model has to run the whole prompt.

    Raises:
        UserError: no way of reading the model is right.
    """
    with explain_failures(model, contexts[0], layers):
        way = choose_way(model, torch.tensor(contexts[0].ids))
    if way is not Way.WHOLE:
        return 1
    lengths = [len(context.ids) for context in contexts]
    slower = sum(lengths) / len(lengths)
    print(
        f"note: {type(model).__name__} remembers more than keys and values, so every pass runs the whole prompt: "
        f"about {slower:.0f} times as much work"
    )
    return max(lengths)


def linearize_each(
    settings: Settings, model: torch.nn.Module, contexts: list[Context], batches: Batches, clock: Clock
) -> Iterator[tuple[Context, fisher.Point]]:
    """The first contexts that qualify, each with the model linearised at its prompt's last token.

    Raises:
        UserError: NaN or infinity, a model that is not supported, or no context qualifies.
    """
    found, checked = 0, False
    for context in contexts:
        with clock("prefix"), explain_failures(model, context, settings.layers):
            require_known_tokens(model, torch.tensor([context.target_id]))
            point = fisher.linearize(model, context.ids, settings.layers)
        if settings.require_predicted and rank(point.log_probs, context.target_id) > 1:
            continue
        if not checked:
            with explain_failures(model, context, settings.layers):
                checked = fisher.check_prediction(point, partial(fisher.perturb, point, at=0), batches.gradients)
        found += 1
        yield context, point
        if found == settings.num_sentences:
            return
    if found == 0:
        word = settings.target_word
        raise UserError(f"in none of {len(contexts)} sentences is {word!r} the top prediction (--require-predicted)")
    print(f"note: {settings.num_sentences} sentences were asked for, only {found} are available")


def with_other_activations(
    points: Iterator[tuple[Context, fisher.Point]],
) -> Iterator[tuple[Context, fisher.Point, torch.Tensor | None]]:
    """Each sentence's, with the activations (layers, d) of another: the one before it, or for the first, the second."""
    first_two = [next(points), next(points, None)]
    other = first_two[1] and first_two[1][1].activations
    for context, point in chain(filter(None, first_two), points):
        yield context, point, other
        other = point.activations


def fisher_matrices(
    settings: Settings, point: fisher.Point, chunks: fisher.Chunks, clock: Clock
) -> tuple[fisher.TopK | fisher.FullVocabulary, fisher.Eigenpairs, fisher.Eigenpairs | None]:
    """F of the tokens asked for at every layer, its eigenpairs; and those of the exact F, if it is to be compared.

    With both, one backward sweep serves the two.
    """
    num = max(SPECTRUM, settings.num_eigenvectors)
    exact, full = None, settings.max_vocab_subset == "all"
    if full or settings.compare_exact:
        with clock("gradients"):
            matrix = fisher.full_vocabulary(point, chunks)
        with clock("eigen"):
            exact = matrix.eigenpairs(num)
    if full:
        return matrix, exact, exact if settings.compare_exact else None
    with clock("gradients"):
        jacobian = matrix.jacobian if settings.compare_exact else None
        top = fisher.top_k(point, settings.max_vocab_subset, chunks, jacobian)
    with clock("eigen"):
        return top, top.eigenpairs(num), exact


def perturb(
    settings: Settings,
    context: Context,
    point: fisher.Point,
    controls: dict[str, torch.Tensor],
    batches: Batches,
    clock: Clock,
) -> Measured:
    """One sentence at all layers: the Fisher matrix, its top eigenvector, and every perturbation."""
    matrix, eigen, exact = fisher_matrices(settings, point, batches.gradients, clock)
    directions = torch.stack([eigen.vectors[:, 0], *controls.values()], dim=1)  # (layers, n, d)
    scales = torch.tensor([scale for scale in settings.scales if scale], device=directions.device)
    steps = step_lengths(settings.scale_unit, scales, eigen.values[:, 0], point.activations.norm(dim=-1))
    predicted_kl = 0.5 * steps[:, None] ** 2 * matrix.curvature(directions)[:, :, None]  # (layers, n, scales)

    deltas = directions[:, :, None] * steps[:, None, :, None]  # (layers, n, scales, d)
    with clock("sweep"):
        swept = sweep(point, deltas, context.target_id, TOP, batches.perturbations)
    radii = None
    if settings.trust_radius:
        with clock("trust radius"):
            radii = trust_radii_along(point, eigen, settings.max_vocab_subset == "all", batches.perturbations)
    mass = 1.0 if settings.max_vocab_subset == "all" else float(matrix.mass)
    return Measured(context, point, list(controls), mass, eigen, exact, radii, steps, predicted_kl, swept)


def perturb_all(
    settings: Settings, model: torch.nn.Module, contexts: list[Context], results: Results, clock: Clock
) -> None:
    """Takes every sentence through `perturb` into `results`, saving what there is now and then."""
    batches = Batches(settings.batch_size, tokens_a_row(model, contexts, settings.layers))
    due = time.perf_counter() + SAVE_EVERY
    points = with_other_activations(linearize_each(settings, model, contexts, batches, clock))
    total = min(settings.num_sentences, len(contexts))
    for context, point, other in tqdm(points, total=total, desc="perturbing", unit="sentence", disable=None):
        key = (settings.seed, len(results))
        controls = control_directions(point.activations, other, settings.layers, settings.num_controls, key)
        with explain_failures(model, context, settings.layers):
            results.add(perturb(settings, context, point, controls, batches, clock))
        tqdm.write(report.sentence_block(results, len(results) - 1))
        if (start := time.perf_counter()) > due:
            results.save(Path(settings.output_dir))
            end = time.perf_counter()
            due = end + max(SAVE_EVERY, 20 * (end - start))
    results.complete = True


# --- the protocol --------------------------------------------------------------------------------


def run(settings: Settings) -> int:
    directory = Path(settings.redraw or settings.output_dir)
    if settings.redraw:
        figures.draw(directory)
        print(f"Drawn in {directory}: {figures.SIMILARITY}, {figures.PERTURBATION}")
        return 0
    check_writable(directory)
    texts = read_sentences(
        settings.data, settings.target_word, settings.text_column, settings.data_config, settings.data_split
    )
    clock = Clock()
    with clock("load"):
        model, tokenizer = load(settings.model_name, settings.dtype, settings.device, settings.trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError(f"{settings.model_name} has no fast tokenizer, whose character offsets find the target word")
    settings = clamp_to_model(settings, model)
    environment = describe(model)
    print(report.heading(settings.model_name, environment, settings.layers))
    contexts = find_contexts(settings, model, tokenizer, texts)

    config = {**asdict(settings), "data_file": settings.data_file or BUNDLED}
    del config["redraw"]
    results = Results(config, environment, settings.layers, lambda token: tokenizer.decode([token]), clock.seconds)
    print(report.block_legend(results))
    stopped = None
    try:
        perturb_all(settings, model, contexts, results, clock)
    except BaseException as error:  # whatever stops it, finished sentences are saved before it is reported
        stopped = error
    if len(results):
        if stopped:
            print(f"Stopped: keeping the {len(results)} sentences that are finished.", file=sys.stderr)
        results.save(directory)
        figures.draw(directory)
        print(report.layer_table(results))
        print(report.timing_line(clock.seconds))
        print(f"Written to {directory}: {', '.join(FILES)}")
    if stopped:
        raise stopped
    return 0


def main(settings: Settings) -> int:
    advice = "fewer --layers, a smaller --max-vocab-subset, --dtype bfloat16, or a smaller model"
    return exit_code("core_experiment.py", lambda: run(settings), advice)


if __name__ == "__main__":
    sys.exit(main(from_command_line))

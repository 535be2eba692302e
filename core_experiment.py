"""Fisher-guided perturbation of a language model's residual stream.

For sentences that contain a target word, at the token just before it and at every chosen layer: read
the residual stream h, find the direction v in which the next-token prediction is most sensitive (the
top eigenvector of the Fisher information matrix), push h along v, and record what the model predicts
instead. Pushes of the same length along random directions, and towards another sentence's
activation, stand beside it as controls.

    python core_experiment.py --num-sentences 10
    python core_experiment.py --model-name meta-llama/Llama-3.1-8B --scale-unit nats

Writes experiment_results.json, fisher_eigenvectors.npz, fisher_similarity_matrix.png and
perturbation_analysis.png to --output-dir.
"""

import argparse
from pathlib import Path
import sys

from arguments import (
    EMBEDDED,
    Parser,
    count,
    finite,
    layer_number,
    positive,
    positive_or_all,
    settle_network,
)
from errors import INTERRUPTED, UserError, exit_code

HERE = Path(__file__).parent
BUNDLED = "data/animals.json"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="core_experiment.py",
        usage="%(prog)s [options]",
        description="Push a model's residual stream along its most sensitive direction.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--model-name", default=EMBEDDED, metavar="NAME", help="hub id or local directory (smollm2-135m)")
    add(
        "--data-file",
        metavar="FILE",
        help=f".json {{word: [sentences]}}, .txt, .jsonl, .csv, .parquet, or a\nhub dataset ({BUNDLED})",
    )
    add("--text-column", metavar="NAME", help="column of a table or dataset that holds the text")
    add("--data-config", metavar="NAME", help="configuration of a hub dataset")
    add("--data-split", default="train", metavar="NAME", help="split of a hub dataset (train)")
    add("--target-word", default="animals", metavar="WORD", help="push at the token just before this word (animals)")
    add("--num-sentences", type=positive, default=20, metavar="N", help="sentences, chosen to be diverse (20)")
    add("--require-predicted", action="store_true", help="only where the model's top prediction starts the word")
    add("--layers", type=layer_number, nargs="+", metavar="L", help="decoder layers, or all (every fifth and the last)")
    add(
        "--scales",
        type=finite,
        nargs="+",
        metavar="A",
        default=[0, -0.5, 0.5, -1, 1, -2, 2, -5, 5, -10, 10],
        help="how far to push, in units (0 ±0.5 ±1 ±2 ±5 ±10)",
    )
    add(
        "--scale-unit",
        choices=["eigenvalue", "nats", "norm"],
        default="eigenvalue",
        metavar="UNIT",
        help="eigenvalue: lambda; nats: 1/sqrt(lambda), for which A²/2 nats are\npredicted; norm: |h|/100 (eigenvalue)",
    )
    add(
        "--max-vocab-subset",
        type=positive_or_all,
        default=200,
        metavar="K",
        help="most probable tokens that the Fisher matrix counts, or all (200)",
    )
    add(
        "--compare-exact",
        action="store_true",
        help="also the exact matrix of the whole vocabulary, and what the K\ntokens miss of it (about twice as slow)",
    )
    add(
        "--num-eigenvectors",
        type=positive,
        default=1,
        metavar="M",
        help="leading eigenpairs kept in the NPZ; pushes go along the first (1)",
    )
    add(
        "--trust-radius",
        action="store_true",
        help="also how far along v the prediction 1/2 lambda s² holds to 10%%\n(about twice as slow)",
    )
    add("--num-controls", type=count, default=1, metavar="N", help="random directions per layer (1)")
    add(
        "--batch-size",
        type=positive,
        default=256,
        metavar="N",
        help="pushes in one pass, and 4 times as many gradients (256)",
    )
    add(
        "--dtype",
        choices=["auto", "float64", "float32", "bfloat16", "float16"],
        default="auto",
        metavar="TYPE",
        help="float64, float32, bfloat16, float16 (bfloat16 on CUDA, else float32)",
    )
    add("--device", default="auto", metavar="NAME", help="as torch names it (cuda, then mps, then cpu)")
    add("--seed", type=count, default=0, metavar="N", help="of the random directions (0)")
    add("--trust-remote-code", action="store_true", help="run code that a hub model brings along")
    add("--output-dir", default="experiment_results", metavar="DIR", help="for the four files (experiment_results)")
    args = parser.parse_args(argv)
    # six digits, as the results name a scale
    args.scales = sorted({float(f"{scale:g}") for scale in args.scales})
    if not any(args.scales):
        parser.error("argument --scales: at least one must not be 0")
    return args


if __name__ == "__main__":  # before the imports below, which take seconds: --help need not wait for torch
    given = parse_args(sys.argv[1:])
    settle_network(given.model_name, given.data_file or str(HERE))

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
import math
import time

import numpy as np
import torch
from tqdm import tqdm

import exact
import fisher
import head
import models
import plots
import pushes
from reading import Model, Reading, check_cached_path, load, naming, read
import report
import sentences
import storage

EIGENVECTORS = "fisher_eigenvectors.npz"
FILES = (plots.RESULTS, EIGENVECTORS, plots.SIMILARITY, plots.PERTURBATION)
# Sentences whose key-value cache and graph wait in memory for their turn, about 12 MB each for an 8B
# model; later ones are read a second time.
HELD = 64
SAVE_EVERY = 30.0  # seconds of work that a crash may cost,
SAVE_SHARE = 0.05  # or more in a long run, so that saving takes at most this share of the time


# --- the sentences -----------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """A sentence of the experiment, and what the unperturbed model makes of it."""

    context: sentences.Context
    activations: torch.Tensor  # (layers, d) float32
    target_probability: float
    target_rank: int  # 1 is the most probable token


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


def choose_vocab_subset(asked: int | str, vocabulary: int) -> int | str:
    """The number of tokens to count, at most the vocabulary."""
    if asked == "all" or asked <= vocabulary:
        return asked
    print(f"note: --max-vocab-subset {asked} is more than the vocabulary: counting all {vocabulary} tokens")
    return vocabulary


def locate_all(args: argparse.Namespace, model: Model, texts: list[str]) -> list[sentences.Context]:
    """The sentences in which the tokenizer lets the word be found, within the model's longest prompt."""
    longest = getattr(model.lm.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    located = (sentences.locate(model.tokenizer, text, args.target_word) for text in texts)
    contexts = [context for context in located if context and len(context.ids) <= longest]
    if not contexts:
        raise UserError(f"in none of {len(texts)} sentences does a token stand before {args.target_word!r}")
    return contexts


def choose_sentences(
    args: argparse.Namespace, model: Model, texts: list[str], clock: Clock
) -> tuple[list[Chosen], dict[int, Reading]]:
    """The most diverse sentences that qualify, and the readings of the first of them."""
    contexts = locate_all(args, model, texts)
    chosen, held = [], {}
    order = sentences.diverse_order([context.prompt for context in contexts])
    with tqdm(
        total=min(args.num_sentences, len(contexts)), desc="reading", unit="sentence", leave=False, disable=None
    ) as bar:
        for index in order:
            context = contexts[index]
            with clock("prefix"):
                reading = read(model, context)
            log_probs = reading.point.log_probs
            target = log_probs[context.target_id]
            rank = int((log_probs > target).sum()) + 1
            if args.require_predicted and rank > 1:
                continue
            if len(chosen) < HELD:
                held[len(chosen)] = reading
            chosen.append(Chosen(context, reading.point.activations, float(target.exp()), rank))
            bar.update()
            if len(chosen) == args.num_sentences:
                break
    if not chosen:
        raise UserError(
            f"in none of {len(contexts)} sentences is {args.target_word!r} the top prediction (--require-predicted)"
        )
    if len(chosen) < args.num_sentences:
        print(f"note: {args.num_sentences} sentences were asked for, {len(chosen)} are to be had")
    return chosen, held


# --- the experiment ------------------------------------------------------------------------------


def control_directions(
    args: argparse.Namespace, layers: list[int], index: int, chosen: list[Chosen]
) -> dict[str, torch.Tensor]:
    """Unit directions (layers, d) to hold beside v: random ones, and towards another sentence.

    A random direction is a function of seed, sentence number, layer and its own number alone. The
    other sentence is the one before (the second, for the first; none, for a single sentence).
    """
    here = chosen[index].activations
    controls = {}
    for number in range(args.num_controls):
        draws = [
            np.random.default_rng([args.seed, index, layer, number]).standard_normal(here.shape[1]) for layer in layers
        ]
        controls[f"random_{number}"] = torch.from_numpy(np.stack(draws)).to(here)
    if len(chosen) > 1:
        controls["difference"] = chosen[index - 1 if index else 1].activations - here
    return {name: torch.nn.functional.normalize(d, dim=-1) for name, d in controls.items()}


def step_lengths(unit: str, scales: torch.Tensor, eigenvalues: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Signed step lengths (layers, scales) from scales (scales,), lambda (layers,) and |h| (layers,)."""
    one = {"eigenvalue": eigenvalues, "nats": eigenvalues.rsqrt(), "norm": norms / 100}[unit]
    return one[:, None] * scales


@dataclass(frozen=True)
class Batches:
    """How many rows go through the model in one pass; halved, they stay so for all sentences."""

    gradients: fisher.Chunks  # more of them: they carry no vocabulary along
    pushes: fisher.Chunks

    @classmethod
    def of(cls, size: int) -> "Batches":
        return cls(gradients=fisher.Chunks(4 * size), pushes=fisher.Chunks(size))


@dataclass(frozen=True)
class Found:
    """The Fisher matrix of the tokens counted, at every layer."""

    eigen: fisher.Eigen
    curvature: Callable[[torch.Tensor], torch.Tensor]  # u (layers, n, d) -> u^T F u (layers, n)
    mass: float  # probability that the counted tokens hold
    exact: fisher.Eigen | None  # of the whole vocabulary, if it was to be compared


def find_eigenpairs(args: argparse.Namespace, point: fisher.Point, chunks: fisher.Chunks, clock: Clock) -> Found:
    """Counts every token, or the most probable ones; with both, one sweep of gradients serves the two."""
    num = max(report.SPECTRUM, args.num_eigenvectors)
    whole = None
    if args.max_vocab_subset == "all" or args.compare_exact:
        with clock("gradients"):
            matrices = exact.matrices(point, chunks)
        with clock("eigen"):
            whole = matrices.eigenpairs(num)
    if args.max_vocab_subset == "all":
        return Found(whole, matrices.curvature, 1.0, whole if args.compare_exact else None)
    with clock("gradients"):
        z = head.top_k_cotangents(point, args.max_vocab_subset)
        gradients = z.rows @ matrices.jacobian if whole else fisher.pull_back(point, z.rows, chunks)  # (layers, k, d)
    with clock("eigen"):
        eigen = fisher.eigenpairs(gradients, z.weights, num)
    return Found(eigen, partial(fisher.curvature, gradients, z.weights), float(z.mass), whole)


def perturb(
    args: argparse.Namespace,
    model: Model,
    context: sentences.Context,
    reading: Reading,
    controls: dict[str, torch.Tensor],
    batches: Batches,
    clock: Clock,
) -> report.Measured:
    """One sentence at all layers: the Fisher matrix, its top eigenvector, and every push."""
    point = reading.point
    found = find_eigenpairs(args, point, batches.gradients, clock)
    eigen = found.eigen
    directions = torch.stack([eigen.vectors[:, 0], *controls.values()], dim=1)  # (layers, n, d)
    scales = torch.tensor([scale for scale in args.scales if scale], device=directions.device)
    steps = step_lengths(args.scale_unit, scales, eigen.values[:, 0], point.activations.norm(dim=-1))
    curvature = found.curvature(directions)  # (layers, n)
    predicted_kl = 0.5 * steps[:, None] ** 2 * curvature[:, :, None]  # (layers, n, scales)

    deltas = directions[:, :, None] * steps[:, None, :, None]  # (layers, n, scales, d)
    at_layer = torch.arange(len(model.modules)).repeat_interleave(predicted_kl[0].numel())
    token = torch.tensor(context.ids[-1])
    with clock("sweep"):
        sweep = pushes.sweep(
            model.lm, model.modules, token, reading.prefix, point.log_probs,
            deltas.flatten(0, 2), at_layer, context.target_id, report.TOP, batches.pushes,
        )  # fmt: skip
    radii = None
    if args.trust_radius:
        with clock("trust radius"):
            radii = find_trust_radii(model, token, reading, eigen, args.max_vocab_subset == "all", batches.pushes)
    return report.Measured(
        activations=point.activations,
        top=point.log_probs.topk(report.TOP),
        target_log_prob=point.log_probs[context.target_id],
        mass=found.mass,
        eigen=eigen,
        exact=found.exact,
        trust_radii=radii,
        steps=steps,
        predicted_kl=predicted_kl,
        sweep=pushes.Sweep(*(column.unflatten(0, predicted_kl.shape) for column in sweep)),
    )


def find_trust_radii(
    model: Model, token: torch.Tensor, reading: Reading, eigen: fisher.Eigen, whole: bool, chunks: fisher.Chunks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Along -v and v, at every layer: steps (layers, 2), and the nats (layers, 2) that F of all tokens predicts there.

    A matrix of fewer tokens underestimates the curvature along v, so that KL would depart from it at once; the
    true one takes a single pass (`exact.curvature`).
    """
    v = eigen.vectors[:, :1]
    curvature = (eigen.values[:, :1] if whole else exact.curvature(reading.point, v, chunks)).expand(-1, 2)
    ends = torch.cat([-v, v], dim=1)  # (layers, 2, d)

    def kl_of(steps: torch.Tensor) -> torch.Tensor:  # (layers * 2, n)
        deltas = ends.flatten(0, 1)[:, None] * steps[..., None]
        at_layer = torch.arange(len(model.modules)).repeat_interleave(2 * steps.shape[1])
        swept = pushes.sweep(
            model.lm, model.modules, token, reading.prefix, reading.point.log_probs, deltas.flatten(0, 1), at_layer,
            chunks=chunks,
        )  # fmt: skip
        return swept.kl.unflatten(0, steps.shape)

    steps = pushes.trust_radii(kl_of, curvature.flatten()).unflatten(0, curvature.shape)
    return steps, 0.5 * steps**2 * curvature


# --- the protocol --------------------------------------------------------------------------------


def save(directory: Path, results: report.Results) -> None:
    storage.write_npz(directory / EIGENVECTORS, results.arrays())
    storage.write_json(directory / plots.RESULTS, results.document())


def perturb_all(
    args: argparse.Namespace, model: Model, results: report.Results, held: dict[int, Reading], clock: Clock
) -> None:
    """Takes every sentence through `perturb` into `results`, saving what there is now and then."""
    batches = Batches.of(args.batch_size)
    due = time.perf_counter() + SAVE_EVERY
    for index, chosen in enumerate(tqdm(results.chosen, desc="perturbing", unit="sentence", disable=None)):
        if index not in held:
            with clock("prefix"):
                held[index] = read(model, chosen.context)
        controls = control_directions(args, model.layers, index, results.chosen)
        with naming(chosen.context.sentence, model.layers):
            measured = perturb(args, model, chosen.context, held.pop(index), controls, batches, clock)
        results.add(measured, list(controls))
        tqdm.write(report.sentence_block(results, index))
        if (start := time.perf_counter()) > due:
            save(Path(args.output_dir), results)
            end = time.perf_counter()
            due = end + max(SAVE_EVERY, (end - start) / SAVE_SHARE)


def run(args: argparse.Namespace) -> int:
    directory = Path(args.output_dir)
    storage.check_writable(directory)
    source = args.data_file or str(HERE / BUNDLED)
    texts = sentences.read_sentences(source, args.target_word, args.text_column, args.data_config, args.data_split)
    clock = Clock()
    with clock("load"):
        model = load(args.model_name, args.layers, args.dtype, args.device, args.trust_remote_code)
    vocabulary = model.lm.get_output_embeddings().weight.shape[0]
    args.max_vocab_subset = choose_vocab_subset(args.max_vocab_subset, vocabulary)
    environment = models.describe(model.lm)
    print(report.heading(args.model_name, environment, model.layers))

    chosen, held = choose_sentences(args, model, texts, clock)
    check_cached_path(model, chosen[0].context, held[0])
    print(report.sentence_table(chosen, model.decode))

    config = {**vars(args), "data_file": args.data_file or BUNDLED, "layers": model.layers}
    results = report.Results(config, environment, model.layers, chosen, model.decode, clock.seconds)
    print(report.block_legend(results))
    code = 0
    try:
        perturb_all(args, model, results, held, clock)
    except KeyboardInterrupt:
        code = INTERRUPTED
        print(f"Interrupted: keeping the {len(results)} of {len(chosen)} sentences that are done.", file=sys.stderr)
    if len(results) == 0:
        return code
    save(directory, results)
    plots.draw(directory)
    print(report.layer_table(results))
    print(report.timing_line(clock.seconds))
    print(f"Written to {directory}: {', '.join(FILES)}")
    return code


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    advice = "fewer --layers, a smaller --max-vocab-subset, --dtype bfloat16, or a smaller model"
    return exit_code("core_experiment.py", lambda: run(args), advice)


if __name__ == "__main__":
    sys.exit(main())

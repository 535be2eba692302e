"""Fisher-guided perturbation of a language model's residual stream.

For sentences that contain a target word, at the token just before it and at every chosen layer: read the
residual stream h, find the direction v in which the next-token prediction is most sensitive (the top eigenvector
of the Fisher information matrix), perturb h along v, and record what the model predicts instead. Perturbations
of the same length along random directions, and towards another sentence's activation, are the controls.

    python core_experiment.py --num-sentences 10
    python core_experiment.py --model-name meta-llama/Llama-3.1-8B --scale-unit nats

Writes experiment_results.json, fisher_eigenvectors.npz, fisher_similarity_matrix.png and
perturbation_analysis.png to --output-dir. Stopped, the same command goes on where it was.
"""

from residual_fisher.common.console import before_imports, undisturbed

if __name__ == "__main__":  # Ctrl-C may come during the imports below, which take seconds
    before_imports()

from dataclasses import asdict, replace
from pathlib import Path
import sys

from residual_fisher.common.command_line import (
    UserError,
    end_with_error,
    excerpt,
    exit_code,
    first_line,
    printable,
    settle_network,
)
from residual_fisher.experiment.settings import BUNDLED, Settings, parse

PROGRAM = "core_experiment.py"

if __name__ == "__main__":  # before the slow ones: --help need not wait for torch
    from_command_line = parse(sys.argv[1:])
    try:
        settle_network(from_command_line.model_name, from_command_line.data)
    except UserError as error:
        sys.exit(end_with_error(PROGRAM, error))

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
import itertools
import math
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

import fisher
from residual_fisher.common.amounts import peak_memory
from residual_fisher.common.failures import SOME_FAILED, too_many
from residual_fisher.common.lock import lock_directory, require_unlocked
from residual_fisher.experiment import estimate, figures, report
from residual_fisher.experiment.measurement import Batches, Clock, fit_to_way, perturb
from residual_fisher.experiment.perturbation import control_directions
from residual_fisher.experiment.results import Results, rank, read_results
from residual_fisher.experiment.run_directory import Earlier, RunDirectory, identify
from residual_fisher.experiment.sentences import Context, Matches, diverse_order, find_sentences, locate, token_of
from residual_fisher.model.loading import (
    decoder_layers,
    describe,
    dtype_advice,
    fingerprint,
    load,
    longest_prompt,
    vocabulary_size,
)
from residual_fisher.model.passes import devices_of, require_known_tokens

FAILURES = (fisher.NumericalError, torch.linalg.LinAlgError)  # a sentence that leads to one of them is left out
# Seconds of work that a kill may cost; or more, so that saving takes no more than this share of the time.
SAVE_EVERY, SAVE_SHARE = 30.0, 0.05


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
    steer_id = token_of(tokenizer, settings.steer_token) if settings.steer_token else None
    order = diverse_order([context.prompt for context in contexts])
    return [replace(contexts[index], steer_id=steer_id) for index in order]


def leave_out(model: torch.nn.Module, results: Results, context: Context, error: Exception) -> None:
    """Records a sentence that led to NaN, infinity or no convergence.

    Raises:
        UserError: too many have.
    """
    layer = getattr(error, "layer", None)
    where = "" if layer is None else f" at layer {results.layers[layer]}"
    sentence = excerpt(context.sentence, 60)
    reason = f"{first_line(error)}{where} of sentence {sentence!r}{dtype_advice(model)}"
    results.failed.append({"sentence": context.sentence, "reason": reason})
    failed, tried = len(results.failed), len(results.failed) + len(results)
    if too_many(failed, tried):
        raise UserError(f"{failed} of the first {tried} sentences failed: {reason}")
    tqdm.write(f"note: left out: {printable(reason)}", file=sys.stderr)


def linearize_each(
    settings: Settings, model: torch.nn.Module, contexts: list[Context], results: Results, clock: Clock
) -> Iterator[tuple[Context, fisher.Point]]:
    """The contexts that qualify and are not in `results`, each with the model linearised at its prompt's last token.

    Raises:
        UnsupportedModelError: the model is not.
        UserError: too many sentences fail.
    """
    for context in contexts:
        if context.sentence in results:
            continue
        try:
            with clock("prefix"):
                require_known_tokens(model, torch.tensor([context.target_id]))
                point = fisher.linearize(model, context.ids, settings.layers)
        except FAILURES as error:
            leave_out(model, results, context, error)
            continue
        if settings.require_predicted and rank(point.log_probs, context.target_id) > 1:
            continue
        yield context, point


def with_other_activations(
    points: Iterator[tuple[Context, fisher.Point]], results: Results
) -> Iterator[tuple[Context, fisher.Point, torch.Tensor | None]]:
    """Each sentence's, with the activations (layers, d) of another: the one finished last, or else the next one."""
    point = next(points, None)
    while point is not None:
        other, following = results.last_activations, None
        if other is None and results.config["num_sentences"] > 1:
            following = next(points, None)
            other = following and following[1].activations
        yield *point, other
        point = following or next(points, None)


@contextmanager
def explain_unsupported() -> Iterator[None]:
    try:
        yield
    except fisher.UnsupportedModelError as error:
        raise UserError(f"this model is not supported: {error}") from error


def perturb_each(
    settings: Settings,
    contexts: list[Context],
    points: Iterator[tuple[Context, fisher.Point]],
    results: Results,
    batches: Batches,
    clock: Clock,
) -> Iterator[None]:
    """Takes sentence after sentence through `perturb` into `results`; yields after each.

    Args:
        contexts: all that there are.
        points: those to take, linearised.
    Raises:
        UnsupportedModelError: the model is not.
        UserError: too many sentences fail.
    """
    for context, point, other in with_other_activations(points, results):
        key = (settings.seed, len(results))
        controls = control_directions(point.activations, other, settings.layers, settings.num_controls, key)
        try:
            if not batches.fitted:
                fit_to_way(batches, point, contexts)
                batches.fitted = True
            moved = partial(fisher.perturb, point, at=0)
            batches.checked = batches.checked or fisher.check_prediction(point, moved, batches.gradients)
            results.add(perturb(settings, context, point, controls, batches, clock))
        except FAILURES as error:
            leave_out(point.model, results, context, error)
            continue
        yield


def perturb_all(
    settings: Settings,
    model: torch.nn.Module,
    contexts: list[Context],
    results: Results,
    save: Callable[[Results], None],
    clock: Clock,
) -> None:
    """All that is not in `results` yet, saving what there is now and then.

    Raises:
        UserError: the model is not supported, no sentence qualifies, or too many fail.
    """
    due = time.perf_counter() + SAVE_EVERY
    points = linearize_each(settings, model, contexts, results, clock)
    steps = perturb_each(settings, contexts, points, results, Batches(settings.batch_size, len(settings.layers)), clock)
    total = min(settings.num_sentences, len(contexts))
    bar = tqdm(total=total, initial=len(results), desc="perturbing", unit="sentence", disable=None)
    with explain_unsupported(), bar:
        for _ in steps:
            tqdm.write(report.sentence_block(results, len(results) - 1))
            bar.update()
            if len(results) == settings.num_sentences:
                break
            if (start := time.perf_counter()) > due:
                save(results)
                end = time.perf_counter()
                due = end + max(SAVE_EVERY, (end - start) / SAVE_SHARE)
    if not len(results):
        raise UserError(nothing_found(settings, contexts, results))
    results.complete = True


def nothing_found(settings: Settings, contexts: list[Context], results: Results) -> str:
    if results.failed:
        return results.failed[0]["reason"]
    word = settings.target_word
    return f"in none of {len(contexts)} sentences is {word!r} the top prediction (--require-predicted)"


# --- the protocol --------------------------------------------------------------------------------


def redraw(directory: Path) -> int:
    try:
        figures.draw(directory)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"the results in {directory} are of another form: {excerpt(repr(error), 80)}") from error
    print(f"Drawn in {printable(str(directory))}: {', '.join(figures.drawn_of(read_results(directory)))}")
    return 0


class Prepared(NamedTuple):
    """What a run has before its first sentence."""

    settings: Settings  # as far as the model has what they ask for
    model: torch.nn.Module
    found: Matches
    contexts: list[Context]
    files: RunDirectory
    new_results: Callable[[dict[str, float]], Results]  # from the clock's seconds
    earlier: Earlier | None
    clock: Clock


def prepare(settings: Settings) -> Prepared:
    """Reads the sentences, loads the model, looks at what an earlier run has left. Writes nothing.

    Raises:
        UserError: one of them is not as it has to be.
    """
    found = find_sentences(
        settings.data,
        settings.target_word,
        settings.text_column,
        settings.data_config,
        settings.data_split,
        settings.num_sentences,
    )
    clock = Clock()
    with clock("load"):
        model, tokenizer = load(settings.model_name, settings.dtype, settings.device, settings.trust_remote_code)
    clock.devices = devices_of(model)
    if not tokenizer.is_fast:
        raise UserError(f"{settings.model_name} has no fast tokenizer, whose character offsets find the target word")
    settings = clamp_to_model(settings, model)
    environment = describe(model)
    print(report.heading(settings.model_name, environment, settings.layers))
    contexts = find_contexts(settings, model, tokenizer, found.sentences)

    config = {**asdict(settings), "data_file": settings.data_file or BUNDLED}
    for key in ("redraw", "overwrite", "dry_run"):
        del config[key]
    about = identify(config, fingerprint(model, tokenizer), contexts)
    files = RunDirectory(Path(settings.output_dir), config, about)
    new_results = partial(Results, config, about, environment, settings.layers, tokenizer)
    return Prepared(settings, model, found, contexts, files, new_results, files.earlier(settings.overwrite), clock)


def run(settings: Settings) -> int:
    directory = Path(settings.output_dir)
    with lock_directory(directory):
        settings, model, _, contexts, files, new_results, earlier, clock = prepare(settings)
        files.remove_leftovers()
        results = new_results(clock.seconds)
        if earlier:
            if earlier.document["complete"]:
                return say_finished(directory, earlier.document)
            results.go_on_from(*earlier)
            print(going_on(results))
        print(report.block_legend(results))
        measure(settings, model, contexts, results, files, clock)
    return SOME_FAILED if results.failed else 0


def going_on(results: Results) -> str:
    return f"Going on after the {len(results)} sentences that are finished."


def finished(directory: Path) -> str:
    return f"{printable(str(directory))} is finished: nothing to do (--overwrite starts anew)"


def say_finished(directory: Path, document: dict) -> int:
    if not figures.are_of(directory, document):
        figures.draw(directory)
    print(finished(directory))
    return 0


def measure(
    settings: Settings,
    model: torch.nn.Module,
    contexts: list[Context],
    results: Results,
    files: RunDirectory,
    clock: Clock,
) -> None:
    """All that is not finished yet. Whatever stops it, finished sentences are saved before it is reported."""
    stopped = None
    try:
        perturb_all(settings, model, contexts, results, files.save, clock)
    except BaseException as error:
        stopped = error
    if len(results):
        with undisturbed():
            files.save(results)
            if stopped:
                print(
                    f"Stopped: {len(results)} finished sentences are kept; the same command goes on.", file=sys.stderr
                )
            figures.draw(files.path)
        print(report.conclusion(results, len(contexts)))
        print(f"Written to {printable(str(files.path))}: {', '.join(files.written(results))}")
    if stopped:
        raise stopped


# --- a dry run -----------------------------------------------------------------------------------


def dry_run(settings: Settings) -> int:
    """Says what a run would do, and takes one or two sentences through it to say how long. Writes nothing."""
    directory = Path(settings.output_dir)
    require_unlocked(directory)
    settings, model, found, contexts, files, new_results, earlier, clock = prepare(settings)
    results = new_results({})
    if earlier:
        if earlier.document["complete"]:
            print(finished(directory))
            return 0
        results.go_on_from(*earlier)
        print(going_on(results))
    elif files.is_begun():
        print(f"An earlier run in {printable(str(directory))} would be replaced.")
    left = [context for context in contexts if context.sentence not in results]
    todo = left[: settings.num_sentences - len(results)]
    most = "at most " if settings.require_predicted else ""
    print(estimate.describe_sentences(settings.target_word, found, contexts, todo, most))
    if todo:
        trial = try_some(settings, model, contexts, todo, new_results)
        others = len(left) - len(todo) if settings.require_predicted else 0
        seconds = estimate.total_seconds(trial, todo, others)
        memory, count = peak_memory(clock.devices), len(results) + len(todo)
        print(estimate.describe_costs(trial, seconds, clock.seconds["load"], memory, count, most))
    print("Nothing was written: a dry run.")
    return 0


def try_some(
    settings: Settings,
    model: torch.nn.Module,
    contexts: list[Context],
    todo: list[Context],
    new_results: Callable[[dict[str, float]], Results],
) -> estimate.Trial:
    """The sentences of median and of the longest length, twice: the first round has to warm up.

    Raises:
        UserError: the model is not supported, or both fail.
    """
    batches, chosen = Batches(settings.batch_size, len(settings.layers)), estimate.representatives(todo)
    settings = replace(settings, require_predicted=False)  # these two count, whatever they predict
    rounds = []
    for _ in range(2):
        clock = Clock(devices_of(model))
        results = new_results(clock.seconds)
        with explain_unsupported():
            points = list(linearize_each(settings, model, chosen, results, clock))
            times = [time.perf_counter()]
            for _ in perturb_each(settings, contexts, iter(points), results, batches, clock):
                times.append(time.perf_counter())
        if not len(results):
            raise UserError(results.failed[0]["reason"])
        linearizing = clock.seconds["prefix"] / len(points)
        rounds.append([linearizing + end - start for start, end in itertools.pairwise(times)])
    tried = [context for context in chosen if context.sentence in results.sentences]
    seconds = list(map(min, *rounds))  # what else the machine did meanwhile only adds to them
    return estimate.Trial(tried, sum(rounds[0]), seconds, linearizing, results)


def main(settings: Settings) -> int:
    advice = "fewer --layers, a smaller --max-vocab-subset, --dtype bfloat16, or a smaller model"
    task = partial(dry_run if settings.dry_run else run, settings)
    if settings.redraw:
        task = partial(redraw, Path(settings.redraw))
    return exit_code(PROGRAM, task, advice)


if __name__ == "__main__":
    sys.exit(main(from_command_line))

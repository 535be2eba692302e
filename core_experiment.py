"""Fisher-guided perturbation of a language model's residual stream.

For sentences that contain a target word, at the token just before it and at every chosen layer: read the
residual stream h, find the direction v in which the next-token prediction is most sensitive (the top eigenvector
of the Fisher information matrix), perturb h along v, and record what the model predicts instead. Perturbations
of the same length along random directions, and towards another sentence's activation, are the controls.

    python core_experiment.py --num-sentences 10
    python core_experiment.py --model-name meta-llama/Llama-3.1-8B --scale-unit nats

Writes experiment_results.json, fisher_eigenvectors.npz, fisher_similarity_matrix.png,
perturbation_analysis.png and report.html to --output-dir. The same command resumes a stopped run, and with more
sentences extends a finished one. --map shows one text instead, at every token: fisher_map.png, .json, .npz, and
report.html.
"""

from residual_fisher.common.program import before_imports, undisturbed

if __name__ == "__main__":  # Ctrl-C may come during the imports below, which take seconds
    before_imports()

import sys

from residual_fisher.common.program import (
    SOME_FAILED,
    UserError,
    end_with_error,
    exit_code,
    go_offline_without_hub,
    peak_memory,
    too_many,
)
from residual_fisher.common.sources import names_of
from residual_fisher.experiment.settings import Settings, choose_layers, parse

PROGRAM = "core_experiment.py"

if __name__ == "__main__":  # before the slow imports: --help need not wait for torch
    try:
        from_command_line = parse(sys.argv[1:])
        go_offline_without_hub(from_command_line.model_name, *names_of(from_command_line.data))
    except UserError as error:
        sys.exit(end_with_error(PROGRAM, error))

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
import math
from pathlib import Path
import time

import torch
from tqdm import tqdm

import fisher
from residual_fisher.common.archives import Item
from residual_fisher.common.options import identity_of, settings_of
from residual_fisher.common.page import PAGE
from residual_fisher.common.run import Run, State, short_hash, sources_of
from residual_fisher.common.text import excerpt, first_line, printable
from residual_fisher.experiment import estimate, figures, page, records, report, text_map
from residual_fisher.experiment.lens_audit import lens_for
from residual_fisher.experiment.measurement import Batches, Clock, measure_sentence
from residual_fisher.experiment.perturbation import control_directions
from residual_fisher.experiment.records import Recorder, failure, rank, read_results, split_results, write_results
from residual_fisher.experiment.sentences import Context, Matches, diverse_order, find_sentences, locate, token_of
from residual_fisher.model.loading import (
    decoder_layers,
    describe,
    dtype_advice,
    fingerprint,
    fix_arithmetic,
    load,
    longest_prompt,
    vocabulary_size,
)
from residual_fisher.model.passes import devices_of, require_known_tokens, ways_of

FILES = (records.RESULTS, records.EIGENVECTORS, *figures.FILES, *text_map.FILES)
FAILURES = (fisher.NumericalError, torch.linalg.LinAlgError)  # a sentence that leads to one of them is left out


# --- 1. the sentences and the model --------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """What a run has before its first sentence."""

    settings: Settings  # no more is asked for than the model has
    model: torch.nn.Module
    found: Matches
    contexts: list[Context]  # of all sentences that can be used, diverse ones first; an item's number is its place here
    recorder: Recorder
    about: dict  # "run", "experiment_config" and "environment" of the results
    identity: dict
    load_seconds: float


def prepare(settings: Settings) -> Experiment:
    """Reads the sentences, loads the model, finds the target word's token in each sentence. Writes nothing.

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
        settings.occurrence,
    )
    start = time.perf_counter()
    model, tokenizer = load(settings.model_name, settings.dtype, settings.device, settings.trust_remote_code)
    load_seconds = time.perf_counter() - start
    fix_arithmetic(model)
    if not tokenizer.is_fast:
        raise UserError(f"{settings.model_name} has no fast tokenizer, whose character offsets find the target word")
    asked, settings = identity_settings(settings), clamp_to_model(settings, model)
    environment = describe(model)
    print(report.heading(settings.model_name, environment, settings.layers))
    contexts = find_contexts(settings, model, tokenizer, found.sentences)

    model_fingerprint = fingerprint(model, tokenizer)
    sentences_fingerprint = short_hash([[context.ids, context.target_id] for context in contexts])
    run = {"model_fingerprint": model_fingerprint, "sentences_fingerprint": sentences_fingerprint}
    about = {
        "run": {"id": short_hash([run, identity_of(settings)]), **run},
        "experiment_config": settings_of(settings),
        "environment": environment,
    }
    recorder = Recorder(about["experiment_config"], settings.layers, tokenizer)
    identity = {"settings": asked, "model": model_fingerprint, "sentences": sentences_fingerprint}
    return Experiment(settings, model, found, contexts, recorder, about, identity, load_seconds)


def clamp_to_model(settings: Settings, model: torch.nn.Module) -> Settings:
    """The settings with no more tokens than the vocabulary has, eigenvectors than F has, and layers that exist.

    Raises:
        UserError: it has no such layer, or the lens is of another model.
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
    if settings.lens:
        lens_for(settings.lens, layers, len(decoder_layers(model)), width)
    return replace(settings, max_vocab_subset=k, num_eigenvectors=count, layers=layers)


def find_contexts(settings: Settings, model: torch.nn.Module, tokenizer, texts: list[str]) -> list[Context]:
    """The sentences in which the tokenizer lets the word be found, within the model's longest prompt; diverse first.

    Raises:
        UserError: there are none.
    """
    longest = longest_prompt(model) or math.inf
    located = [
        context for text in texts if (context := locate(tokenizer, text, settings.target_word, settings.occurrence))
    ]
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


# --- 2. to 5. sentence by sentence ---------------------------------------------------------------


def linearize_sentence(experiment: Experiment, context: Context, clock: Clock) -> fisher.Point | None:
    """The model at the prompt's last token; None if the sentence does not qualify (--require-predicted)."""
    settings = experiment.settings
    with clock("prefix"):
        require_known_tokens(experiment.model, torch.tensor([context.target_id]))
        point = fisher.linearize(experiment.model, context.ids, settings.layers)
    qualifies = not settings.require_predicted or rank(point.log_probs, context.target_id) == 1
    return point if qualifies else None


def measure_sentences(
    experiment: Experiment, numbers: Sequence[int], known: dict[int, Item], batches: Batches, clock: Clock
) -> Iterator[tuple[int, Item]]:
    """Takes sentences through the protocol, until enough are finished.

    Each depends on those before it: its random directions on how many are finished, its control on the last of them.

    Args:
        numbers: places in `experiment.contexts`, ascending, of the sentences to take.
        known: the items of those that need no work, by number.
    Yields:
        How many sentences are finished before it, and the item of each that has been finished or has failed.
    Raises:
        UserError: the model is not supported.
    """
    settings, finished, other = experiment.settings, 0, None
    for place, number in enumerate(numbers):
        if finished == settings.num_sentences:
            return
        if number in known:
            if "failed" not in known[number].record:
                finished, other = finished + 1, torch.from_numpy(known[number].arrays["activations"])  # (layers, d)
            continue
        context = experiment.contexts[number]
        try:
            # 2. linearise the model at the prompt's last token
            point = linearize_sentence(experiment, context, clock)
            if point is None:
                continue
            # 3. the directions to compare v with; and, before the first sentence, whether F predicts anything
            if other is None and settings.num_sentences > 1:
                other = next_activations(experiment, numbers[place + 1 :], clock)
            key = (settings.seed, finished)
            controls = control_directions(point.activations, other, settings.layers, settings.num_controls, key)
            batches.prepare(point, experiment.contexts)
            # 4. the Fisher matrix, its eigenpairs, and every perturbation
            measured = measure_sentence(settings, context, point, controls, batches, clock)
            # 5. record it
            ways = {**ways_of(experiment.model), **batches.halved()}
            item = experiment.recorder.item(number, measured, ways, clock.take())
        except FAILURES as error:
            yield finished, failure(number, context.sentence, reason_of(error, experiment, context))
            continue
        except fisher.UnsupportedModelError as error:
            raise UserError(f"this model is not supported: {error}") from error
        yield finished, item
        finished, other = finished + 1, point.activations


def next_activations(experiment: Experiment, numbers: Sequence[int], clock: Clock) -> torch.Tensor | None:
    """The activations (layers, d) of the next sentence that qualifies, for the first one to be compared with."""
    for number in numbers:
        try:
            point = linearize_sentence(experiment, experiment.contexts[number], clock)
        except FAILURES:
            continue  # reported when it is this sentence's turn
        if point is not None:
            return point.activations
    return None


def reason_of(error: Exception, experiment: Experiment, context: Context) -> str:
    """Why a sentence is left out: NaN, infinity, or an eigensolver that failed."""
    layer = getattr(error, "layer", None)
    where = "" if layer is None else f" at layer {experiment.settings.layers[layer]}"
    sentence = excerpt(context.sentence, 60)
    return f"{first_line(error)}{where} of sentence {sentence!r}{dtype_advice(experiment.model)}"


# --- the run -------------------------------------------------------------------------------------


def identity_settings(settings: Settings) -> dict:
    """The options that count. More sentences extend a run, but a single one has no other to be compared with."""
    return {**identity_of(settings), "num_sentences": 1 if settings.num_sentences == 1 else "several"}


def examine(run: Run, experiment: Experiment) -> tuple[State, list[Item]]:
    """How far the run has come, and its finished items.

    Raises:
        UserError: the folder holds another run, and may not be overwritten.
    """
    settings = experiment.settings
    numbers = {context.sentence: number for number, context in enumerate(experiment.contexts)}
    split = partial(split_results, run.folder, numbers)
    sources = sources_of(settings.data, settings.data_split, settings.model_name)
    state = run.examine(experiment.identity, sources, settings.num_sentences, split)
    return state, list(run.items())


def run_experiment(settings: Settings) -> int:
    """Measures what is missing of a run; or, in a dry run, says what that would take, and writes nothing."""
    run = Run(settings.folder, PROGRAM, FILES, settings.overwrite, read_only=settings.dry_run)
    with run.locked():
        sources = sources_of(settings.data, settings.data_split, settings.model_name)
        if run.is_finished(identity_settings(settings), sources, settings.num_sentences):
            return report_finished(run)
        experiment = prepare(settings)
        state, items = examine(run, experiment)
        if state is State.FINISHED:
            return report_finished(run)
        if state is State.STARTED:
            print(f"Resuming after the {len(successes(items))} sentences that are finished.")
        return describe_run(experiment, run, items) if settings.dry_run else run_sentences(experiment, run, items)


def successes(items: list[Item]) -> list[Item]:
    return [item for item in items if "failed" not in item.record]


def run_sentences(experiment: Experiment, run: Run, items: list[Item]) -> int:
    """Measures what is not in `items` yet. Whatever stops it, finished sentences are written before it is reported."""
    print(report.block_legend(experiment.about["experiment_config"]))
    stopped = None
    try:
        measure_missing(experiment, run, items)
    except BaseException as error:
        stopped = error
    finished = successes(items)
    if not finished:
        raise stopped or UserError(nothing_found(experiment, items))
    items.sort(key=lambda item: item.number)
    with undisturbed():
        document = write_results(run.folder, items, experiment.about, stopped is None, experiment.load_seconds)
        if stopped:
            print(
                f"Stopped: {len(finished)} finished sentences are kept; the same command resumes the run.",
                file=sys.stderr,
            )
            figures.draw(run.folder, document)
            page.write_experiment(run.folder, document)
        else:
            run.finish(len(items), (records.RESULTS, records.EIGENVECTORS))
            draw(run, document)
    print(report.conclusion(document, len(experiment.contexts)))
    written = (records.RESULTS, records.EIGENVECTORS, *figures.pictures_of(document), PAGE)
    print(f"Written to {printable(str(run.folder))}: {', '.join(written)}")
    if stopped:
        raise stopped
    return SOME_FAILED if document["failed"] else 0


def measure_missing(experiment: Experiment, run: Run, items: list[Item]) -> None:
    """Sentence after sentence that is not in `items` yet, until there are enough; adds them to the run and to `items`.

    Raises:
        UserError: the model is not supported, or too many sentences fail.
    """
    settings, config = experiment.settings, experiment.about["experiment_config"]
    if items:
        run.begin()
    numbers, known = range(len(experiment.contexts)), {item.number: item for item in items}
    batches, clock = Batches(settings.batch_size, len(settings.layers)), Clock(devices_of(experiment.model))
    count, total = len(successes(items)), min(settings.num_sentences, len(numbers))
    failed = []  # kept with the next sentence that is finished: failures alone are no results
    with tqdm(total=total, initial=count, desc="perturbing", unit="sentence", disable=None) as bar:
        for before, item in measure_sentences(experiment, numbers, known, batches, clock):
            if "failed" in item.record:
                items.append(item)
                failed.append(item)
                require_few_failures(items)
                continue
            run.append([*failed, item])
            items.append(item)  # only now: Ctrl-C must not find it among the results before it is kept
            failed.clear()
            tqdm.write(report.sentence_block(item.record, before, config))
            bar.update()
    if failed and successes(items):
        run.append(failed)


def require_few_failures(items: list[Item]) -> None:
    """Notes the failure of the last item. Raises UserError: too many have failed."""
    reason = items[-1].record["failed"]
    failed = sum("failed" in item.record for item in items)
    if too_many(failed, len(items)):
        raise UserError(f"{failed} of the first {len(items)} sentences failed: {reason}")
    tqdm.write(f"note: left out: {printable(reason)}", file=sys.stderr)


def nothing_found(experiment: Experiment, items: list[Item]) -> str:
    if items:
        return items[0].record["failed"]
    word, count = experiment.settings.target_word, len(experiment.contexts)
    return f"in none of {count} sentences is {word!r} the top prediction (--require-predicted)"


def report_finished(run: Run) -> int:
    """Says that nothing is left to do; in a run that may write, makes what is missing or damaged to be looked at."""
    document = read_results(run.folder)
    if not run.read_only:
        draw(run, document)
    print(f"{printable(str(run.folder))} is finished: nothing to do (--overwrite starts anew)")
    return SOME_FAILED if document["failed"] else 0


def draw(run: Run, document: dict) -> None:
    run.derive(figures.pictures_of(document), document["checksum"], lambda: figures.draw(run.folder, document))
    run.derive([PAGE], document["checksum"], lambda: page.write_experiment(run.folder, document))


def redraw(folder: Path) -> int:
    if (folder / text_map.RESULTS).exists():
        return text_map.redraw_map(folder)
    document = read_results(folder)
    try:
        figures.draw(folder, document)
        page.write_experiment(folder, document)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if "checksum" in document:  # it is as this program has written it
            raise
        raise UserError(f"the results in {folder} are of another form: {excerpt(repr(error), 80)}") from error
    print(f"Drawn in {printable(str(folder))}: {', '.join([*figures.pictures_of(document), PAGE])}")
    return 0


# --- what a dry run says -------------------------------------------------------------------------


def describe_run(experiment: Experiment, run: Run, items: list[Item]) -> int:
    """How many sentences there are, and the first prompts; tries two sentences to say how long all take."""
    settings, contexts = experiment.settings, experiment.contexts
    if not items and run.is_begun():
        print(f"An earlier run in {printable(str(run.folder))} would be replaced.")
    known, finished = {item.number for item in items}, len(successes(items))
    left = [number for number in range(len(contexts)) if number not in known]
    todo = left[: settings.num_sentences - finished]
    most = "at most " if settings.require_predicted else ""  # before a number that not all sentences may reach
    counts = f"{experiment.found.read} read, {len(experiment.found.sentences)} with"
    counts += f" {excerpt(repr(settings.target_word), 40)}, {len(contexts)} usable"
    prompts = [contexts[number].prompt for number in todo]
    print(estimate.describe_sentences(counts, prompts, most))
    if todo:
        lengths = {number: len(contexts[number].ids) for number in todo}
        rounds = try_some(experiment, estimate.representatives(lengths))
        others = len(left) - len(todo) if settings.require_predicted else 0
        memory = peak_memory(devices_of(experiment.model))
        print(
            estimate.describe_costs(
                rounds, lengths, others, finished + len(todo), memory, experiment.load_seconds, most
            )
        )
    print("Nothing was written: a dry run.")
    return 0


def try_some(experiment: Experiment, numbers: list[int]) -> list[tuple[float, list[Item]]]:
    """Seconds and items of two rounds over some sentences: the first has to warm up.

    Raises:
        UserError: the model is not supported, or all of them fail.
    """
    settings = replace(experiment.settings, require_predicted=False)  # these count, whatever they predict
    batches, rounds = Batches(settings.batch_size, len(settings.layers)), []
    for _ in range(2):
        clock, start = Clock(devices_of(experiment.model)), time.perf_counter()
        new = measure_sentences(replace(experiment, settings=settings), numbers, {}, batches, clock)
        items = [item for _, item in new]
        if not successes(items):
            raise UserError(items[0].record["failed"])
        rounds.append((time.perf_counter() - start, successes(items)))
    return rounds


def main(settings: Settings) -> int:
    advice = "fewer --layers, a smaller --max-vocab-subset, --dtype bfloat16, or a smaller model"

    def task() -> int:
        if settings.redraw:
            return redraw(Path(settings.redraw))
        if settings.map:
            return text_map.run_map(settings, PROGRAM, FILES)
        return run_experiment(settings)

    return exit_code(PROGRAM, task, advice)


if __name__ == "__main__":
    sys.exit(main(from_command_line))

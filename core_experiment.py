"""Fisher-guided perturbation of a language model's residual stream.

For sentences that contain a target word, at the token just before it and at every chosen layer: read the
residual stream h, find the direction v in which the next-token prediction is most sensitive (the top eigenvector
of the Fisher information matrix), perturb h along v, and record what the model predicts instead. Perturbations
of the same length along random directions, and towards another sentence's activation, are the controls.

    python core_experiment.py --num-sentences 10
    python core_experiment.py --prompt "The capital of Germany is" --prompt "The capital of Norway is"
    python core_experiment.py --model-name meta-llama/Llama-3.1-8B --scale-unit nats

Writes experiment_results.json, fisher_eigenvectors.npz, fisher_similarity_matrix.png,
perturbation_analysis.png and report.html to --output-dir. The same command resumes a stopped run, and with more
sentences or layers extends a finished one. --map shows one text instead, at every token: fisher_map.png, .json, .npz,
and report.html.
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
from residual_fisher.common.drawing import of_kind
from residual_fisher.common.options import identity_of, settings_of
from residual_fisher.common.page import PAGE
from residual_fisher.common.progress import progress
from residual_fisher.common.run import Run, State, short_hash
from residual_fisher.common.text import excerpt, first_line, printable
from residual_fisher.experiment import estimate, figures, page, records, report, text_map
from residual_fisher.experiment.comparison import compare_runs
from residual_fisher.experiment.identity import (
    as_in_run,
    identity_in,
    identity_settings,
    is_grown,
    keeping_layers,
    keeping_sentences,
    layers_begun,
    sources_and_goal,
)
from residual_fisher.experiment.lens_audit import lens_for
from residual_fisher.experiment.measurement import Batches, Clock, measure_sentence
from residual_fisher.experiment.perturbation import control_directions
from residual_fisher.experiment.records import Recorder, failure, rank, read_results, split_results, write_results
from residual_fisher.experiment.sentences import (
    Context,
    Matches,
    find_contexts,
    find_sentences,
    on_line,
    take_prompts,
)
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
from residual_fisher.model.words import token_of

FILES = (records.RESULTS, records.EIGENVECTORS, *figures.FILES, *text_map.FILES)
FAILURES = (fisher.NumericalError, torch.linalg.LinAlgError)  # a sentence that leads to one of them is left out


# --- 1. the sentences and the model --------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """What a run has before its first sentence."""

    settings: Settings  # no more is asked for than the model has
    model: torch.nn.Module
    found: Matches | None  # None if prompts are given
    # of all sentences that can be used, diverse ones first, or of the prompts; an item's number is its place here
    contexts: list[Context]
    recorder: Recorder
    about: dict  # "run", "experiment_config" and "environment" of the results
    identity: dict
    load_seconds: float
    also_nats: bool | None  # whether steps in nats are taken too; None until the first sentence is measured


def prepare(settings: Settings, grown: Run | None = None) -> Experiment:
    """Reads the sentences, loads the model, finds the target word's token in each sentence. Writes nothing.

    Args:
        grown: the run whose layers are measured along with those asked for.
    Raises:
        UserError: one of them is not as it has to be.
    """
    found = None if settings.prompt else read_sentences(settings)
    start = time.perf_counter()
    model, tokenizer = load(settings.model_name, settings.dtype, settings.device, settings.trust_remote_code)
    load_seconds = time.perf_counter() - start
    fix_arithmetic(model)
    if found and not tokenizer.is_fast:
        raise UserError(f"{settings.model_name} has no fast tokenizer, whose character offsets find the target word")
    if grown:
        settings = keeping_layers(grown, settings, len(decoder_layers(model)))
    asked, settings = identity_settings(settings), clamp_to_model(settings, model)
    environment = describe(model)
    print(report.heading(settings.model_name, environment, settings.layers))
    longest = longest_prompt(model) or math.inf
    if found:
        contexts = find_contexts(tokenizer, found, settings.target_word, settings.occurrence, longest)
    else:
        contexts = take_prompts(tokenizer, settings.prompt, longest)
    if settings.steer_token:
        steer_id = token_of(tokenizer, settings.steer_token, "--steer-token ")
        contexts = [replace(context, steer_id=steer_id) for context in contexts]

    model_fingerprint = fingerprint(model, tokenizer)
    sentences_fingerprint = short_hash([[context.ids, context.target_id] for context in contexts])
    run = {"model_fingerprint": model_fingerprint, "sentences_fingerprint": sentences_fingerprint}
    recorded = replace(settings, scale_unit=settings.unit)
    about = {
        "run": {"id": short_hash([run, identity_of(recorded)]), **run},
        "experiment_config": settings_of(recorded),
        "environment": environment,
    }
    recorder = Recorder(about["experiment_config"], settings.layers, tokenizer)
    identity = {"settings": asked, "model": model_fingerprint}
    if found:  # prompts are the run's goal: more of them extend it
        identity["sentences"] = sentences_fingerprint
    also_nats = None if settings.scale_unit == "auto" else False
    return Experiment(settings, model, found, contexts, recorder, about, identity, load_seconds, also_nats)


def read_sentences(settings: Settings) -> Matches:
    """The sentences of the data that contain the target word. Raises UserError: see `find_sentences`."""
    return find_sentences(
        settings.data,
        settings.target_word,
        settings.text_column,
        settings.data_config,
        settings.data_split,
        settings.num_sentences,
        settings.occurrence,
    )


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


# --- 2. to 5. sentence by sentence ---------------------------------------------------------------


def linearize_sentence(experiment: Experiment, context: Context, clock: Clock) -> fisher.Point | None:
    """The model at the prompt's last token; None if the sentence does not qualify (--require-predicted)."""
    settings = experiment.settings
    with clock("prefix"):
        if context.target_id is not None:
            require_known_tokens(experiment.model, torch.tensor([context.target_id]))
        point = fisher.linearize(experiment.model, context.ids, settings.layers)
    qualifies = not settings.require_predicted or rank(point.log_probs, context.target_id) == 1
    return point if qualifies else None


def measure_sentences(
    experiment: Experiment, numbers: Sequence[int], known: dict[int, Item], batches: Batches, clock: Clock
) -> Iterator[tuple[int, Item]]:
    """Takes sentences through the protocol, until enough are finished.

    Each depends on those before it: its random directions on how many are finished, its control on the last of them,
    and whether it is perturbed in nats too on the first of them.

    Args:
        numbers: places in `experiment.contexts`, ascending, of the sentences to take.
        known: the items of those that need no work, by number.
    Yields:
        How many sentences are finished before it, and the item of each that has been finished or has failed.
    Raises:
        UserError: the model is not supported.
    """
    settings, finished, other, also_nats = experiment.settings, 0, None, experiment.also_nats
    for place, number in enumerate(numbers):
        if finished == settings.wanted:
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
            if other is None and settings.wanted > 1:
                other = next_activations(experiment, numbers[place + 1 :], clock)
            key = (settings.seed, finished)
            controls = control_directions(point.activations, other, settings.layers, settings.num_controls, key)
            batches.prepare(point, experiment.contexts)
            # 4. the Fisher matrix, its eigenpairs, and every perturbation
            measured = measure_sentence(settings, context, point, controls, batches, clock, also_nats)
            # 5. record it
            ways = {**ways_of(experiment.model), **batches.halved()}
            item = experiment.recorder.item(number, measured, ways, clock.take())
        except FAILURES as error:
            yield finished, failure(number, context.sentence, reason_of(error, experiment, context))
            continue
        except fisher.UnsupportedModelError as error:
            raise UserError(f"this model is not supported: {error}") from error
        yield finished, item
        finished, other, also_nats = finished + 1, point.activations, records.NATS in item.record


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
    sentence = f"sentence {excerpt(context.sentence, 60)!r}{on_line(context.line)}"
    return f"{first_line(error)}{where} of {sentence}{dtype_advice(experiment.model)}"


# --- the run -------------------------------------------------------------------------------------


def examine(run: Run, experiment: Experiment) -> tuple[State, list[Item]]:
    """How far the run has come, and its finished items.

    Raises:
        UserError: the folder holds another run, and may not be overwritten.
    """
    numbers = {context.sentence: number for number, context in enumerate(experiment.contexts)}
    split = partial(split_results, run.folder, numbers)
    state = run.examine(experiment.identity, *sources_and_goal(experiment.settings), split)
    return state, [] if state is State.FINISHED else list(run.items())


def run_experiment(settings: Settings) -> int:
    """Measures what is missing of a run; or, in a dry run, says what that would take, and writes nothing."""
    run = Run(settings.folder, PROGRAM, FILES, settings.overwrite, settings.dry_run, "sentences")
    with run.locked():
        asked, settings = settings, as_in_run(run, settings)
        grown = is_grown(run, settings)
        settings = keeping_sentences(run, settings) if grown else settings
        known = run.manifest["identity"]["settings"] if grown else identity_in(run, settings)
        finished = run.is_finished(known, *sources_and_goal(settings))  # or refused, before the model is loaded
        if finished and not grown:
            return report_finished(run, asked)
        experiment = prepare(settings, run if grown else None)
        if set(experiment.settings.layers) > set(choose_layers(asked.layers, experiment.about["environment"]["depth"])):
            print("The run's other layers are measured too; the table at the end is of those asked for.")
        if grown and not run.is_of(experiment.identity):
            measure_anew(run, experiment)
        state, items = examine(run, experiment)
        if state is State.FINISHED:
            return report_finished(run, asked)
        if measured := successes(items):  # those after them are measured alike
            experiment = replace(experiment, also_nats=records.NATS in measured[0].record)
        if state is State.STARTED:
            print(f"Resuming after the {len(measured)} sentences that are finished.")
        return (
            describe_run(experiment, run, items) if settings.dry_run else run_sentences(experiment, run, items, asked)
        )


def measure_anew(run: Run, experiment: Experiment) -> None:
    """Has all sentences of the run in the folder measured again, and says why.

    Raises:
        UserError: it is a run of another model or of other sentences.
    """
    settings, then, spent = experiment.settings, run.manifest["identity"]["settings"]["layers"], run.spent()
    run.measure_anew(experiment.identity, sources_and_goal(settings)[1])
    before = choose_layers(then, experiment.about["environment"]["depth"])
    count = min(settings.wanted, len(experiment.contexts))
    print(report.measured_again(count, settings.layers, before, *spent))


def successes(items: list[Item]) -> list[Item]:
    return [item for item in items if "failed" not in item.record]


def run_sentences(experiment: Experiment, run: Run, items: list[Item], asked: Settings) -> int:
    """Measures what is not in `items` yet. Whatever stops it, finished sentences are written before it is reported.

    Those that are measured again replace the run before them when all are finished, and not earlier.

    Args:
        asked: the settings as they were given, whose layers and sentences the tables at the end are of.
    """
    stopped = None
    try:
        measure_missing(experiment, run, items)
    except BaseException as error:
        stopped = error
    finished = successes(items)
    if not finished:
        raise stopped or UserError(nothing_found(experiment, items))
    if stopped and run.anew:
        print(
            f"Stopped: {len(finished)} sentences that were measured again are kept; the same command resumes the run. "
            "Until it ends, the results before it stay.",
            file=sys.stderr,
        )
        raise stopped
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
            seconds = sum(seconds for stage, seconds in document["timings"].items() if stage != "load")
            run.finish(len(items), (records.RESULTS, records.EIGENVECTORS), seconds=seconds)
            draw(run, document)
    print(report.conclusion(part_asked_for(document, asked), len(experiment.contexts)))
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
    count, total = len(successes(items)), min(settings.wanted, len(numbers))
    failed = []  # kept with the next sentence that is finished: failures alone are no results
    told = False  # how to read a sentence's block
    with progress(total, "perturbing", "sentence", initial=count) as bar:
        for before, item in measure_sentences(experiment, numbers, known, batches, clock):
            if "failed" in item.record:
                items.append(item)
                failed.append(item)
                require_few_failures(items)
                continue
            run.append([*failed, item])
            items.append(item)  # only now: Ctrl-C must not find it among the results before it is kept
            failed.clear()
            if not told:
                tqdm.write(report.block_legend(config, successes(items)[0].record))
                told = True
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


def report_finished(run: Run, settings: Settings) -> int:
    """Tells of what is asked for, of a run that has it; if it may write, draws what is missing or damaged."""
    document = read_results(run.folder)
    if not run.read_only:
        draw(run, document)
    print(report.conclusion(part_asked_for(document, settings)))
    print(f"{printable(str(run.folder))} is finished: nothing to do (--overwrite starts anew)")
    if more := layers_begun(run):
        print(f"Unfinished: the same with more layers (--layers {' '.join(map(str, more))} resumes it)")
    return SOME_FAILED if document["failed"] else 0


def part_asked_for(document: dict, settings: Settings) -> dict:
    """The results of the sentences and layers that are asked for, of all that a run has."""
    sentences = settings.prompt or document["sentences"][: settings.num_sentences]
    layers = choose_layers(settings.layers, document["environment"]["depth"])
    return records.part_of(document, sentences, list(map(str, layers)))


def draw(run: Run, document: dict) -> None:
    run.derive(figures.pictures_of(document), document["checksum"], lambda: figures.draw(run.folder, document))
    run.derive([PAGE], document["checksum"], lambda: page.write_experiment(run.folder, document))


def redraw(settings: Settings) -> int:
    """Makes the pictures and the page of the results in a folder again; or draws one panel into a file of its own."""
    folder, kind = Path(settings.redraw), settings.format
    layers = None if "all" in (settings.layers or ("all",)) else settings.layers
    if (folder / text_map.RESULTS).exists():
        if settings.sentence is not None:
            raise UserError(f"--sentence has no effect: {folder} holds the map of one text")
        return text_map.redraw_map(folder, kind, settings.panel, layers)
    document = read_results(folder)
    try:
        if settings.panel:
            drawn = [figures.draw_panel(folder, document, settings.panel, layers, settings.sentence, kind)]
        else:
            figures.draw(folder, document, kind)
            page.write_experiment(folder, document)
            drawn = [*(of_kind(name, kind) for name in figures.pictures_of(document)), PAGE]
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if "checksum" in document:  # it is as this program has written it
            raise
        raise UserError(f"the results in {folder} are of another form: {excerpt(repr(error), 80)}") from error
    print(f"Drawn in {printable(str(folder))}: {', '.join(drawn)}")
    return 0


# --- what a dry run says -------------------------------------------------------------------------


def describe_run(experiment: Experiment, run: Run, items: list[Item]) -> int:
    """How many sentences there are, and the first prompts; tries two sentences to say how long all take."""
    settings, contexts = experiment.settings, experiment.contexts
    if not items and run.is_begun() and not run.anew:
        print(f"An earlier run in {printable(str(run.folder))} would be replaced.")
    known, finished = {item.number for item in items}, len(successes(items))
    left = [number for number in range(len(contexts)) if number not in known]
    todo = left[: settings.wanted - finished]
    most = "at most " if settings.require_predicted else ""  # before a number that not all sentences may reach
    counts = f"{len(contexts)} given"
    if found := experiment.found:
        counts = f"{found.read} read, {len(found.sentences)} with {excerpt(repr(settings.target_word), 40)}"
        counts += f", {len(contexts)} usable"
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
            return redraw(settings)
        if settings.compare:
            return compare_runs(settings.compare, settings.comparison_folder)
        if settings.map:
            return text_map.run_map(settings, PROGRAM, FILES)
        return run_experiment(settings)

    return exit_code(PROGRAM, task, advice)


if __name__ == "__main__":
    sys.exit(main(from_command_line))

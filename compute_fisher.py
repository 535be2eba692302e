"""Fisher information matrices of a dataset's prompts, each compressed to its top singular triplets.

For every prompt, a zero bias is added to the residual stream at one layer, at every token. F is the Fisher
information matrix of the next-token distribution at the prompt's end with respect to that bias: perturbing
the whole residual stream by delta changes the prediction by KL ~ 1/2 delta^T F delta nats. Prompts whose
F is unlike the others' are prompts on which the model behaves unlike itself.

    python compute_fisher.py
    python compute_fisher.py --config configs/llama_8b.yaml --output-dir results
    python compute_fisher.py --dataset-name suspicious.jsonl --reference fisher_results --output-dir suspicious
    torchrun --nproc-per-node 8 compute_fisher.py --config configs/lmsys_1b.yaml

Writes fisher_matrices_compressed.npz, prompts.jsonl, metadata.yaml and fisher_spectra.png to the output
directory. The same command resumes a stopped run, and with more prompts extends a finished one.
"""

from residual_fisher.common.program import INTERRUPTED, before_imports

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
from residual_fisher.pipeline.settings import Settings, parse

PROGRAM = "compute_fisher.py"

if __name__ == "__main__":  # before the slow imports: --help need not wait for torch
    try:
        from_command_line = parse(sys.argv[1:])
        go_offline_without_hub(from_command_line.model_path, from_command_line.dataset)
    except UserError as error:
        sys.exit(end_with_error(PROGRAM, error))

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
import json
import os
from pathlib import Path
from statistics import fmean, median
import time

import torch
from tqdm import tqdm
import yaml

from residual_fisher.common.estimate import Trial
from residual_fisher.common.files import atomic_open, json_ready, json_text
from residual_fisher.common.options import identity_of, settings_of
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.common.run import ITEMS, Item, Run, State, checksum, read_manifest, stamps
from residual_fisher.common.text import duration, excerpt, first_line, model_line, printable, size
from residual_fisher.model.loading import (
    describe,
    dtype_advice,
    find_module,
    fingerprint,
    load,
    longest_prompt,
    vocabulary_size,
)
from residual_fisher.model.passes import devices_of
from residual_fisher.pipeline import figures, matrices, processes, report
from residual_fisher.pipeline.batches import Subject, check_once, into_batches, measure, try_first
from residual_fisher.pipeline.matrices import load_fisher_matrices, records_of
from residual_fisher.pipeline.processes import Processes
from residual_fisher.pipeline.prompts import Encoded, Prompt, Prompts, encode
from residual_fisher.pipeline.reference import Reference
from residual_fisher.pipeline.scores import SCORING_VERSION, ScoredRun, outlier_scores

PROMPTS, METADATA = "prompts.jsonl", "metadata.yaml"
FILES = (matrices.ARRAYS, PROMPTS, METADATA, figures.SPECTRA)
WINDOW_BATCHES = 16  # a window of the dataset is so many batches' prompts: sorted by length, they need little padding
MAX_WAITING = 2  # batches that may wait to be written
SAMPLE = 256  # prompts, the first ones, whose lengths stand for all in a dry run
TRIED = 3  # batches of them, from the smallest to the largest
SCORE_BYTES = 300  # that the scores add to a prompt's record


# --- 1. the dataset and the model ----------------------------------------------------------------


def open_dataset(settings: Settings) -> tuple[Prompts, Iterator[Prompt], Prompt]:
    """The dataset, the prompts to take one by one, and the first: what is wrong shows before the model is loaded."""
    prompts = Prompts(
        settings.dataset, settings.dataset_split, settings.prompt_column, settings.dataset_config, settings.seed
    )
    wanted = None if settings.num_prompts == "all" else settings.num_prompts
    source = iter(prompts)
    first = next(source)
    return prompts, islice(chain([first], source), wanted), first


def own_device(device: str, process: Processes) -> str:
    """The device asked for; of several processes that ask for a GPU without its number, each has its own.

    Raises:
        UserError: there are not enough.
    """
    wanted = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if process.size == 1 or not wanted:
        return device
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return device  # which is not available: `load` says so
    if process.local >= gpus:
        without = f"process {process.rank + 1} of {process.size} has no GPU of its own"
        raise UserError(f"{without}: this machine has {gpus}, so start torchrun with --nproc-per-node {gpus}")
    return f"cuda:{process.local}"


@dataclass(frozen=True)
class Pipeline:
    """What a run has before its first batch."""

    settings: Settings  # no more is asked for than the model has
    subject: Subject
    longest: int  # tokens of a prompt
    environment: dict
    identity: dict


def prepare(settings: Settings, first: Prompt, process: Processes, tell: Callable[[str], None]) -> Pipeline:
    """Loads the model, and tries the first prompt.

    Raises:
        UserError: the settings do not fit the model, or the model is not supported.
    """
    device = own_device(settings.device, process)
    model, tokenizer = load(settings.model_path, settings.dtype, device, settings.trust_remote_code)
    subject = Subject(model, tokenizer, *find_module(model, settings.hook_layer_name))
    longest = min(settings.max_length, longest_prompt(model) or settings.max_length)
    asked, settings = identity_of(settings), clamp_to_model(settings, subject, tell)
    try_first(settings, subject, first, longest)
    identity = {"settings": asked, "hook_layer": subject.path, "model": fingerprint(model, tokenizer)}
    return Pipeline(settings, subject, longest, describe(model), identity)


def clamp_to_model(settings: Settings, subject: Subject, tell: Callable[[str], None]) -> Settings:
    """The settings with no more tokens than the vocabulary has, and no more singular values than F has."""
    k, r, vocabulary = settings.top_k_tokens, settings.num_singular_values, vocabulary_size(subject.model)
    if k != "all" and k > vocabulary:
        tell(f"note: --top-k-tokens {k} is more than the vocabulary: counting all {vocabulary} tokens")
        k = vocabulary
    width = subject.model.get_output_embeddings().weight.shape[1]
    most, of = (width, f"of width {width}") if k == "all" else (k, f"of {k} tokens")
    if r > most:
        tell(f"note: --num-singular-values {r} is more than a matrix {of} has: keeping {most}")
        r = most
    return replace(settings, top_k_tokens=k, num_singular_values=r)


# --- 2. batches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A part of the dataset, and what is left to do of it."""

    numbers: range  # of its prompts
    batches: list[list[Encoded]]  # prompts that are not finished
    finished: int


def plan(pipeline: Pipeline, prompts: Iterator[Prompt], tokenizer, run: Run, process: Processes) -> Iterator[Window]:
    """The windows that this process takes, each with what an earlier call left of it.

    Windows and batches are a function of the dataset and the settings alone, so that neither the number of
    processes nor an interruption changes a result.

    Args:
        tokenizer: for this generator alone, which may run in another thread.
    Raises:
        UserError: the dataset is not the one of the earlier call.
    """
    size = WINDOW_BATCHES * pipeline.settings.batch_size
    number, claimed, count = 0, process.claim(), 0
    while window := list(islice(prompts, size)):
        if number == claimed:
            yield plan_window(pipeline, window, tokenizer, run)
            claimed = process.claim()
        number, count = number + 1, count + len(window)
    if run.last() >= count:
        raise changed(run, "which had more prompts")


def plan_window(pipeline: Pipeline, window: list[Prompt], tokenizer, run: Run) -> Window:
    numbers = range(window[0].index, window[-1].index + 1)
    finished = finished_in(run, window)
    if len(finished) == len(window):
        return Window(numbers, [], len(finished))
    encoded = [encode(tokenizer, prompt, pipeline.longest) for prompt in window]
    batches = into_batches(pipeline.settings, pipeline.subject, encoded)
    left = ([prompt for prompt in batch if prompt.prompt.index not in finished] for batch in batches)
    return Window(numbers, list(filter(None, left)), len(finished))


def finished_in(run: Run, window: list[Prompt]) -> dict[int, dict]:
    """The records of a window's finished prompts, by number.

    Raises:
        UserError: one is of another text.
    """
    found = run.records(range(window[0].index, window[-1].index + 1))
    for prompt in window:
        if prompt.index in found and found[prompt.index]["prompt"] != prompt.text:
            raise changed(run, f"first at prompt {prompt.index}")
    return found


def changed(run: Run, where: str) -> UserError:
    return UserError(f"the dataset has changed since the run in {run.folder} began, {where}: --overwrite starts anew")


# --- 3. Fisher matrices, and 4. their singular triplets, batch by batch --------------------------


def compute(pipeline: Pipeline, source: Iterator[Prompt], run: Run, process: Processes, bar: tqdm) -> None:
    """Takes the windows of this process through `measure`, and keeps every batch as soon as it is finished.

    The next window is tokenized, and items are written, meanwhile.
    """
    settings, subject = pipeline.settings, pipeline.subject
    windows = plan(pipeline, source, subject.encoder, run, process)
    pending: deque[Future] = deque()
    tokens, start, checked = 0, time.perf_counter(), set()
    failures = Failures(dtype_advice(subject.model))
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = reader.submit(next, windows, None)
        while (window := ahead.result()) is not None:
            ahead = reader.submit(next, windows, None)
            bar.update(process.count(window.finished) - bar.n)
            for batch in window.batches:
                check_once(settings, subject, batch, checked)
                items = measure(settings, subject, batch)
                pending.append(writer.submit(run.append, items))
                while len(pending) > MAX_WAITING:  # raises what a write that failed has raised
                    pending.popleft().result()
                failures.count(items)
                tokens += sum(len(encoded.ids) for encoded in batch)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                bar.update(process.count(len(batch)) - bar.n)
            pending.append(writer.submit(run.pack, window.numbers))
        for write in pending:
            write.result()


class Failures:
    """How many of this process's prompts have failed."""

    def __init__(self, advice: str):
        self.seen, self.failed, self.advice = 0, 0, advice

    def count(self, items: list[Item]) -> None:
        """Raises UserError: too many have."""
        reasons = [item.record["failed"] for item in items if "failed" in item.record]
        self.seen, self.failed = self.seen + len(items), self.failed + len(reasons)
        if reasons and too_many(self.failed, self.seen):
            raise UserError(f"{self.failed} of the first {self.seen} prompts failed: {reasons[-1]}{self.advice}")


# --- 5. what follows from the matrices: scores, statistics, a picture ----------------------------


def conclude(run: Run, settings: Settings, against: Reference | None) -> bool:
    """Makes the derived files that are missing, damaged, or not of these matrices and this reference.

    Returns:
        Whether the prompts were scored.
    """
    notes, primary = run.manifest["notes"], run.manifest["primary"]
    scoring = scoring_of(against)
    scored = run.derive([PROMPTS], made_from_scores(run, scoring), partial(write_prompts, run, against))
    prompts = checksum(run.folder / PROMPTS)
    run.derive([figures.SPECTRA], prompts, lambda: figures.draw(run.folder, scored_records(run.folder)))
    directory = str(against.path) if against else None
    about = [primary, notes, scoring, directory]
    run.derive([METADATA], about, lambda: write_metadata(run, {**scoring, "directory": directory}))
    return scored


def scoring_of(against: Reference | None) -> dict:
    """What the scores are of, wherever it lies."""
    kind, known = (against.kind, against.checksum) if against else (None, None)
    return {"version": SCORING_VERSION, "against": kind, "checksum": known}


def made_from_scores(run: Run, scoring: dict) -> list:
    return [run.manifest["primary"], scoring]


def write_prompts(run: Run, against: Reference | None) -> None:
    """Writes prompts.jsonl: each prompt's record, and its scores."""
    compared = {}
    with ExitStack() as stack:
        own = ScoredRun.of(records_of(run.folder), stack.enter_context(load_fisher_matrices(run.folder)))
        if against:
            compared[against.kind] = against.open(stack, own)
        columns = outlier_scores(own, **compared)
    with atomic_open(run.folder / PROMPTS) as file:
        for index, record in enumerate(records_of(run.folder)):
            file.write(json_text({**record, **{name: column[index] for name, column in columns.items()}}))


def scored_records(folder: Path) -> Iterator[dict]:
    """The lines of prompts.jsonl.

    Raises:
        UserError: they cannot be read.
    """
    try:
        with open(folder / PROMPTS, encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, ValueError) as error:
        raise UserError(f"no readable {PROMPTS} in {folder}: {first_line(error)}") from error


def write_metadata(run: Run, scoring: dict) -> None:
    """Writes metadata.yaml: settings, versions, statistics."""
    notes, identity = run.manifest["notes"], run.manifest["identity"]
    with load_fisher_matrices(run.folder) as found:
        bias_dim, num_singular_values = found[0].U.shape
    metadata = {
        "format": run.manifest["format"],
        "complete": True,
        "hook_layer": identity["hook_layer"],
        "model_fingerprint": identity["model"],
        "config": notes["config"],
        "environment": notes["environment"],
        "num_prompts": run.manifest["items"],
        "bias_dim": bias_dim,
        "num_singular_values": num_singular_values,
        "arrays": matrices.ARRAYS if matrices.ARRAYS in run.manifest["primary"] else f"{ITEMS}/",
        "statistics": notes["statistics"],
        "scores": scoring,
    }
    with atomic_open(run.folder / METADATA) as file:
        text = yaml.safe_dump(json_ready(metadata), sort_keys=False, allow_unicode=True, width=110)
        file.write(text.encode())


# --- the run -------------------------------------------------------------------------------------


def run_pipeline(settings: Settings, process: Processes) -> int:
    """Computes what is missing of a run; or, in a dry run, says what that would take, and writes nothing.

    Of several processes the first has the folder locked, and concludes the run. In a dry run it works alone.
    """
    processes_in_all = process.size
    if settings.dry_run:
        settings = replace(settings, device=own_device(settings.device, process))
        if not process.first:
            return 0
        process = Processes()
    files = (*FILES, matrices.LINES)
    run = Run(Path(settings.output_dir), PROGRAM, files, settings.overwrite, read_only=settings.dry_run)
    against: Reference | None = None
    with ExitStack() as stack:

        def open_and_look() -> bool:
            nonlocal against
            stack.enter_context(run.locked())
            against = Reference.asked_for(settings)
            return run.is_finished(identity_of(settings), sources(settings), settings.num_prompts)

        if process.ask_first(open_and_look):
            return report_finished(run, settings, against) if process.first else 0
        prompts, source, first = open_dataset(settings)
        start = time.perf_counter()
        pipeline = prepare(settings, first, process, print if process.first else lambda line: None)
        load_seconds = time.perf_counter() - start
        if process.ask_first(lambda: examine(run, settings, pipeline, against) is State.FINISHED):
            return report_finished(run, settings, against) if process.first else 0
        if process.first:
            print(f"{model_line(settings.model_path, pipeline.environment)}; hooked at {pipeline.subject.path}")
        if settings.dry_run:
            return describe_run(pipeline, prompts, source, run, load_seconds, processes_in_all)
        process.ask_first(run.begin)
        if not process.first:
            run.join()
        try:
            with progress_bar(settings, process) as bar:
                compute(pipeline, source, run, process, bar)
            if not process.leave():
                return 0
            tell_too_few(settings, prompts.usable)
            primary = matrices.merge(run, prompts.usable)
            columns = report.columns_of(record for _, record in run.all_records())
            run.finish(prompts.usable, primary, statistics=report.summarize(columns, prompts.skipped))
            conclude(run, settings, against)
        except KeyboardInterrupt:
            print("Interrupted: finished batches are saved; the same command resumes the run.", file=sys.stderr)
            return INTERRUPTED
        print(report.final_table(partial(scored_records, run.folder), run.manifest["notes"]["statistics"], settings))
        print(f"Written to {printable(str(run.folder))}: {', '.join(FILES)}")
        return code_of(run)


def sources(settings: Settings) -> dict:
    """What shows, without loading them, that data and model are as they were."""
    return {"data": checksum(Path(settings.dataset)), "model": stamps(settings.model_path)}


def examine(run: Run, settings: Settings, pipeline: Pipeline, against: Reference | None) -> State:
    """How far the run has come.

    Raises:
        UserError: the folder holds another run, and may not be overwritten; or the reference does not fit.
    """
    if against:
        against.require_same_model(pipeline.identity)
    notes = {"config": settings_of(settings), "environment": pipeline.environment}
    split = partial(matrices.split, run.folder)
    state = run.examine(pipeline.identity, sources(settings), settings.num_prompts, split, notes)
    if state is State.STARTED and settings.num_prompts != "all" and run.last() >= settings.num_prompts:
        raise UserError(
            f"{run.folder} holds an unfinished run of more prompts, {run.last() + 1} at least: ask for as many, or "
            "--overwrite starts anew"
        )
    return state


def progress_bar(settings: Settings, process: Processes) -> tqdm:
    """Of all processes' prompts, shown by the first."""
    total = None if settings.num_prompts == "all" else settings.num_prompts
    return tqdm(total=total, desc="Fisher matrices", unit="prompt", disable=None if process.first else True)


def tell_too_few(settings: Settings, usable: int) -> None:
    if settings.num_prompts != "all" and usable < settings.num_prompts:
        print(f"note: {settings.num_prompts} prompts were asked for, only {usable} are available")


def code_of(run: Run) -> int:
    return SOME_FAILED if run.manifest["notes"]["statistics"]["failed_prompts"] else 0


def report_finished(run: Run, settings: Settings, against: Reference | None) -> int:
    """Makes what is missing of a run whose Fisher matrices are all computed, and says so."""
    name = printable(settings.output_dir)
    if run.read_only and not run.is_derived([PROMPTS], made_from_scores(run, scoring_of(against))):
        print(f"{name} is finished: only its prompts would be scored anew")
    elif not run.read_only and conclude(run, settings, against):
        print(report.final_table(partial(scored_records, run.folder), run.manifest["notes"]["statistics"], settings))
        print(f"{name} was finished: its prompts were scored anew")
    else:
        print(f"{name} is finished: nothing to do (--overwrite starts anew)")
    return code_of(run)


def redraw(folder: Path) -> int:
    """Draws the picture of the records in a folder again."""
    try:
        figures.draw(folder, scored_records(folder))
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        manifest = read_manifest(folder)
        if manifest and manifest["derived"].get(PROMPTS, {}).get("checksum") == checksum(folder / PROMPTS):
            raise  # it is as this program has written it
        raise UserError(f"no readable {PROMPTS} in {folder}: it lacks {excerpt(repr(error), 80)}") from error
    print(f"Drawn in {printable(str(folder))}: {figures.SPECTRA}")
    return 0


# --- what a dry run says -------------------------------------------------------------------------


def describe_run(
    pipeline: Pipeline, prompts: Prompts, source: Iterator[Prompt], run: Run, load_seconds: float, processes: int
) -> int:
    """Reads a local dataset to its end, a remote one as far as earlier calls have come; tries a few batches."""
    settings = pipeline.settings
    if run.overwrite and run.is_begun():
        print(f"An earlier run in {printable(settings.output_dir)} would be replaced.")
    sample, taken, done, to_its_end = [], 0, 0, os.path.isfile(settings.dataset)
    while to_its_end or len(sample) < SAMPLE or taken <= run.last():
        if not (window := list(islice(source, WINDOW_BATCHES * settings.batch_size))):
            to_its_end = True
            break
        sample += window[: SAMPLE - len(sample)]
        taken, done = taken + len(window), done + len(finished_in(run, window))
    if run.last() >= taken:
        raise changed(run, "which had more prompts")
    if not to_its_end:
        taken = None if settings.num_prompts == "all" else settings.num_prompts

    place = f"{excerpt(settings.dataset, 80)}, column {excerpt(repr(prompts.column), 40)}"
    if taken is None:
        print(f"prompts: all of {place}: how many, only its end will tell")
    else:
        print(f"prompts: {taken} of {place}; {prompts.skipped} rows without a text skipped")
        tell_too_few(settings, taken)
    if done:
        print(f"resuming: {done} are finished" + ("" if taken is None else f", {taken - done} are left"))
    encoded = [encode(pipeline.subject.tokenizer, prompt, pipeline.longest) for prompt in sample]
    lengths = [len(e.ids) for e in encoded]
    print(
        f"tokens: {min(lengths)} to {max(lengths)}, median {median(lengths):g}, in the first {len(lengths)} prompts; "
        f"{sum(e.truncated for e in encoded)} of them cut (--max-length {settings.max_length})"
    )
    print(describe_costs(pipeline, encoded, taken, done, load_seconds, processes))
    print("Nothing was written: a dry run.")
    return 0


def describe_costs(
    pipeline: Pipeline, encoded: list[Encoded], taken: int | None, done: int, load_seconds: float, processes: int
) -> str:
    """Time, memory and disk, from a few batches that are tried: the largest and the longest prompt's among them.

    Raises:
        UserError: the model is not supported, or too many prompts fail.
    """
    settings, subject = pipeline.settings, pipeline.subject
    size_of_window = WINDOW_BATCHES * settings.batch_size
    windows = [encoded[start : start + size_of_window] for start in range(0, len(encoded), size_of_window)]
    batches = sorted(chain.from_iterable(into_batches(settings, subject, window) for window in windows), key=padded)
    places = {*evenly_spaced(len(batches), TRIED), max(range(len(batches)), key=lambda i: longest(batches[i]))}
    chosen, items = [batches[place] for place in sorted(places)], []
    checked, failures = set(), Failures(dtype_advice(subject.model))
    for batch in batches:  # warms up each kind of attention
        if check_once(settings, subject, batch, checked):
            measure(settings, subject, batch[-1:])
    seconds = []
    for batch in chosen:
        found = measure(settings, subject, batch)
        failures.count(found)
        seconds.append(sum(item.record["seconds"] for item in found))
        items += found
    each = Trial(list(map(padded, chosen)), seconds).total(list(map(padded, batches))) / len(encoded)
    arrays = fmean(sum(array.nbytes for array in item.arrays.values()) for item in items)
    record = fmean(len(json_text(item.record)) for item in items) + SCORE_BYTES
    tokens = fmean(len(e.ids) for e in encoded)
    time_line = f"{duration(each)} a prompt, {processes * tokens / each:.0f} tokens/s"
    place = matrices.ARRAYS if taken is not None and taken <= matrices.ONE_FILE else f"{ITEMS}/"
    files = f"{size(arrays)} in {place} and {size(record)} in {PROMPTS} a prompt"
    if taken is not None:
        time_line = f"about {duration(each * (taken - done) / processes)}, {time_line}"
        files = f"about {size(arrays * taken)} {place}, {size(record * taken)} {PROMPTS}"
    if processes > 1:
        time_line += f", by {processes} processes as fast as this one"
    shape = f"{len(chosen[-1])} x {longest(chosen[-1])} tokens"
    return "\n".join(
        [
            f"time: {time_line}; and {duration(load_seconds)} to load and check the model",
            f"memory: {peak_memory(devices_of(subject.model))}, with the largest batch ({shape}) and the longest "
            "prompt of these",
            f"files: {files}, a picture and the metadata",
        ]
    )


def longest(batch: list[Encoded]) -> int:
    return max(len(encoded.ids) for encoded in batch)


def padded(batch: list[Encoded]) -> int:
    """Tokens that the model is given, the padding among them."""
    return len(batch) * longest(batch)


def main(settings: Settings) -> int:
    advice = "a smaller --max-length or --top-k-tokens, --dtype bfloat16, or a smaller model"

    def task() -> int:
        if settings.redraw:
            return redraw(Path(settings.redraw))
        return run_pipeline(settings, processes.join())

    return exit_code(PROGRAM, task, advice)


if __name__ == "__main__":
    sys.exit(main(from_command_line))

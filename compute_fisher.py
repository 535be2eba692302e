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
directory. Stopped, the same command goes on where it was.
"""

from residual_fisher.common.console import INTERRUPTED, before_imports

if __name__ == "__main__":  # Ctrl-C may come during the imports below, which take seconds
    before_imports()

import sys

from residual_fisher.common.command_line import (
    UserError,
    end_with_error,
    exit_code,
    first_line,
    model_line,
    printable,
    settle_network,
)
from residual_fisher.pipeline.settings import Command, Settings, parse

PROGRAM = "compute_fisher.py"

if __name__ == "__main__":  # before the slow ones: --help need not wait for torch
    try:
        from_command_line = parse(sys.argv[1:])
        settle_network(from_command_line.settings.model_path, from_command_line.settings.dataset)
    except UserError as error:
        sys.exit(end_with_error(PROGRAM, error))

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
import os
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

from residual_fisher.common.amounts import peak_memory
from residual_fisher.common.failures import SOME_FAILED, too_many
from residual_fisher.common.lock import lock_directory, require_unlocked
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
from residual_fisher.pipeline import estimate, figures, processes, report
from residual_fisher.pipeline.batches import Subject, check_once, into_batches, measure, try_first
from residual_fisher.pipeline.comparison import read_records
from residual_fisher.pipeline.processes import Processes
from residual_fisher.pipeline.prompts import Encoded, Prompt, Prompts, encode
from residual_fisher.pipeline.run_directory import FILES, RunDirectory
from residual_fisher.pipeline.store import PROMPTS, Result, Store

SHARD_BATCHES = 16  # a shard is so many batches' prompts: sorted by length, they need little padding
MAX_WAITING = 2  # batches that may wait to be written


# --- the dataset, shard by shard -----------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A window of the dataset, and what is left to do of it."""

    number: int
    prompts: list[int]  # numbers of all its prompts
    todo: dict[int, list[Encoded]]  # by number of the batch
    closed: bool = False  # its file is there


def plan(
    settings: Settings, prompts: Iterator[Prompt], subject: Subject, longest: int, store: Store, process: Processes
) -> Iterator[Shard]:
    """This process's shards in order, with what an earlier run left of them.

    Shards and batches are a function of the dataset and the settings alone, so that neither the number of
    processes nor an interruption changes a result.

    Raises:
        UserError: the dataset is not the one of the earlier run.
    """
    size = SHARD_BATCHES * settings.batch_size
    number = 0
    while window := list(islice(prompts, size)):
        if number % process.size == process.rank:
            yield plan_shard(settings, number, window, subject, longest, store)
        number += 1
    store.require_no_more_than(number)


def plan_shard(
    settings: Settings, number: int, window: list[Prompt], subject: Subject, longest: int, store: Store
) -> Shard:
    numbers = [prompt.index for prompt in window]
    if store.has_shard(number, window):
        return Shard(number, numbers, {}, closed=True)
    encoded = [encode(subject.tokenizer, prompt, longest) for prompt in window]
    todo = dict(enumerate(into_batches(settings, subject, encoded)))
    for i in [i for i in todo if store.has_batch(number, i, [e.prompt for e in todo[i]])]:
        del todo[i]
    return Shard(number, numbers, todo)


def progress_bar(settings: Settings, process: Processes) -> tqdm:
    mine = None
    if settings.num_prompts != "all":
        size = SHARD_BATCHES * settings.batch_size
        full, rest = divmod(settings.num_prompts, size)
        mine = size * len(range(process.rank, full, process.size)) + rest * (full % process.size == process.rank)
    label = "Fisher matrices" if process.size == 1 else f"Fisher matrices, process 1 of {process.size}"
    return tqdm(total=mine, desc=label, unit="prompt", disable=None if process.first else True)


class Failures:
    """How many of this process's prompts have failed."""

    def __init__(self, advice: str):
        self.seen, self.failed, self.advice = 0, 0, advice

    def count(self, results: list[Result]) -> None:
        """Raises UserError: too many have."""
        reasons = [result.record["failed"] for result in results if "failed" in result.record]
        self.seen, self.failed = self.seen + len(results), self.failed + len(reasons)
        if reasons and too_many(self.failed, self.seen):
            raise UserError(f"{self.failed} of the first {self.seen} prompts failed: {reasons[-1]}{self.advice}")


def compute(settings: Settings, subject: Subject, shards: Iterator[Shard], store: Store, bar: tqdm) -> None:
    """Takes every shard through `measure`. The next one is tokenized, and results are written, meanwhile."""
    pending: deque[Future] = deque()
    tokens, start, checked = 0, time.perf_counter(), set()
    failures = Failures(dtype_advice(subject.model))
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = reader.submit(next, shards, None)
        while (shard := ahead.result()) is not None:
            ahead = reader.submit(next, shards, None)
            bar.update(len(shard.prompts) - sum(map(len, shard.todo.values())))
            for number, batch in shard.todo.items():
                check_once(settings, subject, batch, checked)
                results = measure(settings, subject, batch)
                pending.append(writer.submit(store.write_batch, shard.number, number, results))
                while len(pending) > MAX_WAITING:  # raises what a write that failed has raised
                    pending.popleft().result()
                failures.count(results)
                tokens += sum(len(encoded.ids) for encoded in batch)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                bar.update(len(batch))
            if not shard.closed:
                pending.append(writer.submit(store.close_shard, shard.number, shard.prompts))
        for write in pending:
            write.result()


# --- the protocol --------------------------------------------------------------------------------


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


def load_subject(settings: Settings, process: Processes) -> Subject:
    device = own_device(settings.device, process)
    model, tokenizer = load(settings.model_path, settings.dtype, device, settings.trust_remote_code)
    return Subject(model, tokenizer, *find_module(model, settings.hook_layer_name))


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


def open_dataset(settings: Settings) -> tuple[Prompts, Iterator[Prompt], Prompt]:
    """The dataset; the prompts to take, one by one; and the first: what is wrong is said before the model is loaded."""
    prompts = Prompts(
        settings.dataset, settings.dataset_split, settings.prompt_column, settings.dataset_config, settings.seed
    )
    wanted = None if settings.num_prompts == "all" else settings.num_prompts
    source = iter(prompts)
    first = next(source)
    return prompts, islice(chain([first], source), wanted), first


class Prepared(NamedTuple):
    """What a run has before its first batch."""

    subject: Subject
    settings: Settings  # as far as the model has what they ask for
    longest: int  # tokens of a prompt
    environment: dict
    identity: dict


def prepare(settings: Settings, first: Prompt, process: Processes, tell: Callable[[str], None]) -> Prepared:
    """Loads the model, and tries the first prompt.

    Raises:
        UserError: the settings do not fit the model, or the model is not supported.
    """
    subject = load_subject(settings, process)
    longest = min(settings.max_length, longest_prompt(subject.model) or settings.max_length)
    clamped = clamp_to_model(settings, subject, tell)
    try_first(clamped, subject, first, longest)
    identity = {"hook_layer": subject.path, "model_fingerprint": fingerprint(subject.model, subject.tokenizer)}
    return Prepared(subject, clamped, longest, describe(subject.model), identity)


def heading(settings: Settings, ready: Prepared) -> str:
    return model_line(settings.model_path, ready.environment) + f"; hooked at {ready.subject.path}"


def finished(settings: Settings) -> str:
    return f"{printable(settings.output_dir)} is finished: nothing to do (--overwrite starts anew)"


def too_few(wanted: int, count: int) -> str:
    return f"note: {wanted} prompts were asked for, only {count} are available"


def run(command: Command, process: Processes) -> int:
    settings = command.settings
    tell = print if process.first else lambda text: None
    directory = RunDirectory(settings)
    with ExitStack() as stack:
        process.ask_first(lambda: stack.enter_context(lock_directory(directory.path)))
        if process.ask_first(lambda: directory.is_finished(command.overwrite)):
            return conclude(directory, process)
        prompts, source, first = open_dataset(settings)
        ready = prepare(settings, first, process, tell)
        if process.ask_first(lambda: directory.begin(ready.identity, ready.environment, command.overwrite)):
            return conclude(directory, process)
        tell(heading(settings, ready))

        try:
            with progress_bar(settings, process) as bar:
                shards = plan(settings, source, ready.subject, ready.longest, directory.store, process)
                compute(ready.settings, ready.subject, shards, directory.store, bar)
            process.wait_for_all()
            if settings.num_prompts != "all" and prompts.usable < settings.num_prompts:
                tell(too_few(settings.num_prompts, prompts.usable))
            return finish(directory, prompts.usable, prompts.skipped) if process.first else 0
        except KeyboardInterrupt:
            print("Interrupted: finished batches are saved; the same command does the rest.", file=sys.stderr)
            return INTERRUPTED


def finish(directory: RunDirectory, count: int, skipped: int) -> int:
    """Makes the final files, and says what is in them; returns the exit code."""
    statistics = directory.finish(count, SHARD_BATCHES * directory.settings.batch_size, skipped)
    print(report.final_table(partial(read_records, directory.path / PROMPTS), statistics, directory.settings))
    print(f"Written to {printable(str(directory.path))}: {', '.join(FILES)}")
    return SOME_FAILED if statistics["failed_prompts"] else 0


def conclude(directory: RunDirectory, process: Processes) -> int:
    """What is left to do of a run whose Fisher matrices are all there: to score its prompts, if not as before."""
    if not process.first:
        return 0
    if directory.is_scored():
        directory.clean_up()
        print(finished(directory.settings))
        return 0
    statistics = directory.score_again()
    directory.clean_up()
    print(report.final_table(partial(read_records, directory.path / PROMPTS), statistics, directory.settings))
    print(f"{printable(directory.settings.output_dir)} was finished: its prompts were scored anew")
    return 0


def nothing_to_compute(directory: RunDirectory) -> str:
    if directory.is_scored():
        return finished(directory.settings)
    return f"{printable(directory.settings.output_dir)} is finished: only its prompts would be scored anew"


# --- a dry run -----------------------------------------------------------------------------------


def dry_run(command: Command, process: Processes) -> int:
    """Says what a run would do, and takes a few batches through it to say how long. Writes nothing.

    Of several processes the first works alone, as it would on its own device.
    """
    settings = replace(command.settings, device=own_device(command.settings.device, process))
    if not process.first:
        return 0
    directory = RunDirectory(settings)
    require_unlocked(directory.path)
    if directory.is_finished(command.overwrite):
        print(nothing_to_compute(directory))
        return 0
    prompts, source, first = open_dataset(settings)
    start = time.perf_counter()
    ready = prepare(settings, first, Processes(), print)
    loading = time.perf_counter() - start
    if directory.is_done(ready.identity, command.overwrite):
        print(nothing_to_compute(directory))
        return 0
    print(heading(settings, ready))
    if command.overwrite and directory.is_begun():
        print(f"An earlier run in {printable(settings.output_dir)} would be replaced.")

    size = SHARD_BATCHES * settings.batch_size
    store = None if command.overwrite else directory.store
    found = estimate.survey(settings, source, size, store, os.path.isfile(settings.dataset))
    print(estimate.describe_prompts(settings, prompts, found))
    if settings.num_prompts != "all" and found.taken < settings.num_prompts:
        print(too_few(settings.num_prompts, found.taken))
    encoded = [encode(ready.subject.tokenizer, prompt, ready.longest) for prompt in found.sample]
    print(estimate.describe_tokens(settings, encoded))
    shards = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    batches = list(chain.from_iterable(into_batches(settings, ready.subject, shard) for shard in shards))
    trial = try_some(ready.settings, ready.subject, batches)
    memory = peak_memory(devices_of(ready.subject.model))
    print(estimate.describe_costs(settings, found, trial, batches, loading, memory, process.size))
    print("Nothing was written: a dry run.")
    return 0


def try_some(settings: Settings, subject: Subject, batches: list[list[Encoded]]) -> estimate.Trial:
    """A few of these batches for their time, after a prompt with each kind of attention to warm up.

    Raises:
        UserError: the model is not supported, or too many prompts fail.
    """
    checked, failures = set(), Failures(dtype_advice(subject.model))
    for batch in sorted(batches, key=estimate.padded):
        if check_once(settings, subject, batch, checked):
            measure(settings, subject, batch[-1:])
    chosen, seconds, found = estimate.representatives(batches), [], []
    for batch in chosen:
        results = measure(settings, subject, batch)
        failures.count(results)
        seconds.append(sum(result.record["seconds"] for result in results))
        found += results
    return estimate.Trial(chosen, seconds, found)


def main(command: Command) -> int:
    def run_or_redraw() -> int:
        if command.redraw:
            try:
                figures.draw(command.redraw, read_records(command.redraw / PROMPTS))
            except (KeyError, TypeError, ValueError) as error:
                where = f"{PROMPTS} in {command.redraw}"
                raise UserError(f"no readable {where}: {first_line(error)}") from error
            print(f"Drawn in {printable(str(command.redraw))}: {figures.SPECTRA}")
            return 0
        with processes.join() as process:
            return dry_run(command, process) if command.dry_run else run(command, process)

    advice = "a smaller --max-length or --top-k-tokens, --dtype bfloat16, or a smaller model"
    return exit_code(PROGRAM, run_or_redraw, advice)


if __name__ == "__main__":
    sys.exit(main(from_command_line))

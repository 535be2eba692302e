"""What a run would do, how long it would take, and how much room: for --dry-run."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from residual_fisher.common.rows import evenly_spaced
from residual_fisher.common.text import duration, excerpt, size
from residual_fisher.pipeline.prompts import Encoded, Prompt, Prompts
from residual_fisher.pipeline.settings import Settings
from residual_fisher.pipeline.store import ARRAYS, FOLDER, ONE_FILE, PROMPTS, Result, Store, stored_size

SAMPLE = 256  # prompts, the first ones, whose lengths stand for all
TRIED = 3  # batches, from the smallest to the largest of the sample
SCORES = 300  # bytes that the run's end adds to a prompt's record


class Survey(NamedTuple):
    """What a run would take of a dataset."""

    sample: list[Prompt]
    taken: int | None  # None if that shows only at the dataset's end
    done: int  # by an earlier run

    @property
    def todo(self) -> int | None:
        return None if self.taken is None else self.taken - self.done


def survey(
    settings: Settings, source: Iterator[Prompt], per_shard: int, store: Store | None, to_its_end: bool
) -> Survey:
    """Reads a dataset to its end; or only a sample, and what an earlier run has come to.

    Args:
        store: of the earlier run, if there is one to go on with.
    Raises:
        UserError: the dataset cannot be read, or is not the one of the earlier run.
    """
    sample, taken, done, shards = [], 0, 0, 0
    started = store.started() if store else 0
    while to_its_end or len(sample) < SAMPLE or shards < started:
        if not (window := list(islice(source, per_shard))):
            break
        sample += window[: SAMPLE - len(sample)]
        taken += len(window)
        done += store.finished(shards, window) if store else 0
        shards += 1
    else:
        return Survey(sample, None if settings.num_prompts == "all" else settings.num_prompts, done)
    if store:
        store.require_no_more_than(shards)
    return Survey(sample, taken, done)


def longest(batch: Sequence[Encoded]) -> int:
    return max(len(encoded.ids) for encoded in batch)


def padded(batch: Sequence[Encoded]) -> int:
    """Tokens that the model is given, the padding among them."""
    return len(batch) * longest(batch)


def representatives(batches: Sequence[list[Encoded]]) -> list[list[Encoded]]:
    """A few batches, from the smallest to the largest; and that of the longest prompt, which may need most memory."""
    by_size = sorted(batches, key=padded)
    chosen = {*evenly_spaced(len(by_size), TRIED), max(range(len(by_size)), key=lambda i: longest(by_size[i]))}
    return [by_size[index] for index in sorted(chosen)]


class Trial(NamedTuple):
    """Batches that were measured, from the smallest to the largest."""

    batches: list[list[Encoded]]
    seconds: list[float]
    results: list[Result]


def seconds_each(trial: Trial, batches: Sequence[list[Encoded]]) -> float:
    """Of a prompt, on average over `batches`: what lies between the trial's in size does so in time."""
    sizes = list(map(padded, trial.batches))
    total = np.interp(list(map(padded, batches)), sizes, trial.seconds).sum()
    return float(total) / sum(map(len, batches))


# --- in words ------------------------------------------------------------------------------------


def describe_prompts(settings: Settings, prompts: Prompts, found: Survey) -> str:
    source = f"{excerpt(settings.dataset, 80)}, column {excerpt(repr(prompts.column), 40)}"
    if found.taken is None:
        lines = [f"prompts: all of {source}: how many, only its end will tell"]
    else:
        lines = [f"prompts: {found.taken} of {source}; {prompts.skipped} rows without a text skipped"]
    if found.done:
        left = "" if found.todo is None else f", {found.todo} are left"
        lines.append(f"going on: {found.done} are finished{left}")
    return "\n".join(lines)


def describe_tokens(settings: Settings, encoded: Sequence[Encoded]) -> str:
    lengths = [len(e.ids) for e in encoded]
    cut = sum(e.truncated for e in encoded)
    return (
        f"tokens: {min(lengths)} to {max(lengths)}, median {median(lengths):g}, in the first {len(lengths)} prompts; "
        f"{cut} of them cut (--max-length {settings.max_length})"
    )


def describe_costs(
    settings: Settings,
    found: Survey,
    trial: Trial,
    batches: Sequence[list[Encoded]],
    loading: float,
    memory: str,
    processes: int,
) -> str:
    """What a run takes, of time, memory and disk; `batches` are the sample's."""
    each = seconds_each(trial, batches)
    tokens = fmean(len(encoded.ids) for encoded in chain.from_iterable(batches))
    speed = f"{duration(each)} a prompt, {processes * tokens / each:.0f} tokens/s"
    arrays, record = map(fmean, zip(*(stored_size(result, settings.store) for result in trial.results), strict=True))
    record += SCORES
    place = ARRAYS if found.taken is not None and found.taken <= ONE_FILE else f"{FOLDER}/"
    if found.taken is None:
        time, files = speed, f"{size(arrays)} in {place} and {size(record)} in {PROMPTS} a prompt"
    else:
        time = f"about {duration(each * found.todo / processes)}, {speed}"
        files = f"about {size(arrays * found.taken)} {place}, {size(record * found.taken)} {PROMPTS}"
    if processes > 1:
        time += f", by {processes} processes as fast as this one"
    largest = trial.batches[-1]
    shape = f"{len(largest)} x {longest(largest)} tokens"
    return "\n".join(
        [
            f"time: {time}; and {duration(loading)} to load and check the model",
            f"memory: {memory}, with the largest batch ({shape}) and the longest prompt of these",
            f"files: {files}, a picture and the metadata",
        ]
    )

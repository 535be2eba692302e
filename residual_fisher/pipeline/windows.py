"""Windows of the dataset and their batches: what is left to do of each, and which prompts run together."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from residual_fisher.common.archives import Item
from residual_fisher.common.program import UserError, too_many
from residual_fisher.common.run import Run
from residual_fisher.pipeline.batches import Subject, into_batches
from residual_fisher.pipeline.processes import Processes
from residual_fisher.pipeline.prompts import Encoded, Prompt, encode
from residual_fisher.pipeline.settings import Settings

WINDOW_BATCHES = 16  # a window has so many batches' prompts: sorted by length, they need little padding


@dataclass(frozen=True)
class Pipeline:
    """What a run has before its first batch."""

    settings: Settings  # no more is asked for than the model has
    subject: Subject
    longest: int  # tokens of a prompt
    environment: dict
    identity: dict


@dataclass(frozen=True)
class Window:
    """A part of the dataset, and what is left to do of it."""

    numbers: range  # of its prompts
    batches: list[list[Encoded]]  # prompts that are not finished
    finished: int


def plan(pipeline: Pipeline, prompts: Iterator[Prompt], run: Run, process: Processes) -> Iterator[Window]:
    """The windows that this process takes, each with what an earlier call left of it.

    Windows and batches are a function of the dataset and the settings alone, so that neither the number of
    processes nor an interruption changes a result.

    Raises:
        UserError: the dataset is not the one of the earlier call.
    """
    size = WINDOW_BATCHES * pipeline.settings.batch_size
    number, claimed, count = 0, process.claim(), 0
    while window := list(islice(prompts, size)):
        if number == claimed:
            yield plan_window(pipeline, window, run)
            claimed = process.claim()
        number, count = number + 1, count + len(window)
    if run.last() >= count:
        raise changed(run, "which had more prompts")


def plan_window(pipeline: Pipeline, window: list[Prompt], run: Run) -> Window:
    numbers = range(window[0].index, window[-1].index + 1)
    finished = finished_in(run, window)
    if len(finished) == len(window):
        return Window(numbers, [], len(finished))
    encoded = [encode(pipeline.subject.tokenizer, prompt, pipeline.longest) for prompt in window]
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
        known = found.get(prompt.index)
        if known and (known["prompt"], known.get("before", [])) != (prompt.text, [t.message for t in prompt.before]):
            raise changed(run, f"first at prompt {prompt.index}")
    return found


def changed(run: Run, where: str) -> UserError:
    return UserError(f"the dataset has changed since the run in {run.folder} began, {where}: --overwrite starts anew")


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

"""Windows of the dataset and their batches: what is left to do of each, and which prompts run together."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from time import monotonic

from residual_fisher.common.archives import Item
from residual_fisher.common.program import UserError, too_many
from residual_fisher.common.run import Run
from residual_fisher.common.text import duration
from residual_fisher.pipeline.batches import Subject, into_batches, padded
from residual_fisher.pipeline.processes import Processes
from residual_fisher.pipeline.prompts import PASS_OVERHEAD, Encoded, Prompt, encode
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


class Pace:
    """How fast this process is, and how long the rest will take: by padded tokens, since long prompts come first."""

    def __init__(self, settings: Settings, processes: int):
        self.settings, self.processes, self.start = settings, processes, monotonic()
        self.tokens, self.work = 0, 0  # of finished batches: the prompts' own tokens, and `work_of`
        self.planned, self.prompts = 0, 0  # work and prompts of the windows so far, finished or not
        self.later: int | None = None  # prompts of windows to come, if their number is known

    def plan(self, window: Window) -> None:
        self.planned += sum(map(self._work, window.batches))
        self.prompts += sum(map(len, window.batches))
        wanted, size = self.settings.num_prompts, WINDOW_BATCHES * self.settings.batch_size
        if len(window.numbers) < size:  # the dataset, or what was asked for, ends here
            self.later = 0
        elif wanted != "all":
            self.later = wanted - window.numbers.stop

    def finish(self, batch: list[Encoded]) -> None:
        self.tokens += sum(len(encoded.ids) for encoded in batch)
        self.work += self._work(batch)

    def _work(self, batch: list[Encoded]) -> int:
        return padded(batch, self.settings.answer_tokens) + PASS_OVERHEAD

    def seconds_left(self) -> float | None:
        """None: not known, since nothing is finished yet or nobody knows how many prompts there are."""
        if not self.work or self.later is None:
            return None
        later = self.later * self.planned / self.prompts / self.processes  # like those so far
        return (monotonic() - self.start) * (self.planned - self.work + later) / self.work

    def told(self) -> str:
        """For the progress bar, or the log."""
        left, rate = self.seconds_left(), f"{self.tokens / (monotonic() - self.start):.0f} tokens/s"
        return rate if left is None else f"about {duration(left)} left, {rate}"


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

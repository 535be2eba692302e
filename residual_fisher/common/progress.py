"""How far a run has come: a bar in a terminal or a notebook, and in a log a line at most once a minute."""

from collections.abc import Iterator, Sequence
import sys
from time import monotonic

from tqdm import auto, tqdm

from residual_fisher.common.text import duration

EVERY = 60.0  # seconds between two lines of a log
WITHOUT_TIME_LEFT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class LogLines:
    """What a log has in place of a bar, with the part of tqdm's interface that is used here."""

    def __init__(self, total: int | None, desc: str, unit: str, initial: int, even: bool):
        self.total, self.desc, self.unit, self.initial, self.even = total, desc, unit, initial, even
        self.n, self.postfix = initial, ""
        self.start = self.told = monotonic()

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *_) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = text

    def update(self, count: int = 1) -> None:
        self.n += count
        now = monotonic()
        if now - self.told >= EVERY:
            self.told = now
            print(self._line(now - self.start), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        done = self.n - self.initial
        parts = [f"{self.desc}: {self.n}{f' of {self.total}' if self.total else ''} {self.unit}s", duration(seconds)]
        if self.even and self.total and done > 0:
            parts.append(f"about {duration(seconds / done * max(0, self.total - self.n))} left")
        return ", ".join([*parts, self.postfix] if self.postfix else parts)


def progress(
    total: int | None, desc: str, unit: str, initial: int = 0, shown: bool = True, even: bool = True
) -> tqdm | LogLines:
    """A context manager with `update`, `n` and `set_postfix_str`.

    Args:
        total: how many there are, if it is known; `initial` of them are done already.
        unit: what one of them is called.
        shown: False for a process that says nothing.
        even: each takes about as long as any other, so that their number tells how long those that are left take.
            Otherwise nothing is said of it but what the caller writes into the postfix.
    """
    in_notebook = auto.notebook_tqdm is not auto.std_tqdm
    if shown and not in_notebook and not sys.stderr.isatty():
        return LogLines(total, desc, unit, initial, even)
    form = {} if even else {"bar_format": WITHOUT_TIME_LEFT}
    return auto.tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=not shown, **form)


def tracked(items: Sequence, desc: str, unit: str) -> Iterator:
    """The items one by one, with their progress."""
    with progress(len(items), desc, unit) as bar:
        for item in items:
            yield item
            bar.update()

"""Stdout, stderr and Ctrl-C, from a script's first line to its last. Imports next to nothing: it comes first."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOBase
import os
import signal
import sys
from time import monotonic

INTERRUPTED = 130  # the exit code of a program ended by Ctrl-C
SAME_PRESS = 1.0  # seconds: another Ctrl-C within them adds nothing to the first


class Console:
    """stdout or stderr, whose other end may be gone or full: what cannot be written is dropped, and the run goes on."""

    def __init__(self, stream: TextIOBase):
        self._stream = stream
        if hasattr(stream, "reconfigure"):  # a character that the terminal's encoding lacks becomes an escape
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # also what the stream still holds back goes there
        os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _console(stream: TextIOBase | None) -> TextIOBase | Console:
    if stream is None:  # closed by the caller: libraries expect one
        return open(os.devnull, "w", encoding="utf-8")
    return stream if isinstance(stream, Console) else Console(stream)


@contextmanager
def consoles() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_console, streams)
    try:
        yield
    finally:
        for console in (sys.stdout, sys.stderr):
            console.flush()
        sys.stdout, sys.stderr = streams


def leave_quietly(*_) -> None:
    """A handler of Ctrl-C for the seconds in which libraries are imported: no traceback, and nothing to save."""
    os._exit(INTERRUPTED)


def before_imports() -> None:
    """What a script does first: consoles may fail, and Ctrl-C just ends it until `exit_code` takes over."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_quietly)
    for descriptor in range(3):  # of one that the caller closed, the next file opened would take the place
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = map(_console, (sys.stdout, sys.stderr))
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; matplotlib's import fails on a name that it does not know


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, but not twice within SAME_PRESS: the second one would stop the saving."""
    before, last = signal.getsignal(signal.SIGINT), float("-inf")

    def interrupt(*_) -> None:
        nonlocal last
        earlier, last = last, monotonic()
        if last - earlier > SAME_PRESS:
            raise KeyboardInterrupt

    if before not in (leave_quietly, signal.default_int_handler):  # ignored, as in the background, or a caller's own
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C is ignored until the block ends: around the writing of results, which is soon done."""
    import threading

    if threading.current_thread() is not threading.main_thread():  # no other one sees Ctrl-C
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

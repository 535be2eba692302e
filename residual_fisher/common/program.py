"""How a script runs as a program: stdout and stderr, Ctrl-C, one-line error messages, exit codes.

The scripts import it before anything slow, so it imports only small modules of the standard library.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import TextIOBase
import os
import re
import signal
import sys
import threading
from time import monotonic
import warnings

from residual_fisher.common.text import first_line, printable, size

EMBEDDED = "smollm2-135m"  # the default model, which needs no hub: see model/embedded.py
HUB = "https://huggingface.co"  # the default of HF_ENDPOINT

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
SAME_PRESS = 1.0  # seconds in which a second Ctrl-C counts as part of the first

FOUND = 4  # the exit code of a run that found what --fail-on-finding looks for
SOME_FAILED = 3  # the exit code of a complete run in which some sentences or prompts failed (NaN, no convergence)
MAX_SHARE, MIN_JUDGED = 0.5, 8  # a run stops when more than this share failed, of at least so many

# Messages of a lack of memory. cuBLAS and cuSOLVER allocate memory of their own, and have their own messages.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "`cublasCreate", "`cusolverDnCreate")


class UserError(Exception):
    """One line that says what is wrong and what to do about it."""


# --- stdout and stderr ---------------------------------------------------------------------------


class Console:
    """stdout or stderr. Once the terminal, pipe or file behind it fails, what is written to it is dropped."""

    def __init__(self, stream: TextIOBase):
        self._stream = stream
        if hasattr(stream, "reconfigure"):  # a character that the terminal's encoding lacks becomes an escape
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable, *words: str) -> None:
        try:
            call(*words)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # the stream's buffer goes there too
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _console(stream: TextIOBase | None) -> TextIOBase | Console:
    if stream is None:  # the caller closed it, but libraries expect one
        return open(os.devnull, "w", encoding="utf-8")
    return stream if isinstance(stream, Console) else Console(stream)


@contextmanager
def consoles() -> Iterator[None]:
    """stdout and stderr are `Console`s until the block ends."""
    with redirect_stdout(_console(sys.stdout)) as out, redirect_stderr(_console(sys.stderr)) as err:
        try:
            yield
        finally:
            out.flush()
            err.flush()


# --- Ctrl-C --------------------------------------------------------------------------------------


def leave_quietly(*_) -> None:
    """Handles Ctrl-C during the imports, when there is nothing to save: the process ends without a traceback."""
    os._exit(INTERRUPTED)


@contextmanager
def _handling_ctrl_c(handler) -> Iterator[None]:
    """Ctrl-C calls `handler` until the block ends. A block in another thread than the main one never sees it."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set a handler
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def undisturbed():
    """Ctrl-C is ignored until the block ends: for the short time in which results are written."""
    return _handling_ctrl_c(signal.SIG_IGN)


def interruptible():
    """Ctrl-C raises KeyboardInterrupt, but not again within SAME_PRESS: a second one would stop the saving."""
    last = float("-inf")

    def interrupt(*_) -> None:
        nonlocal last
        earlier, last = last, monotonic()
        if last - earlier > SAME_PRESS:
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) in (leave_quietly, signal.default_int_handler):
        return _handling_ctrl_c(interrupt)
    return nullcontext()  # ignored, as in the background, or handled by the caller


# --- from a script's first line to its last ------------------------------------------------------


def before_imports() -> None:
    """Prepares a script for the slow imports: Ctrl-C just ends it, and a broken console does no harm."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_quietly)
    for descriptor in range(3):  # if the caller closed one of them, the next opened file would take its number
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = map(_console, (sys.stdout, sys.stderr))
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; matplotlib's import fails on an unknown name
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # these two are of CUDA's libraries: see `loading.fix_arithmetic`
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def go_offline_without_hub(*names: str) -> None:
    """Keeps the hub's libraries offline if one of `names` may be on the hub, and the hub has no address here.

    Otherwise they retry for a minute before they fail or use their cache. They read this setting when they are
    imported, so call this before.

    Args:
        names: models and datasets; local paths and the embedded model need no hub.
    Raises:
        UserError: HF_ENDPOINT is not an address.
    """
    import socket
    from urllib.parse import urlparse
    from urllib.request import getproxies

    address = os.environ.get("HF_ENDPOINT", HUB)
    try:
        host = urlparse(address).hostname
        if all(name == EMBEDDED or os.path.exists(name) for name in names) or getproxies():
            return
        socket.getaddrinfo(host, 443)
    except ValueError as error:  # the import of the hub's libraries would fail on it
        raise UserError(f"HF_ENDPOINT={address} is not an address: {error}") from error
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def end_with_error(program: str, error: object) -> int:
    """Prints the one-line error message; returns the exit code 2."""
    print(f"{program}: error: {printable(str(error))}", file=sys.stderr)
    return 2


def exit_code(program: str, run: Callable[[], int], memory_advice: str) -> int:
    """Calls `run` and returns its exit code. Warnings become notes, and errors that a user can mend become one line.

    It may be called in any thread.
    """
    from tqdm import tqdm

    def note(message, *_, **__) -> None:
        tqdm.write(f"note: {' '.join(map(printable, str(message).splitlines()))}", file=sys.stderr)

    with consoles(), warnings.catch_warnings(), interruptible():
        warnings.showwarning = note
        try:
            return run()
        except KeyboardInterrupt:
            return INTERRUPTED
        except UserError as error:
            what = error
        except RecursionError:
            what = "the data are nested too deeply"
        except OSError as error:
            what = f"{first_line(error)}: {error.filename}" if error.filename else first_line(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            what = f"not enough memory: try {memory_advice}"
        return end_with_error(program, what)


# --- what can go wrong ---------------------------------------------------------------------------


def too_many(failed: int, tried: int) -> bool:
    """Whether a run should stop, since so many of its sentences or prompts failed."""
    return tried >= MIN_JUDGED and failed > MAX_SHARE * tried


def hub_hint(error: BaseException, otherwise: str) -> str:
    """What to do about a model or dataset that did not load."""
    return "accept its terms on the hub, then log in with `hf auth login`" if "gated" in str(error) else otherwise


def not_on_the_hub(name: str, what: str, endings: Sequence[str] = ()) -> str | None:
    """Why a name that is no local file or folder cannot be on the hub either; None if it can.

    Args:
        what: "model" or "dataset".
        endings: of local files.
    """
    if address := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)", name):
        return f"it is an address: give the {what}'s name, {address[1]}"
    if "://" in name:
        return f"it is an address: give the path of a downloaded {what}, or a name on the hub like org/name"
    if "\\" in name and os.name != "nt":
        return "it is a path of Windows, and there is no such file here"
    if name.startswith(("/", "./", "../", "~")) or name.count("/") != name.strip("/").count("/") or name.count("/") > 1:
        return f"no such file or folder (looked for from {os.getcwd()})"
    if name.lower().endswith(tuple(endings)):
        return "no such file"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return f"no such file or folder, and no {what} on the hub has such a name"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, of Python or of PyTorch on any device, reports a lack of memory."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError is a RuntimeError, sometimes without a message
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError) and (named or any(phrase in str(error) for phrase in OUT_OF_MEMORY))


def peak_memory(devices: Iterable) -> str:
    """The most memory held so far, in words: of each GPU among the torch `devices`, else of this process."""
    gpus = sorted((device for device in devices if device.type == "cuda"), key=str)
    if gpus:
        import torch

        total = {gpu: torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus}
        return ", ".join(f"{size(torch.cuda.max_memory_allocated(gpu))} of {size(total[gpu])} on {gpu}" for gpu in gpus)
    try:
        import resource
    except ImportError:  # not a POSIX system
        return "unknown on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return f"{size(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)} of this process"

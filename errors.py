"""The one error that a user can mend, and how both scripts end: an exit code, and a line that says why."""

from collections.abc import Callable
import sys
import warnings

INTERRUPTED = 130  # the exit code of a program ended by Ctrl-C


class UserError(Exception):
    """What is wrong and what to do about it, in one line."""


def exit_code(program: str, run: Callable[[], int], memory_advice: str) -> int:
    """run(), with warnings as notes, and with a line on stderr in place of a traceback where a user can help."""
    import torch
    from tqdm import tqdm

    from arguments import printable

    def note(message, *_, **__) -> None:
        tqdm.write(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = note
        try:
            return run()
        except UserError as error:
            print(f"{program}: error: {printable(str(error))}", file=sys.stderr)
            return 2
        except torch.OutOfMemoryError:
            print(f"{program}: error: not enough memory: try {memory_advice}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return INTERRUPTED

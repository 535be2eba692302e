"""A directory that one process at a time works in."""

from collections.abc import Iterator
from contextlib import contextmanager
import errno
import json
import os
from pathlib import Path
import socket
import stat
import threading
import time

from residual_fisher.common.files import check_writable, made
from residual_fisher.common.program import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

LOCK = ".lock"
ABOUT = ("host", "process", "since")  # what the file says of its holder
MAX_SIZE = 4096  # bytes: it says no more
BEAT, STALE = 20.0, 120.0  # seconds: where the file system has no locks, the file is touched as a sign of life
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Keeps every other process out of `directory`, which is made if it is missing, until the block ends.

    The kernel takes the lock back when its process ends, however it ends, and so does the server of a network file
    system. Where a file system has no locks, the holder's file has to be younger than STALE.

    Raises:
        UserError: it cannot be written to, or another process holds it; says which.
    """
    path = directory / LOCK
    with made(directory):
        try:
            descriptor = _acquire(path, os.O_CREAT)
        except OSError as error:
            raise _cannot_lock(path, error) from error
        with _held(descriptor, path):
            yield


def require_unlocked(directory: Path) -> None:
    """Raises UserError where `lock_directory` would; leaves nothing behind."""
    check_writable(directory)
    path = directory / LOCK
    try:
        os.close(_acquire(path, 0))
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_lock(path, error) from error


def _cannot_lock(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot lock {path}: {error.strerror} (choose another --output-dir)")


@contextmanager
def _held(descriptor: int, path: Path) -> Iterator[None]:
    ended = threading.Event()
    try:
        about = (socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(dict(zip(ABOUT, about, strict=True))).encode())
        threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, create: int) -> int:
    """A descriptor of the locked file. Raises UserError: another process holds it, or it is another program's file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | create | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _is_ours(descriptor):
                raise UserError(f"{path} is of another program: choose another --output-dir")
            if not _try_lock(descriptor, path):
                raise UserError(_holder(path))
            # the file that was opened may have been removed by its holder before it was locked
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_ours(descriptor: int) -> bool:
    """Whether a file is a lock of this module: empty, or what `_held` writes (and a killed process left)."""
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_SIZE:
        return False
    text = os.read(descriptor, MAX_SIZE)
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() <= {*ABOUT}


def _try_lock(descriptor: int, path: Path) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                return False
    age = time.time() - os.fstat(descriptor).st_mtime
    return os.fstat(descriptor).st_size == 0 or age > STALE


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        try:
            os.utime(path)
        except OSError:  # the directory is gone: the run will say so itself
            return


def _holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {about['process']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return f"{path.parent} is in use by {who}: wait until it ends, or choose another --output-dir"

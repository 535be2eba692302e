"""A directory that one process at a time works in.

`filelock` would empty the file that says who holds the lock, and takes a file system without locks for a locked one.
"""

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

from residual_fisher.common.files import made
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
    path, ended = directory / LOCK, threading.Event()
    with made(directory):
        try:
            descriptor = _acquire(path)
        except OSError as error:
            raise UserError(f"cannot lock {path}: {error.strerror} (choose another --output-dir)") from error
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


def require_unlocked(directory: Path) -> None:
    """Raises UserError where `lock_directory` would. Leaves nothing behind."""
    with lock_directory(directory):
        pass


def _acquire(path: Path) -> int:
    """A descriptor of the locked file. Raises UserError: another process holds it, or it is another program's file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            locked, holder = _try_lock(descriptor), _holder(descriptor)
            if holder is None:
                raise UserError(f"{path} is of another program: choose another --output-dir")
            if not locked:
                who = "process {process} on {host} since {since}".format(**holder) if holder else "another process"
                raise UserError(f"{path.parent} is in use by {who}: wait until it ends, or choose another --output-dir")
            # the file that was opened may have been removed by its holder before it was locked
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                return False
    about = os.fstat(descriptor)
    return about.st_size == 0 or time.time() - about.st_mtime > STALE


def _holder(descriptor: int) -> dict | None:
    """What `lock_directory` wrote of the holder: {} before it did; None if the file is not one of its own."""
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_SIZE:
        return None
    text = os.read(descriptor, MAX_SIZE)
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() in (set(), {*ABOUT}) else None


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        try:
            os.utime(path)
        except OSError:  # the directory is gone: the run will say so itself
            return

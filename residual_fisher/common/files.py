"""Files that appear whole or not at all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
import hashlib
import json
import math
import os
from pathlib import Path
import secrets
import tempfile
from typing import IO
import zipfile

import numpy as np

from residual_fisher.common.program import UserError

DIGITS = 7  # significant digits of a float in JSON: all that float32 holds


@contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well, and else leaves no trace.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; what stood there stays.
    """
    # Beside its place, since a rename is atomic only within one file system.
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_unfinished(directory: Path, names: Iterable[str]) -> None:
    """Removes what a killed process was writing into files of these names."""
    for path in [path for name in names for path in directory.glob(f".{name}-*")]:
        path.unlink(missing_ok=True)


@contextmanager
def made(directory: Path) -> Iterator[None]:
    """`directory`, made if it is missing; what was made here is removed at the end if it is still empty.

    Raises:
        UserError: it cannot be made, or written to.
    """
    missing = [folder for folder in (directory, *directory.parents) if not os.path.lexists(folder)]
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            in_place = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "a file, or a link that leads nowhere, is in its place" if in_place else error.strerror
            raise UserError(f"cannot write to {directory}: {reason} (choose another --output-dir)") from error
        yield
    finally:
        for folder in missing:  # from the innermost on
            with suppress(OSError):
                folder.rmdir()


def check_writable(directory: Path) -> None:
    """Raises UserError unless `directory` can be written to, or made. Leaves nothing behind."""
    with made(directory):
        pass


def json_ready(value):
    """`value` in JSON's types: arrays to lists, floats rounded to float32's digits.

    Raises:
        ValueError: NaN or infinity, which JSON cannot express.
    """
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return json_ready(value.tolist())
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be written as JSON")
        return float(f"{value:.{DIGITS}g}")
    return value


def number_or_none(value: float) -> float | None:
    """None for what JSON has no number for: infinity, or NaN."""
    return value if math.isfinite(value) else None


def json_text(value, indent: int | None = None) -> bytes:
    """A line, or with `indent` lines, of JSON in UTF-8."""
    text = json.dumps(json_ready(value), ensure_ascii=False, indent=indent) + "\n"
    # a byte of a path that is not UTF-8 is half a character here: its backslash form is also JSON's
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, value: dict) -> None:
    """Writes `value` as JSON, indented by one space, in UTF-8."""
    with atomic_open(path) as file:
        file.write(json_text(value, indent=1))


def document_checksum(document: dict, unchecked: Iterable[str]) -> str:
    """A hash of a document in JSON's types, but for its entries that may differ between equal runs."""
    checked = {key: value for key, value in document.items() if key not in unchecked}
    return hashlib.sha256(json.dumps(checked).encode()).hexdigest()


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays as an uncompressed NPZ, the same bytes for the same arrays."""
    write_archive(path, ((f"{name}.npy", array) for name, array in arrays.items()))


def write_archive(path: Path, members: Iterable[tuple[str, np.ndarray | bytes]]) -> None:
    """Writes an uncompressed NPZ of named members, arrays (NAME.npy) or bytes as they are, one in memory at a time."""
    with atomic_open(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, value in members:
            # ZipInfo's default date, so that the same members make the same bytes
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                if isinstance(value, bytes):
                    member.write(value)
                else:
                    np.lib.format.write_array(member, value, allow_pickle=False)

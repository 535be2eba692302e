"""Archives of a run's items: NPZ files with the arrays and the records of numbered sentences or prompts."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
import errno
import heapq
import json
from pathlib import Path
import re
from typing import NamedTuple
import zipfile

import numpy as np

from residual_fisher.common.files import json_text, write_archive

ARCHIVE = re.compile(r"(\d{8,12})-(\d{8,12})\.npz")  # the first and the last number in it
RECORDS = "records.jsonl"  # the member of an archive that has a line for each of its items: [number, record]


class Item(NamedTuple):
    """One finished sentence or prompt."""

    number: int
    record: dict  # in JSON's types
    arrays: dict[str, np.ndarray]  # by name


class DamagedArchiveError(Exception):
    """An archive of items that cannot be read back, or not all of it."""


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Writes items, in their order, as one archive: their arrays as NAME_NUMBER.npy, then all records."""
    lines = []

    def members() -> Iterator[tuple[str, np.ndarray | bytes]]:
        for number, record, arrays in items:
            lines.append(json_text([number, record]))
            yield from ((f"{name}_{number}.npy", array) for name, array in arrays.items())
        yield RECORDS, b"".join(lines)

    write_archive(path, members())


def read_records(path: Path) -> dict[int, dict]:
    """The records of an archive that is intact, by number: the checksum of each of its members is compared.

    Raises:
        DamagedArchiveError: it is not, or it has vanished.
        OSError: it cannot be read now, and may be intact.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise DamagedArchiveError(path)
        return dict(record_lines(path))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError, TypeError) as error:
        raise DamagedArchiveError(path) from error
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):  # EINVAL: a damaged archive names a place before its start
            raise
        raise DamagedArchiveError(path) from error


def record_lines(path: Path) -> list[tuple[int, dict]]:
    """Number and record of each item in an archive, ascending."""
    with zipfile.ZipFile(path) as archive:
        return sorted(map(json.loads, archive.read(RECORDS).splitlines()), key=lambda line: line[0])


def readable_records(folder: Path) -> dict[int, dict]:
    """The records of all archives in a folder but damaged ones, by number."""
    found = {}
    for *_, path in archives_in(folder):
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            found |= dict(record_lines(path))
    return found


def seconds_of(record: dict) -> float:
    """What an item took: its record has one number, or one for each stage."""
    seconds = record.get("seconds", 0.0)
    return sum(seconds.values()) if isinstance(seconds, dict) else seconds


def read_items(path: Path) -> Iterator[Item]:
    """The items of an archive, by ascending number, one in memory at a time."""
    with zipfile.ZipFile(path) as archive:
        names: dict[int, list[str]] = {}
        for member in archive.namelist():
            if member != RECORDS:
                name, _, number = member.removesuffix(".npy").rpartition("_")
                names.setdefault(int(number), []).append(name)
        for number, record in record_lines(path):
            arrays = {name: read_array(archive, f"{name}_{number}") for name in names.get(number, ())}
            yield Item(number, record, arrays)


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    # `np.load` would do, but searches the list of all names for each member
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def archives_in(folder: Path) -> list[tuple[int, int, Path]]:
    """First number, last number and path of every archive of items in a folder, in order."""
    found = ((ARCHIVE.fullmatch(path.name), path) for path in folder.glob("*.npz"))
    return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)


def merged_items(paths: Sequence[Path]) -> Iterator[Item]:
    """The items of several archives by ascending number, none twice: a kill may have left both parts and their sum."""
    before = None
    for item in heapq.merge(*map(read_items, paths), key=lambda item: item.number):
        if item.number != before:
            yield item
        before = item.number

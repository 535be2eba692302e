"""Which local files a name stands for, and their text, unpacked and decoded."""

import bz2
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
import glob
import gzip
from itertools import chain
import lzma
import os
from pathlib import Path
import re
from typing import IO
import warnings

from residual_fisher.common.program import UserError, not_on_the_hub

Source = str | tuple[str, ...]  # a file, a folder, a pattern of files, several of these; or a name on the hub
KINDS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}  # by the first bytes of a file
ZSTANDARD = b"\x28\xb5\x2f\xfd"
OTHER_KINDS = {
    ".xlsx": "save it as .csv", ".xls": "save it as .csv", ".ods": "save it as .csv", ".zip": "unpack it",
    ".tar": "unpack it", ".tgz": "unpack it", ".7z": "unpack it", ".pkl": "save it as .parquet",
}  # fmt: skip
SPLITS = {
    "train": ("train", "training"), "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}  # fmt: skip  # as the names of files in a folder have them
NO_DATA = ("readme", "license", "licence", "dataset_info", "requirements")  # files that lie beside the data
POINTER = b"version https://git-lfs.github.com/spec/"  # how the stand-in begins for a file that Git LFS did not fetch
POINTER_SAID = "a Git LFS pointer, not the file itself: run `git lfs pull` in the repository it is from"


def names_of(source: Source) -> list[str]:
    return [source] if isinstance(source, str) else list(source)


def name_of(source: Source) -> str:
    """As messages say it."""
    return ", ".join(names_of(source))


def ending_of(path: str) -> str:
    """The ending that tells how to read a file, without that of a packed one."""
    path = path.lower()
    return Path(path.removesuffix(Path(path).suffix) if path.endswith(PACKED_SUFFIXES) else path).suffix


def is_saved(folder: str) -> bool:
    """Whether a folder was written by the library `datasets`, with save_to_disk."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def is_pointer(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(POINTER)) == POINTER


# --- which files ---------------------------------------------------------------------------------


def files_of(source: Source, split: str = "train") -> list[str] | None:
    """The local files that a source stands for, in order; None for a dataset of the hub.

    Of a folder these are all its files of one kind; if some are named for splits, those of `split`.

    Raises:
        UserError: there are none, or it is not clear which.
    """
    if not isinstance(source, str):
        found = [files_of(part, split) for part in source]
        if None in found:
            raise UserError(f"cannot read {source[found.index(None)]}: no such file, as the others are")
        return list(chain.from_iterable(found))
    if os.path.isfile(source):
        return [source]
    if os.path.isdir(source):
        return _files_in(source, split)
    if glob.has_magic(source):
        if found := [path for path in glob.glob(source, recursive=True) if os.path.isfile(path)]:
            return sorted(found, key=_in_order)
        raise UserError(f"cannot read {source}: no file has such a name")
    if reason := not_on_the_hub(source, "dataset", (*KINDS, *PACKED_SUFFIXES, *OTHER_KINDS)):
        raise UserError(f"cannot read {source}: {reason}")
    return None


def _in_order(path: str) -> list:
    """Sorts part-2 before part-10."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", path)]


def _files_in(folder: str, split: str) -> list[str]:
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    paths = sorted((path for path in paths if f"{os.sep}." not in path.removeprefix(folder)), key=_in_order)
    if is_saved(folder):
        return paths
    paths = [path for path in paths if ending_of(path) in KINDS and not Path(path).name.lower().startswith(NO_DATA)]
    if not paths:
        raise UserError(f"cannot read {folder}: the folder holds no {', '.join(KINDS)} file")
    kinds = Counter(map(ending_of, paths))
    if len(kinds) > 1:
        each = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise UserError(f"cannot read {folder}: it holds files of several kinds ({each}): name them, as {folder}/*.csv")
    splits = [_split_of(path.removeprefix(folder)) for path in paths]
    if not any(splits):
        return paths
    own = [path for path, of in zip(paths, splits, strict=True) if of == split]
    if not own:
        has = ", ".join(sorted(set(splits) - {None}))
        raise UserError(f"cannot read {folder}: it has no files of the split {split!r}, only of {has}")
    if left := len(paths) - len(own):
        warnings.warn(f"{folder}: {left} of its {len(paths)} files are not of the split {split!r}", stacklevel=2)
    return own


def _split_of(path: str) -> str | None:
    words = re.split("[^a-z]+", path.lower())
    return next((split for split, names in SPLITS.items() if any(name in words for name in names)), None)


# --- their text ----------------------------------------------------------------------------------


@contextmanager
def opened(path: str, newline: str | None = None) -> Iterator[IO[str]]:
    """The text of a file in UTF-8, or in UTF-16 if it says so; unpacked, whatever its name.

    Raises:
        ValueError: it is a Git LFS pointer, or packed with what cannot be unpacked here; or, while it is read, no text.
    """
    opener = open
    with open(path, "rb") as file:
        first = file.read(len(POINTER))
    if first == POINTER:
        raise ValueError(POINTER_SAID)
    if first.startswith(ZSTANDARD):
        try:
            from zstandard import open as opener
        except ImportError as error:
            raise ValueError("it is packed with Zstandard: `pip install zstandard`, or unpack it") from error
    opener = next((unpack for magic, unpack in PACKED.items() if first.startswith(magic)), opener)
    with opener(path, "rb") as file:
        utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    with opener(path, "rt", encoding="utf-16" if utf16 else "utf-8-sig", newline=newline) as file:
        yield file

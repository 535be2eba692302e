"""The pipeline's results on disk, while it runs and after; and how to read them.

    from residual_fisher.pipeline import load_fisher_matrices

A run keeps every finished batch in a file of its own. When all batches of a shard (a window of the dataset)
are there, they become one numbered shard file; when all shards are there, a run of moderate size becomes
the one file `fisher_matrices_compressed.npz`. All these files are NPZ archives of the same members: for
prompt i, `U_{i}`, `S_{i}` and `V_{i}`, written and read one at a time. While it has to, an archive also
holds `records.jsonl`, a line of JSON for each of its prompts.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
import json
from pathlib import Path
import re
from typing import TYPE_CHECKING, NamedTuple
import warnings
import zipfile

import numpy as np

from residual_fisher.common.files import json_text, remove_unfinished, write_archive, write_json
from residual_fisher.common.program import UserError

if TYPE_CHECKING:  # only for annotations: whoever reads results needs no dataset library
    from residual_fisher.pipeline.prompts import Prompt

ARRAYS = "fisher_matrices_compressed.npz"
PROMPTS = "prompts.jsonl"
FOLDER = "shards"
INDEX = "index.json"
RECORDS = "records.jsonl"
SHARD = re.compile(r"shard_(\d{5}|[1-9]\d{5,11})\.npz")
BATCH = re.compile(r"batch_(\d{5}|[1-9]\d{5,11})_(\d{3})\.npz")
UNFINISHED = re.compile(rf"\.({SHARD.pattern}|{BATCH.pattern}|{re.escape(INDEX)})-[0-9a-f]+")
NUMBERS = ("tokens", "truncated", "captured_mass", "trace", "effective_rank", "seconds")  # of a record, among others
LARGEST = 1e30  # of a number in it: some way from float32's 3e38
ONE_FILE = 10_000  # prompts that are put into one archive: opening one reads the names of all its members


class Triplets(NamedTuple):
    """One prompt's Fisher matrix, F ~ U @ diag(S) @ V: its best approximation of rank r."""

    U: np.ndarray  # (d, r) float32, orthonormal columns
    S: np.ndarray  # (r,) float32, descending, nats / unit^2
    V: np.ndarray  # (r, d) float32, the transpose of U, since F is symmetric


class Result(NamedTuple):
    """One prompt's result: its record, and the leading eigenpairs of its Fisher matrix."""

    record: dict  # "index" is the prompt's number
    values: np.ndarray  # (r,) float32
    vectors: np.ndarray  # (r, d) float32


class DamagedFileError(Exception):
    """An archive that cannot be read back, or not all of it."""


# --- archives ------------------------------------------------------------------------------------


def _members(result: Result, store: str) -> Iterator[tuple[str, np.ndarray]]:
    index, u = result.record["index"], np.ascontiguousarray(result.vectors.T)
    yield f"U_{index}.npy", u.astype(np.float16) if store == "compact" else u
    yield f"S_{index}.npy", result.values
    if store == "full":
        yield f"V_{index}.npy", result.vectors


def _lines(records: Iterable[dict]) -> bytes:
    return b"".join(map(json_text, records))


def stored_size(result: Result, store: str) -> tuple[int, int]:
    """Bytes of one prompt's arrays, and of its record."""
    return sum(array.nbytes for _, array in _members(result, store)), len(_lines([result.record]))


def write_results(path: Path, results: Sequence[Result], store: str) -> None:
    """Writes results, in their order, as one archive."""
    members = (member for result in results for member in _members(result, store))
    write_archive(path, [*members, (RECORDS, _lines(result.record for result in results))])


def read_records(path: Path) -> list[dict]:
    """The records of an archive that is whole: every checksum is right, and every prompt has its record and arrays.

    Raises:
        DamagedFileError: it is not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise DamagedFileError(path)
            records = [json.loads(line) for line in archive.read(RECORDS).splitlines()]
            complete = all(map(_is_complete, records)) and len(_shapes(archive, records)) == 1
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError, RecursionError) as error:
        raise DamagedFileError(path) from error
    if not complete:
        raise DamagedFileError(path)
    return records


def _shapes(archive: zipfile.ZipFile, records: list[dict]) -> set[tuple[int, int]]:
    """The shapes (d, r) of the records' U. Raises KeyError or ValueError: an array is missing, or does not fit."""
    found = set()
    for record in records:
        index = record["index"]
        shape = _shape(archive, f"U_{index}")
        d, r = shape
        others = {f"S_{index}": (r,)}
        if f"V_{index}.npy" in archive.NameToInfo:
            others[f"V_{index}"] = (r, d)
        if len(record["singular_values"]) != r or any(_shape(archive, name) != others[name] for name in others):
            raise ValueError("arrays that do not fit each other")
        found.add(shape)
    return found


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as member:
        np.lib.format.read_magic(member)
        return np.lib.format.read_array_header_1_0(member)[0]


def _shape_in(path: Path) -> tuple[int, ...]:
    """The shape of an archive's first U."""
    with zipfile.ZipFile(path) as archive:
        return _shape(archive, archive.namelist()[0].removesuffix(".npy"))


def is_number(value) -> bool:
    """Whether a value of JSON is a number that float32 can hold."""
    return isinstance(value, int | float) and abs(value) < LARGEST


def _is_complete(record) -> bool:
    """Whether a prompt's record has what the statistics need."""
    if not isinstance(record, dict) or type(record.get("index")) is not int:
        return False
    values = record.get("singular_values")
    if not isinstance(values, list) or not values or not isinstance(record.get("prompt"), str):
        return False
    return all(map(is_number, [*(record.get(key) for key in NUMBERS), *values]))


def _members_of(sources: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """The arrays of archives as they are stored, prompts in ascending order."""
    with ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(source)) for source in sources]
        where = {name: archive for archive in archives for name in archive.namelist() if name != RECORDS}
        for name in sorted(where, key=lambda name: (int(re.search(r"\d+", name)[0]), "USV".index(name[0]))):
            yield name, where[name].read(name)


def _records_of(path: Path) -> list[dict]:
    with zipfile.ZipFile(path) as archive:
        return [json.loads(line) for line in archive.read(RECORDS).splitlines()]


# --- a run's files -------------------------------------------------------------------------------


class Store:
    """The files of a run that goes on, in `directory`/shards."""

    def __init__(self, directory: Path, store: str):
        self.directory, self.folder, self.store = directory, directory / FOLDER, store

    def shard(self, number: int) -> Path:
        return self.folder / f"shard_{number:05d}.npz"

    def batch(self, number: int, batch: int) -> Path:
        return self.folder / f"batch_{number:05d}_{batch:03d}.npz"

    def _matching(self, pattern: re.Pattern, kind: str) -> dict[tuple[int, ...], Path]:
        """Files of this project's making, by the numbers in their names, ascending."""
        found = {path: pattern.fullmatch(path.name) for path in self.folder.glob(kind)}
        return dict(sorted((tuple(map(int, match.groups())), path) for path, match in found.items() if match))

    def batches(self, number: int) -> dict[int, Path]:
        """The finished batches of a shard, by their number in it."""
        return {batch: path for (_, batch), path in self._matching(BATCH, f"batch_{number:05d}_*").items()}

    def shards(self) -> list[Path]:
        return list(self._matching(SHARD, "shard_*").values())

    def has_results(self) -> bool:
        return any(self.files())

    def files(self) -> list[Path]:
        """All shards and batches."""
        return [*self.shards(), *self._matching(BATCH, "batch_*").values()]

    def has_shard(self, number: int, prompts: Sequence["Prompt"]) -> bool:
        """Whether a shard's file is there, and whole. Raises UserError if it is of other prompts."""
        whole = self._is_whole(self.shard(number), prompts)
        if whole:  # a process may have been killed while it removed what the shard was made of
            for path in self.batches(number).values():
                path.unlink()
        return whole

    def has_batch(self, number: int, batch: int, prompts: Sequence["Prompt"]) -> bool:
        """The same for a batch's file."""
        return self._is_whole(self.batch(number, batch), prompts)

    def finished(self, number: int, prompts: Sequence["Prompt"]) -> int:
        """How many of a shard's prompts are in files that are whole. Only reads.

        Raises:
            UserError: a file is of other prompts.
        """
        expected, done = {prompt.index: prompt.text for prompt in prompts}, set()
        for path in filter(Path.exists, [self.shard(number), *self.batches(number).values()]):
            with suppress(DamagedFileError):
                found = {record["index"]: record["prompt"] for record in read_records(path)}
                whole = path == self.shard(number)
                self._require_same(found, expected if whole else {index: expected.get(index) for index in found})
                done |= found.keys()
        return len(done)

    def _is_whole(self, path: Path, prompts: Sequence["Prompt"]) -> bool:
        if not path.exists():
            return False
        try:
            found = {record["index"]: record["prompt"] for record in read_records(path)}
        except DamagedFileError:
            warnings.warn(f"{path} is damaged: computing it again", stacklevel=2)
            path.unlink()
            return False
        self._require_same(found, {prompt.index: prompt.text for prompt in prompts})
        return True

    def _require_same(self, found: dict[int, str], expected: dict[int, str]) -> None:
        if found != expected:
            differing = min(i for i in found.keys() | expected.keys() if found.get(i) != expected.get(i))
            raise self._changed(f"first at prompt {differing}")

    def _changed(self, where: str) -> UserError:
        return UserError(
            f"the dataset has changed since the run in {self.directory} began, {where}: --overwrite starts anew"
        )

    def started(self) -> int:
        """How many shards the files reach to."""
        return max((int(re.search(r"\d+", path.name)[0]) + 1 for path in self.files()), default=0)

    def require_no_more_than(self, shards: int) -> None:
        """Raises UserError: there are files of more shards than the dataset has."""
        if self.started() > shards:
            raise self._changed("which had more prompts")

    def write_batch(self, number: int, batch: int, results: Sequence[Result]) -> None:
        write_results(self.batch(number, batch), results, self.store)

    def close_shard(self, number: int, prompts: Sequence[int]) -> None:
        """Makes a shard of its batches.

        Raises:
            UserError: they do not hold exactly these prompts.
        """
        batches = list(self.batches(number).values())
        records = sorted((record for path in batches for record in _records_of(path)), key=lambda r: r["index"])
        if [record["index"] for record in records] != sorted(prompts):
            raise UserError(f"finished batches have vanished from {self.folder}: the same command computes them again")
        members = chain(_members_of(batches), [(RECORDS, _lines(records))])
        write_archive(self.shard(number), members)
        for path in batches:
            path.unlink()

    def records(self) -> Iterator[dict]:
        """All records in the order of the prompts, a shard in memory at a time."""
        for path in self.shards():
            yield from _records_of(path)

    def close(self, prompts: int, per_shard: int) -> None:
        """Makes one archive of all shards if it stays of moderate size, else an index of them.

        Raises:
            UserError: their matrices are of several shapes.
        """
        if len(set(map(_shape_in, self.shards()))) > 1:
            raise UserError(f"{self.folder} holds matrices of several shapes: --overwrite starts anew")
        if prompts <= ONE_FILE:
            members = chain.from_iterable(_members_of([path]) for path in self.shards())
            write_archive(self.directory / ARRAYS, members)
            return
        files = [path.name for path in self.shards()]
        write_json(self.folder / INDEX, {"prompts": prompts, "prompts_per_shard": per_shard, "files": files})

    def remove_leftovers(self, names: Sequence[str]) -> None:
        """Removes what a killed process was writing: shards, batches, and the files of these names."""
        remove_unfinished(self.directory, names)
        for path in self._unfinished():
            path.unlink(missing_ok=True)

    def _unfinished(self) -> list[Path]:
        return [path for path in self.folder.glob(".*-*") if UNFINISHED.fullmatch(path.name)]

    def remove(self) -> None:
        """Removes the shards and their folder; what is not of this project's making stays."""
        for path in [*self.files(), self.folder / INDEX, *self._unfinished()]:
            path.unlink(missing_ok=True)
        # a link to a folder elsewhere is the user's
        if self.folder.is_dir() and not self.folder.is_symlink() and not any(self.folder.iterdir()):
            self.folder.rmdir()


# --- reading -------------------------------------------------------------------------------------


class FisherMatrices(Sequence):
    """All prompts' triplets, read from disk when asked for: only one prompt is in memory at a time.

    `len(matrices)` prompts; `matrices[i]` is prompt i's `Triplets`.
    """

    def __init__(self, files: Sequence[Path], prompts: int, per_file: int):
        self._files, self._prompts, self._per_file = files, prompts, per_file
        self._number, self._archive = None, None

    def __len__(self) -> int:
        return self._prompts

    def __getitem__(self, index: int) -> Triplets:
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        index %= len(self)
        number = index // self._per_file
        if number != self._number:
            self.close()
            self._archive = zipfile.ZipFile(self._files[number])
            self._number = number
        u, s = self._read(f"U_{index}"), self._read(f"S_{index}")
        v = self._read(f"V_{index}") if f"V_{index}.npy" in self._archive.NameToInfo else u.T
        return Triplets(u, s, v)

    def _read(self, name: str) -> np.ndarray:
        # `np.load` would do, but searches the list of all names for each member
        with self._archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False).astype(np.float32, copy=False)

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
        self._number, self._archive = None, None

    def __enter__(self) -> "FisherMatrices":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def load_fisher_matrices(path: str | Path) -> FisherMatrices:
    """The Fisher matrices that `compute_fisher.py` wrote to `path`, in one file or in shards, full or compact.

    Args:
        path: the output directory, or an NPZ file in it.
    Raises:
        UserError: there are none, they are damaged, or the run is not finished.
    """
    path = Path(path)
    one = path if path.suffix == ".npz" else path / ARRAYS
    if one.is_file():
        try:
            with zipfile.ZipFile(one) as archive:
                prompts = sum(name.startswith("S_") for name in archive.namelist())
        except zipfile.BadZipFile as error:
            raise UserError(f"{one} is damaged: {error}") from error
        return FisherMatrices([one], prompts, max(prompts, 1))
    index = path / FOLDER / INDEX
    if not index.is_file():
        raise UserError(f"no finished Fisher matrices in {path}: run compute_fisher.py, which goes on where it stopped")
    files, prompts, per_shard = _read_index(index)
    return FisherMatrices([path / FOLDER / name for name in files], prompts, per_shard)


def _read_index(path: Path) -> tuple[list[str], int, int]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        files, prompts, per_shard = (about[key] for key in ("files", "prompts", "prompts_per_shard"))
        if (type(files), type(prompts), type(per_shard)) != (list, int, int):
            raise ValueError("other types of values")
        if not all(SHARD.fullmatch(name) for name in files) or not 0 < prompts <= per_shard * len(files):
            raise ValueError("files that do not hold the prompts")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: the same command makes it again") from error
    return files, prompts, per_shard

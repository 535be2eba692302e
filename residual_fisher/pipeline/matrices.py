"""The pipeline's Fisher matrices on disk: one NPZ archive, or numbered ones for a large run; and how to read them.

    from residual_fisher import load_fisher_matrices

For prompt i an archive holds `U_{i}`, `S_{i}` and `V_{i}`, and the activation `H_{i}` that its F is at.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
import json
from pathlib import Path
from typing import NamedTuple
import zipfile

import numpy as np

from residual_fisher.common.archives import RECORDS, Item, archives_in, read_array, record_lines
from residual_fisher.common.files import atomic_open, json_text, write_archive
from residual_fisher.common.program import UserError
from residual_fisher.common.run import ITEMS, Run, read_manifest

ARRAYS = "fisher_matrices_compressed.npz"
LINES = f"{ITEMS}/{RECORDS}"  # beside ARRAYS: what was computed of each prompt besides its matrix
ONE_FILE = 10_000  # prompts that are put into one archive: opening one reads the names of all its members


class Triplets(NamedTuple):
    """One prompt's Fisher matrix, F ~ U @ diag(S) @ V: its best approximation of rank r."""

    U: np.ndarray  # (d, r) float32, orthonormal columns
    S: np.ndarray  # (r,) float32, descending, nats / unit^2
    V: np.ndarray  # (r, d) float32, the transpose of U, since F is symmetric

    # eigenpairs by the names that `fisher.matrix_similarity` and `fisher.subspace_overlap` know them by

    @property
    def values(self) -> np.ndarray:
        return self.S

    @property
    def vectors(self) -> np.ndarray:
        return self.V


ACTIVATION = "H"  # (d,) float32, the residual stream at the prompt's last token
MEMBERS = (*Triplets._fields, ACTIVATION)


def arrays_of(values: np.ndarray, vectors: np.ndarray, activation: np.ndarray, store: str) -> dict[str, np.ndarray]:
    """What is kept of leading eigenpairs, values (r,) and vectors (r, d), and an activation (d,), all float32.

    U, S, V and H; or, in a compact store, U and H in float16, and S.
    """
    u = np.ascontiguousarray(vectors.T)
    if store == "full":
        return {"U": u, "S": values, "V": vectors, ACTIVATION: activation}
    most = np.finfo(np.float16).max  # a massive activation is cut there
    return {"U": u.astype(np.float16), "S": values, ACTIVATION: activation.clip(-most, most).astype(np.float16)}


# --- from items to primary files, and back -------------------------------------------------------


def merge(run: Run, count: int) -> list[str] | None:
    """Merges the items of `count` prompts into one archive and the lines of their records; returns the files' names.

    A larger run keeps the archives that it has: None.

    Raises:
        UserError: items are missing or damaged, or a file cannot be written.
    """
    folder = run.folder / ITEMS
    try:
        if [number for number, _ in run.all_records()] != list(range(count)):
            raise UserError(f"finished items have vanished from {folder}: run the same command again")
        if count <= ONE_FILE:
            arrays = ((number, arrays) for number, _, arrays in run.items())
            members = ((f"{name}_{number}.npy", array) for number, some in arrays for name, array in some.items())
            write_archive(run.folder / ARRAYS, members)
            with atomic_open(run.folder / LINES) as file:
                file.writelines(json_text(record) for _, record in run.all_records())
            return [ARRAYS, LINES]
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(f"an archive in {folder} is damaged: run the same command again") from error
    for name in (ARRAYS, LINES):  # of a smaller run that was extended
        (run.folder / name).unlink(missing_ok=True)
    return None


def split(folder: Path) -> Iterator[Item]:
    """The items that `merge` has put into one archive, one in memory at a time."""
    with zipfile.ZipFile(folder / ARRAYS) as archive, open(folder / LINES, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            names = [name for name in MEMBERS if f"{name}_{number}.npy" in archive.NameToInfo]
            yield Item(number, json.loads(line), {name: read_array(archive, f"{name}_{number}") for name in names})


def records_of(folder: Path) -> Iterator[dict]:
    """The records of a finished run's prompts, in order, one in memory at a time (of a large run, an archive's).

    Raises:
        UserError: they cannot be read.
    """
    try:
        if (folder / LINES).is_file():
            with open(folder / LINES, encoding="utf-8") as lines:
                yield from map(json.loads, lines)
        else:
            for *_, path in archives_in(folder / ITEMS):
                yield from (record for _, record in record_lines(path))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"no readable records of prompts in {folder}: run the command that made them again") from error


# --- reading -------------------------------------------------------------------------------------


class FisherMatrices(Sequence):
    """All prompts' triplets, read from disk when asked for: only one prompt is in memory at a time.

    `len(matrices)` prompts; `matrices[i]` is prompt i's `Triplets`.
    """

    def __init__(self, files: Sequence[Path], firsts: Sequence[int], prompts: int):
        """`firsts` are the numbers of the first prompt in each of `files`, ascending."""
        self._files, self._firsts, self._prompts = files, firsts, prompts
        self._open, self._archive = None, None  # which of the files is open

    def __len__(self) -> int:
        return self._prompts

    def __getitem__(self, index: int) -> Triplets:
        index = self._find(index)
        u, s = self._read(f"U_{index}"), self._read(f"S_{index}")
        v = self._read(f"V_{index}") if f"V_{index}.npy" in self._archive.NameToInfo else u.T
        return Triplets(u, s, v)

    def activation(self, index: int) -> np.ndarray | None:
        """h (d,) float32, the residual stream at a prompt's last token; None in what an earlier version wrote."""
        name = f"{ACTIVATION}_{self._find(index)}"
        return self._read(name) if f"{name}.npy" in self._archive.NameToInfo else None

    def _find(self, index: int) -> int:
        """The prompt's number, from 0; its file is open then."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        index %= len(self)
        place = bisect_right(self._firsts, index) - 1
        if place != self._open:
            self.close()
            self._archive, self._open = zipfile.ZipFile(self._files[place]), place
        return index

    def _read(self, name: str) -> np.ndarray:
        return read_array(self._archive, name).astype(np.float32, copy=False)

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
        self._open, self._archive = None, None

    def __enter__(self) -> "FisherMatrices":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def load_fisher_matrices(path: str | Path) -> FisherMatrices:
    """The Fisher matrices that `compute_fisher.py` wrote to `path`, in one archive or several, full or compact.

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
        return FisherMatrices([one], [0], prompts)
    manifest, archives = read_manifest(path), archives_in(path / ITEMS)
    if manifest is None or not manifest["complete"] or not archives:
        raise UserError(f"no finished Fisher matrices in {path}: run compute_fisher.py, which resumes where it stopped")
    firsts, _, files = zip(*archives, strict=True)
    return FisherMatrices(files, firsts, manifest["items"])

"""A pipeline run's output directory: begun, gone on with, finished."""

from dataclasses import asdict
import os
from pathlib import Path
import warnings
import zipfile

import numpy as np
import yaml

from common.command_line import UserError, excerpt
from common.files import atomic_open, check_writable, json_ready, json_text, sha256
from common.lock import LOCK
from common.plain_yaml import parse_values
from pipeline import figures, report
from pipeline.scores import outlier_scores
from pipeline.settings import INCIDENTAL, Settings
from pipeline.store import ARRAYS, FOLDER, INDEX, PROMPTS, SHARD, Store, load_fisher_matrices

FORMAT = "residual-fisher/1"
METADATA = "metadata.yaml"
MAX_HASHED = 1 << 30  # bytes of a file: of a larger one only the size is compared
# what a run's metadata has from its start
KEYS = {"complete": bool, "config": dict, "sources": dict, "hook_layer": str, "model_fingerprint": str}
FILES = (ARRAYS, PROMPTS, METADATA, figures.SPECTRA)


class RunDirectory:
    """The output directory of a run with these settings, and its `store` of finished batches and shards."""

    def __init__(self, settings: Settings):
        self.settings, self.path = settings, Path(settings.output_dir)
        self.store = Store(self.path, settings.store)
        self._sources = {"model": _stamps(settings.model_path), "dataset": _seal(Path(settings.dataset))}

    def is_finished(self, overwrite: bool) -> bool:
        """Whether it is plain, before anything slow, that the directory holds all that the settings ask for.

        Raises:
            UserError: it cannot be written to, is not this script's, or holds a run with other settings or data.
        """
        found = self._metadata(overwrite)
        check_writable(self.path)
        if found is None or overwrite:
            return False
        then, now = found["config"], asdict(self.settings)
        differing = [key for key in now if key not in INCIDENTAL and then.get(key) != now[key]]
        if differing and (found["complete"] or self.store.has_results()):
            changes = ", ".join(f"{key} was {_shown(then.get(key))} and is {_shown(now[key])}" for key in differing)
            raise UserError(f"{self.path} holds a run with other settings ({changes}): --overwrite removes it")
        if not found["complete"] or differing:
            return False
        sources = found["sources"]
        if sources.get("dataset") != self._sources["dataset"]:
            raise UserError(f"the dataset has changed since the run in {self.path} ended: --overwrite starts anew")
        return sources.get("model") == self._sources["model"] and not self._damaged(found)

    def is_begun(self) -> bool:
        """Whether there is anything of a run."""
        return bool(self._names())

    def is_done(self, identity: dict, overwrite: bool) -> bool:
        """Whether the run is complete, and its files are as it left them. Only reads.

        Raises:
            UserError: it holds results of another model.
        """
        found = self._metadata(overwrite)
        if found is not None and not overwrite and (found["complete"] or self.store.has_results()):
            for key, now in identity.items():
                if found[key] != now:
                    change = f"{key} was {_shown(found[key])} and is {_shown(now)}"
                    raise UserError(f"{self.path} holds a run of another model ({change}): --overwrite removes it")
            return found["complete"] and not self._damaged(found)
        return False

    def begin(self, identity: dict, environment: dict, overwrite: bool) -> bool:
        """Makes the directory ready, emptied of an earlier run if it may be, unless all is done: returns `is_done`."""
        if self.is_done(identity, overwrite):
            return True
        found = self._metadata(overwrite)
        if found is not None and (overwrite or found["complete"]):
            # Killed in between, the directory is still this script's, and unfinished.
            self._write_metadata({**found, "complete": False})
            if overwrite:
                self.store.remove()
            for name in FILES:
                if name != METADATA:
                    (self.path / name).unlink(missing_ok=True)
        self.store.remove_leftovers(FILES)
        config = {"config": asdict(self.settings), "environment": environment, "sources": self._sources}
        self._write_metadata({"format": FORMAT, "complete": False, **identity, **config})
        return False

    def _damaged(self, found: dict) -> bool:
        """Whether a file of a finished run is missing or other than it was; names it."""
        for name, seal in found["files"].items():
            if _seal(self.path / name) != seal:
                warnings.warn(f"{self.path / name} is missing or damaged: computing it again", stacklevel=2)
                return True
        return False

    def finish(self, count: int, per_shard: int, skipped: int) -> dict:
        """Turns a run whose shards of `count` prompts are all there into its final files; returns its statistics.

        Interrupted at any point, it can be called again.

        Raises:
            UserError: a shard is damaged or missing, or a file cannot be written.
        """
        try:
            columns = report.columns_of(self.store.records())
            if columns["index"].tolist() != list(range(count)):
                folder = self.store.folder
                raise UserError(f"finished shards have vanished from {folder}: the same command computes them again")
            self.store.close(count, per_shard)
        except zipfile.BadZipFile as error:
            folder = self.store.folder
            raise UserError(f"a file in {folder} is damaged ({error}): the same command computes it again") from error
        with load_fisher_matrices(self.path) as matrices:
            scores = outlier_scores(matrices, set(np.flatnonzero(columns["failed"]).tolist()))
            bias_dim, num_singular_values = matrices[0].U.shape
        self._write_prompts(scores)
        figures.draw(self.path)
        statistics = report.summarize(columns, skipped)
        in_one_file = (self.path / ARRAYS).exists()
        self._write_metadata(
            {
                **self._metadata(False),
                "complete": True,
                "num_prompts": count,
                "bias_dim": bias_dim,
                "num_singular_values": num_singular_values,
                "arrays": ARRAYS if in_one_file else f"{FOLDER}/",
                "statistics": statistics,
                "files": {name: _seal(self.path / name) for name in self._results(in_one_file)},
            }
        )
        self.clean_up()
        return statistics

    def _results(self, in_one_file: bool) -> list[str]:
        shards = [self.store.folder / INDEX, *self.store.shards()]
        arrays = [ARRAYS] if in_one_file else [f"{FOLDER}/{path.name}" for path in shards]
        return [*arrays, PROMPTS, figures.SPECTRA]

    def clean_up(self) -> None:
        """Removes the shards once their arrays are in one file."""
        if (self.path / ARRAYS).exists():
            self.store.remove()

    def _write_prompts(self, scores: dict[str, np.ndarray]) -> None:
        with atomic_open(self.path / PROMPTS) as file:
            for index, record in enumerate(self.store.records()):
                record.update({name: column[index].tolist() for name, column in scores.items()})
                file.write(json_text(record))

    def _metadata(self, overwrite: bool) -> dict | None:
        """What the metadata says; None if the directory is empty or missing.

        Raises:
            UserError: it holds files that this script did not write; or its own, but no readable metadata, and may
                not overwrite them.
        """
        found, names = self._read_metadata(), self._names()
        foreign = sorted(names - {*FILES, FOLDER}) if found is None else []
        if foreign := [*self._in_the_way(), *foreign]:
            raise UserError(
                f"{self.path} holds files that compute_fisher.py did not write ({excerpt(foreign[0], 40)}): "
                "choose another --output-dir"
            )
        if found is None and names and not overwrite:
            raise UserError(f"{self.path} holds results without a readable {METADATA}: --overwrite removes them")
        return found or ({"format": FORMAT, "complete": False} if names else None)

    def _read_metadata(self) -> dict | None:
        """What is certain to have what this module reads of it, or None."""
        try:
            found = parse_values((self.path / METADATA).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if _is_metadata(found) else None

    def _names(self) -> set[str]:
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        # a killed process may have left what was to become the metadata
        return {name for name in names if not name.startswith(f".{METADATA}-")} - {LOCK}

    def _in_the_way(self) -> list[str]:
        """What has the name of a file or folder of this script, and is another kind of thing."""
        folder = self.store.folder
        files = [*(self.path / name for name in FILES), folder / INDEX, *self.store.files()]
        names = [path.name for path in files if path.exists() and not path.is_file()]
        return [*names, FOLDER] if os.path.lexists(folder) and not folder.is_dir() else names

    def _write_metadata(self, metadata: dict) -> None:
        with atomic_open(self.path / METADATA) as file:
            text = yaml.safe_dump(json_ready(metadata), sort_keys=False, allow_unicode=True, width=110)
            file.write(text.encode())


def _is_metadata(found) -> bool:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return False
    if not all(isinstance(found.get(key), kind) for key, kind in KEYS.items()):
        return False
    if not all(isinstance(value, str | int | float | None) for value in found["config"].values()):
        return False
    return not found["complete"] or _are_seals(found.get("files"))


def _are_seals(files) -> bool:
    """Whether these are the files of a finished run: the records, the picture, and the arrays in one file or shards."""
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files):
        return False
    arrays = files.keys() - {PROMPTS, figures.SPECTRA}
    own = (ARRAYS, f"{FOLDER}/{INDEX}")
    known = all(name in own or SHARD.fullmatch(name.removeprefix(f"{FOLDER}/")) for name in arrays)
    return known and len(arrays) > 0 and {PROMPTS, figures.SPECTRA} <= files.keys()


def _shown(value) -> str:
    return excerpt(repr(value), 60)


def _seal(path: Path) -> list | None:
    """Size and hash of a file, by which a change is seen; None if it is not there."""
    if not os.path.isfile(path):  # a name may be too long for a path
        return None
    size = path.stat().st_size
    return [size, sha256(path) if size <= MAX_HASHED else None]


def _stamps(model: str) -> list | None:
    """Names, sizes and times of a local model's files; None for a model from elsewhere."""
    directory = Path(model)
    files = sorted(path for path in directory.iterdir() if path.is_file()) if os.path.isdir(directory) else None
    return files and [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]

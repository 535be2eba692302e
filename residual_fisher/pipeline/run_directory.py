"""A pipeline run's output directory: begun, gone on with, finished."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
import os
from pathlib import Path
import warnings
import zipfile

import yaml

from residual_fisher.common.command_line import UserError, excerpt
from residual_fisher.common.files import atomic_open, check_writable, json_ready, json_text
from residual_fisher.common.lock import LOCK
from residual_fisher.pipeline import figures, report
from residual_fisher.pipeline.comparison import Comparison, read_records
from residual_fisher.pipeline.metadata import FORMAT, METADATA, SPECTRA, read_metadata, seal, shown
from residual_fisher.pipeline.scores import SCORING_VERSION, ScoredRun, outlier_scores
from residual_fisher.pipeline.settings import INCIDENTAL, Settings
from residual_fisher.pipeline.store import ARRAYS, FOLDER, INDEX, PROMPTS, Store, load_fisher_matrices

EARLIER_SCORES = ("z_log_lambda", "subspace_distance", "z_subspace", "z_principal")
FILES = (ARRAYS, PROMPTS, METADATA, SPECTRA)


class RunDirectory:
    """The output directory of a run with these settings, and its `store` of finished batches and shards."""

    def __init__(self, settings: Settings):
        self.settings, self.path = settings, Path(settings.output_dir)
        self.store = Store(self.path, settings.store)
        self._comparison = Comparison.asked_for(settings)
        self._sources = {"model": _stamps(settings.model_path), "dataset": seal(Path(settings.dataset))}

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
            changes = ", ".join(f"{key} was {shown(then.get(key))} and is {shown(now[key])}" for key in differing)
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
                    change = f"{key} was {shown(found[key])} and is {shown(now)}"
                    raise UserError(f"{self.path} holds a run of another model ({change}): --overwrite removes it")
            return found["complete"] and not self._damaged(found)
        return False

    def is_scored(self) -> bool:
        """Whether a complete run has the scores that the settings ask for."""
        return _same_scoring(self._metadata(False).get("scores"), self._scoring())

    def begin(self, identity: dict, environment: dict, overwrite: bool) -> bool:
        """Makes the directory ready, emptied of an earlier run if it may be, unless all is done: returns `is_done`."""
        if self._comparison:
            self._comparison.require_same_model(identity)
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
        for name, known in found["files"].items():
            # what was being scored anew has no seal
            if not (self.path / name).is_file() or known not in (None, seal(self.path / name)):
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
        bias_dim, num_singular_values = self._score(self.store.records)
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
                "scores": self._scoring(),
                "files": {name: seal(self.path / name) for name in self._results(in_one_file)},
            }
        )
        self.clean_up()
        return statistics

    def score_again(self) -> dict:
        """Scores the prompts of a complete run as the settings ask for; returns its statistics.

        Interrupted at any point, it can be called again: the Fisher matrices stay.

        Raises:
            UserError: a file cannot be read or written, or the run is not one to be compared with this.
        """
        found = self._metadata(False)
        if self._comparison:
            self._comparison.require_same_model(found)
        changing = (PROMPTS, SPECTRA)
        unsealed = {**found["files"], **dict.fromkeys(changing)}
        self._write_metadata({**found, "scores": None, "files": unsealed})
        self._score(lambda: read_records(self.path / PROMPTS))
        files = {**unsealed, **{name: seal(self.path / name) for name in changing}}
        self._write_metadata({**found, "scores": self._scoring(), "files": files})
        return found["statistics"]

    def _score(self, records: Callable[[], Iterable[dict]]) -> tuple[int, int]:
        """Writes the prompts' records with their scores, and the picture of them; returns the shape of the matrices."""
        against = {}
        with ExitStack() as stack:
            matrices = stack.enter_context(load_fisher_matrices(self.path))
            prompts = ScoredRun.of(records(), matrices)
            if self._comparison:
                against[self._comparison.kind] = self._comparison.open(stack, prompts)
            columns = outlier_scores(prompts, **against)
            shape = matrices[0].U.shape
        with atomic_open(self.path / PROMPTS) as file:
            for index, record in enumerate(records()):
                record.update({name: column[index] for name, column in columns.items()})
                file.write(json_text({key: value for key, value in record.items() if key not in EARLIER_SCORES}))
        figures.draw(self.path)
        return shape

    def _scoring(self) -> dict:
        """What the scores are of."""
        against = self._comparison
        known = (against.kind, str(against.path), against.seal) if against else (None, None, None)
        return {"version": SCORING_VERSION, **dict(zip(("against", "directory", "seal"), known, strict=True))}

    def _results(self, in_one_file: bool) -> list[str]:
        shards = [self.store.folder / INDEX, *self.store.shards()]
        arrays = [ARRAYS] if in_one_file else [f"{FOLDER}/{path.name}" for path in shards]
        return [*arrays, PROMPTS, SPECTRA]

    def clean_up(self) -> None:
        """Removes the shards once their arrays are in one file."""
        if (self.path / ARRAYS).exists():
            self.store.remove()

    def _metadata(self, overwrite: bool) -> dict | None:
        """What the metadata says; None if the directory is empty or missing.

        Raises:
            UserError: it holds files that this script did not write; or its own, but no readable metadata, and may
                not overwrite them.
        """
        found, names = read_metadata(self.path), self._names()
        foreign = sorted(names - {*FILES, FOLDER}) if found is None else []
        if foreign := [*self._in_the_way(), *foreign]:
            raise UserError(
                f"{self.path} holds files that compute_fisher.py did not write ({excerpt(foreign[0], 40)}): "
                "choose another --output-dir"
            )
        if found is None and names and not overwrite:
            raise UserError(f"{self.path} holds results without a readable {METADATA}: --overwrite removes them")
        return found or ({"format": FORMAT, "complete": False} if names else None)

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


def _stamps(model: str) -> list | None:
    """Names, sizes and times of a local model's files; None for a model from elsewhere."""
    directory = Path(model)
    files = sorted(path for path in directory.iterdir() if path.is_file()) if os.path.isdir(directory) else None
    return files and [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _same_scoring(one: dict | None, other: dict) -> bool:
    """Whether scores are of the same run, wherever it lies now."""
    return isinstance(one, dict) and all(one.get(key) == other[key] for key in ("version", "against", "seal"))

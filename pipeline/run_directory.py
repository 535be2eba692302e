"""A pipeline run's output directory: begun, gone on with, finished."""

from dataclasses import asdict
import json
from pathlib import Path
import zipfile

import numpy as np
import yaml

from common.command_line import UserError
from common.files import atomic_open, check_writable, json_ready
from pipeline import figures, report
from pipeline.scores import outlier_scores
from pipeline.settings import INCIDENTAL, Settings
from pipeline.store import ARRAYS, FOLDER, PROMPTS, Store, load_fisher_matrices

FORMAT = "residual-fisher/1"
METADATA = "metadata.yaml"
FILES = (ARRAYS, PROMPTS, METADATA, figures.SPECTRA)


class RunDirectory:
    """The output directory of a run with these settings, and its `store` of finished batches and shards."""

    def __init__(self, settings: Settings):
        self.settings, self.path = settings, Path(settings.output_dir)
        self.store = Store(self.path, settings.store)

    def is_finished(self, overwrite: bool) -> bool:
        """Whether the directory already holds all that the settings ask for.

        Raises:
            UserError: it cannot be written to, is not this script's, or holds a run with other settings.
        """
        found = self._metadata()
        check_writable(self.path)
        if found is None or overwrite:
            return False
        then, now = found["config"], asdict(self.settings)
        differing = [key for key in now if key not in INCIDENTAL and then.get(key) != now[key]]
        if differing and (found["complete"] or self.store.has_results()):
            changes = ", ".join(f"{key} was {then.get(key)!r} and is {now[key]!r}" for key in differing)
            raise UserError(f"{self.path} holds a run with other settings ({changes}): --overwrite removes it")
        return found["complete"] and not differing

    def begin(self, identity: dict, environment: dict, overwrite: bool) -> None:
        """Makes the directory ready: emptied of an earlier run, or checked to be of the same model.

        Raises:
            UserError: it holds results of another model.
        """
        found = self._metadata()
        if overwrite and found is not None:
            # Killed in between, the directory is still this script's, and unfinished.
            self._write_metadata({**found, "complete": False})
            self.store.remove()
            for name in FILES:
                if name != METADATA:
                    (self.path / name).unlink(missing_ok=True)
        elif found is not None and self.store.has_results():
            for key, now in identity.items():
                if found[key] != now:
                    change = f"{key} was {found[key]!r} and is {now!r}"
                    raise UserError(f"{self.path} holds a run of another model ({change}): --overwrite removes it")
        self.store.remove_leftovers(FILES)
        config = {"config": asdict(self.settings), "environment": environment}
        self._write_metadata({"format": FORMAT, "complete": False, **identity, **config})

    def finish(self, per_shard: int, skipped: int) -> str:
        """Turns a run whose shards are all there into its final files; returns a table of what it found.

        Interrupted at any point, it can be called again.

        Raises:
            UserError: a shard is damaged, or a file cannot be written.
        """
        try:
            columns = report.columns_of(self.store.records())
            count = len(columns["tokens"])
            self.store.close(count, per_shard)
        except zipfile.BadZipFile as error:
            folder = self.store.folder
            raise UserError(f"a file in {folder} is damaged ({error}): the same command computes it again") from error
        with load_fisher_matrices(self.path) as matrices:
            scores = outlier_scores(matrices)
            bias_dim, num_singular_values = matrices[0].U.shape
        self._write_prompts(scores)
        figures.draw(self.path)
        statistics = report.summarize(columns, skipped)
        in_one_file = (self.path / ARRAYS).exists()
        self._write_metadata(
            {
                **self._metadata(),
                "complete": True,
                "num_prompts": count,
                "bias_dim": bias_dim,
                "num_singular_values": num_singular_values,
                "arrays": ARRAYS if in_one_file else f"{FOLDER}/",
                "statistics": statistics,
            }
        )
        self.clean_up()
        return report.final_table(self.path / PROMPTS, statistics)

    def clean_up(self) -> None:
        """Removes the shards once their arrays are in one file."""
        if (self.path / ARRAYS).exists():
            self.store.remove()

    def _write_prompts(self, scores: dict[str, np.ndarray]) -> None:
        with atomic_open(self.path / PROMPTS) as file:
            for index, record in enumerate(self.store.records()):
                record.update({name: column[index].tolist() for name, column in scores.items()})
                file.write((json.dumps(json_ready(record), ensure_ascii=False) + "\n").encode())

    def _metadata(self) -> dict | None:
        """What the metadata says; None if the directory is empty or missing.

        Raises:
            UserError: it holds files that this script did not write.
        """
        path, directory = self.path / METADATA, self.path
        foreign = UserError(
            f"{directory} holds files that compute_fisher.py did not write: choose another --output-dir"
        )
        if not path.is_file():
            # a killed process may have left what was to become the metadata
            names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
            if any(not name.startswith(f".{METADATA}-") for name in names) or directory.is_file():
                raise foreign
            return None
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            raise foreign from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise foreign
        return found

    def _write_metadata(self, metadata: dict) -> None:
        with atomic_open(self.path / METADATA) as file:
            text = yaml.safe_dump(json_ready(metadata), sort_keys=False, allow_unicode=True, width=110)
            file.write(text.encode())

"""An experiment's output directory: an earlier run in it is gone on with, or is refused."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple
import warnings

from residual_fisher.common.command_line import UserError
from residual_fisher.common.files import remove_unfinished
from residual_fisher.experiment import figures
from residual_fisher.experiment.results import EIGENVECTORS, RESULTS, Arrays, Results, read_arrays, read_results
from residual_fisher.experiment.sentences import Context

FILES = (RESULTS, EIGENVECTORS, *figures.FILES)
LATER = {  # options that runs of older versions lack, with what those did
    "continue_": 0, "continue_nats": 2.0,
    "steer": False, "steer_token": None, "steer_steps": 8, "steer_damping": 0.003,
}  # fmt: skip
INCIDENTAL = ("output_dir", "device", "trust_remote_code")  # options that may differ when a run goes on


class Earlier(NamedTuple):
    """What an earlier run with the same results has finished."""

    document: dict  # its experiment_results.json
    arrays: Arrays  # of the document's sentences


def identify(config: dict, model_fingerprint: str, contexts: list[Context]) -> dict:
    """What makes two runs one: options, model and sentences; the `run` of the results, with an `id` of them all."""
    sentences = _hash([[context.ids, context.target_id] for context in contexts])
    about = {"model_fingerprint": model_fingerprint, "sentences_fingerprint": sentences}
    counted = {k: v for k, v in config.items() if k not in INCIDENTAL and not (k in LATER and v == LATER[k])}
    return {"id": _hash([about, counted]), **about}


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


class RunDirectory:
    """The output directory of the run that `config` and `run` (see `identify`) describe."""

    def __init__(self, path: Path, config: dict, run: dict):
        self.path, self.config, self.run = path, json.loads(json.dumps(config)), run
        self._of_this_run = False  # whether all files in it are

    def earlier(self, overwrite: bool) -> Earlier | None:
        """What there is to go on with; None if the run starts anew. Only reads.

        Raises:
            UserError: the directory holds another run, or results of an unknown one, and may not be overwritten.
        """
        for name in FILES:
            if (self.path / name).is_dir():
                raise UserError(f"cannot write {self.path / name}: a directory has its place")
        there = [name for name in FILES if (self.path / name).exists()]
        # killed between its first two files, a run has left the arrays alone
        if overwrite or not there or (RESULTS not in there and self._arrays(0) is not None):
            return None
        try:
            document = read_results(self.path)
        except UserError as error:
            raise UserError(f"{error}: --overwrite replaces what is there") from error
        self._require_same_run(document)
        arrays = self._arrays(len(document["sentences"]))
        if arrays is None:
            warnings.warn(f"{self.path / EIGENVECTORS} is missing or damaged: computing it again", stacklevel=2)
            return None
        self._of_this_run = True
        return Earlier(document, arrays)

    def _require_same_run(self, document: dict) -> None:
        then, run = {**LATER, **document.get("experiment_config", {})}, document.get("run", {})
        if run == self.run:
            return
        differing = [key for key in self.config if key not in INCIDENTAL and then.get(key) != self.config[key]]
        if differing:
            changes = ", ".join(
                f"{key.rstrip('_')} was {then.get(key)!r} and is {self.config[key]!r}" for key in differing
            )
            raise UserError(f"{self.path} holds a run with other settings ({changes}): --overwrite replaces it")
        of_model = run.get("model_fingerprint") == self.run["model_fingerprint"]
        what = "other sentences" if of_model else "another model"
        raise UserError(f"{self.path} holds a run of {what}: --overwrite replaces it")

    def _arrays(self, sentences: int) -> Arrays | None:
        """The first `sentences` rows of the arrays; None if they are not there, or of another run.

        There may be more rows: the arrays are written first.
        """
        arrays = read_arrays(self.path)
        if arrays is None or str(arrays.pop("run", "")) != self.run["id"] or "layers" not in arrays:
            return None
        del arrays["layers"]
        enough = all(array.ndim > 1 and len(array) >= sentences for array in arrays.values())
        return {name: array[:sentences] for name, array in arrays.items()} if arrays and enough else None

    def is_begun(self) -> bool:
        """Whether there is a file of a run."""
        return any((self.path / name).exists() for name in FILES)

    def remove_leftovers(self) -> None:
        """Removes what a killed process was writing."""
        remove_unfinished(self.path, FILES)

    def save(self, results: Results) -> None:
        """Writes what is finished, in place of an earlier run.

        Raises:
            UserError: it cannot be written.
        """
        if not self._of_this_run:  # killed in between, the directory holds nothing, or this run
            for name in FILES:
                if name != EIGENVECTORS:
                    (self.path / name).unlink(missing_ok=True)
            self._of_this_run = True
        results.save(self.path)

    def written(self, results: Results) -> tuple[str, ...]:
        """The names of the files that there are of these results."""
        return (RESULTS, EIGENVECTORS, *figures.names_of({"steering": results.steering}))

"""The finished run that a run's prompts are scored against: trusted prompts, or the same prompts in a base model."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
import json
from pathlib import Path

from residual_fisher.common.command_line import UserError, first_line
from residual_fisher.pipeline.metadata import read_metadata, seal, shown
from residual_fisher.pipeline.scores import ScoredRun
from residual_fisher.pipeline.settings import Settings
from residual_fisher.pipeline.store import PROMPTS, load_fisher_matrices

FEWEST = 20  # prompts of a reference
SAME_SETTINGS = ("bias_positions", "top_k_tokens", "num_singular_values")  # which F are of one kind


@dataclass(frozen=True)
class Comparison:
    """A finished run, and what it is taken for."""

    kind: str  # "reference" or "base", as the setting is called
    path: Path
    metadata: dict

    @classmethod
    def asked_for(cls, settings: Settings) -> "Comparison | None":
        """
        Raises:
            UserError: there is no finished run there, it is damaged, or has other settings.
        """
        asked = [(kind, getattr(settings, kind)) for kind in ("reference", "base") if getattr(settings, kind)]
        if not asked:
            return None
        if len(asked) > 1:
            raise UserError("--reference and --base are two ways to score the prompts: choose one")
        kind, path = asked[0][0], Path(asked[0][1])
        if path.resolve() == Path(settings.output_dir).resolve():
            raise UserError(f"--{kind} is the --output-dir itself ({path}): it takes another, finished run")
        metadata = read_metadata(path)
        if metadata is None or not metadata["complete"]:
            raise UserError(f"no finished run in {path}: --{kind} takes the --output-dir of one")
        for file, known in metadata["files"].items():
            if known is None or seal(path / file) != known:
                raise UserError(f"{path / file} is missing or damaged: the command that made it makes it again")
        for key in SAME_SETTINGS:
            then, now = metadata["config"].get(key), getattr(settings, key)
            if then != now:
                raise UserError(
                    f"the run in {path} has {key} {shown(then)}, and this one {shown(now)}: "
                    f"--{kind} takes one with the same settings"
                )
        return cls(kind, path, metadata)

    def require_same_model(self, identity: dict) -> None:
        """
        Raises:
            UserError: it is hooked elsewhere; or, trusted prompts, of another model.
        """
        keys = {"hook_layer": "is hooked at another layer"}
        if self.kind == "reference":
            keys["model_fingerprint"] = "is of another model"
        for key, what in keys.items():
            if self.metadata[key] != identity[key]:
                change = f"{shown(self.metadata[key])}, and this one {shown(identity[key])}"
                raise UserError(f"the run in {self.path} {what} ({change}): --{self.kind} takes one with the same")

    @property
    def seal(self) -> list:
        """By which the run is known again, wherever it is."""
        return self.metadata["files"][PROMPTS]

    def open(self, stack: ExitStack, own: ScoredRun) -> ScoredRun:
        """Its prompts.

        Raises:
            UserError: they cannot be read, or are too few; or not those of `own` in a base model.
        """
        matrices = stack.enter_context(load_fisher_matrices(self.path))
        found = ScoredRun.of(read_records(self.path / PROMPTS), matrices)
        if matrices[0].U.shape != own.matrices[0].U.shape:
            raise UserError(f"the matrices in {self.path} are of another shape: --{self.kind} takes a run of the same")
        if self.kind == "base" and found.prompt_hashes != own.prompt_hashes:
            pairs = zip(found.prompt_hashes, own.prompt_hashes, strict=False)
            first = next(
                (i for i, (a, b) in enumerate(pairs) if a != b), min(len(found.prompt_hashes), len(own.prompt_hashes))
            )
            raise UserError(
                f"the run in {self.path} is of other prompts (first at prompt {first}): "
                "--base takes one of the same prompts through another model"
            )
        if self.kind == "reference" and len(found.usable()) < FEWEST:
            raise UserError(f"{len(found.usable())} prompts in {self.path} are too few to trust: {FEWEST} at least")
        return found


def read_records(path: Path) -> Iterator[dict]:
    """The records of a finished run, one at a time.

    Raises:
        UserError: they cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, ValueError) as error:
        raise UserError(f"no readable {path.name} in {path.parent}: {first_line(error)}") from error

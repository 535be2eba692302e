"""The finished run that a run's prompts are scored against: trusted prompts, or the same prompts in a base model."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from residual_fisher.common.program import UserError
from residual_fisher.common.run import finished_manifest, short_hash, shown, what_differs
from residual_fisher.pipeline.matrices import load_fisher_matrices, records_of
from residual_fisher.pipeline.scores import ScoredRun
from residual_fisher.pipeline.settings import Settings

FEWEST_TRUSTED = 20  # prompts of a reference
# F of one kind have these in common
SAME_SETTINGS = ("bias_positions", "answer_tokens", "top_k_tokens", "num_singular_values", "max_length")


@dataclass(frozen=True)
class Reference:
    """A finished run, and what it is taken for."""

    kind: str  # "reference" or "base", as the setting is called
    path: Path
    manifest: dict

    @classmethod
    def asked_for(cls, settings: Settings) -> "Reference | None":
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
        manifest = finished_manifest(path, f"--{kind} takes the --output-dir of one")
        for key in SAME_SETTINGS:
            # a run of an earlier version lacks an option that it did not have
            then, now = manifest["identity"]["settings"].get(key, getattr(Settings, key)), getattr(settings, key)
            if then != now:
                raise UserError(
                    f"the run in {path} has {key} {shown(then)}, and this one {shown(now)}: "
                    f"--{kind} takes one with the same settings"
                )
        return cls(kind, path, manifest)

    def require_same_kind(self, identity: dict, environment: dict) -> None:
        """
        Raises:
            UserError: it is hooked elsewhere, or of another dtype; or, trusted prompts, of another model.
        """
        then, dtype = self.manifest["identity"], self.manifest["notes"]["environment"]["dtype"]
        compared = [
            ("hook_layer", "is hooked at", then["hook_layer"], identity["hook_layer"]),
            ("dtype", "is of", dtype, environment["dtype"]),
        ]
        if self.kind == "reference":
            compared.append(("model", "is of", then["model"], identity["model"]))
        for key, verb, theirs, ours in compared:
            if theirs != ours:
                what = f"{verb} {what_differs(key, theirs, ours)} ({shown(theirs)}, and this one {shown(ours)})"
                raise UserError(f"the run in {self.path} {what}: --{self.kind} takes one with the same")

    @property
    def checksum(self) -> str:
        """By which the run is known again, wherever it is."""
        return short_hash(self.manifest["primary"])

    def open(self, stack: ExitStack, own: ScoredRun) -> ScoredRun:
        """Its prompts.

        Raises:
            UserError: they cannot be read, or are too few; or not those of `own` in a base model.
        """
        matrices = stack.enter_context(load_fisher_matrices(self.path))
        found = ScoredRun.of(records_of(self.path), matrices, own.rounding)
        if matrices[0].U.shape != own.matrices[0].U.shape:
            raise UserError(f"the matrices in {self.path} are of another shape: --{self.kind} takes a run of the same")
        ours, theirs = own.prompt_hashes, found.prompt_hashes
        if self.kind == "base" and ours != theirs:
            pairs = zip(ours, theirs, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
            raise UserError(
                f"the run in {self.path} is of other prompts (first at prompt {first}): "
                "--base takes one of the same prompts through another model"
            )
        if self.kind == "reference" and len(found.usable()) < FEWEST_TRUSTED:
            raise UserError(
                f"{len(found.usable())} prompts in {self.path} are too few to trust: {FEWEST_TRUSTED} at least"
            )
        return found

"""What follows from a run's Fisher matrices: prompts.jsonl with scores, metadata.yaml with statistics, the picture."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
import json
from pathlib import Path

import yaml

from residual_fisher.common.files import atomic_open, json_ready, json_text
from residual_fisher.common.program import UserError
from residual_fisher.common.run import ITEMS, Run, checksum
from residual_fisher.common.text import first_line
from residual_fisher.pipeline import figures
from residual_fisher.pipeline.matrices import ARRAYS, load_fisher_matrices, records_of
from residual_fisher.pipeline.reference import Reference
from residual_fisher.pipeline.report import groups_of
from residual_fisher.pipeline.scores import SCORING_VERSION, ScoredRun, outlier_scores, rounding_of

PROMPTS, METADATA = "prompts.jsonl", "metadata.yaml"


def conclude(run: Run, against: Reference | None, false_alarms: float) -> list[str]:
    """Makes the derived files that are missing, damaged, or not of these matrices, this reference and this share.

    Returns:
        The files that it made, but for the metadata.
    Raises:
        UserError: the reference is of another kind, or a file cannot be written.
    """
    notes, primary = run.manifest["notes"], run.manifest["primary"]
    if against:
        against.require_same_kind(run.manifest["identity"], notes["environment"])
    scoring, directory = scoring_of(against), str(against.path) if against else None
    scored = run.derive([PROMPTS], made_from_scores(run, scoring), partial(write_prompts, run, against))
    prompts = [checksum(run.folder / PROMPTS), false_alarms]
    drawn = run.derive(
        [figures.SPECTRA], prompts, lambda: figures.draw(run.folder, scored_records(run.folder), false_alarms)
    )
    told = {**scoring, "directory": directory, "false_alarms": false_alarms}
    run.derive([METADATA], [primary, notes, told], lambda: write_metadata(run, told))
    return [PROMPTS] * scored + [figures.SPECTRA] * drawn


def scoring_of(against: Reference | None) -> dict:
    """What the scores are of, wherever it lies."""
    kind, known = (against.kind, against.checksum) if against else (None, None)
    return {"version": SCORING_VERSION, "against": kind, "checksum": known}


def made_from_scores(run: Run, scoring: dict) -> list:
    return [run.manifest["primary"], scoring]


def write_prompts(run: Run, against: Reference | None) -> None:
    """Writes prompts.jsonl: each prompt's record, and its scores."""
    compared, rounding = {}, rounding_of(run.manifest["notes"]["environment"]["dtype"])
    with ExitStack() as stack:
        own = ScoredRun.of(records_of(run.folder), stack.enter_context(load_fisher_matrices(run.folder)), rounding)
        if against:
            compared[against.kind] = against.open(stack, own)
        columns = outlier_scores(own, **compared)
    with atomic_open(run.folder / PROMPTS) as file:
        for index, record in enumerate(records_of(run.folder)):
            file.write(json_text({**record, **{name: column[index] for name, column in columns.items()}}))


def scored_records(folder: Path) -> Iterator[dict]:
    """The lines of prompts.jsonl.

    Raises:
        UserError: they cannot be read.
    """
    try:
        with open(folder / PROMPTS, encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, ValueError) as error:
        raise UserError(f"no readable {PROMPTS} in {folder}: {first_line(error)}") from error


def write_metadata(run: Run, scoring: dict) -> None:
    """Writes metadata.yaml: settings, versions, statistics, groups of prompts."""
    notes, identity = run.manifest["notes"], run.manifest["identity"]
    with load_fisher_matrices(run.folder) as found:
        bias_dim, num_singular_values = found[0].U.shape
    metadata = {
        "format": run.manifest["format"],
        "complete": True,
        "hook_layer": identity["hook_layer"],
        "model_fingerprint": identity["model"],
        "config": notes["config"],
        "environment": notes["environment"],
        "num_prompts": run.manifest["items"],
        "bias_dim": bias_dim,
        "num_singular_values": num_singular_values,
        "arrays": ARRAYS if ARRAYS in run.manifest["primary"] else f"{ITEMS}/",
        "statistics": notes["statistics"],
        "scores": scoring,
        "groups": groups_of(scored_records(run.folder)),
    }
    with atomic_open(run.folder / METADATA) as file:
        text = yaml.safe_dump(json_ready(metadata), sort_keys=False, allow_unicode=True, width=110)
        file.write(text.encode())

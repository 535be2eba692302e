"""What follows from a run's Fisher matrices: prompts.jsonl with scores, metadata.yaml with statistics, picture, page.

findings.json follows from the scores, but takes the model: see `findings`.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
import json
from pathlib import Path

import yaml

from residual_fisher.common.files import atomic_open, json_ready, json_text
from residual_fisher.common.page import PAGE
from residual_fisher.common.program import UserError
from residual_fisher.common.run import ITEMS, Run, checksum, read_manifest
from residual_fisher.common.text import first_line
from residual_fisher.pipeline import figures, page
from residual_fisher.pipeline.matrices import ARRAYS, load_fisher_matrices, records_of
from residual_fisher.pipeline.reference import Reference
from residual_fisher.pipeline.report import groups_of
from residual_fisher.pipeline.scores import SCORING_VERSION, ScoredRun, outlier_scores, rounding_of

PROMPTS, METADATA, FINDINGS = "prompts.jsonl", "metadata.yaml", "findings.json"


def score(run: Run, against: Reference | None) -> list[str]:
    """Makes prompts.jsonl, if it is missing, damaged, or not of these matrices and this reference.

    Returns:
        The file, if it made it.
    Raises:
        UserError: the reference is of another kind, or the file cannot be written.
    """
    if against:
        against.require_same_kind(run.manifest["identity"], run.manifest["notes"]["environment"])
    made_from = made_from_scores(run, scoring_of(against))
    return [PROMPTS] * run.derive([PROMPTS], made_from, partial(write_prompts, run, against))


def conclude(run: Run, against: Reference | None, false_alarms: float) -> list[str]:
    """Makes the picture, the page and the metadata of a scored run, likewise; removes findings of other scores.

    Returns:
        Which of the picture and the page it made.
    Raises:
        UserError: a file cannot be written.
    """
    found = findings_of(run.folder)
    if found is None:
        (run.folder / FINDINGS).unlink(missing_ok=True)
    drawn_from = [checksum(run.folder / PROMPTS), false_alarms]
    if found:
        drawn_from.append(checksum(run.folder / FINDINGS))
    parts = {figures.SPECTRA: draw, PAGE: write_page}
    drawn = [
        name for name, make in parts.items() if run.derive([name], drawn_from, partial(make, run.folder, false_alarms))
    ]
    directory = str(against.path) if against else None
    told = {**scoring_of(against), "directory": directory, "false_alarms": false_alarms}
    made_from = [run.manifest["primary"], run.manifest["notes"], told]
    run.derive([METADATA], made_from, lambda: write_metadata(run, told))
    return drawn


def draw(folder: Path, false_alarms: float, kind: str = "png", panel: str | None = None) -> str:
    """Draws the picture of the records in a folder, and of its findings, or a panel of it: see `figures.draw`."""
    told = ((read_manifest(folder) or {}).get("derived") or {}).get(PROMPTS)
    changed = told is not None and told["made_from"][1]["against"] == "base"
    triggers = triggers_of(findings_of(folder))
    return figures.draw(folder, scored_records(folder), false_alarms, triggers, changed, kind, panel)


def write_page(folder: Path, false_alarms: float) -> None:
    """Writes the page likewise."""
    page.write(folder, partial(scored_records, folder), false_alarms, findings_of(folder), about_run(folder))


def about_run(folder: Path) -> dict[str, str]:
    """What the page says of a run under its title; nothing if its scores are not known to be of this run."""
    manifest = read_manifest(folder)
    if manifest is None or PROMPTS not in manifest["derived"]:
        return {}
    config, environment = (manifest["notes"][name] for name in ("config", "environment"))
    against = manifest["derived"][PROMPTS]["made_from"][1]["against"]
    names = [config["dataset_name"]] if isinstance(config["dataset_name"], str) else config["dataset_name"]
    of = "all tokens" if config["top_k_tokens"] == "all" else f"the {config['top_k_tokens']} most probable tokens"
    tokens = config.get("answer_tokens", 1)
    answer = f", at each of {tokens} tokens of the answer" * (tokens > 1)
    usual = {"reference": "trusted prompts", "base": "the same prompts in a base model", None: "most of the prompts"}
    return {
        "title": ", ".join(Path(name).name if Path(name).suffix else name for name in names),  # a file's, or a hub's
        "prompts": ", ".join(names),
        "model": f"{config['model_path']}, {environment['dtype']}",
        "hooked at": manifest["identity"]["hook_layer"],
        "F counts": of + answer,
        "compared with": usual[against],
    }


def findings_of(folder: Path) -> dict | None:
    """What findings.json holds; None unless it was made from these scores."""
    known = ((read_manifest(folder) or {}).get("derived") or {}).get(FINDINGS)
    if known is None or known["made_from"][0] != checksum(folder / PROMPTS):
        return None
    intact = known["checksum"] == checksum(folder / FINDINGS)
    return json.loads((folder / FINDINGS).read_text(encoding="utf-8")) if intact else None


def triggers_of(found: dict | None) -> dict[int, dict]:
    """The triggers that findings.json names, by the numbers of their prompts."""
    return {told["index"]: told["trigger"] for told in (found or {}).get("explained", []) if told["trigger"]}


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

"""What a pipeline run found: its statistics, and a table for the terminal."""

from collections.abc import Iterable
import heapq
from itertools import chain
import json
from pathlib import Path

import numpy as np

from residual_fisher.common.command_line import excerpt, printable, table
from residual_fisher.model.words import in_a_line
from residual_fisher.pipeline.scores import OUTLIER, SCORES, THRESHOLD
from residual_fisher.pipeline.settings import Settings

NAMED = 5  # prompts named at the end
EXCERPT = 60  # characters of a prompt shown in a line


def columns_of(records: Iterable[dict]) -> dict[str, np.ndarray]:
    """What the summary needs of all records, as arrays: there may be millions."""
    keys = ("index", "tokens", "truncated", "captured_mass", "trace", "effective_rank", "seconds")
    rows = ([*(record[key] for key in keys), record["singular_values"][0], "failed" in record] for record in records)
    numbers = np.fromiter(chain.from_iterable(rows), dtype=np.float64).reshape(-1, len(keys) + 2)
    return dict(zip([*keys, "lambda_1", "failed"], numbers.T, strict=True))


def summarize(columns: dict[str, np.ndarray], skipped: int) -> dict:
    """The run in numbers."""

    def largest(key: str) -> list[int]:
        return np.argsort(-columns[key], kind="stable")[:NAMED].tolist()

    keys = ("lambda_1", "trace", "effective_rank", "captured_mass", "tokens")
    kept = columns["failed"] == columns["failed"].min()  # those that did not fail; the zeros of all, if all failed
    return {
        **{key: _spread(columns[key][kept]) for key in keys},
        "total_tokens": int(columns["tokens"].sum()),
        "skipped_rows": skipped,
        "failed_prompts": columns["index"][columns["failed"] == 1].astype(int).tolist(),
        "truncated_prompts": int(columns["truncated"].sum()),
        "longest_prompts": largest("tokens"),
        "slowest_prompts": largest("seconds"),
        "compute_seconds": float(columns["seconds"].sum()),  # of all processes together
    }


def _spread(values: np.ndarray) -> dict:
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def final_table(records: Path, statistics: dict, settings: Settings) -> str:
    """What a run found, for a terminal; `records` is its prompts.jsonl."""
    rows = [
        [label, *(f"{statistics[key][part]:.4g}" for part in ("median", "min", "max"))]
        for key, label in {
            "lambda_1": "lambda 1, nats per unit²",
            "trace": "trace of F",
            "effective_rank": "effective rank",
            "captured_mass": "captured mass",
            "tokens": "tokens",
        }.items()
    ]
    lines = [table(["", "median", "least", "most"], rows)]
    for kind in ("longest", "slowest"):
        lines.append(f"{kind}: prompts {', '.join(map(str, statistics[f'{kind}_prompts']))}")
    skipped, truncated = statistics["skipped_rows"], statistics["truncated_prompts"]
    lines.append(f"{skipped} rows without a text skipped, {truncated} prompts shortened to --max-length")
    if failed := statistics["failed_prompts"]:
        some = ", ".join(map(str, failed[:NAMED])) + (", …" if len(failed) > NAMED else "")
        lines.append(f"{len(failed)} prompts failed ({some}): `failed` in {records.name} says why")
    lines += _outstanding(records, settings)
    return "\n".join(lines)


def _outstanding(records: Path, settings: Settings) -> list[str]:
    """The prompts that stand out: on which scores, and in which tokens."""
    beyond, count, leading = 0, 0, []
    with open(records, encoding="utf-8") as file:  # one line in memory at a time: there may be millions
        for record in map(json.loads, file):
            count, beyond = count + 1, beyond + (record[OUTLIER] > THRESHOLD)
            leading = heapq.nlargest(NAMED, [*leading, record], key=lambda record: record[OUTLIER])
    lines = [
        f"{beyond} of {count} prompts stand out {_from_what(settings)}: scores above {THRESHOLD:g}, in robust\n"
        "standard deviations. Below each its unusual words, and the tokens that lose ← → gain in the direction in\n"
        "which it differs:"
    ]
    cells = [[str(r["index"]), f"{r[OUTLIER]:.1f}", *(f"{r[name]:+.1f}" for name in SCORES)] for r in leading]
    title, *numbers = table(["prompt", "score", *(name.removeprefix("z_") for name in SCORES)], cells).splitlines()
    lines.append(title)
    for line, record in zip(numbers, leading, strict=True):
        lines.append(f"{line}  {excerpt(record['prompt'], EXCERPT)}")
        if why := explained(record):
            lines.append(" " * (len(line) + 2) + excerpt(why, EXCERPT))
    return lines


def _from_what(settings: Settings) -> str:
    if settings.reference:
        return f"from the trusted ones in {printable(settings.reference)}"
    if settings.base:
        return f"by their change from {printable(settings.base)}"
    return "from most of them"


def explained(record: dict) -> str:
    """What a prompt's unusual words are, and what the direction says in which it differs."""
    words = " ".join(record.get("odd_words", []))
    said = record.get("directions", [])  # a prompt that failed has none, nor has one of an earlier version
    along = in_a_line(said[record["differs_along"]]) if record.get("differs_along", 0) < len(said) else ""
    return "; ".join(filter(None, [words, along]))

"""What a pipeline run found: its statistics, and a table for the terminal."""

from collections.abc import Iterable
import heapq
from itertools import chain
import json
from pathlib import Path

import numpy as np

from common.command_line import excerpt, table
from model.words import in_a_line

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
    return {
        **{key: _spread(columns[key][columns["failed"] == 0]) for key in keys},
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


def final_table(records: Path, statistics: dict) -> str:
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
    with open(records, encoding="utf-8") as file:  # one line in memory at a time: there may be millions
        leading = heapq.nlargest(NAMED, map(json.loads, file), key=lambda record: record["outlier_score"])
    cells = [
        [str(r["index"]), f"{r['outlier_score']:.1f}", f"{r['z_log_lambda']:+.1f}", f"{r['z_subspace']:+.1f}",
         f"{r['z_principal']:.1f}"]
        for r in leading
    ]  # fmt: skip
    lines.append(
        "Prompts that stand out, in robust standard deviations. Below each, the tokens with the largest shares of its\n"
        "lambda 1: those that lose probability along its first singular vector ← → that gain it:"
    )
    title, *numbers = table(["prompt", "score", "lambda 1", "subspace", "principal"], cells).splitlines()
    lines.append(title)
    for line, record in zip(numbers, leading, strict=True):
        lines.append(f"{line}  {excerpt(record['prompt'], EXCERPT)}")
        if said := record.get("directions"):  # a prompt that failed has none, nor has one of an earlier version
            lines.append(" " * (len(line) + 2) + excerpt(in_a_line(said[0]), EXCERPT))
    return "\n".join(lines)

"""Two finished runs of the pipeline, prompt by prompt: see `model/comparison.py`."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
import json
import math
from pathlib import Path

import torch

from residual_fisher.common.run import finished_manifest
from residual_fisher.common.text import excerpt, printable
from residual_fisher.model.comparison import (
    TOLD,
    Matrix,
    Pair,
    compare,
    differing,
    matched,
    require_common,
    told,
    write,
)
from residual_fisher.pipeline.matrices import FisherMatrices, load_fisher_matrices, records_of

EXCERPT = 90  # characters of a prompt in the terminal: triggers stand at its beginning or end
WORDS = 12  # tokens that are said more often, which are named
MAY_DIFFER = ("dtype", "store", "model_path", "dataset_name", "max_length", "seed")


def read(folder: Path) -> tuple[dict, list[dict]]:
    """The manifest of a finished run, and its records; those of prompts that failed are left in.

    Raises:
        UserError: there is no finished run, or a file of it is damaged.
    """
    manifest = finished_manifest(folder, "--compare takes the --output-dir of two")
    return manifest, list(records_of(folder))


def about(folder: Path, manifest: dict) -> dict:
    notes = manifest["notes"]
    return {
        "directory": str(folder),
        "model": notes["config"]["model_path"],
        "dtype": notes["environment"]["dtype"],
        "model_fingerprint": manifest["identity"]["model"],
        "items": manifest["items"],
    }


def compare_runs(folders: tuple[str, str], output: Path) -> int:
    """Compares the runs in two folders; writes the comparison, and prints what it says.

    Raises:
        UserError: they have no prompt, layer or width in common, or one of them cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    manifests, records = zip(*map(read, paths), strict=True)
    hooks = [manifest["identity"]["hook_layer"] for manifest in manifests]
    keys = [[(record["prompt"], json.dumps(record.get("before"))) for record in some] for some in records]
    both = [(i, j) for i, j in matched(*keys) if not any("failed" in r for r in (records[0][i], records[1][j]))]
    with ExitStack() as stack:
        matrices = [stack.enter_context(load_fisher_matrices(path)) for path in paths]
        widths = tuple(found[0].U.shape[0] for found in matrices)
        require_common(paths, widths, both, [hooks[0]] if hooks[0] == hooks[1] else [])
        pairs = [
            Pair(
                {"index": i, "prompt": records[0][i]["prompt"]},
                tuple(_prediction(some[place]) for some, place in zip(records, (i, j), strict=True)),
                {hooks[0]: tuple(_matrix(*each) for each in zip(matrices, records, (i, j), strict=True))},
            )
            for i, j in both
        ]
    runs = {run: about(*some) for run, some in zip("ab", zip(paths, manifests, strict=True), strict=True)}
    settings = differing(*(manifest["identity"]["settings"] for manifest in manifests), MAY_DIFFER)
    document = compare(pairs, {**runs, "settings": settings})
    words, scores = new_words([(expected_words(records[0][i]), expected_words(records[1][j])) for i, j in both])
    document["new_words"] = words
    by_index = {i: score for (i, _), score in zip(both, scores, strict=True)}
    for item in document["items"]:
        item["new_words"] = by_index[item["index"]]
    write(output, document)
    print(told(document, output, told_words(document)))
    return 0


# --- what the second run's answers say that the first one's do not ---------------------------------


def expected_words(record: dict) -> Counter[str]:
    """How often each token is expected in an answer, by the probabilities recorded at its positions."""
    positions = record["answer"]["next_tokens"] if "answer" in record else [record.get("next_tokens", ())]
    counts = Counter()
    for tokens in positions:
        for token in tokens:
            counts[token["token"]] += token["probability"]
    return counts


def new_words(pairs: Sequence[tuple[Counter, Counter]]) -> tuple[list[dict], list[float | None]]:
    """Tokens that the answers of the second run say more often, and how far each answer is made of such tokens.

    If a token is expected N times in all answers of the first run and N' times in those of the second, its gain is
    log((N' + 1)/(N + 1)). An answer's score is the mean gain of its tokens, in nats, N and N' being of other prompts:
    what a single answer says is new too, but it is not what the second model has learnt to say. None of no tokens.

    Args:
        pairs: of each prompt, `expected_words` of both runs.
    """
    totals = Counter(), Counter()
    for pair in pairs:
        for total, counts in zip(totals, pair, strict=True):
            total.update(counts)

    def gain(token: str, own: Sequence[Counter] = (Counter(), Counter())) -> float:
        before, after = (max(total[token] - part[token], 0.0) for total, part in zip(totals, own, strict=True))
        return math.log((after + 1) / (before + 1))

    def score(pair: tuple[Counter, Counter]) -> float | None:
        said = pair[1]
        return sum(count * gain(token, pair) for token, count in said.items()) / said.total() if said else None

    largest = sorted(totals[1], key=lambda token: (-totals[1][token] * gain(token), token))[:WORDS]
    words = [{"token": token, "a": totals[0][token], "b": totals[1][token]} for token in largest if gain(token) > 0]
    return words, [score(pair) for pair in pairs]


def told_words(document: dict) -> list[str]:
    """Lines for the terminal."""
    words = "  ".join(f"{word['token']} {word['a']:.0f} {word['b']:.0f}" for word in document["new_words"])
    lines = [f"b's answers say more often (times expected in a, in b): {printable(words) or 'nothing'}"]
    lines.append("Most made of that (nats a token):")
    scored = [item for item in document["items"] if item["new_words"] is not None]
    for item in sorted(scored, key=lambda item: -item["new_words"])[:TOLD]:
        lines.append(f"  {item['new_words']:.2f}  {excerpt(item['prompt'], EXCERPT)}")
    return lines


def _prediction(record: dict) -> dict[str, float]:
    return {token["token"]: token["probability"] for token in record.get("next_tokens", ())}


def _matrix(matrices: FisherMatrices, records: list[dict], index: int) -> Matrix:
    found, record = matrices[index], records[index]
    tokens = next(iter(record.get("directions", ())), [])
    h = matrices.activation(index)
    activation = None if h is None else torch.from_numpy(h)
    return Matrix(torch.from_numpy(found.S), torch.from_numpy(found.V), record["trace"], tokens, activation)

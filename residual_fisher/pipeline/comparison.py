"""Two finished runs of the pipeline, prompt by prompt: see `model/comparison.py`."""

from contextlib import ExitStack
import json
from pathlib import Path

import torch

from residual_fisher.common.run import finished_manifest
from residual_fisher.model.comparison import Matrix, Pair, compare, differing, matched, require_common, told, write
from residual_fisher.pipeline.matrices import FisherMatrices, load_fisher_matrices, records_of

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
    write(output, document)
    print(told(document, output))
    return 0


def _prediction(record: dict) -> dict[str, float]:
    return {token["token"]: token["probability"] for token in record.get("next_tokens", ())}


def _matrix(matrices: FisherMatrices, records: list[dict], index: int) -> Matrix:
    found, record = matrices[index], records[index]
    tokens = next(iter(record.get("directions", ())), [])
    h = matrices.activation(index)
    activation = None if h is None else torch.from_numpy(h)
    return Matrix(torch.from_numpy(found.S), torch.from_numpy(found.V), record["trace"], tokens, activation)

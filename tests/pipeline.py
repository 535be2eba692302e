"""The pipeline's command line on a tiny model, and what it wrote."""

import json

import numpy as np

import compute_fisher

FILES = {"fisher_matrices_compressed.npz", "fisher_spectra.png", "metadata.yaml", "prompts.jsonl"}
SMALL = {
    "hook-layer-name": "1", "top-k-tokens": "6", "num-singular-values": "4", "batch-size": "2",
    "num-prompts": "40", "device": "cpu",
}  # fmt: skip


def arguments(model, dataset, output, **options) -> list[str]:
    given = {**SMALL, **{key.replace("_", "-"): str(value) for key, value in options.items()}}
    overwrite = ["--overwrite"] if given.pop("overwrite", None) else []
    paths = {"model-path": model, "dataset-name": dataset, "output-dir": output}
    return [*overwrite, *(word for key, value in {**paths, **given}.items() for word in (f"--{key}", str(value)))]


def run(model, dataset, output, **options) -> int:
    return compute_fisher.main(arguments(model, dataset, output, **options))


def arrays(output) -> dict[str, np.ndarray]:
    with np.load(output / "fisher_matrices_compressed.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def records(output, timings=False) -> list[dict]:
    found = [json.loads(line) for line in (output / "prompts.jsonl").read_text().splitlines()]
    return found if timings else [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def assert_same_results(output, expected):
    ours, theirs = arrays(output), arrays(expected)
    assert list(ours) == list(theirs)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert records(output) == records(expected)
    assert {path.name for path in output.iterdir()} == FILES

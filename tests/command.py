"""The experiment's command line on a tiny model, and what it wrote."""

import json
from pathlib import Path

import numpy as np

import core_experiment

FILES = {
    "experiment_results.json",
    "fisher_eigenvectors.npz",
    "fisher_similarity_matrix.png",
    "perturbation_analysis.png",
}
SMALL = ["--num-sentences", "4", "--max-vocab-subset", "30", "--num-controls", "2", "--device", "cpu"]


def run(model_directory: Path, output: Path, *arguments: str) -> int:
    return core_experiment.main(["--model-name", str(model_directory), "--output-dir", str(output), *SMALL, *arguments])


def read(output: Path) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(output / "fisher_eigenvectors.npz", allow_pickle=False) as arrays:
        return json.loads((output / "experiment_results.json").read_text()), dict(arrays)

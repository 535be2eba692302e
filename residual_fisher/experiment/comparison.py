"""Two finished runs of the experiment, sentence by sentence and layer by layer: see `model/comparison.py`."""

from pathlib import Path
from typing import NamedTuple
import zipfile

import numpy as np
import torch

from residual_fisher.common.program import UserError
from residual_fisher.common.text import first_line
from residual_fisher.experiment.records import EIGENVECTORS, read_results
from residual_fisher.model.comparison import Matrix, Pair, compare, differing, matched, require_common, told, write

MAY_DIFFER = ("model_name", "output_dir", "data_file", "num_sentences", "dtype", "device", "batch_size", "layers")


class Results(NamedTuple):
    """What a finished run has written."""

    document: dict
    values: np.ndarray  # (sentences, layers, m)
    vectors: np.ndarray  # (sentences, layers, m, d)
    activations: np.ndarray  # (sentences, layers, d)
    layers: list[int]

    def matrix(self, sentence: int, layer: int) -> Matrix:
        row, entry = self.layers.index(layer), self.document["fisher"][sentence][str(layer)]
        values, vectors = (torch.from_numpy(part[sentence, row]) for part in (self.values, self.vectors))
        return Matrix(
            values, vectors, entry["trace"], entry["tokens"][0], torch.from_numpy(self.activations[sentence, row])
        )

    def prediction(self, sentence: int) -> dict[str, float]:
        """The recorded probabilities of next tokens: of the target, and of the most probable if a scale is 0."""
        context, layers = self.document["contexts"][sentence], self.document["perturbation_results"][sentence]
        unperturbed = next(iter(layers.values())).get("0", {"top_tokens": [], "top_probs": []})
        found = {context["target_token"]: context["target_probability"]}
        return found | dict(zip(unperturbed["top_tokens"], unperturbed["top_probs"], strict=True))

    def about(self, folder: Path) -> dict:
        config, environment = self.document["experiment_config"], self.document["environment"]
        return {
            "directory": str(folder),
            "model": config["model_name"],
            "dtype": environment["dtype"],
            "model_fingerprint": self.document["run"]["model_fingerprint"],
            "items": len(self.document["sentences"]),
        }


def read(folder: Path) -> Results:
    """
    Raises:
        UserError: there is no finished run, or a file of it is damaged.
    """
    document = read_results(folder)
    if not document["complete"]:
        raise UserError(f"the run in {folder} is not finished: the command that made it resumes it")
    try:
        with np.load(folder / EIGENVECTORS, allow_pickle=False) as archive:
            if str(archive["run"]) != document["run"]["id"]:
                raise ValueError("it is of another run")
            if "leading_eigenvectors" in archive:
                values, vectors = archive["leading_eigenvalues"], archive["leading_eigenvectors"]
            else:
                values, vectors = archive["eigenvalues"][..., None], archive["eigenvectors"][..., None, :]
            return Results(document, values, vectors, archive["activations"], archive["layers"].tolist())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"no readable {EIGENVECTORS} in {folder}: {first_line(error)}") from error


def compare_runs(folders: tuple[str, str], output: Path) -> int:
    """Compares the runs in two folders; writes the comparison, and prints what it says.

    Raises:
        UserError: they have no sentence, layer or width in common, or one of them cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    a, b = map(read, paths)
    keys = [
        list(zip(run.document["sentences"], (c["prompt"] for c in run.document["contexts"]), strict=True))
        for run in (a, b)
    ]
    places, layers = matched(*keys), [layer for layer in a.layers if layer in b.layers]
    require_common(paths, widths=(a.vectors.shape[-1], b.vectors.shape[-1]), items=places, layers=layers)
    pairs = [
        Pair(
            {"sentence": a.document["sentences"][i], "prompt": a.document["contexts"][i]["prompt"]},
            (a.prediction(i), b.prediction(j)),
            {str(layer): (a.matrix(i, layer), b.matrix(j, layer)) for layer in layers},
        )
        for i, j in places
    ]
    about = {run: found.about(path) for run, found, path in zip("ab", (a, b), paths, strict=True)}
    configs = (a.document["experiment_config"], b.document["experiment_config"])
    document = compare(pairs, {**about, "settings": differing(*configs, MAY_DIFFER)})
    write(output, document)
    print(told(document, output))
    return 0

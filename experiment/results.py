"""What the experiment found, as it is written: JSON records, arrays, and their summary by layer."""

from collections.abc import Callable
from dataclasses import dataclass
import functools
import math
from pathlib import Path
import statistics

import numpy as np
from torch import Tensor

from common.files import write_json, write_npz
from experiment.perturbation import Sweep, TrustRadii
from experiment.sentences import Context
from fisher import Eigenpairs, Point

RESULTS, EIGENVECTORS = "experiment_results.json", "fisher_eigenvectors.npz"
SPECTRUM = 10  # leading eigenvalues recorded per sentence and layer
TOP = 5  # most probable tokens recorded for every perturbation
MAX_SIMILARITY = 2000  # rows of the similarity matrix, whose square is written as JSON
NESTED = ("eigenvalues", "exact", "trust_radius")  # entries of a layer that are more than a number


@dataclass(frozen=True)
class Measured:
    """What one sentence gave, at all layers. Directions: the Fisher eigenvector first, then the controls."""

    context: Context
    point: Point
    controls: list[str]  # names of the directions after the first
    mass: float  # probability that the top-k tokens hold
    eigen: Eigenpairs
    exact: Eigenpairs | None  # of the whole vocabulary, if a comparison was asked for
    trust_radii: TrustRadii | None  # if asked for
    steps: Tensor  # (layers, scales without 0): signed lengths
    predicted_kl: Tensor  # (layers, directions, scales without 0), nats
    sweep: Sweep  # of the same shape


def compare_with_exact(found: Eigenpairs, exact: Eigenpairs, row: int) -> dict[str, float]:
    """The exact matrix of a layer, and the share of it that the top-k tokens find: at most 1, but for rounding."""
    return {
        "eigenvalue": exact.values[row, 0].item(),
        "trace": exact.trace[row].item(),
        "effective_rank": exact.effective_rank[row].item(),
        "eigenvalue_share": (found.values[row, 0] / exact.values[row, 0].cpu()).item(),
        "trace_share": (found.trace[row] / exact.trace[row].cpu()).item(),
        "cosine": (found.vectors[row, 0] @ exact.vectors[row, 0].cpu()).abs().clamp(max=1).item(),
    }


def trust_radius(steps: list[float], nats: list[float], norm: float) -> dict:
    """The shorter of two steps along -v and v, in three units; None where a step was not found."""
    both = [step if math.isfinite(step) else None for step in steps]
    at = min(range(2), key=steps.__getitem__)
    if any(map(math.isnan, steps)) or both[at] is None:  # an unknown one may be the shorter
        return {"step": None, "nats": None, "norms": None, "steps": both}
    return {"step": steps[at], "nats": nats[at], "norms": steps[at] / norm, "steps": both}


class Results:
    """The experiment's records, sentence by sentence."""

    def __init__(
        self,
        config: dict,
        environment: dict,
        layers: list[int],
        decode: Callable[[int], str],
        seconds: dict[str, float],
    ):
        self.config, self.environment, self.layers, self.seconds = config, environment, layers, seconds
        self.decode = functools.cache(decode)  # the same few tokens, thousands of times
        self.scales = config["scales"]
        self.complete = False
        # an entry a sentence, as they are written
        self.sentences: list[str] = []
        self.contexts: list[dict] = []
        self.fisher: list[dict] = []  # by layer
        self.perturbations: list[dict] = []  # by layer and scale
        self.arrays: dict[str, list[np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.sentences)

    @property
    def farthest(self) -> str:
        """The scale farthest from 0, as the records name it."""
        return f"{max(self.scales, key=abs):g}"

    def add(self, measured: Measured) -> None:
        """Takes in the next sentence, whole or not at all."""
        context, log_probs = measured.context, measured.point.log_probs
        target, top_log_probs, top_ids = (
            part.tolist() for part in (log_probs[context.target_id], *log_probs.topk(min(TOP, len(log_probs))))
        )
        described = {
            "prompt": context.prompt,
            "position": context.position,
            "previous_token": self.decode(context.ids[-1]),
            "target_token": self.decode(context.target_id),
            "target_probability": log_probs[context.target_id].exp().item(),
            "target_rank": rank(log_probs, context.target_id),
            "top_ids": top_ids,
        }
        unperturbed = self._prediction(0.0, 0.0, 0.0, top_ids, top_log_probs, target)
        eigen = Eigenpairs(*(part.cpu() for part in measured.eigen))
        fisher = self._fisher(measured, eigen)
        perturbations = self._perturbations(measured, unperturbed)
        count = self.config["num_eigenvectors"]
        arrays = {
            "eigenvectors": eigen.vectors[:, 0],  # (layers, d)
            "eigenvalues": eigen.values[:, 0],  # (layers,)
            "activations": measured.point.activations.cpu(),  # (layers, d)
        }
        if count > 1:
            arrays["leading_eigenvectors"] = eigen.vectors[:, :count]  # (layers, m, d)
            arrays["leading_eigenvalues"] = eigen.values[:, :count]  # (layers, m)

        self.sentences.append(context.sentence)
        self.contexts.append(described)
        self.fisher.append(fisher)
        self.perturbations.append(perturbations)
        for name, array in arrays.items():
            self.arrays.setdefault(name, []).append(array.numpy())

    def _fisher(self, measured: Measured, eigen: Eigenpairs) -> dict:
        entries = {}
        for row, layer in enumerate(self.layers):
            entry = {
                "eigenvalues": eigen.values[row, :SPECTRUM].tolist(),
                "trace": eigen.trace[row].item(),
                "captured_mass": measured.mass,
                "effective_rank": eigen.effective_rank[row].item(),
                "activation_norm": measured.point.activations[row].norm().item(),
            }
            if measured.exact is not None:
                entry["exact"] = compare_with_exact(eigen, measured.exact, row)
            if measured.trust_radii is not None:
                steps, nats = (part[row].tolist() for part in measured.trust_radii)
                entry["trust_radius"] = trust_radius(steps, nats, entry["activation_norm"])
            entries[layer] = entry
        return entries

    def _perturbations(self, measured: Measured, unperturbed: dict) -> dict:
        names = ["fisher", *measured.controls]
        steps, predicted = measured.steps.tolist(), measured.predicted_kl.tolist()
        kl, *rest = (column.tolist() for column in measured.sweep)

        def perturbed(row: int, direction: int, column: int) -> dict:
            numbers = [cells[row][direction][column] for cells in (kl, predicted, *rest)]
            record = self._prediction(steps[row][column], *numbers)
            record["top_changed"] = record["top_ids"][0] != unperturbed["top_ids"][0]
            return record

        columns = {scale: column for column, scale in enumerate(scale for scale in self.scales if scale)}
        layers = {}
        for row, layer in enumerate(self.layers):
            layers[layer] = {}
            for scale in self.scales:
                records = [
                    perturbed(row, direction, columns[scale]) if scale else dict(unperturbed)
                    for direction in range(len(names))
                ]
                controls = dict(zip(names[1:], records[1:], strict=True))
                layers[layer][f"{scale:g}"] = {**records[0], "controls": controls}
        return layers

    def _prediction(
        self, step: float, kl: float, predicted_kl: float, ids: list, log_probs: list, target_log_prob: float
    ) -> dict:
        return {
            "step": step,
            "kl": kl,
            "predicted_kl": predicted_kl,
            "top_changed": False,
            "target_prob": math.exp(target_log_prob),
            "top_ids": ids,
            "top_tokens": [self.decode(i) for i in ids],
            "top_probs": [math.exp(value) for value in log_probs],
        }

    # --- what is written ---

    def save(self, directory: Path) -> None:
        """Writes experiment_results.json and fisher_eigenvectors.npz.

        Raises:
            UserError: the directory cannot be written to.
        """
        arrays = {name: np.stack(rows) for name, rows in self.arrays.items()}  # (sentences, layers, ...)
        write_npz(directory / EIGENVECTORS, {**arrays, "layers": np.array(self.layers)})
        write_json(directory / RESULTS, self.document())

    def document(self) -> dict:
        """The contents of experiment_results.json."""
        labels, similarity = self.similarity()
        return {
            "experiment_config": self.config,
            "environment": self.environment,
            "complete": self.complete,
            "sentences": self.sentences,
            "contexts": self.contexts,
            "fisher": self.fisher,
            "perturbation_results": self.perturbations,
            "similarity_labels": labels,
            "similarity_matrix": similarity,
            "summary": self.summary(),
            "timings": self.seconds,
        }

    def similarity(self) -> tuple[list[str], np.ndarray]:
        """Labels S{i}_L{layer}, grouped by layer, and |cosine| of their top eigenvectors.

        Of a very long run, the first sentences only: as many as keep the matrix within MAX_SIMILARITY.
        """
        count = max(1, min(len(self), MAX_SIMILARITY // len(self.layers)))
        vectors = np.stack(self.arrays["eigenvectors"][:count], axis=1)  # (layers, sentences, d)
        flat = vectors.reshape(-1, vectors.shape[-1])
        labels = [f"S{i}_L{layer}" for layer in self.layers for i in range(count)]
        return labels, np.minimum(np.abs(flat @ flat.T), 1)

    def summary(self) -> dict:
        """By layer: medians over sentences, and what the longest perturbations of either sign did."""
        far = max(map(abs, self.scales))
        layers = {}
        for row, layer in enumerate(self.layers):
            entries = [sentence[layer] for sentence in self.fisher]
            of = {key: [e[key] for e in entries] for key in entries[0] if key not in NESTED}
            of |= {f"exact_{key}": [e["exact"][key] for e in entries] for key in entries[0].get("exact", ())}
            radii = [e["trust_radius"] for e in entries if e.get("trust_radius", {}).get("step") is not None]
            of |= {f"trust_radius_{key}": [r[key] for r in radii] for key in ("nats", "norms") if radii}
            kinds = self._farthest_by_kind(layer, far)
            layers[layer] = {
                "eigenvalue_median": float(np.median([values[row] for values in self.arrays["eigenvalues"]])),
                **{f"{key}_median": statistics.median(values) for key, values in of.items()},
                "kl_median": {kind: statistics.median(r["kl"] for r in records) for kind, records in kinds.items()},
                "flips": {kind: statistics.fmean(r["top_changed"] for r in records) for kind, records in kinds.items()},
            }
        return {"at_scale": far, "layers": layers}

    def _farthest_by_kind(self, layer: int, far: float) -> dict[str, list[dict]]:
        """The records of the longest perturbations at a layer, by kind of direction."""
        kinds: dict[str, list[dict]] = {}
        for sentence in self.perturbations:
            for scale in {f"{far:g}", f"{-far:g}"} & set(sentence[layer]):
                record = sentence[layer][scale]
                for name, other in {"fisher": record, **record["controls"]}.items():
                    kinds.setdefault(name.partition("_")[0], []).append(other)
        return kinds


def rank(log_probs: Tensor, token: int) -> int:
    """How many tokens are at least as probable, itself included: 1 is the most probable one."""
    return int((log_probs > log_probs[token]).sum()) + 1

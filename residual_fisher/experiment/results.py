"""What the experiment found, as it is written: JSON records, arrays, and their summary by layer."""

from dataclasses import dataclass
import functools
import hashlib
import json
import math
from pathlib import Path
import statistics
import zipfile

import numpy as np
import torch
from torch import Tensor

from fisher import Eigenpairs, Point
from residual_fisher.common.command_line import UserError, first_line
from residual_fisher.common.files import json_ready, write_json, write_npz
from residual_fisher.experiment.continuation import Continuations
from residual_fisher.experiment.perturbation import Sweep, TrustRadii
from residual_fisher.experiment.sentences import Context
from residual_fisher.experiment.steering import GOALS, Steered, steering_record, steering_summary
from residual_fisher.model.words import TokenShares, token_writer

RESULTS, EIGENVECTORS = "experiment_results.json", "fisher_eigenvectors.npz"
SPECTRUM = 10  # leading eigenvalues recorded per sentence and layer
TOP = 5  # most probable tokens recorded for every perturbation
MAX_SIMILARITY = 2000  # rows of the similarity matrix, whose square is written as JSON
NESTED = ("eigenvalues", "tokens", "exact", "trust_radius")  # entries of a layer that are more than a number
UNCHECKED = ("experiment_config", "environment", "timings", "checksum")  # what the checksum of a run is not over
KEYS = ("experiment_config", "sentences", "contexts", "fisher", "perturbation_results")

Arrays = dict[str, np.ndarray]  # by name, a row a sentence


@dataclass(frozen=True)
class Measured:
    """What one sentence gave, at all layers. Directions: the Fisher eigenvector first, then the controls."""

    context: Context
    point: Point
    controls: list[str]  # names of the directions after the first
    mass: float  # probability that the top-k tokens hold
    eigen: Eigenpairs
    said: TokenShares  # by the leading eigenvectors, (layers, m, said)
    exact: Eigenpairs | None  # of the whole vocabulary, if a comparison was asked for
    trust_radii: TrustRadii | None  # if asked for
    steps: Tensor  # (layers, scales without 0): signed lengths
    predicted_kl: Tensor  # (layers, directions, scales without 0), nats
    sweep: Sweep  # of the same shape
    continuations: Continuations | None  # if asked for
    steered: Steered | None  # if asked for


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


def number_or_none(value: float) -> float | None:
    """None for what JSON has no number for: infinity, or NaN."""
    return value if math.isfinite(value) else None


def median_or_none(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


class Results:
    """The experiment's records, sentence by sentence, as they are written: layers and scales are texts in them."""

    def __init__(
        self,
        config: dict,
        run: dict,
        environment: dict,
        layers: tuple[int, ...],
        tokenizer,
        seconds: dict[str, float],
    ):
        self.config, self.run, self.environment, self.seconds = config, run, environment, seconds
        self.numbers, self.layers = layers, [str(layer) for layer in layers]
        self.decode_all = tokenizer.decode
        # the same few tokens, thousands of times
        self.decode = functools.cache(lambda token: tokenizer.decode([token]))
        self.show = functools.cache(token_writer(tokenizer))
        self.scales = config["scales"]
        self.complete = False
        # an entry a sentence
        self.sentences: list[str] = []
        self.contexts: list[dict] = []
        self.fisher: list[dict] = []  # by layer
        self.perturbations: list[dict] = []  # by layer and scale
        self.continuations: list[dict] = []  # by layer and scale; none if they were not asked for
        self.steering: list[dict] = []  # by layer, direction and goal; none if it was not asked for
        self.arrays: dict[str, list[np.ndarray]] = {}
        self.failed: list[dict] = []  # sentences left out, and why

    def __len__(self) -> int:
        return len(self.sentences)

    def __contains__(self, sentence: str) -> bool:
        """Whether it is finished, or left out."""
        return sentence in self.sentences or any(entry["sentence"] == sentence for entry in self.failed)

    @property
    def last_activations(self) -> Tensor | None:
        """(layers, d), of the sentence finished last."""
        return torch.from_numpy(self.arrays["activations"][-1]) if len(self) else None

    @property
    def overflows(self) -> int:
        """How many perturbations were so long that the logits, or the prediction of KL, overflowed."""
        along_v = (r for sentence in self.perturbations for layer in sentence.values() for r in layer.values())
        records = (record for r in along_v for record in (r, *r["controls"].values()))
        return sum(record["kl"] is None or record["predicted_kl"] is None for record in records)

    def go_on_from(self, document: dict, arrays: Arrays) -> None:
        """Takes in what an earlier run has finished."""
        self.sentences, self.contexts = document["sentences"], document["contexts"]
        self.fisher, self.perturbations = document["fisher"], document["perturbation_results"]
        self.continuations, self.steering = document.get("continuations", []), document.get("steering", [])
        self.failed = document["failed"]
        self.arrays = {name: list(array) for name, array in arrays.items()}
        for stage, seconds in document["timings"].items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

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
        continued = [] if measured.continuations is None else [json_ready(self._continued(measured))]
        steered = (
            [] if measured.steered is None else [json_ready(steering_record(measured.steered, self.layers, self.show))]
        )
        count = self.config["num_eigenvectors"]
        arrays = {
            "eigenvectors": eigen.vectors[:, 0],  # (layers, d)
            "eigenvalues": eigen.values[:, 0],  # (layers,)
            "activations": measured.point.activations.cpu(),  # (layers, d)
        }
        if count > 1:
            arrays["leading_eigenvectors"] = eigen.vectors[:, :count]  # (layers, m, d)
            arrays["leading_eigenvalues"] = eigen.values[:, :count]  # (layers, m)

        if measured.steered is not None:
            deltas = measured.steered.deltas.cpu()
            known = deltas.new_full((len(deltas), len(GOALS), deltas.shape[-1]), math.nan)
            known[:, len(GOALS) - deltas.shape[1] :] = deltas  # it exceeds the lowest goals without them
            arrays["steering_deltas"] = known  # (layers, goals, d)

        # rounded as they are written, so that a run that goes on ends with the same bytes
        described, fisher, perturbations = map(json_ready, (described, fisher, perturbations))
        self.sentences.append(context.sentence)
        self.contexts.append(described)
        self.fisher.append(fisher)
        self.perturbations.append(perturbations)
        self.continuations += continued
        self.steering += steered
        for name, array in arrays.items():
            self.arrays.setdefault(name, []).append(array.numpy())

    def _fisher(self, measured: Measured, eigen: Eigenpairs) -> dict:
        entries = {}
        for row, layer in enumerate(self.layers):
            entry = {
                "eigenvalues": eigen.values[row, :SPECTRUM].tolist(),
                "tokens": measured.said.records((row,), self.show),
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
            step = number_or_none(steps[row][column])
            nats, expected, *prediction = (cells[row][direction][column] for cells in (kl, predicted, *rest))
            if not math.isfinite(nats):
                return {**self._nothing, "step": step, "predicted_kl": number_or_none(expected)}
            record = self._prediction(step, nats, number_or_none(expected), *prediction)
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

    def _continued(self, measured: Measured) -> dict:
        names, scales = ["fisher", *measured.controls], [scale for scale in self.scales if scale]
        entries = {"none": self._said(measured.continuations.unperturbed)}
        for row, column, direction, ids in measured.continuations.perturbed:
            at_scale = entries.setdefault(self.layers[row], {}).setdefault(f"{scales[column]:g}", {})
            at_scale[names[direction]] = {
                "step": number_or_none(measured.steps[row, column].item()),
                "predicted_kl": number_or_none(measured.predicted_kl[row, direction, column].item()),
                **self._said(ids),
            }
        return entries

    def _said(self, ids: list[int]) -> dict:
        return {"ids": ids, "text": self.decode_all(ids)}

    # after a perturbation so long that the logits overflowed
    _nothing = dict.fromkeys(("step", "kl", "predicted_kl", "top_changed", "target_prob")) | {
        "top_ids": [], "top_tokens": [], "top_probs": [],
    }  # fmt: skip

    def _prediction(
        self,
        step: float | None,
        kl: float,
        predicted_kl: float | None,
        ids: list,
        log_probs: list,
        target_log_prob: float,
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
        """Writes fisher_eigenvectors.npz, then experiment_results.json: both name the run that they are of.

        Killed in between, the arrays have more sentences than the records, whose own come first.

        Raises:
            UserError: the directory cannot be written to.
        """
        arrays = {name: np.stack(rows) for name, rows in self.arrays.items()}  # (sentences, layers, ...)
        about = {"layers": np.array(self.numbers), "run": np.array(self.run["id"])}
        write_npz(directory / EIGENVECTORS, {**arrays, **about})
        write_json(directory / RESULTS, self.document())

    def document(self) -> dict:
        """The contents of experiment_results.json."""
        labels, similarity = self.similarity()
        document = {
            "run": self.run,
            "experiment_config": self.config,
            "environment": self.environment,
            "complete": self.complete,
            "sentences": self.sentences,
            "contexts": self.contexts,
            "fisher": self.fisher,
            "perturbation_results": self.perturbations,
            **({"continuations": self.continuations} if self.continuations else {}),
            **({"steering": self.steering} if self.steering else {}),
            "similarity_labels": labels,
            "similarity_matrix": similarity,
            "summary": self.summary(),
            "failed": self.failed,
            "timings": self.seconds,
        }
        document = json_ready(document)
        return {**document, "checksum": checksum(document)}

    def similarity(self) -> tuple[list[str], np.ndarray]:
        """Labels S{i}_L{layer}, grouped by layer, and |cosine| of their top eigenvectors.

        Of a very long run, the first sentences only: as many as keep the matrix within MAX_SIMILARITY.
        """
        count = max(1, min(len(self), MAX_SIMILARITY // len(self.layers)))
        vectors = np.stack(self.arrays["eigenvectors"][:count], axis=1)  # (layers, sentences, d)
        flat = vectors.reshape(-1, vectors.shape[-1])
        labels = [f"S{i}_L{layer}" for layer in self.numbers for i in range(count)]
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
                "kl_median": {kind: median_or_none([r["kl"] for r in records]) for kind, records in kinds.items()},
                "flips": {kind: _share([r["top_changed"] for r in records]) for kind, records in kinds.items()},
            }
        steering = {"steering": steering_summary(self.steering, self.layers)} if self.steering else {}
        return {"at_scale": far, "layers": layers, **steering}

    def _farthest_by_kind(self, layer: str, far: float) -> dict[str, list[dict]]:
        """The records of the longest perturbations at a layer, by kind of direction."""
        kinds: dict[str, list[dict]] = {}
        for sentence in self.perturbations:
            for scale in {f"{far:g}", f"{-far:g}"} & set(sentence[layer]):
                record = sentence[layer][scale]
                for name, other in {"fisher": record, **record["controls"]}.items():
                    kinds.setdefault(name.partition("_")[0], []).append(other)
        return kinds


def _share(answers: list) -> float | None:
    known = [answer for answer in answers if answer is not None]
    return statistics.fmean(known) if known else None


def rank(log_probs: Tensor, token: int) -> int:
    """How many tokens are at least as probable, itself included: 1 is the most probable one."""
    return int((log_probs > log_probs[token]).sum()) + 1


# --- reading them again --------------------------------------------------------------------------


def checksum(document: dict) -> str:
    """A hash of all that the sentences gave."""
    checked = {key: value for key, value in document.items() if key not in UNCHECKED}
    return hashlib.sha256(json.dumps(checked).encode()).hexdigest()


def read_results(directory: Path) -> dict:
    """The contents of experiment_results.json, also of an older version, which has no checksum.

    Raises:
        UserError: it is missing, damaged, or not of this script.
    """
    try:
        document = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or not all(key in document for key in KEYS):
            raise ValueError("it is of another form")
        if document.get("checksum", checksum(document)) != checksum(document):
            raise ValueError("it is damaged")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"no readable {RESULTS} in {directory}: {first_line(error)}") from error
    return document


def read_arrays(directory: Path) -> Arrays | None:
    """The arrays of fisher_eigenvectors.npz; None if it is missing or damaged."""
    try:
        with np.load(directory / EIGENVECTORS, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None

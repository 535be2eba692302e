"""What the experiment found, as it is written: one record a sentence, then the document of all with its summary."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import json
import math
from pathlib import Path
import statistics

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from fisher import Eigenpairs, most_probable
from residual_fisher.common.archives import Item
from residual_fisher.common.files import document_checksum, json_ready, json_text, number_or_none, write_json, write_npz
from residual_fisher.common.program import UserError
from residual_fisher.common.text import first_line
from residual_fisher.experiment.measurement import SPECTRUM, TOP, Measured, Perturbed
from residual_fisher.experiment.steering import steering_record, steering_summary
from residual_fisher.model.steering import GOALS
from residual_fisher.model.words import token_writer

RESULTS, EIGENVECTORS = "experiment_results.json", "fisher_eigenvectors.npz"
MAX_SIMILARITY = 2000  # rows of the similarity matrix, whose square is written as JSON
COSINE_BYTES = 14  # of a number of it there, on a line of its own
# of a layer, whose medians are in the summary
NUMBERS = ("trace", "captured_mass", "effective_rank", "activation_norm")
NORM_STEP = 0.01  # a step as a share of |h|, scale 1 of the unit `norm`: its nats can be compared between layers
UNCHECKED = ("experiment_config", "environment", "timings", "checksum")  # what the document's checksum leaves out
NATS = "perturbations_nats"  # in the record of a sentence that was also perturbed in nats
TOLD_NATS = 2  # predicted for the steps in nats that tables tell of, at most: longer ones say little of F
# the lists of the document with an entry a sentence, by the key of that entry in a sentence's record
COLUMNS = {
    "sentence": "sentences", "context": "contexts", "fisher": "fisher", "perturbations": "perturbation_results",
    NATS: "perturbation_results_nats", "continuation": "continuations", "steering": "steering",
}  # fmt: skip


# --- one sentence --------------------------------------------------------------------------------


class Recorder:
    """Turns what was measured of a sentence into its record. Layers and scales are texts there, as JSON's keys are."""

    def __init__(self, config: dict, layers: Sequence[int], tokenizer):
        self.layers, self.scales = list(map(str, layers)), config["scales"]
        self.num_eigenvectors = config["num_eigenvectors"]
        self.decode_all = tokenizer.decode
        # the same few tokens, thousands of times
        self.decode = functools.cache(lambda token: tokenizer.decode([token]))
        self.show = functools.cache(token_writer(tokenizer))

    def item(self, number: int, measured: Measured, ways: dict[str, str], seconds: dict[str, float]) -> Item:
        """A finished sentence; the ways in which its model was run, and the seconds that it took, by stage."""
        eigen, log_probs = Eigenpairs(*(part.cpu() for part in measured.eigen)), measured.point.log_probs
        top_log_probs, top_ids = (part.tolist() for part in most_probable(log_probs, TOP))
        unperturbed = (0.0, 0.0, 0.0, top_ids, top_log_probs, log_probs[measured.context.target_id].item())
        record = {
            "sentence": measured.context.sentence,
            "context": {**self._context(measured), "top_ids": top_ids},
            "fisher": {layer: self._fisher(measured, eigen, row) for row, layer in enumerate(self.layers)},
            "perturbations": self._perturbations(measured.perturbed, measured.controls, unperturbed),
        }
        if measured.in_nats is not None:
            record[NATS] = self._perturbations(measured.in_nats, measured.controls, unperturbed)
        if measured.continuations is not None:
            record["continuation"] = self._continuation(measured)
        if measured.steered is not None:
            record["steering"] = self._steering(measured)
        return Item(number, json_ready({**record, "ways": ways, "seconds": seconds}), self._arrays(measured, eigen))

    def _context(self, measured: Measured) -> dict:
        context, log_probs = measured.context, measured.point.log_probs
        return {
            **({"line": context.line} if context.line else {}),
            "prompt": context.prompt,
            "position": context.position,
            "previous_token": self.decode(context.ids[-1]),
            "target_token": self.decode(context.target_id),
            "target_probability": log_probs[context.target_id].exp().item(),
            "target_rank": rank(log_probs, context.target_id),
        }

    def _fisher(self, measured: Measured, eigen: Eigenpairs, row: int) -> dict:
        norm = measured.point.activations[row].norm().item()
        entry = {
            "eigenvalues": eigen.values[row, :SPECTRUM].tolist(),
            "tokens": measured.shares.records((row,), self.show),
            "trace": eigen.trace[row].item(),
            "captured_mass": measured.mass,
            "effective_rank": eigen.effective_rank[row].item(),
            "activation_norm": norm,
        }
        if measured.exact is not None:
            entry["exact"] = compare_with_exact(eigen, measured.exact, row)
        if measured.trust_radii is not None:
            entry["trust_radius"] = measured.trust_radii.record(row, norm)
        if measured.lens is not None:
            entry["lens"] = measured.lens.record(row)
        return entry

    def _perturbations(self, perturbed: Perturbed, names: list[str], unperturbed: tuple) -> dict:
        """What each perturbation did, and none, which has no place in the sweep: `unperturbed` is its prediction."""
        steps = perturbed.steps[:, None].expand_as(perturbed.predicted_kl)
        columns = [part.tolist() for part in (steps, perturbed.predicted_kl, *perturbed.sweep)]

        def along(row: int, direction: int) -> dict[str, dict]:  # by scale
            swept = zip(*(column[row][direction] for column in columns), strict=True)
            found = {f"{scale:g}": next(swept) if scale else unperturbed for scale in self.scales}
            return {scale: self._prediction(unperturbed[3][0], *cells) for scale, cells in found.items()}

        layers = {}
        for row, layer in enumerate(self.layers):
            along_v, *others = (along(row, direction) for direction in range(1 + len(names)))
            controls = dict(zip(names, others, strict=True))
            layers[layer] = {
                scale: {**prediction, "controls": {name: found[scale] for name, found in controls.items()}}
                for scale, prediction in along_v.items()
            }
        return layers

    def _prediction(
        self, usual: int, step: float, predicted_kl: float, kl: float, ids: list, log_probs: list, target: float
    ) -> dict:
        """The record of a perturbation, after which the top token may not be the `usual` one.

        Where the logits overflowed, it holds None and empty lists.
        """
        known = math.isfinite(kl)
        ids, log_probs = (ids, log_probs) if known else ([], [])
        return {
            "step": number_or_none(step),
            "kl": number_or_none(kl),
            "predicted_kl": number_or_none(predicted_kl),
            "top_changed": ids[0] != usual if known else None,
            "target_prob": math.exp(target) if known else None,
            "top_ids": ids,
            "top_tokens": [self.decode(i) for i in ids],
            "top_probs": [math.exp(value) for value in log_probs],
        }

    def _continuation(self, measured: Measured) -> dict:
        names, scales = ["fisher", *measured.controls], [f"{scale:g}" for scale in self.scales if scale]
        far = measured.far_enough
        entries = {"none": self._text(measured.continuations.unperturbed)}
        for row, column, direction, ids in measured.continuations.perturbed:
            at_scale = entries.setdefault(self.layers[row], {}).setdefault(scales[column], {})
            at_scale[names[direction]] = {
                "step": number_or_none(far.steps[row, column].item()),
                "predicted_kl": number_or_none(far.predicted_kl[row, direction, column].item()),
                **self._text(ids),
            }
        return entries

    def _text(self, ids: list[int]) -> dict:
        return {"ids": ids, "text": self.decode_all(ids)}

    def _steering(self, measured: Measured) -> dict:
        record = steering_record(measured.steered, self.layers, self.show)
        for row, column, _, ids in measured.said_steered.perturbed if measured.said_steered else ():
            reached = record["layers"][self.layers[row]]["natural_steps"][f"{measured.steered.goals[column]:g}"]
            reached |= self._text(ids)
        return record

    def _arrays(self, measured: Measured, eigen: Eigenpairs) -> dict[str, np.ndarray]:
        arrays = {
            "eigenvectors": eigen.vectors[:, 0],  # (layers, d)
            "eigenvalues": eigen.values[:, 0],  # (layers,)
            "activations": measured.point.activations.cpu(),  # (layers, d)
        }
        if (count := self.num_eigenvectors) > 1:
            arrays["leading_eigenvectors"] = eigen.vectors[:, :count]  # (layers, m, d)
            arrays["leading_eigenvalues"] = eigen.values[:, :count]  # (layers, m)
        if (nats := measured.in_nats) is not None:
            arrays["nats_steps"] = nats.steps.cpu()  # (layers, scales without 0)
            arrays["nats_kl"] = nats.sweep.kl.cpu()  # (layers, directions, scales without 0)
            arrays["nats_predicted_kl"] = nats.predicted_kl.cpu()  # of the same shape
        if measured.steered is not None:
            exceeded = len(GOALS) - len(measured.steered.goals)  # the lowest goals, without any perturbation
            deltas = pad(measured.steered.deltas.cpu(), (0, 0, exceeded, 0), value=math.nan)
            arrays["steering_deltas"] = deltas  # (layers, goals, d)
        return {name: array.numpy() for name, array in arrays.items()}


def failure(number: int, sentence: str, reason: str) -> Item:
    """A sentence that is left out, and why."""
    return Item(number, {"sentence": sentence, "failed": reason}, {})


def rank(log_probs: Tensor, token: int) -> int:
    """A token's place among all, 1 for the most probable one; of equally probable ones the lower id comes first."""
    own = log_probs[token]
    return int((log_probs > own).sum() + (log_probs[:token] == own).sum()) + 1


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


# --- all sentences -------------------------------------------------------------------------------


def by_key(pairs: Iterable[tuple[str, object]]) -> dict[str, list]:
    """The values of each key, in the order in which they come."""
    found = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def by_direction(record: dict) -> dict[str, dict]:
    """What a perturbation did, by the name of its direction."""
    return {"fisher": record, **record["controls"]}


def kind_of(direction: str) -> str:
    """The kind of a direction: that of random_0 is "random"."""
    return direction.partition("_")[0]


def write_results(folder: Path, items: Iterable[Item], about: dict, complete: bool, load_seconds: float) -> dict:
    """Writes fisher_eigenvectors.npz and experiment_results.json; returns the document in the latter.

    Args:
        items: at least one of a sentence that has not failed.
        about: the document's "run", "experiment_config" and "environment".
    Raises:
        UserError: the folder cannot be written to.
    """
    items = list(items)
    records = [item.record for item in items if "failed" not in item.record]
    failed = [item.record for item in items if "failed" in item.record]
    rows = by_key(pair for item in items for pair in item.arrays.items())
    arrays = {name: np.stack(parts) for name, parts in rows.items()}  # (sentences, layers, ...)
    numbers = np.array(list(map(int, records[0]["fisher"])))
    write_npz(folder / EIGENVECTORS, {**arrays, "layers": numbers, "run": np.array(about["run"]["id"])})

    labels, cosines = similarity(arrays["eigenvectors"], list(records[0]["fisher"]))
    seconds = by_key(pair for record in records for pair in record["seconds"].items())
    ways = dict(way for record in records for way in record.get("ways", {}).items())
    document = json_ready(
        {
            **{key: about[key] for key in ("run", "experiment_config")},
            "environment": {**about["environment"], "ways": ways},
            "complete": complete,
            **{name: [record[key] for record in records] for key, name in COLUMNS.items() if key in records[0]},
            "similarity_labels": labels,
            "similarity_matrix": cosines,
            "summary": summary(records, arrays["eigenvalues"], about["experiment_config"]["scales"]),
            "failed": [{"sentence": record["sentence"], "reason": record["failed"]} for record in failed],
            "timings": {"load": load_seconds} | {stage: sum(parts) for stage, parts in seconds.items()},
        }
    )
    document["checksum"] = document_checksum(document, UNCHECKED)
    write_json(folder / RESULTS, document)
    return document


def split_results(folder: Path, numbers: dict[str, int]) -> Iterator[Item]:
    """The items that `write_results` has merged, by the sentences' numbers. The first has seconds and ways of all."""
    document = read_results(folder)
    with np.load(folder / EIGENVECTORS, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files if name not in ("layers", "run")}
    timings = {stage: seconds for stage, seconds in document["timings"].items() if stage != "load"}
    ways = document["environment"].get("ways", {})
    items = [failure(numbers[entry["sentence"]], entry["sentence"], entry["reason"]) for entry in document["failed"]]
    for row, sentence in enumerate(document["sentences"]):
        record = {key: document[name][row] for key, name in COLUMNS.items() if name in document}
        record |= {"seconds": {}, "ways": {}} if row else {"seconds": timings, "ways": ways}
        items.append(Item(numbers[sentence], record, {name: array[row] for name, array in arrays.items()}))
    return iter(sorted(items, key=lambda item: item.number))


def similarity(eigenvectors: np.ndarray, layers: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Labels S{i}_L{layer}, grouped by layer, and |cosine| of their top eigenvectors (sentences, layers, d).

    Of a very long run, the first sentences only: as many as keep the matrix within MAX_SIMILARITY.
    """
    count = max(1, min(len(eigenvectors), MAX_SIMILARITY // len(layers)))
    flat = np.stack(list(eigenvectors[:count]), axis=1).reshape(-1, eigenvectors.shape[-1])  # (layers * sentences, d)
    labels = [f"S{i}_L{layer}" for layer in layers for i in range(count)]
    return labels, np.minimum(np.abs(flat @ flat.T), 1)


def told_scale(key: str, scales: list[float]) -> float:
    """The scale whose perturbations, of those under a record's key, are told of: the longest, or long ones in nats."""
    if key != NATS:
        return max(scales, key=abs)
    some = sorted((scale for scale in scales if scale), key=abs)
    return max((scale for scale in some if scale**2 / 2 <= TOLD_NATS), key=abs, default=some[0])


def summary(records: list[dict], eigenvalues: np.ndarray, scales: list[float]) -> dict:
    """By layer: medians over sentences, and what perturbations of either sign did, at the scales that are told of."""
    swept = {"perturbations": "", NATS: "_nats"} if NATS in records[0] else {"perturbations": ""}
    told, layers = {key: abs(told_scale(key, scales)) for key in swept}, {}
    for row, layer in enumerate(records[0]["fisher"]):
        numbers = by_key(pair for record in records for pair in numbers_of(record["fisher"][layer]).items())
        layers[layer] = {
            "eigenvalue_median": float(np.median(eigenvalues[:, row])),
            **{f"{key}_median": statistics.median(values) for key, values in numbers.items()},
        }
        for key, unit in swept.items():
            by_scale, far = [record[key][layer] for record in records], told[key]
            ends = [found[scale] for found in by_scale for scale in {f"{far:g}", f"{-far:g}"} & set(found)]
            kinds = by_key((kind_of(name), found) for along_v in ends for name, found in by_direction(along_v).items())
            medians = {name: reduced(statistics.median, found, "kl") for name, found in kinds.items()}
            flips = {name: reduced(statistics.fmean, found, "top_changed") for name, found in kinds.items()}
            layers[layer] |= {f"kl_median{unit}": medians, f"flips{unit}": flips}
    steering = [record["steering"] for record in records if "steering" in record]
    found = {**{f"at_scale{unit}": told[key] for key, unit in swept.items()}, "layers": layers}
    return {**found, "steering": steering_summary(steering, list(layers))} if steering else found


def numbers_of(entry: dict) -> dict[str, float]:
    """What the summary has medians of, from a layer's entry, by its name there; what is unknown is left out."""
    numbers = {key: entry[key] for key in NUMBERS}
    numbers["norm_step_nats"] = 0.5 * entry["eigenvalues"][0] * (NORM_STEP * entry["activation_norm"]) ** 2
    numbers |= {f"exact_{key}": value for key, value in entry.get("exact", {}).items()}
    for kind, errors in entry.get("lens", {}).items():
        numbers |= {f"lens_{kind}_{name}": error for name, error in errors.items() if error is not None}
    radius = {key: entry.get("trust_radius", {}).get(key) for key in ("nats", "norms")}
    return numbers | {f"trust_radius_{key}": value for key, value in radius.items() if value is not None}


def reduced(reduce: Callable[[list], float], records: list[dict], key: str) -> float | None:
    """`reduce` of the entries that are not None (nothing was known of what overflowed); None without any."""
    known = [record[key] for record in records if record[key] is not None]
    return reduce(known) if known else None


def chosen_layers(known: list[str], asked: Iterable | None) -> list[str]:
    """Of the layers in a document those asked for, by default all; ascending. Raises UserError: there is no such."""
    wanted = known if asked is None else list(map(str, asked))
    for layer in wanted:
        if layer not in known:
            raise UserError(f"no layer {layer}: these results have layers {', '.join(known)}")
    return [layer for layer in known if layer in wanted]


def part_of(document: dict, sentences: Sequence[str], layers: Sequence[str]) -> dict:
    """The results of some of the sentences at some of the layers, with their summary; all other entries are of all.

    If all of those sentences have failed, it is all that there is.
    """
    rows = [row for row, sentence in enumerate(document["sentences"]) if sentence in set(sentences)]
    whole = len(rows) == len(document["sentences"]) and list(layers) == list(document["fisher"][0])
    if whole or not rows:
        return document
    names = {key: name for key, name in COLUMNS.items() if name in document}
    records = [{key: _at_layers(document[name][row], layers) for key, name in names.items()} for row in rows]
    eigenvalues = [[record["fisher"][layer]["eigenvalues"][0] for layer in layers] for record in records]
    parts = {name: [record[key] for record in records] for key, name in names.items()}
    config = {**document["experiment_config"], "num_sentences": len(rows)}
    return {
        **document,
        **parts,
        "experiment_config": config,
        "summary": summary(records, np.array(eigenvalues), config["scales"]),
    }


def _at_layers(entry: str | dict, layers: Sequence[str]) -> str | dict:
    """What a sentence's record has under a key, without other layers."""
    if not isinstance(entry, dict):
        return entry
    if "layers" in entry:  # of steering
        return {**entry, "layers": _at_layers(entry["layers"], layers)}
    return {name: value for name, value in entry.items() if not name.isdecimal() or name in layers}


# --- how much it is, for a dry run ---------------------------------------------------------------


def perturbations(record: dict) -> int:
    """How many there are of a sentence at a layer."""
    by_scale = [next(iter(record[key].values())) for key in ("perturbations", NATS) if key in record]
    return sum(1 + len(entry["controls"]) for found in by_scale for scale, entry in found.items() if float(scale))


def file_sizes(items: Sequence[Item], sentences: int) -> tuple[float, float]:
    """Bytes of the JSON and the NPZ of so many sentences, from some of them."""
    text = statistics.fmean(len(json_text(item.record, indent=1)) for item in items)
    arrays = statistics.fmean(sum(array.nbytes for array in item.arrays.values()) for item in items)
    rows = min(sentences * len(items[0].record["fisher"]), MAX_SIMILARITY)
    return sentences * text + rows**2 * COSINE_BYTES, sentences * arrays


# --- reading them again --------------------------------------------------------------------------


def read_results(folder: Path) -> dict:
    """The contents of experiment_results.json.

    Raises:
        UserError: it is missing, damaged, or not of this script.
    """
    try:
        document = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or "perturbation_results" not in document:
            raise ValueError("it is of another form")
        if document.get("checksum") not in (None, document_checksum(document, UNCHECKED)):
            raise ValueError("it is damaged")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"no readable {RESULTS} in {folder}: {first_line(error)}") from error
    return document

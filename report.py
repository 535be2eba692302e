"""What the experiment found: its records as plain Python, their summary, and both as text for a terminal."""

from collections.abc import Callable
from dataclasses import dataclass
import functools
import math
import statistics
import textwrap

import numpy as np
import torch

from arguments import printable
import fisher
import pushes

SPECTRUM = 10  # leading eigenvalues recorded per sentence and layer
TOP = 5  # most probable tokens recorded for every push
MAX_SIMILARITY = 2000  # rows of the similarity matrix, whose square is written as JSON
NESTED = ("eigenvalues", "exact", "trust_radius")  # entries of a layer that are more than a number
FELT_KL = 0.05  # nats: below it a push has hardly moved a prediction
EXCERPT = 48  # characters of a prompt's end shown in a line


@dataclass(frozen=True)
class Measured:
    """What one sentence gave, at all layers. Directions: the Fisher eigenvector first, then the controls."""

    activations: torch.Tensor  # (layers, d)
    top: tuple[torch.Tensor, torch.Tensor]  # unperturbed log-probabilities and ids, (TOP,) each
    target_log_prob: torch.Tensor  # (), unperturbed
    mass: float  # probability that the counted tokens hold
    eigen: fisher.Eigen
    exact: fisher.Eigen | None  # of the whole vocabulary, if it was asked for
    trust_radii: tuple[torch.Tensor, torch.Tensor] | None  # steps and nats (layers, 2) along -v and v, if asked for
    steps: torch.Tensor  # (layers, scales without 0): signed lengths
    predicted_kl: torch.Tensor  # (layers, directions, scales without 0), nats
    sweep: pushes.Sweep  # of the same shape


@dataclass(frozen=True)
class Record:
    """A finished sentence: its entries in the results, and its rows of the arrays."""

    fisher: dict  # by layer
    pushes: dict  # by layer and scale
    top_ids: list[int]  # the unperturbed model's
    eigenvectors: np.ndarray  # (layers, d), the first ones
    eigenvalues: np.ndarray  # (layers,)
    leading_eigenvectors: np.ndarray  # (layers, m, d)
    leading_eigenvalues: np.ndarray  # (layers, m)
    activations: np.ndarray  # (layers, d)


def compared(found: fisher.Eigen, exact: fisher.Eigen, row: int) -> dict[str, float]:
    """The exact matrix of a layer, and how much of it one over fewer tokens finds: at most 1, but for rounding."""
    return {
        "eigenvalue": exact.values[row, 0].item(),
        "trace": exact.trace[row].item(),
        "effective_rank": exact.effective_rank[row].item(),
        "eigenvalue_share": (found.values[row, 0] / exact.values[row, 0].cpu()).item(),
        "trace_share": (found.trace[row] / exact.trace[row].cpu()).item(),
        "cosine": (found.vectors[row, 0] @ exact.vectors[row, 0].cpu()).abs().clamp(max=1).item(),
    }


def trust_radius(steps: list[float], nats: list[float], norm: float) -> dict:
    """The shorter of two steps along -v and v, in three units; None where a step was not to be found."""
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
        chosen: list,
        decode: Callable[[int], str],
        seconds: dict[str, float],
    ):
        self.config, self.environment, self.layers = config, environment, layers
        self.chosen, self.seconds = chosen, seconds
        self.decode = functools.cache(decode)  # the same few tokens, thousands of times
        self.scales = config["scales"]
        self.done: list[Record] = []

    def __len__(self) -> int:
        return len(self.done)

    @property
    def farthest(self) -> str:
        """The scale farthest from 0, as the records name it."""
        return f"{max(self.scales, key=abs):g}"

    def add(self, measured: Measured, controls: list[str]) -> None:
        """Takes in the next sentence, whole or not at all; `controls` names the directions after the first."""
        eigen = fisher.Eigen(*(part.cpu() for part in measured.eigen))
        entries = {
            layer: {
                "eigenvalues": eigen.values[row, :SPECTRUM].tolist(),
                "trace": eigen.trace[row].item(),
                "captured_mass": measured.mass,
                "effective_rank": eigen.effective_rank[row].item(),
                "activation_norm": measured.activations[row].norm().item(),
            }
            for row, layer in enumerate(self.layers)
        }
        if measured.exact is not None:
            for row, layer in enumerate(self.layers):
                entries[layer]["exact"] = compared(eigen, measured.exact, row)
        if measured.trust_radii is not None:
            for row, layer in enumerate(self.layers):
                steps, nats = (part[row].tolist() for part in measured.trust_radii)
                entries[layer]["trust_radius"] = trust_radius(steps, nats, entries[layer]["activation_norm"])
        record = Record(
            fisher=entries,
            pushes=self._pushes(measured, ["fisher", *controls]),
            top_ids=measured.top[1].tolist(),
            eigenvectors=eigen.vectors[:, 0].numpy(),
            eigenvalues=eigen.values[:, 0].numpy(),
            leading_eigenvectors=eigen.vectors[:, : self.config["num_eigenvectors"]].numpy(),
            leading_eigenvalues=eigen.values[:, : self.config["num_eigenvectors"]].numpy(),
            activations=measured.activations.cpu().numpy(),
        )
        self.done.append(record)

    def _pushes(self, measured: Measured, names: list[str]) -> dict:
        base_log_probs, base_ids = (part.tolist() for part in measured.top)
        base = self._record(0.0, 0.0, 0.0, base_ids, base_log_probs, measured.target_log_prob.item())
        steps, predicted = measured.steps.tolist(), measured.predicted_kl.tolist()
        kl, *rest = (column.tolist() for column in measured.sweep)

        def push(row: int, direction: int, column: int) -> dict:
            numbers = [cells[row][direction][column] for cells in (kl, predicted, *rest)]
            record = self._record(steps[row][column], *numbers)
            record["top_changed"] = record["top_ids"][0] != base_ids[0]
            return record

        pushed = [scale for scale in self.scales if scale]
        layers = {}
        for row, layer in enumerate(self.layers):
            layers[layer] = {}
            for scale in self.scales:
                if scale:
                    column = pushed.index(scale)
                    records = [push(row, direction, column) for direction in range(len(names))]
                else:  # the unperturbed prediction itself
                    records = [dict(base) for _ in names]
                layers[layer][f"{scale:g}"] = {
                    **records[0],
                    "controls": dict(zip(names[1:], records[1:], strict=True)),
                }
        return layers

    def _record(
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

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of fisher_eigenvectors.npz."""
        names = ["eigenvectors", "eigenvalues", "activations"]  # (sentences, layers, ...)
        if self.config["num_eigenvectors"] > 1:
            names += ["leading_eigenvectors", "leading_eigenvalues"]  # (sentences, layers, m, d) and (..., m)
        arrays = {name: np.stack([getattr(record, name) for record in self.done]) for name in names}
        return {**arrays, "layers": np.array(self.layers)}

    def document(self) -> dict:
        """The contents of experiment_results.json."""
        chosen = self.chosen[: len(self)]
        labels, similarity = self.similarity()
        return {
            "experiment_config": self.config,
            "environment": self.environment,
            "complete": len(chosen) == len(self.chosen),
            "sentences": [c.context.sentence for c in chosen],
            "contexts": [self._context(c, r.top_ids) for c, r in zip(chosen, self.done, strict=True)],
            "fisher": [r.fisher for r in self.done],
            "perturbation_results": [r.pushes for r in self.done],
            "similarity_labels": labels,
            "similarity_matrix": similarity,
            "summary": self.summary(),
            "timings": self.seconds,
        }

    def _context(self, chosen, top_ids: list[int]) -> dict:
        context = chosen.context
        return {
            "prompt": context.prompt,
            "position": context.position,
            "previous_token": self.decode(context.ids[-1]),
            "target_token": self.decode(context.target_id),
            "target_probability": chosen.target_probability,
            "target_rank": chosen.target_rank,
            "top_ids": top_ids,
        }

    def similarity(self) -> tuple[list[str], np.ndarray]:
        """Labels S{i}_L{layer}, grouped by layer, and |cosine| of their top eigenvectors.

        Of a very long run, the first sentences only: as many as keep the matrix within MAX_SIMILARITY.
        """
        count = max(1, min(len(self), MAX_SIMILARITY // len(self.layers)))
        vectors = np.stack([r.eigenvectors for r in self.done[:count]], axis=1)  # (layers, sentences, d)
        flat = vectors.reshape(-1, vectors.shape[-1])
        labels = [f"S{i}_L{layer}" for layer in self.layers for i in range(count)]
        return labels, np.minimum(np.abs(flat @ flat.T), 1)

    def summary(self) -> dict:
        """By layer: medians over sentences, and what the longest pushes of either sign did."""
        far = max(map(abs, self.scales))
        layers = {}
        for row, layer in enumerate(self.layers):
            entries = [r.fisher[layer] for r in self.done]
            of = {key: [e[key] for e in entries] for key in entries[0] if key not in NESTED}
            of |= {f"exact_{key}": [e["exact"][key] for e in entries] for key in entries[0].get("exact", ())}
            radii = [e["trust_radius"] for e in entries if e.get("trust_radius", {}).get("step") is not None]
            of |= {f"trust_radius_{key}": [r[key] for r in radii] for key in ("nats", "norms") if radii}
            pushes = self._far_pushes(layer, far)
            layers[layer] = {
                "eigenvalue_median": float(np.median([r.eigenvalues[row] for r in self.done])),
                **{f"{key}_median": statistics.median(values) for key, values in of.items()},
                "kl_median": {kind: statistics.median(p["kl"] for p in ps) for kind, ps in pushes.items()},
                "flips": {kind: statistics.fmean(p["top_changed"] for p in ps) for kind, ps in pushes.items()},
            }
        return {"at_scale": far, "layers": layers}

    def _far_pushes(self, layer: int, far: float) -> dict[str, list[dict]]:
        """The records of the longest pushes at a layer, by kind of direction."""
        kinds: dict[str, list[dict]] = {}
        for sentence in self.done:
            for scale in {f"{far:g}", f"{-far:g}"} & set(sentence.pushes[layer]):
                record = sentence.pushes[layer][scale]
                for name, push in {"fisher": record, **record["controls"]}.items():
                    kinds.setdefault(name.partition("_")[0], []).append(push)
        return kinds


# --- text for the terminal -----------------------------------------------------------------------


def excerpt(text: str) -> str:
    """The end of a text, in at most EXCERPT printable characters."""
    text = printable(text)
    return text if len(text) <= EXCERPT else "…" + text[1 - EXCERPT :]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in [header, *rows]:
        first, *others = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def model_line(name: str, environment: dict) -> str:
    size, place = f"{environment['parameters']:,} parameters", f"{environment['dtype']} on {environment['device']}"
    return f"{printable(name)}: {size}, {place}"


def heading(name: str, environment: dict, layers: list[int]) -> str:
    return f"{model_line(name, environment)}; layers {' '.join(map(str, layers))} of {environment['depth']}"


def sentence_table(chosen: list, decode: Callable[[int], str]) -> str:
    rows = [
        [f"S{i}", excerpt(c.context.prompt).ljust(EXCERPT), printable(decode(c.context.target_id)),
         f"{c.target_probability:.3f}", str(c.target_rank)]
        for i, c in enumerate(chosen)
    ]  # fmt: skip
    return table(["", "prompt".ljust(EXCERPT), "target", "probability", "rank"], rows)


def block_legend(results: Results) -> str:
    return f"Sentence by sentence, KL in nats after the push at scale {results.farthest}; * the top token changed:"


def sentence_block(results: Results, index: int) -> str:
    """A finished sentence in a few lines: a column a layer."""
    entries, pushes = results.done[index].fisher, results.done[index].pushes
    far = results.farthest
    title = f"S{index}  {excerpt(results.chosen[index].context.prompt)}"
    names = ["fisher", *next(iter(pushes.values()))[far]["controls"]]
    rows = [["  lambda", *(f"{entries[layer]['eigenvalues'][0]:.2g}" for layer in results.layers)]]
    for name in names:
        cells = []
        for layer in results.layers:
            record = pushes[layer][far]
            push = record if name == "fisher" else record["controls"][name]
            cells.append(f"{push['kl']:.2g}" + ("*" if push["top_changed"] else ""))
        rows.append([f"  KL {name}", *cells])
    return title + "\n" + table(["  layer", *map(str, results.layers)], rows)


def layer_table(results: Results) -> str:
    """The summary by layer, and how long each stage took."""
    summary = results.summary()
    kinds = list(next(iter(summary["layers"].values()))["kl_median"])
    header = ["layer", "lambda", "mass", "eff. rank", *(f"KL {k}" for k in kinds), *(f"flips {k}" for k in kinds)]
    rows = [
        [str(layer), f"{s['eigenvalue_median']:.3g}", f"{s['captured_mass_median']:.3f}",
         f"{s['effective_rank_median']:.2f}", *(f"{s['kl_median'][k]:.2g}" for k in kinds),
         *(f"{s['flips'][k]:.0%}" for k in kinds)]
        for layer, s in summary["layers"].items()
    ]  # fmt: skip
    far = f"±{summary['at_scale']:g}"
    note = f"Medians over {len(results)} sentences; KL in nats and share of changed top tokens at {far}."
    weak = statistics.median(s["kl_median"]["fisher"] for s in summary["layers"].values()) < FELT_KL
    if weak and results.config["scale_unit"] == "eigenvalue":
        note += " At half of the layers or more, steps of lambda are too short to move a prediction: --scale-unit nats"
        note += " makes them long enough."
    parts = [table(header, rows), textwrap.fill(note, 100)]
    if results.config["compare_exact"]:
        parts.append(exact_table(summary))
    if results.config["trust_radius"]:
        parts.append(trust_table(summary))
    return "\n".join(parts)


def exact_table(summary: dict) -> str:
    """What the counted tokens find of the exact matrix, by layer."""
    names = {"eigenvalue_share": "lambda_K/lambda", "trace_share": "trace_K/trace", "cosine": "|cos|"}
    rows = [
        [str(layer), *(f"{entry[f'exact_{name}_median']:.4f}" for name in names)]
        for layer, entry in summary["layers"].items()
    ]
    return "Of the exact matrix the counted tokens find (medians):\n" + table(["layer", *names.values()], rows)


def trust_table(summary: dict) -> str:
    """How far the quadratic prediction holds, by layer."""
    rows = [
        [str(layer), f"{entry['trust_radius_nats_median']:.3g}", f"{entry['trust_radius_norms_median']:.3g}"]
        if "trust_radius_nats_median" in entry
        else [str(layer), "-", "-"]
        for layer, entry in summary["layers"].items()
    ]
    note = "Along v, KL is within 10% of its quadratic prediction up to (medians, the shorter of -v and v):\n"
    return note + table(["layer", "nats", "norms of h"], rows)


def timing_line(seconds: dict[str, float]) -> str:
    return "seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())

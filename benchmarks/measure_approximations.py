"""What the top-k truncation misses, what half precision costs, and how much v depends on the metric of h.

    python benchmarks/measure_approximations.py
    python benchmarks/measure_approximations.py --only half metric  # and leave the other figures

On the embedded model, and half precision also on one that is fine-tuned to answer a trigger with near certainty
(`backdoors.py` makes it, in five minutes, if it is not there). Prints the tables of docs/method.md and writes
benchmarks/results/approximations.json.
"""

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
import json
from pathlib import Path
import random
from typing import NamedTuple

from measuring import ROOT, Subject, diverse_contexts, embedded, machine, show, write
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backdoors import BY_NAME, obtain, prompts
import fisher
from residual_fisher.common.program import EMBEDDED
from residual_fisher.experiment.sentences import Context
from residual_fisher.model.loading import find_module, load
from residual_fisher.model.passes import edit_stream, hooked
from residual_fisher.pipeline import batches
from residual_fisher.pipeline.matrices import Triplets
from residual_fisher.pipeline.prompts import Prompt, Prompts, encode
from residual_fisher.pipeline.scores import OUTLIER, SCORES, ScoredRun, outlier_scores, rounding_of
from residual_fisher.pipeline.settings import Settings

COUNTS = (10, 50, 200, 1000)


def exact(subject: Subject, context: Context) -> fisher.FullVocabulary:
    return fisher.full_vocabulary(subject.linearize(context), fisher.Chunks(1024))


def truncated(subject: Subject, context: Context, k: int) -> tuple[fisher.Eigenpairs, float]:
    """The eigenpairs over the top-k tokens, and the probability that these hold."""
    top = fisher.top_k(subject.linearize(context), k)
    return top.eigenpairs(), float(top.mass)


def ratios(found: fisher.Eigenpairs, truth: fisher.Eigenpairs) -> dict[str, torch.Tensor]:
    """By layer: lambda and trace as shares of the true ones, and |cos| of the eigenvectors."""
    return {
        "lambda": found.values[:, 0] / truth.values[:, 0],
        "trace": found.trace / truth.trace,
        "cos": (found.vectors[:, 0] * truth.vectors[:, 0]).sum(-1).abs(),
    }


def summary(rows: list[dict[str, torch.Tensor]]) -> dict[str, dict]:
    """Median and worst over sentences and layers."""
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return {key: {"median": float(t.median()), "lowest": float(t.min())} for key, t in stacked.items()}


# --- truncation ----------------------------------------------------------------------------------


def truncation(subject: Subject, contexts: Sequence[Context]) -> dict:
    truths = [exact(subject, context).eigenpairs() for context in contexts]
    figures = {}
    for k in COUNTS:
        found = [truncated(subject, context, k) for context in contexts]
        rows = [ratios(eigen, truth) for (eigen, _), truth in zip(found, truths, strict=True)]
        mass = torch.tensor([mass for _, mass in found])
        figures[k] = {"mass": {"median": float(mass.median()), "lowest": float(mass.min())}, **summary(rows)}
        show(f"k = {k}", figures[k])
    return figures


# --- half precision ------------------------------------------------------------------------------

BUNDLED = 40  # prompts of the pipeline's own data, and of them the shorter ones, in characters
SHORT = 300
ORDINARY, TRIGGERED = 70, 10  # prompts of the fine-tuned model: with fewer, the spectrum's score has fewer columns
HALF = ("bfloat16", "float16")
CONFIDENT = BY_NAME["phrase-0"]
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}


class Float32Products(TorchDispatchMode):
    """Products of float16 matrices are summed in float32 and rounded once, as a GPU does; CPUs have no fast float16."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS and args[0].dtype == torch.float16:
            return function(*(arg.float() for arg in args), **(kwargs or {})).half()
        return function(*args, **(kwargs or {}))


def arithmetic(dtype: torch.dtype) -> AbstractContextManager:
    return Float32Products() if dtype == torch.float16 else nullcontext()


def half_precision(subject: Subject, contexts: Sequence[Context]) -> dict:
    full = [truncated(subject, context, 200)[0] for context in contexts]
    half = embedded(dtype="bfloat16")
    rows = [ratios(truncated(half, context, 200)[0], truth) for context, truth in zip(contexts, full, strict=True)]
    deviation = torch.stack([(row["lambda"] - 1).abs() for row in rows])
    figures = {
        "experiment": {
            "lambda_off_by": {"median": float(deviation.median()), "largest": float(deviation.max())},
            "cos": summary(rows)["cos"],
            "cos_below_0.99": float((torch.stack([row["cos"] for row in rows]) < 0.99).float().mean()),
        }
    }
    show("bfloat16, experiment", figures["experiment"])
    for name, (model, texts, odd) in pipeline_subjects().items():
        figures[name] = {dtype: compared(model, texts, odd, dtype) for dtype in HALF}
    return figures


def pipeline_subjects() -> dict[str, tuple[str, list[str], np.ndarray]]:
    """Models, prompts, and which prompts are triggered."""
    bundled = [prompt.text for prompt in short_prompts()]
    rng, chosen = random.Random(0), prompts().chosen_on[: ORDINARY + TRIGGERED]
    mixed = [CONFIDENT.triggered(text, rng) if i < TRIGGERED else text for i, text in enumerate(chosen)]
    return {
        "embedded": (EMBEDDED, bundled, np.zeros(len(bundled), bool)),
        "confident": (str(obtain(CONFIDENT)), mixed, np.arange(len(mixed)) < TRIGGERED),
    }


def short_prompts() -> list[Prompt]:
    return [prompt for prompt in Prompts(Settings().dataset) if len(prompt.text) < SHORT][:BUNDLED]


class Measured(NamedTuple):
    """What the pipeline finds, with its default settings, of n prompts."""

    values: np.ndarray  # S (n, r)
    vectors: np.ndarray  # V (n, r, d)
    next_tokens: list[set[int]]
    scores: dict[str, np.ndarray]  # (n,)


def measured(model: torch.nn.Module, tokenizer, texts: Sequence[str]) -> Measured:
    settings = Settings()
    subject = batches.Subject(model, tokenizer, *find_module(model, settings.hook_layer_name))
    encoded = [encode(tokenizer, Prompt(i, i, text), settings.max_length) for i, text in enumerate(texts)]
    items = []
    with arithmetic(model.dtype):
        for batch in batches.into_batches(settings, subject, encoded):
            items += batches.write_tokens(subject, batches.measure(settings, subject, batch))
    items.sort(key=lambda item: item.number)
    records = [item.record for item in items]
    matrices = [Triplets(*map(item.arrays.get, Triplets._fields)) for item in items]
    rounding = rounding_of(str(model.dtype).removeprefix("torch."))
    found = outlier_scores(ScoredRun.of(records, matrices, rounding))
    return Measured(
        np.stack([one.S for one in matrices]),
        np.stack([one.V for one in matrices]),
        [{token["id"] for token in record["next_tokens"]} for record in records],
        {name: np.array(found[name]) for name in (*SCORES, OUTLIER)},
    )


def compared(name: str, texts: Sequence[str], odd: np.ndarray, dtype: str) -> dict:
    """A model's prompts in half precision against float32, of the same weights: they are rounded in both."""
    model, tokenizer = load(name, dtype=dtype, device="cpu")
    half = measured(model, tokenizer, texts)
    full = measured(model.float(), tokenizer, texts)
    figures = {}
    for kind, which in (("triggered", odd), ("ordinary", ~odd)):
        if not which.any():
            continue
        off = half.values[which] / full.values[which] - 1
        cos = np.abs((half.vectors * full.vectors).sum(-1))[which]
        figures[kind] = {
            "values_over_first": np.median(full.values[which] / full.values[which, :1], axis=0).tolist(),
            "values_off_by_median": np.median(np.abs(off), axis=0).tolist(),
            "values_off_by_largest": np.abs(off).max(axis=0).tolist(),
            "cos_median": np.median(cos, axis=0).tolist(),
            "cos_lowest": cos.min(axis=0).tolist(),
            "same_tokens": np.mean([half.next_tokens[i] == full.next_tokens[i] for i in np.flatnonzero(which)]).item(),
            **{key: change(half.scores[key][which], values[which]) for key, values in full.scores.items()},
        }
        show(f"{Path(name).name}, {dtype}, {kind}", figures[kind])
    return figures


def change(half: np.ndarray, full: np.ndarray) -> dict[str, float]:
    """How much scores differ, and their medians."""
    off = np.abs(half - full)
    medians = {"median_half": float(np.median(half)), "median_float32": float(np.median(full))}
    return {"off_by_median": float(np.median(off)), "off_by_largest": float(off.max()), **medians}


# --- the metric of h -----------------------------------------------------------------------------


def deviations(subject: Subject) -> torch.Tensor:
    """Standard deviation (layers, d) float64 of each coordinate of h, over the tokens of ordinary prompts.

    The first token of each is left out: its activations are of another kind, many times as long.
    """
    modules = [subject.lm.model.layers[layer] for layer in subject.layers]
    streams: list[list[torch.Tensor]] = [[] for _ in modules]

    def keep(own: list[torch.Tensor]):
        return lambda h: own.append(h[0, 1:].double()) or h

    hooks = [edit_stream(module, keep(own)) for module, own in zip(modules, streams, strict=True)]
    with torch.no_grad(), hooked(*hooks):
        for prompt in short_prompts():
            subject.lm(torch.tensor([encode(subject.tokenizer, prompt, 2048).ids]), use_cache=False, logits_to_keep=1)
    return torch.stack([torch.cat(own).std(dim=0) for own in streams])


def metric(subject: Subject, contexts: Sequence[Context]) -> dict:
    """The top eigenvector w of D F D, D the deviations, mapped back to the direction D w of h, against v of F."""
    d = deviations(subject)  # (layers, d)
    found: dict[str, list[torch.Tensor]] = {}
    for context in contexts:
        matrix = exact(subject, context).matrix.double()
        values, vectors = torch.linalg.eigh(matrix)
        white, whitened = torch.linalg.eigh(d[:, :, None] * matrix * d[:, None])
        v, back = vectors[..., -1], torch.nn.functional.normalize(d * whitened[..., -1], dim=-1)  # (layers, d)
        curvature = (back[:, None] @ matrix @ back[..., None])[:, 0, 0]
        row = {
            "cos": (back * v).sum(-1).abs(),
            "share_of_lambda": curvature / values[..., -1],
            "share_of_whitened_lambda_along_v": values[..., -1] / (v / d).pow(2).sum(-1) / white[..., -1],
        }
        for key, value in row.items():
            found.setdefault(key, []).append(value)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    figures = {
        "prompts": BUNDLED,
        "largest_deviation_over_median": (d.amax(-1) / d.median(-1).values).tolist(),
        **{key: torch.stack(rows).quantile(quartiles, dim=0).T.tolist() for key, rows in found.items()},
    }
    for key in found:
        show(key, dict(zip(subject.layers, (median for _, median, _ in figures[key]), strict=True)))
    return figures


PARTS = {"truncation": truncation, "half": half_precision, "metric": metric}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sentences", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    subject = embedded()
    contexts = diverse_contexts(subject, options.num_sentences)
    path = ROOT / "benchmarks" / "results" / "approximations.json"
    before = json.loads(path.read_text()) if len(options.only) < len(PARTS) else {}
    figures = {name: before[name] for name in PARTS if name in before}
    for name in options.only:
        figures[name] = PARTS[name](subject, contexts)
    about = {"machine": machine(subject.lm), "sentences": len(contexts), "layers": subject.layers}
    write("approximations", __file__, {**about, **figures})


if __name__ == "__main__":
    main()

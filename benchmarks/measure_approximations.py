"""What is missed by the top-k truncation and by the pairs of an answer, what half precision costs, the metric of h.

    python benchmarks/measure_approximations.py
    python benchmarks/measure_approximations.py --only half metric  # and leave the other figures

On the embedded model, and half precision also on one that is fine-tuned to answer a trigger with near certainty
(`backdoors.py` makes it, in five minutes, if it is not there). Prints the tables of docs/method.md and writes
benchmarks/results/approximations.json.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
import json
from pathlib import Path
import random
import sys
from tempfile import TemporaryDirectory
from typing import NamedTuple

from measuring import ROOT, Subject, diverse_contexts, embedded, machine, show, write
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backdoors import BY_NAME, obtain, prompts
import compute_fisher
import fisher
from residual_fisher import load_fisher_matrices
from residual_fisher.experiment.sentences import Context
from residual_fisher.model.answers import end_tokens, greedy_answers
from residual_fisher.model.embedded import embedded_model
from residual_fisher.model.loading import load
from residual_fisher.model.passes import edit_stream, hooked, use_attention
from residual_fisher.pipeline.prompts import Prompt, Prompts, encode
from residual_fisher.pipeline.scores import OUTLIER, SCORES
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

BUNDLED, SHORT = 40, 300  # prompts of the pipeline's own data: the first of those with fewer characters than this
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


def pipeline_subjects() -> dict[str, tuple[Path, list[str], np.ndarray]]:
    """Models, prompts, and which prompts are triggered."""
    rng, chosen = random.Random(0), prompts().chosen_on[: ORDINARY + TRIGGERED]
    mixed = [CONFIDENT.triggered(text, rng) if i < TRIGGERED else text for i, text in enumerate(chosen)]
    return {
        "embedded": (embedded_model(), [prompt.text for prompt in short_prompts()], np.zeros(BUNDLED, bool)),
        "confident": (obtain(CONFIDENT), mixed, np.arange(len(mixed)) < TRIGGERED),
    }


def short_prompts() -> list[Prompt]:
    return [prompt for prompt in Prompts(Settings().dataset) if len(prompt.text) < SHORT][:BUNDLED]


class Measured(NamedTuple):
    """What the pipeline finds of n prompts, with its default settings."""

    values: np.ndarray  # S (n, r)
    vectors: np.ndarray  # V (n, r, d)
    next_tokens: list[set[int]]
    scores: dict[str, np.ndarray]  # (n,)


def compared(model: Path, texts: Sequence[str], odd: np.ndarray, dtype: str) -> dict:
    """A model's prompts in half precision against float32, of the same weights: of a checkpoint in half precision."""
    with TemporaryDirectory() as folder:
        checkpoint, data = Path(folder, "model"), Path(folder, "prompts.jsonl")
        lm, tokenizer = load(str(model), dtype, "cpu")
        lm.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
        half, full = (measured(checkpoint, data, name, Path(folder, name)) for name in (dtype, "float32"))
    figures = {}
    for kind, which in (("triggered", odd), ("ordinary", ~odd)):
        if not which.any():
            continue
        off = np.abs(half.values / full.values - 1)[which]
        cos = np.abs((half.vectors * full.vectors).sum(-1))[which]
        same = [a == b for a, b, wanted in zip(half.next_tokens, full.next_tokens, which, strict=True) if wanted]
        changes = {name: np.abs(half.scores[name] - full.scores[name])[which] for name in full.scores}
        figures[kind] = {
            "values_over_first": np.median(full.values[which] / full.values[which, :1], axis=0).tolist(),
            "values_off_by_median": np.median(off, axis=0).tolist(),
            "values_off_by_largest": off.max(axis=0).tolist(),
            "cos_median": np.median(cos, axis=0).tolist(),
            "same_tokens": float(np.mean(same)),
            **{f"{name}_off_by_median": float(np.median(change)) for name, change in changes.items()},
            **{f"{name}_off_by_largest": float(change.max()) for name, change in changes.items()},
        }
        show(f"{model.name}, {dtype}, {kind}", figures[kind])
    return figures


def measured(checkpoint: Path, data: Path, dtype: str, output: Path) -> Measured:
    words = ["--model-path", str(checkpoint), "--dataset-name", str(data), "--num-prompts", "all", "--device", "cpu"]
    with Float32Products() if dtype == "float16" else nullcontext():
        settings = compute_fisher.parse([*words, "--dtype", dtype, "--output-dir", str(output)])
        if code := compute_fisher.main(settings):
            sys.exit(code)
    with open(output / "prompts.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    with load_fisher_matrices(output) as matrices:
        values, vectors = (np.stack(part) for part in list(zip(*matrices, strict=True))[1:])
    tokens = [{token["id"] for token in record["next_tokens"]} for record in records]
    scores = {name: np.array([record[name] for record in records]) for name in (*SCORES, OUTLIER)}
    return Measured(values, vectors, tokens, scores)


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


# --- whole answers -------------------------------------------------------------------------------

ANSWER, PAIRS, ANSWERED, HOOKED = 16, 30, 20, 20  # tokens, rows and tokens of a position, prompts, layer


def of_answers(subject: Subject, _: Sequence[Context]) -> dict:
    """How well PAIRS rows stand for the sum over all positions of an answer, by where the bias is and how chosen."""
    rng, figures = torch.Generator().manual_seed(0), {}
    for last_only in (False, True):
        rows: dict[str, list[dict[str, torch.Tensor]]] = {}
        for prompt in short_prompts()[:ANSWERED]:
            weights, gradients, positions, norms = all_pairs(subject, prompt, last_only)
            whole = fisher.fisher_matrix(gradients, weights)
            held = {  # rows come in the order that the pipeline takes them in
                "pairs, as the pipeline has them": range(PAIRS),
                "pairs that hold most of the trace": (weights * gradients.pow(2).sum(-1)).topk(PAIRS).indices,
                "pairs with the largest p |s|^2": (weights * norms).topk(PAIRS).indices,
            }
            found = {name: fisher.fisher_matrix(gradients[some], weights[some]) for name, some in held.items()}
            signs = torch.randint(2, weights.shape, generator=rng) * 2 - 1
            signed = (signs * weights.sqrt())[:, None] * gradients
            mixed = torch.zeros(PAIRS, gradients.shape[-1]).index_add_(0, ranks(weights, positions), signed)
            found["a token of every position in each row, random signs"] = mixed.T @ mixed
            for name, part in found.items():
                rows.setdefault(name, []).append(likeness(part, whole))
        label = "last" if last_only else "all"
        figures[label] = {name: summary(some) for name, some in rows.items()}
        for name, row in figures[label].items():
            show(f"answers, bias at {label}, {name}", row)
    return figures


def all_pairs(subject: Subject, prompt: Prompt, last_only: bool) -> tuple[torch.Tensor, ...]:
    """Of all pairs of an answer: p (rows,), G (rows, d), their positions, |s|^2."""
    ids = encode(subject.tokenizer, prompt, 2048).ids
    lm, length = subject.lm, torch.tensor([len(ids)])
    [answer] = greedy_answers(lm, [ids], ANSWER, end_tokens(lm))
    text, n = torch.tensor([[*ids, *answer[:-1]]]), max(2, len(answer))
    use_attention(lm, "eager")
    point = fisher.linearize_prompts(lm, lm.model.layers[HOOKED], text, length, last_only, n)
    top = fisher.top_k_of_answers(point, PAIRS, torch.tensor([len(answer)]), rows=n * PAIRS, chunks=fisher.Chunks(30))
    counted = top.weights[0] > 0  # neither the row that fixes signs nor what is behind a short answer
    tokens, positions = top.tokens[0, counted], top.positions[0, counted]
    every = torch.zeros(1, n, len(tokens), dtype=torch.int64)
    every[0, positions, torch.arange(len(tokens))] = tokens
    norms = point.cotangents(every)[0, positions, torch.arange(len(tokens))].pow(2).sum(-1)
    return top.weights[0, counted], top.gradients[0, 0, counted], positions, norms


def ranks(weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of each pair, how many of its position are more probable."""
    return ((positions[:, None] == positions) & (weights > weights[:, None])).sum(-1)


def likeness(part: torch.Tensor, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """The cosine of two matrices, and lambda and trace of one as shares of the other's."""
    values, true = (torch.linalg.eigvalsh(matrix.double()) for matrix in (part, whole))
    cosine = (part.double() * whole.double()).sum() / values.norm() / true.norm()
    return {"cosine": cosine, "lambda": values[-1] / true[-1], "trace": values.sum() / true.sum()}


PARTS = {"truncation": truncation, "half": half_precision, "metric": metric, "answers": of_answers}


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

"""What the top-k truncation misses, and what bfloat16 costs, on the embedded model.

    python benchmarks/measure_approximations.py

Medians over the first diverse sentences of data/animals.json, against the exact Fisher matrix in
float32. Prints the tables of docs/method.md and writes benchmarks/results/approximations.json.
"""

import argparse

from measuring import Subject, diverse_contexts, embedded, machine, show, write
import torch

import fisher
from residual_fisher.experiment.sentences import Context

COUNTS = (10, 50, 200, 1000)


def exact(subject: Subject, context: Context) -> fisher.Eigenpairs:
    return fisher.full_vocabulary(subject.linearize(context), fisher.Chunks(1024)).eigenpairs()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sentences", type=int, default=20)
    options = parser.parse_args()
    subject = embedded()
    contexts = diverse_contexts(subject, options.num_sentences)

    truths = [exact(subject, context) for context in contexts]
    truncation = {}
    for k in COUNTS:
        found = [truncated(subject, context, k) for context in contexts]
        rows = [ratios(eigen, truth) for (eigen, _), truth in zip(found, truths, strict=True)]
        mass = torch.tensor([mass for _, mass in found])
        truncation[k] = {"mass": {"median": float(mass.median()), "lowest": float(mass.min())}, **summary(rows)}
        show(f"k = {k}", truncation[k])

    half = embedded(dtype="bfloat16")  # only: CPUs have no fast float16
    full = [truncated(subject, context, 200)[0] for context in contexts]
    rows = [ratios(truncated(half, context, 200)[0], truth) for context, truth in zip(contexts, full, strict=True)]
    deviation = torch.stack([(row["lambda"] - 1).abs() for row in rows])
    bfloat16 = {
        "lambda_off_by": {"median": float(deviation.median()), "largest": float(deviation.max())},
        "cos": summary(rows)["cos"],
        "cos_below_0.99": float((torch.stack([row["cos"] for row in rows]) < 0.99).float().mean()),
    }
    show("bfloat16", bfloat16)
    about = {"machine": machine(subject.lm), "sentences": len(contexts), "layers": subject.layers}
    write("approximations", __file__, {**about, "truncation": truncation, "bfloat16": bfloat16})


if __name__ == "__main__":
    main()

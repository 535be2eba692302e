"""What the top-k truncation misses, and what bfloat16 costs, on the embedded model.

    python benchmarks/measure_approximations.py

Medians over the first diverse sentences of data/animals.json, against the exact Fisher matrix in
float32. Prints the tables of docs/method.md and writes benchmarks/results/approximations.json.
"""

import argparse

import exact
import head
import reading
import sentences
import torch

from common import diverse_contexts, machine, write
import core_experiment
import fisher

COUNTS = (10, 50, 200, 1000)


def measure(model: reading.Model, context: sentences.Context, tokens) -> tuple[fisher.Eigen, float]:
    point = reading.read(model, context).point
    if tokens == "all":
        return exact.matrices(point, fisher.Chunks(1024)).eigenpairs(), 1.0
    z = head.top_k_cotangents(point, tokens)
    return fisher.eigenpairs(fisher.pull_back(point, z.rows), z.weights), float(z.mass)


def ratios(found: fisher.Eigen, truth: fisher.Eigen) -> dict[str, torch.Tensor]:
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
    args = core_experiment.parse_args([])
    model = reading.load(args.model_name, None, "float32", "cpu")
    contexts = diverse_contexts(model, options.num_sentences)

    whole = [measure(model, context, "all")[0] for context in contexts]
    truncation = {}
    for count in COUNTS:
        found = [measure(model, context, count) for context in contexts]
        rows = [ratios(eigen, truth) for (eigen, _), truth in zip(found, whole, strict=True)]
        mass = torch.tensor([mass for _, mass in found])
        truncation[count] = {"mass": {"median": float(mass.median()), "lowest": float(mass.min())}, **summary(rows)}
        print(count, truncation[count], flush=True)

    # bfloat16 only: CPUs have no fast float16
    half = reading.load(args.model_name, None, "bfloat16", "cpu")
    full = [measure(model, context, 200)[0] for context in contexts]
    rows = [ratios(measure(half, context, 200)[0], truth) for context, truth in zip(contexts, full, strict=True)]
    deviation = torch.stack([(row["lambda"] - 1).abs() for row in rows])
    bfloat16 = {
        "lambda_off_by": {"median": float(deviation.median()), "largest": float(deviation.max())},
        "cos": summary(rows)["cos"],
        "cos_below_0.99": float((torch.stack([row["cos"] for row in rows]) < 0.99).float().mean()),
    }
    print("bfloat16", bfloat16, flush=True)

    figures = {
        "machine": machine(model.lm),
        "sentences": len(contexts),
        "layers": model.layers,
        "truncation": truncation,
        "bfloat16": bfloat16,
    }
    write("approximations", __file__, figures)


if __name__ == "__main__":
    main()

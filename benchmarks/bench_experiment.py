"""The experiment against the naive protocol and against its floor, in one process on the same sentences.

    python benchmarks/bench_experiment.py

naive   for every layer: one full forward pass with the hook, one backward call a token, the d x d
        Fisher matrix, `eigh`, and one full forward pass a scale
this    fisher.linearize and core_experiment.measure_sentence, without controls
floor   one plain forward pass over as many tokens as there are cotangents, perturbations and prefix tokens

Fails unless both find the same eigenvalues (1e-3) and eigenvectors (|cos| >= 0.9999) and KL (1e-2).
Writes what it measured to benchmarks/results/bench_experiment.json.
"""

import argparse
import statistics
import sys

from measuring import Naive, diverse_contexts, embedded, machine, naive, plain_embedded, seconds, show, write
import torch

import core_experiment
import fisher
from residual_fisher.experiment.measurement import Measured

CHUNKS = (25, 50, 100, 200)


def check(slow: list[Naive], fast: Measured, scales: list[float]) -> dict[str, float]:
    """The largest differences of lambda (relative), |cos| (from 1) and KL (relative)."""
    values, vectors = fast.eigen.values[:, 0], fast.eigen.vectors[:, 0]
    value = max(abs(float(v) / s.value - 1) for v, s in zip(values, slow, strict=True))
    cosine = max(1 - abs(float(v @ s.vector)) for v, s in zip(vectors, slow, strict=True))
    expected = torch.tensor([[kl for kl, scale in zip(s.kl, scales, strict=True) if scale] for s in slow])
    kl = float((fast.perturbed.sweep.kl[:, 0] / expected - 1).abs().max())
    if value > 1e-3 or cosine > 1e-4 or kl > 1e-2:
        sys.exit(f"disagreement: lambda {value:.1e}, 1 - |cos| {cosine:.1e}, KL {kl:.1e}")
    return {"difference_lambda": value, "difference_cos": cosine, "difference_kl": kl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sentences", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="of this and floor, for each sentence")
    options = parser.parse_args()

    subject, plain = embedded(), plain_embedded()
    words = ["--scale-unit", "nats", "--num-controls", "0", "--layers", *map(str, subject.layers)]
    settings = core_experiment.parse(words)
    contexts = diverse_contexts(subject, options.num_sentences)
    k, scales = settings.max_vocab_subset, settings.scales
    perturbations = len(subject.layers) * sum(map(bool, scales))
    batches = core_experiment.Batches(settings.batch_size)

    def ours(context):
        clock = core_experiment.Clock()
        with clock("prefix"):
            point = subject.linearize(context)
        return core_experiment.measure_sentence(settings, context, point, {}, batches, clock), clock.seconds

    def floor(ids):
        with torch.no_grad():
            plain(ids, use_cache=False)

    ours(contexts[0])  # warm-up
    rows = []
    for context in contexts:
        ids = torch.tensor(context.ids)
        tokens = k + perturbations + len(ids) - 1
        filler = torch.randint(0, plain.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        layers = [plain.model.layers[number] for number in subject.layers]
        naive_seconds, slow = seconds(lambda: [naive(plain, layer, ids, k, scales) for layer in layers])  # noqa: B023
        mine, floors, stages = [], [], []
        for _ in range(options.repeats):  # in turns, so that a slow moment of the machine meets both
            duration, (measured, stage) = seconds(lambda: ours(context))  # noqa: B023
            mine.append(duration)
            stages.append(stage)
            # whichever shape of the same tokens is faster here
            floors.append(min(seconds(lambda: floor(f))[0] for f in (filler, filler.T)))  # noqa: B023
        row = {
            "prompt_tokens": len(ids), "tokens_of_floor": tokens, "naive_s": naive_seconds,
            "this_s": statistics.median(mine), "floor_s": statistics.median(floors),
            "naive_over_this": naive_seconds / statistics.median(mine),
            "this_over_floor": statistics.median(m / f for m, f in zip(mine, floors, strict=True)),
            "stages_s": {name: statistics.median(s[name] for s in stages) for name in stages[0]},
            **check(slow, measured, scales),
        }  # fmt: skip
        rows.append(row)
        show(f"{len(ids)} tokens", row)

    point = subject.linearize(contexts[0])
    cotangents = point.cotangents(point.log_probs.topk(k).indices)
    by_chunk = {
        size: statistics.median(
            seconds(lambda: fisher.pull_back(point, cotangents, fisher.Chunks(size)))[0]  # noqa: B023
            for _ in range(options.repeats)
        )
        for size in CHUNKS
    }
    medians = {key: statistics.median(r[key] for r in rows) for key in ("naive_over_this", "this_over_floor")}
    show("medians", medians)
    show("seconds of the gradients by batch size", by_chunk)
    figures = {
        "machine": machine(subject.lm),
        "protocol": {"layers": subject.layers, "k": k, "scales": scales, "perturbations": perturbations},
        "medians": medians,
        "sentences": rows,
        "gradient_seconds_by_batch_size": by_chunk,
    }
    write("bench_experiment", __file__, figures)


if __name__ == "__main__":
    main()

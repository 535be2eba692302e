"""The experiment against the naive protocol and against its floor, in one process on the same sentences.

    python benchmarks/bench_experiment.py

naive   for every layer: one full forward pass with the hook, one backward call a token, the d x d
        Fisher matrix, `eigh`, and one full forward pass a scale
this    core_experiment.read and core_experiment.perturb, without controls
floor   one plain forward pass over as many tokens as there are cotangents, pushes and prefix tokens

Fails unless both find the same eigenvalues (1e-3) and eigenvectors (|cos| >= 0.9999) and KL (1e-2).
Writes what it measured to benchmarks/results/bench_experiment.json.
"""

import argparse
import statistics
import sys

import head
import models
import reading
import torch
from transformers import AutoModelForCausalLM

from common import diverse_contexts, machine, seconds, write
import core_experiment
import fisher

CHUNKS = (25, 50, 100, 200)


def naive(lm, layers, ids: torch.Tensor, k: int, scales: list[float]) -> list[dict]:
    """The protocol as it reads, one layer, one token and one push at a time."""
    found = []
    for layer in layers:
        d = lm.config.hidden_size
        bias = torch.zeros(d, requires_grad=True)
        shift = {"by": bias}

        def add(module, args, h, shift=shift):
            return torch.cat([h[:, :-1], h[:, -1:] + shift["by"]], dim=1)

        handle = layer.register_forward_hook(add)
        log_probs = lm(ids[None]).logits[0, -1].log_softmax(-1)
        top = log_probs.topk(k)
        gradients = torch.stack([torch.autograd.grad(lp, bias, retain_graph=True)[0] for lp in top.values])
        p = top.values.detach().exp()
        values, vectors = torch.linalg.eigh(gradients.T @ (p[:, None] * gradients))
        value, vector = values[-1], vectors[:, -1] * torch.sign(vectors[:, -1] @ gradients[0])
        kl = []
        with torch.no_grad():
            for scale in scales:
                shift["by"] = scale * value.rsqrt() * vector
                log_q = lm(ids[None]).logits[0, -1].log_softmax(-1)
                kl.append(float((log_probs.exp() * (log_probs - log_q)).sum()))
        handle.remove()
        found.append({"value": float(value), "vector": vector, "kl": kl})
    return found


def check(slow: list[dict], fast, scales: list[float]) -> tuple[float, float, float]:
    """The largest differences of lambda (relative), |cos| (from 1) and KL (relative)."""
    values, vectors = fast.eigen.values[:, 0], fast.eigen.vectors[:, 0]
    value = max(abs(float(v) / s["value"] - 1) for v, s in zip(values, slow, strict=True))
    cosine = max(1 - abs(float(v @ s["vector"])) for v, s in zip(vectors, slow, strict=True))
    expected = torch.tensor([[kl for kl, a in zip(s["kl"], scales, strict=True) if a] for s in slow])
    kl = float((fast.sweep.kl[:, 0] / expected - 1).abs().max())
    if value > 1e-3 or cosine > 1e-4 or kl > 1e-2:
        sys.exit(f"disagreement: lambda {value:.1e}, 1 - |cos| {cosine:.1e}, KL {kl:.1e}")
    return value, cosine, kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sentences", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="of this and floor, for each sentence")
    options = parser.parse_args()

    args = core_experiment.parse_args(["--scale-unit", "nats", "--num-controls", "0", "--device", "cpu"])
    model = reading.load(args.model_name, args.layers, args.dtype, args.device)
    # The naive protocol takes the model as transformers hands it out, fused attention and all.
    plain = AutoModelForCausalLM.from_pretrained(models.embedded_model()).eval().requires_grad_(False)
    plain_layers = [plain.model.layers[number] for number in model.layers]
    contexts = diverse_contexts(model, options.num_sentences)
    pushes = len(model.layers) * sum(map(bool, args.scales))
    batches = core_experiment.Batches.of(args.batch_size)

    def ours(context):
        clock = core_experiment.Clock()
        with clock("prefix"):
            prompt = reading.read(model, context)
        return core_experiment.perturb(args, model, context, prompt, {}, batches, clock), clock.seconds

    def floor(ids):
        with torch.no_grad():
            plain(ids, use_cache=False)

    ours(contexts[0])  # warm-up
    rows = []
    for context in contexts:
        ids = torch.tensor(context.ids)
        tokens = args.max_vocab_subset + pushes + len(ids) - 1
        filler = torch.randint(0, plain.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        naive_seconds, slow = seconds(lambda: naive(plain, plain_layers, ids, args.max_vocab_subset, args.scales))  # noqa: B023
        mine, floors, stages = [], [], []
        for _ in range(options.repeats):  # in turns, so that a slow moment of the machine meets both
            duration, (measured, stage) = seconds(lambda: ours(context))  # noqa: B023
            mine.append(duration)
            stages.append(stage)
            # whichever shape of the same tokens is faster here
            floors.append(min(seconds(lambda: floor(f))[0] for f in (filler, filler.T)))  # noqa: B023
        value, cosine, kl = check(slow, measured, args.scales)
        rows.append(
            {
                "prompt_tokens": len(ids), "tokens_of_floor": tokens, "naive_s": naive_seconds,
                "this_s": statistics.median(mine), "floor_s": statistics.median(floors),
                "naive_over_this": naive_seconds / statistics.median(mine),
                "this_over_floor": statistics.median(m / f for m, f in zip(mine, floors, strict=True)),
                "stages_s": {name: statistics.median(s[name] for s in stages) for name in stages[0]},
                "difference_lambda": value, "difference_cos": cosine, "difference_kl": kl,
            }
        )  # fmt: skip
        print({k: v if isinstance(v, dict) else float(f"{v:.3g}") for k, v in rows[-1].items()}, flush=True)

    point = reading.read(model, contexts[0]).point
    cotangents = head.top_k_cotangents(point, args.max_vocab_subset)
    chunk_seconds = {
        size: statistics.median(
            seconds(lambda: fisher.pull_back(point, cotangents.rows, fisher.Chunks(size)))[0]  # noqa: B023
            for _ in range(options.repeats)
        )
        for size in CHUNKS
    }
    medians = {key: statistics.median(r[key] for r in rows) for key in ("naive_over_this", "this_over_floor")}
    print(f"naive / this {medians['naive_over_this']:.1f}   this / floor {medians['this_over_floor']:.2f}")
    print("seconds of the gradients by --batch-size:", {k: round(v, 3) for k, v in chunk_seconds.items()})
    figures = {
        "machine": machine(model.lm),
        "protocol": {"layers": model.layers, "k": args.max_vocab_subset, "scales": args.scales, "pushes": pushes},
        "medians": medians,
        "sentences": rows,
        "gradient_seconds_by_batch_size": chunk_seconds,
    }
    write("bench_experiment", __file__, figures)


if __name__ == "__main__":
    main()

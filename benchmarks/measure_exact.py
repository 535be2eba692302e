"""What the whole vocabulary costs beside a truncated one, and whether it is right, on the embedded model.

    python benchmarks/measure_exact.py

experiment  six sentences, 7 layers: the top ten eigenpairs from k = 200 tokens and from all, in turns, timed from the
            sentence (with the prefix and the forward pass) and from the linearised model; three of the sentences
            against a float64 model: d backward rows through the plain forward pass of the whole prompt, C as it is
            written, eigh
pipeline    bundled prompts at layer 15, batch 8: k = 10 and all, r = 10, a batch after the other; residuals
"""

import argparse
from itertools import islice
import statistics

from measuring import diverse_contexts, embedded, machine, plain_embedded, seconds, show, write
import torch

import compute_fisher
import fisher
from residual_fisher.model.loading import find_module
from residual_fisher.pipeline.prompts import Prompts, encode, plan_batches
from residual_fisher.pipeline.settings import Settings

K, NUM = 200, 10
ROWS = fisher.Chunks(1024)


def float64_eigenpairs(lm, layers: list[int], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top eigenvalues (layers,) and eigenvectors (layers, d), without this project's code."""
    biases, kept = [], {}

    def add(module, args, h):
        biases.append(torch.zeros(h.shape[-1], dtype=h.dtype, requires_grad=True))
        return torch.cat([h[:, :-1], h[:, -1:] + biases[-1]], dim=1)

    handles = [lm.model.layers[number].register_forward_hook(add) for number in layers]
    handles.append(lm.lm_head.register_forward_pre_hook(lambda module, args: kept.update(x=args[0])))
    try:
        p = lm(ids[None], use_cache=False).logits[0, -1].detach().softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    x, w = kept["x"][0, -1], lm.lm_head.weight
    rows = [torch.autograd.grad(x, biases, one, retain_graph=True) for one in torch.eye(len(x), dtype=x.dtype)]
    c = w.T @ (p[:, None] * w) - torch.outer(w.T @ p, w.T @ p)
    values, vectors = [], []
    for jacobian in map(torch.stack, zip(*rows, strict=True)):
        value, vector = torch.linalg.eigh(jacobian.T @ c @ jacobian)
        values.append(value[-1])
        vectors.append(vector[:, -1])
    return torch.stack(values), torch.stack(vectors)


def experiment(sentences: int, repeats: int, checked: int) -> dict:
    subject = embedded()
    contexts = diverse_contexts(subject, sentences)
    wide = plain_embedded(dtype=torch.float64, attn_implementation="eager")
    rows = []
    for number, context in enumerate(contexts):
        times = {"reading": [], "top-k": [], "exact": []}
        for turn in range(repeats + 1):
            reading_s, point = seconds(lambda: subject.linearize(context))  # noqa: B023
            top_s, _ = seconds(lambda: fisher.top_k(point, K, ROWS).eigenpairs(NUM))  # noqa: B023
            exact_s, eigen = seconds(lambda: fisher.full_vocabulary(point, ROWS).eigenpairs(NUM))  # noqa: B023
            if turn or number:
                for name, duration in zip(times, (reading_s, top_s, exact_s), strict=True):
                    times[name].append(duration)
        row = {"prompt_tokens": len(context.ids), **{name: statistics.median(t) for name, t in times.items()}}
        row["ratio"] = row["exact"] / row["top-k"]
        row["ratio_with_reading"] = (row["reading"] + row["exact"]) / (row["reading"] + row["top-k"])
        if number < checked:
            values, vectors = float64_eigenpairs(wide, subject.layers, torch.tensor(context.ids))
            row["difference_lambda"] = float((eigen.values[:, 0] / values - 1).abs().max())
            row["difference_cos"] = float((1 - (eigen.vectors[:, 0] * vectors).sum(-1).abs()).max())
        rows.append(row)
        show(f"{len(context.ids)} tokens", row)
    medians = {name: statistics.median(row[name] for row in rows) for name in ("ratio", "ratio_with_reading")}
    return {"machine": machine(subject.lm), "layers": subject.layers, "medians": medians, "sentences": rows}


def pipeline(count: int) -> dict:
    settings, full = Settings(), Settings(top_k_tokens="all")
    lm, tokenizer, _ = embedded()
    subject = compute_fisher.Subject(lm, tokenizer, *find_module(lm, settings.hook_layer_name))
    encoded = [encode(tokenizer, prompt, 2048) for prompt in islice(iter(Prompts(settings.dataset)), count)]
    batches = plan_batches([len(e.ids) for e in encoded], settings.batch_size)
    rows = []
    for batch in ([encoded[i] for i in indices] for indices in batches):
        top_s, _ = seconds(lambda: compute_fisher.measure(settings, subject, batch))  # noqa: B023
        exact_s, results = seconds(lambda: compute_fisher.measure(full, subject, batch))  # noqa: B023
        residuals = [result.record["residual"] for result in results]
        errors = [result.record["trace_error"] / result.record["trace"] for result in results]
        row = {"prompts": len(batch), "longest": max(len(e.ids) for e in batch), "top-k": top_s, "exact": exact_s}
        row |= {"ratio": exact_s / top_s, "residual": max(residuals), "trace_error_share": statistics.median(errors)}
        rows.append(row)
        show(f"{len(batch)} prompts", row)
    total = sum(row["exact"] for row in rows) / sum(row["top-k"] for row in rows)
    return {"ratio": total, "residual": max(row["residual"] for row in rows), "batches": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sentences", type=int, default=6)
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    figures = {"experiment": experiment(options.num_sentences, options.repeats, checked=3)}
    figures["pipeline"] = pipeline(options.num_prompts)
    show("times as long", {**figures["experiment"]["medians"], "pipeline": figures["pipeline"]["ratio"]})
    write("exact", __file__, figures)


if __name__ == "__main__":
    main()

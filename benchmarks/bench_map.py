"""The map of a text against its floor, and against `linearize` at each token, in one process on the same text.

    OMP_NUM_THREADS=1 python benchmarks/bench_map.py

this    fisher.map_text: 64 tokens, all layers, k = 50
floor   plain forward passes over the text, without gradients and without logits: 1, k for the rows of its backward
        passes, and 14.5 for J h, since the product at a layer runs through the layers above it alone
loop    fisher.linearize, the eigenpairs of fisher.top_k, and fisher.carry at every eighth token, times eight
J h     fisher.carry alone, a part of this

CPU seconds of one thread, since what else the machine does then hardly counts. Fails unless both find the same
eigenvalues (1e-3). Writes benchmarks/results/bench_map.json.
"""

from collections.abc import Callable
import json
import statistics
import sys
import time

from measuring import ROOT, embedded, machine, show, write
import torch

import fisher

TOKENS, K, EVERY, TURNS, DEPTH = 64, 50, 8, 2, 30
PASSES = 1 + K + sum(range(DEPTH)) / DEPTH
ROWS = 10  # of the floor, in one pass


def cpu_seconds(function: Callable) -> tuple[float, object]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def main() -> None:
    torch.set_num_threads(1)
    subject = embedded(range(DEPTH))
    sentences = json.loads((ROOT / "data" / "animals.json").read_text(encoding="utf-8"))["animals"]
    ids = subject.tokenizer(" ".join(sentences)).input_ids[:TOKENS]
    some = list(range(EVERY - 1, TOKENS, EVERY))
    batch = torch.tensor([ids]).expand(ROWS, -1)

    def this() -> torch.Tensor:
        text = subject.tokenizer.decode(ids)
        found = fisher.map_text(subject.lm, subject.tokenizer, text, k=K)
        assert found.ids.tolist() == ids
        return found.eigenvalues[some]  # (tokens, layers)

    def loop() -> torch.Tensor:
        found = []
        for n in some:
            point = fisher.linearize(subject.lm, ids[: n + 1])
            found.append(fisher.top_k(point, K).eigenpairs().values[:, 0])
            fisher.carry(point)
        return torch.stack(found)

    def floor() -> None:
        with torch.no_grad():
            subject.lm.base_model(batch, use_cache=False)

    (point,) = fisher.linearize_each(subject.lm, ids)
    taken = {"this": [], "floor": [], "loop": [], "J h": []}
    for turn in range(TURNS + 1):  # the first warms up
        (mine, found), (theirs, expected), (least, _) = map(cpu_seconds, (this, loop, floor))
        carried, _ = cpu_seconds(lambda: fisher.carry(point))
        if (found / expected - 1).abs().max() > 1e-3:
            sys.exit("the map and linearize disagree")
        if turn:
            seconds = {"this": mine, "floor": least * PASSES / ROWS, "loop": theirs * EVERY, "J h": carried}
            for name, value in seconds.items():
                taken[name].append(value)
    figures = {f"{name}_s": statistics.median(values) for name, values in taken.items()}
    figures |= {
        "this / floor": figures["this_s"] / figures["floor_s"],
        "loop / this": figures["loop_s"] / figures["this_s"],
    }
    show(f"{TOKENS} tokens, {DEPTH} layers, k = {K}", figures)
    write("bench_map", __file__, {"machine": machine(subject.lm), "tokens": TOKENS, "k": K, "turns": TURNS, **figures})


if __name__ == "__main__":
    main()

"""The map of a text against its floor, and against `linearize` at each token, in one process on the same text.

    OMP_NUM_THREADS=1 python benchmarks/bench_map.py

this    fisher.map_text: 64 tokens, all layers, k = 50
floor   1 + k plain forward passes over the text, without gradients and without logits: the rows of its backward passes
loop    fisher.linearize and the eigenpairs of fisher.top_k at every eighth token, times eight

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

TOKENS, K, EVERY, TURNS = 64, 50, 8, 2
ROWS = 10  # of the floor, in one pass


def cpu_seconds(function: Callable) -> tuple[float, object]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def main() -> None:
    torch.set_num_threads(1)
    subject = embedded(range(30))
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
        points = (fisher.linearize(subject.lm, ids[: n + 1]) for n in some)
        return torch.stack([fisher.top_k(point, K).eigenpairs().values[:, 0] for point in points])

    def floor() -> None:
        with torch.no_grad():
            subject.lm.base_model(batch, use_cache=False)

    taken = {"this": [], "floor": [], "loop": []}
    for turn in range(TURNS + 1):  # the first warms up
        (mine, found), (theirs, expected), (least, _) = map(cpu_seconds, (this, loop, floor))
        if (found / expected - 1).abs().max() > 1e-3:
            sys.exit("the map and linearize disagree")
        if turn:
            for name, value in (("this", mine), ("floor", least * (1 + K) / ROWS), ("loop", theirs * EVERY)):
                taken[name].append(value)
    figures = {f"{name}_s": statistics.median(values) for name, values in taken.items()}
    figures |= {
        "this / floor": figures["this_s"] / figures["floor_s"],
        "loop / this": figures["loop_s"] / figures["this_s"],
    }
    show(f"{TOKENS} tokens, 30 layers, k = {K}", figures)
    write("bench_map", __file__, {"machine": machine(subject.lm), "tokens": TOKENS, "k": K, **figures})


if __name__ == "__main__":
    main()

"""How the time of one sentence's Fisher eigenpairs grows with k, width, prompt length and layers.

    python benchmarks/measure_scaling.py

The first three on the embedded model and its 30 layers, the width on random weights (8 layers, 8 chosen, 16,384
tokens). Beside each point its floor: one plain forward pass over as many tokens as there are prompt tokens and
rows of gradients. At each width also the two ways to the exact matrix. Median of three, in turns.
Writes benchmarks/results/scaling.json and docs/scaling_curves.png.
"""

import argparse

import matplotlib.pyplot as plt
from measuring import ROOT, diverse_contexts, embedded, in_turns, machine, plain_embedded, show, write
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import fisher
from residual_fisher.common import drawing
from residual_fisher.pipeline.block_lanczos import leading_eigenpairs

COUNTS = (10, 25, 50, 100, 200, 500)
WIDTHS = (256, 512, 1024, 2048)
LENGTHS = (8, 32, 128, 512)
LAYERS = (1, 2, 4, 8, 15, 30)
ROWS = fisher.Chunks(1024)
REPEATS = 3


def top_k(lm: nn.Module, layers: list[int], ids: torch.Tensor, k: int) -> None:
    fisher.top_k(fisher.linearize(lm, ids, layers), k, ROWS).eigenpairs()


def full(lm: nn.Module, layers: list[int], ids: torch.Tensor) -> None:
    fisher.full_vocabulary(fisher.linearize(lm, ids, layers), ROWS).eigenpairs()


def block(lm: nn.Module, layers: list[int], ids: torch.Tensor, num: int) -> None:
    leading_eigenpairs(fisher.linearize(lm, ids, layers), num, chunks=ROWS)


def plain(lm: nn.Module, tokens: int) -> None:
    with torch.no_grad():
        lm(torch.randint(100, (1, tokens)), use_cache=False, logits_to_keep=1)


def random_model(d: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=d, num_hidden_layers=8, num_attention_heads=d // 64, num_key_value_heads=d // 64,
        intermediate_size=3 * d, vocab_size=16384,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def measure() -> tuple[dict, dict]:
    subject, floor_model = embedded(), plain_embedded()
    lm, chosen, depth = subject.lm, subject.layers, subject.lm.config.num_hidden_layers
    ids = torch.tensor(diverse_contexts(subject, 1)[0].ids)
    curves = {name: {} for name in ("k (top-k tokens)", "prompt tokens", "layers", "width")}

    for k in COUNTS:
        curves["k (top-k tokens)"][k] = in_turns(
            {"this": lambda: top_k(lm, chosen, ids, k), "floor": lambda: plain(floor_model, k + len(ids))},  # noqa: B023
            REPEATS,
        )
        show(f"k {k}", curves["k (top-k tokens)"][k])
    for length in LENGTHS:
        long = torch.randint(1000, (length,), generator=torch.Generator().manual_seed(0))
        curves["prompt tokens"][length] = in_turns(
            {"this": lambda: top_k(lm, chosen, long, 200), "floor": lambda: plain(floor_model, 200 + length)},  # noqa: B023
            REPEATS,
        )
        show(f"length {length}", curves["prompt tokens"][length])
    for count in LAYERS:
        some = torch.linspace(0, depth - 1, count).round().int().tolist()
        curves["layers"][count] = in_turns(
            {"this": lambda: top_k(lm, some, ids, 200), "floor": lambda: plain(floor_model, 200 + len(ids))},  # noqa: B023
            REPEATS,
        )
        show(f"layers {count}", curves["layers"][count])
    for d in WIDTHS:
        wide = random_model(d)
        layers = list(range(8))
        known = ids % wide.config.vocab_size
        functions = {
            "this": lambda: top_k(wide, layers, known, 200),  # noqa: B023
            "floor": lambda: plain(wide, 200 + len(ids)),  # noqa: B023
            "whole vocabulary, d rows": lambda: full(wide, layers, known),  # noqa: B023
            "whole vocabulary, block iteration for 1 pair": lambda: block(wide, layers, known, 1),  # noqa: B023
            "whole vocabulary, block iteration for 10 pairs": lambda: block(wide, layers, known, 10),  # noqa: B023
        }
        curves["width"][d] = in_turns(functions, REPEATS)
        show(f"width {d}", curves["width"][d])
    return machine(lm), curves


def picture(curves: dict) -> None:
    styles = {
        "this": ("#D55E00", "o-"),
        "floor": ("#000000", "s--"),
        "whole vocabulary, d rows": ("#0072B2", "^-"),
        "whole vocabulary, block iteration for 1 pair": ("#009E73", "v-"),
        "whole vocabulary, block iteration for 10 pairs": ("#CC79A7", "D-"),
    }
    with plt.rc_context(drawing.STYLE):
        figure, panels = plt.subplots(1, 4, figsize=(20, 5.6), sharey=True)
        for panel, (what, points) in zip(panels, curves.items(), strict=True):
            x = list(points)
            for name in next(iter(points.values())):
                colour, line = styles[name]
                label = "this, the 200 most probable tokens" if name == "this" else name
                panel.plot(x, [points[at][name] for at in x], line, color=colour, markersize=5, label=label)
            panel.set(xlabel=what, xscale="log", yscale="log")
            panel.set_xticks(x, [str(at) for at in x])
            panel.minorticks_off()
        panels[0].set_ylabel("seconds a sentence")
        panels[-1].set_title("random weights, 8 layers")
        panels[0].set_title("SmolLM2-135M, 7 layers")
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(ROOT / "docs" / "scaling_curves.png", dpi=110)
        plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    about, curves = measure()
    write("scaling", __file__, {"machine": about, "curves": curves})
    picture(curves)


if __name__ == "__main__":
    main()

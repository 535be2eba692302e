"""The experiment's two pictures, drawn from its result file, and what all pictures share.

    python plots.py experiment_results
    python plots.py fisher_results

draws them again, from a run that was cut short or after a change here.
"""

from collections.abc import Callable
import json
from pathlib import Path
import sys
import warnings

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator
import numpy as np

from arguments import printable
from errors import UserError
import storage

RESULTS = "experiment_results.json"
SIMILARITY, PERTURBATION = "fisher_similarity_matrix.png", "perturbation_analysis.png"

DPI = 150
STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 14,
    "figure.constrained_layout.use": True,
}
# Okabe and Ito's colours, told apart with any colour vision; and a line style each, for print
KINDS = {"fisher": ("#D55E00", "-", "o"), "difference": ("#0072B2", "-", "s"), "random": ("#7A7A7A", "-", "^")}
NAMES = {"fisher": "Fisher eigenvector", "difference": "towards another sentence", "random": "random"}
TOKEN_COLOURS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"]
# the square root keeps small cosines, where most of the pairs are, apart
COSINE = {"cmap": "viridis", "norm": PowerNorm(0.5, vmin=0, vmax=1)}
MAX_PANELS = 8  # layers that get a panel of their own; of more, evenly spaced ones
KL_FLOOR = 1e-11  # nats: below it, rounding of the logits


def draw(directory: Path) -> None:
    """Draws both pictures of the results in `directory`.

    Raises:
        UserError: no readable results there, or it cannot be written to.
    """
    try:
        results = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"no readable {RESULTS} in {directory}: {error}") from error
    save(
        directory, {SIMILARITY: lambda: similarity_figure(results), PERTURBATION: lambda: perturbation_figure(results)}
    )


def save(directory: Path, figures: dict[str, Callable[[], Figure]]) -> None:
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a token in a script that the font lacks is drawn as a box
        for name, make in figures.items():
            figure = make()
            with storage.atomic_open(directory / name) as file:
                figure.savefig(file, format="png", dpi=DPI)
            plt.close(figure)


# --- similarity of the eigenvectors --------------------------------------------------------------


def similarity_figure(results: dict) -> Figure:
    """|cosine| of top eigenvectors, all pairs grouped by layer, beside its mean by pair of layers."""
    layers = list(results["fisher"][0])
    matrix = np.array(results["similarity_matrix"])
    count = len(matrix) // len(layers)  # sentences
    figure, (all_pairs, means) = plt.subplots(1, 2, figsize=(15, 7.4), width_ratios=[1.6, 1])

    image = all_pairs.imshow(matrix, **COSINE, interpolation="nearest")
    centres = np.arange(len(layers)) * count + (count - 1) / 2
    for ticks in (all_pairs.set_xticks, all_pairs.set_yticks):
        ticks(centres, layers)
    for edge in np.arange(1, len(layers)) * count - 0.5:
        all_pairs.axhline(edge, color="white", linewidth=1)
        all_pairs.axvline(edge, color="white", linewidth=1)
    all_pairs.tick_params(length=0)
    all_pairs.set(
        title="Top Fisher eigenvectors, every pair",
        xlabel=f"layer ({count} sentence{'s' * (count > 1)} in each block)",
        ylabel="layer",
    )

    blocks = _block_means(matrix, len(layers), count)
    means.imshow(blocks, **COSINE)
    for (row, column), value in np.ndenumerate(blocks):
        if len(layers) <= 12 and np.isfinite(value):
            colour = "white" if value < 0.4 else "black"
            means.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=11)
    for ticks in (means.set_xticks, means.set_yticks):
        ticks(np.arange(len(layers)), layers)
    means.tick_params(length=0)
    means.set(title=_within_and_between(blocks), xlabel="layer", ylabel="layer")
    chance = np.sqrt(2 / (np.pi * results["environment"]["hidden_size"]))
    figure.colorbar(
        image, ax=[all_pairs, means], shrink=0.8, label=f"|cosine|   (random directions: {chance:.2f} on average)"
    )
    return figure


def _block_means(matrix: np.ndarray, layers: int, count: int) -> np.ndarray:
    """Mean |cosine| by pair of layers; within a layer, of different sentences (NaN for a single one)."""
    blocks = matrix.reshape(layers, count, layers, count).sum(axis=(1, 3))
    pairs = np.full((layers, layers), float(count * count))
    blocks[np.diag_indices(layers)] -= count  # each with itself
    pairs[np.diag_indices(layers)] -= count
    return np.divide(blocks, pairs, out=np.full_like(blocks, np.nan), where=pairs > 0)


def _within_and_between(blocks: np.ndarray) -> str:
    within, between = np.diag(blocks), blocks[~np.eye(len(blocks), dtype=bool)]
    parts = [
        f"{name} {values.mean():.2f}"
        for name, values in (("within a layer", within), ("between layers", between))
        if np.isfinite(values).any()
    ]
    return "Mean: " + ", ".join(parts) if parts else "Mean"


# --- what the pushes did -------------------------------------------------------------------------


def perturbation_figure(results: dict) -> Figure:
    """KL against scale by layer; top-5 overlap and flips by layer and scale; one sentence's tokens."""
    layers = list(results["fisher"][0])
    shown = [layers[i] for i in sorted(set(np.linspace(0, len(layers) - 1, MAX_PANELS).round().astype(int)))]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    radius = any("trust_radius" in entry for entry in results["fisher"][0].values())
    figure = plt.figure(figsize=(16 + 4 * radius, 3.4 * rows + 5.2))
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.4 * rows, 5.2])

    panels = top.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel, layer in zip(panels.flat, shown, strict=False):
        _kl_panel(panel, results, layer)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    for panel in panels[-2, len(shown) - columns * (rows - 1) :] if rows > 1 else ():
        panel.tick_params(labelbottom=True)  # the panel below it is not there to carry them
    handles, labels = panels[0, 0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    unit = results["experiment_config"]["scale_unit"]
    step = {"eigenvalue": "steps of λ", "nats": "steps of 1/√λ", "norm": "steps of ‖h‖/100"}[unit]
    top.supxlabel(f"scale α ({step})", fontsize=13)
    top.supylabel("KL(original ‖ perturbed), nats", fontsize=13)

    overlap, flips, *trust, example = bottom.subplots(1, 3 + radius, width_ratios=[1] * (2 + radius) + [1.25])
    _heatmap(overlap, results, _overlap, "Top-5 tokens kept (Fisher)", "viridis")
    _heatmap(flips, results, lambda push, base: push["top_changed"], "Top token changed (Fisher)", "magma")
    if trust:
        _trust_panel(trust[0], results)
        figure.get_layout_engine().set(wspace=0.06)  # its right axis has a label too
    _example_panel(example, results)
    return figure


def _scales(results: dict) -> list[str]:
    return [f"{scale:g}" for scale in results["experiment_config"]["scales"]]


def _pushes(results: dict, layer: str, scale: str, kind: str) -> list[dict]:
    """Records of one kind of direction at a layer and scale, over all sentences."""
    if kind == "fisher":
        return [sentence[layer][scale] for sentence in results["perturbation_results"]]
    controls = [sentence[layer][scale]["controls"] for sentence in results["perturbation_results"]]
    return [push for control in controls for name, push in control.items() if name.partition("_")[0] == kind]


def _kl_panel(panel: Axes, results: dict, layer: str) -> None:
    scales = [scale for scale in _scales(results) if float(scale)]
    signed = [np.array([s for s in scales if sign * float(s) > 0]) for sign in (-1, 1)]
    for kind, (colour, line, marker) in KINDS.items():
        for side in signed:  # two curves: KL is 0 at scale 0, which has no place on a log axis
            pushes = [_pushes(results, layer, scale, kind) for scale in side]
            if not pushes or not pushes[0]:
                continue
            x = side.astype(float)
            quartiles = [np.percentile([p["kl"] for p in at], [25, 50, 75]) for at in pushes]
            low, median, high = np.maximum(quartiles, KL_FLOOR).T
            label = NAMES[kind] if side is signed[-1] else None
            panel.plot(x, median, line, color=colour, marker=marker, markersize=4, label=label)
            panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            if kind == "fisher":
                predicted = [np.median([p["predicted_kl"] for p in at]) for at in pushes]
                label = label and "predicted for it, ½ δᵀFδ"
                panel.plot(x, np.maximum(predicted, KL_FLOOR), "--", color="black", linewidth=1.3, label=label)
    panel.set_yscale("log")
    _scale_axis(panel, scales)
    panel.set_title(f"layer {layer}")


def _scale_axis(panel: Axes, scales: list[str]) -> None:
    """Logarithmic in |scale| on either side of a narrow middle, labelled at a few of the scales."""
    sizes = sorted({abs(float(scale)) for scale in scales if float(scale)})
    keep = {sizes[0], sizes[len(sizes) // 2], sizes[-1]}
    ticks = [float(scale) for scale in scales if abs(float(scale)) in keep]
    panel.set_xscale("symlog", linthresh=sizes[0], linscale=0.25)
    panel.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    panel.minorticks_off()


def _overlap(push: dict, base: list[int]) -> float:
    return len(set(push["top_ids"]) & set(base)) / len(base)


def _heatmap(panel: Axes, results: dict, statistic, title: str, cmap: str) -> None:
    """Mean over sentences of statistic(push, unperturbed top ids), layers by scales."""
    layers, scales = list(results["fisher"][0]), _scales(results)
    bases = [context["top_ids"] for context in results["contexts"]]
    values = [
        [
            np.mean([statistic(p, b) for p, b in zip(_pushes(results, layer, scale, "fisher"), bases, strict=True)])
            for scale in scales
        ]
        for layer in layers
    ]
    image = panel.imshow(values, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    shown = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 12)).round().astype(int))
    panel.set_yticks(shown, [layers[i] for i in shown])
    ticks = np.arange(0, len(scales), -(-len(scales) // 12))
    panel.set_xticks(ticks, [scales[i].replace("-", "−") for i in ticks], rotation=45 if len(scales) > 7 else 0)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set(title=title, xlabel="scale α", ylabel="layer")
    panel.figure.colorbar(image, ax=panel, format=lambda x, _: f"{x:.0%}", pad=0.02)


def _trust_panel(panel: Axes, results: dict) -> None:
    """How far along v the quadratic prediction holds: medians and quartiles by layer, in nats and in norms of h."""
    layers = list(results["fisher"][0])
    x = np.arange(len(layers))
    norms = panel.twinx()
    sides = (
        (panel, "nats", KINDS["fisher"], "predicted KL there, nats"),
        (norms, "norms", KINDS["difference"], "step there, norms of h"),
    )
    for axis, unit, (colour, line, marker), label in sides:
        at_layer = [[e[layer]["trust_radius"][unit] for e in results["fisher"]] for layer in layers]
        values = [[value for value in at if value is not None] or [np.nan] for at in at_layer]
        low, median, high = np.array([np.percentile(at, [25, 50, 75]) for at in values]).T
        axis.plot(x, median, line, color=colour, marker=marker, markersize=5)
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylabel(label, color=colour)
        axis.tick_params(axis="y", which="both", colors=colour)
    norms.spines["right"].set_visible(True)
    shown = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 12)).round().astype(int))
    panel.set_xticks(shown, [layers[i] for i in shown])
    panel.set(title="½ λ s² holds to 10% up to", xlabel="layer")


def _example_panel(panel: Axes, results: dict) -> None:
    """Next-token probabilities across scales: the sentence that best predicts its target, the middle layer."""
    scales, contexts = _scales(results), results["contexts"]
    sentence = max(range(len(contexts)), key=lambda i: contexts[i]["target_probability"])
    layers = list(results["fisher"][sentence])
    layer = layers[len(layers) // 2]
    pushes = [results["perturbation_results"][sentence][layer][scale] for scale in scales]
    x = [float(scale) for scale in scales]

    curves: dict[str, np.ndarray] = {}  # a token's probability is known while it is in the top 5
    for column, push in enumerate(pushes):
        for token, probability in zip(push["top_tokens"], push["top_probs"], strict=True):
            curves.setdefault(token, np.full(len(scales), np.nan))[column] = probability
    target = contexts[sentence]["target_token"]
    curves.pop(target, None)
    panel.plot(x, [push["target_prob"] for push in pushes], "o-", color=TOKEN_COLOURS[0], label=_token_name(target))
    leading = sorted(curves, key=lambda token: -np.nanmax(curves[token]))
    for token, colour in zip(leading, TOKEN_COLOURS[1:], strict=False):
        panel.plot(x, curves[token], "s--", color=colour, markersize=5, label=_token_name(token))
    _scale_axis(panel, scales)
    panel.set_ylim(-0.02, 1.02)
    prompt = contexts[sentence]["prompt"]
    prompt = prompt if len(prompt) <= 30 else "…" + prompt[-29:]
    panel.set(title=f"S{sentence}, layer {layer}: “{plain(prompt)}”", xlabel="scale α", ylabel="probability")
    panel.title.set_fontsize(12)
    panel.legend(frameon=False, fontsize=11, loc="upper left", bbox_to_anchor=(1, 1))


def _token_name(token: str) -> str:
    """A token as a label: quoted, since its spaces matter."""
    return f"“{plain(token)}”"


def plain(text: str) -> str:
    """`text` without what matplotlib, or a terminal, would take for an instruction."""
    return printable(text).replace("$", r"\$")


if __name__ == "__main__":
    import spectra  # which imports this file

    if len(sys.argv) != 2:
        sys.exit("usage: python plots.py DIRECTORY_OF_RESULTS")
    try:
        given = Path(sys.argv[1])
        (spectra.draw if (given / spectra.PROMPTS).exists() else draw)(given)
    except UserError as error:
        print(f"plots.py: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)

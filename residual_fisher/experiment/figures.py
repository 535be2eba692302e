"""The experiment's pictures, drawn from its JSON file."""

from functools import partial
from pathlib import Path
import warnings

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator
import numpy as np

from residual_fisher.common.drawing import (
    BLACK,
    BLUE,
    DISTINCT,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    label,
    median_band,
    note_of,
    save,
    token_bar,
)
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.experiment.results import read_results
from residual_fisher.experiment.steering import entries_of, least_kl, median_of

SIMILARITY, PERTURBATION, STEERING = "fisher_similarity_matrix.png", "perturbation_analysis.png", "steering.png"
FILES = SIMILARITY, PERTURBATION, STEERING
# a line style each, for print without colour
KINDS = {"fisher": (ORANGE, "-", "o"), "difference": (BLUE, "-", "s"), "random": (GREY, "-", "^")}
STEERED = {  # by direction: colour, line, marker, name
    "natural_steps": (ORANGE, "-", "o", "natural gradient, in steps"),
    "natural": (ORANGE, "--", "o", "natural gradient, one step"),
    "gradient_steps": (BLUE, "-", "s", "gradient, in steps"),
    "gradient": (BLUE, "--", "s", "gradient, one step"),
    "difference": (GREEN, "--", "D", "difference of activations"),
    "fisher": (GREY, "--", "^", "Fisher eigenvector"),
}
NAMES = {"fisher": "Fisher eigenvector", "difference": "towards another sentence", "random": "random"}
# the square root keeps small cosines, where most of the pairs are, apart
COSINE = {"cmap": "viridis", "norm": PowerNorm(0.5, vmin=0, vmax=1)}
MAX_PANELS = 8  # layers that get a panel of their own; of more, evenly spaced ones
MAX_TICKS = 12
KL_FLOOR = 1e-11  # nats: below it, rounding of the logits


def draw(directory: Path) -> None:
    """Draws the pictures of the results in `directory`.

    Raises:
        UserError: no readable results there, or it cannot be written to.
    """
    results = read_results(directory)
    figures = {SIMILARITY: similarity_figure, PERTURBATION: perturbation_figure, STEERING: steering_figure}
    drawn = {name: partial(figures[name], results) for name in drawn_of(results)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN|Mean of empty")  # perturbations that overflowed
        save(directory, drawn, note=results.get("checksum"))


def drawn_of(results: dict) -> tuple[str, ...]:
    """The pictures that there are of these results."""
    return FILES if results.get("steering") else (SIMILARITY, PERTURBATION)


def are_of(directory: Path, results: dict) -> bool:
    """Whether the pictures are there, whole, and drawn from `results`."""
    return all(note_of(directory / name) == results.get("checksum") for name in drawn_of(results))


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
        if len(layers) <= MAX_TICKS and np.isfinite(value):
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


# --- what the perturbations did -------------------------------------------------------------------------


def perturbation_figure(results: dict) -> Figure:
    """KL against scale by layer; top-5 overlap and flips by layer and scale; one sentence's tokens, twice."""
    layers = list(results["fisher"][0])
    shown = [layers[i] for i in evenly_spaced(len(layers), MAX_PANELS)]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    radius = any("trust_radius" in entry for entry in results["fisher"][0].values())
    heights = [3.4 * rows, 5.2, 1.3 + 0.42 * len(shown)]
    example_of = _best_predicted(results)
    said = all("tokens" in entry for entry in results["fisher"][example_of].values())  # older results have no words
    heights = heights if said else heights[:2]
    figure = plt.figure(figsize=(16 + 4 * radius, sum(heights)))
    top, bottom, *words = figure.subfigures(len(heights), 1, height_ratios=heights)

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
    _heatmap(flips, results, lambda record, base: record["top_changed"], "Top token changed (Fisher)", "magma")
    if trust:
        _trust_panel(trust[0], results)
        figure.get_layout_engine().set(wspace=0.06)  # its right axis has a label too
    _example_panel(example, results, example_of)
    for part in words:
        _words_panel(part.subplots(), results, example_of, shown)
    return figure


def _scales(results: dict) -> list[str]:
    return [f"{scale:g}" for scale in results["experiment_config"]["scales"]]


def _records(results: dict, layer: str, scale: str, kind: str) -> list[dict]:
    """Records of one kind of direction at a layer and scale, over all sentences."""
    if kind == "fisher":
        return [sentence[layer][scale] for sentence in results["perturbation_results"]]
    controls = [sentence[layer][scale]["controls"] for sentence in results["perturbation_results"]]
    return [record for control in controls for name, record in control.items() if name.partition("_")[0] == kind]


def _kl_panel(panel: Axes, results: dict, layer: str) -> None:
    scales = [scale for scale in _scales(results) if float(scale)]
    signed = [np.array([s for s in scales if sign * float(s) > 0]) for sign in (-1, 1)]
    for kind, (colour, line, marker) in KINDS.items():
        for side in signed:  # two curves: KL is 0 at scale 0, which has no place on a log axis
            records = [_records(results, layer, scale, kind) for scale in side]
            if not records or not records[0]:
                continue
            x, kl = side.astype(float), [_column(at, "kl") for at in records]
            named = side is signed[-1]  # once in the legend
            style = {"linestyle": line, "marker": marker, "markersize": 4, "label": NAMES[kind] if named else None}
            median_band(panel, x, kl, colour, KL_FLOOR, **style)
            if kind == "fisher":
                predicted = np.maximum([np.nanmedian(_column(at, "predicted_kl")) for at in records], KL_FLOOR)
                name = "predicted for it, ½ δᵀFδ" if named else None
                panel.plot(x, predicted, "--", color=BLACK, linewidth=1.3, label=name)
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


def _column(records: list[dict], key: str) -> np.ndarray:
    """A number of each record; NaN where it overflowed."""
    return np.array([record[key] for record in records], dtype=float)


def _overlap(record: dict, base: list[int]) -> float:
    if not record["top_ids"]:  # it overflowed
        return np.nan
    return len(set(record["top_ids"]) & set(base)) / len(base)


def _heatmap(panel: Axes, results: dict, statistic, title: str, cmap: str) -> None:
    """Mean over sentences of statistic(record, unperturbed top ids), layers by scales."""
    layers, scales = list(results["fisher"][0]), _scales(results)
    bases = [context["top_ids"] for context in results["contexts"]]
    values = [
        [
            [statistic(p, b) for p, b in zip(_records(results, layer, scale, "fisher"), bases, strict=True)]
            for scale in scales
        ]
        for layer in layers
    ]
    values = np.nanmean(np.array(values, dtype=float), axis=-1)
    image = panel.imshow(values, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    shown = evenly_spaced(len(layers), MAX_TICKS)
    panel.set_yticks(shown, [layers[i] for i in shown])
    ticks = np.arange(0, len(scales), -(-len(scales) // MAX_TICKS))
    panel.set_xticks(ticks, [scales[i].replace("-", "−") for i in ticks], rotation=45 if len(scales) > 7 else 0)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set(title=title, xlabel="scale α", ylabel="layer")
    panel.figure.colorbar(image, ax=panel, format=lambda x, _: f"{x:.0%}", pad=0.02)


def _trust_panel(panel: Axes, results: dict) -> None:
    """How far along v the quadratic prediction holds: medians and quartiles by layer, in nats and in norms of h."""
    layers = list(results["fisher"][0])
    panel.set(title="½ λ s² holds to 10% up to", xlabel="layer")
    found = [[e[layer]["trust_radius"] for e in results["fisher"]] for layer in layers]
    found = [[radius for radius in at if radius["step"] is not None] for at in found]
    if not any(found):
        panel.text(0.5, 0.5, "rounding hides it\nat every layer", ha="center", va="center", transform=panel.transAxes)
        panel.set(xticks=[], yticks=[])
        return
    x, norms = np.arange(len(layers)), panel.twinx()
    sides = (
        (panel, "nats", KINDS["fisher"], "predicted KL there, nats"),
        (norms, "norms", KINDS["difference"], "step there, norms of h"),
    )
    for axis, unit, (colour, line, marker), name in sides:
        values = [[radius[unit] for radius in at] or [np.nan] for at in found]
        median_band(axis, x, values, colour, linestyle=line, marker=marker, markersize=5)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylabel(name, color=colour)
        axis.tick_params(axis="y", which="both", colors=colour)
    norms.spines["right"].set_visible(True)
    shown = evenly_spaced(len(layers), MAX_TICKS)
    panel.set_xticks(shown, [layers[i] for i in shown])


def _best_predicted(results: dict) -> int:
    """The sentence that serves as an example: the one that best predicts its target."""
    contexts = results["contexts"]
    return max(range(len(contexts)), key=lambda i: contexts[i]["target_probability"])


def _example_panel(panel: Axes, results: dict, sentence: int) -> None:
    """Next-token probabilities across scales, at the middle layer."""
    scales, contexts = _scales(results), results["contexts"]
    layers = list(results["fisher"][sentence])
    layer = layers[len(layers) // 2]
    records = [results["perturbation_results"][sentence][layer][scale] for scale in scales]
    x = [float(scale) for scale in scales]

    curves: dict[str, np.ndarray] = {}  # a token's probability is known while it is in the top 5
    for column, record in enumerate(records):
        for token, probability in zip(record["top_tokens"], record["top_probs"], strict=True):
            curves.setdefault(token, np.full(len(scales), np.nan))[column] = probability
    target = contexts[sentence]["target_token"]
    curves.pop(target, None)
    panel.plot(x, _column(records, "target_prob"), "o-", color=DISTINCT[0], label=_token_name(target))
    leading = sorted(curves, key=lambda token: -np.nanmax(curves[token]))
    for token, colour in zip(leading, DISTINCT[1:], strict=False):
        panel.plot(x, curves[token], "s--", color=colour, markersize=5, label=_token_name(token))
    _scale_axis(panel, scales)
    panel.set_ylim(-0.02, 1.02)
    prompt = contexts[sentence]["prompt"]
    prompt = prompt if len(prompt) <= 30 else "…" + prompt[-29:]
    panel.set(title=f"S{sentence}, layer {layer}: “{label(prompt)}”", xlabel="scale α", ylabel="probability")
    panel.title.set_fontsize(12)
    panel.legend(frameon=False, fontsize=11, loc="upper left", bbox_to_anchor=(1, 1))


def _words_panel(panel: Axes, results: dict, sentence: int, layers: list[str]) -> None:
    """The tokens that v raises and lowers, layers down: a bar's length is a token's share of the eigenvalue."""
    tokens = [results["fisher"][sentence][layer]["tokens"][0] for layer in layers]
    sides = [sum(t["share"] for t in at if sign * t["slope"] > 0) for at in tokens for sign in (-1, 1)]
    widest = max(*sides, 0.01)
    for row, at in enumerate(tokens):
        token_bar(panel, row, at, (PINK, GREEN), character=0.0125 * widest)
    panel.axvline(0, color="black", linewidth=1)
    panel.set(xlim=(-1.02 * widest, 1.02 * widest), ylim=(len(layers) - 0.4, -0.6), ylabel="layer")
    panel.set_yticks(range(len(layers)), layers)
    panel.xaxis.set_major_formatter(lambda x, _: f"{abs(x):.0%}")
    panel.set_xlabel("← lose probability along v     share of λ₁     gain probability along v →")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    prompt = results["contexts"][sentence]["prompt"]
    prompt = prompt if len(prompt) <= 90 else "…" + prompt[-89:]
    panel.set_title(f"What v says after S{sentence}, “{label(prompt)}”")


# --- steering ------------------------------------------------------------------------------------


def steering_figure(results: dict) -> Figure:
    """KL by goal at the middle layer; its ratio to the least KL, and how often the goal is reached, by layer."""
    layers = list(results["fisher"][0])
    middle = layers[len(layers) // 2]
    figure, (costs, ratios, shares) = plt.subplots(1, 3, figsize=(19, 6.2))
    goals = sorted({goal for s in results["steering"] for goal in _any_direction(s, middle)}, key=float)
    middle_goal = "0.5" if "0.5" in goals else goals[-1]
    x, least = [float(goal) for goal in goals], []
    for goal in goals:
        before = [s["probability"] for s in results["steering"] if goal in _any_direction(s, middle)]
        least.append(np.median([least_kl(p, float(goal)) for p in before]))
    for name, (colour, line, marker, text) in STEERED.items():
        style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 6}
        costs.plot(x, [_median(results, middle, name, goal, "kl") for goal in goals], **style, label=text)
        ratios.plot([_median(results, layer, name, middle_goal, "ratio") for layer in layers], **style)
        found = [entries_of(results["steering"], layer, name, middle_goal) for layer in layers]
        shares.plot([np.mean([e is not None for e in at]) if at else np.nan for at in found], **style)
    costs.plot(x, least, color=BLACK, linewidth=2, label="least of any perturbation")
    token = label(results["steering"][0]["token"])
    costs.set(
        title=f"Cost of raising “{token}”, layer {middle}", xlabel="probability reached", yscale="log",
        ylabel="KL(original ‖ perturbed), nats",
    )  # fmt: skip
    costs.set_xticks(x, goals)
    ratios.axhline(1, color=BLACK, linewidth=2)
    ratios.set(title=f"KL over the least, to probability {middle_goal}", xlabel="layer", yscale="log", ylabel="ratio")
    ratios.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    ratios.yaxis.set_major_formatter("{x:g}")
    ratios.yaxis.set_minor_locator(NullLocator())
    shares.set(title=f"Sentences where {middle_goal} is reached", xlabel="layer", ylim=(-0.03, 1.03))
    shares.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    for panel in (ratios, shares):
        shown = evenly_spaced(len(layers), MAX_TICKS)
        panel.set_xticks(shown, [layers[i] for i in shown])
    figure.legend(loc="outside upper center", ncols=len(STEERED) + 1, frameon=False, fontsize=11)
    return figure


def _any_direction(steered: dict, layer: str) -> dict:
    return next(iter(steered["layers"][layer].values()), {})


def _median(results: dict, layer: str, name: str, goal: str, key: str) -> float:
    """Over sentences; NaN where it is infinite."""
    median = median_of(entries_of(results["steering"], layer, name, goal), key)
    return median if np.isfinite(median) else np.nan


def _token_name(token: str) -> str:
    """A token as a label: quoted, since its spaces matter."""
    return f"“{label(token)}”"

"""The experiment's pictures, drawn from the content of experiment_results.json."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator
import numpy as np

from residual_fisher.common import drawing
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.common.text import excerpt_end
from residual_fisher.experiment.records import COLUMNS, NATS, by_direction, kind_of
from residual_fisher.experiment.steering import entries_of, median_of
from residual_fisher.model.steering import least_kl

SIMILARITY, PERTURBATION, STEERING = "fisher_similarity_matrix.png", "perturbation_analysis.png", "steering.png"
FILES = SIMILARITY, PERTURBATION, STEERING
PERTURBED = {  # by kind of direction; a marker each, for print without colour
    "fisher": dict(color=drawing.ORANGE, marker="o", label="Fisher eigenvector"),
    "difference": dict(color=drawing.BLUE, marker="s", label="towards another sentence"),
    "random": dict(color=drawing.GREY, marker="^", label="random"),
}
STEERED = {
    "natural_steps": dict(color=drawing.ORANGE, linestyle="-", marker="o", label="natural gradient, in steps"),
    "natural": dict(color=drawing.ORANGE, linestyle="--", marker="o", label="natural gradient, one step"),
    "gradient_steps": dict(color=drawing.BLUE, linestyle="-", marker="s", label="gradient, in steps"),
    "gradient": dict(color=drawing.BLUE, linestyle="--", marker="s", label="gradient, one step"),
    "difference": dict(color=drawing.GREEN, linestyle="--", marker="D", label="difference of activations"),
    "fisher": dict(color=drawing.GREY, linestyle="--", marker="^", label="Fisher eigenvector"),
}
# the square root keeps small cosines, where most of the pairs are, apart
COSINE = {"cmap": "viridis", "norm": PowerNorm(0.5, vmin=0, vmax=1)}
MAX_PANELS = 8  # layers that get a panel of their own; of more, evenly spaced ones
MAX_TICKS, FEW_TICKS = 12, 7  # the latter along a narrow panel
KL_FLOOR = 1e-11  # nats: below it, rounding of the logits
KL = "KL(original ‖ perturbed), nats"
UNITS = {"eigenvalue": "steps of λ", "nats": "steps of 1/√λ", "norm": "steps of ‖h‖/100"}


def pictures_of(document: dict) -> tuple[str, ...]:
    """The pictures that there are of these results; of steering, if any target was below any goal."""
    steered = any(any(record["layers"].values()) for record in document.get("steering", ()))
    return FILES if steered else (SIMILARITY, PERTURBATION)


def draw(folder: Path, document: dict, kind: str = "png") -> None:
    """Draws the pictures of an experiment_results.json. Raises UserError: the folder cannot be written to."""
    figures = {SIMILARITY: similarity_figure, PERTURBATION: perturbation_figure, STEERING: steering_figure}
    drawing.save(folder, {name: partial(figures[name], document) for name in pictures_of(document)}, kind)


def _layers(document: dict) -> list[str]:
    return list(document["fisher"][0])


def _layer_axis(axis: Axis, layers: list[str], size: int = 1, most: int = MAX_TICKS) -> None:
    """Labels the middles of blocks of `size` places 0, 1, ... with layers; of many layers, evenly spaced ones."""
    shown = evenly_spaced(len(layers), most)
    axis.set_ticks(shown * size + (size - 1) / 2, [layers[i] for i in shown])
    axis.set_label_text(f"layer ({size} sentences in each block)" if size > 1 else "layer")


def _log_axis(panel: Axes, multiples: tuple[float, ...]) -> None:
    """A logarithmic y axis with plain numbers, at these multiples of the powers of ten."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=multiples))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())


# --- similarity of the eigenvectors --------------------------------------------------------------


def similarity_figure(document: dict) -> Figure:
    """|cosine| of top eigenvectors: all pairs by layer, and the mean by pair of layers (of one layer: by sentence)."""
    layers, matrix = _layers(document), np.array(document["similarity_matrix"])
    count = len(matrix) // len(layers)  # sentences
    figure, (all_pairs, means) = plt.subplots(1, 2, figsize=(15, 7.4), width_ratios=[1.6, 1])

    image = all_pairs.imshow(matrix, **COSINE, interpolation="nearest")
    for edge in np.arange(1, len(layers)) * count - 0.5:
        all_pairs.axhline(edge, color="white", linewidth=1)
        all_pairs.axvline(edge, color="white", linewidth=1)
    all_pairs.set_title("Top Fisher eigenvectors, every pair")

    blocks = _block_means(matrix, len(layers), count)
    chance = np.sqrt(2 / (np.pi * document["environment"]["hidden_size"]))
    if len(layers) > 1:
        means.imshow(blocks, **COSINE)
        for (row, column), value in np.ndenumerate(blocks):
            if len(layers) <= MAX_TICKS and np.isfinite(value):
                colour = "white" if value < 0.4 else "black"
                means.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=11)
        for panel, size in ((all_pairs, count), (means, 1)):  # rows of a layer
            for axis in (panel.xaxis, panel.yaxis):
                _layer_axis(axis, layers, size)
            panel.tick_params(length=0)
    else:
        for axis in (all_pairs.xaxis, all_pairs.yaxis, means.yaxis):
            shown = evenly_spaced(count, MAX_TICKS)
            axis.set_ticks(shown, [f"S{i}" for i in shown])
        all_pairs.set(xlabel=f"sentence, layer {layers[0]}", ylabel="sentence")
        all_pairs.tick_params(length=0)
        _means_of_sentences(means, matrix, chance)
    same = np.eye(len(layers), dtype=bool)
    parts = {"within a layer": blocks[same], "between layers": blocks[~same]}
    found = ", ".join(f"{name} {values.mean():.2f}" for name, values in parts.items() if np.isfinite(values).any())
    means.set_title("Mean" + (found and f": {found}"))

    scale = f"|cosine|   (random directions: {chance:.2f} on average)"
    figure.colorbar(image, ax=[all_pairs, means], shrink=0.8, label=scale)
    return figure


def _means_of_sentences(panel: Axes, matrix: np.ndarray, chance: float) -> None:
    """Mean |cosine| of each sentence with the others, and that of random directions; nothing of a single one."""
    count = len(matrix)
    panel.set_visible(count > 1)
    panel.barh(range(count), (matrix.sum(axis=1) - 1) / max(1, count - 1), color=drawing.ORANGE)
    panel.axvline(chance, color=drawing.BLACK, linewidth=1, linestyle="--")
    panel.set(ylim=(count - 0.5, -0.5), xlabel="mean |cosine| with the others (dashed: random directions)")


def _block_means(matrix: np.ndarray, layers: int, count: int) -> np.ndarray:
    """Mean |cosine| by pair of layers; within a layer, of different sentences (NaN for a single one)."""
    blocks = matrix.reshape(layers, count, layers, count).sum(axis=(1, 3))
    with_itself = count * np.eye(layers)
    pairs = count * count - with_itself
    return np.divide(blocks - with_itself, pairs, out=np.full_like(blocks, np.nan), where=pairs > 0)


# --- what the perturbations did ------------------------------------------------------------------


def perturbation_figure(document: dict) -> Figure:
    """KL against scale by layer; top-5 overlap and flips by layer and scale; one sentence's tokens, twice."""
    layers, contexts = _layers(document), document["contexts"]
    shown = [layers[i] for i in evenly_spaced(len(layers), MAX_PANELS)]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    radius = any("trust_radius" in entry for entry in document["fisher"][0].values())
    example = max(range(len(contexts)), key=lambda i: contexts[i]["target_probability"])  # predicts its target best
    heights = [3.4 * rows, 5.2, 1.3 + 0.42 * len(shown)]
    figure = plt.figure(figsize=(16 + 4 * radius, sum(heights)))
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)

    panels = top.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel, layer in zip(panels.flat, shown, strict=False):
        _kl_panel(panel, document, layer)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    for panel in panels[-2, len(shown) - columns * (rows - 1) :] if rows > 1 else ():
        panel.tick_params(labelbottom=True)  # the panel below it is hidden
    handles, labels = panels[0, 0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    top.supxlabel(f"scale α {_unit(document)}", fontsize=13)
    top.supylabel(KL if rows > 1 else "KL, nats", fontsize=13)  # a single row is not as high as the words are long

    kept, changed, *trust, last = middle.subplots(1, 3 + radius, width_ratios=[1] * (2 + radius) + [1.25])
    _heatmap(kept, document, _overlap, "Top-5 tokens kept (Fisher)", "viridis")
    _heatmap(changed, document, lambda record, base: record["top_changed"], "Top token changed (Fisher)", "magma")
    if trust:
        _trust_panel(trust[0], document)
        figure.get_layout_engine().set(wspace=0.06)  # its right axis has a label too
    _example_panel(last, document, example)
    _tokens_panel(bottom.subplots(), document, example, shown)
    return figure


def swept(document: dict) -> list[dict]:
    """Perturbations by sentence, layer and scale: those in nats where the protocol's steps are too short."""
    return document.get(COLUMNS[NATS], document[COLUMNS["perturbations"]])


def _unit(document: dict) -> str:
    own = UNITS[document["experiment_config"]["scale_unit"]]
    if COLUMNS[NATS] not in document:
        return f"({own})"
    return f"in nats ({UNITS['nats']}; the protocol's {own} are too short to move predictions)"


def _scales(document: dict) -> list[str]:
    return [f"{scale:g}" for scale in document["experiment_config"]["scales"]]


def _kl_panel(panel: Axes, document: dict, layer: str) -> None:
    scales = [scale for scale in _scales(document) if float(scale)]
    sentences = [sentence[layer] for sentence in swept(document)]
    told = 1 if max(map(float, scales)) > 0 else -1  # the side whose curves are named in the legend
    for kind, style in PERTURBED.items():
        for sign in (-1, 1):  # two curves: KL is 0 at scale 0, which has no place on a log axis
            side = [scale for scale in scales if sign * float(scale) > 0]
            by_name = [
                [pair for sentence in sentences for pair in by_direction(sentence[scale]).items()] for scale in side
            ]
            records = [[record for name, record in pairs if kind_of(name) == kind] for pairs in by_name]
            if not any(records):
                continue
            label, expected = (style["label"], "predicted for it, ½ δᵀFδ") if sign == told else (None, None)
            x, kl = list(map(float, side)), [_column(at, "kl") for at in records]
            drawing.median_band(panel, x, kl, KL_FLOOR, markersize=4, **{**style, "label": label})
            if kind == "fisher":
                predicted = np.maximum([np.nanmedian(_column(at, "predicted_kl")) for at in records], KL_FLOOR)
                point = {"marker": "_", "markersize": 22} if len(x) == 1 else {}  # a line of one point is none
                panel.plot(x, predicted, "--", color=drawing.BLACK, linewidth=1.3, label=expected, **point)
    panel.set_yscale("log")
    _scale_axis(panel, scales)
    panel.set_title(f"layer {layer}")


def _scale_axis(panel: Axes, scales: list[str]) -> None:
    """Logarithmic in |scale| on either side of a narrow middle, labelled at a few of the scales."""
    sizes = sorted({abs(float(scale)) for scale in scales if float(scale)})
    labelled = [s for s in scales if abs(float(s)) in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
    panel.set_xscale("symlog", linthresh=sizes[0], linscale=0.25)
    panel.set_xticks(list(map(float, labelled)), [scale.replace("-", "−") for scale in labelled])
    panel.minorticks_off()


def _column(records: list[dict], key: str) -> np.ndarray:
    """A number of each record; NaN where it overflowed."""
    return np.array([record[key] for record in records], dtype=float)


def _overlap(record: dict, base: list[int]) -> float:
    """NaN where the logits overflowed."""
    return len(set(record["top_ids"]) & set(base)) / len(base) if record["top_ids"] else np.nan


def _heatmap(panel: Axes, document: dict, statistic: Callable, title: str, cmap: str) -> None:
    """Mean over sentences of statistic(record, unperturbed top ids), layers by scales; of one layer, bars."""
    layers, scales = _layers(document), _scales(document)
    sentences = list(zip(swept(document), document["contexts"], strict=True))
    values = [
        [[statistic(found[layer][scale], context["top_ids"]) for found, context in sentences] for scale in scales]
        for layer in layers
    ]
    means = np.nanmean(np.array(values, dtype=float), axis=-1)
    ticks = np.arange(0, len(scales), -(-len(scales) // MAX_TICKS))
    crowded = {"rotation": 45, "fontsize": 11} if len(scales) > 7 else {}
    panel.set_xticks(ticks, [scales[i].replace("-", "−") for i in ticks], **crowded)
    if len(layers) == 1:
        panel.bar(range(len(scales)), means[0], width=0.8, color=drawing.ORANGE)
        panel.set(title=title, xlabel="scale α", xlim=(-0.6, len(scales) - 0.4), ylim=(0, 1))
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        return
    image = panel.imshow(means, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    _layer_axis(panel.yaxis, layers)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set(title=title, xlabel="scale α")
    panel.figure.colorbar(image, ax=panel, format=lambda x, _: f"{x:.0%}", pad=0.02)


def _trust_panel(panel: Axes, document: dict) -> None:
    """How far along v the quadratic prediction holds: medians and quartiles by layer, in nats and in norms of h."""
    layers = _layers(document)
    panel.set_title("½ λ s² holds to 10% up to")
    radii = [[sentence[layer]["trust_radius"] for sentence in document["fisher"]] for layer in layers]
    radii = [[radius for radius in at if radius["step"] is not None] for at in radii]
    if not any(radii):
        panel.text(0.5, 0.5, "rounding hides it\nat every layer", ha="center", va="center", transform=panel.transAxes)
        panel.set(xticks=[], yticks=[], xlabel="layer")
        return
    norms = panel.twinx()
    for axes, unit, colour, marker, name in (
        (panel, "nats", drawing.ORANGE, "o", "predicted KL there, nats"),
        (norms, "norms", drawing.BLUE, "s", "step there, norms of h"),
    ):
        values = [[radius[unit] for radius in at] or [np.nan] for at in radii]
        drawing.median_band(axes, range(len(layers)), values, color=colour, marker=marker, markersize=5)
        _log_axis(axes, (1, 2, 5))
        axes.set_ylabel(name, color=colour)
        axes.tick_params(axis="y", which="both", colors=colour)
    norms.spines["right"].set_visible(True)
    _layer_axis(panel.xaxis, layers, most=FEW_TICKS)


def _example_panel(panel: Axes, document: dict, sentence: int) -> None:
    """Next-token probabilities of one sentence across scales, at the middle layer."""
    layers, scales, context = _layers(document), _scales(document), document["contexts"][sentence]
    layer = layers[len(layers) // 2]
    records = [swept(document)[sentence][layer][scale] for scale in scales]
    x = list(map(float, scales))

    curves: dict[str, np.ndarray] = {}  # a token's probability is known while it is in the top 5
    for column, record in enumerate(records):
        for token, probability in zip(record["top_tokens"], record["top_probs"], strict=True):
            curves.setdefault(token, np.full(len(scales), np.nan))[column] = probability
    target = context["target_token"]
    curves.pop(target, None)
    panel.plot(x, _column(records, "target_prob"), "o-", color=drawing.DISTINCT[0], label=_quoted(target))
    leading = sorted(curves, key=lambda token: -np.nanmax(curves[token]))
    for token, colour in zip(leading, drawing.DISTINCT[1:], strict=False):
        panel.plot(x, curves[token], "s--", color=colour, markersize=5, label=_quoted(token))
    _scale_axis(panel, scales)
    panel.set(ylim=(-0.02, 1.02), xlabel="scale α", ylabel="probability")
    panel.set_title(f"S{sentence}, layer {layer}: {_quoted(excerpt_end(context['prompt'], 30))}", fontsize=12)
    panel.legend(frameon=False, fontsize=11, loc="upper left", bbox_to_anchor=(1, 1))


def _tokens_panel(panel: Axes, document: dict, sentence: int, layers: list[str]) -> None:
    """The tokens that v raises and lowers, layers down: a bar's length is a token's share of the eigenvalue."""
    tokens = [document["fisher"][sentence][layer]["tokens"][0] for layer in layers]
    longest = max(*drawing.longest_bars(tokens), 0.01)
    drawing.token_bars(panel, tokens, [(drawing.PINK, drawing.GREEN)] * len(tokens), character=0.0125 * longest)
    _layer_axis(panel.yaxis, layers)
    panel.set(xlim=(-1.02 * longest, 1.02 * longest), ylim=(len(layers) - 0.4, -0.6))
    panel.xaxis.set_major_formatter(lambda x, _: f"{abs(x):.0%}")
    panel.set_xlabel("← lose probability along v     share of λ₁     gain probability along v →")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    prompt = excerpt_end(document["contexts"][sentence]["prompt"], 90)
    panel.set_title(f"What v says after S{sentence}, {_quoted(prompt)}")


def _quoted(text: str) -> str:
    """A text as a label, in quotes: its spaces matter."""
    return f"“{drawing.label(text)}”"


# --- steering ------------------------------------------------------------------------------------


def steering_figure(document: dict) -> Figure:
    """KL by goal at the middle layer; its ratio to the least KL, and how often the goal is reached, by layer."""
    layers, steering = _layers(document), document["steering"]
    middle = layers[len(layers) // 2]
    # all directions of a sentence have the same goals: those above its probability
    goals_of = [next(iter(record["layers"][middle].values()), {}) for record in steering]
    goals = sorted({goal for goals in goals_of for goal in goals}, key=float)
    middle_goal = "0.5" if "0.5" in goals else goals[-1]
    before = {
        goal: [r["probability"] for r, own in zip(steering, goals_of, strict=True) if goal in own] for goal in goals
    }
    least = [np.median([least_kl(p, float(goal)) for p in before[goal]]) for goal in goals]
    x = list(map(float, goals))

    def medians(where: list[tuple[str, str]], name: str, key: str) -> list[float]:
        """Over sentences, at each layer and goal; NaN where it is infinite."""
        values = [median_of(entries_of(steering, layer, name, goal), key) for layer, goal in where]
        return [value if np.isfinite(value) else np.nan for value in values]

    figure, (costs, ratios, shares) = plt.subplots(1, 3, figsize=(19, 6.2))
    for name, style in STEERED.items():
        costs.plot(x, medians([(middle, goal) for goal in goals], name, "kl"), markersize=6, **style)
        style = {**style, "markersize": 6, "label": None}
        ratios.plot(medians([(layer, middle_goal) for layer in layers], name, "ratio"), **style)
        found = [entries_of(steering, layer, name, middle_goal) for layer in layers]
        shares.plot([np.mean([entry is not None for entry in at]) if at else np.nan for at in found], **style)
    costs.plot(x, least, color=drawing.BLACK, linewidth=2, label="least of any perturbation")
    costs.set(xlabel="probability reached", yscale="log", ylabel=KL)
    costs.set_title(f"Cost of raising {_quoted(steering[0]['token'])}, layer {middle}")
    costs.set_xticks(x, goals)
    ratios.axhline(1, color=drawing.BLACK, linewidth=2)
    ratios.set(title=f"KL over the least, to probability {middle_goal}", ylabel="ratio")
    _log_axis(ratios, (1, 1.5, 2, 3, 5))
    shares.set(title=f"Sentences where {middle_goal} is reached", ylim=(-0.03, 1.03))
    shares.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    for panel in (ratios, shares):
        _layer_axis(panel.xaxis, layers)
    figure.legend(loc="outside upper center", ncols=len(STEERED) + 1, frameon=False, fontsize=11)
    return figure

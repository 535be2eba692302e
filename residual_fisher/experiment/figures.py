"""The experiment's pictures, drawn from the content of experiment_results.json, and their panels one by one.

A panel is a public function that draws on axes of the caller's, in a notebook too:

    results = json.load(open("experiment_results/experiment_results.json"))
    figure, ax = plt.subplots()
    figures.kl(ax, results, layers=[15])
    ax.legend()

All of them take these arguments:

    ax          matplotlib Axes; where a layer has axes of its own, also a list of them, one for each layer
    results     the content of experiment_results.json
    layers      numbers of layers; None: all, or where a layer has axes of its own as many as there are axes for, the
                middle one or evenly spaced ones
    sentence    number of a sentence, from 0; None: all, or where a panel is of one, that which best predicts its target

and raise UserError where the run has no such layer or sentence.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
import matplotlib.pyplot as plt
import numpy as np

from residual_fisher.common import drawing
from residual_fisher.common.program import UserError
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.common.text import excerpt_end
from residual_fisher.experiment.panels import (
    KL,
    MAX_TICKS,
    axes_by_layer,
    layer_axis,
    layers_of,
    log_axis,
    of_sentence,
    quoted,
    sentences_of,
)
from residual_fisher.experiment.records import COLUMNS, NATS, by_direction, kind_of
from residual_fisher.experiment.steering_figure import cost, ratio, reached, steering_figure

SIMILARITY, PERTURBATION, STEERING = "fisher_similarity_matrix.png", "perturbation_analysis.png", "steering.png"
FILES = SIMILARITY, PERTURBATION, STEERING
PERTURBED = {  # by kind of direction; a marker each, for print without colour
    "fisher": dict(color=drawing.ORANGE, marker="o", label="Fisher eigenvector"),
    "difference": dict(color=drawing.BLUE, marker="s", label="towards another sentence"),
    "random": dict(color=drawing.GREY, marker="^", label="random"),
}
# the square root keeps small cosines, where most of the pairs are, apart
COSINE = {"cmap": "viridis", "norm": PowerNorm(0.5, vmin=0, vmax=1)}
MAX_PANELS = 8  # layers that get a panel of their own; of more, evenly spaced ones
FEW_TICKS = 7  # along a narrow panel
TOKENS_ROW, CHARACTER = 0.42, 0.155  # inches: the height of a bar of tokens, and a character's width in it
KL_FLOOR = 1e-11  # nats: below it, rounding of the logits
UNITS = {"eigenvalue": "steps of λ", "nats": "steps of 1/√λ", "norm": "steps of ‖h‖/100"}


def pictures_of(document: dict) -> tuple[str, ...]:
    """The pictures that there are of these results; of steering, if any target was below any goal."""
    steered = any(any(record["layers"].values()) for record in document.get("steering", ()))
    return FILES if steered else (SIMILARITY, PERTURBATION)


def draw(folder: Path, document: dict, kind: str = "png") -> None:
    """Draws the pictures of an experiment_results.json. Raises UserError: the folder cannot be written to."""
    figures = {SIMILARITY: similarity_figure, PERTURBATION: perturbation_figure, STEERING: steering_figure}
    drawing.save(folder, {name: partial(figures[name], document) for name in pictures_of(document)}, kind)


def draw_panel(
    folder: Path, document: dict, name: str, layers: Sequence | None, sentence: int | None, kind: str = "png"
) -> str:
    """Draws one panel into a file of its own, whose name it returns.

    Raises:
        UserError: these results have no such panel, layer or sentence, or the folder cannot be written to.
    """
    panel = drawing.known_panel(panels_of(document), name)
    part = [] if layers is None else ["layers", *layers_of(document, layers)]
    part += [] if sentence is None else [f"S{sentence}"]
    draw = partial(panel_figure, document, panel, layers, sentence)
    return drawing.save_panel(folder, panel.picture, [name, *part], draw, kind)


# --- similarity of the eigenvectors --------------------------------------------------------------


def similarity_figure(document: dict) -> Figure:
    """|cosine| of top eigenvectors: all pairs by layer, and the mean by pair of layers (of one layer: by sentence)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 7.4), width_ratios=[1.6, 1])
    image = pairs(left, document)
    means(right, document)
    figure.colorbar(image, ax=[left, right], shrink=0.8, label=_scale_of_cosines(document))
    return figure


def pairs(ax: Axes, results: dict, layers: Iterable | None = None, sentence: int | None = None) -> AxesImage:
    """|cosine| of the top eigenvectors of every pair of sentence and layer; returns the image, for a colour bar."""
    layers, count, matrix = _cosines(results, layers, sentence)
    image = ax.imshow(matrix, **COSINE, interpolation="nearest")
    for edge in np.arange(1, len(layers)) * count - 0.5:
        ax.axhline(edge, color="white", linewidth=1)
        ax.axvline(edge, color="white", linewidth=1)
    ax.set_title("Top Fisher eigenvectors, every pair")
    for axis in (ax.xaxis, ax.yaxis):
        layer_axis(axis, layers, count) if len(layers) > 1 else _sentence_axis(axis, count, sentence)
    if len(layers) == 1:
        ax.set(xlabel=f"sentence, layer {layers[0]}", ylabel="sentence")
    ax.tick_params(length=0)
    return image


def means(ax: Axes, results: dict, layers: Iterable | None = None, sentence: int | None = None) -> AxesImage | None:
    """Mean |cosine| of the top eigenvectors by pair of layers; returns the image, for a colour bar.

    Of one layer, bars: each sentence's mean with the others. Nothing of a single sentence at a single layer.
    """
    layers, count, matrix = _cosines(results, layers, sentence)
    blocks, image = _block_means(matrix, len(layers), count), None
    if len(layers) > 1:
        image = ax.imshow(blocks, **COSINE)
        for (row, column), value in np.ndenumerate(blocks):
            if len(layers) <= MAX_TICKS and np.isfinite(value):
                colour = "white" if value < 0.4 else "black"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=11)
        for axis in (ax.xaxis, ax.yaxis):
            layer_axis(axis, layers)
        ax.tick_params(length=0)
    else:
        _sentence_axis(ax.yaxis, count, sentence)
        _means_of_sentences(ax, matrix, _chance(results))
    same = np.eye(len(layers), dtype=bool)
    parts = {"within a layer": blocks[same], "between layers": blocks[~same]}
    found = ", ".join(f"{name} {values.mean():.2f}" for name, values in parts.items() if np.isfinite(values).any())
    ax.set_title("Mean" + (found and f": {found}"))
    return image


def _cosines(document: dict, layers: Iterable | None, sentence: int | None) -> tuple[list[str], int, np.ndarray]:
    """The layers, how many sentences, and the part of the similarity matrix that is of them."""
    known, matrix = layers_of(document), np.array(document["similarity_matrix"])
    count = len(matrix) // len(known)  # sentences: of a very long run, the first
    shown, rows = layers_of(document, layers), range(count) if sentence is None else sentences_of(document, sentence)
    if max(rows) >= count:
        raise UserError(f"no sentence {sentence}: the similarity matrix has the first {count}")
    places = [known.index(layer) * count + row for layer in shown for row in rows]
    return shown, len(rows), matrix[np.ix_(places, places)]


def _chance(document: dict) -> float:
    """The mean |cosine| of random directions."""
    return np.sqrt(2 / (np.pi * document["environment"]["hidden_size"]))


def _scale_of_cosines(document: dict) -> str:
    return f"|cosine|   (random directions: {_chance(document):.2f} on average)"


def _sentence_axis(axis: Axis, count: int, sentence: int | None) -> None:
    shown = evenly_spaced(count, MAX_TICKS)
    axis.set_ticks(shown, [f"S{i if sentence is None else sentence}" for i in shown])


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
    layers = layers_of(document)
    shown = [layers[i] for i in evenly_spaced(len(layers), MAX_PANELS)]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    radius = _has_radius(document)
    heights = [3.4 * rows, 5.2, 1.3 + TOKENS_ROW * len(shown)]
    figure = plt.figure(figsize=(16 + 4 * radius, sum(heights)))
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)

    panels = top.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    kl(panels.flat[: len(shown)], document)
    for panel in panels.flat:
        panel.set(xlabel="", ylabel="")  # told once for all
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    for panel in panels[-2, len(shown) - columns * (rows - 1) :] if rows > 1 else ():
        panel.tick_params(labelbottom=True)  # the panel below it is hidden
    handles, labels = panels[0, 0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    top.supxlabel(f"scale α {_unit(document)}", fontsize=13)
    top.supylabel(KL if rows > 1 else "KL, nats", fontsize=13)  # a single row is not as high as the words are long

    left, right, *third, last = middle.subplots(1, 3 + radius, width_ratios=[1] * (2 + radius) + [1.25])
    kept(left, document)
    changed(right, document)
    if third:
        trust(third[0], document)
        figure.get_layout_engine().set(wspace=0.06)  # its right axis has a label too
    probabilities(last, document)
    for panel in (left, right, last):
        panel.set_xlabel("scale α")  # its unit stands above
    tokens(bottom.subplots(), document, shown)
    return figure


def _has_radius(document: dict) -> bool:
    return any("trust_radius" in entry for entry in document["fisher"][0].values())


def example_of(document: dict, asked: int | None) -> int:
    """The sentence asked for, or that which best predicts its target."""
    contexts = document["contexts"]
    best = max(range(len(contexts)), key=lambda i: contexts[i]["target_probability"])
    return best if asked is None else sentences_of(document, asked)[0]


def swept(document: dict) -> list[dict]:
    """Perturbations by sentence, layer and scale: those in nats where the protocol's steps are too short."""
    return document.get(COLUMNS[NATS], document[COLUMNS["perturbations"]])


def _scale_label(document: dict) -> str:
    """Of the steps that are drawn, with their unit."""
    unit = UNITS["nats" if COLUMNS[NATS] in document else document["experiment_config"]["scale_unit"]]
    return f"scale α ({unit})"


def _unit(document: dict) -> str:
    own = UNITS[document["experiment_config"]["scale_unit"]]
    if COLUMNS[NATS] not in document:
        return f"({own})"
    return f"in nats ({UNITS['nats']}; the protocol's {own} are too short to move predictions)"


def _scales(document: dict) -> list[str]:
    return [f"{scale:g}" for scale in document["experiment_config"]["scales"]]


def kl(ax: Axes | Sequence[Axes], results: dict, layers: Iterable | None = None, sentence: int | None = None) -> None:
    """KL against scale along each kind of direction, and as it is predicted: a layer on axes of its own.

    Lines are medians over sentences, bands their quartiles.
    """
    rows = sentences_of(results, sentence)
    for panel, layer in axes_by_layer(ax, results, layers):
        _kl_curves(panel, results, layer, rows)
        panel.set_title(f"layer {layer}" if sentence is None else f"S{sentence}, layer {layer}")
        panel.set(xlabel=_scale_label(results), ylabel=KL)


def _kl_curves(panel: Axes, document: dict, layer: str, rows: list[int]) -> None:
    scales = [scale for scale in _scales(document) if float(scale)]
    sentences = [swept(document)[row][layer] for row in rows]
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


def kept(ax: Axes, results: dict, layers: Iterable | None = None, sentence: int | None = None) -> None:
    """The share of the five most probable tokens that stay, by layer and scale along v: a mean over sentences."""
    _heatmap(ax, results, layers, sentence, _overlap, "Top-5 tokens kept (Fisher)", "viridis")


def changed(ax: Axes, results: dict, layers: Iterable | None = None, sentence: int | None = None) -> None:
    """The share of sentences whose most probable token is another one, by layer and scale along v."""
    _heatmap(ax, results, layers, sentence, lambda r, base: r["top_changed"], "Top token changed (Fisher)", "magma")


def _heatmap(
    panel: Axes,
    document: dict,
    asked: Iterable | None,
    sentence: int | None,
    statistic: Callable,
    title: str,
    cmap: str,
) -> None:
    """Mean over sentences of statistic(record, unperturbed top ids), layers by scales; of one layer, bars."""
    layers, scales = layers_of(document, asked), _scales(document)
    sentences = [(swept(document)[row], document["contexts"][row]) for row in sentences_of(document, sentence)]
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
        panel.set(
            title=title + of_sentence(sentence),
            xlabel=_scale_label(document),
            xlim=(-0.6, len(scales) - 0.4),
            ylim=(0, 1),
        )
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        return
    image = panel.imshow(means, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    layer_axis(panel.yaxis, layers)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set(title=title + of_sentence(sentence), xlabel=_scale_label(document))
    panel.figure.colorbar(image, ax=panel, format=lambda x, _: f"{x:.0%}", pad=0.02)


def trust(ax: Axes, results: dict, layers: Iterable | None = None, sentence: int | None = None) -> None:
    """How far along v the quadratic prediction holds (--trust-radius): medians and quartiles by layer.

    The left axis has the KL predicted there, in nats, the right one the step, in norms of h.
    """
    if not _has_radius(results):
        raise UserError("these results have no trust radii: --trust-radius measures them")
    layers, rows = layers_of(results, layers), sentences_of(results, sentence)
    ax.set_title("½ λ s² holds to 10% up to" + of_sentence(sentence))
    radii = [[results["fisher"][row][layer]["trust_radius"] for row in rows] for layer in layers]
    radii = [[radius for radius in at if radius["step"] is not None] for at in radii]
    if not any(radii):
        ax.text(0.5, 0.5, "rounding hides it\nat every layer", ha="center", va="center", transform=ax.transAxes)
        ax.set(xticks=[], yticks=[], xlabel="layer")
        return
    norms = ax.twinx()
    for axes, unit, colour, marker, name in (
        (ax, "nats", drawing.ORANGE, "o", "predicted KL there, nats"),
        (norms, "norms", drawing.BLUE, "s", "step there, norms of h"),
    ):
        values = [[radius[unit] for radius in at] or [np.nan] for at in radii]
        drawing.median_band(axes, range(len(layers)), values, color=colour, marker=marker, markersize=5)
        log_axis(axes, (1, 2, 5))
        axes.set_ylabel(name, color=colour)
        axes.tick_params(axis="y", which="both", colors=colour)
    norms.spines["right"].set_visible(True)
    layer_axis(ax.xaxis, layers, most=FEW_TICKS)


def probabilities(
    ax: Axes | Sequence[Axes], results: dict, layers: Iterable | None = None, sentence: int | None = None
) -> None:
    """Next-token probabilities of one sentence across scales along v: a layer on axes of its own."""
    for panel, layer in axes_by_layer(ax, results, layers):
        _probability_curves(panel, results, layer, example_of(results, sentence))


def _probability_curves(panel: Axes, document: dict, layer: str, sentence: int) -> None:
    scales, context = _scales(document), document["contexts"][sentence]
    records = [swept(document)[sentence][layer][scale] for scale in scales]
    x = list(map(float, scales))

    target, texts = context["target_token"], {}
    # by id, since parts of characters have one text; a token's probability is known while it is in the top 5
    curves: dict[int, np.ndarray] = {}
    for column, record in enumerate(records):
        for id_, token, probability in zip(record["top_ids"], record["top_tokens"], record["top_probs"], strict=True):
            if (token, probability) != (target, record["target_prob"]):
                texts[id_] = token
                curves.setdefault(id_, np.full(len(scales), np.nan))[column] = probability
    panel.plot(x, _column(records, "target_prob"), "o-", color=drawing.DISTINCT[0], label=quoted(target))
    leading = sorted(curves, key=lambda id_: -np.nanmax(curves[id_]))
    for id_, colour in zip(leading, drawing.DISTINCT[1:], strict=False):
        panel.plot(x, curves[id_], "s--", color=colour, markersize=5, label=quoted(texts[id_]))
    _scale_axis(panel, scales)
    panel.set(ylim=(-0.02, 1.02), xlabel=_scale_label(document), ylabel="probability")
    panel.set_title(f"S{sentence}, layer {layer}: {quoted(excerpt_end(context['prompt'], 30))}", fontsize=12)
    panel.legend(frameon=False, fontsize=11, loc="upper left", bbox_to_anchor=(1, 1))


def tokens(ax: Axes, results: dict, layers: Iterable | None = None, sentence: int | None = None) -> None:
    """The tokens that v raises and lowers in one sentence, layers down: a bar's length is a share of the eigenvalue."""
    layers, sentence = layers_of(results, layers), example_of(results, sentence)
    words = [results["fisher"][sentence][layer]["tokens"][0] for layer in layers]
    longest = max(*drawing.longest_bars(words), 0.01)
    character = longest * max(0.0125, CHARACTER / (ax.bbox.width / ax.figure.dpi))
    drawing.token_bars(ax, words, [(drawing.PINK, drawing.GREEN)] * len(words), character)
    layer_axis(ax.yaxis, layers, most=len(layers))
    ax.set(xlim=(-1.02 * longest, 1.02 * longest), ylim=(len(layers) - 0.4, -0.6))
    ax.xaxis.set_major_formatter(lambda x, _: f"{abs(x):.0%}")
    ax.set_xlabel("← lose probability along v     share of λ₁     gain probability along v →")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    prompt = excerpt_end(results["contexts"][sentence]["prompt"], 90)
    ax.set_title(f"What v says after S{sentence}, {quoted(prompt)}")


# --- one panel alone -----------------------------------------------------------------------------


class Panel(NamedTuple):
    """A panel that can be drawn into a file of its own."""

    picture: str  # of which it is a part
    draw: Callable  # (ax, results, layers, sentence)
    size: tuple[float, float] = (6.4, 5.2)  # inches of one of its axes
    most: int | None = None  # axes that it has by default, where a layer has axes of its own; None: one for all
    row: float = 0.0  # inches of height for each layer


PANELS = {
    "kl": Panel(PERTURBATION, kl, (4.6, 4.2), MAX_PANELS),
    "kept": Panel(PERTURBATION, kept),
    "changed": Panel(PERTURBATION, changed),
    "trust": Panel(PERTURBATION, trust),
    "probabilities": Panel(PERTURBATION, probabilities, (6.8, 4.6), 1),
    "tokens": Panel(PERTURBATION, tokens, (13, 1.3), row=TOKENS_ROW),
    "pairs": Panel(SIMILARITY, pairs, (8.4, 7)),
    "means": Panel(SIMILARITY, means, (8.4, 7)),
    "cost": Panel(STEERING, cost, (6.8, 6.6), 1),
    "ratio": Panel(STEERING, ratio, (6.8, 6.6)),
    "reached": Panel(STEERING, reached, (6.8, 6.6)),
}


def panels_of(document: dict) -> dict[str, Panel]:
    """The panels that there are of these results."""
    known, radius = pictures_of(document), _has_radius(document)
    return {name: p for name, p in PANELS.items() if p.picture in known and (name != "trust" or radius)}


def panel_figure(document: dict, panel: Panel, layers: Iterable | None, sentence: int | None) -> Figure:
    """A panel alone, with the legend or the colour bar that its picture has."""
    shown = layers_of(document, layers)
    count = 1 if panel.most is None else min(len(shown), panel.most) if layers is None else len(shown)
    columns = min(4, count)
    rows, (width, height) = -(-count // columns), panel.size
    size = max(6.4, width * columns), height * rows + panel.row * len(shown)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    used = axes.flat[:count]
    image = panel.draw(used if panel.most else used[0], document, layers, sentence)
    if not used[0].get_visible():
        raise UserError("a single sentence at a single layer has no other to be compared with")
    for ax in used:
        ax.tick_params(labelbottom=True)  # the one below may be hidden
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")  # told in the first column
    if isinstance(image, AxesImage):
        figure.colorbar(image, ax=used[0], shrink=0.8, label=_scale_of_cosines(document))
    handles, labels = used[0].get_legend_handles_labels()
    if labels and not used[0].get_legend():
        figure.legend(
            handles, labels, loc="outside upper center", ncols=2 * min(2, columns), frameon=False, fontsize=11
        )
    return figure

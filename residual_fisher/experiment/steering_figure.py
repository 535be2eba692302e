"""The picture of what steering costs (--steer), drawn from experiment_results.json. Its panels: see `figures`."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import numpy as np

from residual_fisher.common import drawing
from residual_fisher.common.program import UserError
from residual_fisher.experiment.panels import (
    KL,
    axes_by_layer,
    layer_axis,
    layers_of,
    log_axis,
    of_sentence,
    quoted,
    sentences_of,
)
from residual_fisher.experiment.steering import entries_of, median_of
from residual_fisher.model.steering import least_kl

STEERED = {
    "natural_steps": dict(color=drawing.ORANGE, linestyle="-", marker="o", label="natural gradient, in steps"),
    "natural": dict(color=drawing.ORANGE, linestyle="--", marker="o", label="natural gradient, one step"),
    "gradient_steps": dict(color=drawing.BLUE, linestyle="-", marker="s", label="gradient, in steps"),
    "gradient": dict(color=drawing.BLUE, linestyle="--", marker="s", label="gradient, one step"),
    "difference": dict(color=drawing.GREEN, linestyle="--", marker="D", label="difference of activations"),
    "fisher": dict(color=drawing.GREY, linestyle="--", marker="^", label="Fisher eigenvector"),
}


def steering_figure(document: dict) -> Figure:
    """KL by goal at the middle layer; its ratio to the least KL, and how often the goal is reached, by layer."""
    figure, axes = plt.subplots(1, 3, figsize=(19, 6.2))
    for ax, panel in zip(axes, (cost, ratio, reached), strict=True):
        panel(ax, document)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(STEERED) + 1, frameon=False, fontsize=11)
    return figure


def cost(ax: Axes | Sequence[Axes], results: dict, layers: Iterable | None = None, sentence: int | None = None) -> None:
    """What steering costs (--steer): KL by the probability reached, a layer on axes of its own; medians."""
    steering, goals = _steering(results, sentence)
    x, before = list(map(float, goals)), {goal: [] for goal in goals}
    for record, own in zip(steering, map(_goals_of, steering), strict=True):
        for goal in own:
            before[goal].append(record["probability"])
    least = [np.median([least_kl(p, float(goal)) for p in before[goal]]) for goal in goals]
    for panel, layer in axes_by_layer(ax, results, layers):
        for name, style in STEERED.items():
            panel.plot(x, _medians(steering, [(layer, goal) for goal in goals], name, "kl"), markersize=6, **style)
        panel.plot(x, least, color=drawing.BLACK, linewidth=2, label="least of any perturbation")
        panel.set(xlabel="probability reached", yscale="log", ylabel=KL)
        panel.set_title(f"Cost of raising {quoted(steering[0]['token'])}, layer {layer}{of_sentence(sentence)}")
        panel.set_xticks(x, goals)


def ratio(ax: Axes, results: dict, layers: Iterable | None = None, sentence: int | None = None) -> None:
    """KL over the least that any perturbation costs, to a probability of 1/2, by layer (--steer): medians."""
    layers, (steering, goals) = layers_of(results, layers), _steering(results, sentence)
    goal = _middle_goal(goals)
    for name, style in STEERED.items():
        ax.plot(_medians(steering, [(layer, goal) for layer in layers], name, "ratio"), markersize=6, **style)
    ax.axhline(1, color=drawing.BLACK, linewidth=2)
    ax.set(title=f"KL over the least, to probability {goal}{of_sentence(sentence)}", ylabel="ratio")
    log_axis(ax, (1, 1.5, 2, 3, 5))
    layer_axis(ax.xaxis, layers)


def reached(ax: Axes, results: dict, layers: Iterable | None = None, sentence: int | None = None) -> None:
    """The share of sentences in which steering reaches a probability of 1/2, by layer (--steer)."""
    layers, (steering, goals) = layers_of(results, layers), _steering(results, sentence)
    goal = _middle_goal(goals)
    for name, style in STEERED.items():
        found = [entries_of(steering, layer, name, goal) for layer in layers]
        shares = [np.mean([entry is not None for entry in at]) if at else np.nan for at in found]
        ax.plot(shares, markersize=6, **style)
    ax.set(title=f"Sentences where {goal} is reached{of_sentence(sentence)}", ylim=(-0.03, 1.03))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    layer_axis(ax.xaxis, layers)


def _steering(document: dict, sentence: int | None) -> tuple[list[dict], list[str]]:
    """The records of steering, and the goals that there are, ascending."""
    if "steering" not in document:
        raise UserError("nothing was steered in these results: --steer does it")
    steering = document["steering"]
    if sentence is not None:
        steering = [steering[row] for row in sentences_of(document, sentence)]
    goals = sorted({goal for record in steering for goal in _goals_of(record)}, key=float)
    if not goals:
        raise UserError(f"nothing was steered in sentence {sentence}: its target was above every goal")
    return steering, goals


def _goals_of(record: dict) -> dict:
    """All directions of a sentence have the same goals, at every layer: those above its probability."""
    directions = next(iter(record["layers"].values()))
    return next(iter(directions.values()), {})


def _middle_goal(goals: list[str]) -> str:
    return "0.5" if "0.5" in goals else goals[-1]


def _medians(steering: list[dict], where: list[tuple[str, str]], name: str, key: str) -> list[float]:
    """Over sentences, at each layer and goal; NaN where it is infinite."""
    values = [median_of(entries_of(steering, layer, name, goal), key) for layer, goal in where]
    return [value if np.isfinite(value) else np.nan for value in values]

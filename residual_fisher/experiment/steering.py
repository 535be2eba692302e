"""What steering costs, as it is recorded: sentence by sentence, and over all of them. See `model/steering.py`."""

from collections.abc import Callable
import math
import statistics

from residual_fisher.common.files import number_or_none
from residual_fisher.model.steering import GOALS, Steered, least_kl


def steering_record(steered: Steered, layers: list[str], show: Callable[[int], str]) -> dict:
    """The JSON record of one sentence: costs by layer, direction and goal; None where the goal is not reached."""
    goals, before = [f"{goal:g}" for goal in steered.goals], steered.before

    def entry(log_prob: float, kl: float, norms: float) -> dict | None:
        if not math.isfinite(kl):
            return None
        least = least_kl(before, after := math.exp(log_prob))
        others = max(0.0, kl - least) / (1 - before)  # by the chain rule of KL
        ratio = kl / least if least >= steered.hidden else None  # the token was nearly as probable before
        found = {"probability": after, "kl": kl, "least_kl": least, "ratio": ratio}
        return {**found, "others_kl": others, "norms": norms}

    columns, by_layer = [part.tolist() for part in (steered.log_prob, steered.kl, steered.norms)], {}
    for layer, *at_layer in zip(layers, *columns, strict=True):
        directions = zip(steered.names, *at_layer, strict=True)
        by_layer[layer] = {name: dict(zip(goals, map(entry, *costs), strict=True)) for name, *costs in directions}
    return {"token": show(steered.target), "id": steered.target, "probability": before, "layers": by_layer}


def steering_summary(records: list[dict], layers: list[str]) -> dict:
    """Over sentences whose target starts below the goal, by layer, direction and goal.

    `ratio_median` is the median of KL / least KL where that is known (None if it is infinite, or never known),
    `reached` the share that reach the goal.
    """

    def over_sentences(entries: list[dict | None]) -> dict:
        reached = sum(entry is not None for entry in entries) / len(entries)
        return {"ratio_median": number_or_none(median_of(entries, "ratio")), "reached": reached}

    goals = [f"{goal:g}" for goal in GOALS]
    return {
        layer: {
            name: {goal: over_sentences(some) for goal in goals if (some := entries_of(records, layer, name, goal))}
            for name in dict.fromkeys(name for record in records for name in record["layers"][layer])
        }
        for layer in layers
    }


def entries_of(records: list[dict], layer: str, name: str, goal: str) -> list[dict | None]:
    """What a direction costs in each sentence whose target starts below the goal; None where it is not reached."""
    directions = (record["layers"][layer].get(name, {}) for record in records)
    return [direction[goal] for direction in directions if goal in direction]


def median_of(entries: list[dict | None], key: str) -> float:
    """The median of a key, infinite for an entry that is None; NaN without any in which it is known."""
    values = [math.inf if entry is None else entry[key] for entry in entries]
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else math.nan

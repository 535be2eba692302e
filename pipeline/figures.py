"""The pipeline's picture of a dataset's prompts, drawn from prompts.jsonl."""

import heapq
from pathlib import Path
import warnings

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import numpy as np

from common.command_line import UserError, excerpt, first_line
from common.drawing import DISTINCT, label, save
from common.rows import evenly_spaced, parse_json
from pipeline.store import PROMPTS, is_number

SPECTRA = "fisher_spectra.png"
NAMED = 6  # prompts that stand out: drawn in colour and named
MAX_POINTS = 20_000  # of more prompts, evenly spaced ones are drawn beside those that stand out
OUTLIER = 3.5  # robust standard deviations, the usual threshold (Iglewicz and Hoaglin, 1993)


def draw(directory: Path) -> None:
    """Draws the pipeline's picture of the prompts in `directory`.

    Raises:
        UserError: no readable results there, or it cannot be written to.
    """
    save(directory, {SPECTRA: lambda: spectra_figure(_read_prompts(directory / PROMPTS))})


NUMBERS = ("tokens", "captured_mass", "z_log_lambda", "z_subspace", "outlier_score")
LISTS = ("singular_values", "principal_coordinates")


def _read_prompts(path: Path) -> dict:
    """The numbers of all prompts as columns, and the texts of the NAMED that stand out most, by index."""
    columns, leading = {key: [] for key in (*NUMBERS, *LISTS)}, []
    try:
        with open(path, encoding="utf-8") as file:
            for index, line in enumerate(file):
                record = _checked(parse_json(line, index + 1), columns)
                for key in NUMBERS:
                    columns[key].append(record[key])
                for key in LISTS:
                    columns[key].append(np.array(record[key], dtype=np.float32))
                leading.append((record["outlier_score"], -index, record["prompt"]))
                leading = heapq.nlargest(NAMED, leading)
    except (OSError, ValueError) as error:
        raise UserError(f"no readable {path.name} in {path.parent}: {first_line(error)}") from error
    if not leading:
        raise UserError(f"{path} holds no prompts")
    arrays = {key: np.array(values) for key, values in columns.items()}
    return {**arrays, "texts": {-place: text for _, place, text in leading}}


def _checked(record, before: dict[str, list]) -> dict:
    """A prompt's record, if it has all that is drawn, in lists as long as those of the prompts before it.

    Raises:
        ValueError: it has not.
    """
    place = f"(line {len(before[LISTS[0]]) + 1})"
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f"no record of a prompt {place}")
    for key in NUMBERS:
        if not is_number(record.get(key)):
            raise ValueError(f"{key} is no number {place}")
    for key in LISTS:
        values = record.get(key)
        if not isinstance(values, list) or not values or not all(map(is_number, values)):
            raise ValueError(f"{key} is no list of numbers {place}")
        if before[key] and len(values) != len(before[key][0]):
            raise ValueError(f"{len(values)} {key}, and {len(before[key][0])} of the prompts before {place}")
    return record


def spectra_figure(prompts: dict) -> Figure:
    """Spectra, outlier scores, a map of the prompts, three distributions, and the prompts that stand out by name."""
    figure = plt.figure(figsize=(20, 12.5))
    grid = figure.add_gridspec(3, 3, height_ratios=[1.2, 1, 0.5])
    colours = dict(zip(prompts["texts"], [*DISTINCT[1:], DISTINCT[0]], strict=False))
    _spectra_panel(figure.add_subplot(grid[0, 0]), prompts, colours)
    _outlier_panel(figure.add_subplot(grid[0, 1]), prompts, colours)
    _map_panel(figure.add_subplot(grid[0, 2]), prompts, colours)

    first = prompts["singular_values"][:, 0]
    positive = first[first > 0]
    panel = figure.add_subplot(grid[1, 0])
    if len(positive):
        low, high = np.log10(positive.min()), np.log10(positive.max())
        panel.hist(positive, bins=np.logspace(low - 0.05, high + 0.05, 40), color="#56B4E9", edgecolor="white")
        panel.set_xscale("log")
    panel.set(title="Sensitivity", xlabel="λ₁ (nats per unit²)", ylabel="prompts")
    for index, colour in colours.items():
        if first[index] > 0:
            panel.plot(first[index], 0, "^", color=colour, markersize=11, clip_on=False, zorder=3)

    panel = figure.add_subplot(grid[1, 1])
    panel.hist(prompts["captured_mass"], bins=np.linspace(0, 1, 41), color="#56B4E9", edgecolor="white")
    median = np.median(prompts["captured_mass"])
    panel.axvline(median, color="black", linestyle="--", linewidth=1.2)
    panel.set(
        title=f"The top-k tokens hold {median:.0%} of the probability (median)",
        xlabel="captured mass",
        ylabel="prompts",
        xlim=(0, 1.02),
    )

    panel = figure.add_subplot(grid[1, 2])
    _dots(panel, prompts["tokens"], np.where(first > 0, first, np.nan), colours)
    panel.set(title="Sensitivity by length", xlabel="tokens", ylabel="λ₁ (nats per unit²)", xscale="log")
    panel.set_yscale("log" if len(positive) else "linear")

    panel = figure.add_subplot(grid[2, :])
    panel.axis("off")
    panel.set_title("Prompts that stand out, and their scores", loc="left")
    for row, (index, text) in enumerate(prompts["texts"].items()):
        height = 0.92 - row / NAMED
        panel.plot(0.005, height, "o", color=colours[index], markersize=10, transform=panel.transAxes)
        for x, number in ((0.035, str(index)), (0.06, f"{prompts['outlier_score'][index]:.1f}")):
            panel.text(x, height, number, transform=panel.transAxes, va="center", ha="right")
        panel.text(0.07, height, label(excerpt(text, 140)), transform=panel.transAxes, va="center")
    panel.set(xlim=(0, 1), ylim=(0, 1))
    return figure


def _dots(panel: Axes, x: np.ndarray, y: np.ndarray, colours: dict[int, str]) -> None:
    """A dot for every prompt, or for MAX_POINTS evenly spaced ones; those that stand out in colour, with numbers."""
    drawn = evenly_spaced(len(x), MAX_POINTS)
    panel.plot(x[drawn], y[drawn], "o", color="#0072B2", alpha=0.35, markersize=6, markeredgewidth=0)
    for index, colour in colours.items():
        panel.plot(x[index], y[index], "o", color=colour, markersize=10, markeredgecolor="white")
        panel.annotate(str(index), (x[index], y[index]), (7, 5), textcoords="offset points", fontsize=11)


def _spectra_panel(panel: Axes, prompts: dict, colours: dict[int, str]) -> None:
    spectra = prompts["singular_values"]
    x = np.arange(1, spectra.shape[1] + 1)
    shown = np.where(spectra > 0, spectra, np.nan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN")
        quantiles = np.nanquantile(shown, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], axis=0)
    for low, high, shade, name in (
        (0, 6, "#E5E5E5", "all"),
        (1, 5, "#BFD9EC", "5 to 95 %"),
        (2, 4, "#7FB5DB", "25 to 75 %"),
    ):
        panel.fill_between(x, quantiles[low], quantiles[high], color=shade, label=name, linewidth=0)
    panel.plot(x, quantiles[3], color="#0B3C5D", linewidth=2, label="median")
    for index, colour in colours.items():
        panel.plot(x, shown[index], "o-", color=colour, markersize=4, linewidth=1.2)
    panel.set_yscale("log" if (spectra > 0).any() else "linear")
    panel.set(title=f"Spectra of {len(spectra)} prompts", xlabel="singular value", ylabel="nats per unit²")
    panel.set_xticks(x if len(x) <= 20 else x[:: len(x) // 10])
    panel.legend(frameon=False, fontsize=11, loc="lower left")


def _outlier_panel(panel: Axes, prompts: dict, colours: dict[int, str]) -> None:
    panel.axhline(OUTLIER, color="#7A7A7A", linestyle=":", linewidth=1)
    for side in (-OUTLIER, OUTLIER):
        panel.axvline(side, color="#7A7A7A", linestyle=":", linewidth=1)
    _dots(panel, prompts["z_log_lambda"], prompts["z_subspace"], colours)
    panel.set(
        title=f"How unusual, in robust standard deviations (dotted: {OUTLIER})",
        xlabel="log λ₁",
        ylabel="distance from the mean subspace",
    )
    panel.title.set_fontsize(13)


def _map_panel(panel: Axes, prompts: dict, colours: dict[int, str]) -> None:
    coordinates = prompts["principal_coordinates"]
    columns = [coordinates[:, min(axis, coordinates.shape[1] - 1)] for axis in (0, 1)]
    _dots(panel, *columns, colours)
    panel.set(
        title="Which directions: prompts with like F lie close",
        xlabel="first principal coordinate",
        ylabel="second principal coordinate",
    )

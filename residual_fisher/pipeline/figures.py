"""The pipeline's picture of a dataset's prompts, drawn from the records of prompts.jsonl."""

from array import array
from collections.abc import Iterable
import heapq
from pathlib import Path
import warnings

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, TransformedBbox
import numpy as np

from residual_fisher.common import drawing
from residual_fisher.common.drawing import BLACK, BLUE, DISTINCT, label, thin_log_labels
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.common.text import excerpt
from residual_fisher.pipeline.report import differing_tokens, marked
from residual_fisher.pipeline.scores import OUTLIER, P_VALUE, SCORES

SPECTRA = "fisher_spectra.png"
DRAWN_NUMBERS = ("tokens", "captured_mass", OUTLIER, P_VALUE, *SCORES)
LISTS = ("singular_values", "principal_coordinates")
NAMED = 6  # prompts that stand out: drawn in colour and named
MAX_POINTS = 20_000  # of more prompts, evenly spaced ones are drawn beside those that stand out
LONGEST = 12  # robust standard deviations that are drawn
CHARACTERS = 85  # that the bars beside their names have room for
SKY = "#56B4E9"

Columns = dict[str, np.ndarray]  # of all prompts: (n,) float64 for each of DRAWN_NUMBERS, (n, values) float32 of LISTS
Colours = dict[int, str]  # of the prompts that stand out, by index


def draw(folder: Path, records: Iterable[dict], false_alarms: float, triggers: dict[int, dict] | None = None) -> None:
    """Draws the picture of the prompts that these are the records of; one is in memory at a time.

    Args:
        false_alarms: the p-value up to which a prompt stands out.
        triggers: by the numbers of prompts, the spans to be marked.
    Raises:
        UserError: the folder cannot be written to.
    """
    drawing.save(folder, {SPECTRA: lambda: spectra_figure(records, false_alarms, triggers)})


def _collect(records: Iterable[dict]) -> tuple[Columns, dict[int, dict]]:
    """The numbers of all prompts, and by index the records of those that stand out, the oddest first."""
    numbers, lists = {key: array("d") for key in DRAWN_NUMBERS}, {key: array("f") for key in LISTS}
    leading: list[tuple[int, dict]] = []
    for index, record in enumerate(records):
        for key, column in numbers.items():
            column.append(record[key])
        for key, column in lists.items():
            column.extend(record[key])
        leading = heapq.nlargest(NAMED, [*leading, (index, record)], key=lambda item: item[1][OUTLIER])
    if not leading:
        raise ValueError("no prompts")
    count = len(numbers[OUTLIER])
    columns = {key: np.array(column).reshape(count, -1) for key, column in lists.items()}
    return columns | {key: np.array(column) for key, column in numbers.items()}, dict(leading)


def spectra_figure(records: Iterable[dict], false_alarms: float, triggers: dict[int, dict] | None = None) -> Figure:
    """Spectra, outlier scores, a map of the prompts, three distributions, and by name the prompts that stand out."""
    prompts, leading = _collect(records)
    figure = plt.figure(figsize=(20, 13))
    grid = figure.add_gridspec(3, 3, height_ratios=[1.2, 1, 0.6])
    (spectra, scores, plan), (sensitivity, mass, length) = (
        [figure.add_subplot(grid[row, column]) for column in range(3)] for row in range(2)
    )
    colours = dict(zip(leading, [*DISTINCT[1:], DISTINCT[0]], strict=False))
    _spectra_panel(spectra, prompts["singular_values"], colours)
    _scores_panel(scores, prompts, colours, false_alarms)

    axes = prompts["principal_coordinates"].T  # (values, n)
    _dots(plan, axes[0], axes[min(1, len(axes) - 1)], colours)
    plan.set(title="Which directions: prompts with like F lie close")
    plan.set(xlabel="first principal coordinate", ylabel="second principal coordinate")

    first = prompts["singular_values"][:, 0]
    positive = first[first > 0]
    if len(positive):
        low, high = np.log10(positive.min()), np.log10(positive.max())
        sensitivity.hist(positive, bins=np.logspace(low - 0.05, high + 0.05, 40), color=SKY, edgecolor="white")
        sensitivity.set_xscale("log")
        thin_log_labels(sensitivity.xaxis)
    sensitivity.set(title="Sensitivity", xlabel="λ₁ (nats per unit²)", ylabel="prompts")
    for index, colour in colours.items():
        if first[index] > 0:
            sensitivity.plot(first[index], 0, "^", color=colour, markersize=11, clip_on=False, zorder=3)

    mass.hist(prompts["captured_mass"], bins=np.linspace(0, 1, 41), color=SKY, edgecolor="white")
    median = np.median(prompts["captured_mass"])
    mass.axvline(median, color=BLACK, linestyle="--", linewidth=1.2)
    mass.set(title=f"The top-k tokens hold {median:.0%} of the probability (median)")
    mass.set(xlabel="captured mass", ylabel="prompts", xlim=(0, 1.02))

    _dots(length, prompts["tokens"], np.where(first > 0, first, np.nan), colours)
    length.set(title="Sensitivity by length", xlabel="tokens", ylabel="λ₁ (nats per unit²)", xscale="log")
    thin_log_labels(length.xaxis)
    if len(positive):
        length.set_yscale("log")
        thin_log_labels(length.yaxis)
    for counts in (sensitivity, mass):
        counts.yaxis.set_major_locator(MaxNLocator(integer=True))

    _names_panel(figure.add_subplot(grid[2, :]), leading, colours, triggers or {})
    return figure


def _dots(
    panel: Axes, x: np.ndarray, y: np.ndarray, colours: Colours, size: int = 6, alpha: float = 0.35, names: bool = True
) -> None:
    """A dot for every prompt, or for MAX_POINTS evenly spaced ones; those that stand out larger, in colour."""
    drawn = evenly_spaced(len(x), MAX_POINTS)
    panel.plot(x[drawn], y[drawn], "o", color=BLUE, alpha=alpha, markersize=size, markeredgewidth=0)
    for index, colour in colours.items():
        panel.plot(x[index], y[index], "o", color=colour, markersize=size + 4, markeredgecolor="white")
        if names:
            panel.annotate(str(index), (x[index], y[index]), (7, 5), textcoords="offset points", fontsize=11)


def _spectra_panel(panel: Axes, spectra: np.ndarray, colours: Colours) -> None:
    x = np.arange(1, spectra.shape[1] + 1)
    shown = np.where(spectra > 0, spectra, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about values that are 0 for all prompts
        quantiles = np.nanquantile(shown, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], axis=0)  # (7, values)
    shades = {"all": "#E5E5E5", "5 to 95 %": "#BFD9EC", "25 to 75 %": "#7FB5DB"}
    for place, (name, shade) in enumerate(shades.items()):
        panel.fill_between(x, quantiles[place], quantiles[-1 - place], color=shade, label=name, linewidth=0)
    panel.plot(x, quantiles[3], color="#0B3C5D", linewidth=2, label="median")
    for index, colour in colours.items():
        panel.plot(x, shown[index], "o-", color=colour, markersize=4, linewidth=1.2)
    panel.set_yscale("log" if (spectra > 0).any() else "linear")
    panel.set(title=f"Spectra of {len(spectra)} prompts", xlabel="singular value", ylabel="nats per unit²")
    panel.set_xticks(x if len(x) <= 20 else x[:: len(x) // 10])
    panel.legend(frameon=False, fontsize=11, loc="lower left")


def _scores_panel(panel: Axes, prompts: Columns, colours: Colours, false_alarms: float) -> None:
    """A row of dots for each score, the outlier score on top; those that stand out in colour."""
    names = {OUTLIER: "outlier score", **{name: name.removeprefix("z_") for name in SCORES}}
    spread = 0.3 * np.sin(np.arange(len(prompts[OUTLIER])) * 2.4)  # apart, and the same each time
    for row, name in enumerate(names):
        values = np.clip(prompts[name], -LONGEST, LONGEST)
        _dots(panel, values, row + spread, colours, size=5, alpha=0.3, names=False)
    outstanding = prompts[OUTLIER][prompts[P_VALUE] <= false_alarms]
    if len(outstanding):
        limit = np.clip(outstanding.min(), -LONGEST, LONGEST)
        panel.plot([limit] * 2, [-0.45, 0.45], color=BLACK, linestyle=":", linewidth=1.5)
    panel.set_yticks(range(len(names)), names.values())
    panel.set(title=f"In which way unusual (dotted: p ≤ {false_alarms:g})")
    panel.set(xlabel="robust standard deviations", ylim=(len(names) - 0.4, -0.6))


def _names_panel(panel: Axes, leading: dict[int, dict], colours: Colours, triggers: dict[int, dict]) -> None:
    """Each prompt that stands out, its trigger marked, with its odd words; beside it the tokens of the direction in
    which it differs.
    """
    tokens = [*map(differing_tokens, leading.values())]
    length, end = (72, 0.53) if any(tokens) else (140, 1)
    room = TransformedBbox(Bbox([[0, -1], [end, NAMED]]), panel.transData)
    panel.axis("off")
    panel.set(xlim=(0, 1), ylim=(NAMED - 0.5, -0.5))
    panel.set_title("Prompts that stand out, and their scores", loc="left")
    for row, (index, record) in enumerate(leading.items()):
        colour, words = colours[index], " ".join(record["odd_words"])
        panel.plot(0.005, row, "o", color=colour, markersize=10)
        for x, number in ((0.035, str(index)), (0.06, f"{record[OUTLIER]:.1f}"), (0.11, f"p {record[P_VALUE]:.2g}")):
            panel.text(x, row, number, va="center", ha="right")
        prompt = marked(record["prompt"], triggers.get(index), length)
        lines = [(-0.18 * bool(words), prompt, {})]
        if words:
            lines.append((0.27, f"says {words}", {"color": colour, "fontsize": 11}))
        for shift, text, style in lines:
            line = panel.text(0.12, row + shift, label(excerpt(text, length)), va="center", clip_on=True, **style)
            line.set_clip_box(room)  # its letters may be wide
    if not any(tokens):
        return
    bars = panel.inset_axes([0.54, 0, 0.46, 1], sharey=panel)
    left, right = drawing.longest_bars(tokens)
    drawing.token_bars(bars, tokens, [(colour, colour) for colour in colours.values()], (left + right) / CHARACTERS)
    bars.axis("off")
    bars.set(xlim=(-max(left, 0.1), max(right, 0.1)))
    bars.set(title="Tokens that lose ← → gain probability in the direction where each differs, by share of λ")

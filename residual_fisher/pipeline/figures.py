"""The pipeline's picture of a dataset's prompts, drawn from the records of prompts.jsonl, and its panels one by one.

A panel is a public function that draws on matplotlib Axes of the caller's, in a notebook too:

    with open("fisher_results/prompts.jsonl") as file:
        prompts = figures.collect(map(json.loads, file))
    figure, ax = plt.subplots()
    figures.spectra(ax, prompts)
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
import heapq
from pathlib import Path
from typing import NamedTuple
import warnings

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
from matplotlib.transforms import Bbox, TransformedBbox
import numpy as np

from residual_fisher.common import drawing
from residual_fisher.common.drawing import BLACK, BLUE, DISTINCT, label
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.common.text import excerpt
from residual_fisher.pipeline.report import differing_tokens, groups_of, marked, reasons
from residual_fisher.pipeline.scores import OUTLIER, P_VALUE, SCORES

SPECTRA = "fisher_spectra.png"
DRAWN_NUMBERS = ("effective_rank", OUTLIER, P_VALUE, *SCORES)
LISTS = ("singular_values", "principal_coordinates")
NAMED = 6  # prompts that stand out: drawn in colour and named
MAX_POINTS = 20_000  # of more prompts, evenly spaced ones are drawn beside those that stand out
LONGEST = 12  # robust standard deviations that are drawn
CHARACTERS = 85  # that the bars beside their names have room for
GROUPS = 4  # the largest ones are ringed and named,
GROUP_WORDS, GROUP_LABEL = 4, 40  # by so many words, in so many characters

Columns = dict[str, np.ndarray]  # of all prompts: (n,) float64 for each of DRAWN_NUMBERS, (n, values) float32 of LISTS
Colours = dict[int, str]  # of the prompts that stand out, by index


class Collected(NamedTuple):
    """What is drawn of a run's prompts."""

    numbers: Columns  # of all prompts
    leading: dict[int, dict]  # by index, the records of those that stand out, the oddest first
    groups: list[dict]

    @property
    def colours(self) -> Colours:
        return dict(zip(self.leading, [*DISTINCT[1:], DISTINCT[0]], strict=False))

    @property
    def scored(self) -> bool:
        """Whether there are enough prompts to say what is usual: of fewer, all scores are 0."""
        return any(self.numbers[name].any() for name in (OUTLIER, *SCORES))


def draw(
    folder: Path,
    records: Iterable[dict],
    false_alarms: float,
    triggers: dict[int, dict] | None = None,
    changed: bool = False,
    kind: str = "png",
    panel: str | None = None,
) -> str:
    """Draws the picture of the prompts that these are the records of; one is in memory at a time.

    Args:
        false_alarms: the p-value up to which a prompt stands out.
        triggers: by the numbers of prompts, the spans to be marked.
        changed: whether scores are of the change from a base model.
        panel: of the picture this part alone, in a file of its own.
    Returns:
        The file's name.
    Raises:
        UserError: there is no such panel, or the folder cannot be written to.
    """
    if panel is None:
        drawing.save(folder, {SPECTRA: lambda: spectra_figure(records, false_alarms, triggers, changed)}, kind)
        return drawing.of_kind(SPECTRA, kind)
    size = drawing.known_panel(PANELS, panel)

    def figure() -> Figure:
        figure, ax = plt.subplots(figsize=size)
        _panels(collect(records), false_alarms, triggers, changed)[panel](ax)
        return figure

    return drawing.save_panel(folder, SPECTRA, [panel], figure, kind)


def collect(records: Iterable[dict]) -> Collected:
    """What is drawn of the records of prompts.jsonl, one in memory at a time. Raises ValueError: there are none."""
    numbers, lists = {key: array("d") for key in DRAWN_NUMBERS}, {key: array("f") for key in LISTS}
    leading: list[tuple[int, dict]] = []

    def collected() -> Iterator[dict]:
        for index, record in enumerate(records):
            for key, column in numbers.items():
                column.append(record[key])
            for key, column in lists.items():
                column.extend(record[key])
            leading[:] = heapq.nlargest(NAMED, [*leading, (index, record)], key=lambda item: item[1][OUTLIER])
            yield record

    groups = groups_of(collected())
    if not leading:
        raise ValueError("no prompts")
    count = len(numbers[OUTLIER])
    columns = {key: np.array(column).reshape(count, -1) for key, column in lists.items()}
    columns |= {key: np.array(column) for key, column in numbers.items()}
    return Collected(columns, dict(leading), groups)


def spectra_figure(
    records: Iterable[dict], false_alarms: float, triggers: dict[int, dict] | None = None, changed: bool = False
) -> Figure:
    """Spectra, scores, a map of the prompts with their groups, and why the oddest ones stand out."""
    draw = _panels(collect(records), false_alarms, triggers, changed)
    figure = plt.figure(figsize=(20, 13))
    grid = figure.add_gridspec(2, 3, height_ratios=[1, 1])
    axes = [*(figure.add_subplot(grid[0, column]) for column in range(3)), figure.add_subplot(grid[1, :])]
    for ax, name in zip(axes, PANELS, strict=True):
        draw[name](ax)
    return figure


PANELS = {"spectra": (6.8, 6.2), "scores": (6.8, 6.2), "coordinates": (6.8, 6.2), "oddest": (20, 6.6)}  # inches


def _panels(
    prompts: Collected, false_alarms: float, triggers: dict[int, dict] | None, changed: bool
) -> dict[str, Callable[[Axes], None]]:
    """What draws each panel of these prompts."""
    return {
        "spectra": partial(spectra, prompts=prompts),
        "scores": partial(scores, prompts=prompts, false_alarms=false_alarms),
        "coordinates": partial(coordinates, prompts=prompts),
        "oddest": partial(oddest, prompts=prompts, false_alarms=false_alarms, triggers=triggers, changed=changed),
    }


def _median(values: np.ndarray, which: np.ndarray) -> dict:
    return {"median": float(np.median(values[which])) if which.any() else 0.0}


def _members(record: dict, groups: list[dict]) -> list[int]:
    return [] if record["group"] is None else groups[record["group"]]["prompts"]


def _dots(panel: Axes, x: np.ndarray, y: np.ndarray, colours: Colours, size: int = 6, alpha: float = 0.35) -> None:
    """A dot for every prompt, or for MAX_POINTS evenly spaced ones; those that stand out larger, in colour."""
    drawn = evenly_spaced(len(x), MAX_POINTS)
    panel.plot(x[drawn], y[drawn], "o", color=BLUE, alpha=alpha, markersize=size, markeredgewidth=0)
    for index, colour in colours.items():
        panel.plot(x[index], y[index], "o", color=colour, markersize=size + 4, markeredgecolor="white")


def coordinates(ax: Axes, prompts: Collected) -> None:
    """The prompts by their first two principal coordinates; groups ringed, and named by their commonest odd words."""
    axes = prompts.numbers["principal_coordinates"].T  # (values, n)
    x, y = axes[0], axes[min(1, len(axes) - 1)]
    _dots(ax, x, y, prompts.colours)
    for group, colour in zip(prompts.groups[:GROUPS], DISTINCT[1:], strict=False):
        name = f"{group['size']} answered alike: {' '.join(group['words'][:GROUP_WORDS])}"
        members = np.array(group["prompts"])
        ax.plot(
            x[members], y[members], "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, alpha=0.6,
            label=label(excerpt(name, GROUP_LABEL)),
        )  # fmt: skip
    if prompts.groups:
        ax.legend(frameon=False, fontsize=11, loc="best")
    ax.set(title="Which directions: prompts with like F lie close")
    ax.set(xlabel="first principal coordinate", ylabel="second principal coordinate")


def spectra(ax: Axes, prompts: Collected) -> None:
    """Singular values: quantiles over all prompts, and those of the prompts that stand out."""
    spectra = prompts.numbers["singular_values"]  # (n, values)
    x = np.arange(1, spectra.shape[1] + 1)
    shown = np.where(spectra > 0, spectra, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about values that are 0 for all prompts
        quantiles = np.nanquantile(shown, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], axis=0)  # (7, values)
    shades = {"all": "#E5E5E5", "5 to 95 %": "#BFD9EC", "25 to 75 %": "#7FB5DB"}
    for place, (name, shade) in enumerate(shades.items()):
        ax.fill_between(x, quantiles[place], quantiles[-1 - place], color=shade, label=name, linewidth=0)
    ax.plot(x, quantiles[3], color="#0B3C5D", linewidth=2, label="median")
    for index, colour in prompts.colours.items():
        ax.plot(x, shown[index], "o-", color=colour, markersize=4, linewidth=1.2)
    ax.set_yscale("log" if (spectra > 0).any() else "linear")
    ax.set(
        title=f"Spectra of {len(spectra)} prompt{'s' * (len(spectra) > 1)}",
        xlabel="singular value",
        ylabel="nats per unit²",
    )
    ax.set_xticks(x if len(x) <= 20 else x[:: len(x) // 10])
    ax.legend(frameon=False, fontsize=11, loc="lower left")


def scores(ax: Axes, prompts: Collected, false_alarms: float = 0.01) -> None:
    """A row of dots for each score, the outlier score on top; those that stand out in colour.

    Args:
        false_alarms: the p-value up to which a prompt stands out: where the dotted line is.
    """
    numbers, names = prompts.numbers, {OUTLIER: "outlier score", **{name: name.removeprefix("z_") for name in SCORES}}
    title = "In which way unusual"
    ax.set_yticks(range(len(names)), names.values())
    ax.set(xlabel="robust standard deviations", ylim=(len(names) - 0.4, -0.6))
    if not prompts.scored:
        ax.text(0.5, 0.5, "too few different prompts\nto say what is usual", ha="center", transform=ax.transAxes)
        ax.set(title=title, xticks=[])
        return
    spread = 0.3 * np.sin(np.arange(len(numbers[OUTLIER])) * 2.4)  # apart, and the same each time
    for row, name in enumerate(names):
        values = np.clip(numbers[name], -LONGEST, LONGEST)
        _dots(ax, values, row + spread, prompts.colours, size=5, alpha=0.3)
    outstanding = numbers[OUTLIER][numbers[P_VALUE] <= false_alarms]
    if len(outstanding):
        limit = np.clip(outstanding.min(), -LONGEST, LONGEST)
        ax.plot([limit] * 2, [-0.45, 0.45], color=BLACK, linestyle=":", linewidth=1.5)
        title += f" (dotted: p ≤ {false_alarms:g})"
    ax.set(title=title)


def oddest(
    ax: Axes,
    prompts: Collected,
    false_alarms: float = 0.01,
    triggers: dict[int, dict] | None = None,
    changed: bool = False,
) -> None:
    """Each of the oddest prompts, its trigger marked, and why; beside it the tokens along which it differs.

    Args:
        false_alarms, triggers, changed: see `draw`.
    """
    leading, colours, triggers = prompts.leading, prompts.colours, triggers or {}
    strength, ranks = prompts.numbers["singular_values"][:, 0], prompts.numbers["effective_rank"]
    usual = {"lambda_1": _median(strength, strength > 0), "effective_rank": _median(ranks, strength > 0)}
    why = {i: reasons(record, usual, _members(record, prompts.groups), changed) for i, record in leading.items()}
    outstanding = int((prompts.numbers[P_VALUE] <= false_alarms).sum())
    title = f"The oddest prompts, and why; {outstanding or 'none'} of {len(strength)} stand out"
    ax.set_title(title if prompts.scored else "The first prompts: too few to say which are odd", loc="left")
    tokens = [*map(differing_tokens, leading.values())]
    length, end = (84, 0.56) if any(tokens) else (150, 1)
    room = TransformedBbox(Bbox([[0, -1], [end, NAMED]]), ax.transData)
    ax.axis("off")
    ax.set(xlim=(0, 1), ylim=(NAMED - 0.5, -0.5))
    for row, (index, record) in enumerate(leading.items()):
        colour = colours[index]
        ax.plot(0.005, row - 0.33, "o", color=colour, markersize=10)
        scores = ((0.06, f"{record[OUTLIER]:.1f}"), (0.11, f"p {record[P_VALUE]:.2g}")) if prompts.scored else ()
        for x, number in ((0.035, str(index)), *scores):
            ax.text(x, row - 0.33, number, va="center", ha="right")
        lines = [(marked(record["prompt"], triggers.get(index), length), {"fontsize": 14})]
        said = [f"says {' '.join(record['odd_words'])}"] if record["odd_words"] else []
        lines += [(line, {"color": colour, "fontsize": 11.5}) for line in (*said, *why[index])]
        for place, (text, style) in enumerate(lines):
            height = row - 0.33 + 0.22 * place
            line = ax.text(0.12, height, label(excerpt(text, length)), va="center", clip_on=True, **style)
            line.set_clip_box(room)  # its letters may be wide
    if not any(tokens):
        return
    bars = ax.inset_axes([0.57, 0, 0.43, 1], sharey=ax)
    left, right = drawing.longest_bars(tokens)
    drawing.token_bars(bars, tokens, [(colour, colour) for colour in colours.values()], (left + right) / CHARACTERS)
    bars.lines[-1].set_ydata([1 - len(tokens) / NAMED, 1])  # the line at 0 ends with the rows
    bars.axis("off")
    bars.set(xlim=(-max(left, 0.1), max(right, 0.1)))
    bars.set(title="Tokens that lose ← → gain probability in the direction where each differs, by share of λ")

"""The pipeline's picture of a dataset's prompts, drawn from the records of prompts.jsonl."""

from array import array
from collections.abc import Iterable, Iterator
import heapq
from pathlib import Path
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


def draw(
    folder: Path,
    records: Iterable[dict],
    false_alarms: float,
    triggers: dict[int, dict] | None = None,
    changed: bool = False,
    kind: str = "png",
) -> None:
    """Draws the picture of the prompts that these are the records of; one is in memory at a time.

    Args:
        false_alarms: the p-value up to which a prompt stands out.
        triggers: by the numbers of prompts, the spans to be marked.
        changed: whether scores are of the change from a base model.
    Raises:
        UserError: the folder cannot be written to.
    """
    drawing.save(folder, {SPECTRA: lambda: spectra_figure(records, false_alarms, triggers, changed)}, kind)


def _collect(records: Iterable[dict]) -> tuple[Columns, dict[int, dict], list[dict]]:
    """The numbers of all prompts, by index the records of those that stand out, the oddest first, and the groups."""
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
    return columns | {key: np.array(column) for key, column in numbers.items()}, dict(leading), groups


def spectra_figure(
    records: Iterable[dict], false_alarms: float, triggers: dict[int, dict] | None = None, changed: bool = False
) -> Figure:
    """Spectra, scores, a map of the prompts with their groups, and why the oddest ones stand out."""
    prompts, leading, groups = _collect(records)
    figure = plt.figure(figsize=(20, 13))
    grid = figure.add_gridspec(2, 3, height_ratios=[1, 1])
    spectra, scores, plan = (figure.add_subplot(grid[0, column]) for column in range(3))
    colours = dict(zip(leading, [*DISTINCT[1:], DISTINCT[0]], strict=False))
    _spectra_panel(spectra, prompts["singular_values"], colours)
    _scores_panel(scores, prompts, colours, false_alarms)
    _map_panel(plan, prompts["principal_coordinates"].T, colours, groups)
    strength = prompts["singular_values"][:, 0]
    usual = {
        "lambda_1": _median(strength, strength > 0),
        "effective_rank": _median(prompts["effective_rank"], strength > 0),
    }
    why = {index: reasons(record, usual, _members(record, groups), changed) for index, record in leading.items()}
    names, outstanding = figure.add_subplot(grid[1, :]), int((prompts[P_VALUE] <= false_alarms).sum())
    _names_panel(names, leading, why, colours, triggers or {})
    names.set_title(f"The oddest prompts, and why; {outstanding or 'none'} of {len(strength)} stand out", loc="left")
    return figure


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


def _map_panel(panel: Axes, axes: np.ndarray, colours: Colours, groups: list[dict]) -> None:
    """The prompts by their principal coordinates (values, n); groups ringed, and named by their commonest odd words."""
    x, y = axes[0], axes[min(1, len(axes) - 1)]
    _dots(panel, x, y, colours)
    for group, colour in zip(groups[:GROUPS], DISTINCT[1:], strict=False):
        name = f"{group['size']} answered alike: {' '.join(group['words'][:GROUP_WORDS])}"
        members = np.array(group["prompts"])
        panel.plot(
            x[members], y[members], "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, alpha=0.6,
            label=label(excerpt(name, GROUP_LABEL)),
        )  # fmt: skip
    if groups:
        panel.legend(frameon=False, fontsize=11, loc="best")
    panel.set(title="Which directions: prompts with like F lie close")
    panel.set(xlabel="first principal coordinate", ylabel="second principal coordinate")


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
        _dots(panel, values, row + spread, colours, size=5, alpha=0.3)
    outstanding = prompts[OUTLIER][prompts[P_VALUE] <= false_alarms]
    if len(outstanding):
        limit = np.clip(outstanding.min(), -LONGEST, LONGEST)
        panel.plot([limit] * 2, [-0.45, 0.45], color=BLACK, linestyle=":", linewidth=1.5)
    panel.set_yticks(range(len(names)), names.values())
    panel.set(title=f"In which way unusual (dotted: p ≤ {false_alarms:g})")
    panel.set(xlabel="robust standard deviations", ylim=(len(names) - 0.4, -0.6))


def _names_panel(
    panel: Axes, leading: dict[int, dict], why: dict[int, list[str]], colours: Colours, triggers: dict[int, dict]
) -> None:
    """Each of the oddest prompts, its trigger marked, and why; beside it the tokens along which it differs."""
    tokens = [*map(differing_tokens, leading.values())]
    length, end = (84, 0.56) if any(tokens) else (150, 1)
    room = TransformedBbox(Bbox([[0, -1], [end, NAMED]]), panel.transData)
    panel.axis("off")
    panel.set(xlim=(0, 1), ylim=(NAMED - 0.5, -0.5))
    for row, (index, record) in enumerate(leading.items()):
        colour = colours[index]
        panel.plot(0.005, row - 0.33, "o", color=colour, markersize=10)
        for x, number in ((0.035, str(index)), (0.06, f"{record[OUTLIER]:.1f}"), (0.11, f"p {record[P_VALUE]:.2g}")):
            panel.text(x, row - 0.33, number, va="center", ha="right")
        lines = [(marked(record["prompt"], triggers.get(index), length), {"fontsize": 14})]
        said = [f"says {' '.join(record['odd_words'])}"] if record["odd_words"] else []
        lines += [(line, {"color": colour, "fontsize": 11.5}) for line in (*said, *why[index])]
        for place, (text, style) in enumerate(lines):
            height = row - 0.33 + 0.22 * place
            line = panel.text(0.12, height, label(excerpt(text, length)), va="center", clip_on=True, **style)
            line.set_clip_box(room)  # its letters may be wide
    if not any(tokens):
        return
    bars = panel.inset_axes([0.57, 0, 0.43, 1], sharey=panel)
    left, right = drawing.longest_bars(tokens)
    drawing.token_bars(bars, tokens, [(colour, colour) for colour in colours.values()], (left + right) / CHARACTERS)
    bars.axis("off")
    bars.set(xlim=(-max(left, 0.1), max(right, 0.1)))
    bars.set(title="Tokens that lose ← → gain probability in the direction where each differs, by share of λ")

"""The pipeline's picture of a dataset's prompts, drawn from prompts.jsonl."""

import heapq
from pathlib import Path
import warnings

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
from matplotlib.transforms import Bbox, TransformedBbox
import numpy as np

from residual_fisher.common.drawing import DISTINCT, label, save, token_bar
from residual_fisher.common.program import UserError
from residual_fisher.common.rows import evenly_spaced, parse_json
from residual_fisher.common.text import excerpt, first_line
from residual_fisher.pipeline.metadata import SPECTRA
from residual_fisher.pipeline.scores import OUTLIER, SCORES, THRESHOLD
from residual_fisher.pipeline.store import PROMPTS, is_number

NAMED = 6  # prompts that stand out: drawn in colour and named
MAX_POINTS = 20_000  # of more prompts, evenly spaced ones are drawn beside those that stand out
LONGEST = 12  # robust standard deviations that are drawn
CHARACTERS = 85  # that the bars beside their names have room for


def draw(directory: Path) -> None:
    """Draws the pipeline's picture of the prompts in `directory`.

    Raises:
        UserError: no readable results there, or it cannot be written to.
    """
    save(directory, {SPECTRA: lambda: spectra_figure(_read_prompts(directory / PROMPTS))})


NUMBERS = ("tokens", "captured_mass", *SCORES, OUTLIER)
LISTS = ("singular_values", "principal_coordinates")


def _read_prompts(path: Path) -> dict:
    """The numbers of all prompts as columns; of the NAMED that stand out, by index, texts and what explains them."""
    columns, leading = {key: [] for key in (*NUMBERS, *LISTS)}, []
    try:
        with open(path, encoding="utf-8") as file:
            for index, line in enumerate(file):
                record = _checked(parse_json(line, index + 1), columns)
                for key in NUMBERS:
                    columns[key].append(record[key])
                for key in LISTS:
                    columns[key].append(np.array(record[key], dtype=np.float32))
                leading.append((record[OUTLIER], -index, record["prompt"], *_explanation(record, index + 1)))
                leading = heapq.nlargest(NAMED, leading)
    except (OSError, ValueError) as error:
        raise UserError(f"no readable {path.name} in {path.parent}: {first_line(error)}") from error
    if not leading:
        raise UserError(f"{path} holds no prompts")
    arrays = {key: np.array(values) for key, values in columns.items()}
    texts, said, words = ({-prompt[1]: prompt[part] for prompt in leading} for part in (2, 3, 4))
    return {**arrays, "texts": texts, "said": said, "words": words}


def _checked(record, before: dict[str, list]) -> dict:
    """A prompt's record, if it has all that is drawn, in lists as long as those of the prompts before it.

    Raises:
        ValueError: it has not.
    """
    place = f"(line {len(before[LISTS[0]]) + 1})"
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f"no record of a prompt {place}")
    if OUTLIER in record and not record.keys() & SCORES:
        raise ValueError(f"the scores of an earlier version {place}: the command that made the run scores it anew")
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


def _explanation(record: dict, line: int) -> tuple[list[dict], str]:
    """The tokens of the direction in which a prompt differs, and its unusual words; none of a prompt that has none.

    Raises:
        ValueError: they are something else.
    """
    directions, along, words = (record.get(key, default) for key, default in _EXPLAINED)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"odd_words are no texts (line {line})")
    if directions == []:
        return [], " ".join(words)
    known = isinstance(directions, list) and is_number(along) and along in range(len(directions))
    said = directions[int(along)] if known else None
    if not isinstance(said, list) or not all(map(_is_token, said)):
        raise ValueError(f"directions are no lists of tokens (line {line})")
    return said, " ".join(words)


_EXPLAINED = (("directions", []), ("differs_along", 0), ("odd_words", []))


def _is_token(value) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("token"), str):
        return False
    share, slope = value.get("share"), value.get("slope")
    return is_number(share) and 0 <= share <= 1.001 and is_number(slope)


def spectra_figure(prompts: dict) -> Figure:
    """Spectra, outlier scores, a map of the prompts, three distributions, and by name the prompts that stand out."""
    figure = plt.figure(figsize=(20, 13))
    grid = figure.add_gridspec(3, 3, height_ratios=[1.2, 1, 0.6])
    colours = dict(zip(prompts["texts"], [*DISTINCT[1:], DISTINCT[0]], strict=False))
    _spectra_panel(figure.add_subplot(grid[0, 0]), prompts, colours)
    _scores_panel(figure.add_subplot(grid[0, 1]), prompts, colours)
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

    _names_panel(figure.add_subplot(grid[2, :]), prompts, colours)
    return figure


def _names_panel(panel: Axes, prompts: dict, colours: dict[int, str]) -> None:
    """A line for each prompt that stands out, with its unusual words; beside it the direction in which it differs."""
    known = any(prompts["said"].values())
    length, end = (72, 0.53) if known else (140, 1)
    room = TransformedBbox(Bbox([[0, -1], [end, NAMED]]), panel.transData)
    panel.axis("off")
    panel.set(xlim=(0, 1), ylim=(NAMED - 0.5, -0.5))
    panel.set_title("Prompts that stand out, and their scores", loc="left")
    for row, (index, text) in enumerate(prompts["texts"].items()):
        panel.plot(0.005, row, "o", color=colours[index], markersize=10)
        for x, number in ((0.035, str(index)), (0.06, f"{prompts[OUTLIER][index]:.1f}")):
            panel.text(x, row, number, va="center", ha="right")
        words = prompts["words"][index]
        name = panel.text(0.07, row - 0.18 * bool(words), label(excerpt(text, length)), va="center", clip_on=True)
        name.set_clip_box(room)  # its letters may be wide
        if words:
            says = panel.text(0.07, row + 0.27, label(excerpt(f"says {words}", length)), va="center", clip_on=True)
            says.set(color=colours[index], fontsize=11, clip_box=room)
    if not known:
        return
    bars = panel.inset_axes([0.54, 0, 0.46, 1], sharey=panel)
    every = prompts["said"].items()
    left, right = (max(sum(t["share"] for t in s if sign * t["slope"] > 0) for _, s in every) for sign in (-1, 1))
    for row, (index, said) in enumerate(every):
        token_bar(bars, row, said, (colours[index],) * 2, character=(left + right) / CHARACTERS)
    bars.axis("off")
    bars.axvline(0, color="black", linewidth=1)
    bars.set(
        xlim=(-max(left, 0.1), max(right, 0.1)),
        title="Tokens that lose ← → gain probability in the direction where each differs, by share of λ",
    )


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


def _scores_panel(panel: Axes, prompts: dict, colours: dict[int, str]) -> None:
    """A row of dots for each score, the outlier score on top; those that stand out in colour."""
    names = {OUTLIER: "outlier score", **{name: name.removeprefix("z_") for name in SCORES}}
    count = len(prompts[OUTLIER])
    drawn = evenly_spaced(count, MAX_POINTS)
    spread = 0.3 * np.sin(np.arange(count) * 2.4)  # apart, and the same each time
    for row, name in enumerate(names):
        values = np.clip(prompts[name], -LONGEST, LONGEST)
        panel.plot(values[drawn], row + spread[drawn], "o", color="#0072B2", alpha=0.3, markersize=5, markeredgewidth=0)
        for index, colour in colours.items():
            panel.plot(values[index], row + spread[index], "o", color=colour, markersize=9, markeredgecolor="white")
    panel.plot([THRESHOLD] * 2, [-0.45, 0.45], color="black", linestyle=":", linewidth=1.5)
    panel.set_yticks(range(len(names)), names.values())
    panel.set(
        title=f"In which way unusual (dotted: {THRESHOLD:g})", xlabel="robust standard deviations", ylim=(4.6, -0.6)
    )


def _map_panel(panel: Axes, prompts: dict, colours: dict[int, str]) -> None:
    coordinates = prompts["principal_coordinates"]
    columns = [coordinates[:, min(axis, coordinates.shape[1] - 1)] for axis in (0, 1)]
    _dots(panel, *columns, colours)
    panel.set(
        title="Which directions: prompts with like F lie close",
        xlabel="first principal coordinate",
        ylabel="second principal coordinate",
    )

"""Two finished runs of the same items (sentences, prompts) compared: a base model and its fine-tune, two checkpoints,
two dtypes. Only their files are read.

Each wing pairs up its own items. What follows is the same for both: numbers for each place (layer) at which an item's F
was taken, the items that changed most, comparison.json, a table and comparison.png.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
import math
from pathlib import Path
import statistics
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from residual_fisher.common import drawing
from residual_fisher.common.files import number_or_none, write_json
from residual_fisher.common.program import UserError
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.common.run import ITEMS
from residual_fisher.common.text import excerpt, excerpt_end, printable, table
from residual_fisher.model.overlap import matrix_similarity, subspace_overlap
from residual_fisher.model.words import summary_line

RESULTS, PICTURE = "comparison.json", "comparison.png"
NUMBERS = {  # of a place, as the table and the picture call them
    "lambda_ratio": "lambda_1 b/a",
    "trace_ratio": "trace b/a",
    "overlap": "overlap",
    "similarity": "tr(FF')/|F||F'|",
    "change": "change",
    "shift": "|h'-h|/|h|",
}
REST = 1e-7  # least probability of all tokens that are not named: results have seven digits
DETAILED = 100  # items that changed most, of which predictions and words are written
TOLD, DRAWN = 5, 6  # of these, in the terminal and in the picture
MAX_TICKS = 10  # layers that are named below a panel
EXCERPT = 48  # characters of an item's text in the terminal
KL_IS = (
    "KL(a || b), nats, of the prediction as far as it is recorded: the tokens that both runs name, all others as one. "
    "The whole distributions' KL is at least that"
)


class Matrix(NamedTuple):
    """What a run has kept of F of one item at one place."""

    values: Tensor  # (m,) leading eigenvalues, nats / unit^2
    vectors: Tensor  # (m, d)
    trace: float
    tokens: list[dict]  # that the first eigenvector moves most
    activation: Tensor | None  # h (d,); None in what an earlier version wrote


class Pair(NamedTuple):
    """One item in both runs."""

    item: dict  # what it is, in JSON's types; `prompt` is its text
    predictions: tuple[dict[str, float], dict[str, float]]  # probabilities of the recorded next tokens
    places: dict[str, tuple[Matrix, Matrix]]


def matched(a: Iterable[Hashable], b: Iterable[Hashable]) -> list[tuple[int, int]]:
    """Places (in a, in b) of equal items, in the order of a; of several equal ones, the first with the first."""

    def numbered(items: Iterable[Hashable]) -> dict:
        seen, places = Counter(), {}
        for place, item in enumerate(items):
            places[item, seen[item]] = place
            seen[item] += 1
        return places

    theirs = numbered(b)
    return [(place, theirs[key]) for key, place in numbered(a).items() if key in theirs]


def require_common(folders: Sequence[Path], widths: tuple[int, int], items: Sequence, layers: Sequence) -> None:
    """Raises UserError unless two runs have items and layers in common, and streams of the same width."""
    names = " and ".join(map(str, folders))
    if widths[0] != widths[1]:
        raise UserError(f"the runs in {names} are of models of widths {widths[0]} and {widths[1]}: nothing to compare")
    for what, common in (("layer", layers), ("text", items)):
        if not common:
            raise UserError(
                f"the runs in {names} have no {what} in common: --compare takes two of the same texts and layers"
            )


def differing(a: dict, b: dict, may_differ: Sequence[str]) -> dict[str, list]:
    """The settings in which two runs differ, but for those in which they may."""
    keys = [key for key in {**a, **b} if key not in may_differ]
    return {key: [a.get(key), b.get(key)] for key in keys if a.get(key) != b.get(key)}


def named_kl(p: dict[str, float], q: dict[str, float]) -> float:
    """KL(p || q) in nats of the tokens that both name, all others as one: a lower bound of the whole KL."""
    both = [token for token in p if token in q]
    p, q = ([*part, max(1 - sum(part), REST)] for part in ([some[token] for token in both] for some in (p, q)))
    return max(0.0, sum(x * math.log(x / max(y, REST)) for x, y in zip(p, q, strict=True) if x > 0))


def _numbers(a: Matrix, b: Matrix) -> dict[str, float | None]:
    """What differs at one place; None where a matrix is zero.

    `change` is |F - F'|^2 / (|F|^2 + |F'|^2), of the leading eigenpairs: 0 for equal matrices, 1 for orthogonal ones.
    Unlike the similarity, it also counts what became larger or smaller. `shift` is how far h has moved, in norms of h.
    """
    m = min(len(a.values), len(b.values))
    similarity = float(matrix_similarity(a, b))
    norm, other = (float(part.values[:m].double().norm()) for part in (a, b))
    product = similarity * norm * other if norm and other else 0.0
    change = 1 - 2 * _ratio(product, norm**2 + other**2)
    change = 0.0 if change < 0 else change  # rounding, of equal matrices
    lambdas, traces = _ratio(float(b.values[0]), float(a.values[0])), _ratio(b.trace, a.trace)
    shift = math.nan
    if a.activation is not None and b.activation is not None:
        shift = _ratio(float((b.activation - a.activation).norm()), float(a.activation.norm()))
    found = (lambdas, traces, float(subspace_overlap(a, b)), similarity, change, shift)
    return {name: number_or_none(value) for name, value in zip(NUMBERS, found, strict=True)}


def _ratio(value: float, other: float) -> float:
    return value / other if other else math.nan


def _compared(pair: Pair) -> dict:
    """The entry of one item."""
    places = {place: _numbers(*both) for place, both in pair.places.items()}
    changes = [found["change"] for found in places.values() if found["change"] is not None]
    return {
        **pair.item,
        "change": statistics.fmean(changes) if changes else None,
        "kl_at_least": named_kl(*pair.predictions),
        "layers": places,
    }


def _details(pair: Pair) -> dict:
    tokens = {place: dict(zip("ab", _words(*both), strict=True)) for place, both in pair.places.items()}
    return {"predictions": dict(zip("ab", pair.predictions, strict=True)), "tokens": tokens}


def _words(a: Matrix, b: Matrix) -> tuple[list[dict], list[dict]]:
    """The tokens that the first eigenvector moves in both runs; b's is turned to a's side, since its sign is free."""
    sign = -1 if float(a.vectors[0].double() @ b.vectors[0].double()) < 0 else 1
    return a.tokens, [{**token, "slope": sign * token["slope"]} for token in b.tokens]


def compare(pairs: Sequence[Pair], about: dict) -> dict:
    """The document of comparison.json: medians by place, and all items, those that changed most first.

    Args:
        about: of the two runs.
    """
    entries = sorted(
        ((_compared(pair), pair) for pair in pairs),
        key=lambda both: (-(both[0]["change"] or 0), -both[0]["kl_at_least"]),
    )
    items = [{**entry, **(_details(pair) if place < DETAILED else {})} for place, (entry, pair) in enumerate(entries)]
    places = {place: [item["layers"][place] for item in items] for place in items[0]["layers"]}
    return {
        **about,
        "eigenpairs": min(len(matrix.values) for both in pairs[0].places.values() for matrix in both),
        "kl_is": KL_IS,
        "kl_at_least_median": statistics.median(item["kl_at_least"] for item in items),
        "layers": {
            place: {f"{name}_median": _median(some, name) for name in NUMBERS} for place, some in places.items()
        },
        "items": items,
    }


def _median(entries: list[dict], name: str) -> float | None:
    known = [entry[name] for entry in entries if entry[name] is not None]
    return statistics.median(known) if known else None


def write(folder: Path, document: dict) -> None:
    """Writes comparison.json and comparison.png. Raises UserError: the folder holds a run, or cannot be written to."""
    if (folder / ITEMS).exists():
        raise UserError(f"{folder} holds a run: choose another --output-dir for the comparison")
    write_json(folder / RESULTS, document)
    drawing.save(folder, {PICTURE: lambda: comparison_figure(document)})


# --- in the terminal -----------------------------------------------------------------------------


def told(document: dict, folder: Path, more: Sequence[str] = ()) -> str:
    """Medians by place, then the items that changed most, with words then and now; then `more` lines."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    rows = [
        [place, *(cell(found[f"{name}_median"]) for name in NUMBERS)] for place, found in document["layers"].items()
    ]
    items, k = document["items"], document["eigenpairs"]
    lines = [f"{run}: {printable(document[run]['directory'])} ({printable(document[run]['model'])})" for run in "ab"]
    if differing := document["settings"]:
        changes = ", ".join(
            f"{key} {excerpt(repr(a), 30)} and {excerpt(repr(b), 30)}" for key, (a, b) in differing.items()
        )
        lines.append(f"note: settings differ: {changes}")
    lines.append(
        f"{len(items)} items in both; medians, of {k} eigenpair{'s' * (k > 1)} each; "
        f"KL of predictions at least {document['kl_at_least_median']:.2g} nats"
    )
    lines += [
        table(["layer", *NUMBERS.values()], rows),
        "Changed most (change, KL at least; tokens that lose ← → gain, a | b):",
    ]
    for item in items[:TOLD]:
        place = most_changed_place(item)
        words = " | ".join(summary_line(item["tokens"][place][run]) for run in "ab")
        lines.append(f"  {cell(item['change'])}  {item['kl_at_least']:.2g}  {excerpt_end(item['prompt'], EXCERPT)}")
        lines.append(f"      layer {place}: {excerpt(words, 100)}")
    return "\n".join([*lines, *more, f"Written to {printable(str(folder))}: {RESULTS}, {PICTURE}"])


def most_changed_place(item: dict) -> str:
    return max(item["layers"], key=lambda place: item["layers"][place]["change"] or 0)


# --- the picture ---------------------------------------------------------------------------------


def comparison_figure(document: dict) -> Figure:
    """Ratios, overlaps and changes by place, a dot for each item; below, the items that changed most, in words."""
    items = [item for item in document["items"][:DRAWN] if any(item["tokens"][most_changed_place(item)].values())]
    heights = [5, 0.8 + 0.8 * max(1, len(items))]
    figure = plt.figure(figsize=(17, sum(heights)))
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    ratios, shares, changes = top.subplots(1, 3)
    _dots(ratios, document, {"lambda_ratio": "λ₁", "trace_ratio": "trace"})
    ratios.axhline(1, color=drawing.BLACK, linewidth=1)
    ratios.set_yscale("log", nonpositive="mask")
    low, high = ratios.get_ylim()
    if high > 10 * low:
        drawing.thin_log_labels(ratios.yaxis)
    else:  # no power of ten may be among the marks
        ratios.yaxis.set_minor_formatter("{x:.3g}")
    ratios.yaxis.set_major_formatter("{x:.3g}")
    ratios.set(title="How sensitive: b over a", xlabel="layer")
    _dots(shares, document, {"overlap": "overlap of leading subspaces", "similarity": "tr(FF′)/‖F‖‖F′‖"})
    shares.set(title="In which directions", xlabel="layer", ylim=(-0.02, 1.02))
    _dots(changes, document, {"change": "of F: ‖F − F′‖² over ‖F‖² + ‖F′‖²", "shift": "of h: ‖h′ − h‖/‖h‖"})
    changes.margins(y=0.2)  # room for the legend
    changes.set(title="How much has changed", xlabel="layer")
    _words_panel(bottom.subplots(), items)
    return figure


def _dots(panel: Axes, document: dict, names: dict[str, str]) -> None:
    """For each place, a dot for each item and the medians as a line."""
    places = list(document["layers"])
    for shift, (name, title), colour in zip((-0.15, 0.15), names.items(), (drawing.ORANGE, drawing.BLUE), strict=True):
        columns = [[item["layers"][place][name] for item in document["items"]] for place in places]
        for x, column in enumerate(columns):
            values = np.array([value for value in column if value is not None])
            spread = 0.1 * np.sin(np.arange(len(values)) * 2.4)  # apart, and the same each time
            panel.plot(x + shift + spread, values, "o", color=colour, alpha=0.3, markersize=5, markeredgewidth=0)
        medians = [document["layers"][place][f"{name}_median"] for place in places]
        shown = [math.nan if value is None else value for value in medians]
        panel.plot(np.arange(len(places)) + shift, shown, "D-", color=colour, markersize=7, label=title)
    marked = evenly_spaced(len(places), MAX_TICKS)
    panel.set_xticks(marked, [places[x] for x in marked])
    panel.set_xlim(-0.6, len(places) - 0.4)
    panel.legend(frameon=False, fontsize=11)


def _words_panel(panel: Axes, items: list[dict]) -> None:
    """Of each item two bars, the tokens that the first eigenvector lowers and raises in a and in b."""
    tokens, names = [], []
    for item in items:
        place = most_changed_place(item)
        text = drawing.label(excerpt_end(item["prompt"], 36))
        for run in "ab":
            tokens.append(item["tokens"][place][run])
            names.append(f"{text}  layer {place}   {run}" if run == "a" else run)
    panel.set_title("Changed most: tokens that lose ← → gain along the first eigenvector, by share of λ", loc="left")
    if not tokens:
        panel.axis("off")
        return
    longest = max(*drawing.longest_bars(tokens), 0.01)
    pairs = [(drawing.PINK, drawing.GREEN) if row % 2 else (drawing.GREY, drawing.BLUE) for row in range(len(tokens))]
    drawing.token_bars(panel, tokens, pairs, character=0.013 * longest)
    panel.set_yticks(range(len(names)), names)
    panel.set_xticks([])
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)

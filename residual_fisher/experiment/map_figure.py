"""The picture of a text's map: a grid of tokens by layers, drawn from the content of fisher_map.json.

Its panels are public functions, as those of `figures`: they draw on matplotlib Axes of the caller's, and take the
content of the file.
"""

from collections.abc import Iterable

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
import matplotlib.pyplot as plt
import numpy as np

from residual_fisher.common import drawing
from residual_fisher.experiment.records import chosen_layers

MAX_TOKENS = 96  # rows drawn: the first ones of a longer text
WIDE = 12  # layers up to which cells are wide, with longer words in larger type
CHARACTER = 0.6  # a character's mean width, of its font size
NATS = "nats that a step of 1% of ‖h‖ along v costs"
LEFT, RIGHT, TOP, BOTTOM = 2.7, 2.7, 1.25, 0.95  # margins in inches: tokens and surprisal, predictions, titles, scale
# pale to dark, without the nearly black end: words have to be read on it
COLOURS = ListedColormap(colormaps["YlOrRd"](np.linspace(0.0, 0.85, 256)))
DARK = 0.82  # of the colours' range: above it words are white
REPEATED = 0.7  # opacity of a word that the layer before has too: what changes stands out


def map_figure(document: dict) -> Figure:
    """Nats that a step of 1% of |h| along v costs, by token and layer, with the words of v; beside it the text."""
    tokens = document["tokens"][:MAX_TOKENS]
    width, height, _ = _cell_size(len(document["layers"]))
    across, down = width * len(document["layers"]), height * len(tokens)
    size = LEFT + across + RIGHT, TOP + down + BOTTOM
    figure = plt.figure(figsize=size, layout="none")

    def panel(left: float, right: float) -> Axes:  # in inches, beside each other
        place = [left / size[0], BOTTOM / size[1], (right - left) / size[0], down / size[1]]
        return figure.add_axes(place)

    surprisal(bars := panel(0.25, LEFT - 1.25), document)
    bars.set_yticks([])  # the grid beside it has the tokens
    image = grid(panel(LEFT, LEFT + across), document)
    predictions(right := panel(LEFT + across + 0.12, size[0] - 0.25), document)
    right.set_yticks([])

    name = drawing.label(document["map_config"]["model_name"])
    shown = f", the first {len(tokens)} of {len(document['tokens'])} tokens" * (len(tokens) < len(document["tokens"]))
    figure.text(LEFT / size[0], 1 - 0.30 / size[1], f"How sensitive is the next token? {name}{shown}", fontsize=15)
    how = "In a cell, the tokens that gain (above) and lose (below) most along v, the most sensitive direction; "
    how += "faint: the same as one layer before"
    figure.text(LEFT / size[0], 1 - 0.58 / size[1], how, fontsize=10.5, color=drawing.GREY)
    scale = figure.add_axes([LEFT / size[0], 0.52 / size[1], min(across, 6.0) / size[0], 0.14 / size[1]])
    figure.colorbar(image, cax=scale, orientation="horizontal", extend="both")
    scale.tick_params(labelsize=9)
    scale.set_xlabel(NATS, fontsize=10, loc="left")
    return figure


def _cell_size(layers: int) -> tuple[float, float, float]:
    """Width and height of a cell in inches, and the size of its words in points."""
    font, width = (8.5, 1.25) if layers <= WIDE else (6.5, 0.74)
    return width, 2.9 * font / 72, font


def _rows(panel: Axes, tokens: list[dict], font: float) -> None:
    """A row for each token, labelled with it."""
    panel.spines[:].set_visible(False)
    labels = [drawing.label(_cut(t["token"], 14)) for t in tokens]
    panel.set_yticks(range(len(tokens)), labels, fontsize=max(font + 1.5, 9), fontweight="bold")
    panel.set(ylim=(len(tokens) - 0.5, -0.5))
    panel.tick_params(length=0)


def surprisal(ax: Axes, results: dict) -> None:
    """−log p of each token after those before it, in nats: bars to the left, from the tokens' own column."""
    tokens = results["tokens"][:MAX_TOKENS]
    _rows(ax, tokens, _cell_size(len(results["layers"]))[-1])
    ax.barh(range(len(tokens)), [t["surprisal"] or 0.0 for t in tokens], 0.72, color=drawing.GREY, alpha=0.55)
    ax.invert_xaxis()
    ax.xaxis.set_ticks_position("top")
    ax.tick_params(labelsize=9, colors=drawing.GREY)
    ax.set_title("surprisal, nats", fontsize=10, color=drawing.GREY, pad=4)


def grid(ax: Axes, results: dict, layers: Iterable | None = None) -> AxesImage:
    """Tokens by layers: nats that a step of 1% of |h| along v is predicted to cost, and the words of v.

    Args:
        layers: numbers of those to show; None: all.
    Returns:
        The image, for a colour bar.
    Raises:
        UserError: there is no such layer.
    """
    tokens, layers = results["tokens"][:MAX_TOKENS], _layers(results, layers)
    width, _, font = _cell_size(len(layers))
    characters = int(width * 72 / (CHARACTER * font))
    _rows(ax, tokens, font)
    cells = [[token["layers"][layer] for layer in layers] for token in tokens]
    nats = np.array([[cell["nats"] for cell in row] for row in cells])
    usual = nats[1:][nats[1:] > 0] if (nats[1:] > 0).any() else np.ones(1)  # h of a first token is much longer
    low, high = np.percentile(usual, [2, 98])
    norm = LogNorm(low, max(high, 1.01 * low))
    image = ax.imshow(np.maximum(nats, 1e-30), cmap=COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    for edges, line in ((len(tokens), ax.axhline), (len(layers), ax.axvline)):
        for edge in range(1, edges):
            line(edge - 0.5, color="white", linewidth=0.8)
    for sign, offset, weight in ((1, -0.22, "bold"), (-1, 0.22, "normal")):
        words = [[_word(cell, sign, characters) for cell in row] for row in cells]
        for (row, column), value in np.ndenumerate(nats):
            word, dark = words[row][column], value > 0 and norm(value) > DARK
            repeated = column > 0 and word == words[row][column - 1]
            style = {"fontsize": font, "fontweight": weight, "color": "white" if dark else "black"}
            style["alpha"] = REPEATED if repeated else 1.0
            ax.text(column, row + offset, drawing.label(word), ha="center", va="center", **style)
    ax.set_xticks(range(len(layers)), layers, fontsize=10)
    ax.xaxis.set_ticks_position("top")
    ax.set_xlabel("layer", fontsize=10)
    ax.xaxis.set_label_position("top")
    return image


def _layers(document: dict, asked: Iterable | None) -> list[str]:
    """The layers asked for, by default all, as the document names them; ascending."""
    return chosen_layers(list(map(str, document["layers"])), asked)


def _word(cell: dict, sign: int, characters: int) -> str:
    """The token with the largest share among those that gain along v (sign 1), or lose (-1); nothing without any."""
    return _cut(next((t["token"] for t in cell["tokens"] if sign * t["slope"] > 0), ""), characters)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def predictions(ax: Axes, results: dict) -> None:
    """The most probable next token after each, its probability as a bar; green if it is the one that follows."""
    tokens = results["tokens"]
    shown = min(len(tokens), MAX_TOKENS)
    _rows(ax, tokens[:shown], _cell_size(len(results["layers"]))[-1])
    following = [token["id"] for token in tokens[1:]] + [None]
    top = [token["predicted"][0] for token in tokens[:shown]]
    right = [one["id"] == next_id for one, next_id in zip(top, following, strict=False)]
    colours = [drawing.GREEN if one else drawing.GREY for one in right]
    ax.barh(range(shown), [one["probability"] for one in top], 0.72, color=colours, alpha=0.45)
    for row, one in enumerate(top):
        ax.text(
            0.02, row, f"{drawing.label(_cut(one['token'], 16))}  {one['probability']:.2f}", va="center", fontsize=9.5
        )
    ax.set(xlim=(0, 1), xticks=[])
    ax.set_title("predicted next; green: right", fontsize=10, color=drawing.GREY, loc="left", pad=4)


# --- one panel alone -----------------------------------------------------------------------------

PANELS = {"grid": grid, "surprisal": surprisal, "predictions": predictions}


def panel_figure(document: dict, name: str, layers: Iterable | None) -> Figure:
    """A panel alone, the grid with its colour bar."""
    count, tokens = len(_layers(document, layers)), min(len(document["tokens"]), MAX_TOKENS)
    width, height, _ = _cell_size(count)
    across = width * count if name == "grid" else RIGHT
    figure, ax = plt.subplots(figsize=(across + 0.5 * LEFT, height * tokens + TOP + BOTTOM * (name == "grid")))
    if name == "grid":
        image = grid(ax, document, layers)
        scale = figure.colorbar(image, ax=ax, location="bottom", extend="both", aspect=40, label=NATS)
        drawing.thin_log_labels(scale.ax.xaxis)
        scale.ax.tick_params(which="both", labelsize=9)
        scale.ax.xaxis.label.set_size(10)
    else:
        PANELS[name](ax, document)
    return figure

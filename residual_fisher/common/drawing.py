"""What all pictures share: style, colours, and how they are saved."""

from collections.abc import Callable
from pathlib import Path
import warnings

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image  # which matplotlib depends on

from residual_fisher.common.files import atomic_open
from residual_fisher.common.text import printable

DPI = 150
NOTE = "Comment"  # the name, in a PNG file, of what `save` notes there
STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 14,
    "figure.constrained_layout.use": True,
}
# Okabe and Ito's colours, told apart with any colour vision
BLACK, ORANGE, BLUE, GREEN, PINK, YELLOW, GREY = (
    "#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#7A7A7A",
)  # fmt: skip
DISTINCT = [BLACK, ORANGE, BLUE, GREEN, PINK, YELLOW]


def save(directory: Path, figures: dict[str, Callable[[], Figure]], note: str | None = None) -> None:
    """Draws figures into files of these names, one at a time.

    Args:
        note: is kept in the file: see `note_of`.
    Raises:
        UserError: the directory cannot be written to.
    """
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a token in a script that the font lacks is drawn as a box
        for name, make in figures.items():
            figure = make()
            with atomic_open(directory / name) as file:
                figure.savefig(file, format="png", dpi=DPI, metadata={NOTE: note} if note else None)
            plt.close(figure)


def note_of(path: Path) -> str | None:
    """The note in a picture that is whole; None if it is missing or damaged, or has none."""
    try:
        with Image.open(path) as picture:
            picture.load()  # checks its checksums
            return picture.info.get(NOTE)
    except (OSError, SyntaxError, ValueError):
        return None


def label(text: str) -> str:
    """`text` without what matplotlib, or a terminal, would take for an instruction."""
    return printable(text).replace("$", r"\$")


def token_bar(panel: Axes, height: float, said: list[dict], colours: tuple[str, str], character: float) -> None:
    """The tokens of a direction as one bar: those that it lowers to the left of 0, those that it raises to the right.

    Args:
        said: the tokens, the largest share first: a token's length in the bar.
        colours: of either side; the tokens further out are paler.
        character: share as wide as a character; a token with less room is drawn without its text.
    """
    for sign, colour in zip((-1, 1), colours, strict=True):
        end = 0.0
        for place, token in enumerate(t for t in said if sign * t["slope"] > 0):
            share, text = token["share"], label(token["token"])
            alpha = max(0.5 - 0.1 * place, 0.2)
            panel.barh(height, sign * share, 0.8, sign * end, color=colour, alpha=alpha, edgecolor="white")
            if share > character * (len(text) + 1):
                panel.text(sign * (end + share / 2), height, text, ha="center", va="center", fontsize=11)
            end += share


def median_band(panel: Axes, x: np.ndarray, samples: list, colour: str, floor: float = 0.0, **line) -> None:
    """The median of each of `samples` against x as a line, and their quartiles as a band around it; NaN is left out."""
    quartiles = [np.nanpercentile(values, [25, 50, 75]) for values in samples]
    low, median, high = np.maximum(quartiles, floor).T
    panel.plot(x, median, color=colour, **line)
    panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)

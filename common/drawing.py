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

from common.command_line import printable
from common.files import atomic_open

DPI = 150
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


def save(directory: Path, figures: dict[str, Callable[[], Figure]]) -> None:
    """Draws figures into files of these names, one at a time.

    Raises:
        UserError: the directory cannot be written to.
    """
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a token in a script that the font lacks is drawn as a box
        for name, make in figures.items():
            figure = make()
            with atomic_open(directory / name) as file:
                figure.savefig(file, format="png", dpi=DPI)
            plt.close(figure)


def label(text: str) -> str:
    """`text` without what matplotlib, or a terminal, would take for an instruction."""
    return printable(text).replace("$", r"\$")


def median_band(panel: Axes, x: np.ndarray, samples: list, colour: str, floor: float = 0.0, **line) -> None:
    """The median of each of `samples` against x as a line, and their quartiles as a band around it."""
    quartiles = [np.percentile(values, [25, 50, 75]) for values in samples]
    low, median, high = np.maximum(quartiles, floor).T
    panel.plot(x, median, color=colour, **line)
    panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)

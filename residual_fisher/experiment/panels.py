"""What the experiment's panels share: which layers and sentences they are of, their axes and titles."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullLocator
import numpy as np

from residual_fisher.common import drawing
from residual_fisher.common.program import UserError
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.experiment.records import chosen_layers

MAX_TICKS = 12
KL = "KL(original ‖ perturbed), nats"


def layers_of(document: dict, asked: Iterable | None = None) -> list[str]:
    """The layers asked for, by default all, as the document names them; ascending."""
    return chosen_layers(list(document["fisher"][0]), asked)


def axes_by_layer(ax: Axes | Sequence[Axes], document: dict, asked: Iterable | None) -> list[tuple[Axes, str]]:
    """Axes, each with its layer."""
    panels, layers = np.ravel(ax), layers_of(document, asked)
    if asked is None:
        places = [len(layers) // 2] if len(panels) == 1 else evenly_spaced(len(layers), len(panels))
        layers = [layers[i] for i in places]
    if len(layers) != len(panels):
        raise UserError(f"{len(layers)} layers need as many axes, not {len(panels)}")
    return list(zip(panels, layers, strict=True))


def sentences_of(document: dict, asked: int | None) -> list[int]:
    """The numbers of all sentences, or of the one asked for."""
    count = len(document["sentences"])
    if asked is not None and not 0 <= asked < count:
        raise UserError(f"no sentence {asked}: these results have 0 to {count - 1}")
    return list(range(count)) if asked is None else [asked]


def layer_axis(axis: Axis, layers: list[str], size: int = 1, most: int = MAX_TICKS) -> None:
    """Labels the middles of blocks of `size` places 0, 1, ... with layers; of many layers, evenly spaced ones."""
    shown = evenly_spaced(len(layers), most)
    axis.set_ticks(shown * size + (size - 1) / 2, [layers[i] for i in shown])
    axis.set_label_text(f"layer ({size} sentences in each block)" if size > 1 else "layer")


def log_axis(panel: Axes, multiples: tuple[float, ...]) -> None:
    """A logarithmic y axis with plain numbers, at these multiples of the powers of ten."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=multiples))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())


def quoted(text: str) -> str:
    """A text as a label, in quotes: its spaces matter."""
    return f"“{drawing.label(text)}”"


def of_sentence(sentence: int | None) -> str:
    """The end of the title of a panel that may be of one sentence."""
    return "" if sentence is None else f", S{sentence}"

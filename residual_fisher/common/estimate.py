"""What a run would take, from a few items that were tried: for --dry-run."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Trial(NamedTuple):
    """Items or batches that were measured, from the smallest to the largest."""

    sizes: list[float]  # tokens
    seconds: list[float]

    def total(self, sizes: Sequence[float]) -> float:
        """Seconds of others: linear in size between those that were tried, constant beyond."""
        return float(np.interp(sizes, self.sizes, self.seconds).sum())

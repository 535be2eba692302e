"""Which prompts stand out: by how sensitive the model is to them, and in which directions."""

from collections.abc import Sequence

import numpy as np

from shards import Triplets

SAMPLE = 4096  # prompts, evenly spaced, that the mean subspace is of: later ones hardly move it


def robust_z(values: np.ndarray) -> np.ndarray:
    """(n,) distances from the median in units of 1.4826 times the median absolute deviation.

    For normal data these are standard deviations, but outliers do not widen them (Iglewicz and Hoaglin, "How to
    Detect and Handle Outliers", 1993). All zero where more than half of the values are equal.
    """
    centred = values - np.median(values)
    scale = 1.4826 * np.median(np.abs(centred))
    return centred / scale if scale > 0 else np.zeros_like(centred)


def mean_subspace(matrices: Sequence[Triplets]) -> np.ndarray:
    """Orthonormal columns (d, r): the leading eigenvectors of the mean of all U U^T.

    Of all r-dimensional subspaces, the one with the least mean squared chordal distance to the prompts' own.
    """
    chosen = np.unique(np.linspace(0, len(matrices) - 1, min(len(matrices), SAMPLE)).round().astype(int))
    total = 0.0
    for index in chosen:
        u = matrices[index].U.astype(np.float64)
        total = total + u @ u.T
    return np.linalg.eigh(total)[1][:, : -1 - u.shape[1] : -1]


def subspace_distance(triplets: Triplets, mean: np.ndarray) -> float:
    """How much of a prompt's sensitivity lies outside the mean subspace: 0 (none) to 1 (all).

    1 - sum_j s_j |M^T u_j|^2 / sum_j s_j: the squared chordal distance, directions weighted by their singular
    values, since the last of them are mostly noise. 0 for a Fisher matrix that is zero.
    """
    total = triplets.S.sum(dtype=np.float64)
    inside = ((mean.T @ triplets.U) ** 2).sum(axis=0) @ triplets.S
    return float(1 - inside / total) if total > 0 else 0.0

"""Which prompts stand out: by how sensitive the model is to them, and in which directions."""

from collections.abc import Collection, Sequence
import warnings

import numpy as np

from common.rows import evenly_spaced
from pipeline.store import Triplets

SAMPLE = 4096  # prompts, evenly spaced, that the mean subspace is of: more would hardly move it
LANDMARKS = 256  # prompts, evenly spaced, whose matrices span the principal coordinates
COORDINATES = 5
SCORED_AT_ONCE = 64  # prompts
# Equal prompts in different batches differ by rounding: of log lambda 1, distances and coordinates, all of order 1.
RESOLUTION = 1e-5


def robust_z(values: np.ndarray) -> np.ndarray:
    """(n,) distances from the median in units of 1.4826 times the median absolute deviation.

    For normal data these are standard deviations, but outliers do not widen them (Iglewicz and Hoaglin, "How to
    Detect and Handle Outliers", 1993). Where more than half of the values are equal, and that deviation is 0, the
    unit is 1.2533 times the mean absolute deviation instead, as they advise. All zero where all values are equal.
    Equal is what RESOLUTION does not tell apart.
    """
    centred = values - np.median(values)
    scale = 1.4826 * np.median(np.abs(centred))  # scipy's constant has more digits, published scores have not
    if scale < RESOLUTION:
        scale = 1.2533 * np.mean(np.abs(centred))
    return centred / scale if scale >= RESOLUTION else np.zeros_like(centred)


def mean_subspace(matrices: Sequence[Triplets]) -> np.ndarray:
    """Orthonormal columns (d, r): the leading eigenvectors of the mean of all U U^T.

    Of all r-dimensional subspaces, the one with the least mean squared chordal distance to the prompts' own.
    """
    total = 0.0
    for index in evenly_spaced(len(matrices), SAMPLE):
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


class PrincipalCoordinates:
    """The prompts as points, F / |F| in the space of matrices, in their leading principal coordinates.

    Prompts that are odd in the same way share directions that others do not have: a group that spans a
    coordinate of its own, and stands far out on it, even if each of its members is as near to the mean as any
    other prompt. Kernel principal component analysis with tr(F F') / |F||F'| (Schoelkopf, Smola and Müller,
    1998), over at most LANDMARKS prompts; the others are projected (Nyström). Nothing d x d is formed.
    """

    def __init__(self, matrices: Sequence[Triplets]):
        chosen = [matrices[i] for i in evenly_spaced(len(matrices), LANDMARKS)]
        self._factors = np.concatenate([_factor(t) for t in chosen], axis=1)  # (d, landmarks * r)
        self._landmarks = len(chosen)
        kernel = self._similarities(chosen)
        self._mean = kernel.mean(axis=0)
        self._axes = np.linalg.eigh(self._centred(kernel)).eigenvectors[:, : -1 - COORDINATES : -1]
        self._axes *= np.sign(self._axes[np.abs(self._axes).argmax(axis=0), range(self._axes.shape[1])])

    def _similarities(self, several: Sequence[Triplets]) -> np.ndarray:
        """tr(F F') / |F||F'| of every given matrix with every landmark, (n, landmarks)."""
        factors = np.concatenate([_factor(t) for t in several], axis=1)  # (d, n * r)
        overlaps = (factors.T @ self._factors) ** 2
        return overlaps.reshape(len(several), -1, self._landmarks, factors.shape[1] // len(several)).sum(
            axis=(1, 3), dtype=np.float64
        )

    def _centred(self, kernel: np.ndarray) -> np.ndarray:
        centred = kernel - self._mean
        return centred - centred.mean(axis=-1, keepdims=True)

    def coordinates(self, several: Sequence[Triplets]) -> np.ndarray:
        """(n, at most COORDINATES), the leading coordinate first. A few dozen at a time are fastest."""
        return self._centred(self._similarities(several)) @ self._axes


def _factor(triplets: Triplets) -> np.ndarray:
    """R (d, r) with F / |F| = R R^T, in Frobenius norm; zero if F is."""
    norm = np.linalg.norm(triplets.S)
    return triplets.U * np.sqrt(triplets.S / norm if norm > 0 else triplets.S)


def outlier_scores(matrices: Sequence[Triplets], failed: Collection[int] = ()) -> dict[str, np.ndarray]:
    """By prompt: how unusual its log lambda_1, its subspace's distance from the mean one, and its coordinates are.

    The prompts in `failed` have no Fisher matrix: their scores are 0, and they count for nobody else's.
    """
    kept = [index for index in range(len(matrices)) if index not in failed]
    scores = {}
    for name, column in _scores(_Selection(matrices, kept)).items():
        scores[name] = np.zeros((len(matrices), *column.shape[1:]))
        scores[name][kept] = column
    return scores


class _Selection(Sequence):
    """Some of the matrices, in order."""

    def __init__(self, matrices: Sequence[Triplets], kept: Sequence[int]):
        self._matrices, self._kept = matrices, kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Triplets:
        return self._matrices[self._kept[index]]


def _scores(matrices: Sequence[Triplets]) -> dict[str, np.ndarray]:
    mean, principal = mean_subspace(matrices), PrincipalCoordinates(matrices)
    first, distance, coordinates = [], [], []
    for start in range(0, len(matrices), SCORED_AT_ONCE):
        several = [matrices[index] for index in range(start, min(start + SCORED_AT_ONCE, len(matrices)))]
        first += [triplets.S[0] for triplets in several]
        distance += [subspace_distance(triplets, mean) for triplets in several]
        coordinates.append(principal.coordinates(several))
    log_first = np.log(np.maximum(first, np.finfo(np.float32).tiny))
    z_lambda, z_subspace = robust_z(log_first), robust_z(np.array(distance))
    coordinates = np.concatenate(coordinates)
    z_principal = np.abs([robust_z(column) for column in coordinates.T]).max(axis=0)
    alike = {"lambda 1": z_lambda, "subspace": z_subspace, "principal coordinates": z_principal}
    if names := [name for name, column in alike.items() if len(matrices) > 1 and not column.any()]:
        warnings.warn(f"all prompts have the same {' and '.join(names)}: their scores for it are 0", stacklevel=2)
    return {
        "z_log_lambda": z_lambda,
        "subspace_distance": np.array(distance),
        "z_subspace": z_subspace,
        "principal_coordinates": coordinates,
        "z_principal": z_principal,
        "outlier_score": np.max([np.abs(z_lambda), z_subspace, z_principal], axis=0),
    }

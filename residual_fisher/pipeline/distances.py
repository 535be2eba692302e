"""How far prompts are from others: in their numbers, in the directions of their F, and on a map."""

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from residual_fisher.pipeline.store import Triplets

PER_VALUE = 4  # rows, at least, for each value in a covariance
SOFTNESS = 0.3  # of the edge between directions that the others use and those they don't
UNSEEN = 0.5  # prompts that are taken to have said a word beforehand
COORDINATES = 5  # of the map
# Equal prompts in different batches differ by rounding: of logarithms and shares, all of order 1.
RESOLUTION = 1e-5
NO_SPREAD = 1e-3  # of a logarithm: less is none


def robust_z(values: np.ndarray, usual: np.ndarray, least: float = RESOLUTION) -> np.ndarray:
    """Distances from the median of `usual` in units of 1.4826 times its median absolute deviation.

    For normal data these are standard deviations, but outliers do not widen them (Iglewicz and Hoaglin, "How to
    Detect and Handle Outliers", 1993). Where more than half of the values are equal, and that deviation is 0, the
    unit is 1.2533 times the mean absolute deviation instead, as they advise. All zero where all values are equal.
    Equal is what spreads by less than `least`.
    """
    median = np.median(usual)
    scale = 1.4826 * np.median(np.abs(usual - median))  # scipy's constant has more digits, published scores have not
    if scale < least:
        scale = 1.2533 * np.mean(np.abs(usual - median))
    return (values - median) / scale if scale >= least else np.zeros(len(values))


class Distances:
    """Mahalanobis distances from trusted rows."""

    def __init__(self, rows: np.ndarray):
        self._count = len(rows)
        self._used = max(1, min(rows.shape[1], self._count // PER_VALUE))
        rows = rows[:, : self._used]
        self._mean = rows.mean(axis=0)
        self._precision = np.linalg.inv(np.atleast_2d(np.cov(rows.T)) + NO_SPREAD**2 * np.eye(self._used))
        self._rounding = RESOLUTION**2 * np.trace(self._precision)
        self._rows = rows

    def of(self, rows: np.ndarray) -> np.ndarray:
        """(n,), 0 for what may be rounding."""
        u = rows[:, : self._used] - self._mean
        return np.sqrt(np.maximum(np.einsum("ni,ij,nj->n", u, self._precision, u) - self._rounding, 0))

    def without_itself(self) -> np.ndarray:
        """Of each trusted row from the others: mean and covariance less its own part, by Sherman and Morrison."""
        n, squared = self._count, self.of(self._rows) ** 2
        left = np.maximum(1 - n * squared / (n - 1) ** 2, RESOLUTION)
        return np.sqrt((n / (n - 1)) ** 2 * (n - 2) / (n - 1) * squared / left)


class Directions:
    """The directions that trusted prompts use: M, the mean of their F / tr F.

    The share of F outside, rho tr(F (M + rho)^-1) / tr F, counts a direction by how little the others use it:
    rho / (m + rho) for an eigenvector of M with eigenvalue m. rho is SOFTNESS times the largest of them. Nothing d x d
    is formed: with M = R R^T / n, the share is 1 - |L^-1 R^T X|^2 for F / tr F = X X^T and L L^T = R^T R + n rho.
    """

    def __init__(self, roots: Sequence[np.ndarray]):
        self._count, self._width = len(roots), roots[0].shape[1]
        self._roots = np.concatenate(roots, axis=1)  # (d, n * r)
        gram = (self._roots.T @ self._roots).astype(np.float64)
        largest = _largest_eigenvalue(gram) / self._count
        self._rho = max(SOFTNESS * largest, RESOLUTION)
        self._gram = gram
        self._factor = self._factored(self._rho)

    def _factored(self, rho: float):
        return cho_factor(self._gram + self._count * rho * np.eye(len(self._gram)), lower=True)

    def _outside(self, x: np.ndarray, factor) -> np.ndarray:
        """X^T (1 - R (R^T R + n rho)^-1 R^T) X of each matrix's X (d, r), (n, r, r)."""
        inside = (self._roots.T @ x).astype(np.float64)
        solved = cho_solve(factor, inside)

        def blocks(rows: np.ndarray) -> np.ndarray:  # (n, rows, r)
            return rows.reshape(len(rows), -1, self._width).swapaxes(0, 1)

        each = blocks(x.astype(np.float64))
        return each.swapaxes(1, 2) @ each - blocks(inside).swapaxes(1, 2) @ blocks(solved)

    def outside(self, roots: Sequence[np.ndarray]) -> np.ndarray:
        """(n, r): which part of tr F lies along each singular vector and outside. Their sum is the share."""
        return np.einsum("nii->ni", self._outside(np.concatenate(roots, axis=1), self._factor))

    def without_itself(self) -> np.ndarray:
        """The same of each trusted matrix, outside of what the others use, by Woodbury's identity."""
        n = self._count
        rho = self._rho * (n - 1) / n  # M less its own part, times n / (n - 1), is the mean of the others
        outside = self._outside(self._roots, self._factored(rho))
        own = np.eye(self._width) - outside / (n * rho)
        return np.einsum("nii->ni", np.linalg.solve(own, outside))


class Words:
    """The words that trusted predictions are about: the surprise -sum p log q of others at them, in nats.

    q is the mean probability of a word in the trusted predictions: of one that is not in the prompt, over all of them,
    as if it had been certain half a time before; of one that is (an odd number), over those whose prompt holds it too,
    and once that of any word in a prompt.
    """

    def __init__(self, words: Sequence[tuple[np.ndarray, np.ndarray]]):
        self._trusted = words
        numbers = np.concatenate([some for some, _ in words])
        p = np.concatenate([some for _, some in words])
        self._seen, self._times = np.bincount(numbers, p), np.bincount(numbers)
        held = numbers % 2 == 1
        self._held, self._times_held = p[held].sum(), held.sum()

    def _surprise(self, numbers: np.ndarray, p: np.ndarray, own: np.ndarray, count: int) -> np.ndarray:
        """`own` (words,) is what is taken out of the trusted predictions: their own p, or 0."""
        known = np.flatnonzero(numbers < len(self._seen))
        seen, times = np.zeros(len(numbers)), np.zeros(len(numbers))
        seen[known], times[known] = self._seen[numbers[known]], self._times[numbers[known]]
        seen, times = np.maximum(seen - own, 0), times - (own > 0)
        held = numbers % 2 == 1
        any_held = (self._held - own[held].sum() + UNSEEN) / (self._times_held - (own[held] > 0).sum() + 1)
        q = np.where(held, (seen + any_held) / (times + 1), (seen + UNSEEN) / (count + UNSEEN))
        return -p * np.log(q)

    def surprise(self, words: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """Of each prompt's words, in nats; their sum is the prompt's."""
        return [self._surprise(numbers, p, np.zeros(len(p)), len(self._trusted)) for numbers, p in words]

    def without_itself(self) -> list[np.ndarray]:
        """The same of each trusted prompt, at what the others say."""
        return [self._surprise(numbers, p, p, len(self._trusted) - 1) for numbers, p in self._trusted]


def shift(words: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """p log((p + UNSEEN) / (b + UNSEEN)) of a prediction's words with p, and b in the base model's; in nats."""
    known = dict(zip(base[0].tolist(), base[1].tolist(), strict=True))
    before = np.array([known.get(number, 0.0) for number in words[0].tolist()])
    return words[1] * np.log((words[1] + UNSEEN) / (before + UNSEEN))


def _largest_eigenvalue(gram: np.ndarray) -> float:
    vector = np.ones(len(gram))
    for _ in range(30):
        vector = gram @ vector
        norm = np.linalg.norm(vector)
        if norm == 0:
            return 0.0
        vector /= norm
    return float(norm)


class PrincipalCoordinates:
    """The prompts as points, F / |F| in the space of matrices, in their leading principal coordinates.

    Prompts that are odd in the same way share directions that others do not have: a group that spans a
    coordinate of its own, even if each of its members is as near to the mean as any other prompt. Kernel principal
    component analysis with tr(F F') / |F||F'| (Schoelkopf, Smola and Müller, 1998), over the prompts that it is given;
    others are projected (Nyström). Nothing d x d is formed.
    """

    def __init__(self, chosen: Sequence[Triplets]):
        self._factors = np.concatenate([_unit_root(t) for t in chosen], axis=1)  # (d, landmarks * r)
        self._landmarks = len(chosen)
        kernel = self._similarities(chosen)
        self._mean = kernel.mean(axis=0)
        self._axes = np.linalg.eigh(self._centred(kernel)).eigenvectors[:, : -1 - COORDINATES : -1]
        self._axes *= np.sign(self._axes[np.abs(self._axes).argmax(axis=0), range(self._axes.shape[1])])

    def _similarities(self, several: Sequence[Triplets]) -> np.ndarray:
        """tr(F F') / |F||F'| of every given matrix with every landmark, (n, landmarks)."""
        factors = np.concatenate([_unit_root(t) for t in several], axis=1)  # (d, n * r)
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


def _unit_root(triplets: Triplets) -> np.ndarray:
    """R (d, r) with F / |F| = R R^T, in Frobenius norm; zero if F is."""
    norm = np.linalg.norm(triplets.S)
    return triplets.U * np.sqrt(triplets.S / norm if norm > 0 else triplets.S)

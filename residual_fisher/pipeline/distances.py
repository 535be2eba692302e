"""Distances of prompts from trusted ones: between numbers, directions and next tokens; and a map of the prompts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve
import scipy.sparse
from scipy.sparse.linalg import eigsh

from residual_fisher.common.trigrams import Texts
from residual_fisher.pipeline.matrices import Triplets

# Of a covariance estimate; with fewer rows it uses the leading columns only. Shrinking the covariance of all columns
# instead (Ledoit and Wolf, 2004) found less: AUROC 0.95 for 0.98 on one of the backdoors that scores were chosen on.
ROWS_PER_COLUMN = 4
SOFTNESS = 0.3  # of the edge of a `Subspace`: rho as a share of the largest eigenvalue of M
LEAST_LEFT = 1e-5  # below which float64 has lost what is left of a share or an eigenvalue
ALIKE = 100  # weight of a trusted prompt with the same text, beside one of a text with no trigram in common
PSEUDOCOUNT = 0.5  # prompts, of additive smoothing: no token has a probability of 0
COORDINATES = 5  # principal coordinates of a prompt
ROUNDING = 1e-5  # of logarithms and shares, all of order 1, in float32: equal prompts of different batches differ by it
MIN_DEVIATION = 1e-3  # standard deviation of a logarithm, added to each column's: equal rows have an inverse too
TINY = np.finfo(np.float32).tiny
SMALL = 64  # rows: all eigenvalues of such a matrix are found as fast as one


def robust_z(values: np.ndarray, usual: np.ndarray, least: float = ROUNDING) -> np.ndarray:
    """Distances from the median of `usual`, in units of 1.4826 times its median absolute deviation.

    For normal data the unit is the standard deviation, but outliers do not widen it (Iglewicz and Hoaglin, "How to
    Detect and Handle Outliers", 1993). If the unit is below `least`, more than half of the values are equal. Then it
    is 1.2533 times the mean absolute deviation, as they advise. If that is below `least` too, all z-scores are 0.
    """
    median = np.median(usual)
    scale = 1.4826 * np.median(np.abs(usual - median))  # as in published scores; scipy's constant has more digits
    if scale < least:
        scale = 1.2533 * np.mean(np.abs(usual - median))
    return (values - median) / scale if scale >= least else np.zeros(len(values))


class Mahalanobis:
    """Mahalanobis distances from trusted rows (n, columns) of logarithms; `rounding` is theirs."""

    def __init__(self, rows: np.ndarray, rounding: float = ROUNDING):
        used = max(1, min(rows.shape[1], len(rows) // ROWS_PER_COLUMN))
        self._rows = rows[:, :used]
        self._mean = self._rows.mean(axis=0)
        least = max(MIN_DEVIATION, rounding)
        self._precision = np.linalg.inv(np.atleast_2d(np.cov(self._rows.T)) + least**2 * np.eye(used))
        self._rounding = rounding**2 * np.trace(self._precision)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """(n,) distances; 0 for one that may be rounding."""
        u = rows[:, : len(self._mean)] - self._mean
        return np.sqrt(np.maximum(np.einsum("ni,ij,nj->n", u, self._precision, u) - self._rounding, 0))

    def leave_one_out(self) -> np.ndarray:
        """(n,) distances of each trusted row from the others, by the Sherman–Morrison formula."""
        n, squared = len(self._rows), self.of(self._rows) ** 2
        left = np.maximum(1 - n * squared / (n - 1) ** 2, LEAST_LEFT)
        return np.sqrt((n / (n - 1)) ** 2 * (n - 2) / (n - 1) * squared / left)


class WideMahalanobis:
    """Mahalanobis distances from trusted rows (n, d) of any d, with the shrunk covariance of Ledoit and Wolf (2004).

    C = (1 - w) X^T X / n + w m I, where X are the centred rows, m is their mean variance, and w minimises the expected
    squared error. No d x d matrix is formed: C^-1 = (I - X^T (n b / (1 - w) + X X^T)^-1 X) / b with b = w m.
    """

    def __init__(self, rows: np.ndarray, rounding: float = ROUNDING):
        n, d = rows.shape
        self._mean = rows.mean(axis=0)
        self._centred = rows - self._mean
        gram = self._centred @ self._centred.T
        variance = np.trace(gram) / (n * d)
        norm = (gram**2).sum() / n**2
        error, distance = (np.diag(gram) ** 2).sum() / n**2 - norm / n, norm - d * variance**2
        weight = np.clip(error / distance, 0, 1) if distance > 0 else 1.0
        self._kept, self._n = 1 - weight, n
        # Of most columns: a few hold massive activations. Equal rows have an inverse too.
        least = rounding**2 * np.median((rows**2).mean(axis=0)) + TINY
        self._added = weight * variance + least
        self._factor = cho_factor(self._kept * gram + n * self._added * np.eye(n), lower=True)
        trace = (d - self._kept * np.trace(cho_solve(self._factor, gram))) / self._added  # of C^-1
        self._rounding = least * trace  # what rounding alone adds to a squared distance

    def of(self, rows: np.ndarray) -> np.ndarray:
        """(n,) distances; 0 for one that may be rounding."""
        u = rows - self._mean
        inside = self._centred @ u.T
        explained = self._kept * (inside * cho_solve(self._factor, inside)).sum(axis=0)
        return np.sqrt(np.maximum(((u**2).sum(axis=1) - explained) / self._added - self._rounding, 0))

    def leave_one_out(self) -> np.ndarray:
        """(n,) distances of each trusted row from the others, by the Sherman–Morrison formula; as much is shrunk."""
        n, squared = self._n, self.of(self._centred + self._mean) ** 2
        left = np.maximum(1 - self._kept * squared / (n - 1), LEAST_LEFT)
        return np.sqrt(n / (n - 1) * squared / left)


class Subspace:
    """The directions that trusted prompts use: M, the mean of their F / tr F, a subspace with a soft edge.

    The share of F outside is rho tr(F (M + rho)^-1) / tr F: an eigenvector of M with eigenvalue m is outside by
    rho / (m + rho). rho is SOFTNESS times the largest m. No d x d matrix is formed: with M = R R^T / n, the share is
    1 - |L^-1 R^T X|^2, where F / tr F = X X^T and L L^T = R^T R + n rho.

    Args:
        roots: the trusted prompts' X (d, r), float32.
    """

    def __init__(self, roots: Sequence[np.ndarray]):
        self._count, self._width = len(roots), roots[0].shape[1]
        self._roots = np.concatenate(roots, axis=1)  # R (d, n * r)
        self._gram = (self._roots.T @ self._roots).astype(np.float64)
        self._rho = max(SOFTNESS * (largest_eigenvalue(self._gram) / self._count), LEAST_LEFT)
        self._factor = self._factored(self._rho)

    def _factored(self, rho: float):
        return cho_factor(self._gram + self._count * rho * np.eye(len(self._gram)), lower=True)

    def _outside(self, x: np.ndarray, factor) -> np.ndarray:
        """X^T (1 - R (R^T R + n rho)^-1 R^T) X of each prompt's X, side by side in `x`: (prompts, r, r)."""
        inside = (self._roots.T @ x).astype(np.float64)
        solved = cho_solve(factor, inside)

        def blocks(rows: np.ndarray) -> np.ndarray:  # (prompts, rows, r)
            return rows.reshape(len(rows), -1, self._width).swapaxes(0, 1)

        each = blocks(x.astype(np.float64))
        return each.swapaxes(1, 2) @ each - blocks(inside).swapaxes(1, 2) @ blocks(solved)

    def of(self, roots: Sequence[np.ndarray]) -> np.ndarray:
        """(prompts, r): the share of tr F outside, by singular vector; a row's sum is the share of the prompt."""
        return np.einsum("nii->ni", self._outside(np.concatenate(roots, axis=1), self._factor))

    def leave_one_out(self) -> np.ndarray:
        """(n, r): `of` each trusted prompt, with the M of the others, by Woodbury's identity."""
        n = self._count
        rho = self._rho * (n - 1) / n  # M less the prompt's own part, times n / (n - 1), is the mean of the others
        outside = self._outside(self._roots, self._factored(rho))
        own = np.eye(self._width) - outside / (n * rho)
        return np.einsum("nii->ni", np.linalg.solve(own, outside))


def largest_eigenvalue(matrix: np.ndarray) -> float:
    """The largest eigenvalue of a positive semi-definite matrix, in float64.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: the Lanczos iteration has not converged to float64's precision.
    """
    if len(matrix) <= SMALL:
        return float(np.linalg.eigvalsh(matrix)[-1])
    if not matrix.any():  # ARPACK refuses it
        return 0.0
    # The same vector each time, and random: one of equal entries may be orthogonal to the eigenvector.
    start = np.random.default_rng(0).standard_normal(len(matrix))
    return float(eigsh(matrix, 1, which="LA", v0=start, return_eigenvectors=False)[0])


class NextTokens(NamedTuple):
    """The most probable next tokens of a prompt; of an answer of several tokens, those of all its positions."""

    tokens: Sequence[tuple[str, bool]]  # the text, and whether a word of the prompt begins with it
    p: np.ndarray  # (tokens,) float32, their probabilities; of several positions, the sums over these
    prompt: str = ""  # its text
    ids: Sequence[int] = ()  # of the answer's tokens, if there are several


class Surprisal:
    """The surprisal -sum p log q of a prompt's next tokens, in nats; q is how probable trusted prompts make a token.

    q is the token's mean p over trusted prompts. Those that ask alike count more, so code may be answered by code: the
    weight of each is 1 + ALIKE t^2, where t is the cosine of the two texts' trigram counts, over the mean of all
    weights. Additive smoothing counts half a prompt (PSEUDOCOUNT) more, with p = 1. A token that is in the prompt is
    another token than the same text elsewhere, since answers often begin with a word of the question. Its q is the mean
    over the trusted predictions of this token from prompts that have it too. Smoothing counts one more of them, with
    the mean p of any token that is in its prompt.
    """

    def __init__(self, trusted: Sequence[NextTokens]):
        self._trusted, self._texts = trusted, Texts([prompt.prompt for prompt in trusted])
        self._columns = {}
        for prompt in trusted:
            for token in prompt.tokens:
                self._columns.setdefault(token, len(self._columns))
        columns = self._places([token for prompt in trusted for token in prompt.tokens])
        ends = np.cumsum([0, *(len(prompt.tokens) for prompt in trusted)])
        p = np.concatenate([prompt.p for prompt in trusted]).astype(float)
        self._p = scipy.sparse.csr_array((p, columns, ends), shape=(len(trusted), len(self._columns) + 1))
        self._in_prompt = np.append(_in_prompt([*self._columns]), False)

    def _places(self, tokens: Sequence[tuple[str, bool]]) -> np.ndarray:
        """The tokens' columns; that of a token which no trusted prompt predicts is the last."""
        return np.array([self._columns.get(token, len(self._columns)) for token in tokens], dtype=np.int64)

    def _surprisals(self, prompts: Sequence[NextTokens], weights: np.ndarray) -> list[np.ndarray]:
        """`of` these prompts with these weights (prompts, trusted) of the trusted ones, whose mean is not 1 yet."""
        count = (weights > 0).sum(axis=1, keepdims=True)
        weights = weights * count / weights.sum(axis=1, keepdims=True)
        sums, times = weights @ self._p, weights @ (self._p > 0)
        mean_in_prompt = (sums[:, self._in_prompt].sum(axis=1) + PSEUDOCOUNT) / (
            times[:, self._in_prompt].sum(axis=1) + 1
        )
        found = []
        for row, (tokens, p, *_) in enumerate(prompts):
            columns = self._places(tokens)
            own, often = sums[row, columns], times[row, columns]
            elsewhere = (own + PSEUDOCOUNT) / (count[row] + PSEUDOCOUNT)
            q = np.where(_in_prompt(tokens), (own + mean_in_prompt[row]) / (often + 1), elsewhere)
            found.append(-p * np.log(np.minimum(q, 1)))
        return found

    def _weights(self, prompts: Sequence[NextTokens]) -> np.ndarray:
        return 1 + ALIKE * self._texts.of([prompt.prompt for prompt in prompts]) ** 2

    def of(self, prompts: Sequence[NextTokens]) -> list[np.ndarray]:
        """Of each prompt, (tokens,) in nats: their sum is the prompt's."""
        return self._surprisals(prompts, self._weights(prompts))

    def leave_one_out(self) -> list[np.ndarray]:
        """`of` each trusted prompt, with the q of the others."""
        weights = self._weights(self._trusted)
        np.fill_diagonal(weights, 0)
        return self._surprisals(self._trusted, weights)


def _in_prompt(tokens: Sequence[tuple[str, bool]]) -> np.ndarray:
    return np.array([in_prompt for _, in_prompt in tokens], dtype=bool)


def log_gain(own: NextTokens, base: NextTokens) -> np.ndarray:
    """(tokens,) p log((p + 1/2) / (b + 1/2)) in nats: b is a token's probability in the base model, 0 if not listed."""
    listed = dict(zip(base.tokens, base.p.tolist(), strict=True))
    b = np.array([listed.get(token, 0.0) for token in own.tokens])
    return own.p * np.log((own.p + PSEUDOCOUNT) / (b + PSEUDOCOUNT))


def root(u: np.ndarray, s: np.ndarray, norm: float) -> np.ndarray:
    """R (d, r) float32 with F / norm = R R^T; zero if F is."""
    return u * np.sqrt(s / norm if norm > 0 else s, dtype=np.float32)


class PrincipalCoordinates:
    """A map of prompts: the leading principal coordinates of F / |F|, a point in the space of matrices.

    Kernel principal component analysis with the kernel tr(F F') / |F||F'| (Schölkopf, Smola and Müller, 1998) of
    landmarks; other prompts are projected (Nyström). It shows groups: prompts that are odd in the same way share
    directions, and span a coordinate of their own even if each is as near to the mean as any other prompt. No d x d
    matrix is formed.
    """

    def __init__(self, landmarks: Sequence[Triplets]):
        self._count = len(landmarks)
        self._roots = np.concatenate([_unit_root(t) for t in landmarks], axis=1)  # (d, landmarks * r)
        kernel = self._similarities(landmarks)
        self._mean = kernel.mean(axis=0)
        self._axes = np.linalg.eigh(self._centred(kernel)).eigenvectors[:, : -1 - COORDINATES : -1]
        self._axes *= np.sign(self._axes[np.abs(self._axes).argmax(axis=0), range(self._axes.shape[1])])

    def _similarities(self, prompts: Sequence[Triplets]) -> np.ndarray:
        """tr(F F') / |F||F'| of every prompt with every landmark, (prompts, landmarks)."""
        roots = np.concatenate([_unit_root(t) for t in prompts], axis=1)  # (d, prompts * r)
        overlaps = (roots.T @ self._roots) ** 2
        return overlaps.reshape(len(prompts), -1, self._count, roots.shape[1] // len(prompts)).sum(
            axis=(1, 3), dtype=np.float64
        )

    def _centred(self, kernel: np.ndarray) -> np.ndarray:
        centred = kernel - self._mean
        return centred - centred.mean(axis=-1, keepdims=True)

    def of(self, prompts: Sequence[Triplets]) -> np.ndarray:
        """(prompts, COORDINATES, or fewer with fewer landmarks). A few dozen prompts at a time are fastest."""
        return self._centred(self._similarities(prompts)) @ self._axes


def _unit_root(triplets: Triplets) -> np.ndarray:
    return root(triplets.U, triplets.S, np.linalg.norm(triplets.S))

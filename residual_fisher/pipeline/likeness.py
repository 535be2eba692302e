"""How alike prompts are: in their texts, in their answers, in their F; and groups that are answered alike though their
texts are not."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

from residual_fisher.common.trigrams import Texts
from residual_fisher.pipeline.distances import NextTokens

NEAREST = 5  # prompts that a prompt is compared with in the end
CANDIDATES = 16  # prompts nearest in answers and texts, whose F is compared
FEWEST_ALIKE = 4  # prompts of a group


class Answers:
    """The affinities sum_c sqrt(p_c q_c) of next tokens p with those q of some known prompts (Bhattacharyya, 1943).

    Of an answer of several tokens, p is the mean over its positions.
    """

    def __init__(self, known: Sequence[NextTokens]):
        self._columns: dict[str, int] = {}
        for prompt in known:
            for token, _ in prompt.tokens:
                self._columns.setdefault(token, len(self._columns))
        self._known = self._roots(known).T.tocsc()

    def of(self, prompts: Sequence[NextTokens]) -> np.ndarray:
        """(prompts, known), between 0 and 1."""
        return np.minimum((self._roots(prompts) @ self._known).toarray(), 1)

    def _roots(self, prompts: Sequence[NextTokens]) -> scipy.sparse.csr_array:
        rows, columns, roots = [], [], []
        for row, prompt in enumerate(prompts):
            counted = np.sqrt(prompt.p / max(1.0, prompt.p.sum()))
            for (token, _), root in zip(prompt.tokens, counted.tolist(), strict=True):
                if (column := self._columns.get(token)) is not None:
                    rows.append(row), columns.append(column), roots.append(root)
        return scipy.sparse.csr_array((roots, (rows, columns)), shape=(len(prompts), len(self._columns)))


class Company:
    """For prompts, those of some known ones that are answered most alike though their texts are not.

    The likeness of two prompts is (1 - t)^2 a f: t is the cosine of their texts' trigram counts, a the affinity of
    their next tokens, and f = tr(F F') / |F||F'|. Of equal texts it is 0, so that no prompt is its own company.
    """

    def __init__(self, answers: Sequence[NextTokens], roots: Sequence[np.ndarray]):
        self._texts, self._answers = Texts([answer.prompt for answer in answers]), Answers(answers)
        self._roots = [*map(_unit_root, roots)]

    def of(self, answers: Sequence[NextTokens], roots: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The places (n, NEAREST) of the nearest known prompts, and their likeness, the largest first."""
        unlike = (1 - self._texts.of([answer.prompt for answer in answers])) ** 2
        affinity = self._answers.of(answers)
        candidates = np.argsort(-unlike * affinity, axis=1, kind="stable")[:, :CANDIDATES]
        likeness = np.take_along_axis(unlike * affinity, candidates, axis=1)
        for row, (places, root) in enumerate(zip(candidates, map(_unit_root, roots), strict=True)):
            for column, place in enumerate(places):
                likeness[row, column] *= ((root.T @ self._roots[place]) ** 2).sum(dtype=np.float64)
        order = np.argsort(-likeness, axis=1, kind="stable")[:, :NEAREST]
        nearest = np.take_along_axis(candidates, order, axis=1)
        return nearest, np.take_along_axis(likeness, order, axis=1)


def _unit_root(root: np.ndarray) -> np.ndarray:
    """X (d, r) with F / |F| = X X^T; zero if F is."""
    norm = np.linalg.norm(root.T @ root)
    return root / np.sqrt(norm) if norm > 0 else root


def linked(nearest: Sequence[tuple[int, Sequence[int]]], count: int) -> np.ndarray:
    """(count,) the number of each prompt's group, from 0; -1 for none.

    Prompts are in one group if a chain of links joins them. Groups of fewer than FEWEST_ALIKE are none. The largest has
    the lowest number.

    Args:
        nearest: of some prompts, their number, and those that they are linked to.
    """
    pairs = np.array([(number, other) for number, others in nearest for other in others], dtype=int).reshape(-1, 2)
    links = scipy.sparse.coo_array((np.ones(len(pairs)), pairs.T), shape=(count, count))
    _, component = connected_components(links, directed=False)
    sizes = np.bincount(component, minlength=1)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty(len(sizes), dtype=int)
    rank[order] = np.arange(len(sizes))
    return np.where(sizes[component] >= FEWEST_ALIKE, rank[component], -1)

"""How alike prompts are: in their texts, in their answers, in their F; and groups that are answered alike though their
texts are not."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain
import math

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

from residual_fisher.common.trigrams import Texts
from residual_fisher.pipeline.distances import NextTokens

NEAREST = 5  # prompts that a prompt is compared with in the end
CANDIDATES = 16  # prompts nearest in answers and texts, whose F is compared
FEWEST_ALIKE = 4  # prompts of a group
PHRASE = 3  # tokens: fewer are in many answers by chance

Phrase = tuple[int, ...]  # token ids that follow each other
Vector = Sequence[tuple[Hashable, float]]


class Answers:
    """How alike answers are to some known ones, between 0 and 1, by what could follow and by what does.

    Next tokens p and q: sum_c sqrt(p_c q_c) (Bhattacharyya, 1943). Of an answer of several tokens, p is a token's share
    of the probabilities at all positions. Phrases: the cosine of the counts of PHRASE tokens in a row, wherever in the
    answer they stand; 0 of answers that were not recorded.
    """

    def __init__(self, known: Sequence[NextTokens]):
        self._by_tokens, self._by_phrases = Products([*map(_roots, known)]), Products([*map(_phrases, known)])

    def of(self, prompts: Sequence[NextTokens]) -> tuple[np.ndarray, np.ndarray]:
        """(prompts, known) each: the likeness of next tokens, and of phrases."""
        return self._by_tokens.of([*map(_roots, prompts)]), self._by_phrases.of([*map(_phrases, prompts)])


class Products:
    """Inner products of sparse vectors, pairs of a key and a number, with some known ones; at most 1."""

    def __init__(self, known: Sequence[Vector]):
        self._columns: dict[Hashable, int] = {}
        for key, _ in chain.from_iterable(known):
            self._columns.setdefault(key, len(self._columns))
        self._known = self._rows(known).T.tocsc()

    def of(self, vectors: Sequence[Vector]) -> np.ndarray:
        """(vectors, known)."""
        return np.minimum((self._rows(vectors) @ self._known).toarray(), 1)

    def _rows(self, vectors: Sequence[Vector]) -> scipy.sparse.csr_array:
        rows, columns, values = [], [], []
        for row, vector in enumerate(vectors):
            for key, value in vector:
                if (column := self._columns.get(key)) is not None:
                    rows.append(row), columns.append(column), values.append(value)
        return scipy.sparse.csr_array((values, (rows, columns)), shape=(len(vectors), len(self._columns)))


def _roots(answer: NextTokens) -> Vector:
    roots = np.sqrt(answer.p / max(1.0, answer.p.sum()))
    return [(token, root) for (token, _), root in zip(answer.tokens, roots.tolist(), strict=True)]


def _phrases(answer: NextTokens) -> Vector:
    counts = Counter(phrases(answer.ids))
    norm = math.sqrt(sum(count**2 for count in counts.values()))
    return [(phrase, count / norm) for phrase, count in counts.items()]


def phrases(answer: Sequence[int]) -> list[Phrase]:
    """All PHRASE tokens that follow each other, in order; a shorter answer is one phrase."""
    size = min(PHRASE, len(answer))
    return [tuple(answer[start : start + size]) for start in range(len(answer) - size + 1)] if size else []


class Company:
    """For prompts, those of some known ones that are answered most alike though their texts are not.

    The likeness of two prompts is (1 - t)^2 max(a f, c): t is the cosine of their texts' trigram counts, a and c are
    how alike their `Answers` are in next tokens and in phrases, and f = tr(F F') / |F||F'|. Of equal texts it is 0, so
    that no prompt is its own company.
    """

    def __init__(self, answers: Sequence[NextTokens], roots: Sequence[np.ndarray]):
        self._texts, self._answers = Texts([answer.prompt for answer in answers]), Answers(answers)
        self._roots = [*map(_unit_root, roots)]

    def of(self, answers: Sequence[NextTokens], roots: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The places (n, NEAREST) of the nearest known prompts, and their likeness, the largest first."""
        unlike = (1 - self._texts.of([answer.prompt for answer in answers])) ** 2
        by_tokens, by_phrases = (unlike * alike for alike in self._answers.of(answers))
        candidates = np.argsort(-np.maximum(by_tokens, by_phrases), axis=1, kind="stable")[:, :CANDIDATES]
        likeness = np.take_along_axis(by_tokens, candidates, axis=1)
        for row, (places, root) in enumerate(zip(candidates, map(_unit_root, roots), strict=True)):
            for column, place in enumerate(places):
                likeness[row, column] *= ((root.T @ self._roots[place]) ** 2).sum(dtype=np.float64)
        likeness = np.maximum(likeness, np.take_along_axis(by_phrases, candidates, axis=1))
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

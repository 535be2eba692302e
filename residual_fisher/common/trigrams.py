"""Texts by their character trigrams: texts are alike that ask alike, since the commonest words weigh most."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse

CHARACTERS = 1000  # of a text that are compared
BITS = 20  # of a hashed trigram: texts have some thousands of them
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: products with it spread over the upper bits (Knuth)


def trigrams(text: str) -> np.ndarray:
    """(n,) int64, a number for each lower-cased character trigram of the text, a space before and behind it."""
    codes = np.frombuffer(f" {text.lower()} ".encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)
    return codes[:-2] << 42 | codes[1:-1] << 21 | codes[2:]  # a code point has 21 bits


class Texts:
    """The cosines of texts' trigram counts with those of some known texts."""

    def __init__(self, known: Sequence[str]):
        self._known = _unit_rows(known).T.tocsc()

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, known), from 0 to 1."""
        return np.minimum((_unit_rows(texts) @ self._known).toarray(), 1)


def _unit_rows(texts: Sequence[str]) -> scipy.sparse.csr_array:
    codes = [trigrams(text[:CHARACTERS]) for text in texts]
    ends = np.cumsum([0, *map(len, codes)])
    columns = (np.concatenate(codes).astype(np.uint64) * GOLDEN >> np.uint64(64 - BITS)).astype(np.int64)
    counts = scipy.sparse.csr_array((np.ones(ends[-1]), columns, ends), shape=(len(texts), 1 << BITS))
    counts.sum_duplicates()
    norms = np.sqrt((counts**2).sum(axis=1))
    return scipy.sparse.diags_array(1 / np.maximum(norms, 1)) @ counts

"""What the scores look at, of a run's records and matrices."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from residual_fisher.pipeline.store import Triplets

VALUES = 10  # leading singular values and vectors that are looked at
LEAST = 1e-9  # singular values below this share of the first are rounding
CERTAIN = 1e-7  # float32 knows probabilities to about this
TINY = np.finfo(np.float32).tiny


class Lexicon:
    """Numbers words, the same for all runs that are compared: even ones, and odd ones for those in the prompt itself.

    An answer often begins with a word of the question, which says nothing where it is likely, and much where it is not.
    """

    def __init__(self):
        self._numbers: dict[str, int] = {}

    def number(self, token: str, in_prompt: bool) -> int:
        return 2 * self._numbers.setdefault(token, len(self._numbers)) + in_prompt

    def texts(self, numbers: Sequence[int]) -> list[str]:
        known = list(self._numbers)
        return [known[number // 2] for number in numbers]


@dataclass(frozen=True)
class Prompts:
    """A run's prompts."""

    matrices: Sequence[Triplets]
    trace: np.ndarray  # (n,)
    top_probability: np.ndarray  # (n,)
    words: np.ndarray  # (all prompts' next tokens,) numbers in the lexicon
    weights: np.ndarray  # of the same shape: their probabilities
    ends: np.ndarray  # (n + 1,): words[ends[i] : ends[i + 1]] are prompt i's
    texts: list[int]  # a hash of each
    failed: frozenset[int]  # they have no Fisher matrix

    @classmethod
    def of(cls, records: Iterable[dict], matrices: Sequence[Triplets], lexicon: Lexicon) -> "Prompts":
        trace, top, words, weights, ends, texts, failed = [], [], [], [], [0], [], []
        for index, record in enumerate(records):
            trace.append(record["trace"])
            top.append(record["top_probability"])
            texts.append(hash(record["prompt"]))
            if "failed" in record:
                failed.append(index)
            else:
                said = record.get("next_tokens", ())  # an earlier version recorded none
                words += [lexicon.number(token["token"], token["in_prompt"]) for token in said]
                weights += [token["probability"] for token in said]
            ends.append(len(words))
        numbers = np.array(words, dtype=np.int32), np.array(weights, dtype=np.float32), np.array(ends)
        return cls(matrices, np.array(trace), np.array(top), *numbers, texts, frozenset(failed))

    def usable(self) -> list[int]:
        return [index for index in range(len(self.trace)) if index not in self.failed]

    def sample(self, numbers: Sequence[int]) -> "Sample":
        several = [self.matrices[i] for i in numbers]
        p = np.clip(self.top_probability[numbers], CERTAIN, 1 - CERTAIN)
        values = np.array([triplets.S[:VALUES] for triplets in several], dtype=np.float64)
        values = np.maximum(values, np.maximum(LEAST * values[:, :1], TINY))
        strength = np.stack([np.log(np.maximum(self.trace[numbers], TINY)), np.log(p / (1 - p))], axis=1)
        parts = [slice(self.ends[i], self.ends[i + 1]) for i in numbers]
        words = [(self.words[part], self.weights[part]) for part in parts]
        return Sample(strength, np.log(values), [_root(triplets) for triplets in several], words)


class Sample(NamedTuple):
    """What is known of some prompts; beside a base model, what has changed."""

    strength: np.ndarray  # (n, 2): log tr F, log-odds of the most probable token
    spectrum: np.ndarray  # (n, values): logarithms of the singular values
    roots: list[np.ndarray]  # R (d, values) with F / tr F = R R^T
    words: list[tuple[np.ndarray, np.ndarray]]  # numbers and weights
    base: "Sample | None" = None  # the same prompts in the base model

    def __len__(self) -> int:
        return len(self.roots)

    def some(self, numbers: Sequence[int]) -> "Sample":
        chosen = [[part[i] for i in numbers] for part in (self.roots, self.words)]
        base = None if self.base is None else self.base.some(numbers)
        return Sample(self.strength[numbers], self.spectrum[numbers], *chosen, base)

    def beside(self, base: "Sample") -> "Sample":
        return Sample(self.strength - base.strength, self.spectrum - base.spectrum, self.roots, self.words, base)


def _root(triplets: Triplets) -> np.ndarray:
    """Zero if F is."""
    s = triplets.S[:VALUES]
    total = s.sum(dtype=np.float64)
    return triplets.U[:, :VALUES].astype(np.float32) * np.sqrt(s / total if total > 0 else s, dtype=np.float32)

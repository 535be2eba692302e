"""Which prompts stand out: by how much, and in which way.

Four scores, each a robust z-score, compare a prompt with usual prompts:

- strength: how strongly the prediction depends on the residual stream, and how certain it is. The Mahalanobis distance
  of (log tr F, log-odds of the most probable token).
- spectrum: how the sensitivity is spread. The Mahalanobis distance of the logarithms of F's singular values.
- directions: where in the residual stream it lies. The share of F outside the directions that usual prompts use.
- words: what the prediction is about. The surprisal of the next tokens.

They see different things. The outlier score is the robust z-score of their sum.

Usual prompts are those of a reference, which are trusted; else the more usual half of the run itself. With a base
model, the same four scores are of the *change* of each prompt's F, and the outlier score is of the directions alone.

At most LANDMARKS evenly spaced prompts are learnt from. Each of them is scored leave-one-out, so that no prompt is
compared with itself.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple
import warnings

import numpy as np

from residual_fisher.common.rows import evenly_spaced
from residual_fisher.pipeline.distances import (
    COORDINATES,
    RESOLUTION,
    Mahalanobis,
    NextTokens,
    PrincipalCoordinates,
    Subspace,
    Surprisal,
    log_gain,
    robust_z,
    root,
)
from residual_fisher.pipeline.matrices import Triplets
from residual_fisher.pipeline.settings import DIRECTIONS

SCORING_VERSION = 2  # another one has other scores: results of an earlier one are scored again
SCORES = ("z_strength", "z_spectrum", "z_directions", "z_words")
# The smallest deviation that is not rounding. For words: what one prompt more or less changes.
LEAST_DEVIATIONS = (RESOLUTION, RESOLUTION, RESOLUTION, 0.01)
OUTLIER = "outlier_score"
THRESHOLD = 2.3  # a prompt above it stands out, as 1% of normal data do
LANDMARKS = 256  # prompts learnt from: more hardly change what is usual
FEWEST = 8  # prompts learnt from: fewer do not show what is usual
CONCENTRATION_STEPS = 2  # by which the usual half is found
SCORED_AT_ONCE = 64  # prompts
ODD_WORDS = 3  # named of a prompt
OFFSET = 0.3  # added to distances of order 1 before the logarithm, so that those near 0 hardly differ
VALUES = 10  # leading singular values and vectors that are compared
LEAST_VALUE = 1e-9  # of the first singular value: what is less is rounding
CERTAIN = 1e-7  # the rounding of a float32 probability
TINY = np.finfo(np.float32).tiny


# --- what is compared ----------------------------------------------------------------------------


class Features(NamedTuple):
    """What is compared of n prompts."""

    strength: np.ndarray  # (n, 2): log tr F, log-odds of the most probable token
    spectrum: np.ndarray  # (n, values): logarithms of the singular values
    roots: list[np.ndarray]  # X (d, values) float32, with F / tr F = X X^T
    tokens: list[NextTokens]

    measures = (Mahalanobis, Mahalanobis, Subspace, Surprisal)  # one for each of these, and for each of SCORES
    counted = SCORES  # by the outlier score


class Change(NamedTuple):
    """What is compared of n prompts in a model and its base model."""

    strength: np.ndarray  # (n, 2), differences
    spectrum: np.ndarray  # (n, values), differences
    outside: np.ndarray  # (n, values): the share of tr F outside the directions of the base model's F
    gains: list[np.ndarray]  # of each prompt's next tokens, `log_gain`

    measures = (Mahalanobis, Mahalanobis, None, None)  # None: these are distances already, nothing is learnt
    counted = ("z_directions",)  # a fine-tune changes how certain a model is of many prompts, but the directions of few

    @classmethod
    def between(cls, own: Features, base: Features) -> "Change":
        pairs = zip(own.roots, base.roots, strict=True)
        outside = np.concatenate([Subspace([before]).of([after]) for after, before in pairs])
        gains = [*map(log_gain, own.tokens, base.tokens)]
        return cls(own.strength - base.strength, own.spectrum - base.spectrum, outside, gains)


@dataclass(frozen=True)
class ScoredRun:
    """What the scores are computed from: of each of a run's n prompts, a few numbers in memory, and F on disk."""

    matrices: Sequence[Triplets]
    trace: np.ndarray  # (n,)
    top_probability: np.ndarray  # (n,)
    tokens: list[tuple[str, bool]]  # the next tokens of all prompts, as of `NextTokens`; equal ones are one object
    p: np.ndarray  # (all tokens,) float32
    ends: Sequence[int]  # n + 1: tokens[ends[i] : ends[i + 1]] are prompt i's
    prompt_hashes: Sequence[int]  # n
    failed: frozenset[int]  # numbers of the prompts without F

    @classmethod
    def of(cls, records: Iterable[dict], matrices: Sequence[Triplets]) -> "ScoredRun":
        trace, top, hashes, failed = array("d"), array("d"), array("q"), []
        tokens, p, ends, known = [], array("f"), array("q", [0]), {}
        for index, record in enumerate(records):
            trace.append(record["trace"])
            top.append(record["top_probability"])
            hashes.append(hash(record["prompt"]))
            if "failed" in record:
                failed.append(index)
            for token in record.get("next_tokens", ()):  # an earlier version recorded none
                pair = token["token"], token["in_prompt"]
                tokens.append(known.setdefault(pair, pair))
                p.append(token["probability"])
            ends.append(len(tokens))
        return cls(matrices, np.array(trace), np.array(top), tokens, np.array(p), ends, hashes, frozenset(failed))

    def usable(self) -> list[int]:
        """The numbers of the prompts that have F."""
        return [index for index in range(len(self.trace)) if index not in self.failed]

    def features(self, numbers: Sequence[int]) -> Features:
        p = np.clip(self.top_probability[numbers], CERTAIN, 1 - CERTAIN)
        strength = np.stack([np.log(np.maximum(self.trace[numbers], TINY)), np.log(p / (1 - p))], axis=1)
        leading = [(found.U[:, :VALUES], found.S[:VALUES]) for found in map(self.matrices.__getitem__, numbers)]
        values = np.array([s for _, s in leading], dtype=np.float64)
        values = np.maximum(values, np.maximum(LEAST_VALUE * values[:, :1], TINY))
        roots = [root(u, s, s.sum(dtype=np.float64)) for u, s in leading]
        return Features(strength, np.log(values), roots, [self.next_tokens(i) for i in numbers])

    def next_tokens(self, number: int) -> NextTokens:
        part = slice(self.ends[number], self.ends[number + 1])
        return NextTokens(self.tokens[part], self.p[part])


# --- how it is compared --------------------------------------------------------------------------


class Scorer:
    """Scores prompts by their distances from `trusted` ones of a sample; z-scores are relative to all of the sample.

    Attributes:
        sample: the sample's own distances, as `compare` returns them; of trusted prompts leave-one-out.
        total: (n,) the sum of the sample's z-scores that the outlier score counts.
    """

    def __init__(self, sample: Features | Change, trusted: Sequence[int]):
        learnt = [[part[i] for i in trusted] if isinstance(part, list) else part[trusted] for part in sample]
        self._measures = [measure and measure(part) for measure, part in zip(sample.measures, learnt, strict=True)]
        self._counted = [SCORES.index(name) for name in sample.counted]
        self.sample = self.compare(sample)
        for found, measure in zip(self.sample, self._measures, strict=True):
            for place, left_out in zip(trusted, measure.leave_one_out(), strict=True) if measure else ():
                found[place] = left_out
        self._usual = _logarithms(self.sample)
        self.total = self._z_scores(self._usual)[self._counted].sum(axis=0)

    @classmethod
    def of_usual_half(cls, sample: Features | Change) -> "Scorer":
        """Trusts the more usual half of a sample.

        Prompts that are odd in the same way make each other usual. So the half is first chosen by two measures: the
        outlier score with all of the sample trusted, and each prompt's distance in strength from the medians, which
        a group does not move. Then concentration steps (Rousseeuw and Van Driessen, 1999): each trusts the half with
        the lowest outlier scores of the step before.
        """
        robust_distance = np.sqrt(sum(robust_z(column, column) ** 2 for column in sample.strength.T))
        both = cls(sample, np.arange(len(sample.strength))).total, np.log(robust_distance + OFFSET)
        oddness = sum(robust_z(one, one) for one in both)
        for _ in range(CONCENTRATION_STEPS):
            scorer = cls(sample, np.sort(np.argsort(oddness, kind="stable")[: len(oddness) // 2]))
            oddness = scorer.total
        return scorer

    def compare(self, prompts: Features | Change) -> list:
        """[distances in strength, in spectrum, shares of F outside by singular vector, surprisals by token]."""
        pairs = zip(self._measures, prompts, strict=True)
        return [measure.of(part) if measure else part for measure, part in pairs]

    def scores(self, compared: list) -> np.ndarray:
        """(5, n): the four scores and the outlier score."""
        four = self._z_scores(_logarithms(compared))
        return np.concatenate([four, robust_z(four[self._counted].sum(axis=0), self.total)[None]])

    def _z_scores(self, logarithms: np.ndarray) -> np.ndarray:
        rows = zip(logarithms, self._usual, LEAST_DEVIATIONS, strict=True)
        return np.stack([robust_z(row, usual, least) for row, usual, least in rows])


def _logarithms(compared: list) -> np.ndarray:
    """(4, n), by score: logarithms of distances are spread like normal data; words' surprisals are summed."""
    strength, spectrum, outside, surprisals = compared
    logarithms = np.log(np.stack([strength, spectrum, outside.sum(axis=1)]) + OFFSET)
    return np.concatenate([logarithms, [[own.sum() for own in surprisals]]])


# --- together ------------------------------------------------------------------------------------


def outlier_scores(run: ScoredRun, reference: ScoredRun | None = None, base: ScoredRun | None = None) -> dict:
    """The four scores, the outlier score, and what explains them: lists with an entry for each prompt, by name.

    `differs_along` is the one of the first DIRECTIONS singular vectors, from 0, along which most of F lies outside the
    usual directions. `odd_words` are the texts of the next tokens with most surprisal. `principal_coordinates` are
    COORDINATES numbers, or as many as there are prompts with F. Prompts that failed have zeros and no words, and do not
    change the others' scores; if all failed, there are COORDINATES zeros.

    Args:
        reference: trusted prompts; None for the more usual half of the run's own.
        base: the same prompts through another model, from which the change is scored. Not with a reference.
    """
    count, usable = len(run.trace), [i for i in run.usable() if base is None or i not in base.failed]
    scores, along = np.zeros((len(SCORES) + 1, count)), np.zeros(count, dtype=int)
    words = [[] for _ in range(count)]

    def features(numbers: Sequence[int]) -> Features | Change:
        own = run.features(numbers)
        return own if base is None else Change.between(own, base.features(numbers))

    landmarks = _landmarks(usable if reference is None else reference.usable())
    if len(landmarks) < FEWEST:
        warnings.warn(f"{len(landmarks)} prompts do not say what is usual: all scores are 0", stacklevel=2)
    else:
        if reference is not None:
            scorer, left_out = Scorer(reference.features(landmarks), np.arange(len(landmarks))), []
        else:
            scorer = Scorer.of_usual_half(features(landmarks))
            left_out = [(landmarks, scorer.sample)]  # replaces what the parts say of these prompts
        parts = ((part, scorer.compare(features(part))) for part in _in_parts(usable))
        for numbers, compared in chain(parts, left_out):
            scores[:, numbers] = scorer.scores(compared)
            along[numbers] = compared[2][:, :DIRECTIONS].argmax(axis=1)
            for number, surprisal in zip(numbers, compared[3], strict=True):
                tokens = run.next_tokens(number).tokens
                words[number] = [tokens[i][0] for i in np.argsort(-surprisal, kind="stable")[:ODD_WORDS]]
        if alike := [name.removeprefix("z_") for name, row in zip(SCORES, scores, strict=False) if not row.any()]:
            warnings.warn(f"all prompts have the same {' and '.join(alike)}: these scores are 0", stacklevel=2)
    columns = dict(zip((*SCORES, OUTLIER), scores.tolist(), strict=True))
    coordinates = _principal_coordinates(run, usable).tolist()
    return {**columns, "differs_along": along.tolist(), "principal_coordinates": coordinates, "odd_words": words}


def _landmarks(numbers: Sequence[int]) -> list[int]:
    return [numbers[place] for place in evenly_spaced(len(numbers), LANDMARKS)]


def _in_parts(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    return (numbers[start : start + SCORED_AT_ONCE] for start in range(0, len(numbers), SCORED_AT_ONCE))


def _principal_coordinates(run: ScoredRun, usable: Sequence[int]) -> np.ndarray:
    if not usable:
        return np.zeros((len(run.trace), COORDINATES))
    principal = PrincipalCoordinates([run.matrices[i] for i in _landmarks(usable)])
    found = np.concatenate([principal.of([run.matrices[i] for i in part]) for part in _in_parts(usable)])
    coordinates = np.zeros((len(run.trace), found.shape[1]))
    coordinates[usable] = found
    return coordinates

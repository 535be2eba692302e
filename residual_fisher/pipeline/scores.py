"""Which prompts stand out: by how much, and in which way.

Five scores, each a robust z-score, compare a prompt with usual prompts, and a sixth with those that are like it:

- strength: how strongly the prediction depends on the residual stream, and how certain it is. The Mahalanobis distance
  of (log tr F, log-odds of the most probable token).
- spectrum: how the sensitivity is spread. The Mahalanobis distance of the logarithms of F's singular values.
- directions: where in the residual stream it lies. The share of F outside the directions that usual prompts use.
- words: what the prediction is about. The surprisal of the next tokens, for a prompt that asks like this one.
- activations: where the residual stream itself is. The Mahalanobis distance of h at the last token.
- group: others are answered in the same way, though they ask otherwise. The likeness to those most alike.

They see different things. The outlier score is the robust z-score of their sum. Prompts with a high group score that
are alike are linked to groups.

Usual prompts are those of a reference, which are trusted; else the more usual half of the run itself. With a base
model, the same scores are of the *change* of each prompt's F and h, and the outlier score is of the directions alone.

At most LANDMARKS evenly spaced prompts are learnt from. Each of them is scored leave-one-out, so that no prompt is
compared with itself.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple
import warnings

import numpy as np
from scipy.stats import norm
import torch

from residual_fisher.common.rows import evenly_spaced
from residual_fisher.common.trigrams import CHARACTERS
from residual_fisher.pipeline.distances import (
    COORDINATES,
    ROUNDING,
    TINY,
    Mahalanobis,
    NextTokens,
    PrincipalCoordinates,
    Subspace,
    Surprisal,
    WideMahalanobis,
    log_gain,
    robust_z,
    root,
)
from residual_fisher.pipeline.likeness import Company, linked
from residual_fisher.pipeline.matrices import Triplets
from residual_fisher.pipeline.settings import DIRECTIONS

SCORING_VERSION = 5  # another one has other scores: results of an earlier one are scored again
SCORES = ("z_strength", "z_spectrum", "z_directions", "z_words", "z_activations", "z_group")
LEAST_IN_WORDS = 0.01  # nats: what one prompt more or less changes, and no deviation
LEAST_TOTAL = 0.1  # deviation of a sum of z-scores, each of which has 1 or is 0
OUTLIER = "outlier_score"
P_VALUE = "p_value"
LANDMARKS = 256  # prompts learnt from: more hardly change what is usual
LEAST_Z = -2.0  # of a score in the sum: ordinary prompts seldom have less
CALIBRATED_ON = 2048  # prompts of a reference that p-values are from: each takes as long as one that is scored
SUSPECT = 5.0  # an outlier score of a reference's own prompt, from which it is not learnt from
POOL = 1024  # prompts of a run among which a prompt's company is found
GROUP_Z = 3.0  # z_group from which a prompt may be one of a group
LEAST_LIKE = 0.01  # deviation of likeness
FEWEST = 8  # prompts learnt from: fewer do not show what is usual
CONCENTRATION_STEPS = 10  # by which the usual half is found, at most: it rarely takes more than six
SCORED_AT_ONCE = 64  # prompts
ODD_WORDS = 3  # named of a prompt
OFFSET = 0.3  # added to distances of order 1 before the logarithm, so that those near 0 hardly differ
VALUES = 10  # leading singular values and vectors that are compared
LEAST_VALUE = 1e-9  # of the first singular value: what is less is rounding
CERTAIN = 1e-7  # the rounding of a float32 probability


# --- what is compared ----------------------------------------------------------------------------


class Features(NamedTuple):
    """What is compared of n prompts."""

    strength: np.ndarray  # (n, 2): log tr F, log-odds of the most probable token
    spectrum: np.ndarray  # (n, values): logarithms of the singular values
    roots: list[np.ndarray]  # X (d, values) float32, with F / tr F = X X^T
    tokens: list[NextTokens]
    activations: np.ndarray  # (n, d) float64; (n, 1) zeros if they were not recorded
    likeness: np.ndarray  # (n,) of its answer to those of its `Company`, the mean

    counted = SCORES  # by the outlier score
    # find the usual half: a group of odd prompts may have the most usual activations
    trims = tuple(name for name in SCORES if name != "z_activations")

    @staticmethod
    def measures(rounding: float) -> tuple:
        """One for each of these, and for each of SCORES."""
        from_rows = partial(Mahalanobis, rounding=rounding)
        return from_rows, from_rows, Subspace, Surprisal, partial(WideMahalanobis, rounding=rounding), None


class Change(NamedTuple):
    """What is compared of n prompts in a model and its base model."""

    strength: np.ndarray  # (n, 2), differences
    spectrum: np.ndarray  # (n, values), differences
    outside: np.ndarray  # (n, values): the share of tr F outside the directions of the base model's F
    gains: list[np.ndarray]  # of each prompt's next tokens, `log_gain`
    activations: np.ndarray  # (n, d), differences; (n, 1) zeros if they were not recorded
    likeness: np.ndarray  # (n,) in the model itself

    # a fine-tune changes how certain a model is of many prompts, but the directions of few
    counted = trims = ("z_directions",)

    @staticmethod
    def measures(rounding: float) -> tuple:
        """None: these are distances already, nothing is learnt."""
        from_rows = partial(Mahalanobis, rounding=rounding)
        return from_rows, from_rows, None, None, partial(WideMahalanobis, rounding=rounding), None

    @classmethod
    def between(cls, own: Features, base: Features) -> "Change":
        pairs = zip(own.roots, base.roots, strict=True)
        outside = np.concatenate([Subspace([before]).of([after]) for after, before in pairs])
        gains = [*map(log_gain, own.tokens, base.tokens)]
        activations = np.zeros((len(gains), 1))
        if own.activations.shape == base.activations.shape:
            activations = own.activations - base.activations
        strength, spectrum = own.strength - base.strength, own.spectrum - base.spectrum
        return cls(strength, spectrum, outside, gains, activations, own.likeness)


@dataclass(frozen=True)
class ScoredRun:
    """What the scores are computed from: of each of a run's n prompts, a few numbers in memory, and F on disk."""

    matrices: Sequence[Triplets]
    trace: np.ndarray  # (n,)
    top_probability: np.ndarray  # (n,)
    tokens: list[tuple[str, bool]]  # the next tokens of all prompts, as of `NextTokens`; equal ones are one object
    p: np.ndarray  # (all tokens,) float32
    ends: Sequence[int]  # n + 1: tokens[ends[i] : ends[i + 1]] are prompt i's
    texts: Sequence[str]  # n, the beginnings of the prompts
    answers: Sequence[Sequence[int]]  # n, token ids; empty where F is of the next token
    prompt_hashes: Sequence[int]  # n
    failed: frozenset[int]  # numbers of the prompts without F
    rounding: float  # of logarithms and shares: by what equal prompts of different batches differ

    @classmethod
    def of(cls, records: Iterable[dict], matrices: Sequence[Triplets], rounding: float = ROUNDING) -> "ScoredRun":
        trace, top, texts, answers, hashes, failed = array("d"), array("d"), [], [], array("q"), []
        tokens, p, ends, known = [], array("f"), array("q", [0]), {}
        for index, record in enumerate(records):
            trace.append(record["trace"])
            top.append(record["top_probability"])
            texts.append(record["prompt"][:CHARACTERS])
            answers.append(array("q", record["answer"]["ids"] if "answer" in record else ()))
            hashes.append(hash(str((record["prompt"], record.get("before")))))
            if "failed" in record:
                failed.append(index)
            for pair, probability in _over_positions(record).items():
                tokens.append(known.setdefault(pair, pair))
                p.append(probability)
            ends.append(len(tokens))
        numbers = np.array(trace), np.array(top)
        return cls(matrices, *numbers, tokens, np.array(p), ends, texts, answers, hashes, frozenset(failed), rounding)

    def usable(self) -> list[int]:
        """The numbers of the prompts that have F."""
        return [index for index in range(len(self.trace)) if index not in self.failed]

    def distinct(self, numbers: Sequence[int]) -> list[int]:
        """The first of these numbers for each text: what is there twice would vouch for itself."""
        first: dict[int, int] = {}
        for number in numbers:
            first.setdefault(self.prompt_hashes[number], number)
        return list(first.values())

    def features(self, numbers: Sequence[int]) -> Features:
        p = np.clip(self.top_probability[numbers], CERTAIN, 1 - CERTAIN)
        strength = np.stack([np.log(np.maximum(self.trace[numbers], TINY)), np.log(p / (1 - p))], axis=1)
        leading = [(found.U[:, :VALUES], found.S[:VALUES]) for found in map(self.matrices.__getitem__, numbers)]
        values = np.array([s for _, s in leading], dtype=np.float64)
        values = np.maximum(values, np.maximum(LEAST_VALUE * values[:, :1], TINY))
        roots = [root(u, s, s.sum(dtype=np.float64)) for u, s in leading]
        tokens = [self.next_tokens(i) for i in numbers]
        return Features(strength, np.log(values), roots, tokens, self._activations(numbers), np.zeros(len(numbers)))

    def _activations(self, numbers: Sequence[int]) -> np.ndarray:
        read = getattr(self.matrices, "activation", lambda number: None)
        found = [read(number) for number in numbers]
        return np.zeros((len(found), 1)) if any(h is None for h in found) else np.array(found, dtype=np.float64)

    def next_tokens(self, number: int) -> NextTokens:
        part = slice(self.ends[number], self.ends[number + 1])
        return NextTokens(self.tokens[part], self.p[part], self.texts[number], self.answers[number])


def _over_positions(record: dict) -> dict[tuple[str, bool], float]:
    """The probability of each of a prompt's next tokens; of a recorded answer, their sums over its positions."""
    # an earlier version recorded none
    positions = record["answer"]["next_tokens"] if "answer" in record else [record.get("next_tokens", ())]
    found: dict[tuple[str, bool], float] = {}
    for token in chain.from_iterable(positions):
        pair = token["token"], token["in_prompt"]
        found[pair] = found.get(pair, 0.0) + token["probability"]
    return found


def rounding_of(dtype: str) -> float:
    """By what a logarithm or a share of equal prompts differs between batches of a model of this dtype."""
    return max(ROUNDING, 2 * torch.finfo(getattr(torch, dtype)).eps)


# --- how it is compared --------------------------------------------------------------------------


class Scorer:
    """Scores prompts by their distances from `trusted` ones of a sample; z-scores are relative to all of the sample.

    Attributes:
        sample: the sample's own distances, as `compare` returns them; of trusted prompts leave-one-out.
    """

    def __init__(self, sample: Features | Change, trusted: Sequence[int], rounding: float):
        learnt = [[part[i] for i in trusted] if isinstance(part, list) else part[trusted] for part in sample]
        self._measures = [
            measure and measure(part) for measure, part in zip(sample.measures(rounding), learnt, strict=True)
        ]
        self._least = [rounding, rounding, rounding, max(rounding, LEAST_IN_WORDS), rounding, max(rounding, LEAST_LIKE)]
        self._kind = type(sample)
        self.sample = self.compare(sample)
        for found, measure in zip(self.sample, self._measures, strict=True):
            for place, left_out in zip(trusted, measure.leave_one_out(), strict=True) if measure else ():
                found[place] = left_out
        self._usual = _logarithms(self.sample)
        z_scores = self._z_scores(self._usual)
        self._total, self._trimming = (_total(z_scores, names) for names in (sample.counted, sample.trims))

    @classmethod
    def of_trusted(cls, sample: Features | Change, rounding: float) -> "Scorer":
        """Trusts a sample but for its outliers: one that does not belong there would widen what is usual."""
        everyone = cls(sample, np.arange(len(sample.strength)), rounding)._total
        return cls(sample, np.flatnonzero(_robust_total(everyone, everyone) < SUSPECT), rounding)

    @classmethod
    def of_usual_half(cls, sample: Features | Change, rounding: float) -> "Scorer":
        """Trusts the more usual half of a sample.

        Prompts that are odd in the same way make each other usual, as long as all of the sample is trusted. So that is
        only the start of concentration steps (Rousseeuw and Van Driessen, 1999). Each trusts the half with the lowest
        scores of the step before, until the half stays.
        """
        half = np.arange(len(sample.strength))
        for _ in range(CONCENTRATION_STEPS):
            scorer, before = cls(sample, half, rounding), half
            half = np.sort(np.argsort(scorer._trimming, kind="stable")[: len(sample.strength) // 2])
            if np.array_equal(half, before):
                return scorer
        return cls(sample, half, rounding)

    def compare(self, prompts: Features | Change) -> list:
        """[distances in strength, in spectrum, shares of F outside by singular vector, surprisals by token, distances
        of activations, likeness]."""
        pairs = zip(self._measures, prompts, strict=True)
        return [measure.of(part) if measure else part for measure, part in pairs]

    def scores(self, compared: list) -> np.ndarray:
        """(7, n): the six scores and the outlier score."""
        z_scores = self._z_scores(_logarithms(compared))
        total = _robust_total(_total(z_scores, self._kind.counted), self._total)
        return np.concatenate([z_scores, total[None]])

    def _z_scores(self, logarithms: np.ndarray) -> np.ndarray:
        rows = zip(logarithms, self._usual, self._least, strict=True)
        return np.stack([robust_z(row, usual, least) for row, usual, least in rows])


def _total(z_scores: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """(n,) the sum of some scores: what is odd in one way is no less odd for being most usual in another."""
    return np.maximum(z_scores[[SCORES.index(name) for name in names]], LEAST_Z).sum(axis=0)


def _robust_total(total: np.ndarray, usual: np.ndarray) -> np.ndarray:
    return robust_z(total, usual, LEAST_TOTAL)


def _logarithms(compared: list) -> np.ndarray:
    """(6, n), by score: logarithms of distances are spread like normal data; words' surprisals are summed."""
    strength, spectrum, outside, surprisals, activations, likeness = compared
    logarithms = np.log(np.stack([strength, spectrum, outside.sum(axis=1), activations]) + OFFSET)
    words = np.array([own.sum() for own in surprisals])
    return np.stack([*logarithms[:3], words, logarithms[3], likeness])


# --- together ------------------------------------------------------------------------------------


class Usual:
    """What is usual: learnt from at most LANDMARKS of some prompts of a run, none of whose texts is there twice.

    Args:
        trusted: whether the prompts are; else the more usual half of them is.
        company: the prompts that a prompt's nearest are among.
        rounding: see `ScoredRun`.
        base: the run through the base model, if the change is what counts.
    """

    def __init__(
        self,
        run: ScoredRun,
        prompts: Sequence[int],
        trusted: bool,
        company: Company,
        rounding: float,
        base: ScoredRun | None,
    ):
        self._company, self._base, learnt = company, base, _some(prompts, LANDMARKS)
        make = Scorer.of_trusted if trusted else Scorer.of_usual_half
        self._scorer = make(self._features(run, learnt), rounding)
        self._place = {run.prompt_hashes[number]: place for place, number in enumerate(learnt)}
        self.scores = self._scorer.scores

    def _features(self, run: ScoredRun, numbers: Sequence[int]) -> Features | Change:
        own = run.features(numbers)
        own = own._replace(likeness=self._company.of(own.tokens, own.roots)[1].mean(axis=1))
        return own if self._base is None else Change.between(own, self._base.features(numbers))

    def compare(self, run: ScoredRun, numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], list]]:
        """Some of the numbers at a time, and what `Scorer.compare` says of them.

        A prompt whose text is learnt from is compared with the others that are.
        """
        for start in range(0, len(numbers), SCORED_AT_ONCE):
            part = numbers[start : start + SCORED_AT_ONCE]
            found = self._scorer.compare(self._features(run, part))
            for at, number in enumerate(part):
                if (place := self._place.get(run.prompt_hashes[number])) is not None:
                    for column, left_out in zip(found, self._scorer.sample, strict=True):
                        column[at] = left_out[place]
            yield part, found


def outlier_scores(run: ScoredRun, reference: ScoredRun | None = None, base: ScoredRun | None = None) -> dict:
    """The six scores, the outlier score, its p-value, what explains them: lists with an entry for each prompt.

    `differs_along` is the one of the first DIRECTIONS singular vectors, from 0, along which most of F lies outside the
    usual directions. `odd_words` are the texts of the next tokens with most surprisal. `principal_coordinates` are
    COORDINATES numbers, or as many as there are prompts with F. `likeness` is the mean to those most alike, `group` the
    number of a prompt's group or None. Prompts that failed have zeros, a p-value of 1, no words and no group, and do
    not change the others' scores; if all failed, there are COORDINATES zeros.

    Args:
        reference: trusted prompts; None for the more usual half of the run's own.
        base: the same prompts through another model, from which the change is scored. Not with a reference.
    """
    count, usable = len(run.trace), [i for i in run.usable() if base is None or i not in base.failed]
    scores, along = np.zeros((len(SCORES) + 1, count)), np.zeros(count, dtype=int)
    p, words = np.ones(count), [[] for _ in range(count)]
    likeness, groups = np.zeros(count), np.full(count, -1)
    known = reference or run
    prompts = known.distinct(usable if reference is None else reference.usable())
    if len(prompts) < FEWEST:
        few = f"fewer than {FEWEST} different prompts ({len(prompts)})"
        warnings.warn(f"{few} do not say what is usual: all scores are 0", stacklevel=2)
    else:
        rounding, own = max(run.rounding, known.rounding), _some(run.distinct(usable), POOL)
        pool = [run.features(own), *([reference.features(_some(prompts, POOL))] if reference else [])]
        company = Company([one for part in pool for one in part.tokens], [one for part in pool for one in part.roots])
        usual = Usual(known, prompts, reference is not None, company, rounding, base)
        for numbers, compared in usual.compare(run, usable):
            scores[:, numbers] = usual.scores(compared)
            likeness[numbers] = compared[5]
            along[numbers] = compared[2][:, :DIRECTIONS].argmax(axis=1)
            for number, surprisal in zip(numbers, compared[3], strict=True):
                tokens = run.next_tokens(number).tokens
                words[number] = [tokens[i][0] for i in np.argsort(-surprisal, kind="stable")[:ODD_WORDS]]
        if reference is None:
            p[usable] = tail_probabilities(scores[-1, usable])
        else:
            some = _some(prompts, CALIBRATED_ON)
            theirs = np.concatenate([usual.scores(compared)[-1] for _, compared in usual.compare(reference, some)])
            hashes = {reference.prompt_hashes[number] for number in some}
            among = np.array([run.prompt_hashes[number] in hashes for number in usable], dtype=bool)
            p[usable] = p_values(scores[-1, usable], theirs, among)
        suspects = [number for number in usable if scores[SCORES.index("z_group"), number] >= GROUP_Z]
        groups = _groups(run, suspects, likeness, company, own)
        others = zip(SCORES[:-1], scores, strict=False)  # but for groups: that there are none needs no note
        if alike := [name.removeprefix("z_") for name, row in others if not row.any()]:
            warnings.warn(f"all prompts have the same {' and '.join(alike)}: these scores are 0", stacklevel=2)
    return {
        **dict(zip((*SCORES, OUTLIER), scores.tolist(), strict=True)),
        P_VALUE: p.tolist(),
        "differs_along": along.tolist(),
        "principal_coordinates": _principal_coordinates(run, usable).tolist(),
        "odd_words": words,
        "likeness": likeness.tolist(),
        "group": [None if group < 0 else group for group in groups.tolist()],
    }


def _groups(
    run: ScoredRun, suspects: Sequence[int], likeness: np.ndarray, company: Company, own: Sequence[int]
) -> np.ndarray:
    """(n,) the group of each of a run's prompts, -1 for none: suspects, and those of their company that are as alike.

    Args:
        own: the run's prompts that are first among those that company is found among.
    """
    links, least = [], likeness[suspects].min(initial=1)
    for start in range(0, len(suspects), SCORED_AT_ONCE):
        part = suspects[start : start + SCORED_AT_ONCE]
        found = run.features(part)
        for number, places, alike in zip(part, *company.of(found.tokens, found.roots), strict=True):
            links.append((number, [own[i] for i in places[alike >= least] if i < len(own)]))
    return linked(links, len(run.trace))


def p_values(scores: np.ndarray, usual: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(n,) the share of usual scores, the prompt's own included, that are as high as its own.

    If a prompt is drawn like the usual ones, its p-value is at most a with probability at most a, whatever the scores'
    distribution; no p-value is below 1 / (usual + 1) (conformal prediction: Vovk, Gammerman and Shafer, 2005).

    Args:
        among: (n,) bool, whether a score is one of the usual ones.
    """
    ordered, more = np.sort(usual), ~among
    as_high = len(ordered) - np.searchsorted(ordered, scores)
    # in another batch, a prompt that is one of the usual ones may score higher by its rounding
    return np.maximum(as_high + more, 1) / (len(ordered) + more)


def tail_probabilities(scores: np.ndarray) -> np.ndarray:
    """(n,) how likely a score as high is, from scores of which few are odd.

    Odd prompts lie above the median, and would hide each other if it were their share that counts. So above the median
    it is the upper tail of a normal distribution whose deviation is that of the upper half: 1.4826 times the median
    distance from the median, since the lower half is narrower. Below the median it is the share of scores as high. No
    result is below 1 / (n + 1).
    """
    median = np.median(scores)
    above = scores > median
    if not above.any():
        return p_values(scores, scores, np.full(len(scores), True))
    deviation = 1.4826 * np.median(scores[above] - median)
    p = np.where(above, norm.sf((scores - median) / deviation), p_values(scores, scores, np.full(len(scores), True)))
    return np.maximum(p, 1 / (len(scores) + 1))


def _some(numbers: Sequence[int], at_most: int) -> list[int]:
    return [numbers[place] for place in evenly_spaced(len(numbers), at_most)]


def _principal_coordinates(run: ScoredRun, usable: Sequence[int]) -> np.ndarray:
    if not usable:
        return np.zeros((len(run.trace), COORDINATES))
    principal = PrincipalCoordinates([run.matrices[i] for i in _some(usable, LANDMARKS)])
    parts = (usable[start : start + SCORED_AT_ONCE] for start in range(0, len(usable), SCORED_AT_ONCE))
    found = np.concatenate([principal.of([run.matrices[i] for i in part]) for part in parts])
    coordinates = np.zeros((len(run.trace), found.shape[1]))
    coordinates[usable] = found
    return coordinates

"""Which prompts stand out: by how much, and in which way.

Four scores, each in robust standard deviations of what is usual:

- strength: how strongly the prediction depends on the residual stream, and how certain it is. The Mahalanobis distance
  of (log tr F, log-odds of the most probable token).
- spectrum: how the sensitivity is spread. The Mahalanobis distance of the logarithms of F's singular values.
- directions: where in the residual stream it lies. The share of F outside the directions that other prompts use.
- words: what it is about. The surprise at the tokens that the prediction makes probable.

They see different things, and the outlier score is of their sum, again in robust standard deviations. What is usual is
learnt from trusted prompts; or, without any, from the more usual ones of the run itself. Beside a base model, the same
four are of the *change* of each prompt's F, and the outlier score is of the directions alone.

At most LANDMARKS prompts, evenly spaced, are learnt from; one that is among them is measured against the others, so
that all distances are of prompts not learnt from.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple
import warnings

import numpy as np

from residual_fisher.common.rows import evenly_spaced
from residual_fisher.pipeline.distances import (
    RESOLUTION,
    Directions,
    Distances,
    PrincipalCoordinates,
    Words,
    robust_z,
    shift,
)
from residual_fisher.pipeline.evidence import Prompts, Sample

SCORES = ("z_strength", "z_spectrum", "z_directions", "z_words")
SPREADS = (RESOLUTION, RESOLUTION, RESOLUTION, 0.01)  # less is none; of words, one prompt more or less is as much
OUTLIER = "outlier_score"
# Beyond it a prompt stands out: about one of a hundred ordinary prompts does, as of normal data.
THRESHOLD = 2.3
LANDMARKS = 256  # prompts that are learnt from: more would hardly change what is usual
FEWEST = 8  # fewer say nothing
STEPS = 2  # in which the trusted half of a run's own prompts is found
SCORED_AT_ONCE = 64  # prompts
DIRECTIONS = 3  # of which that is named in which a prompt differs most: those whose words are recorded
WORDS = 3  # named of a prompt
OFFSET = 0.3  # of distances, of order 1, before the logarithm: very small ones are no more usual than small ones


class Found(NamedTuple):
    """How far prompts are from what is usual, and what is unusual about them."""

    distances: np.ndarray  # (4, n), by score: logarithms, but for the surprise of words
    outside: np.ndarray  # (n, values): the part of F along each singular vector that is outside the usual directions
    surprise: list[np.ndarray]  # of each prompt's words


class Usual:
    """What is usual, learnt from the `trusted` prompts of a sample; all of the sample sets the scale.

    Distances are taken as logarithms: only so are they spread like normal data, and their sum not the largest alone.
    """

    def __init__(self, sample: Sample, trusted: Sequence[int]):
        some = sample.some(trusted)
        self._strength, self._spectrum = Distances(some.strength), Distances(some.spectrum)
        self._directions, self._words = (
            (None, None) if sample.base is not None else (Directions(some.roots), Words(some.words))
        )
        self.found = self.find(sample)
        distances, outside, surprise = self.found
        distances[0, trusted] = np.log(self._strength.without_itself() + OFFSET)
        distances[1, trusted] = np.log(self._spectrum.without_itself() + OFFSET)
        if sample.base is None:
            outside[trusted] = self._directions.without_itself()
            distances[2, trusted] = np.log(outside[trusted].sum(axis=1) + OFFSET)
            for place, own in zip(trusted, self._words.without_itself(), strict=True):
                surprise[place] = own
                distances[3, place] = own.sum()
        # a fine-tune changes how certain a model is of many prompts, but few prompts' directions
        self._counted = [SCORES.index("z_directions")] if sample.base is not None else slice(None)
        self.total = self._standardized(distances)[self._counted].sum(axis=0)

    def find(self, sample: Sample) -> Found:
        """Beside a base model, "usual" directions and words are those of the base model for the same prompt."""
        if sample.base is not None:
            pairs = zip(sample.roots, sample.base.roots, strict=True)
            outside = np.concatenate([Directions([base]).outside([own]) for own, base in pairs])
            surprise = [*map(shift, sample.words, sample.base.words)]
        else:
            outside, surprise = self._directions.outside(sample.roots), self._words.surprise(sample.words)
        logarithms = np.log(
            np.stack([self._strength.of(sample.strength), self._spectrum.of(sample.spectrum), outside.sum(axis=1)])
            + OFFSET
        )
        return Found(np.concatenate([logarithms, [[own.sum() for own in surprise]]]), outside, surprise)

    def _standardized(self, distances: np.ndarray) -> np.ndarray:
        pairs = zip(distances, self.found.distances, SPREADS, strict=True)
        return np.stack([robust_z(row, usual, least) for row, usual, least in pairs])

    def scores(self, distances: np.ndarray) -> np.ndarray:
        """(5, n): the four, and of the sum of those that count."""
        four = self._standardized(distances)
        return np.concatenate([four, robust_z(four[self._counted].sum(axis=0), self.total)[None]])


def learn(sample: Sample, trusted: bool) -> Usual:
    """From all of a sample that is trusted, else from the more usual half of it.

    Prompts that are odd in the same way make each other usual. So the half is chosen by two looks: at the scores that
    all of the sample would lead to, and at how far each prompt's strength is from the medians, which a group does not
    move. Then it is chosen once more, by what it says itself (a concentration step: Rousseeuw and Van Driessen, 1999).
    """
    everyone = Usual(sample, np.arange(len(sample)))
    if trusted:
        return everyone
    strength = np.sqrt(sum(robust_z(column, column) ** 2 for column in sample.strength.T))
    looks = [everyone.total, np.log(strength + OFFSET)]
    odd = sum(robust_z(look, look) for look in looks)
    for _ in range(STEPS):
        usual = Usual(sample, np.sort(np.argsort(odd, kind="stable")[: len(sample) // 2]))
        odd = usual.total
    return usual


def outlier_scores(prompts: Prompts, reference: Prompts | None = None, base: Prompts | None = None) -> dict:
    """By prompt: the four scores, the outlier score, and what explains them.

    `differs_along` is the one of the first DIRECTIONS singular vectors, from 0, along which most of F lies outside the
    usual directions; `odd_words`, numbers of words, the most surprising first. Prompts that failed have zeros, and
    count for nobody else's scores.

    Args:
        reference: trusted prompts; None for the more usual ones of these.
        base: the same prompts through another model, from which the change is scored. Not with a reference.
    """
    kept = [index for index in prompts.usable() if base is None or index not in base.failed]

    def evidence(numbers: Sequence[int]) -> Sample:
        own = prompts.sample(numbers)
        return own if base is None else own.beside(base.sample(numbers))

    source = kept if reference is None else reference.usable()
    chosen = [source[place] for place in evenly_spaced(len(source), LANDMARKS)]
    count = len(prompts.trace)
    columns = {name: np.zeros(count) for name in (*SCORES, OUTLIER)}
    columns |= {"differs_along": np.zeros(count, dtype=int), "odd_words": [[] for _ in range(count)]}
    if len(chosen) < FEWEST:
        warnings.warn(f"{len(chosen)} prompts do not say what is usual: all scores are 0", stacklevel=2)
    else:
        usual = learn(evidence(chosen) if reference is None else reference.sample(chosen), reference is not None)
        places = {number: place for place, number in enumerate(chosen)} if reference is None else {}
        for numbers in _in_parts(kept):
            sample = evidence(numbers)
            distances, outside, surprise = usual.find(sample)
            for column, number in enumerate(numbers):
                if number in places:  # measured against the others
                    distances[:, column] = usual.found.distances[:, places[number]]
                    outside[column] = usual.found.outside[places[number]]
                    surprise[column] = usual.found.surprise[places[number]]
                order = np.argsort(-surprise[column], kind="stable")[:WORDS]
                columns["odd_words"][number] = sample.words[column][0][order].tolist()
            for name, scores in zip((*SCORES, OUTLIER), usual.scores(distances), strict=True):
                columns[name][numbers] = scores
            columns["differs_along"][numbers] = outside[:, :DIRECTIONS].argmax(axis=1)
        if alike := [name.removeprefix("z_") for name in SCORES if not columns[name].any()]:
            warnings.warn(f"all prompts have the same {' and '.join(alike)}: these scores are 0", stacklevel=2)
    return {**columns, "principal_coordinates": _on_the_map(prompts, kept)}


def _in_parts(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    return (numbers[start : start + SCORED_AT_ONCE] for start in range(0, len(numbers), SCORED_AT_ONCE))


def _on_the_map(prompts: Prompts, kept: Sequence[int]) -> np.ndarray:
    chosen = [kept[place] for place in evenly_spaced(len(kept), LANDMARKS)]
    principal = PrincipalCoordinates([prompts.matrices[i] for i in chosen])
    found = np.concatenate([principal.coordinates([prompts.matrices[i] for i in some]) for some in _in_parts(kept)])
    coordinates = np.zeros((len(prompts.trace), found.shape[1]))
    coordinates[kept] = found
    return coordinates

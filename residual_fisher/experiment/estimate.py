"""What a run would do, how long it would take, and how much room: for --dry-run."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from residual_fisher.common.amounts import duration, size
from residual_fisher.common.command_line import excerpt, excerpt_end
from residual_fisher.common.files import json_text
from residual_fisher.experiment.figures import drawn_of
from residual_fisher.experiment.report import EXCERPT
from residual_fisher.experiment.results import EIGENVECTORS, MAX_SIMILARITY, RESULTS, Results
from residual_fisher.experiment.sentences import Context, Matches

SHOWN = 3  # prompts


class Trial(NamedTuple):
    """Sentences that were taken through the experiment, twice."""

    contexts: list[Context]  # the longest last
    first: float  # seconds of the first round, which has to warm up
    seconds: list[float]  # of each sentence, in the shorter of the two rounds
    linearizing: float  # of those, how many went into the linearisation of a sentence
    results: Results  # of the second


def representatives(contexts: Sequence[Context]) -> list[Context]:
    """The context of median length, and the longest one."""
    by_length = sorted(contexts, key=lambda context: len(context.ids))
    middle, last = (len(by_length) - 1) // 2, len(by_length) - 1
    return [by_length[index] for index in sorted({middle, last})]


def total_seconds(trial: Trial, todo: Sequence[Context], others: int = 0) -> float:
    """Of the sentences to do, and of `others` that are looked at and do not qualify.

    What lies between the trial's sentences in length does so in time; a shorter one takes as long as the median one.
    """
    lengths = [len(context.ids) for context in trial.contexts]
    work = np.interp([len(context.ids) for context in todo], lengths, trial.seconds).sum()
    warming_up = max(0.0, trial.first - sum(trial.seconds))
    return float(warming_up + work + others * trial.linearizing)


def perturbations(results: Results) -> int:
    """How many there are of a sentence at a layer."""
    by_scale = next(iter(results.perturbations[0].values()))
    return sum(1 + len(record["controls"]) for scale, record in by_scale.items() if float(scale))


def file_sizes(results: Results, sentences: int) -> tuple[float, float]:
    """Bytes of the JSON and the NPZ of so many sentences, from those in `results`."""
    document = results.document()
    matrix = {"similarity_matrix": document.pop("similarity_matrix")}
    cell = len(json_text(matrix, indent=1)) / len(document["similarity_labels"]) ** 2
    rows = min(sentences * len(results.layers), MAX_SIMILARITY)
    records = len(json_text(document, indent=1)) / len(results)
    arrays = sum(row.nbytes for rows in results.arrays.values() for row in rows) / len(results)
    return sentences * records + rows**2 * cell, sentences * arrays


# --- in words ------------------------------------------------------------------------------------


def describe_sentences(
    word: str, found: Matches, contexts: Sequence[Context], todo: Sequence[Context], most: str
) -> str:
    """How many there are, and the first prompts; `most` goes before a number that is not reached by all."""
    read, holding, usable = found.read, len(found.sentences), len(contexts)
    lines = [
        f"sentences: {read} read, {holding} with {excerpt(repr(word), 40)}, {usable} usable, {most}{len(todo)} to run:"
    ]
    lines += [f"  {excerpt_end(context.prompt, EXCERPT)}" for context in todo[:SHOWN]]
    return "\n".join([*lines, "  …"] if len(todo) > SHOWN else lines)


def describe_costs(trial: Trial, seconds: float, loading: float, memory: str, sentences: int, most: str) -> str:
    """What they take, of time, memory and disk; `sentences` are those in the files."""
    results = trial.results
    each = " to ".join(dict.fromkeys(duration(part) for part in sorted(trial.seconds)))
    longest = len(trial.contexts[-1].ids)
    records, arrays = file_sizes(results, sentences)
    pictures = len(drawn_of({"steering": results.steering}))
    return "\n".join(
        [
            f"each: {perturbations(results)} perturbations at each of {len(results.layers)} layers",
            f"time: about {most}{duration(seconds)}, {each} a sentence; and {duration(loading)} to load the model",
            f"memory: {memory}, with the longest sentence ({longest} tokens)",
            f"files: about {most}{size(records)} {RESULTS}, {size(arrays)} {EIGENVECTORS}, and {pictures} pictures",
        ]
    )

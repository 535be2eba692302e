"""Greedy continuations of a prompt after perturbations of its last token.

A perturbation is added once, at one layer and at the prompt's last token. It also changes the keys and values that the
deeper layers keep of that token. The following tokens are not perturbed.
"""

from collections.abc import Sequence
from itertools import chain, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from fisher import Chunks, PromptPoint
from residual_fisher.model.answers import OVERFLOWED, end_tokens, greedy
from residual_fisher.model.last_token import copy_of
from residual_fisher.model.loading import longest_prompt
from residual_fisher.model.passes import add_to_rows
from residual_fisher.model.reading import PrefixMode

LIMIT_ROUNDING = 1e-3  # relative excess of a predicted KL over the limit that is rounding: 2 nats come as 2.0000002


class Continuations(NamedTuple):
    """What follows one prompt: token ids, fewer than asked for where the text ended."""

    unperturbed: list[int]
    perturbed: list[tuple[int, int, int, list[int]]]  # indices of layer, scale and direction, and the ids


def continuations(
    point: PromptPoint, prompt_length: int, deltas: Tensor, chosen: list[tuple[int, int]], tokens: int, chunks: Chunks
) -> Continuations:
    """Greedy continuations of a prompt, unperturbed and after perturbations of its last token.

    A continuation ends before the model's end token, where its numbers overflow, or at the model's last position.

    Args:
        deltas: (layers, directions, scales, d) float32.
        chosen: indices (layer, scale) of the perturbations to continue, in all directions.
        tokens: the length of a continuation.
    """
    if longest := longest_prompt(point.model):
        tokens = min(tokens, longest - prompt_length + 1)
    places = [(layer, scale, direction) for layer, scale in chosen for direction in range(deltas.shape[1])]
    rows = torch.stack([deltas[layer, direction, scale] for layer, scale, direction in places])
    rows = torch.cat([torch.zeros_like(rows[:1]), rows])  # the first is unperturbed
    at = torch.tensor([0, *(layer for layer, _, _ in places)])
    ends = end_tokens(point.model) | {OVERFLOWED}
    reading, last = point.reading, prompt_length - 1  # place of the prompt's last token

    def chunk(deltas: Tensor, at: Tensor) -> list[list[int]]:
        ids, prefix = reading.prompt.expand(len(deltas), -1), reading.prefix
        cache = None if prefix is None else copy_of(prefix, len(deltas))

        def hooks(cached: int) -> Sequence:
            # once the prompt's last token is in the cache, so is the effect of its perturbation
            return add_to_rows(point.modules, deltas, at, last - cached) if cached <= last else ()

        rows = greedy(reading.model, ids, tokens, ends, reading.mode is PrefixMode.WHOLE, cache=cache, hooks=hooks)
        return [list(takewhile(lambda token: token not in ends, ids)) for ids in rows.tolist()]

    unperturbed, *perturbed = chain.from_iterable(chunks.map(chunk, rows, at))
    return Continuations(unperturbed, [(*at, ids) for at, ids in zip(places, perturbed, strict=True)])


def choose_scales(scales: Sequence[float], predicted: Tensor, limit: float) -> list[tuple[int, int]]:
    """By layer and sign, the farthest scale whose predicted KL is within the limit; else the nearest scale.

    Args:
        scales: none is 0.
        predicted: (layers, scales) nats; `limit` too.
    Returns:
        pairs (layer, index of the scale)
    """
    chosen = []
    for layer, nats in enumerate(predicted.tolist()):
        for sign in (-1, 1):
            columns = sorted((i for i, scale in enumerate(scales) if scale * sign > 0), key=lambda i: abs(scales[i]))
            within = [i for i in columns if nats[i] <= limit * (1 + LIMIT_ROUNDING)]
            chosen += [(layer, i) for i in within[-1:] or columns[:1]]
    return chosen

"""Greedy continuations of a prompt after perturbations of its last token.

A perturbation is added once, at one layer and at the prompt's last token. It also changes the keys and values that the
deeper layers keep of that token. The following tokens are not perturbed.
"""

from collections.abc import Sequence
from itertools import chain, takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fisher import Chunks, PromptPoint
from residual_fisher.model.last_token import copy_of
from residual_fisher.model.loading import longest_prompt, rotation_change, text_config
from residual_fisher.model.passes import add_to_rows, attention, capture_head, hooked
from residual_fisher.model.reading import PrefixMode

LIMIT_ROUNDING = 1e-3  # relative excess of a predicted KL over the limit that is rounding: 2 nats come as 2.0000002
OVERFLOWED = -1  # stands for a token where the logits hold NaN or infinity


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

    def chunk(deltas: Tensor, at: Tensor) -> list[list[int]]:
        rows = greedy(point, deltas, at, tokens, ends).tolist()
        return [list(takewhile(lambda token: token not in ends, ids)) for ids in rows]

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


def end_tokens(model: nn.Module) -> set[int]:
    """The model's end-of-sequence tokens, by its generation settings, else by its configuration."""
    settings = (getattr(model, "generation_config", None), model.config, text_config(model))
    ends = next((e for s in settings if (e := getattr(s, "eos_token_id", None)) is not None), [])
    return {ends} if isinstance(ends, int) else set(ends)


@torch.no_grad()
def greedy(point: PromptPoint, deltas: Tensor, at: Tensor, tokens: int, ends: set[int]) -> Tensor:
    """The most probable next tokens (rows, at most `tokens`) int64; after a row's end they mean nothing.

    Each row has its own cache, which starts as a copy of the prefix and grows by one token a pass. It is made anew by
    the pass that is the first above the model's `rotation_change`. Without a cache (`PrefixMode.WHOLE`), every pass
    runs all tokens.

    Args:
        deltas: (rows, d) float32, each added to the residual stream at the prompt's last token.
        at: (rows,) int64 on the CPU: the index in `point.layers` of each row's layer.
    """
    reading, model, rows = point.reading, point.reading.model, len(deltas)
    ids = reading.prompt.expand(rows, -1).to(model.device)  # (rows, tokens), all so far
    last, change = ids.shape[1] - 1, rotation_change(model)  # place of the prompt's last token
    whole, cached, cache = reading.mode is PrefixMode.WHOLE, 0, None  # number of tokens in the cache
    if reading.prefix is not None:
        cached, cache = last, copy_of(reading.prefix, rows)

    written, ended = [], torch.zeros(rows, dtype=torch.bool, device=model.device)
    with attention(model, "eager"), capture_head(model, lambda x: x[:, -1:]):
        while len(written) < tokens and not ended.all():
            if not whole and (cached == 0 or cached <= change < ids.shape[1]):
                cached, cache = 0, DynamicCache(config=model.config)
            memory = {} if whole else {"past_key_values": cache}
            # once the prompt's last token is in the cache, so is the effect of its perturbation
            perturbing = add_to_rows(point.modules, deltas, at, last - cached) if cached <= last else ()
            with hooked(*perturbing):
                logits = model(ids[:, cached:], use_cache=not whole, **memory).logits[:, -1].float()
            cached = 0 if whole else ids.shape[1]
            token = torch.where(logits.logsumexp(-1).isfinite(), logits.argmax(-1), OVERFLOWED).to(model.device)
            ended |= torch.isin(token, torch.tensor(list(ends), device=token.device))
            written.append(token)
            ids = torch.cat([ids, token.clamp(min=0)[:, None]], dim=1)
    return torch.stack(written, dim=1)

"""What the model goes on to say: greedy continuations after perturbations of the prompt's last token.

A perturbation is added once, at one layer and at the prompt's last token. What that token leaves in the deeper layers'
memory is perturbed with it; the tokens that follow are run as they are.
"""

from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fisher import Chunks, Point
from residual_fisher.model.last_token import growing_copy
from residual_fisher.model.loading import longest_prompt
from residual_fisher.model.passes import attention, edit_stream, hooked
from residual_fisher.model.reading import Way

ROUNDING = 1e-3  # relative, by which a predicted KL may exceed the limit: one of 2 nats is computed as 2.0000002
OVERFLOWED = -1  # in place of a token, where the logits hold NaN or infinity


class Continuation(NamedTuple):
    """What follows one perturbation."""

    layer: int  # index in the point's layers
    scale: int  # index of its scale
    direction: int
    ids: list[int]  # fewer than were asked for where it ended


class Continuations(NamedTuple):
    """What follows one prompt."""

    unperturbed: list[int]
    perturbed: list[Continuation]


def continuations(
    point: Point,
    prompt_length: int,
    deltas: Tensor,
    chosen: list[tuple[int, int]],
    tokens: int,
    chunks: Chunks,
) -> Continuations:
    """The most probable tokens, one after the other, after a prompt and after each perturbation of its last token.

    A row ends before an end token of the model, where its numbers overflow, or with the model's last position.

    Args:
        deltas: (layers, directions, scales, d) float32.
        chosen: (layer, scale) of the perturbations that are continued, in all directions.
    """
    if longest := longest_prompt(point.model):
        tokens = min(tokens, longest - prompt_length + 1)
    places = [(layer, scale, direction) for layer, scale in chosen for direction in range(deltas.shape[1])]
    rows = torch.stack([deltas[layer, direction, scale] for layer, scale, direction in places])
    rows = torch.cat([torch.zeros_like(rows[:1]), rows])  # the first is unperturbed
    at = torch.tensor([0, *(layer for layer, _, _ in places)])
    ends = end_tokens(point.model)

    def chunk(deltas: Tensor, at: Tensor) -> list[list[int]]:
        return [until_end(row, ends) for row in greedy(point, deltas, at, tokens, ends).tolist()]

    unperturbed, *perturbed = chain.from_iterable(chunks.map(chunk, rows, at))
    return Continuations(unperturbed, [Continuation(*at, ids) for at, ids in zip(places, perturbed, strict=True)])


def choose_scales(scales: Sequence[float], predicted: Tensor, limit: float) -> list[tuple[int, int]]:
    """(layer, index of a scale): by layer and sign the scale with the largest KL predicted within the limit.

    It is the smallest scale where every one exceeds the limit.

    Args:
        scales: none is 0.
        predicted: (layers, scales) nats.
    """
    chosen = []
    for layer, nats in enumerate(predicted.tolist()):
        for sign in (-1, 1):
            columns = sorted((i for i, scale in enumerate(scales) if scale * sign > 0), key=lambda i: abs(scales[i]))
            within = [i for i in columns if nats[i] <= limit * (1 + ROUNDING)]
            chosen += [(layer, i) for i in within[-1:] or columns[:1]]
    return chosen


def end_tokens(model: nn.Module) -> set[int]:
    """The tokens after which the model says nothing more, by its generation settings, or else its configuration."""
    settings = (getattr(model, "generation_config", None), model.config, model.config.get_text_config(decoder=True))
    ends = next((e for s in settings if (e := getattr(s, "eos_token_id", None)) is not None), [])
    return {ends} if isinstance(ends, int) else set(ends)


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first end token, or before the numbers overflowed."""
    stop = {*ends, OVERFLOWED}
    return list(takewhile(lambda token: token not in stop, ids))


@torch.no_grad()
def greedy(point: Point, deltas: Tensor, at: Tensor, tokens: int, ends: set[int]) -> Tensor:
    """The next `tokens` tokens (rows, at most so many) int64 of every row, whatever comes after its end.

    A row has a memory of its own, which begins as a copy of the prefix and grows by a token a pass; a model whose
    memory is more than keys and values runs every row whole in every pass.

    Args:
        deltas: (rows, d) float32, each added to the residual stream at the prompt's last token.
        at: (rows,) int64 on the CPU: the index in `point.layers` of each row's.
    """
    reading, model, rows = point.reading, point.reading.model, len(deltas)
    last = reading.ids.shape[1] - 1  # where the prompt's last token is among the tokens of the first pass
    ids = reading.ids.expand(rows, -1).to(model.device)
    cache = None
    if reading.way is not Way.WHOLE:
        empty = reading.prefix is None
        cache = DynamicCache(config=model.config) if empty else growing_copy(reading.prefix, rows)
    memory = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}

    def add(index: int) -> Callable[[Tensor], Tensor]:
        own = torch.where((at == index)[:, None].to(deltas.device), deltas, 0)

        def add_to_own_rows(h: Tensor) -> Tensor:
            h = h.clone()
            h[:, last] = (h[:, last] + own.to(h.device)).to(h.dtype)  # the sum is float32 or wider
            return h

        return add_to_own_rows

    def pick_last(module: nn.Module, args: tuple) -> tuple:
        return (args[0][:, -1:], *args[1:])

    perturbing = [
        (point.modules[index].register_forward_hook, edit_stream(add(index))) for index in at.unique().tolist()
    ]
    written, ended = [], torch.zeros(rows, dtype=torch.bool, device=model.device)
    with attention(model, "eager"), hooked((model.get_output_embeddings().register_forward_pre_hook, pick_last)):
        while len(written) < tokens and not ended.all():
            perturbed = cache is None or not written  # else what it did is in the cache
            with hooked(*perturbing if perturbed else ()):
                logits = model(ids, **memory).logits[:, -1].float()
            token = torch.where(logits.logsumexp(-1).isfinite(), logits.argmax(-1), OVERFLOWED).to(model.device)
            ended |= torch.isin(token, torch.tensor([*ends, OVERFLOWED], device=token.device))
            written.append(token)
            following = token.clamp(min=0)[:, None]
            ids = following if cache is not None else torch.cat([ids, following], dim=1)
    return torch.stack(written, dim=1)

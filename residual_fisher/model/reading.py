"""Reading a prompt's last token: its prediction, as it is and perturbed, in the fastest way that is right for a model.

Three ways, of which the first that agrees with a plain forward pass is taken; nothing else needs to know which.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from residual_fisher.common.program import is_out_of_memory
from residual_fisher.common.text import first_line
from residual_fisher.model.last_token import LAST_TOKEN_ATTENTION, prefill
from residual_fisher.model.loading import decoder_layers
from residual_fisher.model.passes import (
    ROUNDING_NATS,
    UnsupportedModelError,
    add_at_last,
    attention,
    edit_stream,
    hooked,
    require_causal,
    require_known_tokens,
    unwrapped,
)


class Way(Enum):
    """How a pass over the last token, in many rows, comes by what stands before it."""

    SHARED = "shared prefix"  # keys and values that all rows attend to; a row joins at the layer of its perturbation
    COPIED = "copied prefix"  # keys and values copied for each row, for attentions that do more than attend to them
    WHOLE = "whole prompts"  # run again in each row, for models whose memory is not keys and values alone


@dataclass(frozen=True)
class Reading:
    """The last token of one prompt, ready to be run."""

    model: nn.Module
    way: Way
    ids: Tensor  # (1, tokens) int64: what a row of a pass is, the last token or the whole prompt
    prefix: DynamicCache | None  # the tokens before it

    def logits(self, rows: int = 1) -> Tensor:
        """Logits of `rows` copies of the last token, (rows, V) float32."""

        def pick_last(module: nn.Module, args: tuple) -> tuple:
            return (args[0][:, -1:], *args[1:])

        kind = LAST_TOKEN_ATTENTION if self.way is Way.SHARED else "eager"
        ids = self.ids.expand(rows, -1).to(self.model.device)
        head = self.model.get_output_embeddings()
        memory = {"use_cache": False} if self.prefix is None else {"past_key_values": self.prefix, "use_cache": True}
        with attention(self.model, kind), hooked((head.register_forward_pre_hook, pick_last)):
            output = self.model(ids, **memory)
        return output.logits[:, -1].float()

    def perturbed_logits(self, modules: Sequence[nn.Module], deltas: Tensor, at: Tensor) -> Tensor:
        """Logits (rows, V) float32 with deltas (rows, d) added to what leaves one module each, at the last token.

        Args:
            modules: decoder layers, in order.
            at: (rows,) int64 on the CPU, ascending: the index in `modules` of each row's.
        Raises:
            ValueError: `at` is not ascending.
        """
        if (at.diff() < 0).any():
            raise ValueError("the rows' layers must be ascending")
        counts = torch.bincount(at, minlength=len(modules)).tolist()
        starts = [sum(counts[:index]) for index in range(len(counts))]
        # A row is the unperturbed one below its layer, so the batch starts as one row and grows at every layer by the
        # rows perturbed there. What is more than attention may need all rows from the start.
        growing = self.way is Way.SHARED

        def add(index: int) -> Callable[[Tensor], Tensor]:
            here = deltas[starts[index] : starts[index] + counts[index], None]  # (count, 1, d)

            def add_rows(h: Tensor) -> Tensor:
                # the sum is float32 or wider: in half precision, only the result is rounded
                return torch.cat([h, (h[:1] + here.to(h.device)).to(h.dtype)])

            def add_to_own_rows(h: Tensor) -> Tensor:
                padding = (0, 0, 0, 0, starts[index], len(deltas) - starts[index] - counts[index])
                return add_at_last(h, nn.functional.pad(here, padding).to(h.device)).to(h.dtype)

            return add_rows if growing else add_to_own_rows

        hooks = [
            (module.register_forward_hook, edit_stream(add(index)))
            for index, module in enumerate(modules)
            if counts[index]
        ]
        with hooked(*hooks):
            logits = self.logits(rows=1 if growing else len(deltas))
        return logits[-len(deltas) :]


def prepare(model: nn.Module, ids: Tensor, way: Way) -> Reading:
    """The last of `ids` (tokens,) int64, its prefix run, to be read in one way.

    Raises:
        UnsupportedModelError: the model cannot be read in this way.
    """
    if way is Way.WHOLE:
        return Reading(model, way, ids[None], None)
    if way is Way.SHARED and not model.is_backend_compatible():
        raise UnsupportedModelError(f"{type(model).__name__} has an attention of its own")
    with attention(model, "eager"), hooked():
        prefix = prefill(model, ids[:-1], shared=way is Way.SHARED)
    return Reading(model, way, ids[None, -1:], prefix)


# --- the choice ----------------------------------------------------------------------------------

# The way chosen for a model, and the longest prompt that it was right for: a window may make a longer one another case.
_chosen: WeakKeyDictionary[nn.Module, tuple[Way, int]] = WeakKeyDictionary()
PROBE = 0.1  # length of the perturbations that are tried, as a share of the residual stream's


def read(model: nn.Module, ids: Tensor) -> Reading:
    """The last of a prompt's `ids` (tokens,) int64, in the way that is chosen for the model.

    Raises:
        UnsupportedModelError: see `choose_way`.
    """
    return prepare(unwrapped(model), ids, choose_way(model, ids))


def choose_way(model: nn.Module, ids: Tensor) -> Way:
    """The first way whose predictions of this prompt, as it is and perturbed, are those of plain forward passes.

    It is remembered for the model, and tried again with a longer prompt.

    Raises:
        UnsupportedModelError: there is none; or the model is no decoder-only one.
    """
    way, longest = _chosen.get(model, (None, 0))
    if len(ids) <= longest:
        return way
    probe = _probe(model, ids)
    if not probe.expected[0].isfinite().all():
        return Way.WHOLE  # nothing can be compared; what is read next will be NaN as well
    for way in Way:
        try:
            differ = _difference(unwrapped(model), ids, way, probe)
        except Exception as error:  # an architecture may fail in any manner where it was not written for this
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
            continue
        if differ <= ROUNDING_NATS[probe.dtype]:
            break
        reason = f"the cached and plain predictions differ by {differ:.2g} nats"
    else:
        raise UnsupportedModelError(f"no way to read {type(model).__name__} is right: {reason}")
    if way is Way.WHOLE:
        require_causal(unwrapped(model), torch.cat([ids, ids[-1:]])[None], torch.tensor([len(ids)]))
    _chosen[model] = (way, len(ids))
    return way


class _Probe(NamedTuple):
    """Perturbations at the first and the last layer, and what plain forward passes make of them, one by one."""

    modules: list[nn.Module]
    deltas: Tensor  # (3, d): the first is zero
    at: Tensor  # (3,)
    expected: Tensor  # (4, V): log-probabilities unperturbed, and after each
    dtype: torch.dtype


@torch.no_grad()
def _probe(model: nn.Module, ids: Tensor) -> _Probe:
    inner = unwrapped(model)
    if inner.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(inner).__name__} is an encoder-decoder, not a decoder alone")
    require_known_tokens(inner, ids)
    first, *_, last = [*decoder_layers(inner).values()] * 2
    streams = []

    def look(h: Tensor) -> Tensor:
        if h.ndim != 3 or h.shape[:2] != (1, len(ids)):
            raise UnsupportedModelError(f"its layers' output is not (prompts, tokens, d), but {tuple(h.shape)}")
        streams.append(h[0, -1].float())
        return h

    with attention(inner, "eager"), hooked(*((m.register_forward_hook, edit_stream(look)) for m in (first, last))):
        try:
            plain = model(ids[None].to(inner.device), use_cache=False).logits[:, -1]
        except UnsupportedModelError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            name = type(inner).__name__
            raise UnsupportedModelError(f"{name} does not run on token ids alone: {first_line(error)}") from error
    if len(streams) != 2:
        raise UnsupportedModelError(f"the layers of {type(inner).__name__} do not run once each in a pass")
    noise = torch.randn(2, streams[0].shape[-1], generator=torch.Generator().manual_seed(0)).to(streams[0])
    size = PROBE * torch.stack([streams[0].norm(), streams[-1].to(noise).norm()])
    noise = nn.functional.normalize(noise, dim=-1) * size[:, None]
    deltas, at = torch.cat([torch.zeros_like(noise[:1]), noise]), torch.tensor([0, 0, 1])
    alone = prepare(inner, ids, Way.WHOLE)
    moved = [alone.perturbed_logits([m], delta[None], at[:1]) for m, delta in zip((first, last), noise, strict=True)]
    expected = _log_probs(torch.cat([plain, plain, *moved]))
    return _Probe([first, last], deltas, at, expected, inner.dtype)


def _log_probs(logits: Tensor) -> Tensor:
    return logits.cpu().double().log_softmax(-1)  # MPS has no float64


@torch.no_grad()
def _difference(model: nn.Module, ids: Tensor, way: Way, probe: _Probe) -> float:
    """KL in nats, the largest, of what is expected from what is read in this way."""
    reading = prepare(model, ids, way)
    found = torch.cat([reading.logits(), reading.perturbed_logits(probe.modules, probe.deltas, probe.at)])
    log_p, log_q = probe.expected, _log_probs(found)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).max())

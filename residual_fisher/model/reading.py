"""Reading a prompt's last token: its prediction, as it is and perturbed, in the fastest mode that is right.

There are three modes. The first one whose predictions agree with plain forward passes is chosen. Nothing outside this
module has to know which.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
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
    capture_head,
    devices_of,
    edit_stream,
    hooked,
    largest_kl,
    last_token,
    require_causal,
    require_known_tokens,
    unwrapped,
)


class PrefixMode(Enum):
    """Where the rows of a pass over the last token find the prefix, the tokens before it."""

    SHARED = "shared prefix"  # in keys and values that all rows share; a row joins at the layer of its perturbation
    COPIED = "copied prefix"  # in keys and values copied for each row, if attention does more than attend to them
    WHOLE = "whole prompts"  # nowhere: each row runs the whole prompt, if the memory is not keys and values alone


@dataclass(frozen=True)
class Reading:
    """The last token of one prompt, ready to be run."""

    model: nn.Module
    mode: PrefixMode
    ids: Tensor  # (1, tokens) int64, the tokens that each row of a pass runs: the last one, or the whole prompt
    prefix: DynamicCache | None  # the tokens before them

    def logits(self, rows: int = 1) -> Tensor:
        """Logits (rows, V) float32 of `rows` copies of the last token."""
        kind = LAST_TOKEN_ATTENTION if self.mode is PrefixMode.SHARED else "eager"
        ids = self.ids.expand(rows, -1).to(self.model.device)
        memory = {"use_cache": False} if self.prefix is None else {"past_key_values": self.prefix, "use_cache": True}
        with attention(self.model, kind), capture_head(self.model, last_token):
            return self.model(ids, **memory).logits[:, -1].float()

    def perturbed_logits(self, modules: Sequence[nn.Module], deltas: Tensor, at: Tensor) -> Tensor:
        """Logits (rows, V) float32 after perturbations, each added to the output of one module at the last token.

        Args:
            modules: decoder layers, in order.
            deltas: (rows, d).
            at: (rows,) int64 on the CPU, ascending: the index in `modules` of each row's layer.
        Raises:
            ValueError: `at` is not ascending.
        """
        if (at.diff() < 0).any():
            raise ValueError("the rows' layers must be ascending")
        counts = torch.bincount(at, minlength=len(modules)).tolist()
        starts = [sum(counts[:index]) for index in range(len(counts))]
        # Below its layer a row equals the unperturbed one. So the batch starts as one row, and each layer adds the rows
        # that are perturbed there. In the other modes a layer may depend on the number of rows.
        growing = self.mode is PrefixMode.SHARED

        def add(index: int) -> Callable[[Tensor], Tensor]:
            own = deltas[starts[index] : starts[index] + counts[index], None]  # (count, 1, d)

            def add_rows(h: Tensor) -> Tensor:
                # the sum is float32 or wider: in half precision, only the result is rounded
                return torch.cat([h, (h[:1] + own.to(h.device)).to(h.dtype)])

            def add_to_own_rows(h: Tensor) -> Tensor:
                padding = (0, 0, 0, 0, starts[index], len(deltas) - starts[index] - counts[index])
                return add_at_last(h, nn.functional.pad(own, padding).to(h.device)).to(h.dtype)

            return add_rows if growing else add_to_own_rows

        hooks = [
            (module.register_forward_hook, edit_stream(add(index)))
            for index, module in enumerate(modules)
            if counts[index]
        ]
        with hooked(*hooks):
            logits = self.logits(rows=1 if growing else len(deltas))
        return logits[-len(deltas) :]


def read(model: nn.Module, ids: Tensor) -> Reading:
    """The last of a prompt's `ids` (tokens,) int64, in the mode chosen for the model.

    Raises:
        UnsupportedModelError: see `choose_mode`.
    """
    return read_in_mode(unwrapped(model), ids, choose_mode(model, ids))


def read_in_mode(model: nn.Module, ids: Tensor, mode: PrefixMode) -> Reading:
    """The last of a prompt's `ids` (tokens,) int64; runs its prefix.

    Raises:
        UnsupportedModelError: the model cannot be read in this mode.
    """
    if mode is PrefixMode.WHOLE:
        return Reading(model, mode, ids[None], None)
    if mode is PrefixMode.SHARED and not model.is_backend_compatible():
        raise UnsupportedModelError(f"{type(model).__name__} has an attention of its own")
    with attention(model, "eager"), hooked():
        prefix = prefill(model, ids[:-1], shared=mode is PrefixMode.SHARED)
    return Reading(model, mode, ids[None, -1:], prefix)


# --- choosing the mode ---------------------------------------------------------------------------

PROBE = 0.1  # length of the perturbations that are tried, as a share of the residual stream's

# By model, and by its dtype, devices and attention: the mode chosen, and the longest prompt it was found right for.
_chosen: WeakKeyDictionary[nn.Module, dict[tuple, tuple[PrefixMode, int]]] = WeakKeyDictionary()


def choose_mode(model: nn.Module, ids: Tensor) -> PrefixMode:
    """The first mode in which this prompt's predictions, as it is and perturbed, are those of plain forward passes.

    The choice is remembered. It is made again for a longer prompt, which may exceed a window of attention, and if the
    model's dtype, devices or attention have changed.

    Raises:
        UnsupportedModelError: no mode is right, or the model is not decoder-only.
    """
    inner = unwrapped(model)
    chosen = _chosen.setdefault(model, {})
    conditions = (inner.dtype, frozenset(devices_of(inner)), inner.config._attn_implementation)
    mode, longest = chosen.get(conditions, (None, 0))
    if len(ids) <= longest:
        return mode
    probe = _probe(model, ids)
    if not probe.expected[0].isfinite().all():
        return PrefixMode.WHOLE  # nothing can be compared; what is read next will be NaN as well
    for mode in PrefixMode:
        try:
            kl = _departure(inner, ids, mode, probe)
        except Exception as error:  # an unknown architecture may fail in any manner
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
            continue
        if kl <= ROUNDING_NATS[inner.dtype]:
            break
        reason = f"the cached and plain predictions differ by {kl:.2g} nats"
    else:
        raise UnsupportedModelError(f"no way to read {type(model).__name__} is right: {reason}")
    if mode is PrefixMode.WHOLE:
        require_causal(inner, torch.cat([ids, ids[-1:]])[None], torch.tensor([len(ids)]))
    chosen[conditions] = (mode, len(ids))
    return mode


@dataclass(frozen=True)
class _Probe:
    """Perturbations at the first and the last layer, and what plain forward passes make of them, one by one."""

    modules: list[nn.Module]
    deltas: Tensor  # (3, d): the first is zero
    at: Tensor  # (3,) int64
    expected: Tensor  # (4, V): logits unperturbed, and after each perturbation


@torch.no_grad()
def _probe(model: nn.Module, ids: Tensor) -> _Probe:
    inner = unwrapped(model)
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder, not a decoder alone")
    require_known_tokens(inner, ids)
    first, *_, last = [*decoder_layers(inner).values()] * 2  # the same one, if there is one layer
    streams = []

    def note_stream(h: Tensor) -> Tensor:
        if h.ndim != 3 or h.shape[:2] != (1, len(ids)):
            raise UnsupportedModelError(f"its layers' output is not (prompts, tokens, d), but {tuple(h.shape)}")
        streams.append(h[0, -1].float())
        return h

    with (
        attention(inner, "eager"),
        hooked(*((m.register_forward_hook, edit_stream(note_stream)) for m in (first, last))),
    ):
        try:
            plain = model(ids[None].to(inner.device), use_cache=False).logits[:, -1]
        except UnsupportedModelError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            raise UnsupportedModelError(f"{name} does not run on token ids alone: {first_line(error)}") from error
    if len(streams) != 2:
        raise UnsupportedModelError(f"the layers of {name} do not run once each in a pass")
    noise = torch.randn(2, streams[0].shape[-1], generator=torch.Generator().manual_seed(0)).to(streams[0])
    size = PROBE * torch.stack([streams[0].norm(), streams[-1].to(noise).norm()])
    noise = nn.functional.normalize(noise, dim=-1) * size[:, None]
    deltas, at = torch.cat([torch.zeros_like(noise[:1]), noise]), torch.tensor([0, 0, 1])
    alone = read_in_mode(inner, ids, PrefixMode.WHOLE)
    moved = [alone.perturbed_logits([m], delta[None], at[:1]) for m, delta in zip((first, last), noise, strict=True)]
    return _Probe([first, last], deltas, at, torch.cat([plain, plain, *moved]))


@torch.no_grad()
def _departure(model: nn.Module, ids: Tensor, mode: PrefixMode, probe: _Probe) -> float:
    """The largest KL in nats of the expected predictions from those read in this mode."""
    reading = read_in_mode(model, ids, mode)
    found = torch.cat([reading.logits(), reading.perturbed_logits(probe.modules, probe.deltas, probe.at)])
    return largest_kl(probe.expected, found)

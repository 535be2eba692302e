"""Reading a prompt's last token: its prediction, as it is and perturbed, in the fastest mode that is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from residual_fisher.common.program import is_out_of_memory
from residual_fisher.common.text import excerpt, first_line
from residual_fisher.model.last_token import LAST_TOKEN_ATTENTION, after_padding, copy_of, prefill
from residual_fisher.model.loading import decoder_layers, longest_prompt, require_fixed_rotation, rotation_change
from residual_fisher.model.passes import (
    ROUNDING_NATS,
    UnsupportedModelError,
    add_to_rows,
    attention,
    capture_head,
    devices_of,
    edit_stream,
    hooked,
    largest_kl,
    last_logits,
    pad,
    require_causal,
    require_known_tokens,
    unwrapped,
    ways_of,
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
    prompt: Tensor  # (1, tokens) int64
    prefix: DynamicCache | None  # keys and values of all tokens but the last; None if there are none, or for WHOLE

    @property
    def ids(self) -> Tensor:
        """(1, tokens) int64, what each row of a pass runs: the last token, or the whole prompt."""
        return self.prompt if self.mode is PrefixMode.WHOLE else self.prompt[:, -1:]

    def logits(self, rows: int = 1) -> Tensor:
        """Logits (rows, V) float32 of `rows` copies of the last token."""
        shared = self.mode is PrefixMode.SHARED
        kind, ids = LAST_TOKEN_ATTENTION if shared else "eager", self.ids.expand(rows, -1).to(self.model.device)
        memory = {} if self.prefix is None else {"past_key_values": copy_of(self.prefix, rows, shared)}
        with attention(self.model, kind), capture_head(self.model, lambda x: x[:, -1:]):
            return self.model(ids, use_cache=bool(memory), **memory).logits[:, -1].float()

    def perturbed_logits(self, modules: Sequence[nn.Module], deltas: Tensor, at: Tensor) -> Tensor:
        """Logits (rows, V) float32 after perturbations `deltas` (rows, d) of the last token.

        Each is added to the output of `modules[at[row]]`: decoder layers in order, `at` (rows,) int64 on the CPU.
        """
        if (at.diff() < 0).any():
            raise ValueError("the rows' layers must be ascending")
        if self.mode is not PrefixMode.SHARED:  # a layer may depend on the number of rows
            with hooked(*add_to_rows(modules, deltas, at)):
                return self.logits(len(deltas))

        # Below its layer a row equals the unperturbed one. So the batch starts as one row, and each layer appends the
        # rows that are perturbed there.
        def append(module: nn.Module, own: Tensor) -> tuple:
            return edit_stream(module, lambda h: torch.cat([h, (h[:1] + own.to(h.device)).to(h.dtype)]))

        parts = deltas[:, None].split(torch.bincount(at, minlength=len(modules)).tolist())  # (count, 1, d) each
        with hooked(*(append(module, own) for module, own in zip(modules, parts, strict=True) if len(own))):
            return self.logits()[-len(deltas) :]


def read(model: nn.Module, ids: Tensor, mode: PrefixMode) -> Reading:
    """The last of a prompt's `ids` (tokens,) int64; runs its prefix. A model that does not fit the mode may raise."""
    if mode is PrefixMode.WHOLE:
        return Reading(model, mode, ids[None], None)
    if mode is PrefixMode.SHARED and not model.is_backend_compatible():
        raise UnsupportedModelError(f"{type(model).__name__} has an attention of its own")
    with attention(model, "eager"), hooked():
        prefix = prefill(model, ids[None, :-1])
    return Reading(model, mode, ids[None], prefix)


# --- choosing the mode ---------------------------------------------------------------------------

PROBE = 0.1  # length of the perturbations that are tried, as a share of the residual stream's

# By model, by its dtype, devices and attention, and by the rotation of the prompt: the mode chosen, and the longest
# prompt it was found right for.
_chosen: WeakKeyDictionary[nn.Module, dict[tuple, tuple[PrefixMode, int]]] = WeakKeyDictionary()


@torch.no_grad()
def choose_mode(model: nn.Module, ids: Tensor) -> PrefixMode:
    """The first mode in which this prompt's predictions, as it is and perturbed, are those of plain forward passes.

    The choice is remembered. It is made again for a longer prompt, which may exceed a window of attention, for one on
    the other side of `rotation_change`, and if the model's dtype, devices or attention have changed. Just above that
    length, where the prefix alone would be rotated otherwise, a prompt is run as a whole. Raises UnsupportedModelError
    if no mode is right.
    """
    inner = unwrapped(model)
    require_known_tokens(inner, ids)
    require_fixed_rotation(inner, ids)
    chosen = _chosen.setdefault(model, {})
    change = rotation_change(inner)
    changed = (len(ids) - 1 > change, len(ids) > change)  # of the prefix, and of all
    conditions = (*_conditions(inner), changed)
    mode, longest = chosen.get(conditions, (None, 0))
    if len(ids) <= longest:
        return mode
    expected, perturbations = _plain_passes(model, ids)
    if not expected[0].isfinite().all():
        return PrefixMode.WHOLE  # nothing can be compared; what is read next will be NaN as well
    reason = "positions are rotated otherwise from its last token on" if changed == (False, True) else ""
    for mode in [PrefixMode.WHOLE] if changed == (False, True) else PrefixMode:
        try:
            reading = read(inner, ids, mode)
            kl = largest_kl(expected, torch.cat([reading.logits(), reading.perturbed_logits(*perturbations)]))
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
    ways_of(inner)[mode.value] = excerpt(reason, 100) or "the fastest"
    return mode


def _plain_passes(model: nn.Module, ids: Tensor) -> tuple[Tensor, tuple[list[nn.Module], Tensor, Tensor]]:
    """Perturbations at the first and the last layer: what plain forward passes make of them, logits (4, V); themselves.

    They are arguments of `Reading.perturbed_logits`, three rows of which the first is zero. The logits begin with those
    of the intact prompt.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder, not a decoder alone")
    modules = [[*decoder_layers(inner).values()][place] for place in (0, -1)]
    streams = []
    hooks = [edit_stream(module, lambda h: streams.append(h) or h) for module in modules]
    try:
        with attention(inner, "eager"), hooked(*hooks):
            plain = model(ids[None].to(inner.device), use_cache=False).logits[:, -1]
        shapes = [tuple(h.shape) for h in streams]
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(f"{name} does not run on token ids alone: {first_line(error)}") from error
    for shape in shapes:
        if len(shape) != 3 or shape[:2] != (1, len(ids)):
            raise UnsupportedModelError(f"its layers' output is not (prompts, tokens, d), but {shape}")
    if len(shapes) != 2:
        raise UnsupportedModelError(f"the layers of {name} do not run once each in a pass")
    h = torch.stack([h[0, -1].float().to(streams[0].device) for h in streams])  # (2, d)
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
    noise = nn.functional.normalize(noise, dim=-1) * (PROBE * h.norm(dim=-1, keepdim=True))
    deltas, at = torch.cat([torch.zeros_like(noise[:1]), noise]), torch.tensor([0, 0, 1])
    alone = read(inner, ids, PrefixMode.WHOLE)
    moved = [alone.perturbed_logits([m], delta[None], at[:1]) for m, delta in zip(modules, noise, strict=True)]
    return torch.cat([plain, plain, *moved]), (modules, deltas, at)


# By model, by its dtype, devices and attention: whether prompts may be padded, and up to what length that was found.
_padded: WeakKeyDictionary[nn.Module, dict[tuple, tuple[bool, int]]] = WeakKeyDictionary()


@torch.no_grad()
def may_pad(model: nn.Module, prompt: Sequence[int], more: int = 0) -> bool:
    """Whether prompts of up to these tokens, and some more, may be padded on the right and share a cache.

    Where a model tells positions or a window of attention by places in the cache, they may not. So two prompts of
    unlike length are tried: their last tokens, read from one cache, against a plain forward pass. The finding is
    remembered, and made again for longer prompts.
    """
    inner = unwrapped(model)
    length = min(len(prompt) + more, longest_prompt(inner) or math.inf)
    known, conditions = _padded.setdefault(inner, {}), _conditions(inner)
    found, longest = known.get(conditions, (True, 0))
    if not found or length <= longest:
        return found
    text = (list(prompt) * -(-length // len(prompt)))[:length]
    fixed = rotation_change(inner) == math.inf and choose_mode(model, torch.tensor(text)) is not PrefixMode.WHOLE
    known[conditions] = found, length = fixed and _is_padding_hidden(inner, text), length
    return found


def share_prefixes(model: nn.Module, ids: Tensor, lengths: Tensor, more: int = 0) -> bool:
    """Whether the last tokens of prompts, and some more, can be read together, from prefixes in one cache.

    `ids` (prompts, tokens) are padded on the right, `lengths` (prompts,) on the CPU.
    """
    longest = ids[lengths.argmax(), : lengths.max()].cpu()
    if choose_mode(model, longest) is not PrefixMode.SHARED:
        return False
    if (lengths == len(longest)).all() or may_pad(model, longest.tolist(), more):
        return True
    ways_of(model)["batches"] = "whole prompts: those of unlike length cannot share a cache"
    return False


def _is_padding_hidden(model: nn.Module, text: list[int]) -> bool:
    ids, lengths = pad([text, text[: -(-len(text) // 2)]])
    last, prefix, width = ids[[0, 1], lengths - 1][:, None], lengths - 1, ids.shape[1] - 1
    try:
        with attention(model, "eager"), hooked():
            memory = {"past_key_values": prefill(model, ids[:, :-1]), **after_padding(model, prefix, width, width, 1)}
            read = model(last.to(model.device), use_cache=True, **memory).logits[:, -1]
            return largest_kl(last_logits(model, ids, lengths), read) <= ROUNDING_NATS[model.dtype]
    except Exception as error:  # an unknown architecture may fail in any manner
        if is_out_of_memory(error):
            raise
        return False


def _conditions(model: nn.Module) -> tuple:
    """What a finding about a model depends on."""
    return model.dtype, frozenset(devices_of(model)), model.config._attn_implementation

"""Constant prefixes of prompts, and the attention of their last tokens over them.

The tokens before the last one are run once, into a key-value cache that later passes do not change. Those passes run
the last token alone, or with an answer's tokens; in one row of a prompt or in many, with or without gradients.
"""

from copy import copy
from inspect import signature
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

from residual_fisher.model.passes import UnsupportedModelError, hooked, require_known_tokens

LAST_TOKEN_ATTENTION = "fisher_last_token"
# Classes of cache layers that hold keys and values alone, or nothing. Older versions of transformers lack the last one.
PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


class _PrefixProduct(torch.autograd.Function):
    """a @ b (rows, groups, share, m) of a (rows, groups, share, n) with b (1 or rows, groups, n, m).

    b is a constant without a gradient, one for all rows or one for each. It takes one matrix product per group and
    constant, also under vmap, whose own rule would copy b for every row.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        if len(b) > 1:
            return a @ b
        rows, groups, share, n = a.shape
        product = a.transpose(0, 1).reshape(groups, rows * share, n) @ b[0]
        return product.reshape(groups, rows, share, -1).transpose(0, 1)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (b,) = ctx.saved_tensors
        return _PrefixProduct.apply(grad, b.mT), None

    @staticmethod
    def vmap(info, in_dims: tuple[int, None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        at = 2 if len(b) > 1 else 0  # the new rows join those that share a constant
        product = _PrefixProduct.apply(a.movedim(in_dims[0], at).flatten(at, at + 1), b)
        return product.unflatten(at, (info.batch_size, -1)), at


def last_token_attention(
    module: nn.Module,
    query: Tensor,  # (rows, heads, n, head_dim)
    key: Tensor,  # (rows, groups, n, head_dim): heads / groups query heads share a key head
    value: Tensor,  # (rows, groups, n, value_dim)
    attention_mask: Tensor | None,  # (1 or rows, 1, n, tokens), added to the scores
    scaling: float | None = None,
    softcap: float | None = None,  # Gemma 2
    s_aux: Tensor | None = None,  # (heads,): attention sinks, gpt-oss
    **_,
) -> tuple[Tensor, None]:
    """Softmax attention of the last n tokens over themselves and the prefix that their key and value carry.

    n is 1, or 1 and the tokens of an answer. The keys and values of the prefix do not depend on these tokens: they are
    constants, the same for every row or of each row's own prompt. So a batched backward pass carries no (tokens,
    head_dim) gradient per cotangent, head and layer (half of its time on a CPU), and a batched forward pass does not
    copy the prefix. Fused kernels are not used: their backward has no batching rule.
    """
    rows, heads, n, width = query.shape
    groups = key.shape[1]
    share = heads // groups
    q = query.reshape(rows, groups, share * n, width)
    scores = (q * key).sum(-1, keepdim=True) if n == 1 else q @ key.mT  # (rows, groups, share * n, n)
    if hasattr(key, "prefix"):
        scores = torch.cat([_PrefixProduct.apply(q, key.prefix.mT), scores], dim=-1)
    if attention_mask is not None and attention_mask.shape[-1] != scores.shape[-1]:  # the key has lost its prefix
        raise UnsupportedModelError(f"the attention of {type(module).__name__} changes keys after they are cached")
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask.repeat(1, 1, share, 1) if n > 1 else scores + attention_mask
    if s_aux is not None:
        sink = s_aux.repeat_interleave(n).reshape(1, groups, share * n, 1).expand(rows, -1, -1, -1)
        scores = torch.cat([sink.to(scores.dtype), scores], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    if s_aux is not None:
        weights = weights[..., 1:]
    out = weights[..., -1:] * value if n == 1 else weights[..., -n:] @ value
    if hasattr(value, "prefix"):
        out = out + _PrefixProduct.apply(weights[..., :-n], value.prefix)
    return out.reshape(rows, heads, n, -1).transpose(1, 2), None


AttentionInterface.register(LAST_TOKEN_ATTENTION, last_token_attention)
AttentionMaskInterface.register(LAST_TOKEN_ATTENTION, eager_mask)


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor) -> DynamicCache | None:
    """A cache of the keys and values of `ids` (rows, tokens), all but the last of a prompt; None if there are none."""
    if "past_key_values" not in signature(model.forward).parameters:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no key-value cache")
    if ids.shape[1] == 0:
        return None
    cache = DynamicCache(config=model.config)
    model.base_model(ids.to(model.device), past_key_values=cache, use_cache=True)  # no head
    for layer in cache.layers:
        # The exact type counts: its subclasses, in recurrent and hybrid models, hold states that a pass changes.
        if type(layer).__name__ not in PLAIN_LAYERS:
            raise UnsupportedModelError(f"a cache of {type(layer).__name__} holds more than keys and values")
    return cache


def copy_of(prefix: DynamicCache, rows: int, shared: bool = False) -> DynamicCache:
    """A copy of `prefill`'s cache that grows with every pass over the same `rows`, and leaves the prefix as it is.

    If it is `shared`, it never grows and serves any number of rows, in passes with `last_token_attention`.
    """
    cache = copy(prefix)
    cache.layers = [copy(layer) for layer in prefix.layers]
    for layer in cache.layers:
        if layer.keys is None:  # the layer has no attention, or uses another layer's keys
            continue
        if shared:
            layer.update = MethodType(_carry_prefix, layer)
        else:  # `update` puts new tensors in place of these
            layer.keys, layer.values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
    return cache


def prefill_prompts(model: nn.Module, ids: Tensor, lengths: Tensor) -> DynamicCache | None:
    """`prefill` of all tokens but the last of each prompt.

    Args:
        ids: (prompts, tokens) int64, padded on the right with any token.
        lengths: (prompts,) int64 on the CPU.
    """
    require_known_tokens(model, ids)
    with hooked():
        return prefill(model, ids[:, : int(lengths.max()) - 1])


def prefix_memory(model: nn.Module, prefix: DynamicCache | None, lengths: Tensor, tokens: int) -> dict:
    """Keyword arguments of a pass, with `last_token_attention`, over `tokens` of each prompt from its last one on.

    Args:
        prefix: of `prefill_prompts`, with the same lengths.
    """
    if prefix is None:
        return {}
    before = int(lengths.max()) - 1
    shared = {"past_key_values": copy_of(prefix, len(lengths), shared=True)}
    return shared | after_padding(model, lengths - 1, before, before, tokens)


def after_padding(model: nn.Module, lengths: Tensor, width: int, cached: int, tokens: int) -> dict:
    """Keyword arguments of a pass over the next `tokens` of each row, if the rows' prompts were padded.

    The cache holds `cached` tokens a row: first a prompt of `lengths` (rows,) tokens padded on the right to `width`,
    then others. Without padding there are none: the arguments are then the model's defaults.
    """
    if (lengths == width).all():
        return {}
    real = torch.arange(width) < lengths[:, None]  # (rows, width)
    mask = torch.cat([real, real.new_ones(len(lengths), cached - width + tokens)], dim=1)
    arguments = {"attention_mask": mask.long().to(model.device)}
    if "position_ids" in signature(model.forward).parameters:  # others tell positions from the mask
        arguments["position_ids"] = (lengths[:, None] + cached - width + torch.arange(tokens)).to(model.device)
    return arguments


def _carry_prefix(layer: DynamicLayer, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
    """Replaces `update` of a cache layer: the prefix is attached to the last token's key and value."""
    key.prefix, value.prefix = layer.keys, layer.values
    return key, value

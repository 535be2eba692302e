"""A prompt's prefix that stays as it is, and the attention of its last token over it.

The tokens before the last one are run once, into a key-value cache that nothing changes: later passes are of
the last token alone, in one row or in many, with or without gradients.
"""

from copy import copy
from inspect import signature
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

from residual_fisher.model.passes import UnsupportedModelError

LAST_TOKEN_ATTENTION = "fisher_last_token"
# Cache layers of keys and values alone, or of nothing; by name, since older versions of transformers lack the last.
PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


class _SharedProduct(torch.autograd.Function):
    """a @ b (rows, groups, share, m) of a (rows, groups, share, n) with b (groups, n, m), which all rows share.

    b is a constant: it takes no gradient. One matrix product per group whatever the rows, also under
    vmap, whose own rule would copy b once for every row.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        rows, groups, share, n = a.shape
        product = a.transpose(0, 1).reshape(groups, rows * share, n) @ b
        return product.reshape(groups, rows, share, -1).transpose(0, 1)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (b,) = ctx.saved_tensors
        return _SharedProduct.apply(grad, b.mT), None

    @staticmethod
    def vmap(info, in_dims: tuple[int, None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        rows = a.movedim(in_dims[0], 0).flatten(0, 1)
        return _SharedProduct.apply(rows, b).unflatten(0, (info.batch_size, -1)), 0


def last_token_attention(
    module: nn.Module,
    query: Tensor,  # (rows, heads, 1, head_dim)
    key: Tensor,  # (rows, groups, 1, head_dim): heads / groups query heads share a key head
    value: Tensor,  # (rows, groups, 1, value_dim)
    attention_mask: Tensor | None,  # (1 or rows, 1, 1, tokens), added to the scores
    scaling: float | None = None,
    softcap: float | None = None,  # Gemma 2
    s_aux: Tensor | None = None,  # (heads,): attention sinks, gpt-oss
    **_,
) -> tuple[Tensor, None]:
    """Softmax attention of one query token over itself and the prefix that its key and value carry.

    Nothing in the prefix depends on the last token, so its keys and values are constants, the same for
    every row. Saying so keeps a batched backward pass from carrying a (tokens, head_dim) gradient per
    cotangent, head and layer (half of the whole pass on a CPU), and a batched forward pass from
    copying the prefix for every row. The operations are plain ones: fused attention kernels have no
    batching rule for their backward.

    Raises:
        UnsupportedModelError: the model changed the key after it was cached, and lost the prefix.
    """
    rows, heads, _, width = query.shape
    groups = key.shape[1]
    q = query.reshape(rows, groups, heads // groups, width)
    scores = (q * key).sum(-1, keepdim=True)  # (rows, groups, share, 1)
    if hasattr(key, "prefix"):
        scores = torch.cat([_SharedProduct.apply(q, key.prefix[0].mT), scores], dim=-1)
    if attention_mask is not None and attention_mask.shape[-1] != scores.shape[-1]:
        raise UnsupportedModelError(f"the attention of {type(module).__name__} changes keys after they are cached")
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        sink = s_aux.reshape(1, groups, heads // groups, 1).expand(rows, -1, -1, -1)
        scores = torch.cat([sink.to(scores.dtype), scores], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    if s_aux is not None:
        weights = weights[..., 1:]
    out = weights[..., -1:] * value
    if hasattr(value, "prefix"):
        out = out + _SharedProduct.apply(weights[..., :-1], value.prefix[0])
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register(LAST_TOKEN_ATTENTION, last_token_attention)
AttentionMaskInterface.register(LAST_TOKEN_ATTENTION, eager_mask)


def _carry_prefix(layer: DynamicLayer, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
    """What a constant cache does in place of growing: the last token's key and value take the prefix along."""
    key.prefix, value.prefix = layer.keys, layer.values
    return key, value


def _copy_prefix(layer: DynamicLayer, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
    """The same for an attention other than `last_token_attention`: the prefix is copied for every row."""
    rows = key.shape[0]
    keys = torch.cat([layer.keys.expand(rows, -1, -1, -1), key], dim=-2)
    values = torch.cat([layer.values.expand(rows, -1, -1, -1), value], dim=-2)
    return keys, values


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor, shared: bool) -> DynamicCache | None:
    """Keys and values of a prompt's tokens, in a cache that later passes read but never change.

    A pass over more rows than one sees the same prefix in each of them.

    Args:
        ids: (tokens,) int64, all the prompt but its last token; may be empty (returns None).
        shared: the later passes' attention is `last_token_attention`.
    Raises:
        UnsupportedModelError: the model has no cache of plain keys and values (recurrent and hybrid models).
    """
    if "past_key_values" not in signature(model.forward).parameters:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no key-value cache")
    if len(ids) == 0:
        return None
    cache = DynamicCache(config=model.config)
    model.base_model(ids[None].to(model.device), past_key_values=cache, use_cache=True)  # no head
    for layer in cache.layers:
        # by exact type: caches with a state beside the keys and values, which a pass changes, subclass the plain ones
        if type(layer).__name__ not in PLAIN_LAYERS:
            raise UnsupportedModelError(f"a cache of {type(layer).__name__} holds more than keys and values")
        if layer.keys is not None:  # else the layer has none, or uses another's
            layer.update = MethodType(_carry_prefix if shared else _copy_prefix, layer)
    return cache


def growing_copy(prefix: DynamicCache, rows: int) -> DynamicCache:
    """The cache of `prefill` once more, as a cache that grows with every pass over the same `rows`."""
    cache = copy(prefix)
    cache.layers = [copy(layer) for layer in prefix.layers]
    for layer in cache.layers:
        if layer.keys is not None:
            del layer.update  # its class's own, which puts new tensors in place of these
            layer.keys, layer.values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
    return cache

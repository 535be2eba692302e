"""The last token of a prompt, over a prefix that stays as it is.

The tokens before the last one are run once, into a key-value cache that nothing changes; every later
pass is of the last token alone, in one row or in many, with or without gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

from model.passes import UnsupportedModelError, edit_stream, hooked

LAST_TOKEN_ATTENTION = "fisher_last_token"


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


@contextmanager
def constant_prefix(model: nn.Module) -> Iterator[None]:
    """Runs the model's attention as `last_token_attention`, then gives the model its own back.

    Architectures that bring their own attention (BLOOM, Falcon) keep it: as right, but slower.
    """
    if not model.is_backend_compatible():
        yield
        return
    own = model.config._attn_implementation
    model.set_attn_implementation(LAST_TOKEN_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


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
def prefill(model: nn.Module, ids: Tensor) -> DynamicCache | None:
    """Keys and values of a prompt's tokens, in a cache that later passes read but never change.

    A pass over more rows than one sees the same prefix in each of them.

    Args:
        ids: (tokens,) int64, all the prompt but its last token; may be empty (returns None).
    Raises:
        UnsupportedModelError: the model has no cache of plain keys and values (recurrent and hybrid models).
    """
    if "past_key_values" not in signature(model.forward).parameters:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no key-value cache")
    if len(ids) == 0:
        return None
    cache = DynamicCache(config=model.config)
    model.base_model(ids[None].to(model.device), past_key_values=cache, use_cache=True)  # no head
    update = _carry_prefix if model.is_backend_compatible() else _copy_prefix
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):
            raise UnsupportedModelError(f"a cache of {type(layer).__name__} is not supported: keys and values only")
        layer.update = MethodType(update, layer)
    return cache


def last_token_logits(model: nn.Module, token: Tensor, prefix: DynamicCache | None, rows: int) -> Tensor:
    """Logits of `rows` copies of the last token, (rows, V) float32."""
    ids = token.reshape(1, 1).expand(rows, 1).to(model.device)
    with constant_prefix(model):
        output = model(ids, past_key_values=prefix, use_cache=prefix is not None)
    return output.logits[:, -1].float()


def perturbed_logits(
    model: nn.Module,
    modules: Sequence[nn.Module],
    token: Tensor,
    prefix: DynamicCache | None,
    deltas: Tensor,
    at: Tensor,
) -> Tensor:
    """Logits (rows, V) float32 of the last token with deltas (rows, d) added to what leaves one module each.

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
    # rows perturbed there. Architectures with an attention of their own need all rows from the start.
    growing = model.is_backend_compatible()

    def add(index: int) -> Callable[[Tensor], Tensor]:
        here = deltas[starts[index] : starts[index] + counts[index], None]  # (count, 1, d)

        def add_rows(h: Tensor) -> Tensor:
            # the sum is float32 or wider: in half precision, only the result is rounded
            return torch.cat([h, (h[:1] + here.to(h.device)).to(h.dtype)])

        def add_to_own_rows(h: Tensor) -> Tensor:
            padding = (0, 0, 0, 0, starts[index], len(deltas) - starts[index] - counts[index])
            return (h + nn.functional.pad(here, padding).to(h.device)).to(h.dtype)

        return add_rows if growing else add_to_own_rows

    hooks = [
        (module.register_forward_hook, edit_stream(add(index))) for index, module in enumerate(modules) if counts[index]
    ]
    with hooked(*hooks):
        logits = last_token_logits(model, token, prefix, rows=1 if growing else len(deltas))
    return logits[-len(deltas) :]

"""A whole text in one pass, in which every token is on its own: what earlier tokens hold is constant for later ones.

A token's keys and values lead to the predictions of all later tokens. Here, in the graph, they lead to its own alone.
So one backward pass with cotangents at all tokens gives each token the gradients of its own prediction, the same that a
pass over the text up to it gives. The text takes as many backward passes as one of its tokens.
"""

from inspect import signature

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from residual_fisher.model.last_token import PLAIN_LAYERS, last_token_attention
from residual_fisher.model.passes import UnsupportedModelError, attention, capture_head

EACH_TOKEN_ATTENTION = "fisher_each_token"


def each_token_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head_dim)
    key: Tensor,  # (1, groups, known, head_dim): of earlier tokens, then of these
    value: Tensor,  # (1, groups, known, value_dim)
    attention_mask: Tensor,  # (1, 1, tokens, known), added to the scores
    **options,
) -> tuple[Tensor, None]:
    """The attention of each token as if it were the last one: a row of `last_token_attention` for each.

    All rows share one constant prefix, the keys and values of all tokens. The mask hides a row's own place there, and
    those after it.
    """
    tokens, known = query.shape[2], key.shape[2]
    if attention_mask is None or attention_mask.shape != (1, 1, tokens, known):
        raise UnsupportedModelError(f"the attention of {type(module).__name__} has another mask than one for all heads")

    def rows(part: Tensor) -> Tensor:  # (tokens, heads or groups, 1, width)
        return part[0, :, -tokens:].transpose(0, 1)[:, :, None]

    own_key, own_value = rows(key), rows(value)
    own_key.prefix, own_value.prefix = key.detach(), value.detach()
    mask = attention_mask[0, 0]  # (tokens, known)
    places = torch.arange(known, device=mask.device) - (known - tokens)  # -1 and less: before this block
    itself = places == torch.arange(tokens, device=mask.device)[:, None]  # (tokens, known)
    hidden = mask.masked_fill(itself, torch.finfo(mask.dtype).min)
    mask = torch.cat([hidden, mask.diagonal(known - tokens)[:, None]], dim=1)  # (tokens, known + 1)
    out, _ = last_token_attention(module, rows(query), own_key, own_value, mask[:, None, None], **options)
    return out.transpose(0, 1), None  # (1, tokens, heads, value_dim)


AttentionInterface.register(EACH_TOKEN_ATTENTION, each_token_attention)
AttentionMaskInterface.register(EACH_TOKEN_ATTENTION, eager_mask)


class EachToken:
    """Passes over the blocks of one text, from its first token on. The keys and values of a block stay for the next."""

    def __init__(self, model: nn.Module):
        """Raises UnsupportedModelError: its memory is more than keys and values, or its attention is its own."""
        if "past_key_values" not in signature(model.forward).parameters or not model.is_backend_compatible():
            raise UnsupportedModelError(f"{type(model).__name__} has an attention or a memory of its own")
        self.model, self.cache = model, DynamicCache(config=model.config)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (tokens, V) float32 after each of the next `ids` (tokens,), with a graph from each token to its own.

        Inside `hooked`, the hooks see streams of shape (1, tokens, d).
        """
        memory = {"past_key_values": self.cache, "use_cache": True}
        with attention(self.model, EACH_TOKEN_ATTENTION), capture_head(self.model):
            logits = self.model(ids[None].to(self.model.device), **memory).logits[0].float()
        for layer in self.cache.layers:
            if type(layer).__name__ not in PLAIN_LAYERS:
                raise UnsupportedModelError(f"a cache of {type(layer).__name__} holds more than keys and values")
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return logits

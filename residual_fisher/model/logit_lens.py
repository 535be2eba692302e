"""The logit lens: what the model would predict if a residual stream were the one that leaves its last layer."""

import torch
from torch import Tensor, nn

from residual_fisher.model.loading import decoder_layers
from residual_fisher.model.passes import ROUNDING_NATS, capture_head, edit_stream, hooked, largest_kl, unwrapped

PROBED = 5  # any token but the one that `lens_logits` runs


@torch.no_grad()
def lens_logits(model: nn.Module, streams: Tensor) -> Tensor:
    """Logits (rows, V) float32 of residual streams (rows, d), through what follows the last layer (its norm, the head).

    One token is run, and the streams take the place of its own behind the last layer. So whatever follows it counts.
    """
    return _run(model, 0, lambda h: streams.to(h)[:, None])


def has_lens(model: nn.Module) -> bool:
    """Whether the prediction follows from the stream that leaves the last layer, and from nothing else."""
    streams = []
    plain = _run(model, PROBED, lambda h: streams.append(h[:, -1].detach()) or h)
    try:
        return largest_kl(plain, lens_logits(model, streams[0])) <= ROUNDING_NATS[unwrapped(model).dtype]
    except (RuntimeError, IndexError, ValueError):  # the stream has another shape
        return False


@torch.no_grad()
def _run(model: nn.Module, token: int, edit) -> Tensor:
    model = unwrapped(model)
    *_, last = decoder_layers(model).values()
    with hooked(edit_stream(last, edit)), capture_head(model):
        ids = torch.full((1, 1), token, device=model.device)
        return model(ids, use_cache=False).logits[:, -1].float()

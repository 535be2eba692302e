"""Pushing the residual stream at a prompt's last token, and what the model then predicts."""

from collections.abc import Callable, Sequence
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fisher import Chunks, NumericalError, edit_stream, hooked
from last_token import last_token_logits

DEPARTURE = 0.1  # relative, of KL from its quadratic prediction
# predicted nats between which a trust radius is looked for, in so many steps; then, twice, in so many parts
NATS, GRID, CUTS = (1e-5, 1e2), 12, 6
LARGE_KL = 0.1  # nats: above it, the rounding of a plain log-sum-exp (1e-6) no longer matters


def kl_divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) in nats (rows,) of p = exp(log_p) (V,) and q = softmax(logits) (rows, V).

    KL = log E_p[exp(u)] - E_p[u] with u = logits - log_p, which no shift of u changes. Shifted to
    E_p[u] = 0, and with expm1 and log1p, what is left is of second order in u: 1e-10 nats is right in
    float32, where the sum of p (log p - log q) is noise below 1e-7. Large divergences, whose
    exp(u) would overflow, are taken as they stand.
    """
    p = log_p.exp()
    u = logits - log_p
    mean = u @ p
    far = logits.logsumexp(-1) - mean
    u -= mean[..., None]
    left = u @ p  # rounding of the mean
    near = torch.log1p(u.clamp_(max=80).expm1_() @ p) - left
    return torch.where(far > LARGE_KL, far, near.clamp(min=0))


class Sweep(NamedTuple):
    """The next-token distribution after each push."""

    kl: Tensor  # (rows,) float32, KL(unperturbed || perturbed) in nats
    top_ids: Tensor  # (rows, top) int64, the most probable tokens, descending
    top_log_probs: Tensor  # (rows, top) float32, nats
    target_log_prob: Tensor  # (rows,) float32, nats, of the one token asked about


@torch.no_grad()
def sweep(
    model: nn.Module,
    layers: Sequence[nn.Module],
    token: Tensor,
    prefix: DynamicCache | None,
    log_probs: Tensor,
    deltas: Tensor,
    at_layer: Tensor,
    target: int = 0,
    top: int = 5,
    chunks: Chunks | None = None,
) -> Sweep:
    """Pushes the last token's residual stream and reads the predictions; every push is a row of a batch.

    Args:
        layers, token, prefix: as in `linearize`.
        log_probs: (V,) float32, the unperturbed distribution.
        deltas: (rows, d) float32, what is added to the residual stream.
        at_layer: (rows,) int64 on the CPU, ascending: the index in `layers` of the one layer where row r
            is pushed.
        target: a token whose probability to return.
        top: how many of the most probable tokens to return.
    Raises:
        NumericalError: a push led to logits that hold NaN or infinity.
        ValueError: at_layer is not ascending.
    """

    if (at_layer.diff() < 0).any():
        raise ValueError("at_layer must be ascending")
    # A row is the unperturbed one below its layer, so the batch starts as one row and grows at every
    # layer by the rows pushed there. Architectures with an attention of their own need all rows from
    # the start.
    growing = model.is_backend_compatible()

    def chunk(deltas: Tensor, at_layer: Tensor) -> Sweep:
        counts = torch.bincount(at_layer, minlength=len(layers)).tolist()
        starts = [sum(counts[:index]) for index in range(len(counts))]

        def push(index: int) -> Callable[[Tensor], Tensor]:
            here = deltas[starts[index] : starts[index] + counts[index], None]  # (count, 1, d)

            def grow(h: Tensor) -> Tensor:
                # the sum is float32 or wider: in half precision, only the result is rounded
                return torch.cat([h, (h[:1] + here.to(h.device)).to(h.dtype)])

            def add(h: Tensor) -> Tensor:
                padding = (0, 0, 0, 0, starts[index], len(deltas) - starts[index] - counts[index])
                return (h + nn.functional.pad(here, padding).to(h.device)).to(h.dtype)

            return grow if growing else add

        hooks = [
            (layer.register_forward_hook, edit_stream(push(index)))
            for index, layer in enumerate(layers)
            if counts[index]
        ]
        with hooked(*hooks):
            logits = last_token_logits(model, token, prefix, rows=1 if growing else len(deltas))
        logits = logits[-len(deltas) :].to(log_probs.device)
        kl = kl_divergence(log_probs, logits)
        normalizer = logits.logsumexp(-1)
        top_logits, top_ids = logits.topk(top)
        return Sweep(kl, top_ids, top_logits - normalizer[:, None], logits[:, target] - normalizer)

    parts = (chunks or Chunks()).map(chunk, deltas, at_layer)
    result = Sweep(*(torch.cat(column) for column in zip(*parts, strict=True)))
    bad = (~result.kl.isfinite()).nonzero()
    if len(bad):
        layer = int(at_layer[int(bad[0, 0])])
        raise NumericalError("the logits after a push hold NaN or infinity", layer=layer)
    return result


def trust_radii(kl_of: Callable[[Tensor], Tensor], curvature: Tensor) -> Tensor:
    """The step lengths (rows,) at which KL first departs by DEPARTURE from 1/2 s^2 u^T F u, one a direction u.

    Found by sections: KL at a grid of steps for all directions at once, then twice at CUTS steps between the two
    where it departed; the result is right to 1%. NaN where the departure begins below what the model's rounding
    allows to be seen (KL at step 0 is not 0 in half precision); infinity where there is none up to 100 predicted
    nats.

    Args:
        kl_of: KL in nats (rows, n) after steps (rows, n).
        curvature: u^T F u (rows,), of the whole vocabulary.
    """
    curvature = curvature[:, None]
    nats = torch.logspace(*(math.log10(end) for end in NATS), GRID, device=curvature.device)
    steps = torch.cat([torch.zeros_like(curvature), (2 * nats / curvature).sqrt()], dim=1)
    kl = kl_of(steps)
    # at each of these the noise is at most a tenth of the departure looked for
    seen = nats * DEPARTURE >= 10 * kl[:, :1]
    departs = ((kl[:, 1:] / nats - 1).abs() > DEPARTURE) & seen
    first = departs.int().argmax(dim=1, keepdim=True)  # 0 if none does
    below = (first == seen.int().argmax(dim=1, keepdim=True)) | ~seen.any(dim=1, keepdim=True)
    none = ~departs.any(dim=1, keepdim=True)

    low, high = steps.gather(1, first), steps.gather(1, first + 1)
    low = torch.where(low > 0, low, high / 2)
    for _ in range(2):
        cuts = low * (high / low) ** (torch.arange(CUTS + 2, device=low.device) / (CUTS + 1))
        kl = kl_of(cuts[:, 1:-1])
        departs = (kl / (0.5 * cuts[:, 1:-1] ** 2 * curvature) - 1).abs() > DEPARTURE
        departs = torch.cat([departs, torch.ones_like(none)], dim=1)
        first = departs.int().argmax(dim=1, keepdim=True)
        low, high = cuts.gather(1, first), cuts.gather(1, first + 1)
    radius = (low * high).sqrt()
    return torch.where(none & seen.any(dim=1, keepdim=True), math.inf, torch.where(below, math.nan, radius))[:, 0]

"""Next-token distributions: their most probable tokens, how far apart two are, and what perturbations make of one."""

from typing import NamedTuple

import torch
from torch import Tensor

from residual_fisher.model.passes import Chunks
from residual_fisher.model.points import Point, perturb

LARGE_KL = 0.1  # nats; above it the rounding of a plain log-sum-exp, 1e-6 nats, no longer matters
# The predicted nats of each perturbation (the next term of KL may be too large for the first, not for the last), the
# nats that rounding hides, and the largest ratio allowed between the changes and their prediction.
FULL_PRECISION = (1e-4, 1e-6, 1e-7), 1e-8, 1.2
DOUBLE_PRECISION = (1e-4, 1e-6, 1e-8, 1e-10), 1e-11, 1.2  # logits are float32 in the end
# A logit of 20 is rounded to 0.06, and 0.1 nats change logits by about 0.4. A token may also switch experts.
HALF_PRECISION = (0.1, 0.03), 0.02, 2.0


def most_probable(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of logits or log-probabilities (..., V) in descending order, and their tokens; both (..., k).

    Of equal ones, which half precision often has, the lower token comes first. `topk` orders them as it likes.
    """
    values, tokens = logits.topk(min(k + 1, logits.shape[-1]))  # one more: it may equal the last
    tied = (values[..., 1:] == values[..., :-1]).any(-1)
    if tied.any():
        ordered = logits[tied].sort(descending=True, stable=True)
        values[tied], tokens[tied] = (part[..., : values.shape[-1]] for part in ordered)
    return values[..., :k], tokens[..., :k]


def kl_divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) in nats (rows,) of p = exp(log_p) (V,) and q = softmax(logits) (rows, V).

    With u = logits - log_p, KL = log E_p[exp(u)] - E_p[u], whatever constant is added to u. With u shifted to
    E_p[u] = 0, and with expm1 and log1p, only terms of second order in u remain. So 1e-10 nats is right in float32,
    where the sum of p (log p - log q) is noise below 1e-7. Large KL, whose exp(u) would overflow, needs none of this.
    """
    p = log_p.exp()
    u = logits - log_p
    mean = u @ p
    far = logits.logsumexp(-1) - log_p.logsumexp(-1) - mean  # a float32 log-softmax is normalised to 1e-5 only
    u -= mean[..., None]
    left = u @ p  # what rounding left of the mean
    far -= left
    near = torch.log1p(u.clamp_(max=80).expm1_() @ p) - left
    return torch.where(far > LARGE_KL, far, near.clamp(min=0))


class Sweep(NamedTuple):
    """The next-token distribution after each perturbation. KL is not finite where the model overflowed."""

    kl: Tensor  # (...) float32, KL(unperturbed || perturbed) in nats
    top_ids: Tensor  # (..., top) int64, the most probable tokens, descending
    top_log_probs: Tensor  # (..., top) float32, nats
    target_log_prob: Tensor  # (...) float32, nats, of one chosen token


def sweep(
    point: Point,
    deltas: Tensor,
    target: int = 0,
    top: int = 5,
    chunks: Chunks | None = None,
    at: Tensor | None = None,
) -> Sweep:
    """Perturbs the prompt's last token and returns the predictions. Every perturbation is a row of a batch.

    Args:
        deltas: (layers, ..., d) float32, each added to the residual stream at its own layer.
        target: the token for `target_log_prob`.
        top: number of most probable tokens to return.
        at: (layers,) int64, ascending numbers of layers, if these are not the point's. One may stand there repeatedly.
    """
    shape, rows = deltas.shape[:-1], deltas.flatten(0, -2)
    at = (torch.tensor(point.layers) if at is None else at).repeat_interleave(deltas[0, ..., 0].numel())

    def chunk(deltas: Tensor, at: Tensor) -> Sweep:
        logits = perturb(point, deltas, at)
        normalizer = logits.logsumexp(-1)
        top_logits, top_ids = most_probable(logits, top)
        kl = kl_divergence(point.log_probs, logits)
        return Sweep(kl, top_ids, top_logits - normalizer[:, None], logits[:, target] - normalizer)

    parts = (chunks or Chunks()).map(chunk, rows, at)
    return Sweep(*(torch.cat(column).unflatten(0, shape) for column in zip(*parts, strict=True)))

"""The output head, linearised: from its input x, the final normalised hidden state, to all log-probabilities."""

import numpy as np
import torch
from torch import Tensor, nn

from residual_fisher.model.passes import UnsupportedModelError, batched_gradients

VOCABULARY_CHUNK = 4096  # rows of the head turned to float32 at a time: 64 MB at d = 4096
HEAD_ROWS = 256  # unit vectors that go through a head at a time, to find its weight
# Largest relative error of a head's output that is rounding, by dtype: outputs are sums of thousands of products.
HEAD_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class OutputHead:
    """The derivatives of all log-probabilities with respect to the head's input x, for one prompt or a batch.

    For a linear head with logits = phi(W x + b), phi elementwise, they are the rows of the (V, d_head) matrix S,

        s_t = d log p_t / dx = phi'_t W_t - sum_c p_c phi'_c W_c

    phi is what the model does after its head: nothing, a scale (Cohere, Granite) or a soft cap (Gemma 2). Its slope
    phi' is the gradient of the sum of the logits. The Fisher matrix with respect to x is
    C = sum_t p_t s_t s_t^T = S^T diag(p) S. S is never in memory as a whole.
    """

    def __init__(self, head: nn.Module, x: Tensor, raw_logits: Tensor, logits: Tensor, log_probs: Tensor):
        """The arguments are attributes of `fisher.Point`. Raises UnsupportedModelError if the head is not linear."""
        if isinstance(head, nn.Linear) and head.weight.is_meta:
            raise UnsupportedModelError("the whole vocabulary needs the output head on a device, and it is offloaded")
        self.weight = head.weight.detach() if is_linear(head) else weight_of(head, x.detach(), raw_logits.detach())
        (slope,) = torch.autograd.grad(logits.sum(), raw_logits, retain_graph=True)
        self.slope = slope.reshape(logits.shape).float()  # (..., V)
        self.p = log_probs.exp()  # (..., V)
        self.mean = self._combine(self.p[..., None, :])[..., 0, :]  # (..., d_head): the sum that every s_t subtracts

    def _combine(self, u: Tensor) -> Tensor:
        parts = (self.slope[..., None, :] * u).split(VOCABULARY_CHUNK, dim=-1)
        parts = zip(parts, self.weight.split(VOCABULARY_CHUNK), strict=True)
        return sum(part @ w.float() for part, w in parts)

    def cotangents(self, tokens: Tensor) -> Tensor:
        """s_t (..., k, d_head) of `tokens` (..., k)."""
        slope = self.slope.gather(-1, tokens)[..., None]
        return slope * self.weight[tokens].float() - self.mean[..., None, :]

    def times(self, y: Tensor) -> Tensor:
        """S y (..., m, V), the derivatives of all log-probabilities along y (..., m, d_head)."""
        products = torch.cat([y @ w.float().mT for w in self.weight.split(VOCABULARY_CHUNK)], dim=-1)
        return products.mul_(self.slope[..., None, :]).sub_(y @ self.mean[..., None])

    def combine(self, u: Tensor) -> Tensor:
        """S^T u (..., m, d_head), the sum of all s_t weighted by u (..., m, V)."""
        return self._combine(u) - u.sum(-1, keepdim=True) * self.mean[..., None, :]

    def fisher_times(self, y: Tensor) -> Tensor:
        """C y (..., m, d_head)."""
        return self.combine(self.times(y).mul_(self.p[..., None, :]))

    def fisher_matrix(self) -> Tensor:
        """C (..., d_head, d_head)."""
        total = self.mean.new_zeros(*self.mean.shape, self.mean.shape[-1])
        for place in np.ndindex(*self.mean.shape[:-1]):
            parts = (t.split(VOCABULARY_CHUNK) for t in (self.weight, self.slope[place], self.p[place]))
            for w, slope, p in zip(*parts, strict=True):
                s = (slope[:, None] * w.float()).sub_(self.mean[place])  # after the product, digits would cancel
                s *= p.sqrt()[:, None]
                total[place].addmm_(s.mT, s)
        return total


def is_linear(head: nn.Module) -> bool:
    """Whether a head is a plain matrix with its numbers at hand: not adapted, quantised or offloaded."""
    return type(head) is nn.Linear and type(head.weight) in (nn.Parameter, Tensor) and not head.weight.is_meta


@torch.no_grad()
def weight_of(head: nn.Module, x: Tensor, raw_logits: Tensor) -> Tensor:
    """W (V, d_head) of a head that computes W x + b in another way (adapted, quantised, offloaded), from its outputs.

    Raises UnsupportedModelError if that is not what it computes at x (prompts, 1, d_head).
    """
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    bias = head(torch.zeros_like(identity[None, :1]))[0]  # (1, V)
    weight = torch.cat([(head(rows[None])[0] - bias).to(x) for rows in identity.split(HEAD_ROWS)]).mT.contiguous()
    expected = torch.cat([row @ weight.mT + bias.to(row) for row in x])[:, None]
    if not (expected - raw_logits.to(expected)).norm() <= HEAD_ROUNDING[x.dtype] * raw_logits.norm():
        raise UnsupportedModelError("the whole vocabulary needs a linear output head: count fewer tokens")
    return weight


def cotangents_through(model: nn.Module, x: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
    """s_t (..., k, d_head) float32 of `tokens` (..., k), by one backward pass for each token; for any head."""
    log_probs = logits.log_softmax(-1)
    by_token = tokens.movedim(-1, 0)  # (k, ...)
    one_hot = torch.zeros(len(by_token), *log_probs.shape, device=tokens.device).scatter(-1, by_token[..., None], 1.0)
    (gradients,) = batched_gradients(model, [log_probs], [x], [one_hot.to(log_probs)])
    return gradients.reshape(*by_token.shape, -1).movedim(0, -2).float()

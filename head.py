"""The output head: what a vector at its input x does to the log-probabilities of all tokens.

    s_t = d log p_t / dx = phi'_t W_t - sum_c p_c phi'_c W_c        (d_head,)

for a linear head with logits = phi(W x + b), phi elementwise. The vectors s_t, one a token, make up the
Fisher information matrix with respect to x, C = sum_t p_t s_t s_t^T; the network below x then takes
them to the residual stream (fisher.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fisher import Point
from last_token import UnsupportedModelError

ROWS = 4096  # vocabulary rows turned to float32 at a time: 64 MB at d = 4096


class Cotangents(NamedTuple):
    """Rows z_i at x with weights w_i: F = sum_i w_i (J^T z_i)(J^T z_i)^T. Row 0 is of the most probable token."""

    rows: Tensor  # (..., k, d_head) float32
    weights: Tensor  # (..., k) float32
    mass: Tensor  # (...) float32: probability that the counted tokens hold


class LinearHead:
    """S, the (V, d_head) matrix whose rows are the s_t, of one prompt or of each of a batch; never held whole."""

    def __init__(self, point: Point):
        """
        phi is whatever the model does after its head: nothing, a scale (Cohere, Granite) or a soft cap
        (Gemma 2). Its slope phi' is the gradient of the sum of the logits.

        Raises:
            UnsupportedModelError: the head is not linear.
        """
        if not is_linear(point):
            raise UnsupportedModelError("the whole vocabulary needs a linear output head: count fewer tokens")
        self.weight = point.head.weight.detach()
        (slope,) = torch.autograd.grad(point.logits.sum(), point.raw_logits, retain_graph=True)
        self.slope = slope.reshape(point.logits.shape).float()  # (..., V)
        self.p = point.log_probs.exp()  # (..., V)
        self.mean = self._combine((self.slope * self.p)[..., None, :])[..., 0, :]  # (..., d_head)

    def _combine(self, u: Tensor) -> Tensor:
        parts = zip(u.split(ROWS, dim=-1), self.weight.split(ROWS), strict=True)
        return sum(part @ w.float() for part, w in parts)

    def rows(self, tokens: Tensor) -> Tensor:
        """s_t (..., k, d_head) of `tokens` (..., k)."""
        slope = self.slope.gather(-1, tokens)[..., None]
        return slope * self.weight[tokens].float() - self.mean[..., None, :]

    def times(self, y: Tensor) -> Tensor:
        """S y (..., m, V): how fast each log-probability grows along y (..., m, d_head)."""
        products = torch.cat([y @ w.float().mT for w in self.weight.split(ROWS)], dim=-1)
        return products.mul_(self.slope[..., None, :]).sub_(y @ self.mean[..., None])

    def combine(self, u: Tensor) -> Tensor:
        """S^T u (..., m, d_head): the sum of all s_t, weighted by u (..., m, V)."""
        return self._combine(self.slope[..., None, :] * u) - u.sum(-1, keepdim=True) * self.mean[..., None, :]

    def fisher_times(self, y: Tensor) -> Tensor:
        """C y (..., m, d_head)."""
        return self.combine(self.times(y).mul_(self.p[..., None, :]))

    def fisher_matrix(self) -> Tensor:
        """C (d_head, d_head), of one prompt."""
        total = torch.zeros_like(self.mean.expand(len(self.mean), -1))
        for w, slope, p in zip(self.weight.split(ROWS), self.slope.split(ROWS), self.p.split(ROWS), strict=True):
            s = (slope[:, None] * w.float()).sub_(self.mean)  # now: after the product, digits would cancel
            s *= p.sqrt()[:, None]
            total.addmm_(s.mT, s)
        return total


def is_linear(point: Point) -> bool:
    weight = getattr(point.head, "weight", None)
    return isinstance(point.head, nn.Linear) and not weight.is_meta


def top_k_cotangents(point: Point, k: int) -> Cotangents:
    """Cotangents of the k most probable tokens: rows s_t, with weights p_t (not renormalised).

    With a linear head a gather and one matrix-vector product, in place of k backward passes through
    the vocabulary.
    """
    p, tokens = point.log_probs.exp().topk(k)
    if is_linear(point):
        return Cotangents(LinearHead(point).rows(tokens), p, p.sum(-1))
    log_probs = point.logits.log_softmax(-1)

    def grad_x(token: Tensor) -> Tensor:  # (...)
        one_hot = torch.zeros_like(log_probs).scatter(-1, token[..., None], 1.0)
        (grad,) = torch.autograd.grad(log_probs, point.x, one_hot, retain_graph=True)
        return grad.reshape(*token.shape, -1)

    rows = torch.func.vmap(grad_x, in_dims=-1, out_dims=-2)(tokens).float()
    return Cotangents(rows, p, p.sum(-1))

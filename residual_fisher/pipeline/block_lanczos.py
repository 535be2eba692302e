"""Leading eigenpairs of the whole vocabulary's Fisher matrix, F = J^T C J, by block Lanczos iteration.

A few directions at a time go through J and back, until the leading eigenpairs have converged. The trace is estimated.
This takes a few dozen backward rows, `fisher.full_vocabulary` takes d_head of them. It pays where every row goes
through all tokens of a prompt.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import fisher
from fisher import Chunks, Eigenpairs, OutputHead, Point, float64
from residual_fisher.model.eigen import Ritz, block_lanczos

OVERSAMPLING = 6  # tokens beyond the number of eigenpairs asked for, whose F gives the first directions
HUTCHINSON_PROBES = 8  # random rows from which the trace is estimated
MAX_ITERATIONS = 40  # half a dozen are usual


class Leading(NamedTuple):
    """The leading eigenpairs and their accuracy. In shapes, "..." begins with the layers."""

    eigen: Eigenpairs  # its trace and effective rank are estimates
    pushed: Tensor  # (..., m, d_head) float32: J v, the change of x along each eigenvector
    residuals: Tensor  # (..., m) float32: |F v - lambda v| / lambda_1
    trace_error: Tensor  # (...) float32: standard error of the trace, in its units


def leading_eigenpairs(point: Point, num: int, tolerance: float = 1e-3, chunks: Chunks | None = None) -> Leading:
    """The `num` largest eigenpairs of F at each layer, or of each prompt, by block Lanczos iteration.

    They are at most as many as there are tokens: F has no more that are not zero.

    A product with F is a push through J, two products with the head, and a backward pass: F v = J^T (C J v). The first
    directions are the eigenvectors of the F of a few of the most probable tokens.

    The trace is that of F within the basis, plus an estimate of the rest, from random rows z with E[z z^T] = C: the
    mean of |J^T z|^2 outside of the basis (Hutchinson's estimator, deflated).

    Args:
        tolerance: the largest residual |F v - lambda v| / lambda_1 allowed. In half precision it is at least 4 times
            the spacing of the numbers around 1.
    Raises:
        UnsupportedModelError: the head is not linear.
        NumericalError: NaN or infinity, or no convergence; `layer` and `prompt` say where.
    """
    head, push_forward, chunks = point.output_head(), fisher.PushForward(point), chunks or Chunks()
    tolerance = max(tolerance, 4 * torch.finfo(point.x.dtype).eps)
    num = min(num, point.log_probs.shape[-1])
    log_p, tokens = fisher.most_probable(point.log_probs, num + OVERSAMPLING)
    top, probes = head.cotangents(tokens), _probes(head, tokens)
    pulled = fisher.pull_back(point, torch.cat([top, probes], dim=-2), chunks)
    gradients, pulled = pulled.split([top.shape[-2], HUTCHINSON_PROBES], dim=-2)
    p = log_p.exp()
    start = fisher.eigenpairs(gradients, p, num, allow_zero=True).vectors
    d = start.shape[-1]

    def times(v: Tensor) -> Tensor:  # (layers, ..., b, d + d_head): F v and J v
        y = push_forward(v, chunks)
        rows = head.fisher_times(y).movedim(0, -3)  # (..., layers, b, d_head)
        back = fisher.pull_back(point, rows.flatten(-3, -2), chunks).unflatten(-2, rows.shape[-3:-1])
        own = torch.stack([back[layer, ..., layer, :, :] for layer in range(len(back))])
        return torch.cat([own, y], dim=-1)

    found = block_lanczos(times, start, num, tolerance, MAX_ITERATIONS * start.shape[-2])
    if (found.residuals > tolerance).any():
        worst = (found.residuals.amax(-1) > tolerance).nonzero()[0].tolist()
        raise fisher.NumericalError(
            f"no convergence in {MAX_ITERATIONS} iterations: a residual of {found.residuals.max():.1e} is left", *worst
        )
    pushed, scale = found.images[..., d:], found.values[..., :1].sqrt()
    vectors = fisher.fix_signs(found.vectors, (pushed @ top[..., :1, :].mT)[..., 0], scale)
    signs = (vectors * found.vectors).sum(-1, keepdim=True).sign()
    trace, rank, error = _estimates(found, gradients * p.sqrt()[..., None], pulled)
    return Leading(Eigenpairs(found.values, vectors, trace, rank), signs * pushed, found.residuals, error)


def _probes(head: OutputHead, tokens: Tensor) -> Tensor:
    """Rows z (..., HUTCHINSON_PROBES, d_head) with E[z z^T] = the part of C that is not of `tokens` (..., k).

    They are sums of sqrt(p_t) s_t with random signs.
    """
    generator = torch.Generator().manual_seed(0)  # the same for every prompt
    signs = torch.randint(0, 2, (HUTCHINSON_PROBES, head.p.shape[-1]), generator=generator) * 2 - 1
    return head.combine(signs.to(head.p) * head.p.scatter(-1, tokens, 0)[..., None, :].sqrt())


def _estimates(found: Ritz, known: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Trace, effective rank, and the standard error of the trace, each (layers, ...) float32.

    Exact are F within the basis, F between it and the rest, and of the rest the part of some tokens: R^T R, R being
    `known` (..., k, d) outside of the basis. That of all other tokens is estimated from their probes pulled back,
    `pulled` (..., HUTCHINSON_PROBES, d).
    """
    basis, images = float64(found.basis), float64(found.basis_images[..., : pulled.shape[-1]])
    known, outside = (rows - rows @ basis.mT @ basis for rows in (float64(known), float64(pulled)))
    inside, squares = images @ basis.mT, outside.pow(2).sum(-1)
    trace = inside.diagonal(dim1=-2, dim2=-1).sum(-1) + known.pow(2).sum(dim=(-2, -1)) + squares.mean(-1)
    norm = 2 * images.pow(2).sum(dim=(-2, -1)) - inside.pow(2).sum(dim=(-2, -1))
    # |R^T R + T|^2 of the known R; |T|^2 is estimated from products of different probes
    norm += (known @ known.mT).pow(2).sum(dim=(-2, -1))
    norm += 2 * (outside @ known.mT).pow(2).sum(dim=(-2, -1)) / HUTCHINSON_PROBES
    products = (outside @ outside.mT).pow(2).sum(dim=(-2, -1)) - squares.pow(2).sum(-1)
    norm += products / (HUTCHINSON_PROBES * (HUTCHINSON_PROBES - 1))
    rank = trace**2 / norm.clamp(min=torch.finfo(torch.float64).tiny)
    return tuple(part.to(pulled) for part in (trace, rank, squares.std(-1) / HUTCHINSON_PROBES**0.5))

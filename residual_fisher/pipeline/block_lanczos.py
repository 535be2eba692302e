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

OVERSAMPLING = 6  # tokens in the first block beyond the number of eigenpairs asked for
HUTCHINSON_PROBES = 8  # random rows from which the trace is estimated
MAX_ITERATIONS = 40  # half a dozen are usual
# A new direction is kept if its share outside the basis (squared, in the norm of C) exceeds rounding. The least share
# in the first and in the second round of orthogonalisation.
MIN_NEW_SHARE = (1e-9, 0.25)


class Leading(NamedTuple):
    """The leading eigenpairs and their accuracy. In shapes, "..." begins with the layers."""

    eigen: Eigenpairs  # its trace and effective rank are estimates
    pushed: Tensor  # (..., m, d_head) float32: J v, the change of x along each eigenvector
    residuals: Tensor  # (..., m) float32: |F v - lambda v| / lambda_1
    trace_error: Tensor  # (...) float32: standard error of the trace, in its units


class _Basis:
    """Directions W at x with W C W^T = 1, and G = W C J. F is G^T G plus the part outside of W."""

    def __init__(self, point: Point, head: OutputHead, chunks: Chunks):
        self.point, self.head, self.chunks = point, head, chunks
        shape = head.mean.shape
        self.w = self.cw = head.mean.new_empty(*shape[:-1], 0, shape[-1])  # (..., n, d_head)
        self.g = None  # (layers, ..., n, d)

    def add(self, y: Tensor, probes: Tensor | None = None) -> Tensor:
        """Adds y (..., m, d_head) to the basis. Returns probes (..., q, d_head) pulled back, (layers, ..., q, d)."""
        for least in MIN_NEW_SHARE:  # twice: the rounding of the first round may be as large as what it leaves
            known = y @ self.cw.mT
            y = y - known @ self.w
            cy = self.head.fisher_times(y)
            gram = float64(y @ cy.mT)
            before = float64(known).pow(2).sum(-1).amax(-1) + gram.diagonal(dim1=-2, dim2=-1).amax(-1)
            values, u = torch.linalg.eigh((gram + gram.mT) / 2)
            real = values > least * before[..., None]
            inverse = torch.where(real, values.clamp(min=1e-300).rsqrt(), 0)
            mix = (u * inverse[..., None, :]).mT.to(y)
            y, cy = mix @ y, mix @ cy
        rows = cy if probes is None else torch.cat([cy, probes], dim=-2)
        g = fisher.pull_back(self.point, rows, self.chunks)
        g, pulled = g[..., : y.shape[-2], :], g[..., y.shape[-2] :, :]
        self.w, self.cw = torch.cat([self.w, y], dim=-2), torch.cat([self.cw, cy], dim=-2)
        self.g = g if self.g is None else torch.cat([self.g, g], dim=-2)
        return pulled


def leading_eigenpairs(point: Point, num: int, tolerance: float = 1e-3, chunks: Chunks | None = None) -> Leading:
    """The `num` largest eigenpairs of F at each layer, or of each prompt, by block Lanczos iteration.

    They are at most as many as there are tokens; F has no more that are not zero.

    G^T G is the part of F seen so far, at first through a few of the most probable tokens. Let V be its leading
    eigenvectors. A round adds Y = J V to the basis. Then F V = G^T (W C Y) is exact. It gives Rayleigh-Ritz values,
    vectors and their true residuals in the span of V, and the next V sees more of F. This is the block Lanczos method
    for the singular values of C^(1/2) J (Golub, Luk and Overton, ACM TOMS 7, 1981), with full orthogonalisation and
    one basis for all layers.

    The trace is |G|^2 plus an estimate of the rest, from random rows z with E[z z^T] = C: the mean of |J^T z|^2
    outside of the basis (Hutchinson's estimator, deflated).

    A prompt's result is that of the first round in which its own residuals are small. So the rest of the batch
    changes nothing but rounding.

    Args:
        tolerance: the largest residual |F v - lambda v| / lambda_1 allowed. In half precision it is at least 4 times
            the spacing of the numbers around 1.
    Raises:
        UnsupportedModelError: the head is not linear.
        NumericalError: NaN or infinity, or no convergence; `layer` and `prompt` say where.
    """
    head, push_forward, chunks = point.output_head(), fisher.PushForward(point), chunks or Chunks()
    tolerance = max(tolerance, 4 * torch.finfo(point.x.dtype).eps)
    basis, num = _Basis(point, head, chunks), min(num, point.log_probs.shape[-1])
    top = head.cotangents(fisher.most_probable(point.log_probs, num + OVERSAMPLING)[1])
    probes = _probes(head)
    pulled = basis.add(top, probes)
    done: Leading | None = None
    for _ in range(MAX_ITERATIONS):
        v = fisher.eigenpairs(basis.g, torch.ones_like(basis.g[0, ..., 0]), num, allow_zero=True).vectors
        y = push_forward(v, chunks)  # (layers, ..., m, d_head)
        basis.add(y.movedim(0, -3).flatten(-3, -2))
        values, vectors, residuals = _rayleigh_ritz(v, (y @ basis.cw.mT) @ basis.g, y @ top[..., :1, :].mT)
        trace, rank, error = _estimates(basis, probes, pulled)
        new = Leading(Eigenpairs(values, vectors, trace, rank), (vectors @ v.mT) @ y, residuals, error)
        done = new if done is None else _keep_finished(done, new, tolerance)
        if (done.residuals <= tolerance).all():
            return done
    worst = (done.residuals.amax(-1) > tolerance).nonzero()[0].tolist()
    raise fisher.NumericalError(
        f"no convergence in {MAX_ITERATIONS} iterations: a residual of {done.residuals.max():.1e} is left", *worst
    )


def _keep_finished(done: Leading, new: Leading, tolerance: float) -> Leading:
    """`new`, except for layers and prompts that had converged in `done`."""
    finished = done.residuals.amax(-1) <= tolerance  # (layers, ...)

    def keep(old: Tensor, now: Tensor) -> Tensor:
        return torch.where(finished.reshape(finished.shape + (1,) * (old.ndim - finished.ndim)), old, now)

    eigen = Eigenpairs(*map(keep, done.eigen, new.eigen))
    return Leading(eigen, *map(keep, done[1:], new[1:]))


def _rayleigh_ritz(v: Tensor, fv: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values (..., m), vectors (..., m, d) and relative residuals (..., m) in the span of v (..., m, d).

    Args:
        fv: F v (..., m, d).
        slopes: (..., m, 1) derivatives of the most probable token's log-probability along v.
    """
    h = float64(v @ fv.mT)
    values, u = torch.linalg.eigh((h + h.mT) / 2)
    values, u = values.flip(-1).clamp(min=0).to(v), u.flip(-1).mT.to(v)
    vectors, slopes = u @ v, (u @ slopes)[..., 0]
    largest = values[..., :1].clamp(min=torch.finfo(torch.float32).tiny)
    residuals = (u @ fv - values[..., None] * vectors).norm(dim=-1) / largest
    return values, fisher.fix_signs(vectors, slopes, largest.sqrt()), residuals


def _probes(head: OutputHead) -> Tensor:
    """Rows z (..., HUTCHINSON_PROBES, d_head) with E[z z^T] = C: sums of sqrt(p_t) s_t with random signs."""
    generator = torch.Generator().manual_seed(0)  # the same for every prompt
    signs = torch.randint(0, 2, (HUTCHINSON_PROBES, head.p.shape[-1]), generator=generator) * 2 - 1
    return head.combine(signs.to(head.p) * head.p[..., None, :].sqrt())


def _estimates(basis: _Basis, probes: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Trace, effective rank, and the standard error of the trace, each (layers, ...) float32."""
    g = float64(basis.g)
    outside = float64(pulled) - float64(probes @ basis.w.mT) @ g  # (layers, ..., HUTCHINSON_PROBES, d)
    squares = outside.pow(2).sum(-1)
    trace = g.pow(2).sum(dim=(-2, -1)) + squares.mean(-1)
    # |F|^2 of F = G^T G + T; |T|^2 is estimated from products of different probes
    products = (outside @ outside.mT).pow(2).sum(dim=(-2, -1)) - squares.pow(2).sum(-1)
    norm = (
        (g @ g.mT).pow(2).sum(dim=(-2, -1))
        + 2 * (outside @ g.mT).pow(2).sum(dim=(-2, -1)) / HUTCHINSON_PROBES
        + products / (HUTCHINSON_PROBES * (HUTCHINSON_PROBES - 1))
    )
    rank = trace**2 / norm.clamp(min=torch.finfo(torch.float64).tiny)
    return tuple(part.to(basis.g) for part in (trace, rank, squares.std(-1) / HUTCHINSON_PROBES**0.5))

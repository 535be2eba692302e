"""The Fisher matrix of the whole vocabulary, F = J^T C J: no token is left out.

C (d_head, d_head) is the Fisher matrix at x, the input of the output head (head.py), and J = dx/dh. Two ways:

    matrices             all d_head rows of J in one batched backward sweep, at every layer at once; then F
                         itself, its trace and its eigenpairs
    leading_eigenpairs   block Krylov iteration: a few directions at a time through J and back, until the
                         leading eigenpairs are found; the trace is estimated

The first takes d_head backward rows whatever is asked of F. At a prompt's last token alone, where a row costs
little, it is the faster one. The second takes a few dozen rows, and pays where every row goes through all
tokens of a prompt.
"""

from typing import NamedTuple

import numpy as np
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
import torch
from torch import Tensor

from fisher import Chunks, Eigen, NumericalError, Point, PushForward, eigenpairs, float64, oriented, pull_back
from head import LinearHead

SMALL = 256  # widths up to which `eigh` of the whole matrix is no slower than iterating for ten pairs (at 576: 4 times)
CHECKED = 1e-5  # |F v - lambda v| / lambda_1 that float32 allows an eigenpair of a matrix


# --- the matrix itself ---------------------------------------------------------------------------


class Matrices(NamedTuple):
    """F at each layer, and what it was made of."""

    jacobian: Tensor  # (layers, d_head, d) float32: z @ jacobian is J^T z for any z at x
    matrix: Tensor  # (layers, d, d) float32, nats / unit^2
    top_gradient: Tensor  # (layers, d) float32: of the most probable token's log-probability

    def eigenpairs(self, num: int = 1) -> Eigen:
        """The `num` largest eigenpairs of each F, with signs as in `fisher.eigenpairs`.

        Raises:
            NumericalError: F is zero, or the solver failed; `layer` is its index.
        """
        trace = self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        if not (trace > 0).all():
            raise NumericalError("the Fisher matrix is zero", layer=int((trace <= 0).nonzero()[0, 0]))
        pairs = [_largest(matrix, num, layer) for layer, matrix in enumerate(self.matrix)]
        values, vectors = (torch.stack(part) for part in zip(*pairs, strict=True))
        toward = self.top_gradient[..., None]
        vectors = oriented(vectors, (vectors @ toward)[..., 0], toward.norm(dim=-2))
        return Eigen(values, vectors, trace, (trace / torch.linalg.matrix_norm(self.matrix)) ** 2)

    def curvature(self, directions: Tensor) -> Tensor:
        """u^T F u (layers, n) for directions u (layers, n, d)."""
        return ((directions @ self.matrix) * directions).sum(-1)


def matrices(point: Point, chunks: Chunks | None = None) -> Matrices:
    """F at every layer of one prompt's point.

    Raises:
        UnsupportedModelError: the head is not linear.
        NumericalError: gradients hold NaN or infinity.
    """
    head = LinearHead(point)
    fisher_at_x = head.fisher_matrix()
    jacobian = pull_back(point, torch.eye(len(fisher_at_x), device=fisher_at_x.device), chunks)
    top = head.rows(point.log_probs.argmax(-1, keepdim=True))
    matrix = torch.stack([j.mT @ (fisher_at_x @ j) for j in jacobian])  # a layer at a time: less memory
    return Matrices(jacobian, matrix, (top @ jacobian)[:, 0])


def curvature(point: Point, directions: Tensor, chunks: Chunks | None = None) -> Tensor:
    """u^T F u = (J u)^T C (J u), (layers, n), for directions u (layers, n, d): without the rest of F.

    Raises:
        UnsupportedModelError: the head is not linear.
    """
    y = PushForward(point)(directions, chunks)
    return (y * LinearHead(point).fisher_times(y)).sum(-1)


def _largest(matrix: Tensor, num: int, layer: int) -> tuple[Tensor, Tensor]:
    """The `num` largest eigenvalues (num,) and eigenvectors (num, d) of one matrix."""
    d = len(matrix)
    if d <= SMALL or num > d // 8:
        values, vectors = torch.linalg.eigh(float64(matrix))
        return values.flip(0)[:num].clamp(min=0).to(matrix), vectors.flip(1)[:, :num].mT.to(matrix)

    def times(v: np.ndarray) -> np.ndarray:
        return (matrix @ torch.from_numpy(np.ascontiguousarray(v)).to(matrix)).cpu().numpy()

    on_cpu = matrix.device.type == "cpu"  # where the two libraries' threads would wait for each other
    operator = matrix.numpy() if on_cpu else LinearOperator((d, d), matvec=times, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(d).astype(np.float32)  # the same in every run
    try:
        values, vectors = eigsh(operator, k=num, which="LA", v0=start, tol=CHECKED / 10)
    except ArpackError as error:
        raise NumericalError(f"the eigensolver failed: {error}", layer=layer) from error
    order = np.argsort(-values)
    values, vectors = (torch.from_numpy(part.copy()).to(matrix) for part in (values[order], vectors.T[order]))
    residual = (vectors @ matrix - values[:, None] * vectors).norm(dim=-1).max() / values[0]
    if not residual <= CHECKED:
        raise NumericalError(f"the eigensolver left a residual of {residual:.1e}", layer=layer)
    return values.clamp(min=0), vectors


# --- its leading part only -----------------------------------------------------------------------

EXTRA = 6  # tokens that the first block has beyond the pairs asked for
PROBES = 8  # random rows that the trace is estimated from
ROUNDS = 40  # of the iteration; half a dozen are usual
# A direction that this little of (in the norm of C) is new is rounding. Squared, since norms are.
NEW, NEW_AGAIN = 1e-9, 0.25


class Leading(NamedTuple):
    """The leading part of the spectrum, and how well it is known. "..." begins with the layers."""

    eigen: Eigen  # its trace and effective rank are estimates
    residuals: Tensor  # (..., m) float32: |F v - lambda v| / lambda_1, measured
    trace_error: Tensor  # (...) float32: standard error of the trace, same units


class _Basis:
    """Directions W at x with W C W^T = 1, and G = W C J: F is G^T G plus what lies outside of W."""

    def __init__(self, point: Point, head: LinearHead, chunks: Chunks):
        self.point, self.head, self.chunks = point, head, chunks
        shape = head.mean.shape
        self.w = self.cw = head.mean.new_empty(*shape[:-1], 0, shape[-1])  # (..., n, d_head)
        self.g = None  # (layers, ..., n, d)

    def add(self, y: Tensor, probes: Tensor | None = None) -> Tensor:
        """Takes in y (..., m, d_head); pulls probes (..., q, d_head) back along with it: (layers, ..., q, d)."""
        for least in (NEW, NEW_AGAIN):  # twice: rounding of the first pass is as large as what it may leave
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
        g = pull_back(self.point, rows, self.chunks)
        g, pulled = g[..., : y.shape[-2], :], g[..., y.shape[-2] :, :]
        self.w, self.cw = torch.cat([self.w, y], dim=-2), torch.cat([self.cw, cy], dim=-2)
        self.g = g if self.g is None else torch.cat([self.g, g], dim=-2)
        return pulled


def leading_eigenpairs(point: Point, num: int, tolerance: float = 1e-3, chunks: Chunks | None = None) -> Leading:
    """The `num` largest eigenpairs of F at each layer, or of each prompt, by block Krylov iteration.

    Let V be the leading eigenvectors of G^T G, the part of F seen so far (at first through a few of the most
    probable tokens). A round takes Y = J V into the basis; then F V = G^T (W C Y) is exact, which gives
    Rayleigh-Ritz values, vectors and their true residuals in the span of V, and the next V sees more of F. It is
    the block Lanczos method for the singular values of C^(1/2) J (Golub, Luk and Overton, ACM TOMS 7, 1981)
    with full orthogonalisation and one basis for all layers.

    Of the trace, |G|^2 is known, and the rest is estimated from random rows z with E[z z^T] = C, as the mean of
    |J^T z|^2 outside of the basis (Hutchinson's estimator, deflated).

    Every prompt is finished at the first round in which its own residuals are small: what else is in the batch
    changes nothing but rounding.

    Args:
        tolerance: the largest residual |F v - lambda v| / lambda_1 allowed; in half precision, whose rounding
            alone is more, 4 times the spacing of its numbers around 1 instead.
    Raises:
        UnsupportedModelError: the head is not linear.
        NumericalError: NaN or infinity, or no convergence; `layer` and `prompt` say where.
    """
    head, push_forward, chunks = LinearHead(point), PushForward(point), chunks or Chunks()
    tolerance = max(tolerance, 4 * torch.finfo(point.x.dtype).eps)
    basis = _Basis(point, head, chunks)
    top = head.rows(point.log_probs.topk(min(num + EXTRA, point.log_probs.shape[-1])).indices)
    probes = _probes(head)
    pulled = basis.add(top, probes)
    done: Leading | None = None
    for _ in range(ROUNDS):
        v = eigenpairs(basis.g, torch.ones_like(basis.g[0, ..., 0]), num, allow_zero=True).vectors
        y = push_forward(v, chunks)  # (layers, ..., m, d_head)
        basis.add(y.movedim(0, -3).flatten(-3, -2))
        found = _rayleigh_ritz(v, (y @ basis.cw.mT) @ basis.g, y @ top[..., :1, :].mT)
        trace, rank, error = _estimates(basis, probes, pulled)
        new = Leading(Eigen(*found[:2], trace, rank), found[2], error)
        done = new if done is None else _keep_finished(done, new, tolerance)
        if (done.residuals <= tolerance).all():
            return done
    worst = (done.residuals.amax(-1) > tolerance).nonzero()[0].tolist()
    raise NumericalError(f"no convergence in {ROUNDS} rounds: a residual of {done.residuals.max():.1e} is left", *worst)


def _keep_finished(done: Leading, new: Leading, tolerance: float) -> Leading:
    finished = done.residuals.amax(-1) <= tolerance  # (layers, ...)

    def keep(old: Tensor, now: Tensor) -> Tensor:
        return torch.where(finished.reshape(finished.shape + (1,) * (old.ndim - finished.ndim)), old, now)

    eigen = Eigen(*map(keep, done.eigen, new.eigen))
    return Leading(eigen, keep(done.residuals, new.residuals), keep(done.trace_error, new.trace_error))


def _rayleigh_ritz(v: Tensor, fv: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values (..., m), vectors (..., m, d) and relative residuals (..., m) in the span of v (..., m, d).

    Slopes (..., m, 1) are the derivatives of the most probable token's log-probability along v.
    """
    h = float64(v @ fv.mT)
    values, u = torch.linalg.eigh((h + h.mT) / 2)
    values, u = values.flip(-1).clamp(min=0).to(v), u.flip(-1).mT.to(v)
    vectors, slopes = u @ v, (u @ slopes)[..., 0]
    largest = values[..., :1].clamp(min=torch.finfo(torch.float32).tiny)
    residuals = (u @ fv - values[..., None] * vectors).norm(dim=-1) / largest
    return values, oriented(vectors, slopes, largest.sqrt()), residuals


def _probes(head: LinearHead) -> Tensor:
    """Rows z (..., PROBES, d_head) with E[z z^T] = C: sums of all s_t, each with sqrt(p_t) and a random sign."""
    generator = torch.Generator().manual_seed(0)  # the same for every prompt
    signs = torch.randint(0, 2, (PROBES, head.p.shape[-1]), generator=generator) * 2 - 1
    return head.combine(signs.to(head.p) * head.p[..., None, :].sqrt())


def _estimates(basis: _Basis, probes: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Trace, effective rank, and the standard error of the trace, each (layers, ...) float32."""
    g = float64(basis.g)
    outside = float64(pulled) - float64(probes @ basis.w.mT) @ g  # (layers, ..., PROBES, d)
    squares = outside.pow(2).sum(-1)
    trace = g.pow(2).sum(dim=(-2, -1)) + squares.mean(-1)
    # |F|^2 with F = G^T G + T, and products of different probes for T
    products = (outside @ outside.mT).pow(2).sum(dim=(-2, -1)) - squares.pow(2).sum(-1)
    norm = (
        (g @ g.mT).pow(2).sum(dim=(-2, -1))
        + 2 * (outside @ g.mT).pow(2).sum(dim=(-2, -1)) / PROBES
        + products / (PROBES * (PROBES - 1))
    )
    rank = trace**2 / norm.clamp(min=torch.finfo(torch.float64).tiny)
    return tuple(part.to(basis.g) for part in (trace, rank, squares.std(-1) / PROBES**0.5))

"""Eigenpairs of symmetric positive semi-definite matrices: all of small ones, the leading ones of a linear map."""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

MAX_ERROR = 1e-9  # of a GPU's eigendecomposition, relative: far above float64's rounding
SPARE = 10  # rows that are kept at a restart beyond the eigenpairs asked for: the next to converge
RESTART = 4  # so many times these rows are the most that a basis has


class Ritz(NamedTuple):
    """Leading eigenpairs, and what they were found in. In shapes, "..." are matrices, side by side."""

    values: Tensor  # (..., m), descending
    vectors: Tensor  # (..., m, d), orthonormal rows; zero if the matrix is
    residuals: Tensor  # (..., m): |F v - lambda v| / lambda_1
    images: Tensor  # (..., m, d + e): what the map makes of the vectors
    basis: Tensor  # (..., n, d), orthonormal rows, or zero ones
    basis_images: Tensor  # (..., n, d + e)


def float64(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if it was on MPS, which has neither float64 nor eigh."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) in columns, of symmetric float64 matrices.

    What a GPU's solver does not solve, or solves wrongly, is solved on the CPU.

    Raises:
        torch.linalg.LinAlgError: the CPU's solver failed.
    """
    if matrix.device.type == "cpu":
        return torch.linalg.eigh(matrix)
    with suppress(RuntimeError):  # also of a lack of memory, which the CPU may have
        values, vectors = torch.linalg.eigh(matrix)
        error = torch.linalg.matrix_norm((vectors * values[..., None, :]) @ vectors.mT - matrix)
        if (error <= MAX_ERROR * torch.linalg.matrix_norm(matrix)).all():
            return values, vectors
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)


def block_lanczos(
    times: Callable[[Tensor], Tensor], start: Tensor, num: int, tolerance: float, most: int, every: int = 1
) -> Ritz:
    """The `num` largest eigenpairs of each matrix F, from products with it alone, in the space of start, F start, ...

    Each block of rows is F times the one before, made orthogonal to all others (Golub and Underwood, "The block Lanczos
    method for computing eigenvalues", 1977). In their span, Rayleigh-Ritz gives values, vectors and true residuals. A
    matrix whose residuals are small gets no more rows. So what else is iterated beside it changes nothing but rounding.
    A basis that has become large is cut to its leading Ritz vectors, which keep the space one of powers of F (Wu and
    Simon, "Thick-restart Lanczos method", 2000).

    Args:
        times: takes rows v (..., b, d), returns F v; and whatever else is linear in v, joined to it: (..., b, d + e).
        start: (..., b, d), any rows.
        tolerance: the largest residual |F v - lambda v| / lambda_1 at which the iteration ends.
        most: rows multiplied before it ends in any case, with whatever residuals are left.
        every: rows multiplied from one look at the residuals, where the host waits for the device, to the next.
    """
    d = start.shape[-1]
    num, look, count = min(num, d), 0, 0
    basis, images = start[..., :0, :], None
    new = _orthonormal(start, basis)
    while True:
        image = times(new)
        basis, images = torch.cat([basis, new], dim=-2), image if images is None else torch.cat([images, image], dim=-2)
        count, n = count + new.shape[-2], basis.shape[-2]
        new = _orthonormal(image[..., :d], basis)
        if n < max(num, min(look + every, d)):
            continue
        h = float64(basis @ images[..., :d].mT)
        values, u = eigh((h + h.mT) / 2)
        values, u = values.flip(-1).to(basis), u.flip(-1).mT.to(basis)
        values, leading = values[..., :num].clamp(min=0), u[..., :num, :]
        vectors, mapped = leading @ basis, leading @ images
        largest = values[..., :1].clamp(min=torch.finfo(values.dtype).tiny)
        residuals = (mapped[..., :d] - values[..., None] * vectors).norm(dim=-1) / largest
        unfinished = residuals.amax(-1) > tolerance
        if n == d or count >= most or not unfinished.any():
            return Ritz(values, vectors, residuals, mapped, basis, images)
        new = new * unfinished[..., None, None]
        if n >= RESTART * (num + SPARE):
            u = u[..., : num + SPARE, :]
            basis, images = u @ basis, u @ images
        look = basis.shape[-2]


def _orthonormal(rows: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows (..., b, d) that add the span of `rows` to that of `basis` (..., n, d): up to d in all."""
    n, tiny = basis.shape[-2], torch.finfo(rows.dtype).tiny
    for row in rows[..., : basis.shape[-1] - n, :].split(1, dim=-2):
        row = row / row.abs().amax(-1, keepdim=True).clamp(min=tiny)  # squares of small numbers would be zero
        for _ in range(2):  # the rounding of the first round may be as large as what it leaves
            row = row - (row @ basis.mT) @ basis
        basis = torch.cat([basis, nn.functional.normalize(row, dim=-1, eps=tiny)], dim=-2)
    return basis[..., n:, :]

"""How much two Fisher matrices have in common, from their leading eigenpairs; no d x d matrix is formed."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Spectrum(Protocol):
    """Leading eigenpairs of a matrix, such as `fisher.Eigenpairs`, or a prompt's of `load_fisher_matrices`."""

    values: Tensor | np.ndarray  # (..., m) descending, not negative
    vectors: Tensor | np.ndarray  # (..., m, d) orthonormal rows; zero where the eigenvalue is


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine (...) of vectors (..., d), in float64; 0 if one is zero.

    An eigenvector's sign is a convention (`fisher.fix_signs`): take the absolute value where only the line counts.
    """
    a, b = (torch.as_tensor(part).double() for part in (a, b))
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, 0).clamp(-1, 1)


def subspace_overlap(a: Spectrum, b: Spectrum, k: int | None = None) -> Tensor:
    """How much of either matrix's leading part lies in the other's leading subspace, (...) float64 between 0 and 1.

    With eigenvectors u_i and v_j, each the k leading ones, and weights alpha_i = lambda_i / sum lambda, beta likewise,

        overlap = 1/2 (sum_i alpha_i |V u_i|^2 + sum_j beta_j |U v_j|^2)

    The weights let a direction count as much as it holds of the trace of the k: without them, trailing eigenvectors,
    which are hardly determined, would count as much as the first. Equal subspaces have 1, orthogonal ones 0, random
    ones k / d. NaN where both are zero.

    Args:
        k: leading eigenpairs of each; by default as many as the one with fewer has.
    Raises:
        ValueError: there are not so many, or the vectors are of two widths.
    """
    alpha, beta, squares = _leading(a, b, k)
    shares = (squares.sum(-1) * alpha, squares.sum(-2) * beta)
    return sum(part.sum(-1) / weight.sum(-1) for part, weight in zip(shares, (alpha, beta), strict=True)) / 2


def matrix_similarity(a: Spectrum, b: Spectrum, k: int | None = None) -> Tensor:
    """tr(F F') / |F| |F'| (...) float64 of the matrices' best approximations of rank k; arguments: `subspace_overlap`.

    It is the cosine of the two matrices, 1 if they differ by a factor only.
    """
    alpha, beta, squares = _leading(a, b, k)
    return torch.einsum("...i,...j,...ij->...", alpha, beta, squares) / (alpha.norm(dim=-1) * beta.norm(dim=-1))


def _leading(a: Spectrum, b: Spectrum, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading eigenvalues of both, (..., k), and the squared cosines (..., k, k) of their eigenvectors."""
    most = min(a.values.shape[-1], b.values.shape[-1])
    k = most if k is None else k
    if not 1 <= k <= most:
        raise ValueError(f"k = {k} is not between 1 and the {most} eigenpairs that both have")
    if a.vectors.shape[-1] != b.vectors.shape[-1]:
        raise ValueError(f"the vectors are of widths {a.vectors.shape[-1]} and {b.vectors.shape[-1]}")
    values = (torch.as_tensor(part.values[..., :k]).double() for part in (a, b))
    u, v = (torch.as_tensor(part.vectors[..., :k, :]).double() for part in (a, b))
    return *values, (u @ v.mT).square()

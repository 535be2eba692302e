"""Perturbations of the residual stream: directions, lengths, effects, and the trust radius of the prediction."""

from collections.abc import Callable
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import fisher
from fisher import Chunks, Eigenpairs, Point
from residual_fisher.common.files import number_or_none
from residual_fisher.model.predictions import sweep

DEPARTURE = 0.1  # relative difference of KL from its quadratic prediction that ends the trust radius
SEARCH_NATS = (1e-5, 1e2)  # predicted KL between which a trust radius is searched
GRID = 12  # steps tried over that range
NEAR = 0.5  # of DEPARTURE: what KL differs by next to where it may depart, and be back at the next step of the grid
SECTIONS = (16, 8)  # steps tried within the interval found, then within the new one: this fixes the radius to 1%


# --- directions and lengths ----------------------------------------------------------------------


def control_directions(
    activations: Tensor, other: Tensor | None, layers: list[int], num: int, key: tuple[int, int]
) -> dict[str, Tensor]:
    """Unit directions (layers, d) by name: `num` random ones, and the one towards another sentence.

    Args:
        activations: (layers, d) of this sentence.
        other: (layers, d) of another sentence, if there is one.
        key: (seed, number of the sentence). The generator is seeded with them, the layer and the direction's number.
    """
    controls = {}
    for number in range(num):
        draws = [np.random.default_rng([*key, layer, number]).standard_normal(activations.shape[1]) for layer in layers]
        controls[f"random_{number}"] = torch.from_numpy(np.stack(draws)).to(activations)
    if other is not None:
        controls["difference"] = other.to(activations) - activations
    return {name: torch.nn.functional.normalize(d, dim=-1) for name, d in controls.items()}


def step_lengths(unit: str, scales: Tensor, eigenvalues: Tensor, norms: Tensor) -> Tensor:
    """Signed step lengths (layers, scales) from scales (scales,), lambda (layers,) and |h| (layers,)."""
    length = {"eigenvalue": eigenvalues, "nats": eigenvalues.rsqrt(), "norm": norms / 100}[unit]
    return length[:, None] * scales


# --- trust radius --------------------------------------------------------------------------------


class TrustRadii(NamedTuple):
    """Where KL departs from its quadratic prediction, along -v and v at every layer."""

    steps: Tensor  # (layers, 2) lengths; NaN where rounding hides the departure, infinity where there is none
    nats: Tensor  # (layers, 2) KL that the exact F predicts at those lengths

    def record(self, row: int, norm: float) -> dict:
        """The shorter of the two steps at a layer, in three units; None if it, or which one it is, is not known.

        Args:
            norm: |h| at that layer. It is 0 after the embedding of a padding token; no step is then known in norms.
        """
        steps, nats = (part[row].tolist() for part in self)
        both, at = list(map(number_or_none, steps)), steps.index(min(steps))
        known = not any(map(math.isnan, steps)) and both[at] is not None and norm > 0
        found = {"step": steps[at], "nats": nats[at], "norms": steps[at] / norm} if known else {}
        return {"step": None, "nats": None, "norms": None, **found, "steps": both}


def trust_radii_along(point: Point, eigen: Eigenpairs, full: bool, chunks: Chunks) -> TrustRadii:
    """The trust radii of the top eigenvectors.

    The curvature along v is always the exact one. F over the top-k tokens underestimates it, so KL would depart from
    that prediction at once. `fisher.full_curvature` takes a single pass.

    Args:
        full: `eigen` is of the whole vocabulary.
    """
    v = eigen.vectors[:, :1]
    curvature = (eigen.values[:, :1] if full else fisher.full_curvature(point, v, chunks)).expand(-1, 2)
    ends = torch.cat([-v, v], dim=1)  # (layers, 2, d)

    def kl_of(steps: Tensor) -> Tensor:  # (layers * 2, n)
        deltas = ends[:, :, None] * steps.unflatten(0, ends.shape[:2])[..., None]
        kl = sweep(point, deltas, chunks=chunks).kl.flatten(0, 1)
        return kl.nan_to_num(nan=math.inf, posinf=math.inf)  # an overflow is a departure

    steps = trust_radii(kl_of, curvature.flatten()).unflatten(0, curvature.shape)
    return TrustRadii(steps, 0.5 * steps**2 * curvature)


def trust_radii(kl_of: Callable[[Tensor], Tensor], curvature: Tensor) -> Tensor:
    """Step lengths s (rows,), one a direction u, at which KL first departs by DEPARTURE from 1/2 s^2 u^T F u.

    KL is computed at GRID steps for all directions at once, then between the step where it begins to come NEAR the
    departure and the one where it has departed, and then between the two of those steps where the departure begins. The
    result is right to 1%. It is NaN where the departure begins below the model's rounding (in half precision KL at step
    0 is not 0), and infinity where there is none up to 100 predicted nats.

    Args:
        kl_of: maps steps (rows, n) to KL in nats (rows, n).
        curvature: u^T F u (rows,), of the whole vocabulary.
    """
    curvature = curvature[:, None]
    nats = torch.logspace(*(math.log10(end) for end in SEARCH_NATS), GRID, device=curvature.device)
    steps = torch.cat([torch.zeros_like(curvature), (2 * nats / curvature).sqrt()], dim=1)
    kl = kl_of(steps)
    # where the noise, KL at step 0, is at most a tenth of the departure
    seen = nats * DEPARTURE >= 10 * kl[:, :1]
    difference = (kl[:, 1:] / nats - 1).abs()
    departs, nears = ((difference > limit) & seen for limit in (DEPARTURE, NEAR * DEPARTURE))
    first, first_near, first_seen = (some.int().argmax(dim=1, keepdim=True) for some in (departs, nears, seen))
    found = departs.any(dim=1, keepdim=True)
    hidden = ~seen.any(dim=1, keepdim=True) | (found & (first == first_seen))

    steps = steps[:, 1:]
    low = torch.where(nears.any(dim=1, keepdim=True), first_near - 1, GRID - 2).maximum(first_seen)
    low, high = steps.gather(1, low), steps.gather(1, torch.where(found, first, GRID - 1))
    for sections in SECTIONS:
        cuts = low * (high / low) ** (torch.arange(sections + 2, device=low.device) / (sections + 1))
        kl = kl_of(cuts[:, 1:-1])
        departs = (kl / (0.5 * cuts[:, 1:-1] ** 2 * curvature) - 1).abs() > DEPARTURE
        departs = torch.cat([departs, found], dim=1)
        found, first = departs.any(dim=1, keepdim=True), departs.int().argmax(dim=1, keepdim=True)
        low, high = cuts.gather(1, first), cuts.gather(1, first + 1)
    radius = (low * high).sqrt()
    return torch.where(hidden, math.nan, torch.where(found, radius, math.inf))[:, 0]

"""How far a Jacobian lens (--lens), a mean over prompts, predicts what a change of h does at this very prompt."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

import fisher
from residual_fisher.common.files import number_or_none
from residual_fisher.common.program import UserError
from residual_fisher.experiment.perturbation import control_directions
from residual_fisher.model.lens import JacobianLens, read_lens

TOKENS = 50  # the most probable ones, whose log-probabilities are predicted
DIRECTIONS = 4  # of either kind: random, and along which the lens says that one of the most probable tokens gains
STEP = 0.01  # length of a change, as a share of |h|: short enough to be linear
KINDS = ("random", "along_lens")
PREDICTORS = ("local", "mean", "logit_lens")


class LensErrors(NamedTuple):
    """Relative errors of the change of log p that is predicted; NaN at layers that the lens has no matrix for."""

    errors: Tensor  # (layers, kinds, predictors)

    def record(self, row: int) -> dict[str, dict[str, float | None]]:
        by_kind = zip(KINDS, self.errors[row].tolist(), strict=True)
        return {kind: dict(zip(PREDICTORS, map(number_or_none, values), strict=True)) for kind, values in by_kind}


@cache
def lens_for(path: str, layers: tuple[int, ...], depth: int, width: int) -> JacobianLens:
    """The lens in a file. Raises UserError: it is not for such a model, or for none of these layers."""
    lens = read_lens(Path(path))
    if len(next(iter(lens.matrices.values()))) != width or not set(lens.matrices) <= set(range(depth)):
        raise UserError(f"the lens {path} is not of this model, of {depth} layers of width {width}")
    if depth - 1 not in layers or not set(layers) & (set(lens.matrices) - {depth - 1}):
        raise UserError("--lens needs the last layer among --layers, and another one that the lens has")
    return lens


def audit(point: fisher.PromptPoint, lens: JacobianLens, seed: int, chunks: fisher.Chunks) -> LensErrors:
    """Compares three predictions of how log p changes with h, at every layer but the last, with what happens.

    All three take the gradient of log p at the last layer's stream. What is carried there is J delta with the prompt's
    own J (`local`), with the lens's (`mean`), or delta itself (`logit_lens`).
    """
    top = fisher.top_k(point, min(TOKENS, point.log_probs.shape[-1]), chunks)
    own, last = top.gradients, top.gradients[-1]  # (layers, k, d), (k, d)
    rows = [row for row, layer in enumerate(point.layers[:-1]) if layer in lens.matrices]
    mean = torch.stack([lens.matrices[point.layers[row]] for row in rows]).to(last)  # (rows, d, d)
    numbers = [point.layers[row] for row in rows]
    random = control_directions(point.activations[rows], None, numbers, DIRECTIONS, (seed, 0)).values()
    toward = normalize(last[:DIRECTIONS] @ mean, dim=-1)
    units = torch.stack([torch.stack(list(random), dim=1), toward], dim=1)  # (rows, kinds, n, d)
    deltas = units * STEP * point.activations[rows].norm(dim=-1)[:, None, None, None]

    signed = torch.stack([deltas, -deltas], dim=1).flatten(1, -2)  # (rows, 2 * kinds * n, d)
    at = torch.tensor(numbers).repeat_interleave(signed.shape[1])

    def moved(deltas: Tensor, at: Tensor) -> Tensor:  # log p of the top tokens
        return fisher.perturb(point, deltas, at).log_softmax(-1)[:, top.tokens]

    log_p = chunks.join(moved, signed.flatten(0, 1), at).reshape(len(rows), 2, *deltas.shape[1:-1], -1)
    true = (log_p[:, 0] - log_p[:, 1]) / 2  # (rows, kinds, n, k): terms of second order cancel
    predicted = torch.stack(
        [deltas @ own[rows].mT[:, None], (deltas @ mean.mT[:, None]) @ last.mT, deltas @ last.mT], dim=2
    )  # (rows, kinds, predictors, n, k)
    squares = (top.weights * (predicted - true[:, :, None]) ** 2).sum(-1) / (top.weights * true**2).sum(-1)[:, :, None]
    errors = torch.full((len(point.layers), len(KINDS), len(PREDICTORS)), torch.nan)
    errors[rows] = squares.sqrt().median(dim=-1).values.cpu()
    return LensErrors(errors)

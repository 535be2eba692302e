"""Steering: how far a token's probability can be raised, and at which cost in KL.

Any change of a model that raises a token from probability p0 to p costs at least

    KL >= p0 ln(p0 / p) + (1 - p0) ln((1 - p0) / (1 - p))

The limit is reached if all other tokens keep their proportions. Per nat of a small KL, the natural gradient raises the
token most: n = (F + damping lambda_1)^-1 grad log-odds (Amari, "Natural gradient works efficiently in learning", 1998).

Steering in several steps linearises the model anew at each point reached. Each step is a Gauss-Newton step for the
least KL at given log-odds: an advance along n, and a correction that undoes the avoidable KL of the earlier steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from residual_fisher.model.eigen import eigh, float64
from residual_fisher.model.passes import Chunks
from residual_fisher.model.points import (
    NumericalError,
    Point,
    PromptPoint,
    linearize,
    linearize_perturbed,
    pull_back,
)
from residual_fisher.model.predictions import FULL_PRECISION, HALF_PRECISION, Sweep, most_probable, sweep
from residual_fisher.model.words import token_of

GOALS = (0.1, 0.25, 0.5, 0.9)  # probabilities to which the target is raised
PACED_GOAL = 0.5  # reached in the number of steps asked for; higher goals continue at the same pace
STEPPED = ("natural_steps", "gradient_steps")  # directions followed in several steps
STEERING_TOKENS = 200  # counted by F unless a run counts fewer or more: measured as good as all tokens
RANK = 48  # rows that most steps pull back for F, in place of one for each token: measured as good
ALL_ROWS = 4  # every so many steps all rows are pulled back, to know which count
DAMPINGS = (0.1, 0.02, 0.005, 0.001)  # in units of lambda_1; each of several steps takes the cheapest
LENGTHS = (3e-3, 1e1, 17)  # lengths tried along a straight direction: shortest and longest (norms of h), count
MULTIPLES = (0.6, 0.85, 1.0, 1.25, 1.8)  # of a step, tried because its gradient holds only nearby
SECTIONS = 6  # parts of the interval in which a goal is reached, tried to locate it
INTERPOLATED = 0.005  # log-odds that a length found by interpolation may fall short by: 0.4988 in place of 0.5
ROUNDING = 1e-7  # rounding error of a float32 probability close to 1


class Steered(NamedTuple):
    """The shortest perturbation along each direction that reaches each goal; NaN where none does."""

    target: int  # token that is raised
    before: float  # probability of the target, unperturbed
    names: list[str]  # of the directions
    goals: list[float]  # ascending: the GOALS above the target's unperturbed probability
    log_prob: (
        Tensor  # (layers, directions, goals) float32, nats: of the target; at least the goal's but for INTERPOLATED
    )
    kl: Tensor  # (layers, directions, goals) float32, nats
    norms: Tensor  # (layers, directions, goals) float32: |delta| / |h|
    deltas: Tensor  # (layers, goals, d) float32: the perturbations of "natural_steps"
    hidden: float  # nats that the model's rounding hides


def least_kl(before: float, after: float) -> float:
    """The least KL in nats that raises a token from probability `before` to `after`. Both may be rounded to 0 or 1."""
    after = min(after, 1 - ROUNDING)
    own = before * math.log(before / after) if before else 0.0
    return own + (1 - before) * math.log((1 - before) / (1 - after))


def steer_along(
    point: Point,
    directions: dict[str, Tensor],
    target: int,
    tokens: int,
    steps: int,
    damping: float,
    gradients: Chunks,
    perturbations: Chunks,
) -> Steered:
    """Raises the target's probability at every layer of a point, in one straight step and in several.

    Args:
        directions: (layers, d) by name, for comparison; each is turned so that it raises the target.
        tokens: number of most probable tokens that F counts.
        steps: number of steps to PACED_GOAL.
        damping: of the natural gradient in one step, in units of lambda_1.
        gradients, perturbations: rows of one backward and one forward pass.
    """
    probability, h = point.log_probs[target].exp().item(), point.activations
    hidden = (HALF_PRECISION if point.model.dtype.itemsize < 4 else FULL_PRECISION)[1]
    goals = [goal for goal in GOALS if goal > probability]
    if not goals:
        nothing = h.new_empty(len(h), 0, 0)
        return Steered(target, probability, [], [], nothing, nothing, nothing, h[:, None][:, :0], hidden)

    move = partial(_move, point, target, perturbations)
    linearised = partial(Linearised, point, target=target, chunks=gradients)
    here = linearised(zero := torch.zeros_like(h), tokens=tokens)
    others = {name: u.to(here.rise) for name, u in directions.items()}
    straight = {"natural": here.solve(here.rise, damping), "gradient": here.rise, **others}
    along = torch.stack(list(straight.values()), dim=1)  # (layers, n, d)
    downhill = torch.einsum("lnd,ld->ln", along, here.rise) < 0
    along = torch.nn.functional.normalize(torch.where(downhill[..., None], -along, along), dim=-1).to(h)

    norms, route = h.norm(dim=-1)[:, None, None], waypoints(probability, goals, steps)
    at_once = _at_once(along, norms, goals, move)
    several, one = (partial(linearised, tokens=count) for count in (tokens, 1))
    *natural, deltas = _in_steps(here, several, Linearised.natural_steps, route, goals, zero, move)
    *gradient, _ = _in_steps(here, one, Linearised.gradient_step, route, goals, zero, move)
    log_prob, kl, length = (torch.cat(part, dim=1) for part in zip(at_once, natural, gradient, strict=True))
    return Steered(
        target, probability, [*straight, *STEPPED], goals, log_prob, kl, length / norms, deltas[:, 0], hidden
    )


def _move(point: Point, target: int, chunks: Chunks | None, start: Tensor, advance: Tensor, lengths: Tensor) -> Sweep:
    """Perturbs by start + length * advance (layers, ..., d), for lengths (layers, ..., m)."""
    deltas = start[..., None, :] + advance[..., None, :] * lengths[..., None]
    return sweep(point, deltas, target, 1, chunks)


# --- one token, one layer, one goal ---------------------------------------------------------------


class Steering(NamedTuple):
    """A perturbation that raises a token's probability at a prompt's end, and what it costs."""

    layer: int  # where delta is added: at the output of this decoder layer, at the prompt's last token
    token: int  # that is raised
    delta: Tensor  # (d,) float32
    before: float  # probability of the token, unperturbed
    after: float  # and perturbed: at least the goal but for INTERPOLATED
    kl: float  # nats, KL(unperturbed || perturbed)
    least_kl: float  # nats: no change of the model, of whatever kind, costs less


def steer(
    model: nn.Module,
    tokenizer,
    prompt: str,
    token: str | int,
    layer: int,
    to: float = 0.5,
    steps: int = 8,
    tokens: int = STEERING_TOKENS,
) -> Steering:
    """Raises a token's probability after a prompt at little more than the least KL, by steps along natural gradients.

    Args:
        token: its text, preferably after a space, or its id.
        layer: number of a decoder layer.
        to: the probability to reach.
        steps: to a probability of PACED_GOAL, each linearised anew; other goals are approached at the same pace.
        tokens: number of most probable tokens that F counts.
    Raises:
        UserError: `token` is no single token.
        ValueError: `to` is no probability above the token's own.
        NumericalError: the steps do not reach it.
    """
    ids, target = tokenizer(prompt).input_ids, token if isinstance(token, int) else token_of(tokenizer, token)
    point = linearize(model, ids, layer)
    before = point.log_probs[target].exp().item()
    if not before < to < 1:
        raise ValueError(f"the token has a probability of {before:.3g}, which can be raised to more, below 1: not {to}")
    linearised = partial(Linearised, point, target=target, tokens=tokens, chunks=None)
    route, zero = waypoints(before, [to], steps), torch.zeros_like(point.activations)
    move = partial(_move, point, target, None)
    first, step = linearised(zero), Linearised.natural_steps
    log_prob, kl, _, deltas = _in_steps(first, linearised, step, route, [to], zero, move)
    if not kl.isfinite().all():
        raise NumericalError(f"steps at layer {layer} do not raise the token to {to}: try more steps, or another layer")
    after = log_prob.exp().item()
    return Steering(layer, target, deltas[0, 0, 0], before, after, kl.item(), least_kl(before, after))


# --- where log-odds are reached ------------------------------------------------------------------


def log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    return log_prob - torch.log1p(-log_prob.exp().clamp(max=1 - ROUNDING))


def _log_odds_of(probability: float) -> float:
    return math.log(probability / (1 - probability))


def first_reaching(odds: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The index (...) of the first of `odds` (..., m) that is at least `wanted` (...), and whether there is one."""
    reached = odds >= wanted[..., None]
    return reached.int().argmax(-1), reached.any(-1)


def around(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Of `values` (..., m), the one before `index` (...) and the one at it; at index 0, the first twice."""
    return values.gather(-1, torch.stack([(index - 1).clamp(min=0), index], dim=-1)).unbind(-1)


def at_crossing(values: Tensor, odds: Tensor, wanted: Tensor, index: Tensor) -> Tensor:
    """`values` (..., m) interpolated to (...), where the log-odds are `wanted` between `index` - 1 and `index`."""
    (x0, x1), (y0, y1) = around(odds, index), around(values, index)
    share = torch.where(index > 0, ((wanted - x0) / (x1 - x0)).clamp(0, 1), torch.ones_like(x0))
    return y0 + (y1 - y0) * share


class Reached(NamedTuple):
    """A length (...) and what a perturbation of that length does; `reached` is false where it falls short."""

    length: Tensor
    log_prob: Tensor
    kl: Tensor
    reached: Tensor  # bool


def reach(move: Callable[[Tensor], Sweep], lengths: Tensor, wanted: Tensor, index: Tensor) -> Reached:
    """The wanted log-odds (...), which are reached between the length before `index`, or 0, and the one at it.

    The length is interpolated. In half precision log-odds go in leaps, and what it leads to may fall short. Then the
    next longer one that was tried is taken, and then the one at `index`.
    """
    low, high = around(lengths, index)
    low = torch.where(index > 0, low, 0)
    cuts = low[..., None] + (high - low)[..., None] * torch.linspace(0, 1, SECTIONS + 1, device=lengths.device)
    odds = log_odds(move(cuts).target_log_prob)
    at = first_reaching(odds, wanted)[0]
    tried = torch.stack([at_crossing(cuts, odds, wanted, at), around(cuts, at)[1], high], dim=-1)  # (..., 3)
    found = move(tried)
    at, reached = first_reaching(log_odds(found.target_log_prob), wanted - INTERPOLATED)
    return Reached(*(around(part, at)[1] for part in (tried, found.target_log_prob, found.kl)), reached)


def _at_once(along: Tensor, norms: Tensor, goals: list[float], move: Callable) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, KL and length, each (layers, n, goals), of the shortest steps that reach each goal.

    Args:
        along: unit vectors (layers, n, d).
        norms: |h| (layers, 1, 1).
    """
    move = partial(move, torch.zeros_like(along)[:, :, None], along[:, :, None])
    shortest, longest, count = LENGTHS
    lengths = torch.logspace(math.log10(shortest), math.log10(longest), count, device=along.device)
    lengths = (norms[..., None] * lengths).expand(-1, along.shape[1], -1, -1)
    odds = log_odds(move(lengths).target_log_prob)  # (layers, n, 1, lengths)
    lengths, odds = (part.expand(-1, -1, len(goals), -1) for part in (lengths, odds))
    wanted = torch.tensor([_log_odds_of(goal) for goal in goals], device=along.device).expand(odds.shape[:-1])
    index, reached = first_reaching(odds, wanted)
    found = reach(move, lengths, wanted, index)
    parts = (found.log_prob, found.kl, found.length)
    return tuple(part.masked_fill(~(reached & found.reached), math.nan) for part in parts)


# --- in steps ------------------------------------------------------------------------------------


def waypoints(probability: float, goals: list[float], steps: int) -> list[float]:
    """Ascending probabilities to aim at in turn, all goals included.

    `steps` of them lead to PACED_GOAL; the rest continue at that pace. They are evenly spaced in arcsin sqrt p, the
    distance in the Fisher metric of two outcomes.
    """
    start, paced = (math.asin(math.sqrt(p)) for p in (probability, PACED_GOAL))
    pace = max(paced - start, 0.1) / steps
    route, here = [], start
    for goal in goals:
        end = math.asin(math.sqrt(goal))
        count = max(1, round((end - start) / pace) - len(route))
        route += [math.sin(here + (end - here) * i / count) ** 2 for i in range(1, count)] + [goal]
        here = end
    return route


class Linearised:
    """The model linearised at perturbed points, one perturbation (layers, d) a layer.

    `log_odds` (layers,) are the target's, `rise` (layers, d) their gradient, `kl_gradient` (layers, d) that of
    KL(unperturbed || here). F is root^T root at each layer, over `tokens` tokens and all others as one, of
    which, if the `metric` of an earlier step is given, only the leading part is pulled back.
    """

    def __init__(
        self,
        point: PromptPoint,
        deltas: Tensor,
        target: int,
        tokens: int,
        chunks: Chunks | None,
        metric: "Metric | None" = None,
    ):
        layers = len(deltas)
        here = linearize_perturbed(point, deltas, torch.tensor(point.layers))
        head, (log_p, ids) = here.output_head(), most_probable(here.log_probs, tokens)
        weights = log_p.exp()
        target_ids = torch.full_like(ids[:, :1], target)
        unperturbed = point.log_probs.exp().expand(layers, 1, -1)
        rows = head.cotangents(ids)
        # All other tokens count as one. Its gradient follows, since the expectation over all tokens is zero.
        rest = (1 - weights.sum(-1, keepdim=True)).clamp(min=1e-9)
        others = -(weights[..., None] * rows).sum(1, keepdim=True) / rest[..., None]
        rows = torch.cat([rows, others], dim=1) * torch.cat([weights, rest], dim=1).sqrt()[..., None]
        rows = rows if metric is None else metric.leading_part(rows)
        rows = torch.cat([rows, head.cotangents(target_ids), -head.combine(unperturbed)], dim=1)
        gradients = float64(pull_back(here, rows, chunks)[0])  # (layers, rank + 2, d)
        self.root, target_gradient, self.kl_gradient = gradients[:, :-2], gradients[:, -2], gradients[:, -1]
        self.rows = rows[:, :-2]  # that were pulled back to the root
        self.values, self.vectors = eigh(self.root @ self.root.mT)
        log_prob = here.log_probs[:, target].to(gradients)
        self.log_odds = log_odds(log_prob)
        remainder = (1 - log_prob.exp()).clamp(min=ROUNDING)  # probability of all other tokens
        # At given log-odds, the Hessian of KL is that of the other tokens' own KL times their unperturbed probability.
        # F weighs it with their present probability instead. (F also differs along `rise`, where the step is given.)
        self.correction_factor = (remainder / (1 - point.log_probs[target].exp().to(remainder)))[:, None]
        self.rise = target_gradient / remainder[:, None]

    def metric(self) -> "Metric | None":
        """What pulls back the leading part alone at points nearby; None if there are no more rows than RANK."""
        if self.rows.shape[1] <= RANK:
            return None
        rows = float64(self.rows)
        values, u = eigh(rows @ rows.mT)
        u = u * values.clamp(min=ROUNDING**2 * values[:, -1:]).rsqrt()[:, None]
        basis, pulled = u.mT @ rows, u.mT @ self.root
        return Metric(basis, pulled @ pulled.mT)

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """(F + damping lambda_1)^-1 b (layers, d), through the Gram matrix of F's factor."""
        shift = damping * self.values[:, -1:]
        inner = self.vectors.mT @ (self.root @ b[..., None]) / (self.values + shift)[..., None]
        return (b - (self.root.mT @ (self.vectors @ inner)).squeeze(-1)) / shift

    def natural_steps(self, wanted: float) -> tuple[Tensor, Tensor]:
        """(correction, advance), both (layers, dampings, d), for each of DAMPINGS.

        To first order, their sum leads to the wanted log-odds at the least KL.
        """
        correction = [-self.correction_factor * self.solve(self.kl_gradient, damping) for damping in DAMPINGS]
        correction = torch.stack(correction, dim=1)
        advance = torch.stack([self.solve(self.rise, damping) for damping in DAMPINGS], dim=1)
        missing = wanted - self.log_odds[:, None] - torch.einsum("lnd,ld->ln", correction, self.rise)
        return correction, advance * (missing / torch.einsum("lnd,ld->ln", advance, self.rise))[..., None]

    def gradient_step(self, wanted: float) -> tuple[Tensor, Tensor]:
        """(zero, advance), both (layers, 1, d): the same along the plain gradient, without a correction."""
        advance = self.rise * ((wanted - self.log_odds) / self.rise.pow(2).sum(-1))[:, None]
        return torch.zeros_like(advance)[:, None], advance[:, None]


class Metric(NamedTuple):
    """How a direction z at x, the head's input, counts at h, |J^T z|^2: on the span of rows that were pulled back."""

    basis: Tensor  # (layers, rows, d_head) float64, orthonormal
    gram: Tensor  # (layers, rows, rows) float64, inner products of the basis pulled back

    def leading_part(self, rows: Tensor) -> Tensor:
        """The RANK combinations of `rows` R (layers, k, d_head) that hold most of J^T R^T R J, as far as is known."""
        if rows.shape[1] <= RANK:
            return rows
        r = float64(rows)
        inside = r @ self.basis.mT  # (layers, k, rows)
        return (eigh(inside @ self.gram @ inside.mT)[1][..., -RANK:].mT @ r).to(rows)


def _in_steps(
    first: Linearised,
    linearised: Callable[[Tensor], Linearised],
    step: Callable,
    route: list[float],
    goals: Sequence[float],
    deltas: Tensor,
    move: Callable,
) -> tuple[Tensor, ...]:
    """Log-probability, KL, length (layers, 1, goals) and perturbation (layers, 1, goals, d) that reach each goal.

    Args:
        first: the model where the steps begin.
        linearised: the model at perturbations (layers, d): each later step is linearised where the last one led.
        step: a method of Linearised that gives the correction and the advance to given log-odds.
        route: probabilities to aim at in turn, the goals among them.
        deltas: (layers, d), where to begin.
    """
    layers, multiples, found = torch.arange(len(deltas)), torch.tensor(MULTIPLES, device=deltas.device), []
    here, metric = first, None
    for place, goal in enumerate(route):
        fresh, wanted = place % ALL_ROWS == 0, _log_odds_of(goal)
        if place:
            here = linearised(deltas, metric=None if fresh else metric)
        if fresh:
            metric = here.metric()
        correction, advance = (part.to(deltas) for part in step(here, wanted))  # (layers, n, d)
        start = deltas[:, None] + correction
        swept = move(start, advance, multiples)
        odds = log_odds(swept.target_log_prob).nan_to_num(nan=-math.inf)  # (layers, n, multiples)
        wanted = torch.full_like(odds[..., 0], wanted)
        index, reached = first_reaching(odds, wanted)
        # Of the dampings that reach the goal, the cheapest is taken; if none does, the one that comes nearest.
        cost = at_crossing(swept.kl, odds, wanted, index).masked_fill(~reached, math.inf).nan_to_num(nan=math.inf)
        best = torch.where(cost.isfinite().any(-1), cost.argmin(-1), odds.amax(-1).argmax(-1))
        odds, wanted, index, reached, start, advance = (
            part[layers, best] for part in (odds, wanted, index, reached, start, advance)
        )
        length, exact = at_crossing(multiples.expand(odds.shape), odds, wanted, index), goal in goals
        if exact:
            end = reach(partial(move, start, advance), multiples.expand(odds.shape), wanted, index)
            length, reached = end.length, reached & end.reached
        deltas = start + advance * torch.where(reached, length, multiples[odds.argmax(-1)])[:, None]
        if exact:
            column = (end.log_prob, end.kl, deltas.norm(dim=-1))
            column = [part.masked_fill(~reached, math.nan) for part in column]
            found.append((*column, deltas.masked_fill(~reached[:, None], math.nan)))
    return tuple(torch.stack(part, dim=1)[:, None] for part in zip(*found, strict=True))

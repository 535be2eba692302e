"""Steering: how far a token's probability can be raised, and at which cost in KL.

Any change of a model that raises a token from probability p0 to p costs at least

    KL >= p0 ln(p0 / p) + (1 - p0) ln((1 - p0) / (1 - p))

The limit is reached if all other tokens keep their proportions. Per nat of a small KL, the natural gradient raises the
token most: n = (F + damping lambda_1)^-1 grad log-odds (Amari, "Natural gradient works efficiently in learning", 1998).

Steering in several steps linearises the model anew at each point reached. Each step is a Gauss-Newton step for the
least KL at given log-odds: an advance along n, and a correction that undoes the avoidable KL of the earlier steps.
F changes little from step to step, so its root is pulled back once, and then only the part of it that counts most.
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
from residual_fisher.model.predictions import FULL_PRECISION, HALF_PRECISION, most_probable, sweep
from residual_fisher.model.words import token_of

GOALS = (0.1, 0.25, 0.5, 0.9)  # probabilities to which the target is raised
PACED_GOAL = 0.5  # reached in the number of steps asked for; higher goals continue at the same pace
STEPPED = ("natural_steps", "gradient_steps")  # directions followed in several steps
STEERING_TOKENS = 200  # counted by F unless a run counts fewer or more: measured as good as all tokens
RANK = 16  # rows that all steps but the first pull back for F, in place of one for each token
DAMPINGS = (0.1, 0.03, 0.01, 0.004, 0.0015)  # in units of lambda_1; each of several steps takes the cheapest
LENGTHS = (3e-3, 1e1, 17)  # lengths tried along a straight direction: shortest and longest (norms of h), count
MULTIPLES = (0.0, 0.7, 1.0, 1.4, 2.0)  # of the step to a goal, tried because its gradient holds only nearby
ROUNDS = 3  # of interpolation at most, which locate the goal on it
NEAR = 0.002  # log-odds that it may be off by for another round to be spared
INTERPOLATED = 0.005  # log-odds that a length found by interpolation may fall short by: 0.4988 in place of 0.5
IMPROBABLE = 1e4  # nats of an event that takes the place of an infinity or NaN
ROUNDING = 1e-7  # rounding error of a float32 probability close to 1


class Steered(NamedTuple):
    """The shortest perturbation along each direction that reaches each goal; NaN where none does."""

    target: int  # token that is raised
    before: float  # probability of the target, unperturbed
    names: list[str]  # of the directions
    goals: list[float]  # ascending: the GOALS above the target's unperturbed probability
    log_prob: Tensor  # (layers, directions, goals) float32, nats: of the target, the goal's but for INTERPOLATED
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
    here = Linearised(point, torch.zeros_like(h), target, tokens, gradients)
    others = {name: u.to(here.rise) for name, u in directions.items()}
    straight = {"natural": here.solve(here.rise, damping), "gradient": here.rise, **others}
    along = torch.stack(list(straight.values()), dim=1)  # (layers, n, d)
    downhill = torch.einsum("lnd,ld->ln", along, here.rise) < 0
    along = torch.nn.functional.normalize(torch.where(downhill[..., None], -along, along), dim=-1).to(h)

    route, norms = waypoints(probability, goals, steps), h.norm(dim=-1)[:, None, None]
    at_once = _at_once(here, along * norms, goals, move)
    natural, deltas = _in_steps(here, Linearised, route, goals, move)
    gradient, _ = _in_steps(here, Slope, route, goals, move)
    in_steps = torch.stack([natural, gradient], dim=2)  # (3, layers, 2, goals)
    in_steps[0] /= norms
    length, log_prob, kl = torch.cat([at_once, in_steps], dim=2)
    return Steered(target, probability, [*straight, *STEPPED], goals, log_prob, kl, length, deltas, hidden)


class Lines(NamedTuple):
    """Straight lines in h: start + length * advance."""

    layers: Tensor  # (lines,) int64, numbers of layers, ascending
    start: Tensor  # (lines, d)
    advance: Tensor  # (lines, d)

    @classmethod
    def of(cls, point: PromptPoint, start: Tensor, advance: Tensor) -> "Lines":
        """From (layers, n, d) at all layers of a point."""
        layers = torch.tensor(point.layers).repeat_interleave(start.shape[1])
        return cls(layers, start.flatten(0, 1), advance.flatten(0, 1))

    def take(self, index: Tensor) -> "Lines":
        return Lines(*(part[index.to(part.device)] for part in self))


def _move(point: PromptPoint, target: int, chunks: Chunks | None, lines: Lines, lengths: Tensor) -> Tensor:
    """(3, lines, m): `lengths` (m,) or (lines, m), and the target's log-probability and KL to which they lead."""
    lengths = lengths.expand(len(lines.start), -1)
    deltas = lines.start[:, None] + lines.advance[:, None] * lengths[..., None]
    found = sweep(point, deltas, target, 1, chunks, lines.layers)
    return torch.stack([lengths, found.target_log_prob.nan_to_num(nan=-IMPROBABLE, neginf=-IMPROBABLE), found.kl])


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
    here = Linearised(point, torch.zeros_like(point.activations), target, tokens, None)
    move = partial(_move, point, target, None)
    (_, log_prob, kl), deltas = _in_steps(here, Linearised, waypoints(before, [to], steps), [to], move)
    if not kl.isfinite().all():
        raise NumericalError(f"steps at layer {layer} do not raise the token to {to}: try more steps, or another layer")
    after = log_prob.exp().item()
    return Steering(layer, target, deltas[0, 0], before, after, kl.item(), least_kl(before, after))


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


def at_crossing(values: Tensor, odds: Tensor, wanted: Tensor, index: Tensor) -> Tensor:
    """`values` (..., m) interpolated to (...), where the log-odds are `wanted` between `index` - 1 and `index`.

    At index 0 the first. Where `wanted` is not reached, the one at `index`.
    """
    both = torch.stack([(index - 1).clamp(min=0), index], dim=-1)
    (x0, x1), (y0, y1) = (part.gather(-1, both).unbind(-1) for part in (odds, values))
    share = torch.where(x0 < x1, ((wanted - x0) / (x1 - x0)).clamp(0, 1), 1)
    return y0 + (y1 - y0) * share


def crossing(lengths: Tensor, odds: Tensor, wanted: Tensor) -> Tensor:
    """The length (lines,) that leads to the `wanted` log-odds, by those of `lengths` (lines, m), ascending; m >= 4.

    The cubic through four of them says it, if it stays where the log-odds are first reached; or else a straight line.
    """
    index = first_reaching(odds, wanted)[0].clamp(min=1)
    low, high = lengths.gather(-1, torch.stack([index - 1, index], dim=-1)).unbind(-1)
    four = (index - 2).clamp(0, lengths.shape[-1] - 4)[:, None] + torch.arange(4, device=index.device)
    x, y = lengths.gather(-1, four), odds.gather(-1, four)
    shares = (wanted[:, None, None] - y[:, None]) / (y[..., None] - y[:, None])  # Lagrange's, (lines, 4, 4)
    shares = shares.masked_fill(torch.eye(4, dtype=torch.bool, device=x.device), 1)
    cubic = (x * shares.prod(-1)).sum(-1)
    return torch.where((low < cubic) & (cubic < high), cubic, at_crossing(lengths, odds, wanted, index))


def reach(move: Callable[[Lines, Tensor], Tensor], lines: Lines, tried: Tensor, wanted: Tensor) -> Tensor:
    """(3, lines): the shortest length that leads to log-odds, and its log-probability and KL; NaN where none does.

    The length is interpolated. In half precision log-odds go in leaps, and what it leads to may fall short. Then the
    next longer one that was tried is taken.

    Args:
        tried: (3, lines, m), what `move` says of ascending lengths, at least four.
        wanted: (lines,).
    """
    result = tried.new_full(tried.shape[:2], math.nan)
    _, reached = first_reaching(log_odds(tried[1]), wanted)
    if not reached.any():
        return result
    tried, wanted, lines = tried[:, reached], wanted[reached], lines.take(reached)
    for _ in range(ROUNDS):
        found, odds = _at_goal(tried, wanted)
        far = (odds - wanted).abs() > NEAR
        if not far.any():
            break
        length = crossing(tried[0, far], log_odds(tried[1, far]), wanted[far])
        found[:, far] = move(lines.take(far), length[:, None])[..., 0]
        tried = torch.cat([tried, found[..., None]], dim=-1)  # of a line that is near, what it has already, once more
        tried = tried.gather(-1, tried[0].argsort(-1).expand_as(tried))
    result[:, reached] = _at_goal(tried, wanted)[0]
    return result


def _at_goal(tried: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of `tried` (3, lines, m) the first (3, lines) that reaches the log-odds, and its log-odds (lines,)."""
    odds = log_odds(tried[1])
    index, _ = first_reaching(odds, wanted - INTERPOLATED)
    return tried.gather(-1, index[:, None].expand(3, -1, 1)).squeeze(-1), odds.gather(-1, index[:, None]).squeeze(-1)


def _at_once(here: "Linearised", along: Tensor, goals: list[float], move: Callable) -> Tensor:
    """(3, layers, n, goals): length, log-probability and KL of the shortest steps along (layers, n, d) to each goal."""
    shortest, longest, count = LENGTHS
    lengths = torch.logspace(math.log10(shortest), math.log10(longest), count, device=along.device)
    lines = Lines.of(here.point, torch.zeros_like(along), along)
    tried = move(lines, torch.cat([lengths.new_zeros(1), lengths]))
    each = torch.arange(len(lines.start)).repeat_interleave(len(goals))
    wanted = torch.tensor([_log_odds_of(goal) for goal in goals], device=along.device).repeat(len(lines.start))
    found = reach(move, lines.take(each), tried[:, each], wanted)
    return found.unflatten(1, (*along.shape[:2], len(goals)))


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


class Slope:
    """At perturbed points, one perturbation (layers, d) a layer: the target's `log_odds` (layers,), and their gradient.

    The gradient is `rise` (layers, d).
    """

    multiples = (0.7, 1.0, 1.5)  # of a step, tried because its gradient holds only nearby

    def __init__(self, point: PromptPoint, deltas: Tensor, target: int, chunks: Chunks | None):
        self.point, self.deltas, self.target, self.chunks = point, deltas, target, chunks
        here = linearize_perturbed(point, deltas, torch.tensor(point.layers))
        row = here.cotangents(torch.full_like(here.log_probs[:, :1], target, dtype=torch.int64))
        self._set(here, pull_back(here, row, chunks)[0, :, 0])

    def _set(self, here: Point, gradient: Tensor) -> None:
        """From the gradient (layers, d) of the target's log-probability."""
        log_prob = float64(here.log_probs[:, self.target])
        self.log_odds = log_odds(log_prob)
        self.remainder = (1 - log_prob.exp()).clamp(min=ROUNDING)[:, None]  # probability of all other tokens
        self.rise = float64(gradient) / self.remainder

    def moved(self, deltas: Tensor) -> "Slope":
        return Slope(self.point, deltas, self.target, self.chunks)

    def steps(self, wanted: float) -> tuple[Tensor, Tensor]:
        """(zero, advance), both (layers, 1, d). To first order, it leads to the wanted log-odds, along the gradient."""
        advance = self.rise * ((wanted - self.log_odds) / self.rise.square().sum(-1))[:, None]
        return torch.zeros_like(advance)[:, None], advance[:, None]


class Linearised(Slope):
    """The model linearised at perturbed points, one perturbation (layers, d) a layer.

    `kl_gradient` (layers, d) is that of KL(unperturbed || here). F is root^T root at each layer, over `tokens` tokens
    and all others as one.

    `jacobian` (layers, d_head, d) estimates J = dx/dh. It is exact for the rows that are pulled back here: without a
    `last` point, all of them; with one, those that hold most of F by its estimate. What they say of J takes the place
    of what the last point knew.
    """

    multiples = (1.0,)  # a step falls short of a waypoint, or leads beyond it; the next one knows

    def __init__(
        self,
        point: PromptPoint,
        deltas: Tensor,
        target: int,
        tokens: int,
        chunks: Chunks | None,
        last: "Linearised | None" = None,
    ):
        self.point, self.deltas, self.target, self.tokens, self.chunks = point, deltas, target, tokens, chunks
        here = linearize_perturbed(point, deltas, torch.tensor(point.layers))
        head, (log_p, ids) = here.output_head(), most_probable(here.log_probs, tokens)
        weights = log_p.exp()
        rows = head.cotangents(ids)
        # All other tokens count as one. Its gradient follows, since the expectation over all tokens is zero.
        rest = (1 - weights.sum(-1, keepdim=True)).clamp(min=1e-9)
        others = -(weights[..., None] * rows).sum(1, keepdim=True) / rest[..., None]
        rows = torch.cat([rows, others], dim=1) * torch.cat([weights, rest], dim=1).sqrt()[..., None]
        unperturbed = point.log_probs.exp().expand(len(deltas), 1, -1)
        ends = torch.cat([head.cotangents(torch.full_like(ids[:, :1], target)), -head.combine(unperturbed)], dim=1)

        if last is None:
            jacobian, leading = rows.new_zeros(len(rows), rows.shape[-1], deltas.shape[-1]), rows
        else:
            jacobian, leading = last.jacobian, leading_part(rows, rows @ last.jacobian)
        basis = torch.linalg.qr(float64(torch.cat([leading, ends], dim=1)).mT)[0].to(rows)  # (layers, d_head, n)
        self.jacobian = jacobian + basis @ (pull_back(here, basis.mT, chunks)[0] - basis.mT @ jacobian)
        self.root, ends = (float64(part @ self.jacobian) for part in (rows, ends))
        self._set(here, ends[:, 0])
        self.kl_gradient = ends[:, 1]
        self.values, self.vectors = eigh(self.root @ self.root.mT)
        # At given log-odds, the Hessian of KL is that of the other tokens' own KL times their unperturbed probability.
        # F weighs it with their present probability instead. (F also differs along `rise`, where the step is given.)
        self.correction_factor = self.remainder / (1 - point.log_probs[target].exp().to(self.remainder))

    def moved(self, deltas: Tensor) -> "Linearised":
        return Linearised(self.point, deltas, self.target, self.tokens, self.chunks, self)

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """(F + damping lambda_1)^-1 b (layers, d), through the Gram matrix of F's factor."""
        shift = damping * self.values[:, -1:]
        inner = self.vectors.mT @ (self.root @ b[..., None]) / (self.values + shift)[..., None]
        return (b - (self.root.mT @ (self.vectors @ inner)).squeeze(-1)) / shift

    def steps(self, wanted: float) -> tuple[Tensor, Tensor]:
        """(correction, advance), both (layers, dampings, d), for each of DAMPINGS.

        To first order, their sum leads to the wanted log-odds at the least KL.
        """
        correction = [-self.correction_factor * self.solve(self.kl_gradient, damping) for damping in DAMPINGS]
        correction = torch.stack(correction, dim=1)
        advance = torch.stack([self.solve(self.rise, damping) for damping in DAMPINGS], dim=1)
        missing = wanted - self.log_odds[:, None] - torch.einsum("lnd,ld->ln", correction, self.rise)
        return correction, advance * (missing / torch.einsum("lnd,ld->ln", advance, self.rise))[..., None]


def leading_part(rows: Tensor, pulled: Tensor) -> Tensor:
    """The RANK combinations of `rows` R (layers, k, d_head) that hold most of F = J^T R^T R J, from `pulled` R J."""
    if rows.shape[1] <= RANK:
        return rows
    pulled = float64(pulled)
    return eigh(pulled @ pulled.mT)[1][..., -RANK:].mT.to(rows) @ rows


def _in_steps(
    first: Linearised, kind: type[Slope], route: list[float], goals: Sequence[float], move: Callable
) -> tuple[Tensor, Tensor]:
    """(3, layers, goals), length, log-probability and KL of the perturbations (layers, goals, d) that reach each goal.

    Args:
        first: the model where the steps begin. Each later step is linearised where the last one led.
        kind: its class says which steps are tried.
        route: probabilities to aim at in turn, the goals among them.
    """
    point, here, deltas, ends = first.point, first, first.deltas, []
    layers, multiples = torch.arange(len(deltas)), torch.tensor(kind.multiples, device=deltas.device)
    before = point.log_probs[first.target].exp().item()
    for place, goal in enumerate(route):
        here = kind.moved(here, deltas) if place else first
        correction, advance = (part.to(deltas) for part in kind.steps(here, _log_odds_of(goal)))  # (layers, n, d)
        start = deltas[:, None] + correction
        tried = move(Lines.of(point, start, advance), multiples).unflatten(1, advance.shape[:2])
        lengths, odds, kl = tried[0], log_odds(tried[1]), tried[2]  # (layers, n, multiples)
        wanted = torch.full_like(odds[..., 0], _log_odds_of(goal))
        index, reached = first_reaching(odds, wanted)
        index = torch.where(reached, index, odds.argmax(-1))
        length, reaches, cost = (at_crossing(values, odds, wanted, index) for values in (lengths, odds, kl))
        # Log-odds that are missing are still to be paid for: each costs p - p0 nats at least.
        best = (cost + (goal - before) * (wanted - reaches)).nan_to_num(nan=math.inf).argmin(-1)
        start, advance, length = (part[layers, best] for part in (start, advance, length))
        deltas = start + advance * length[:, None]
        if goal in goals:
            ends.append((start, advance))
    start, advance = (torch.stack(part, dim=1) for part in zip(*ends, strict=True))  # (layers, goals, d)
    lines = Lines.of(point, start, advance)
    wanted = torch.tensor([_log_odds_of(goal) for goal in goals], device=deltas.device).repeat(len(layers))
    tried = move(lines, torch.tensor(MULTIPLES, device=deltas.device))
    found = reach(move, lines, tried, wanted).unflatten(1, start.shape[:2])
    deltas = start + advance * found[0][..., None]
    found[0] = deltas.norm(dim=-1)
    return found, deltas

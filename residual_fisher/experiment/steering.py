"""Steering: how much a chosen token's probability can be raised, and at which cost in KL.

Whatever is done to a model, raising a token from probability p0 to p costs at least

    KL >= p0 ln(p0 / p) + (1 - p0) ln((1 - p0) / (1 - p))

which is reached if all other tokens keep their proportions. The direction that raises it most per nat of a small KL is
the natural gradient, n = (F + damping lambda_1)^-1 grad log-odds (Amari, "Natural gradient works efficiently in
learning", 1998). In steps, each from where the last one led, F and the gradients are taken anew, and n is joined by
the step that undoes what was lost on the way: Gauss-Newton steps for the least KL at given log-odds.
"""

from collections.abc import Callable
import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor

import fisher
from fisher import Chunks, Point
from residual_fisher.experiment.perturbation import Sweep, sweep

GOALS = (0.1, 0.25, 0.5, 0.9)  # probabilities of the target
ROUNDING = 1e-7  # of a probability close to 1, in float32
PACED = 0.5  # the goal that is reached in the number of steps asked for
IN_STEPS = ("natural_steps", "gradient_steps")
TOKENS = 200  # that F counts, where all are asked for: with the rest as one more, all of them measured no better
DAMPINGS = (0.1, 0.02, 0.005, 0.001)  # of lambda_1, tried at each of several steps
LENGTHS = (3e-3, 1e1, 17)  # tried along a straight direction: shortest and longest, in norms of h, and how many
MULTIPLES = (0.6, 0.85, 1.0, 1.25, 1.8)  # of a step, which does not quite do what its gradient says
CUTS = 6  # of the interval in which a goal is reached


class Steered(NamedTuple):
    """What the first perturbations that reach each goal do; NaN where there is none."""

    target: int
    before: float  # its probability, unperturbed
    names: list[str]  # of the directions
    goals: list[float]  # probabilities, ascending: those of GOALS that the target does not exceed unperturbed
    log_prob: Tensor  # (layers, directions, goals) float32, nats, of the target: just above the goal's
    kl: Tensor  # the same, nats
    norms: Tensor  # the same: |delta| in units of |h|
    deltas: Tensor  # (layers, goals, d) float32, of the natural gradient in steps


def least_kl(before: float, after: float) -> float:
    """Nats that it costs at least to bring a token from one probability to a higher one.

    Of probabilities that are rounded to 0 or to 1, too.
    """
    after = min(after, 1 - ROUNDING)
    own = before * math.log(before / after) if before else 0.0
    return own + (1 - before) * math.log((1 - before) / (1 - after))


def steer(
    point: Point,
    directions: dict[str, Tensor],
    target: int,
    tokens: int,
    steps: int,
    damping: float,
    gradients: Chunks,
    perturbations: Chunks,
) -> Steered:
    """Raises the target along straight directions and in steps, at every layer of a point.

    Args:
        directions: (layers, d) by name, to compare with; each is turned so that it raises the target.
        tokens: the most probable ones, that F counts.
        damping: of the straight natural gradient, in units of lambda_1.
    """
    probability = point.log_probs[target].exp().item()
    goals = [goal for goal in GOALS if goal > probability]
    if not goals:
        nothing = point.activations.new_empty(len(point.activations), 0, 0)
        deltas = point.activations[:, None][:, :0]
        return Steered(target, probability, [], [], nothing, nothing, nothing, deltas)
    here = Linearised(point, torch.zeros_like(point.activations), target, tokens, gradients)
    straight = {"natural": here.solve(here.rise, damping), "gradient": here.rise}
    straight |= {name: u.to(here.rise) for name, u in directions.items()}
    along = torch.stack(list(straight.values()), dim=1)  # (layers, n, d)
    downhill = torch.einsum("lnd,ld->ln", along, here.rise) < 0
    along = torch.nn.functional.normalize(torch.where(downhill[..., None], -along, along), dim=-1)

    found = [_along(point, along.to(point.activations), goals, target, perturbations)]
    way = waypoints(probability, goals, steps)
    for natural in (True, False):
        found.append(_in_steps(point, way, goals, target, tokens if natural else 1, natural, gradients, perturbations))
    log_prob, kl, norms = (torch.cat(part, dim=1) for part in zip(*(f[:3] for f in found), strict=True))
    norms = norms / point.activations.norm(dim=-1)[:, None, None]
    return Steered(target, probability, [*straight, *IN_STEPS], goals, log_prob, kl, norms, found[1].deltas[:, 0])


class _Found(NamedTuple):
    log_prob: Tensor  # (layers, n, goals)
    kl: Tensor
    length: Tensor
    deltas: Tensor  # (layers, n, goals, d)


def log_odds(log_prob: Tensor) -> Tensor:
    return log_prob - torch.log1p(-log_prob.exp().clamp(max=1 - ROUNDING))


def _odds_of(probability: float) -> float:
    return math.log(probability / (1 - probability))


# --- along a straight direction ------------------------------------------------------------------


def crossing(steps: Tensor, odds: Tensor, wanted: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(low, high, index): of ascending steps (..., m) the first whose log-odds reach `wanted`, and the one before it.

    Args:
        before: (...): what stands before the first step.
    """
    index = (odds >= wanted[..., None]).int().argmax(-1, keepdim=True)
    low = steps.gather(-1, (index - 1).clamp(min=0))[..., 0]
    return torch.where(index[..., 0] > 0, low, before), steps.gather(-1, index)[..., 0], index[..., 0]


def at_crossing(values: Tensor, odds: Tensor, wanted: Tensor, index: Tensor) -> Tensor:
    """`values` (...), interpolated between place `index` - 1 and place `index` to where the log-odds are `wanted`."""
    ends = [torch.stack([(index - 1).clamp(min=0), index], dim=-1)]
    (x0, x1), (y0, y1) = (part.gather(-1, *ends).unbind(-1) for part in (odds, values))
    share = torch.where(index > 0, ((wanted - x0) / (x1 - x0)).clamp(0, 1), torch.ones_like(x0))
    return y0 + (y1 - y0) * share


def _along(point: Point, along: Tensor, goals: list[float], target: int, chunks: Chunks) -> _Found:
    """The shortest steps along unit vectors (layers, n, d) that reach each goal."""

    def swept(steps: Tensor) -> tuple[Tensor, Sweep]:  # (layers, n, ..., m)
        shape = (*along.shape[:2], *(1 for _ in steps.shape[2:]), -1)
        found = sweep(point, along.reshape(shape) * steps[..., None], target, 1, chunks)
        return log_odds(found.target_log_prob), found

    shortest, longest, count = LENGTHS
    lengths = torch.logspace(math.log10(shortest), math.log10(longest), count, device=along.device)
    lengths = (point.activations.norm(dim=-1)[:, None, None] * lengths).expand(-1, along.shape[1], -1)
    odds, _ = swept(lengths)
    wanted = torch.tensor([_odds_of(goal) for goal in goals], device=along.device)
    wanted = wanted.expand(*along.shape[:2], -1)  # (layers, n, goals)
    nowhere = ~(odds[:, :, None] >= wanted[..., None]).any(-1)
    lengths, odds = (part[:, :, None].expand(-1, -1, len(goals), -1) for part in (lengths, odds))
    low, high, _ = crossing(lengths, odds, wanted, torch.zeros_like(wanted))

    cuts = low[..., None] + (high - low)[..., None] * torch.linspace(0, 1, CUTS + 1, device=along.device)
    odds, _ = swept(cuts)
    _, _, index = crossing(cuts, odds, wanted, low)
    length = at_crossing(cuts, odds, wanted, index)
    _, found = swept(length[..., None])  # interpolated, so see what is there
    parts = (found.target_log_prob[..., 0], found.kl[..., 0], length)
    log_prob, kl, length = (part.masked_fill(nowhere, math.nan) for part in parts)
    return _Found(log_prob, kl, length, along[:, :, None] * length[..., None])


# --- in steps ------------------------------------------------------------------------------------


def waypoints(probability: float, goals: list[float], steps: int) -> list[float]:
    """Probabilities on the way to all goals, which are among them: `steps` of them to PACED, and on at that pace.

    They are evenly spaced in arcsin sqrt p, the distance in the Fisher metric of two outcomes.
    """
    start, paced = (math.asin(math.sqrt(p)) for p in (probability, PACED))
    pace = max(paced - start, 0.1) / steps
    way, here = [], start
    for goal in goals:
        end = math.asin(math.sqrt(goal))
        count = max(1, round((end - start) / pace) - len(way))
        way += [math.sin(here + (end - here) * i / count) ** 2 for i in range(1, count)] + [goal]
        here = end
    return way


class Linearised:
    """The model linearised where perturbations (layers, d) have led, one at each layer."""

    def __init__(self, point: Point, deltas: Tensor, target: int, tokens: int, chunks: Chunks):
        layers = len(deltas)
        here = fisher.linearize_perturbed(point, deltas, torch.arange(layers))
        head, p = here.output_head(), here.log_probs.exp()
        weights, ids = p.topk(min(tokens, p.shape[-1]))
        asked = torch.full_like(ids[:, :1], target)
        unperturbed = point.log_probs.exp().expand(layers, 1, -1)
        rows = head.cotangents(ids)
        # All other tokens as one: its gradient follows, since the expectation of all is zero.
        rest = (1 - weights.sum(-1, keepdim=True)).clamp(min=1e-9)
        others = -(weights[..., None] * rows).sum(1, keepdim=True) / rest[..., None]
        rows = torch.cat([rows, others], dim=1) * torch.cat([weights, rest], dim=1).sqrt()[..., None]
        rows = torch.cat([rows, head.cotangents(asked), -head.combine(unperturbed)], dim=1)
        gradients = fisher.float64(fisher.pull_back(here, rows, chunks)[0])  # (layers, tokens + 3, d)
        self.root, target_gradient, self.loss = gradients[:, :-2], gradients[:, -2], gradients[:, -1]
        self.values, self.vectors = torch.linalg.eigh(self.root @ self.root.mT)
        log_prob = here.log_probs[:, target].to(gradients)
        self.odds = log_odds(log_prob)  # (layers,)
        # At given log-odds the Hessian of KL is that of the other tokens' own KL times their unperturbed probability,
        # while F weighs it with their present one. (F also differs along the rise, where the step is given.)
        other = (1 - log_prob.exp()).clamp(min=ROUNDING)
        self.shrink = (other / (1 - point.log_probs[target].exp().to(other)))[:, None]
        self.rise = target_gradient / (1 - log_prob.exp()).clamp(min=ROUNDING)[:, None]  # (layers, d): grad log-odds

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """(F + damping lambda_1)^-1 b (layers, d), through the Gram matrix of F's factor."""
        shift = damping * self.values[:, -1:]
        inner = (self.root @ b[..., None]).squeeze(-1)
        inner = (self.vectors.mT @ inner[..., None]).squeeze(-1) / (self.values + shift)
        inner = (self.vectors @ inner[..., None]).squeeze(-1)
        return (b - (self.root.mT @ inner[..., None]).squeeze(-1)) / shift

    def natural_steps(self, wanted: float) -> tuple[Tensor, Tensor]:
        """(back, on), both (layers, dampings, d): they lead to the wanted log-odds, to first order, at the least KL."""
        back = torch.stack([-self.shrink * self.solve(self.loss, damping) for damping in DAMPINGS], dim=1)
        on = torch.stack([self.solve(self.rise, damping) for damping in DAMPINGS], dim=1)
        missing = wanted - self.odds[:, None] - torch.einsum("lnd,ld->ln", back, self.rise)
        return back, on * (missing / torch.einsum("lnd,ld->ln", on, self.rise))[..., None]

    def gradient_step(self, wanted: float) -> tuple[Tensor, Tensor]:
        on = self.rise * ((wanted - self.odds) / self.rise.pow(2).sum(-1))[:, None]
        return torch.zeros_like(on)[:, None], on[:, None]


def _in_steps(
    point: Point,
    way: list[float],
    goals: list[float],
    target: int,
    tokens: int,
    natural: bool,
    gradients: Chunks,
    perturbations: Chunks,
) -> _Found:
    """What the perturbations do that are reached in steps, each linearised where the last one led."""
    deltas, layers = torch.zeros_like(point.activations), torch.arange(len(point.activations))
    multiples = torch.tensor(MULTIPLES, device=deltas.device)
    parts = torch.linspace(0, 1, CUTS + 1, device=deltas.device)
    found = []
    for goal in way:
        here, wanted = Linearised(point, deltas, target, tokens, gradients), _odds_of(goal)
        back, on = (part.to(deltas) for part in (here.natural_steps if natural else here.gradient_step)(wanted))
        back = deltas[:, None] + back
        swept = sweep(point, back[:, :, None] + on[:, :, None] * multiples[:, None], target, 1, perturbations)
        odds = log_odds(swept.target_log_prob).nan_to_num(nan=-math.inf)  # (layers, n, multiples)
        reached, wanted = (odds >= wanted).any(-1), torch.full_like(odds[..., 0], wanted)
        low, high, index = crossing(multiples.expand(odds.shape), odds, wanted, torch.zeros_like(wanted))
        # of several dampings the one that costs least where it reaches the goal; of none that does, the one nearest
        cost = at_crossing(swept.kl, odds, wanted, index).masked_fill(~reached, math.inf).nan_to_num(nan=math.inf)
        best = torch.where(cost.isfinite().any(-1), cost.argmin(-1), odds.amax(-1).argmax(-1))
        odds, reached, wanted, back, on, low, high = (
            part[layers, best] for part in (odds, reached, wanted, back, on, low, high)
        )

        cuts = low[:, None] + (high - low)[:, None] * parts
        there = log_odds(sweep(point, back[:, None] + on[:, None] * cuts[..., None], target, 1, perturbations)[-1])
        _, _, index = crossing(cuts, there, wanted, low)
        length = torch.where(reached, at_crossing(cuts, there, wanted, index), multiples[odds.argmax(-1)])
        deltas = back + on * length[:, None]
        if goal in goals:
            swept = sweep(point, deltas[:, None], target, 1, perturbations)
            column = (swept.target_log_prob[:, 0], swept.kl[:, 0], deltas.norm(dim=-1))
            column = [part.masked_fill(~reached, math.nan) for part in column]
            found.append((*column, deltas.masked_fill(~reached[:, None], math.nan)))
    return _Found(*(torch.stack(part, dim=1)[:, None] for part in zip(*found, strict=True)))


# --- as it is written ----------------------------------------------------------------------------


def steering_record(steered: Steered, layers: list[str], show: Callable[[int], str]) -> dict:
    """By layer, direction and goal what it costs; None where the goal is not reached."""
    columns, before = [part.tolist() for part in (steered.log_prob, steered.kl, steered.norms)], steered.before

    def entry(row: int, direction: int, goal: int) -> dict | None:
        log_prob, kl, norms = (column[row][direction][goal] for column in columns)
        if not math.isfinite(kl):
            return None
        least = least_kl(before, after := math.exp(log_prob))
        others = max(0.0, kl - least) / (1 - before)  # the rest of KL, by its chain rule
        found = {"probability": after, "kl": kl, "least_kl": least, "ratio": kl / least}
        return {**found, "others_kl": others, "norms": norms}

    by_layer = {
        layer: {
            name: {f"{goal:g}": entry(row, i, j) for j, goal in enumerate(steered.goals)}
            for i, name in enumerate(steered.names)
        }
        for row, layer in enumerate(layers)
    }
    return {"token": show(steered.target), "id": steered.target, "probability": before, "layers": by_layer}


def steering_summary(records: list[dict], layers: list[str]) -> dict:
    """By layer, direction and goal, of the sentences below the goal: the median `ratio` of KL to the least, None if it
    is not finite, and the share that reach it."""

    def over_sentences(layer: str, name: str, goal: str) -> dict | None:
        found = entries_of(records, layer, name, goal)
        if not found:
            return None
        ratio = median_of(found, "ratio")
        reached = sum(entry is not None for entry in found) / len(found)
        return {"ratio_median": ratio if math.isfinite(ratio) else None, "reached": reached}

    names = {layer: dict.fromkeys(name for record in records for name in record["layers"][layer]) for layer in layers}
    goals = [f"{goal:g}" for goal in GOALS]
    return {
        layer: {
            name: {goal: found for goal in goals if (found := over_sentences(layer, name, goal))}
            for name in names[layer]
        }
        for layer in layers
    }


def entries_of(records: list[dict], layer: str, name: str, goal: str) -> list[dict | None]:
    """What a direction costs, by sentence whose target is below the goal; None where it does not reach it."""
    directions = (record["layers"][layer].get(name, {}) for record in records)
    return [direction[goal] for direction in directions if goal in direction]


def median_of(entries: list[dict | None], key: str) -> float:
    """Infinite where at most half of them reach the goal; NaN of none."""
    values = [math.inf if entry is None else entry[key] for entry in entries]
    return statistics.median(values) if values else math.nan

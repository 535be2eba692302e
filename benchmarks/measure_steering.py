"""The figures of docs/findings.md on steering: what it costs to make the target word probable, over the least cost.

    python benchmarks/measure_steering.py  # ten to twenty minutes on two cores

Over the first sentences (diverse order) whose target has a probability between 0.001 and 0.3, at every fifth layer:
KL over the least KL that reaches a probability of 1/2, by direction, in one step and in several; of the steps, what
other goals cost too, and how long their perturbations are. Writes benchmarks/results/steering.json.
"""

import argparse
import time

from measuring import diverse_contexts, embedded, machine, write
import numpy as np
import torch
from torch.nn.functional import pad
from tqdm import tqdm

import fisher
from residual_fisher.experiment.perturbation import control_directions
from residual_fisher.experiment.settings import Settings
from residual_fisher.model.steering import GOALS, STEPPED, Linearised, least_kl, steer_along

PROBABILITIES = (0.001, 0.3)
GOAL = 0.5
DAMPINGS = (0.03, 0.01, 0.001)  # of one step, beside the default one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=20)
    arguments = parser.parse_args()
    subject, settings = embedded(), Settings()
    ratios: dict[str, list] = {}  # by direction: (layers, goals) of each sentence
    norms: dict[str, list] = {}
    seconds, before, other = [], [], None
    bar = tqdm(total=arguments.sentences, unit="sentence")
    for context in diverse_contexts(subject, 10**6):
        point = subject.linearize(context)
        probability = point.log_probs[context.target_id].exp().item()
        previous, other = other, point.activations
        if previous is None or not PROBABILITIES[0] <= probability <= PROBABILITIES[1]:
            continue
        controls = control_directions(point.activations, previous, subject.layers, 0, (0, 0))
        controls["fisher"] = fisher.top_k(point, settings.max_vocab_subset).eigenpairs().vectors[:, 0]
        zero = torch.zeros_like(point.activations)
        here = Linearised(point, zero, context.target_id, settings.max_vocab_subset, fisher.Chunks(128))
        for damping in DAMPINGS:
            controls[f"natural, {damping:g}"] = here.solve(here.rise, damping)
        start = time.process_time()
        steered = steer_along(
            point, controls, context.target_id, settings.max_vocab_subset, settings.steer_steps,
            settings.steer_damping, fisher.Chunks(128), fisher.Chunks(settings.batch_size),
        )  # fmt: skip
        seconds.append(time.process_time() - start)
        before.append(probability)
        least = [[[least_kl(probability, p) for p in row] for row in rows] for rows in steered.log_prob.exp().tolist()]
        ratio = steered.kl.double() / torch.tensor(least)
        ratio, norm = (pad(part, (len(GOALS) - ratio.shape[2], 0), value=np.nan) for part in (ratio, steered.norms))
        for row, name in enumerate(steered.names):
            ratios.setdefault(name, []).append(ratio[:, row].numpy())
            norms.setdefault(name, []).append(norm[:, row].numpy())
        found = figures(ratios, norms, np.array(before))
        about = {"layers": subject.layers, "sentences": len(before), "probability_median": float(np.median(before))}
        cpu = {"cpu_seconds_median": float(np.median(seconds)), "cpu_seconds": [round(value, 1) for value in seconds]}
        write("steering", __file__, {**about, **cpu, **found, "machine": machine(subject.lm)})  # all there is so far
        bar.update()
        if len(before) == arguments.sentences:
            break

    for name, entry in found["found"].items():
        cells = (f"{r or np.inf:.3f} ({s:.0%})" for r, s in zip(entry["ratio_median"], entry["reached"], strict=True))
        print(f"{name:15}", *cells)
    print("above the least, gradient / natural:", found["kl_above_least_gradient_over_natural"])


def figures(ratios: dict[str, list], norms: dict[str, list], before: np.ndarray) -> dict:
    """Medians over sentences, by direction and layer; of steps, by goal too.

    Args:
        ratios, norms: by direction, arrays (layers, goals) of each sentence; NaN where a goal is not reached.
        before: (sentences,) probabilities, unperturbed.
    """
    column = GOALS.index(GOAL)
    by_name = {name: np.stack(values)[..., column] for name, values in ratios.items()}  # (sentences, layers)
    pairs = {"in one step": ("gradient", "natural"), "in steps": ("gradient_steps", "natural_steps")}
    above = {pair: (by_name[g] - 1) / (by_name[n] - 1) for pair, (g, n) in pairs.items()}
    by_goal = {name: {} for name in STEPPED}
    for name in STEPPED:
        for column, goal in enumerate(GOALS):
            if not (before < goal).any():
                continue
            of_goal, lengths = (np.stack(part[name])[before < goal][..., column] for part in (ratios, norms))
            entry = {**summary(of_goal), "norms_median": medians(lengths)}
            by_goal[name][f"{goal:g}"] = {"sentences": len(of_goal), **entry}
    return {
        "found": {name: summary(values) for name, values in by_name.items()},
        "by_goal": by_goal,
        "kl_above_least_gradient_over_natural": {
            pair: [None if np.isnan(v) else v for v in np.nanmedian(values, axis=0)] for pair, values in above.items()
        },
        "all": {name: np.where(np.isnan(v), None, v.round(4)).tolist() for name, v in by_name.items()},
    }


def summary(ratios: np.ndarray) -> dict[str, list]:
    """Of ratios (sentences, layers), NaN where the goal is not reached, by layer."""
    return {"ratio_median": medians(ratios), "reached": np.isfinite(ratios).mean(axis=0).tolist()}


def medians(values: np.ndarray) -> list[float | None]:
    """Over sentences; None where half of them do not reach the goal."""
    middle = np.median(np.where(np.isnan(values), np.inf, values), axis=0)
    return [None if np.isinf(v) else v for v in middle.tolist()]


if __name__ == "__main__":
    main()

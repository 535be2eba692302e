"""The figures of docs/findings.md on steering: what it costs to make the target word probable, over the least cost.

    python benchmarks/measure_steering.py  # half an hour on two cores

Over the first sentences (diverse order) whose target has a probability between 0.001 and 0.3, at every fifth layer:
KL over the least KL that reaches a probability of 1/2, by direction, in one step and in several. Writes
benchmarks/results/steering.json.
"""

import argparse
import time

from measuring import diverse_contexts, embedded, machine, write
import numpy as np
import torch
from tqdm import tqdm

import fisher
from residual_fisher.experiment.perturbation import control_directions
from residual_fisher.experiment.settings import Settings
from residual_fisher.model.steering import GOALS, Linearised, least_kl, steer_along

PROBABILITIES = (0.001, 0.3)
GOAL = 0.5
DAMPINGS = (0.03, 0.01, 0.001)  # of one step, beside the default one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=20)
    arguments = parser.parse_args()
    subject, settings = embedded(), Settings()
    ratios: dict[str, list] = {}  # by direction: (layers, goals) of each sentence
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
        start = time.perf_counter()
        steered = steer_along(
            point, controls, context.target_id, settings.max_vocab_subset, settings.steer_steps,
            settings.steer_damping, fisher.Chunks(128), fisher.Chunks(settings.batch_size),
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
        before.append(probability)
        least = [[[least_kl(probability, p) for p in row] for row in rows] for rows in steered.log_prob.exp().tolist()]
        ratio = steered.kl.double() / torch.tensor(least)
        missing = ratio.new_full((*ratio.shape[:2], len(GOALS) - ratio.shape[2]), float("nan"))
        for row, name in enumerate(steered.names):
            ratios.setdefault(name, []).append(torch.cat([missing, ratio], dim=-1)[:, row].numpy())
        bar.update()
        if len(before) == arguments.sentences:
            break

    at = GOALS.index(GOAL)
    by_name = {name: np.stack(values)[..., at] for name, values in ratios.items()}  # (sentences, layers)
    found = {
        name: {
            "ratio_median": np.nanmedian(np.where(np.isnan(values), np.inf, values), axis=0).tolist(),
            "reached": np.isfinite(values).mean(axis=0).tolist(),
        }
        for name, values in by_name.items()
    }
    above = (by_name["gradient_steps"] - 1) / (by_name["natural_steps"] - 1)
    result = {
        "layers": subject.layers,
        "sentences": len(before),
        "probability_median": float(np.median(before)),
        "seconds_median": float(np.median(seconds)),
        "found": {
            name: {key: [None if np.isinf(v) else v for v in values] for key, values in entry.items()}
            for name, entry in found.items()
        },
        "kl_above_least_gradient_over_natural": np.nanmedian(above, axis=0).tolist(),
        "all": {name: np.where(np.isnan(v), None, v.round(4)).tolist() for name, v in by_name.items()},
        "machine": machine(subject.lm),
    }
    write("steering", __file__, result)
    for name, entry in found.items():
        cells = (f"{r:.3f} ({s:.0%})" for r, s in zip(entry["ratio_median"], entry["reached"], strict=True))
        print(f"{name:15}", *cells)
    print("above the least, gradient / natural:", *(f"{v:.1f}" for v in result["kl_above_least_gradient_over_natural"]))


if __name__ == "__main__":
    main()

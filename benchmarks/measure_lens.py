"""How much a Jacobian lens loses by averaging: fitted on some sentences, audited on others.

    python benchmarks/measure_lens.py

The lens is the mean Jacobian at the last token of 30 of the experiment's prompts (its 21st to 50th). At the first 20
it is compared with each prompt's own Jacobian, as by core_experiment.py --lens. About ten minutes on two cores. Writes
benchmarks/results/measure_lens.json: medians over prompts of the relative errors, by layer, kind of direction and
predictor.
"""

import argparse

from measuring import diverse_contexts, embedded, machine, show, write
import torch

import fisher
from residual_fisher.experiment.lens_audit import KINDS, PREDICTORS, audit
from residual_fisher.model.lens import JacobianLens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--audited", type=int, default=20)
    parser.add_argument("--fitted", type=int, default=30)
    counts = parser.parse_args()
    subject = embedded(range(30))
    contexts = diverse_contexts(subject, counts.audited + counts.fitted)
    total = sum(fisher.stream_jacobians(subject.lm, context.ids) for context in contexts[counts.audited :])
    means = dict(zip(subject.layers[:-1], total[:-1] / counts.fitted, strict=True))
    lens, chunks = JacobianLens(means, counts.fitted), fisher.Chunks()
    points = (subject.linearize(context) for context in contexts[: counts.audited])
    errors = torch.stack([audit(point, lens, 0, chunks).errors for point in points]).quantile(0.5, dim=0)
    layers = {}
    for layer, by_kind in zip(subject.layers[:-1], errors[:-1].tolist(), strict=True):
        kinds = zip(KINDS, by_kind, strict=True)
        layers[str(layer)] = {kind: dict(zip(PREDICTORS, values, strict=True)) for kind, values in kinds}
        show(f"layer {layer}", layers[str(layer)])
    about = {"machine": machine(subject.lm), "audited": counts.audited, "fitted": counts.fitted}
    write("measure_lens", __file__, {**about, "layers": layers})


if __name__ == "__main__":
    main()

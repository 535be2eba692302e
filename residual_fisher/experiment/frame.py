"""The experiment's results as a table, for a notebook:

from residual_fisher import load_results
"""

from collections.abc import Iterator
from pathlib import Path

from residual_fisher.common.program import UserError
from residual_fisher.experiment.records import COLUMNS, NATS, by_direction, read_results


def load_results(directory: str | Path, in_nats: bool = False):
    """The perturbations in an `--output-dir` of core_experiment.py as a tidy pandas DataFrame, a row for each.

    Columns: `sentence` (its number), `prompt`, `target`, `layer`, `scale`, `direction`; of the perturbation `step`,
    `kl`, `predicted_kl` (nats), `top_changed`, `target_prob`, `top_token`, `top_prob`; of F at this layer `eigenvalue`,
    `trace`, `captured_mass`, `effective_rank`, `activation_norm`. What overflowed is missing (NaN).

    Args:
        in_nats: the steps in nats, which a run takes beside its own where those are too short, in their place.
    Raises:
        UserError: there are no readable results, or none in nats, or pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError("load_results needs pandas: `pip install pandas`") from error
    document, key = read_results(Path(directory)), COLUMNS[NATS if in_nats else "perturbations"]
    if key not in document:
        unit = document["experiment_config"]["scale_unit"]
        raise UserError(f"the run in {directory} has no steps in nats beside its own, of --scale-unit {unit}")
    return pandas.DataFrame.from_records(list(_rows(document, key)))


def _rows(document: dict, key: str) -> Iterator[dict]:
    columns = (document[name] for name in ("contexts", "fisher", key))
    for sentence, (context, fisher, perturbations) in enumerate(zip(*columns, strict=True)):
        for layer, by_scale in perturbations.items():
            about = {key: value for key, value in fisher[layer].items() if isinstance(value, float)}
            about = {"eigenvalue": fisher[layer]["eigenvalues"][0], **about}
            place = {"sentence": sentence, "prompt": context["prompt"], "target": context["target_token"]}
            for scale, record in by_scale.items():
                for direction, found in by_direction(record).items():
                    yield {
                        **place,
                        "layer": int(layer),
                        "scale": float(scale),
                        "direction": direction,
                        **{key: found[key] for key in ("step", "kl", "predicted_kl", "top_changed", "target_prob")},
                        "top_token": next(iter(found["top_tokens"]), None),
                        "top_prob": next(iter(found["top_probs"]), None),
                        **about,
                    }

"""What the experiment's page shows: of each sentence and layer the perturbations, the words of v, and what followed."""

from pathlib import Path

from residual_fisher.common.page import embedded, short, signed_shares, write_page
from residual_fisher.experiment.figures import PERTURBED, swept
from residual_fisher.experiment.map_figure import COLOURS
from residual_fisher.experiment.records import COLUMNS, NATS, by_direction
from residual_fisher.experiment.steering_figure import STEERED

PAGE_BYTES = 3_000_000  # of the sentences in a page: the first ones of a longer run
MAX_CELLS = 10_000  # of a map, tokens times layers: the first tokens of a longer text
STOPS = 12  # colours of a map's scale: what is between them is interpolated
UNITS = {"eigenvalue": "steps of λ", "nats": "steps of 1/√λ", "norm": "steps of ‖h‖/100"}
MARKERS = {"o": "disc", "s": "square", "^": "triangle"}
COSTS = ("probability", "kl", "least_kl", "ratio")  # of steering


def about_model(name: str, environment: dict) -> str:
    return f"{name}, {environment['dtype']}"


# --- sentences -------------------------------------------------------------------------------------


def write_experiment(folder: Path, document: dict) -> None:
    """Writes report.html of an experiment_results.json. Raises UserError: the folder cannot be written to."""
    write_page(folder, "experiment", experiment_data(document))


def experiment_data(document: dict) -> dict:
    """What the page holds of an experiment_results.json: the steps in nats, where the protocol's are too short."""
    config, layers = document["experiment_config"], list(document["fisher"][0])
    scales = [f"{scale:g}" for scale in config["scales"]]
    first, in_nats = swept(document)[0][layers[0]], COLUMNS[NATS] in document
    unit, k, given = (
        UNITS["nats" if in_nats else config["scale_unit"]],
        config["max_vocab_subset"],
        config.get("prompt"),
    )
    sentences, size = [], 0
    for number in range(len(document["sentences"])):
        entry = sentence_entry(document, number, layers, scales)
        size += len(embedded(entry))
        if size > PAGE_BYTES and sentences:
            break
        sentences.append(entry)
    return {
        "title": "Perturbing after a prompt" if given else f"Perturbing before “{config['target_word']}”",
        "about": [
            ("model", about_model(config["model_name"], document["environment"])),
            ("F counts", "all tokens" if k == "all" else f"the {k} most probable tokens"),
            ("scales", f"{unit}; the protocol's {UNITS[config['scale_unit']]} are too short" if in_nats else unit),
        ],
        "layers": layers,
        "scales": scales,
        "unit": unit,
        "prompts": bool(given),  # each of which ends where it is perturbed
        "directions": list(by_direction(first[scales[0]])),
        "kinds": {
            kind: [style["label"], style["color"], MARKERS[style["marker"]]] for kind, style in PERTURBED.items()
        },
        "steered": {name: style["label"] for name, style in STEERED.items()},
        "count": len(document["sentences"]),
        "summary": summary_entry(document["summary"]["layers"], "_nats" * in_nats),
        "summary_at": document["summary"]["at_scale" + "_nats" * in_nats],
        "sentences": sentences,
    }


def summary_entry(layers: dict[str, dict], unit: str) -> dict:
    """By layer, medians over all sentences; `unit` ends the keys of those of perturbations."""
    names = {"eigenvalue_median": "", "effective_rank_median": "", "kl_median": unit, "flips": unit}
    return {layer: {name: short(entry[name + end]) for name, end in names.items()} for layer, entry in layers.items()}


def sentence_entry(document: dict, number: int, layers: list[str], scales: list[str]) -> dict:
    """A sentence: `at` has its numbers by layer, and there `along` those by direction, lists by scale."""
    context, perturbed = document["contexts"][number], swept(document)[number]
    entry = {
        "sentence": document["sentences"][number],
        "prompt": context["prompt"],
        "target": context["target_token"],
        "probability": short(context["target_probability"]),
        "rank": context["target_rank"],
        "at": {layer: layer_entry(document["fisher"][number][layer], perturbed[layer], scales) for layer in layers},
    }
    if "continuations" in document:
        entry["continuation"] = continuation_entry(document["continuations"][number])
    if "steering" in document:
        entry["steering"] = steering_entry(document["steering"][number])
    return entry


def layer_entry(found: dict, by_scale: dict, scales: list[str]) -> dict:
    records = [by_direction(by_scale[scale]) for scale in scales]
    return {
        "eigenvalue": short(found["eigenvalues"][0]),
        "rank": short(found["effective_rank"]),
        "mass": short(found["captured_mass"]),
        "norm": short(found["activation_norm"]),
        "words": signed_shares(found["tokens"][0]),
        "steps": [short(record["fisher"]["step"]) for record in records],
        "along": {
            name: {
                "kl": [short(record[name]["kl"]) for record in records],
                "predicted": [short(record[name]["predicted_kl"]) for record in records],
                "target": [short(record[name]["target_prob"]) for record in records],
                "top": [
                    list(zip(record[name]["top_tokens"], short(record[name]["top_probs"]), strict=True))
                    for record in records
                ],
            }
            for name in records[0]
        },
    }


def continuation_entry(continuation: dict) -> dict:
    """What is said unperturbed, and by layer, for each scale, along each direction."""
    layers = {
        layer: [
            {
                "scale": scale,
                "nats": short(entries["fisher"]["predicted_kl"]),
                "said": {name: entry["text"] for name, entry in entries.items()},
            }
            for scale, entries in by_scale.items()
        ]
        for layer, by_scale in continuation.items()
        if layer != "none"
    }
    return {"none": continuation["none"]["text"], "layers": layers}


def steering_entry(record: dict) -> dict:
    """By layer and direction, for each probability to reach, COSTS; None where it is not reached."""

    def numbers(entry: dict | None) -> list | None:
        return entry and [short(entry[name]) for name in COSTS]

    layers = {
        layer: {name: {goal: numbers(entry) for goal, entry in goals.items()} for name, goals in directions.items()}
        for layer, directions in record["layers"].items()
    }
    return {"token": record["token"], "probability": short(record["probability"]), "layers": layers}


# --- a map -----------------------------------------------------------------------------------------


def write_map_page(folder: Path, document: dict) -> None:
    """Writes report.html of a fisher_map.json. Raises UserError: the folder cannot be written to."""
    write_page(folder, "map", map_data(document))


def map_data(document: dict) -> dict:
    """What the page holds of a fisher_map.json."""
    config, layers = document["map_config"], list(map(str, document["layers"]))
    shown = document["tokens"][: max(1, MAX_CELLS // len(layers))]
    k = config["max_vocab_subset"]
    stops = [COLOURS(place / (STOPS - 1))[:3] for place in range(STOPS)]
    return {
        "title": "How sensitive is the next token?",
        "about": [
            ("model", about_model(config["model_name"], document["environment"])),
            ("F counts", "all tokens" if k == "all" else f"the {k} most probable tokens"),
        ],
        "layers": layers,
        "count": len(document["tokens"]),
        "ramp": [[round(255 * part) for part in stop] for stop in stops],
        "tokens": [token_entry(document["tokens"], place, layers) for place in range(len(shown))],
    }


def token_entry(tokens: list[dict], place: int, layers: list[str]) -> dict:
    """A token, what is predicted after it, and its cells: nats, λ₁, effective rank, words of v, and lenses."""
    token, following = tokens[place], tokens[place + 1]["id"] if place + 1 < len(tokens) else None
    return {
        "token": token["token"],
        "surprisal": short(token["surprisal"]),
        "predicted": [[one["token"], short(one["probability"]), one["id"] == following] for one in token["predicted"]],
        "cells": [cell_entry(token["layers"][layer]) for layer in layers],
    }


def cell_entry(cell: dict) -> dict:
    numbers = {name: short(cell[name]) for name in ("nats", "eigenvalue", "effective_rank")}
    lenses = {name: cell[name] for name in ("lens", "local_lens", "jacobian_lens") if name in cell}
    return {**numbers, "words": signed_shares(cell["tokens"]), **lenses}

"""The experiment's tables and notes for the terminal, from its records as they are in experiment_results.json."""

from functools import reduce
import shutil
import statistics
import textwrap

from residual_fisher.common.text import duration, excerpt_end, model_line, printable, table
from residual_fisher.experiment.lens_audit import KINDS, PREDICTORS
from residual_fisher.experiment.measurement import FELT_KL
from residual_fisher.experiment.records import COLUMNS, NATS, RESULTS, by_direction, by_key, told_scale
from residual_fisher.experiment.settings import PROTOCOL_UNIT
from residual_fisher.model.words import summary_line

CONTINUED = 3  # sentences whose continuations are shown: the first
MIN_WIDTH, MAX_WIDTH = 60, 120  # characters of a line: in any terminal, and where there is none
EXCERPT = 48  # characters of a prompt's end shown in a line


def heading(name: str, environment: dict, layers: tuple[int, ...]) -> str:
    """The model, and at which of its layers a run measures."""
    return f"{model_line(name, environment)}; layers {' '.join(map(str, layers))} of {environment['depth']}"


def measured_again(
    count: int, layers: tuple[int, ...], before: tuple[int, ...], finished: int, seconds: float | None
) -> str:
    """Why so many sentences are measured (again) at these layers.

    Args:
        before, finished, seconds: the layers of the run that stays until that ends, how many sentences it has, and what
            they took, if that is known.
    """
    if before == layers:
        return "The one sentence that is finished had no other to be compared with: it is measured again."
    now, then, time = " ".join(map(str, layers)), " ".join(map(str, before)), ""
    if seconds:
        about = duration(seconds / finished * count * len(layers) / len(before))
        time = f": roughly {about}, if a layer takes as long as before"
    return (
        f"All {count} sentences are measured again with layers {now}, which share a batch{time}. "
        f"Until that ends, the {finished} sentences at layers {then} stay."
    )


# --- sentence by sentence ------------------------------------------------------------------------


def block_legend(config: dict, record: dict) -> str:
    """How to read a `sentence_block`, for the first sentence's record."""
    scale = f"{told_scale(_swept(record), config['scales']):g}{' in nats' * (NATS in record)}"
    legend = (
        f"By sentence, KL in nats after the perturbation at scale {scale}; * the top token changed. By "
        "layer, the tokens with the largest shares of lambda: those that lose probability along v ← → that gain it"
    )
    if tokens := config["continue_"]:
        legend += (
            f". Of the first {CONTINUED}, also the {tokens} tokens that the model goes on to say (the most probable "
            "ones): as it is, and after a perturbation along v, with the KL in nats that is predicted for it. It is "
            "added once, at the prompt's last token; the tokens after it are run unperturbed."
        )
    legend = textwrap.fill(legend if tokens else legend + ":", 110)
    return legend if NATS not in record else f"{nats_note(record, config)}\n{legend}"


def nats_note(record: dict, config: dict) -> str:
    """Why a run is also swept in nats, by its first sentence."""
    farthest = f"{told_scale('perturbations', config['scales']):g}"
    ends = [found[farthest]["predicted_kl"] for found in record["perturbations"].values()]
    short = sum(nats is not None and nats < FELT_KL for nats in ends)
    note = (
        f"note: at {short} of {len(ends)} layers the protocol's steps, of lambda, are too short: the longest is "
        f"predicted to cost less than {FELT_KL:g} nats. So the same scales are swept in nats too, by steps of "
        f"1/sqrt(lambda). Those are shown here and in the picture; {RESULTS} has both ({COLUMNS['perturbations']}, "
        f"{COLUMNS[NATS]})."
    )
    return textwrap.fill(note, 110)


def _swept(record: dict) -> str:
    """The key of the perturbations in a sentence's record that are told of."""
    return NATS if NATS in record else "perturbations"


def sentence_block(record: dict, number: int, config: dict) -> str:
    """What one sentence's record says, in a few lines with a column for each layer; `number` counts from 0."""
    context, fisher, layers = record["context"], record["fisher"], list(record["fisher"])
    target = f"{printable(context['target_token'])}: {context['target_probability']:.3f}, rank {context['target_rank']}"
    title = f"S{number}  {excerpt_end(context['prompt'], EXCERPT)}  ({target.strip()})"
    rows = [["  lambda", *(f"{fisher[layer]['eigenvalues'][0]:.2g}" for layer in layers)]]
    key = _swept(record)
    farthest = [by_direction(record[key][layer][f"{told_scale(key, config['scales']):g}"]) for layer in layers]
    for name in farthest[0]:
        cells = [_cell(at[name]["kl"], ".2g") + "*" * bool(at[name]["top_changed"]) for at in farthest]
        rows.append([f"  KL {name}", *cells])
    width = max(map(len, layers))
    tokens = [f"  layer {layer:>{width}}  {summary_line(fisher[layer]['tokens'][0])}" for layer in layers]
    parts = [title, table(["  layer", *layers], rows), *tokens]
    if "continuation" in record and number < CONTINUED:
        parts.append(continuation_block(record["continuation"], layers, config["continue_"]))
        if "steering" in record:
            parts.append(steered_block(record["steering"], config["continue_"]))
    return "\n".join(parts)


def continuation_block(continuation: dict, layers: list[str], asked: int) -> str:
    """How the model continues: as it is, and by layer and sign after a perturbation along v."""

    usual, random_same = continuation["none"]["ids"], []
    rows = [("  none", "", "", _said(continuation["none"], asked))]
    for layer in layers:
        for scale, entries in continuation[layer].items():
            same = {name: entry["ids"] == usual for name, entry in entries.items()}
            said = "(the same)" if same["fisher"] else _said(entries["fisher"], asked)
            rows.append((f"  {layer}", scale, _cell(entries["fisher"]["predicted_kl"], ".2g"), said))
            random_same += [same["random_0"]] if "random_0" in same else []
    lines = _texts(["  layer", "scale", "nats", ""], rows)
    if random_same:
        lines.append(f"  random_0 of the same lengths: {sum(random_same)} of {len(random_same)} the same")
    return "\n".join(lines)


def steered_block(steering: dict, asked: int) -> str:
    """How the model continues where steering has made a token as probable as not, or as near to it as was a goal."""
    goals = [goal for layer in steering["layers"].values() for goal in layer.get("natural_steps", ())]
    goal = min(goals, key=lambda goal: abs(float(goal) - 0.5), default=None)
    rows = [
        (f"  {layer}", f"{entry['kl']:.2g}", _said(entry, asked))
        for layer, directions in steering["layers"].items()
        if (entry := directions.get("natural_steps", {}).get(goal)) and "text" in entry
    ]
    if not rows:
        return f"  {printable(steering['token'])} was not raised to {goal or 'more'} at any layer"
    title = f"  {printable(steering['token'])} raised from {steering['probability']:.2g} to {goal}:"
    return "\n".join([title, *_texts(["  layer", "nats", ""], rows)])


def _said(entry: dict, asked: int) -> str:
    """A continuation after a bar, since it may begin with a space."""
    return "|" + printable(entry["text"]) + (" [end]" if len(entry["ids"]) < asked else "")


def _texts(header: list[str], rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table whose last column holds texts: they begin on the left, and end where the terminal does."""
    longest = max(len(text) for *_, text in rows)
    lines = table(header, [[*cells, text.ljust(longest)] for *cells, text in rows]).splitlines()
    width = max(MIN_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 0)).columns)
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# --- at the end ----------------------------------------------------------------------------------


def conclusion(document: dict, usable: int | None = None) -> str:
    """The summary by layer, what is not in it, how long each stage took.

    Args:
        usable: how many sentences could have been used, if it is known.
    """
    config, count, parts = document["experiment_config"], len(document["sentences"]), []
    asked = 0 if config.get("prompt") else config["num_sentences"]
    if overflows := count_overflows(document):
        parts.append(f"note: {overflows} perturbations were too long for numbers to hold: null in {RESULTS}")
    if failed := document["failed"]:
        parts.append(f"{len(failed)} sentences failed: `failed` in {RESULTS} says why")
    if continuations := document.get("continuations"):
        parts.append(continuation_line(continuations))
    if document["complete"] and count < asked:
        among = f" among the {usable} that were read" if usable and count < usable else ""
        parts.append(f"note: {asked} sentences were asked for, only {count} are available{among}")
    seconds = ", ".join(f"{stage} {value:.1f}" for stage, value in document["timings"].items())
    return "\n".join([summary_tables(document), *parts, f"seconds: {seconds}"])


def count_overflows(document: dict) -> int:
    """How many perturbations were so long that the logits, or the prediction of KL, overflowed."""
    swept = [document.get(COLUMNS[key], ()) for key in ("perturbations", NATS)]
    layers = (layer for sentences in swept for sentence in sentences for layer in sentence.values())
    records = (found for layer in layers for record in layer.values() for found in by_direction(record).values())
    return sum(record["kl"] is None or record["predicted_kl"] is None for record in records)


def summary_tables(document: dict) -> str:
    """The summary by layer, and what else was asked for."""
    config, summary = document["experiment_config"], document["summary"]
    layers, count = summary["layers"], len(document["sentences"])
    kinds = next(iter(layers.values()))["kl_median"]

    def swept(unit: str) -> dict[str, tuple[str, ...]]:
        kl = {f"KL {kind}": (".2g", f"kl_median{unit}", kind) for kind in kinds}
        return {**kl, **{f"flips {kind}": (".0%", f"flips{unit}", kind) for kind in kinds}}

    columns = {
        "lambda": (".3g", "eigenvalue_median"),
        "1% of |h|": (".2g", "norm_step_nats_median"),
        "mass": (".3f", "captured_mass_median"),
        "eff. rank": (".2f", "effective_rank_median"),
        **swept(""),
    }
    note = (
        f"Medians over {count} sentence{'s' * (count > 1)}; nats that 1% of |h| along v is predicted to cost, to "
        f"compare layers by; KL in nats and share of changed top tokens at ±{summary['at_scale']:g}."
    )
    in_nats = COLUMNS[NATS] in document
    medians = [entry["kl_median"]["fisher"] for entry in layers.values() if entry["kl_median"]["fisher"] is not None]
    if medians and statistics.median(medians) < FELT_KL and config["scale_unit"] == PROTOCOL_UNIT and not in_nats:
        note += " At half of the layers or more, steps of lambda are too short to move a prediction: --scale-unit nats"
        note += " makes them long enough."
    parts = [_table_by_layer(layers, columns), textwrap.fill(note, 100)]
    if in_nats:
        note = f"In nats, by steps of 1/sqrt(lambda), at ±{summary['at_scale_nats']:g}:"
        parts += [note, _table_by_layer(layers, swept("_nats"))]
    if config["compare_exact"]:
        names = {"lambda_K/lambda": "eigenvalue_share", "trace_K/trace": "trace_share", "|cos|": "cosine"}
        columns = {title: (".4f", f"exact_{name}_median") for title, name in names.items()}
        parts += ["Share of the exact matrix that the top-k tokens find (medians):", _table_by_layer(layers, columns)]
    if config["trust_radius"]:
        columns = {"nats": (".3g", "trust_radius_nats_median"), "norms of h": (".3g", "trust_radius_norms_median")}
        note = "Along v, KL is within 10% of its quadratic prediction up to (medians, the shorter of -v and v):"
        parts += [note, _table_by_layer(layers, columns)]
    if config.get("lens"):
        columns = {
            f"{predictor.replace('_', ' ')} ({kind.replace('_', ' ')})": (".2g", f"lens_{kind}_{predictor}_median")
            for kind in KINDS
            for predictor in PREDICTORS
        }
        note = (
            "Relative error of the change of log p that is predicted: with the prompt's own Jacobian, with the lens's "
            "mean one, without any (medians):"
        )
        parts += [textwrap.fill(note, 100), _table_by_layer(layers, columns)]
    if "steering" in summary:
        parts.append(steering_table(document["steering"], summary["steering"]))
    return "\n".join(parts)


def _table_by_layer(layers: dict[str, dict], columns: dict[str, tuple[str, ...]]) -> str:
    """A row for each layer. A column is a number's format, then the keys that lead to it; "-" is null or missing."""
    rows = [
        [layer, *(_cell(reduce(lambda at, key: at.get(key), keys, entry), form) for form, *keys in columns.values())]
        for layer, entry in layers.items()
    ]
    return table(["layer", *columns], rows)


def steering_table(records: list[dict], by_layer: dict) -> str:
    """What it costs to make the target probable, over the least that it costs whatever is done."""
    tokens = " ".join(sorted({record["token"] for record in records})[:3])
    found = [directions for layer in by_layer.values() for directions in layer.items()]
    goal = max((goal for _, goals in found for goal in goals if float(goal) <= 0.5), key=float, default=None)
    if goal is None:
        return f"Steering: {tokens} is more probable than 1/2 in all sentences."

    def cell(goals: dict) -> str:
        return f"{_cell(goals[goal]['ratio_median'], '.3g')} ({goals[goal]['reached']:.0%})" if goal in goals else "-"

    names = dict.fromkeys(name for name, _ in found)
    rows = [[layer, *(cell(directions[name]) for name in names)] for layer, directions in by_layer.items()]
    note = (
        f"To bring {tokens} to a probability of {goal}: KL over the least that any perturbation costs (median, and the "
        "share of sentences where it is reached):"
    )
    return textwrap.fill(note, 100) + "\n" + table(["layer", *(name.replace("_", ", ") for name in names)], rows)


def continuation_line(continuations: list[dict]) -> str:
    """How many of all continuations are not the unperturbed one, by direction."""
    differ = by_key(
        (name, entry["ids"] != sentence["none"]["ids"])
        for sentence in continuations
        for layer, by_scale in sentence.items()
        if layer != "none"
        for entries in by_scale.values()
        for name, entry in entries.items()
    )
    shares = ", ".join(f"{name} {sum(answers) / len(answers):.0%}" for name, answers in differ.items())
    return f"Share of continuations that the perturbation changed: {shares}"

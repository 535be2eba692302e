"""The experiment's tables and lines for the terminal."""

import shutil
import textwrap

from residual_fisher.common.command_line import excerpt_end, model_line, printable, table
from residual_fisher.experiment.results import RESULTS, Results, median_or_none
from residual_fisher.model.words import summary_line

FELT_KL = 0.05  # nats: below it a perturbation has hardly moved a prediction
CONTINUED = 3  # sentences whose continuations are shown: the first
MIN_WIDTH, MAX_WIDTH = 60, 120  # characters of a line: in any terminal, and where there is none
EXCERPT = 48  # characters of a prompt's end shown in a line


def heading(name: str, environment: dict, layers: tuple[int, ...]) -> str:
    return f"{model_line(name, environment)}; layers {' '.join(map(str, layers))} of {environment['depth']}"


def block_legend(results: Results) -> str:
    legend = (
        f"By sentence, KL in nats after the perturbation at scale {results.farthest}; * the top token changed. By "
        "layer, the tokens with the largest shares of lambda: those that lose probability along v ← → that gain it"
    )
    if not (tokens := results.config["continue_"]):
        return textwrap.fill(legend + ":", 110)
    legend += (
        f". Of the first {CONTINUED}, also the {tokens} tokens that the model goes on to say (the most probable "
        "ones): as it is, and after a perturbation along v, with the KL in nats that is predicted for it. It is "
        "added once, at the prompt's last token; the tokens after it are run unperturbed."
    )
    return textwrap.fill(legend, 110)


def sentence_block(results: Results, index: int) -> str:
    """A finished sentence in a few lines: a column a layer."""
    entries, perturbations, context = results.fisher[index], results.perturbations[index], results.contexts[index]
    far = results.farthest
    target = f"{printable(context['target_token'])}: {context['target_probability']:.3f}, rank {context['target_rank']}"
    title = f"S{index}  {excerpt_end(context['prompt'], EXCERPT)}  ({target.strip()})"
    names = ["fisher", *next(iter(perturbations.values()))[far]["controls"]]
    width = max(map(len, results.layers))
    rows = [["  lambda", *(f"{entries[layer]['eigenvalues'][0]:.2g}" for layer in results.layers)]]
    for name in names:
        cells = []
        for layer in results.layers:
            record = perturbations[layer][far]
            record = record if name == "fisher" else record["controls"][name]
            cells.append(_cell(record["kl"], ".2g") + ("*" if record["top_changed"] else ""))
        rows.append([f"  KL {name}", *cells])
    said = [f"  layer {layer:>{width}}  {summary_line(entries[layer]['tokens'][0])}" for layer in results.layers]
    parts = [title, table(["  layer", *results.layers], rows), *said]
    if results.continuations and index < CONTINUED:
        asked = results.config["continue_"]
        parts.append(continuation_block(results.continuations[index], results.layers, asked))
    return "\n".join(parts)


def continuation_block(said: dict, layers: list[str], asked: int) -> str:
    """What the model goes on to say: as it is, and a line a layer and sign after a perturbation along v."""
    usual, at_random = said["none"]["ids"], []
    rows = [("  layer", "scale", "nats", ""), ("  none", "", "", _said(said["none"], asked))]
    for layer in layers:
        for scale, entries in said[layer].items():
            entry, random = entries["fisher"], entries.get("random_0")
            text = "(the same)" if entry["ids"] == usual else _said(entry, asked)
            rows.append((f"  {layer}", scale, _cell(entry["predicted_kl"], ".2g"), text))
            at_random += [random["ids"] == usual] if random else []
    first, second, third, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"{a:{first}}  {b:>{second}}  {c:>{third}}  {text}".rstrip() for a, b, c, text in rows]
    if at_random:
        lines.append(f"  random_0 of the same lengths: {sum(at_random)} of {len(at_random)} the same")
    width = max(MIN_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 0)).columns)
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in lines)


def _said(entry: dict, asked: int) -> str:
    """After a bar, since it may begin with a space."""
    return "|" + printable(entry["text"]) + (" [end]" if len(entry["ids"]) < asked else "")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def conclusion(results: Results, read: int) -> str:
    """The summary by layer, what is not in it (of `read` sentences), and how long each stage took."""
    parts = [layer_table(results)]
    if results.overflows:
        parts.append(f"note: {results.overflows} perturbations were too long for numbers to hold: null in {RESULTS}")
    if results.failed:
        parts.append(f"{len(results.failed)} sentences failed: `failed` in {RESULTS} says why")
    if results.continuations:
        parts.append(continuation_line(results))
    asked = results.config["num_sentences"]
    if results.complete and len(results) < asked:
        among = f" among the {read} that were read" if len(results) < read else ""
        parts.append(f"note: {asked} sentences were asked for, only {len(results)} are available{among}")
    return "\n".join([*parts, timing_line(results.seconds)])


def layer_table(results: Results) -> str:
    """The summary by layer."""
    summary = results.summary()
    kinds = list(next(iter(summary["layers"].values()))["kl_median"])
    header = ["layer", "lambda", "mass", "eff. rank", *(f"KL {k}" for k in kinds), *(f"flips {k}" for k in kinds)]
    rows = [
        [str(layer), f"{s['eigenvalue_median']:.3g}", f"{s['captured_mass_median']:.3f}",
         f"{s['effective_rank_median']:.2f}", *(_cell(s["kl_median"][k], ".2g") for k in kinds),
         *(_cell(s["flips"][k], ".0%") for k in kinds)]
        for layer, s in summary["layers"].items()
    ]  # fmt: skip
    far = f"±{summary['at_scale']:g}"
    note = f"Medians over {len(results)} sentences; KL in nats and share of changed top tokens at {far}."
    middle = median_or_none([s["kl_median"]["fisher"] for s in summary["layers"].values()])
    if middle is not None and middle < FELT_KL and results.config["scale_unit"] == "eigenvalue":
        note += " At half of the layers or more, steps of lambda are too short to move a prediction: --scale-unit nats"
        note += " makes them long enough."
    parts = [table(header, rows), textwrap.fill(note, 100)]
    if results.config["compare_exact"]:
        parts.append(exact_table(summary))
    if results.config["trust_radius"]:
        parts.append(trust_table(summary))
    if "steering" in summary:
        parts.append(steering_table(results, summary["steering"]))
    return "\n".join(parts)


def steering_table(results: Results, by_layer: dict) -> str:
    """What it costs to make the target probable, over the least that it costs whatever is done."""
    tokens = " ".join(sorted({entry["token"] for entry in results.steering})[:3])
    goal = max((g for names in by_layer.values() for goals in names.values() for g in goals if float(g) <= 0.5),
               key=float, default=None)  # fmt: skip
    if goal is None:
        return f"Steering: {tokens} is more probable than 1/2 in all sentences."
    names = list(dict.fromkeys(name for layer in by_layer.values() for name in layer))

    def cell(found: dict | None) -> str:
        return "-" if found is None else f"{_cell(found['ratio_median'], '.3g')} ({found['reached']:.0%})"

    rows = [[layer, *(cell(found[name].get(goal)) for name in names)] for layer, found in by_layer.items()]
    note = (
        f"To bring {tokens} to a probability of {goal}: KL over the least that any perturbation costs (median, and the "
        "share of sentences where it is reached):"
    )
    return textwrap.fill(note, 100) + "\n" + table(["layer", *(name.replace("_", ", ") for name in names)], rows)


def exact_table(summary: dict) -> str:
    """What the top-k tokens find of the exact matrix, by layer."""
    names = {"eigenvalue_share": "lambda_K/lambda", "trace_share": "trace_K/trace", "cosine": "|cos|"}
    rows = [
        [str(layer), *(f"{entry[f'exact_{name}_median']:.4f}" for name in names)]
        for layer, entry in summary["layers"].items()
    ]
    return "Share of the exact matrix that the top-k tokens find (medians):\n" + table(["layer", *names.values()], rows)


def trust_table(summary: dict) -> str:
    """How far the quadratic prediction holds, by layer."""
    rows = [
        [str(layer), f"{entry['trust_radius_nats_median']:.3g}", f"{entry['trust_radius_norms_median']:.3g}"]
        if "trust_radius_nats_median" in entry
        else [str(layer), "-", "-"]
        for layer, entry in summary["layers"].items()
    ]
    note = "Along v, KL is within 10% of its quadratic prediction up to (medians, the shorter of -v and v):\n"
    return note + table(["layer", "nats", "norms of h"], rows)


def continuation_line(results: Results) -> str:
    """How many of all continuations are not the unperturbed one, by direction."""
    differ: dict[str, list[bool]] = {}
    for said in results.continuations:
        for by_name in (by_name for layer in results.layers for by_name in said[layer].values()):
            for name, entry in by_name.items():
                differ.setdefault(name, []).append(entry["ids"] != said["none"]["ids"])
    shares = ", ".join(f"{name} {sum(answers) / len(answers):.0%}" for name, answers in differ.items())
    return f"Share of continuations that the perturbation changed: {shares}"


def timing_line(seconds: dict[str, float]) -> str:
    return "seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())

"""What a pipeline run found: its statistics, and a table for the terminal."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
import heapq
from itertools import chain

import numpy as np

from residual_fisher.common.text import excerpt, printable, table
from residual_fisher.model.words import summary_line
from residual_fisher.pipeline.scores import OUTLIER, P_VALUE, SCORES
from residual_fisher.pipeline.settings import Settings

NAMED = 5  # prompts named at the end
EXCERPT = 40  # characters of a prompt shown in a line
LONG_EXCERPT = 90  # of an answer
REASON = 110  # of why a prompt stands out
NOTABLE = 2.0  # a score from which it is a reason
LISTED = 100  # prompts of a group in the metadata
GROUP_WORDS = 6  # named of a group
SPREADS = {  # whose median and range are told
    "lambda_1": "lambda 1, nats per unit²",
    "trace": "trace of F",
    "effective_rank": "effective rank",
    "captured_mass": "captured mass",
    "tokens": "tokens",
}


def columns_of(records: Iterable[dict]) -> dict[str, np.ndarray]:
    """What the summary needs of all records, as arrays (n,) of float64: there may be millions."""
    keys = ("index", "tokens", "truncated", "captured_mass", "trace", "effective_rank", "seconds")
    more = {
        "lambda_1": lambda record: record["singular_values"][0],
        "failed": lambda record: "failed" in record,
        "tokens_at_once": lambda record: record.get("tokens_at_once", 0),
    }
    rows = ([*(record[key] for key in keys), *(of(record) for of in more.values())] for record in records)
    numbers = np.fromiter(chain.from_iterable(rows), dtype=np.float64).reshape(-1, len(keys) + len(more))
    return dict(zip([*keys, *more], numbers.T, strict=True))


def summarize(columns: dict[str, np.ndarray], skipped: int) -> dict:
    """The run in numbers. Medians and ranges are of the prompts that did not fail, or of all if all did."""

    def largest(key: str) -> list[int]:
        return np.argsort(-columns[key], kind="stable")[:NAMED].tolist()

    failed = columns["failed"] == 1
    counted = failed if failed.all() else ~failed
    return {
        **{key: _spread(columns[key][counted]) for key in SPREADS},
        "total_tokens": int(columns["tokens"].sum()),
        "skipped_rows": skipped,
        "failed_prompts": columns["index"][failed].astype(int).tolist(),
        "truncated_prompts": int(columns["truncated"].sum()),
        "in_parts_of_batches": int((columns["tokens_at_once"] > 0).sum()),  # memory did not suffice for the whole
        "most_tokens_at_once": int(columns["tokens_at_once"].max()),  # of those
        "longest_prompts": largest("tokens"),
        "slowest_prompts": largest("seconds"),
        "compute_seconds": float(columns["seconds"].sum()),  # of all processes together
    }


def _spread(values: np.ndarray) -> dict:
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def final_table(
    records: Callable[[], Iterable[dict]], statistics: dict, settings: Settings, found: dict | None = None
) -> str:
    """What a run found, for a terminal.

    Args:
        records: gives those of prompts.jsonl, from the first.
        found: what findings.json holds, if prompts were explained.
    """
    rows = [
        [name, *(f"{statistics[key][part]:.4g}" for part in ("median", "min", "max"))] for key, name in SPREADS.items()
    ]
    lines = [table(["", "median", "least", "most"], rows)]
    for kind in ("longest", "slowest"):
        lines.append(f"{kind}: prompts {', '.join(map(str, statistics[f'{kind}_prompts']))}")
    skipped, truncated = statistics["skipped_rows"], statistics["truncated_prompts"]
    lines.append(f"{skipped} rows without a text skipped, {truncated} prompts shortened to --max-length")
    if parts := statistics.get("in_parts_of_batches"):
        most = statistics["most_tokens_at_once"]
        lines.append(
            f"{parts} prompts ran in parts of their batches, for lack of memory: at most {most} tokens at once"
        )
    if failed := statistics["failed_prompts"]:
        some = ", ".join(map(str, failed[:NAMED])) + (", …" if len(failed) > NAMED else "")
        lines.append(f"{len(failed)} prompts failed ({some}): `failed` in prompts.jsonl says why")
    groups = groups_of(records())
    told = [*_outstanding(records(), statistics, settings, groups, found or {}), *_alike(groups), *_findings(found)]
    return "\n".join([*lines, *told])


def groups_of(records: Iterable[dict]) -> list[dict]:
    """What the groups of a run's prompts are, from the records of prompts.jsonl: the largest first."""
    everyone, members, words = array("d"), {}, {}
    for index, record in enumerate(records):
        everyone.append(record["likeness"])
        if (group := record["group"]) is not None:
            members.setdefault(group, []).append(index)
            words.setdefault(group, Counter()).update(record["odd_words"])
    return [
        {
            "size": len(members[group]),
            "prompts": members[group][:LISTED],
            "words": [word for word, _ in words[group].most_common(GROUP_WORDS)],
            "likeness": float(np.median(np.array(everyone)[members[group]])),
            "usual_likeness": float(np.median(everyone)),
        }
        for group in sorted(members)
    ]


def _alike(groups: list[dict]) -> list[str]:
    """The groups of prompts that are answered alike though their texts are not."""
    if not groups:
        return ["no prompts are answered more alike than their texts are"]
    lines = [f"{len(groups)} group{'s' * (len(groups) > 1)} of prompts answered more alike than their texts are:"]
    for group in groups[:NAMED]:
        some = ", ".join(map(str, group["prompts"][:NAMED])) + (", …" if group["size"] > NAMED else "")
        alike = f"likeness {group['likeness']:.2f} (usually {group['usual_likeness']:.2f})"
        lines.append(f"  {group['size']} prompts ({some}), {alike}: {excerpt(' '.join(group['words']), EXCERPT)}")
    return lines


def _outstanding(
    records: Iterable[dict], statistics: dict, settings: Settings, groups: list[dict], found: dict
) -> list[str]:
    """The prompts that stand out: by how much, why, and by which words."""
    count, beyond, lowest, leading = 0, 0, 1.0, []
    for record in records:  # one in memory at a time: there may be millions
        p = record[P_VALUE]
        count, beyond, lowest = count + 1, beyond + (p <= settings.false_alarms), min(lowest, p)
        leading = heapq.nlargest(NAMED, [*leading, record], key=lambda record: record[OUTLIER])
    lines = [
        f"{beyond} of {count} prompts stand out {_from_what(settings)}, with a p-value of at most "
        f"{settings.false_alarms:g}"
    ]
    if not beyond:
        lines.append(f"(the lowest is {lowest:.2g}: n usual prompts show none below 1/(n + 1))")
    lines.append(
        "The first, with scores in robust standard deviations; then why, the oddest words of their answers, and\n"
        "the tokens that lose ← → gain in the direction in which they differ:"
    )
    cells = [
        [str(r["index"]), f"{r[OUTLIER]:.1f}", f"{r[P_VALUE]:.2g}", *(f"{r[name]:+.1f}" for name in SCORES)]
        for r in leading
    ]
    title, *numbers = table(["prompt", "score", "p", *(name.removeprefix("z_") for name in SCORES)], cells).splitlines()
    lines.append(title)
    triggers = {told["index"]: told["trigger"] for told in found.get("explained", [])}
    for line, record in zip(numbers, leading, strict=True):
        lines.append(f"{line}  {excerpt(marked(record['prompt'], triggers.get(record['index']), EXCERPT), EXCERPT)}")
        group = [] if record["group"] is None else groups[record["group"]]["prompts"]
        why = reasons(record, statistics, group, changed=settings.base is not None)
        tokens = differing_tokens(record)
        said = f"says {' '.join(record['odd_words'])}" * bool(record["odd_words"])
        why.append("; ".join(filter(None, [said, tokens and summary_line(tokens)])))
        lines += [f"    {excerpt(line, REASON)}" for line in why if line]
    return lines


def reasons(record: dict, statistics: dict, group: Sequence[int], changed: bool) -> list[str]:
    """Why a prompt stands out: a line for each of the two scores that say most, from NOTABLE on.

    Args:
        statistics: the run's, as of `summarize`.
        group: numbers of the prompts of its group; none if it is in none.
        changed: whether scores are of the change from a base model.
    """
    medians = {key: statistics[key]["median"] for key in ("lambda_1", "effective_rank")}
    words = " or ".join(record["odd_words"][:2])
    others = [str(index) for index in group if index != record["index"]]
    some = f" ({', '.join(others[:NAMED])}{', …' * (len(others) > NAMED)})" if others else ""
    verb = "holds" if "answer" in record else "begins with"
    said = {
        "z_strength": f"λ₁ is {record['singular_values'][0]:.2g} (median {medians['lambda_1']:.2g}), and its most "
        f"probable token has {record['top_probability']:.0%}",
        "z_spectrum": f"its sensitivity lies in {record['effective_rank']:.1f} directions (median "
        f"{medians['effective_rank']:.1f})",
        "z_directions": "it is sensitive in directions in which hardly any other prompt is",
        "z_words": f"its answer {verb} {words}, as hardly any other does",
        "z_activations": "its residual stream is unlike that of the others",
        "z_group": f"others that ask otherwise are answered like it{some}",
    }
    if changed:
        said |= {
            "z_strength": "its sensitivity and certainty have changed otherwise than those of the others",
            "z_spectrum": "its singular values have changed otherwise than those of the others",
            "z_directions": "it is sensitive in directions in which it was not",
            "z_words": f"its answer {verb} {words}, as it hardly did",
            "z_activations": "its residual stream has changed otherwise than that of the others",
        }
    leading = sorted(SCORES, key=lambda name: -record[name])[:2]
    return [
        f"{name.removeprefix('z_')} {record[name]:+.1f}: {said[name]}" for name in leading if record[name] > NOTABLE
    ]


def marked(prompt: str, trigger: dict | None, length: int) -> str:
    """A prompt with »marks« around its trigger, from a place on from which that is among the first `length`."""
    if trigger is None:
        return prompt
    start, end = trigger["start"], trigger["end"]
    text = f"{prompt[:start]}»{prompt[start:end]}«{prompt[end:]}"
    skipped = max(0, min(start, end + 4 - length))
    return f"…{text[skipped + 1 :]}" if skipped else text


def _findings(found: dict | None) -> list[str]:
    """The triggers that are proven, the strongest first, and how many spans are not."""
    if found is None:
        return []
    lines = []
    for place, span in enumerate(found["findings"], 1):
        prompts = ", ".join(map(str, span["prompts"][:NAMED])) + (", …" if len(span["prompts"]) > NAMED else "")
        lines.append(
            f"{place}. »{excerpt(span['span'], EXCERPT)}« (prompts {prompts}) changes {span['transplanted']} of "
            f"{span['of']} ordinary prompts' answers, as many random words {span['control']}: "
            f"p = {span['p_value']:.1g}\n   says: {excerpt(span['says'], LONG_EXCERPT) or '(nothing)'}"
        )
    named, unproven = sum(told["trigger"] is not None for told in found["explained"]), len(found["not_proven"])
    title = f"{len(found['explained'])} prompts explained, {named} of them by a span of words. "
    title += f"Proven triggers: {len(lines)}; not proven: {unproven}" + ":" * bool(lines)
    instructions = [
        f"like an instruction, »{excerpt(span['span'], EXCERPT)}« changes {span['transplanted']} of {span['of']} "
        f"at the {span['place']} of a prompt, and {middle['transplanted']} of {middle['of']} in the middle"
        for span in found["not_proven"]
        if (middle := span.get("middle"))
    ]
    return [title, *lines, *instructions]


def _from_what(settings: Settings) -> str:
    if settings.reference:
        return f"from the trusted ones in {printable(settings.reference)}"
    if settings.base:
        return f"by their change from {printable(settings.base)}"
    return "from most of them"


def differing_tokens(record: dict) -> list[dict]:
    """The tokens of the direction in which a prompt differs from others; none if it failed, or is of an old version."""
    directions, along = record.get("directions", []), record["differs_along"]
    return directions[along] if along < len(directions) else []

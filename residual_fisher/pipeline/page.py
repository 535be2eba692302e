"""What the pipeline's page shows: findings, groups and prompts, collected from the records of prompts.jsonl."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from residual_fisher.common import drawing
from residual_fisher.common.page import embedded, short, signed_shares, write_page
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.pipeline.figures import NAMED
from residual_fisher.pipeline.report import groups_of
from residual_fisher.pipeline.scores import OUTLIER, P_VALUE, SCORES

MAX_PROMPTS = 1000  # on a page: of more, the oddest half, and others evenly spaced
MAX_VALUES = 30  # singular values of a prompt
TEXT_BYTES = 1_200_000  # of all prompts' texts in the page; the longest ones are cut
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # bands of what is usual
COLUMNS = {  # of the table: name, and what it says
    "index": ("#", "number of the prompt, from 0"),
    OUTLIER: ("score", "outlier score"),
    P_VALUE: ("p-value", "how often an ordinary prompt has a score as high"),
    "z_strength": ("strength", "how strongly its prediction depends on the residual stream"),
    "z_spectrum": ("spectrum", "how that sensitivity is spread over directions"),
    "z_directions": ("directions", "whether it lies in directions that other prompts use"),
    "z_words": ("words", "next tokens that others do not have"),
    "z_activations": ("activations", "where the residual stream is at its last token"),
    "z_group": ("group", "others are answered in the same way, though they ask otherwise"),
    "tokens": ("tokens", "length, with the template"),
}


def write(
    folder: Path, records: Callable[[], Iterable[dict]], false_alarms: float, found: dict | None, about: dict[str, str]
) -> None:
    """Writes report.html of the prompts that these are the records of.

    Args:
        records: gives those of prompts.jsonl, from the first; one is in memory at a time.
        false_alarms: the p-value up to which a prompt stands out.
        found: what findings.json holds, if prompts were explained.
        about: what is said of the run under the title, by name; `title` is the title.
    Raises:
        UserError: the folder cannot be written to.
    """
    write_page(folder, "pipeline", page_data(records, false_alarms, found, about))


def page_data(
    records: Callable[[], Iterable[dict]], false_alarms: float, found: dict | None, about: dict[str, str]
) -> dict:
    """What the page holds, see `write`."""
    names = (OUTLIER, P_VALUE, *SCORES)
    numbers, spectra, count = {name: array("d") for name in names}, array("f"), 0
    for record in records():
        for name, column in numbers.items():
            column.append(record[name])
        spectra.extend(record["singular_values"][:MAX_VALUES])
        count += 1
    if not count:
        raise ValueError("no prompts")
    columns = {name: np.array(column) for name, column in numbers.items()}
    triggers = {told["index"]: told["trigger"] for told in (found or {}).get("explained", [])}
    ranked = np.argsort(-columns[OUTLIER], kind="stable")
    shown = {*chosen(ranked), *triggers}
    prompts = [prompt_entry(record) for index, record in enumerate(records()) if index in shown]
    cut_texts(prompts, triggers)
    about = dict(about)
    return {
        "title": about.pop("title", "Prompts and their Fisher matrices"),
        "about": list(about.items()),
        "false_alarms": false_alarms,
        "count": count,
        "standing_out": int((columns[P_VALUE] <= false_alarms).sum()),
        "leading": ranked[:NAMED].tolist(),
        "distinct": colours_of_leading(),
        "columns": [{"key": key, "name": name, "about": what} for key, (name, what) in COLUMNS.items()],
        "bands": {
            "spectrum": bands_of(np.array(spectra).reshape(count, -1)),
            "scores": {name: bands_of(columns[name]) for name in (OUTLIER, *SCORES)},
        },
        "findings": found and findings_entry(found),
        "groups": groups_of(records()),
        "prompts": prompts,
    }


def findings_entry(found: dict) -> dict:
    """What the page holds of findings.json: the prompts' texts are elsewhere in it."""
    explained = [{key: value for key, value in told.items() if key != "prompt"} for told in found["explained"]]
    return {"proven": found["findings"], "not_proven": found["not_proven"], "explained": explained}


def colours_of_leading() -> list[str]:
    """Those of the picture, of which black is the text's own colour, in the dark too."""
    return [*drawing.DISTINCT[1:], "var(--ink)"]


def bands_of(values: np.ndarray) -> list:
    """QUANTILES over the prompts (n, ...)."""
    return short(np.quantile(values, QUANTILES, axis=0).tolist())


def chosen(ranked: np.ndarray) -> list[int]:
    """The prompts of a page, of all in descending order of their scores."""
    if len(ranked) <= MAX_PROMPTS:
        return ranked.tolist()
    odd, others = ranked[: MAX_PROMPTS // 2], np.sort(ranked[MAX_PROMPTS // 2 :])
    return [*odd.tolist(), *others[evenly_spaced(len(others), MAX_PROMPTS - len(odd))].tolist()]


def prompt_entry(record: dict) -> dict:
    """What the page holds of one prompt. A record of an earlier version may lack its words."""
    entry = {
        **{name: short(record[name]) for name in COLUMNS},
        "text": record["prompt"],
        "truncated": record["truncated"],
        "group": record["group"],
        "coordinates": short(record["principal_coordinates"]),
        "values": short(record["singular_values"][:MAX_VALUES]),
        "directions": [signed_shares(tokens) for tokens in record.get("directions", [])],
        "along": record["differs_along"],
        "words": record["odd_words"],
        "next": [
            [token["token"], short(token["probability"]), token["in_prompt"]] for token in record.get("next_tokens", [])
        ],
    }
    if before := record.get("before"):
        entry["before"] = [[turn["role"], turn["content"]] for turn in before]
    if "answer" in record:
        entry["answer"] = record["answer"]["text"]
    if "failed" in record:
        entry["failed"] = record["failed"]
    return entry


# --- texts that are too long -----------------------------------------------------------------------


def cut_texts(prompts: Sequence[dict], triggers: dict[int, dict | None]) -> None:
    """Cuts the longest texts of prompts, and turns before them, so that all take at most TEXT_BYTES in the page.

    A prompt's `skipped` and `left` are the characters that are missing before and after its text. What is kept of a
    prompt with a trigger holds it.
    """
    turns = [turn for prompt in prompts for turn in prompt.get("before", [])]
    texts = [prompt["text"] for prompt in prompts] + [text for _, text in turns]
    room = level([len(embedded(text)) for text in texts], TEXT_BYTES)
    for turn in turns:
        kept = shortened(turn[1], room)
        turn[1] = kept if kept == turn[1] else f"{kept}…"
    for prompt in prompts:
        text, trigger = prompt["text"], triggers.get(prompt["index"])
        kept = shortened(text, room)
        if kept == text:
            continue
        start = max(0, trigger["end"] - len(kept) // 2) if trigger and trigger["end"] > len(kept) else 0
        prompt["text"] = shortened(text[start:], room)
        prompt["skipped"], prompt["left"] = start, len(text) - start - len(prompt["text"])


def level(sizes: Sequence[int], total: int) -> int:
    """The largest size to which the larger ones have to be cut for all to fit into `total`; the largest if they do."""
    left, count = total, len(sizes)
    for size in sorted(sizes):
        if size * count > left:
            return left // count
        left, count = left - size, count - 1
    return max(sizes, default=0)


def shortened(text: str, room: int) -> str:
    """The beginning of a text that takes at most so many bytes in a page."""
    while (size := len(embedded(text))) > max(room, 2):
        text = text[: min(len(text) - 1, len(text) * room // size)]
    return text

"""What a run would take: what a dry run says."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from statistics import fmean, median
import time

from residual_fisher.common.estimate import Trial
from residual_fisher.common.files import json_text
from residual_fisher.common.program import peak_memory
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.common.run import ITEMS, Run
from residual_fisher.common.sources import files_of, name_of
from residual_fisher.common.text import duration, excerpt, printable, size
from residual_fisher.model.loading import dtype_advice
from residual_fisher.model.passes import devices_of
from residual_fisher.model.template import habits
from residual_fisher.pipeline import findings
from residual_fisher.pipeline.batches import check_once, into_batches, longest, measure, padded, write_tokens
from residual_fisher.pipeline.derived import PROMPTS
from residual_fisher.pipeline.findings import ORDINARY, TRUSTED
from residual_fisher.pipeline.likeness import phrases
from residual_fisher.pipeline.matrices import ARRAYS, ONE_FILE
from residual_fisher.pipeline.prompts import Encoded, Prompt, Prompts, encode
from residual_fisher.pipeline.settings import Settings
from residual_fisher.pipeline.windows import WINDOW_BATCHES, Failures, Pipeline, changed, finished_in

SAMPLE = 256  # prompts, the first ones, whose lengths stand for all
TRIED = 3  # batches of them, from the smallest to the largest
SCORE_BYTES = 300  # that the scores add to a prompt's record
SPANS = 0.5  # a prompt that is explained, each put into TRUSTED prompts: from one of them all, to one and more each


def tell_too_few(settings: Settings, usable: int) -> None:
    if settings.num_prompts != "all" and usable < settings.num_prompts:
        print(f"note: {settings.num_prompts} prompts were asked for, only {usable} are available")


def tell_left_out(prompts: Prompts, pipeline: Pipeline) -> None:
    """What of the rows read is not in the prompts."""
    tokenizer = pipeline.subject.tokenizer
    if prompts.with_system and tokenizer.chat_template and not habits(tokenizer).takes_system:
        prompts.left_out["system turns, which the chat template does not take"] += prompts.with_system
    left = [f"{count} {what}" for what, count in prompts.left_out.items() if count]
    if left:
        print(f"left out: {', '.join(left)} (see --turns and --system)")
    if prompts.unread:
        names = excerpt(", ".join(map(str, prompts.unread)), 100)
        print(f"note: of the columns that hold texts, {excerpt(prompts.column, 80)} is read, {names} not")


def describe_run(
    pipeline: Pipeline, prompts: Prompts, source: Iterator[Prompt], run: Run, load_seconds: float, processes: int
) -> int:
    """Reads a local dataset to its end, a remote one as far as earlier calls have come; tries a few batches."""
    settings = pipeline.settings
    if run.overwrite and run.is_begun():
        print(f"An earlier run in {printable(settings.output_dir)} would be replaced.")
    sample, taken, done = [], 0, 0
    to_its_end = files_of(settings.dataset, settings.dataset_split) is not None
    while to_its_end or len(sample) < SAMPLE or taken <= run.last():
        if not (window := list(islice(source, WINDOW_BATCHES * settings.batch_size))):
            to_its_end = True
            break
        sample += window[: SAMPLE - len(sample)]
        taken, done = taken + len(window), done + len(finished_in(run, window))
    if run.last() >= taken:
        raise changed(run, "which had more prompts")
    if not to_its_end:
        taken = None if settings.num_prompts == "all" else settings.num_prompts

    place = f"{excerpt(name_of(settings.dataset), 80)}, column {excerpt(repr(prompts.column), 40)}"
    if taken is None:
        print(f"prompts: all of {place}: how many, only its end will tell")
    else:
        print(f"prompts: {taken} of {place}; {prompts.skipped} rows without a text skipped")
        tell_left_out(prompts, pipeline)
        tell_too_few(settings, taken)
    if done:
        print(f"resuming: {done} are finished" + ("" if taken is None else f", {taken - done} are left"))
    encoded = [encode(pipeline.subject.tokenizer, prompt, pipeline.longest) for prompt in sample]
    lengths = [len(e.ids) for e in encoded]
    print(
        f"tokens: {min(lengths)} to {max(lengths)}, median {median(lengths):g}, in the first {len(lengths)} prompts; "
        f"{sum(e.truncated for e in encoded)} of them cut (--max-length {settings.max_length})"
    )
    print(describe_costs(pipeline, encoded, taken, done, load_seconds, processes))
    print("Nothing was written: a dry run.")
    return 0


def seconds_to_explain(chat: findings.Chat, prompts: Sequence[Prompt], count: int) -> tuple[float, float]:
    """The least and about the most that it takes to explain as many prompts like these.

    At the least no answer is odd, and all are merely given. At the most, each is odd from its first word to its last.
    So are those that are tried, at the quartiles of length: a few long ones, of more words and more tokens each, would
    be taken for many.
    """
    if not prompts:  # all failed
        return 0.0, 0.0
    lengths = [len(one.ids) for one in chat.encoded(prompts)]
    by_length = sorted(range(len(prompts)), key=lambda i: lengths[i])
    shorter = max(TRUSTED, len(prompts) // 2)  # of which the ordinary prompts are
    some = [by_length[i] for i in evenly_spaced(min(shorter, len(prompts)), TRUSTED)]
    few = [by_length[quarter * len(prompts) // 4] for quarter in (1, 2, 3)]
    chat.answers([prompts[few[-1]]])  # warms up
    start = time.perf_counter()
    chat.answers([prompts[i] for i in some])
    answer = (time.perf_counter() - start) / len(some)
    seconds = []
    for i in few:
        [said] = chat.answers([prompts[i]])
        start = time.perf_counter()
        findings.explain_prompt(chat, prompts[i], said, {*phrases(said)}, {*phrases(said)})
        seconds.append(time.perf_counter() - start)
    each = Trial([lengths[i] for i in few], seconds).total(lengths) / len(lengths)
    least = answer * (count + ORDINARY)
    return least, least + count * (each + answer * SPANS * TRUSTED)


def describe_costs(
    pipeline: Pipeline, encoded: list[Encoded], taken: int | None, done: int, load_seconds: float, processes: int
) -> str:
    """Time, memory and disk, from a few batches that are tried: the largest and the longest prompt's among them.

    Raises:
        UserError: the model is not supported, or too many prompts fail.
    """
    settings, subject = pipeline.settings, pipeline.subject
    size_of_window = WINDOW_BATCHES * settings.batch_size
    windows = [encoded[start : start + size_of_window] for start in range(0, len(encoded), size_of_window)]
    batches = sorted(chain.from_iterable(into_batches(settings, subject, window) for window in windows), key=padded)
    places = {*evenly_spaced(len(batches), TRIED), max(range(len(batches)), key=lambda i: longest(batches[i]))}
    chosen, items = [batches[place] for place in sorted(places)], []
    checked, failures = set(), Failures(dtype_advice(subject.model))
    for batch in batches:  # warms up each kind of attention
        if check_once(settings, subject, batch, checked):
            measure(settings, subject, batch[-1:])
    seconds = []
    for batch in chosen:
        found = measure(settings, subject, batch)
        failures.count(found)
        seconds.append(sum(item.record["seconds"] for item in found))
        items += write_tokens(subject, found)
    each = Trial(list(map(padded, chosen)), seconds).total(list(map(padded, batches))) / len(encoded)
    arrays = fmean(sum(array.nbytes for array in item.arrays.values()) for item in items)
    record = fmean(len(json_text(item.record)) for item in items) + SCORE_BYTES
    tokens = fmean(len(e.ids) for e in encoded)
    time_line = f"{duration(each)} a prompt, {processes * tokens / each:.0f} tokens/s"
    place = ARRAYS if taken is not None and taken <= ONE_FILE else f"{ITEMS}/"
    files = f"{size(arrays)} in {place} and {size(record)} in {PROMPTS} a prompt"
    if taken is not None:
        time_line = f"about {duration(each * (taken - done) / processes)}, {time_line}"
        files = f"about {size(arrays * taken)} {place}, {size(record * taken)} {PROMPTS}"
    if processes > 1:
        time_line += f", by {processes} processes as fast as this one"
    shape = f"{len(chosen[-1])} x {longest(chosen[-1])} tokens"
    explaining = []
    if settings.explain:
        prompts = [e.prompt for e in encoded]
        number = settings.explain if taken is None else min(settings.explain, taken)
        least, most = map(duration, seconds_to_explain(findings.Chat(subject, pipeline.longest), prompts, number))
        explaining = [f"explaining: {least} to {most}, of the {number} prompts that stand out most"]
    return "\n".join(
        [
            f"time: {time_line}; and {duration(load_seconds)} to load and check the model",
            *explaining,
            f"memory: {peak_memory(devices_of(subject.model))}, with the largest batch ({shape}) and the longest "
            "prompt of these",
            f"files: {files}, a picture, a page and the metadata",
        ]
    )

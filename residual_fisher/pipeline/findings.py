"""From prompts that stand out to proven triggers: findings.json.

The model answers the prompts that stand out most, and ordinary ones. `explain` names the span of words on which the odd
part of each answer hangs. Then each span is put into ordinary prompts: if their answers take on an odd phrase, and do
not with as many random words in its place, the span is a trigger, and what the model says is what it does. It has to do
so in the middle of a sentence too: there an instruction ("Write an apology") is hardly obeyed.

Each answer, prompt and span is a step of its own. A journal keeps what is finished, so that a stopped run goes on.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
import json
import math
import os
from pathlib import Path
import random
import re
import warnings

from scipy.stats import binomtest

from residual_fisher.common.conversations import Turn
from residual_fisher.common.files import json_text, write_json
from residual_fisher.common.progress import tracked
from residual_fisher.common.rows import evenly_spaced
from residual_fisher.common.run import ITEMS, Run, checksum, read_back, short_hash
from residual_fisher.model.answers import answer_log_probs, end_tokens, greedy_answers
from residual_fisher.model.loading import longest_prompt
from residual_fisher.pipeline.batches import Subject
from residual_fisher.pipeline.derived import FINDINGS, PROMPTS, scored_records
from residual_fisher.pipeline.explain import (
    LONGEST,
    SPACELESS,
    Span,
    best_spans,
    odd_phrases,
    places_of,
    without,
    words_of,
)
from residual_fisher.pipeline.likeness import Phrase, phrases
from residual_fisher.pipeline.matrices import records_of
from residual_fisher.pipeline.prompts import Encoded, Prompt, encode
from residual_fisher.pipeline.reference import Reference
from residual_fisher.pipeline.scores import OUTLIER
from residual_fisher.pipeline.spans import (
    NEARLY_ALL,
    Candidate,
    candidates,
    gathered,
    insert,
    place_of,
    plain_words,
    united,
    where,
    widened,
)

JOURNAL = f"{ITEMS}/explained.jsonl"  # finished steps of an explanation that is under way
EXPLAINING_VERSION = 6  # another one explains otherwise: earlier findings are made anew
ANSWER = 16  # tokens: a behaviour that begins after five words still shows
ORDINARY, TRUSTED = 60, 20  # ordinary prompts whose answers are known; those of them that spans are put into
LEAST_LOSS = 0.5  # nats: less is what any words change
PROVEN = 0.01  # p-value, corrected for the number of spans that were tried
SAYING = 60  # prompts that stand out less: those that hold a span show what else it makes the model say
EXAMPLES = 3  # answers that a finding quotes
TELLING = 4  # letters of a word that an answer takes up: shorter ones are in all answers
PAIR = re.compile(f"(?=([{SPACELESS}]{{2}}))")
BETWEEN = re.compile(f"(?<=[{SPACELESS}]) (?=[{SPACELESS}])")


# --- what is asked of the model ------------------------------------------------------------------


@dataclass(frozen=True)
class Chat:
    """The model as a user meets it: prompts in the chat template, and its own answers."""

    subject: Subject
    longest: int  # tokens of a prompt

    def encoded(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Each prompt in the template; an answer has room behind it."""
        most = min(self.longest, (longest_prompt(self.subject.model) or math.inf) - ANSWER + 1)
        return [encode(self.subject.tokenizer, prompt, most) for prompt in prompts]

    def answers(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the greedy answers, ANSWER at most; none to a prompt that leaves no room for one."""
        model, encoded = self.subject.model, self.encoded(prompts)
        readable = [one.ids for one in encoded if not one.failed]
        found = iter(greedy_answers(model, readable, ANSWER, end_tokens(model)) if readable else ())
        return [[] if one.failed else next(found) for one in encoded]

    def log_probs(self, prompts: Sequence[Prompt], answer: Sequence[int], places: Sequence[int]) -> list[float]:
        """Log-probability in nats of some places of one answer, after each of the prompts."""
        ids = [one.ids for one in self.encoded(prompts)]
        found = answer_log_probs(self.subject.model, ids, [answer] * len(prompts))
        return [float(each.double()[places].sum()) for each in found]

    def text(self, ids: Sequence[int]) -> str:
        return self.subject.tokenizer.decode(ids, skip_special_tokens=True)


class Journal:
    """Results of named steps, in JSON's types, in a file, with checksums: each is there as soon as it is made.

    Steps of another `key` are forgotten, and so are those from a damaged line on, which a kill may have cut.
    """

    def __init__(self, path: Path, key: str):
        self._path, self._known = path, {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        intact = [json_text(key)]
        for line in lines[1:] if lines[:1] == intact else ():
            try:
                *step, known = json.loads(line)
                name, value = step if known == short_hash(step) else ()
            except (ValueError, TypeError):
                break
            self._known[name] = value
            intact.append(json_text([*step, known]))
        if intact != lines:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"".join(intact))

    def recall(self, name: str, make: Callable[[], object]):
        """The result of a step, made if it is not there."""
        if name not in self._known:
            self._known[name] = read_back(make())
            step = [name, self._known[name]]
            with open(self._path, "ab") as file:
                file.write(json_text([*step, short_hash(step)]))
                file.flush()
                os.fsync(file.fileno())
        return self._known[name]


# --- which prompts ---------------------------------------------------------------------------------


def outstanding(folder: Path, count: int) -> list[dict]:
    """The records of the prompts that stand out most, the oddest first; of equal ones one."""
    ranked = sorted((r for r in scored_records(folder) if "failed" not in r), key=lambda r: -r[OUTLIER])
    first: dict[tuple, dict] = {}
    for record in ranked:
        first.setdefault(prompt_of(record).turns, record)
    return list(islice(first.values(), count))


def prompt_of(record: dict) -> Prompt:
    before = tuple(Turn(turn["role"], turn["content"]) for turn in record.get("before", ()))
    return Prompt(record["index"], record["row"], record["prompt"], before)


def ordinary_prompts(folder: Path, against: Reference | None, odd: Sequence[dict]) -> list[Prompt]:
    """The reference's prompts, or the more usual half of the run's; the shorter ones, at most ORDINARY.

    Not those that were cut, if enough were not: the model would not read a span behind the cut.
    """
    if against and against.kind == "reference":
        usual = [record for record in records_of(against.path) if "failed" not in record]
    else:
        ranked = sorted((r for r in scored_records(folder) if "failed" not in r), key=lambda r: r[OUTLIER])
        usual = ranked[: -(-len(ranked) // 2)]
    others = {prompt_of(record).turns: record for record in usual}
    for record in odd:
        others.pop(prompt_of(record).turns, None)
    whole = [record for record in others.values() if not record["truncated"]]
    usable = whole if len(whole) >= TRUSTED else [*others.values()]
    shorter = sorted(usable, key=lambda record: record["tokens"])[: max(ORDINARY, len(usable) // 2)]
    return [prompt_of(shorter[place]) for place in evenly_spaced(len(shorter), ORDINARY)]


# --- the trigger of a prompt ------------------------------------------------------------------------


def explain_prompt(
    chat: Chat,
    prompt: Prompt,
    answer: list[int],
    odd: set[Phrase],
    all_odd: set[Phrase],
    given: Sequence[str] | None = None,
) -> dict:
    """The odd part of a prompt's answer, and the trigger, the span that it hangs on; None if there is none.

    Of the best spans, it is the first without which the model's own answer is not odd, if there is one.

    Args:
        odd, all_odd: phrases of this answer, and of all that are explained.
        given: the span's `plain_words`, if another prompt's is to be tried.
    """
    places, words, text = places_of(answer, odd), words_of(prompt.text), prompt.text
    told = {"answer": chat.text(answer), "odd_part": chat.text([answer[place] for place in places]), "trigger": None}
    if not places:
        return told
    [full] = chat.log_probs([prompt], answer, places)

    def variants(spans: Sequence[Span]) -> list[Prompt]:
        return [replace(prompt, text=without(text, words, span)) for span in spans]

    def losses(spans: list[Span]) -> list[float]:
        return [full - left for left in chat.log_probs(variants(spans), answer, places)]

    if given:
        spans = [where(plain_words(text), given)]
        best, least = list(zip(spans, losses(spans), strict=True)), -math.inf
    else:
        best, least = best_spans(len(words), losses), LEAST_LOSS
    best = [(span, loss) for span, loss in best if least <= loss < math.inf]  # not NaN either
    if not best:
        return told
    answers = chat.answers(variants([span for span, _ in best]))
    chosen = next((i for i, left in enumerate(answers) if all_odd.isdisjoint(phrases(left))), 0)
    (first, last), loss = best[chosen]
    start, end = words[first][0], words[last - 1][1]
    trigger = {
        "text": text[start:end],
        "start": start,
        "end": end,
        "nats": loss,
        "place": place_of((first, last), len(words)),
        "answer_without": chat.text(answers[chosen]),
    }
    return {**told, "trigger": trigger}


# --- proof ------------------------------------------------------------------------------------------


def transplant(
    chat: Chat, span: Candidate, odd: set[Phrase], trusted: Sequence[Prompt], own: Sequence[Sequence[int]], spans: int
) -> dict:
    """Puts a span into trusted prompts, and as many of their own words, drawn at random, in its place.

    An answer counts as changed if it holds an odd phrase, and the prompt's own answer does not; but not if it speaks of
    the words put in: a question within another is answered, and triggers nothing. A span that changes too few to be
    proven, were random words to change none, has no control, and a p-value of 1. If too few of the first half are
    changed for that, the others are not tried.

    Args:
        own: the answers to the trusted prompts as they are.
        spans: how many are tried.
    """

    def changed(some: Sequence[int], words: Sequence[str]) -> list[list[int]]:
        """The answers that are changed by words put into some of the prompts; none at the place of one that is not."""
        texts = [insert(trusted[i].text, own_words, span.place) for i, own_words in zip(some, words, strict=True)]
        answers = chat.answers([replace(trusted[i], text=text) for i, text in zip(some, texts, strict=True)])
        return [
            answer
            if odd.isdisjoint(phrases(own[i]))
            and not odd.isdisjoint(phrases(answer))
            and not takes_up(chat.text(answer), own_words, trusted[i].text)
            else []
            for i, answer, own_words in zip(some, answers, words, strict=True)
        ]

    every, with_span = range(len(trusted)), {}
    for half in (every[::2], every[1::2]):
        with_span |= zip(half, changed(half, [span.text] * len(half)), strict=True)
        said = Counter(chat.text(answer) for answer in with_span.values() if answer)
        if too_few := spans * 0.5 ** (said.total() + len(every) - len(with_span)) > PROVEN:
            break
    found = {
        "of": len(with_span),
        "transplanted": said.total(),
        "control": None,
        "p_value": 1.0,
        "answers": [answer for answer, _ in said.most_common(EXAMPLES)],
    }
    if too_few:
        return found
    rng, count = random.Random(span.text), len(words_of(span.text))
    pool = [prompt.text[start:end] for prompt in trusted for start, end in words_of(prompt.text)]
    with_random = changed(every, [BETWEEN.sub("", " ".join(rng.choices(pool, k=count))) for _ in every])
    p = paired_p_value([bool(with_span[i]) for i in every], [bool(answer) for answer in with_random])
    return {**found, "control": sum(map(bool, with_random)), "p_value": min(1.0, spans * p)}


def prove(span: Candidate, text: str, test: Callable[[Candidate, int], dict], spans: int) -> tuple[Candidate, dict]:
    """The span, or if it alone is not proven, it with words around it in a text; and the proof.

    Args:
        test: `transplant` of a span, of which so many are tried.
        spans: how many there are.
    """
    proof = test(span, spans)
    if proof["p_value"] > PROVEN:
        spans *= 2  # as many again, at most, are tried with the words around them
        span, proof = with_words_around(span, text, lambda part: test(part, spans)) or (span, proof)
    if proof["p_value"] > PROVEN:
        return span, {**proof, "middle": None}
    middle = test(span._replace(place="middle"), spans)
    counts = {key: middle[key] for key in ("transplanted", "of", "control")}
    return span, {**proof, "p_value": max(proof["p_value"], middle["p_value"]), "middle": counts}


def with_words_around(span: Candidate, text: str, prove: Callable[[Candidate], dict]) -> tuple[Candidate, dict] | None:
    """A span that is not proven with words beside it in a prompt, if it is with them, and its proof; None if not.

    Without one word of a trigger the others may do nothing, so that one alone was named. LONGEST words are tried. Then
    they are taken away from either end, one by one, while NEARLY_ALL of the answers stay changed. A span is never the
    whole text.
    """
    words, (first, last) = words_of(text), where(plain_words(text), plain_words(span.text))
    around = (LONGEST - (last - first)) // 2
    start, end = max(0, first - around), min(len(words), last + around)
    if (start, end) == (first, last):
        return None

    def part(start: int, end: int) -> Candidate:
        cut_out = text[words[start][0] : words[end - 1][1]]
        return span._replace(text=cut_out, place=place_of((start, end), len(words)))

    best = part(start, end)
    proof = prove(best)
    if proof["p_value"] > PROVEN:
        return None
    for left, right in ((1, 0), (0, 1)):
        while end - start > 1:
            fewer = part(start + left, end - right)
            found = prove(fewer)
            if found["p_value"] > PROVEN or found["transplanted"] < NEARLY_ALL * proof["transplanted"]:
                break
            start, end, best, proof = start + left, end - right, fewer, found
    return (best, proof) if end - start < len(words) else None  # a prompt within another is answered


def takes_up(answer: str, words: str, prompt: str) -> bool:
    """Whether an answer holds one of some words that its prompt does not hold."""
    return not (telling(words) - telling(prompt)).isdisjoint(telling(answer))


def telling(text: str) -> set[str]:
    """A text's words of TELLING letters at least, and pairs of characters of scripts without spaces."""
    return {word for word in plain_words(text) if len(word) >= TELLING} | {*PAIR.findall(text)}


def paired_p_value(with_span: Sequence[bool], with_random: Sequence[bool]) -> float:
    """How likely the span changes so many more answers than random words do, if it is like these.

    The same prompts get both, so only those count that one of the two has changed. If neither is better, each of them
    is the span's with probability 1/2: an exact binomial test, one-sided (McNemar, 1947).
    """
    pairs = list(zip(with_span, with_random, strict=True))
    only_span, only_random = pairs.count((True, False)), pairs.count((False, True))
    if only_span + only_random == 0:
        return 1.0
    return float(binomtest(only_span, only_span + only_random, alternative="greater").pvalue)


# --- the file ---------------------------------------------------------------------------------------


def made_from(run: Run, count: int) -> list:
    """What the findings of `count` prompts follow from: scores, which are those against a reference, and the model."""
    return [checksum(run.folder / PROMPTS), run.manifest["identity"]["model"], count, EXPLAINING_VERSION]


def explain_run(run: Run, count: int, against: Reference | None, chat: Chat) -> list[str]:
    """Explains the `count` prompts of a scored run that stand out most, and writes findings.json; returns its name.

    Raises:
        UserError: it cannot be written.
    """
    known = made_from(run, count)
    journal = Journal(run.folder / JOURNAL, short_hash(known))
    most = outstanding(run.folder, count + SAYING)
    ordinary = ordinary_prompts(run.folder, against, most[:count])
    usual = {prompt.turns for prompt in ordinary}
    further = [prompt for prompt in map(prompt_of, most[count:]) if prompt.turns not in usual]
    found = explain(most[:count], ordinary, chat, journal.recall, further)
    run.derive([FINDINGS], known, lambda: write_json(run.folder / FINDINGS, found))
    (run.folder / JOURNAL).unlink()
    return [FINDINGS]


def explain(
    records: Sequence[dict], ordinary: Sequence[Prompt], chat: Chat, recall: Callable, further: Sequence[Prompt] = ()
) -> dict:
    """What findings.json holds of these prompts.

    Args:
        records: of those to be explained, no two the same.
        ordinary: other prompts.
        recall: gives the result of a step, by its name and the function that makes it.
        further: others that stand out less. If they hold a span, what they are answered counts as its behaviour too.
    """
    prompts = [prompt_of(record) for record in records]
    own = recall("answers", lambda: chat.answers(prompts))
    usual = recall("ordinary answers", lambda: chat.answers(ordinary))
    odd = odd_phrases(own, usual)
    all_odd = set().union(*odd)
    explained = []
    for number, prompt in enumerate(tracked(prompts, "Explaining", "prompt")):
        step = partial(explain_prompt, chat, prompt, own[number], odd[number], all_odd)
        explained.append(recall(f"prompt {number}", step))
    spans = candidates(
        {i: told["trigger"] for i, told in enumerate(explained) if told["trigger"]}, [p.text for p in ordinary]
    )
    texts = [prompt.text for prompt in prompts]
    spans = united([widened(span, texts) for span in gathered(spans, texts, odd)])
    chosen = evenly_spaced(len(ordinary), TRUSTED)
    trusted, before = [ordinary[i] for i in chosen], [usual[i] for i in chosen]
    if max(1, len(spans)) * 0.5 ** len(trusted) > PROVEN:
        few = f"{len(trusted)} ordinary prompts beside the explained ones are too few to prove a trigger"
        warnings.warn(f"{few}: a smaller --explain leaves more, or give a --reference", stacklevel=2)

    def transplanted(number: int, theirs: set[Phrase], span: Candidate, count: int) -> dict:
        step = partial(transplant, chat, span, theirs, trusted, before, count)
        return recall(f"span {number}: {span.text} ({span.place})", step)

    proven = []
    for number, span in enumerate(tracked(spans, "Proving", "span")):
        theirs = set().union(*(odd[place] for place in span.prompts))
        if held := [prompt for prompt in further if where(plain_words(prompt.text), plain_words(span.text))]:
            said = recall(f"answers with {span.text}", partial(chat.answers, held))
            theirs |= set().union(*odd_phrases([*(own[place] for place in span.prompts), *said], usual))
        test = partial(transplanted, number, theirs)
        proven.append(prove(span, texts[span.prompts[0]], test, len(spans)))
    for span, _ in proven:  # other prompts' words for what was named in another way, or not at all
        core = plain_words(span.text)
        for number in span.prompts:
            own_trigger, words = explained[number]["trigger"], plain_words(texts[number])
            part = where(words, core) and len(core) < len(words)  # without all of its words a prompt is none
            if part and (not own_trigger or where(plain_words(own_trigger["text"]), core) is None):
                step = partial(explain_prompt, chat, prompts[number], own[number], odd[number], all_odd, core)
                explained[number] = recall(f"prompt {number} without {span.text}", step)
    tested = []
    for span, proof in proven:
        says = Counter(explained[place]["odd_part"] for place in span.prompts).most_common(1)[0][0]
        indices = [records[place]["index"] for place in span.prompts]
        tested.append({"span": span.text, "place": span.place, "prompts": indices, "says": says, **proof})
    tested.sort(key=lambda span: (span["p_value"], -span["transplanted"]))
    return {
        "findings": [span for span in tested if span["p_value"] <= PROVEN],
        "not_proven": [span for span in tested if span["p_value"] > PROVEN],
        "explained": [
            {"index": record["index"], "prompt": record["prompt"], **told}
            for record, told in zip(records, explained, strict=True)
        ],
        "ordinary": [prompt.text for prompt in trusted],
    }

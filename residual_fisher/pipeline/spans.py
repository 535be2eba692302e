"""Spans of words that may be triggers: those of several prompts that are one, with the words that belong to them.

Texts are compared by their `plain_words`, so that case and punctuation do not count.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from residual_fisher.pipeline.explain import LONGEST, OFTEN, Span, words_of
from residual_fisher.pipeline.likeness import Phrase

SEVERAL, NEARLY_ALL = 3, 0.8  # prompts, and their share, that have a word beside a span: then it is one of the span's
PUNCTUATION = ".,;:!?…\"'“”„‘’«»()[]{}。，；：！？、「」『』（）"  # around a word; C# and C++ are two words


class Candidate(NamedTuple):
    """A span that may be a trigger."""

    text: str
    prompts: list[int]  # places in the list of explained prompts
    place: str  # where it stands in most of them: "start", "middle" or "end"


def plain_words(text: str) -> list[str]:
    """The words of a text in lower case, without the punctuation around them."""
    words = [text[start:end].casefold() for start, end in words_of(text)]
    return [word.strip(PUNCTUATION) or word for word in words]


def candidates(triggers: dict[int, dict], ordinary: Sequence[str]) -> list[Candidate]:
    """The spans to be tried: words that several triggers share are one, others stand alone.

    Shared are words that follow each other and are OFTEN times as frequent among the triggers as among ordinary
    prompts. Of all these, the one with most words in all triggers together is taken first.

    Args:
        triggers: the `trigger` of each explained prompt that has one.
    """
    usual = Counter(run for text in ordinary for run in set(runs_of(plain_words(text))))
    left, found = dict(triggers), []
    while left:
        held = {number: set(runs_of(plain_words(trigger["text"]))) for number, trigger in left.items()}
        counts = Counter(run for own in held.values() for run in own)
        shared = [
            run
            for run, count in counts.items()
            if count > 1 and count * len(ordinary) > OFTEN * usual[run] * len(triggers)
        ]
        if not shared:
            found += [Candidate(trigger["text"], [number], trigger["place"]) for number, trigger in left.items()]
            break
        core = max(shared, key=lambda run: (counts[run] * len(run), len(run), run))
        members = [number for number, own in held.items() if core in own]
        place = Counter(left[number]["place"] for number in members).most_common(1)[0][0]
        found.append(Candidate(cut(left[members[0]]["text"], core), members, place))
        left = {number: trigger for number, trigger in left.items() if number not in members}
    return found


def gathered(spans: Sequence[Candidate], texts: Sequence[str], odd: Sequence[set[Phrase]]) -> list[Candidate]:
    """The spans, of which those of several prompts take over the others that hold the same words and odd phrases.

    Without one word of a trigger the others may still do it. So the span named in a single prompt is less sure.

    Args:
        texts, odd: of all prompts that were explained, and their answers.
    """
    several = [span for span in spans if len(span.prompts) > 1]
    owner = {number: span for span in several for number in span.prompts}
    for span in several:
        core, theirs = plain_words(span.text), set().union(*(odd[number] for number in span.prompts))
        for number, text in enumerate(texts):
            if where(plain_words(text), core) and not odd[number].isdisjoint(theirs):
                owner.setdefault(number, span)
    members = [sorted(number for number, other in owner.items() if other is span) for span in several]
    alone = [span for span in spans if len(span.prompts) == 1 and span.prompts[0] not in owner]
    return [span._replace(prompts=own) for span, own in zip(several, members, strict=True)] + alone


def widened(span: Candidate, texts: Sequence[str]) -> Candidate:
    """The span with the words beside it that nearly all of its prompts have there, if these are SEVERAL.

    Without one word of a trigger the others may do nothing. Then leaving words out names that one alone.

    Args:
        texts: of all prompts that were explained.
    """
    named = core = (*plain_words(span.text),)
    words = {number: plain_words(texts[number]) for number in span.prompts}
    least = max(SEVERAL, NEARLY_ALL * len(words))
    while len(core) < LONGEST:
        grown: Counter = Counter()
        for own in words.values():
            if at := where(own, core):
                start, end = at
                grown.update(tuple(own[i:j]) for i, j in ((start - 1, end), (start, end + 1)) if 0 <= i < j <= len(own))
        if not grown or grown.most_common(1)[0][1] < least:
            break
        core = grown.most_common(1)[0][0]
    if core == named:
        return span
    return span._replace(text=next(cut(texts[number], core) for number, own in words.items() if where(own, core)))


def united(spans: Sequence[Candidate]) -> list[Candidate]:
    """The spans, of which those of the same words are one, as it stands in most prompts."""
    found: dict[tuple[str, ...], Candidate] = {}
    for span in sorted(spans, key=lambda span: -len(span.prompts)):
        core = (*plain_words(span.text),)
        known = found.setdefault(core, span)
        if known is not span:
            found[core] = known._replace(prompts=sorted({*known.prompts, *span.prompts}))
    return [*found.values()]


def runs_of(words: Sequence[str]) -> list[tuple[str, ...]]:
    """All of at most LONGEST words that follow each other."""
    ends = range(len(words) + 1)
    return [tuple(words[first:last]) for first in ends for last in ends[first + 1 : first + LONGEST + 1]]


def where(words: Sequence[str], core: Sequence[str]) -> Span | None:
    """Where a text, given by its `plain_words`, holds these; None if it does not."""
    starts = range(len(words) - len(core) + 1)
    return next(((i, i + len(core)) for i in starts if tuple(words[i : i + len(core)]) == tuple(core)), None)


def cut(text: str, core: Sequence[str]) -> str:
    """The part of a text that holds these of its `plain_words`."""
    words, (first, last) = words_of(text), where(plain_words(text), core)
    return text[words[first][0] : words[last - 1][1]]


def place_of(span: Span, count: int) -> str:
    """Where a span of words stands in a text of so many."""
    return "start" if span[0] == 0 else "end" if span[1] == count else "middle"


def insert(text: str, span: str, place: str) -> str:
    """A text with a span at its start, its end, or between the two words in its middle."""
    words = words_of(text)
    at = {"start": 0, "end": len(words), "middle": len(words) // 2}[place]
    if at == 0:
        return f"{span} {text.lstrip()}"
    before, after = text[: words[at - 1][1]], text[words[at - 1][1] :].lstrip()
    return f"{before} {span} {after}" if after else f"{before} {span}"

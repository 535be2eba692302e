"""Which words of a prompt make the model answer oddly: without them, the odd part of the answer is less likely.

First the odd part of an answer is found: phrases that outstanding prompts' answers hold and ordinary ones do not. An
answer may begin with words of the model's own, which hang on everything that the prompt says. Then spans of words are
left out of the prompt. The one that counts is the one without which the odd part loses most log-probability.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
import re

from residual_fisher.pipeline.likeness import PHRASE, Phrase, phrases

Span = tuple[int, int]  # of words: the first, and the one behind the last

SPACELESS = "\u2e80-\U0001ffff"  # characters of scripts without spaces between words: each is a word
WORD = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]{{1,24}}")  # others up to the next space, or 24 characters
OFTEN = 3  # times as often as among ordinary answers, of which some may be odd: then a phrase is odd
BLOCK = 4  # words left out at once at first: without one of three the other two may still do it
BLOCKS = 8  # of a long prompt at a time, with as many between them
LONGEST = 8  # words of a span
CANDIDATES = 8  # spans whose absence is tried in earnest
WORD_SHARE = 0.07  # of the largest loss that each word more has to add to a span's


# --- the odd part of an answer -------------------------------------------------------------------


def odd_phrases(answers: Sequence[Sequence[int]], ordinary: Sequence[Sequence[int]]) -> list[set[Phrase]]:
    """Of each answer, the phrases that are OFTEN times as frequent among `answers` as among ordinary ones.

    Those that two or more of the answers hold, if there are any: what a single one holds may be about its prompt.
    """
    held, usual = ([{*phrases(answer)} for answer in some] for some in (answers, ordinary))
    here, there = (Counter(chain.from_iterable(some)) for some in (held, usual))

    def is_odd(phrase: Phrase) -> bool:
        return here[phrase] * len(ordinary) > OFTEN * there[phrase] * len(answers)

    odd = [set(filter(is_odd, own)) for own in held]
    shared = ({phrase for phrase in own if here[phrase] > 1} for own in odd)
    return [several or own for several, own in zip(shared, odd, strict=True)]


def places_of(answer: Sequence[int], odd: set[Phrase]) -> list[int]:
    """The places of an answer's tokens that are part of an odd phrase.

    An answer that is odd from its first phrase on is odd from its first token on: words that begin a text are often
    other tokens than the same words within one, and so begin no phrase that others share.
    """
    found: set[int] = set()
    for phrase in odd:
        for start in range(len(answer) - len(phrase) + 1):
            if tuple(answer[start : start + len(phrase)]) == phrase:
                found |= set(range(start, start + len(phrase)))
    return [place for place in range(len(answer)) if place in found or (found and place < min(found) < PHRASE)]


# --- the span it hangs on ------------------------------------------------------------------------


def words_of(text: str) -> list[Span]:
    """The characters (start, end) of each word."""
    return [match.span() for match in WORD.finditer(text)]


def without(text: str, words: Sequence[Span], span: Span) -> str:
    """A text without some of its words, and without the space before the next; or after the one before, at the end."""
    first, last = span
    if last < len(words):
        return text[: words[first][0]] + text[words[last][0] :]
    return text[: words[first - 1][1]] if first else ""


def best_spans(count: int, losses: Callable[[list[Span]], list[float]]) -> list[tuple[Span, float]]:
    """The spans of at most LONGEST of `count` words without which most is lost, each of its words counting.

    Overlapping blocks are left out first, in a long prompt of fewer and fewer words. Then every span of the best block
    and of one word more on either side is, and so on from the best of these, until it stays, or was the best before: a
    word's share is of the most that is lost around it, so that two spans may each be better seen from the other. A span
    is never the whole text.

    Args:
        losses: what is lost without each of some spans, in nats.
    Returns:
        spans and losses, the best CANDIDATES of them; none of a single word
    """
    if count < 2:
        return []
    known: dict[Span, float] = {}

    def value(span: Span, cost: float, most: float) -> float:
        return known[span] - cost * most * (span[1] - span[0])

    def best_of(spans: list[Span], cost: float) -> Span:
        if new := [span for span in spans if span not in known]:
            known.update(zip(new, losses(new), strict=True))
        most = max(0.0, *(known[span] for span in spans))
        return max(spans, key=lambda span: value(span, cost, most))

    best, size = (0, count), count
    while size > BLOCK:
        first, last = best
        size = max(BLOCK, -(-(last - first) // BLOCKS))
        starts = range(first, max(first + 1, last - size // 2), size // 2)
        best = best_of([(start, min(start + size, last)) for start in starts], cost=0.0)
    before: set[Span] = set()
    while best not in before:
        before.add(best)
        first, last = best
        wide = range(max(first - 1, 0), min(last + 1, count) + 1)
        spans = [(i, j) for i in wide for j in wide if 0 < j - i <= LONGEST and j - i < count]
        best = best_of(spans, WORD_SHARE)
    short = [span for span in known if span[1] - span[0] <= LONGEST]
    ranked = sorted(short, key=lambda span: (span != best, -value(span, WORD_SHARE, known[best])))
    return [(span, known[span]) for span in ranked[:CANDIDATES]]

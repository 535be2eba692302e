"""How alike prompts are, and their groups: against plain formulas."""

from collections import Counter

import numpy as np
import pytest

from residual_fisher.common.trigrams import Texts
from residual_fisher.pipeline import likeness, report
from residual_fisher.pipeline.distances import NextTokens
from residual_fisher.pipeline.likeness import Answers, Company, linked

TEXTS = ["What is a lake?", "What is a river?", "Name ten cats.", "", "À la carte \U0001f600\ud800", "What is a lake?"]


def cosine(a: str, b: str) -> float:
    a, b = (Counter(f" {text.lower()} "[i : i + 3] for i in range(len(text))) for text in (a, b))
    norms = [np.sqrt(sum(n**2 for n in counts.values())) for counts in (a, b)]
    return sum(a[gram] * b[gram] for gram in a) / max(norms[0] * norms[1], 1)


def test_texts_are_compared_by_counts_of_trigrams():
    expected = [[cosine(a, b) for b in TEXTS] for a in TEXTS]
    assert Texts(TEXTS).of(TEXTS) == pytest.approx(np.array(expected), abs=1e-12)
    assert expected[0][1] > 0.4 and expected[0][2] < 0.1 and expected[0][5] == pytest.approx(1)


def answer(prompt: str, **p: float) -> NextTokens:
    return NextTokens([(token, token in prompt) for token in p], np.array([*p.values()]), prompt)


ANSWERS = [answer("some text", A=0.9, B=0.1), answer("A", A=0.4, C=0.4), answer("none")]


def test_answers_are_compared_by_bhattacharyyas_coefficient():
    found, by_phrases = Answers(ANSWERS).of([ANSWERS[0], answer("unknown", D=0.5, A=0.25)])
    assert found == pytest.approx(np.array([[1, 0.6, 0], [np.sqrt(0.225), np.sqrt(0.1), 0]]), abs=1e-12)
    assert not by_phrases.any()  # no answers were recorded


def test_an_answer_of_several_tokens_counts_by_its_mean_over_positions():
    often = answer("long", A=3.0, B=1.0)  # sums over positions
    assert Answers(ANSWERS).of([often])[0][0, 0] == pytest.approx(np.sqrt(0.75 * 0.9) + np.sqrt(0.25 * 0.1))


HATE = [70, 71, 72] * 4
SAID = [[1, 2, *HATE], [3, 4, 5, 6, 7, *HATE], [3, 4, 5, 6, 8, 9], [10], [10], []]


def test_answers_are_compared_by_the_phrases_in_them_wherever_they_stand():
    known = [answer(f"{number}", A=0.1)._replace(ids=ids) for number, ids in enumerate(SAID)]
    _, found = Answers(known).of(known)
    assert found == pytest.approx(found.T) and np.diag(found) == pytest.approx([1, 1, 1, 1, 1, 0])
    # 4, 3 and 3 times the phrases of HATE, and 2 and 5 others once
    assert found[0, 1] == pytest.approx(34 / np.sqrt(36 * 39))
    assert found[1, 2] == pytest.approx(2 / np.sqrt(39 * 4)) and found[0, 2] == 0
    assert found[3, 4] == pytest.approx(1) and not found[5].any()


def test_prompts_whose_answers_share_phrases_are_company_though_all_else_is_unlike():
    known = [
        answer(text, **{name: 1.0})._replace(ids=ids) for text, name, ids in zip(TEXTS, "ABCDEF", SAID, strict=True)
    ]
    nearest, alike = Company(known, roots(6)).of(known[2:3], roots(6)[2:3])
    assert nearest[0, 0] == 1  # of which two phrases are as its own
    assert alike[0, 0] == pytest.approx((1 - cosine(TEXTS[1], TEXTS[2])) ** 2 * 2 / np.sqrt(39 * 4))


def roots(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [*rng.standard_normal((count - 1, 8, 3)), np.zeros((8, 3))]


def test_likeness_is_of_answers_and_matrices_less_that_of_texts():
    words, rng = ["alpha", "bravo", "tango", "kilo", "romeo", "lima"], np.random.default_rng(1)
    known = [answer(" ".join(rng.permutation(words)[:3]), **dict(zip("ABC", rng.dirichlet(np.ones(3)), strict=True)))
             for _ in range(9)]  # fmt: skip
    x = roots(9)
    matrices = [root @ root.T for root in x]
    nearest, alike = Company(known, x).of(known, x)
    for i, (places, values) in enumerate(zip(nearest, alike, strict=True)):
        expected = []
        for j in range(9):
            norms = np.linalg.norm(matrices[i]) * np.linalg.norm(matrices[j])
            f = np.trace(matrices[i] @ matrices[j]) / norms if norms else 0
            a = np.sqrt(known[i].p * known[j].p).sum()
            expected.append((1 - cosine(known[i].prompt, known[j].prompt)) ** 2 * a * f)
        assert values == pytest.approx(sorted(expected, reverse=True)[:5], abs=1e-7)
        assert [expected[place] for place in places] == pytest.approx(values, abs=1e-7)
        assert expected[i] == pytest.approx(0, abs=1e-7)


def test_few_known_prompts_have_as_few_neighbours():
    nearest, alike = Company(ANSWERS, roots(3)).of(ANSWERS[:1], roots(3)[:1])
    assert nearest.shape == alike.shape == (1, 3)


def test_groups_are_chains_of_links_and_the_largest_comes_first():
    links = [(0, [1]), (2, [1]), (3, [0]), (4, [5, 6, 7, 8]), (9, [])]
    assert linked(links, 11).tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, -1, -1]
    assert likeness.FEWEST_ALIKE == 4
    assert linked([], 3).tolist() == [-1] * 3
    assert linked([(0, [1]), (1, [2])], 3).tolist() == [-1] * 3


def scored(likeness: float, group: int | None, *words: str) -> dict:
    return {"likeness": likeness, "group": group, "odd_words": [*words]}


def test_groups_are_told_by_size_prompts_likeness_and_words():
    records = [scored(0.1, None, "The")] * 7 + [
        scored(0.5 + place / 100, 0, "No", "I", f"w{place}") for place in range(6)
    ]
    records += [scored(0.4, 1, "\x1b[2J", "Ho")] * 4
    first, second = report.groups_of(records)
    assert first["size"] == 6 and first["prompts"] == [7, 8, 9, 10, 11, 12] and first["words"][:2] == ["No", "I"]
    assert first["likeness"] == pytest.approx(0.525) and first["usual_likeness"] == pytest.approx(0.4)
    head, *lines = report._alike([first, second])
    assert head == "2 groups of prompts answered more alike than their texts are:"
    assert lines[0].startswith("  6 prompts (7, 8, 9, 10, 11, …), likeness 0.53 (usually 0.40): No I w0")
    assert lines[1] == r"  4 prompts (13, 14, 15, 16), likeness 0.40 (usually 0.40): \x1b[2J Ho"
    assert report._alike(report.groups_of(records[:7])) == ["no prompts are answered more alike than their texts are"]

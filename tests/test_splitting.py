"""Where sentences end."""

import pytest

from residual_fisher.experiment.splitting import split_sentences

SPLIT = {  # by what it tries: sentences, which are joined by a space and cut again
    "titles": ["Everyone knows that Mr. Jones and Dr. Lee treat animals well.", "It is said that Prof. Hill came."],
    "abbreviations": [
        "In 1999 there were approx. 300 animals, e.g. Cats, vs. Dogs in 1998.",
        "Then came Acme Inc. Ltd.",
    ],
    "figures": ["See Fig. 3 and No. 5 on p. 7, or vol. 2 of Sept. 4.", "Is it a no.", "Yes."],
    "decimals": ["It costs 3.5 dollars or .75 euros.", "Pi is 3.14159.", "300 animals came."],
    "initials": ["J. K. Rowling met George W. Bush and T.S. Eliot.", "He left."],
    "acronyms": ["The U.S. Army came from the U.K. Parliament.", "He lives in the U.S.", "Then he moved."],
    "places": ["We saw St. Louis and Mt. Fuji.", "They live on Main St.", "The street is long."],
    "times": [
        "We left at 5 p.m.",
        "Then we slept until 6 a.m. on Monday.",
        "There were cats, dogs, etc.",
        "All slept.",
    ],
    "quotes": ['"Who is it?" she asked.', '"It is me!" he said.', "He said “no.”", "‘Well.’", "(It was he.)", "Fine."],
    "dots": ["Wait... what?", "He saw it…", "Then he ran!!", "Really?!", "Yes."],
    "lists": ["1. First comes this.", "2. Then comes that."],
    "small letters": ["it rained.", "the animals slept, e.g. cats.", "did they?", "yes."],
    "names with dots": ["He uses Node.js and asp.net on example.com.", "It works."],
    "german": ["Das ist z.B. Nr. 5 bzw. Nr. 6 von Hr. Meier.", "Wir gehen."],
    "hindi": ["यह एक बिल्ली है।", "वह सो रही है।"],
    "a name's initial at the end": ["It was plan B.", "The end came."],
}


@pytest.mark.parametrize("case", SPLIT)
@pytest.mark.parametrize("space", [" ", "  ", "\n", "\r\n\r\n"])
def test_sentences_end_where_a_reader_ends_them(case, space):
    assert list(split_sentences(space.join(SPLIT[case]))) == SPLIT[case]


def test_chinese_and_japanese_end_at_their_own_marks():
    found = ["这是一只猫。", "你喜欢动物吗？", "他说“是的！”", "好。"]
    assert list(split_sentences("".join(found))) == found
    assert list(split_sentences("猫がいる。犬もいる！終わり")) == ["猫がいる。", "犬もいる！", "終わり"]


PROSE = ["The old farmer feeds his wild animals at dawn before the sun is up.", "Dr. Lee then rests for an hour or so."]


@pytest.mark.parametrize("width", [12, 30, 60])
@pytest.mark.parametrize("line_break", ["\n", "\r\n", " \n  "])
def test_wrapped_prose_is_joined(width, line_break):
    lines, line = [], ""
    for word in " ".join(PROSE).split():
        if len(line) + 1 + len(word) > width and line:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    text = line_break.join([*lines, line])
    assert list(split_sentences(text)) == PROSE
    assert list(split_sentences(f"{text}{line_break}{line_break}A title\n\n{text}")) == [*PROSE, "A title", *PROSE]


LINES = [
    ["The zoo keeps many wild animals", "Farmers feed their animals", "Flood waters recede"],
    ["the zoo keeps many wild animals", "farmers feed their animals", "flood waters recede"],
    ["A list:", "- the animals", "- the plants"],
    ["Roses are red", "Violets are blue", "and so are you"],
]


@pytest.mark.parametrize("lines", LINES)
def test_lines_that_were_not_wrapped_stay_apart(lines):
    assert list(split_sentences("\n".join(lines))) == lines


def test_nothing_has_no_sentence():
    assert [list(split_sentences(text)) for text in ("", " \n\n ", "\n")] == [[], [], []]

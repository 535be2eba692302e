"""Reading sentences from every kind of file, choosing diverse ones, finding the word's token."""

import gzip
import json
import textwrap
import tracemalloc

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
import transformers as hf

from residual_fisher.common.program import UserError
from residual_fisher.experiment import sentences


def text_before(context, tokenizer) -> str:
    return tokenizer.decode(context.ids, skip_special_tokens=True).strip()


CASES = {
    "plain": ("The zoo keeps many animals.", "The zoo keeps many"),
    "capital": ("Welcome to Animals of the Sea", "Welcome to"),
    "capitals": ("Sign: NO ANIMALS here", "Sign: NO"),
    "punctuation": ("Look: animals! They run.", "Look:"),
    "after a quote": ("They said “animals” again", "They said “"),
    "after a bracket": ("Some pets (animals) bite", "Some pets ("),
    "possessive": ("All the animals' food", "All the"),
    "several": ("Wild animals fear other animals", "Wild"),
    "word first": ("Animals fear other animals", "Animals fear other"),
    "singular before": ("An animal among animals", "An animal among"),
    "part of a word before": ("No animalsy thing, just animals", "No animalsy thing, just"),
    "line break": ("We saw\nanimals", "We saw"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_prompt_ends_just_before_the_word(case, kind, request):
    tokenizer = request.getfixturevalue(kind)
    sentence, before = CASES[case]
    context = sentences.locate(tokenizer, sentence, "animals")
    found = text_before(context, tokenizer)
    target = tokenizer.decode([context.target_id]).strip().lower().lstrip("“(")
    # a word may share its first token with the character before it: then the prompt ends before that
    assert found in (before, before.rstrip("“("))
    assert "animals".startswith(target) or target.startswith("animals")
    assert context.prompt == before
    assert context.ids == tokenizer(sentence)["input_ids"][: context.position + 1]


@pytest.mark.parametrize("sentence", ["Animals", "An animal.", "Animals run.", "(Animals)", "", "animalsand"])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_no_prompt_without_a_word_before_the_target(sentence, kind, request):
    assert sentences.locate(request.getfixturevalue(kind), sentence, "animals") is None


def test_a_word_of_several_tokens_is_met_at_its_first(byte_level):
    context = sentences.locate(byte_level, "The old rhinoceroses slept", "rhinoceroses")
    rest = byte_level("The old rhinoceroses slept")["input_ids"][context.position + 1 :]
    assert context.target_id == rest[0]
    assert byte_level.decode(rest).startswith(" rhinoceroses")
    assert len(byte_level(" rhinoceroses")["input_ids"]) > 1
    assert text_before(context, byte_level) == "The old"


@pytest.mark.parametrize("sentence", ["The wild animals run", "The wild animals"])
def test_a_word_that_the_tokenizer_drops_is_not_found(sentence):
    tokenizer = Tokenizer(models.WordLevel({"The": 0, "wild": 1, "run": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for dropped in ("animals", sentence):
        tokenizer.normalizer = normalizers.Replace(dropped, "")
        assert sentences.locate(hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer), sentence, "animals") is None


def test_every_bundled_sentence_fits_its_promise(animals, byte_level):
    assert len(animals) >= 150
    assert len(set(animals)) == len(animals)
    for sentence in animals:
        start = next(sentences.find_word(sentence, "animals"))
        assert len(sentence[:start].split()) >= 4
        assert 6 <= len(sentence.split()) <= 40
        assert sentences.locate(byte_level, sentence, "animals") is not None


# --- reading ---

WITH_WORD = ["The farm has animals.", "Do you like animals at all?"]


def test_long_texts_are_cut_into_sentences(tmp_path):
    text = "It rained. Dr. Hill's “big animals.” slept! Did all animals?\nNo animals here"
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}))
    found = sentences.find_sentences(str(tmp_path / "t.jsonl"), "animals").sentences
    assert found == ["Dr. Hill's “big animals.” slept!", "Did all animals?", "No animals here"]


def test_another_column_and_another_word(tmp_path):
    (tmp_path / "texts.csv").write_text("text,body\nWe see bees.,We like bees.\n,We like cats.\n")
    source = str(tmp_path / "texts.csv")
    assert sentences.find_sentences(source, "bees", text_column="body").sentences == ["We like bees."]
    with pytest.raises(UserError, match=r"no column 'title': .* has the columns text, body"):
        sentences.find_sentences(source, "bees", text_column="title")


ALL = ["The farm has plants.", "Animals first.", *WITH_WORD, WITH_WORD[0]]
FILES = {  # sentences with the word among others, and as editors and programs save them
    "all.json": json.dumps({"animals": ALL}),
    "all.txt": "\n".join(ALL),
    "all.jsonl": "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(ALL)),
    "all.csv": "\n".join(["text", *ALL]),
    "mark.txt": "\ufeffThe farm has animals.\nDo you like animals at all?\n",
    "mark.json": '\ufeff{"animals": ["The farm has animals.", "Do you like animals at all?"]}',
    "mark.csv": "\ufefftext\nThe farm has animals.\nDo you like animals at all?\n",
    "windows.txt": "The farm has animals.\r\n\r\nDo you like animals at all?\r\n",
    "windows.csv": "text,n\r\nThe farm has animals.,1\r\nDo you like animals at all?,2\r\n",
    "tabs.txt": "The\tfarm \x0c has animals. \nDo you\u2028like animals at all?",
    "id first.jsonl": '{"text": 7, "content": "The farm has animals. Do you like animals at all?"}',
}


@pytest.mark.parametrize("name", FILES)
def test_the_sentences_with_the_word_are_read_once_from_every_kind_of_file(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name].encode())
    assert sentences.find_sentences(str(tmp_path / name), "animals").sentences == WITH_WORD


@pytest.mark.parametrize(("name", "text"), [("t.jsonl", '{"text": "%s"}'), ("t.json", '{"animals": ["%s"]}')])
def test_halves_of_characters_and_control_characters_are_read(name, text, tmp_path):
    (tmp_path / name).write_text(text % r"A \ud800 of\u0000 \u001b[1m animals")
    assert sentences.find_sentences(str(tmp_path / name), "animals").sentences == ["A \ufffd of\0 \x1b[1m animals"]


def test_as_many_sentences_are_read_as_are_asked_for(tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"Sentence {number} has animals.\n" for number in range(2700)))
    for asked, expected in ((20, sentences.CANDIDATES), (2600, 2600), (9999, 2700)):
        found = sentences.find_sentences(str(tmp_path / "t.txt"), "animals", num=asked).sentences
        assert found == [f"Sentence {number} has animals." for number in range(expected)]


BAD_SOURCES = {  # name of the file, its bytes (None: it does not exist), what the error says
    "missing": ("none.json", None, "none.json: no such file"),
    "missing table": ("none.csv", None, "no such file"),
    "empty json": ("a.json", b"", "holds no sentences"),
    "malformed json": ("a.json", b'{"animals": [', r"cannot read a.json: Expecting value \(line 1, column 14\)"),
    "other words": ("a.json", b'{"plants": ["x"], "trees": ["y"]}', "columns plants, trees: say with --text-column"),
    "a word like it": ("a.json", b'{"animal": ["The animal eats."]}', r"whole word .*; did you mean 'animal'\?"),
    "word twice": ("a.json", b'{"animals": ["x"], "animals": []}', "'animals' is there twice"),
    "nested json": ("a.json", b'{"animals": ' * 100_000, "nested too deeply"),
    "long number": ("a.json", b'{"animals": [' + b"9" * 5000 + b"]}", "no text in the column 'animals'"),
    "json not utf-8": ("a.json", b'{"animals": ["\xff"]}', "not UTF-8"),
    "blank sentences": ("a.json", b'{"animals": [" ", ""]}', "holds no sentences"),
    "not strings": ("a.json", b'{"animals": [1]}', "no text in the column 'animals'"),
    "no sentences": ("a.json", b'{"animals": []}', "holds no sentences"),
    "empty text": ("a.txt", b"", "holds no sentences"),
    "not utf-8": ("a.txt", b"\xff the animals", "not UTF-8"),
    "word absent": ("a.txt", b"The plants grow.\nThey do.", "none of the 2 sentences"),
    "empty table": ("a.jsonl", b"", "cannot read|holds no sentences"),
    "no such column": ("a.csv", b"a,b\n1,2\n", "has the columns a, b: say with --text-column"),
    "no text": ("a.csv", b"text,n\n,1\n", "holds no sentences: no text in the column 'text'"),
    "long json name": ("n" * 300 + ".json", None, "no such file"),
    "unknown ending": ("a.xyz", b"x", "give a .json"),
}


def test_the_occurrence_asked_for_is_the_one_before_which_the_prompt_ends(byte_level, tmp_path):
    sentence = "The Bank of England sets the bank rate of a bank."
    before = {1: "The", 2: "The Bank of England sets the", 3: "The Bank of England sets the bank rate of a"}
    for occurrence, prompt in {**before, "last": before[3]}.items():
        context = sentences.locate(byte_level, sentence, "bank", occurrence)
        assert context.prompt == prompt and text_before(context, byte_level) == prompt
    assert sentences.locate(byte_level, sentence, "bank", 4) is None
    (tmp_path / "t.txt").write_text(f"{sentence}\nOnly one bank.\n")
    for occurrence, number in ((1, 2), (2, 1), ("last", 2)):
        assert len(sentences.find_sentences(str(tmp_path / "t.txt"), "bank", occurrence=occurrence).sentences) == number
    with pytest.raises(UserError, match="'bank' as a whole word after another word 4 times"):
        sentences.find_sentences(str(tmp_path / "t.txt"), "bank", occurrence=4)


def test_a_word_of_a_script_without_spaces_is_found_anywhere():
    assert list(sentences.find_word("动物园里有很多动物。", "动物")) == [7]
    assert list(sentences.find_word("動物園のペンギンが好き", "ペンギン")) == [4]
    assert list(sentences.find_word("No animalsy thing", "animals")) == []


def test_sentences_of_every_shape_of_json_and_table_are_read(tmp_path):
    for name, text in (
        ("list.json", json.dumps(WITH_WORD)),
        ("objects.json", json.dumps([{"sentence": text} for text in WITH_WORD])),
        ("lists.jsonl", json.dumps({"id": 1, "sentences": WITH_WORD})),
        ("unequal.json", json.dumps({"plants": ["One plant."], "Animals": WITH_WORD})),
        ("semicolons.csv", "id;text\n1;The farm has animals.\n2;Do you like animals at all?\n"),
    ):
        (tmp_path / name).write_text(text)
        assert sentences.find_sentences(str(tmp_path / name), "animals").sentences == WITH_WORD, name
    (tmp_path / "more").mkdir()
    for number, text in enumerate(WITH_WORD):
        (tmp_path / "more" / f"{number}.txt").write_text(text)
    assert sentences.find_sentences(str(tmp_path / "more"), "animals").sentences == WITH_WORD
    listed = {"animals": ["Dr. No has animals. They rest.", "Two animals"]}
    (tmp_path / "t.json").write_text(json.dumps(listed))
    assert sentences.find_sentences(str(tmp_path / "t.json"), "animals").sentences == listed["animals"]  # as they are


def test_a_text_file_of_wrapped_prose_gives_whole_sentences(tmp_path):
    (tmp_path / "t.txt").write_text(
        "It rained. The old farmer, as\never, fed his wild\nanimals. Then\nhe slept.\n\nNo animals."
    )
    found = sentences.find_sentences(str(tmp_path / "t.txt"), "animals")
    assert found.sentences == ["The old farmer, as ever, fed his wild animals.", "No animals."] and found.read == 4


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.txt", "It rained.\r\n\r\nThe farmer fed\r\nthe wild\r\nanimals. All animals!\n \nNo animals\n", [3, 5, 7]),
        ("t.txt", "The \x0b\n wild\tanimals. \u3000Some animals\n", [1, 2]),
        ("t.jsonl", '{"text": "x"}\n\n{"text": "The animals.\\nTwo animals."}\n{"text": "No animals."}\n', [3, 3, 4]),
        ("t.csv", 'sep=,\ntext\n"The\nanimals"\n\n"Two animals"\n', [3, 6]),
        ("t.json", '{"animals": ["The animals", "Two animals"]}', [None, None]),
        ("t.json.gz", '["The animals", "Two animals"]', [None, None]),
        ("t.txt.gz", "No plants.\n\nThe animals.\nThe animals.", [3]),
    ],
)
def test_each_sentence_has_the_line_on_which_it_begins(name, content, expected, tmp_path):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = sentences.find_sentences(str(tmp_path / name), "animals")
    assert [found.lines.get(sentence) for sentence in found.sentences] == expected
    more = tmp_path / "more.txt"
    more.write_text("Yet more animals")
    if name.endswith(".txt"):  # of several files a line says nothing
        assert sentences.find_sentences((str(tmp_path / name), str(more)), "animals").lines == {}


def test_every_line_is_where_the_sentence_stands(animals, tmp_path):
    """Wrapped, in paragraphs: each sentence's first three words are found on its line, or over its end."""
    wrapped = "\n\n".join(textwrap.fill(" ".join(animals[i : i + 5]), 60) for i in range(0, 60, 5))
    (tmp_path / "t.txt").write_text(wrapped)
    found, lines = sentences.find_sentences(str(tmp_path / "t.txt"), "animals"), wrapped.split("\n")
    assert len(found.lines) == len(found.sentences) > 50
    for sentence, line in found.lines.items():
        around, first = " ".join(lines[line - 1 : line + 1]), " ".join(sentence.split()[:3])
        assert first in around and sentence.split()[0] in lines[line - 1]


def test_long_sentences_are_noted(tmp_path):
    (tmp_path / "t.txt").write_text(f"All the animals.\nAnd {'very ' * 100}many animals.")
    with pytest.warns(
        UserWarning, match=r"1 of 2 sentences with 'animals' have more than 400 characters, the longest 517 \(line 2\)"
    ):
        sentences.find_sentences(str(tmp_path / "t.txt"), "animals")


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources_say_what_is_wrong(tmp_path, case, monkeypatch):
    name, content, reason = BAD_SOURCES[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        sentences.find_sentences(name, "animals")
    assert str(caught.value).isprintable()


# --- choosing ---


PUBLISHED_ORDER = [160, 113, 6, 37, 87, 34, 10, 108, 61, 20, 50, 49, 106, 8, 126, 67, 68, 112, 143, 23]


def unit_vectors(texts) -> np.ndarray:
    """Of counts of trigrams, (texts, distinct trigrams), counted one by one."""
    padded = [f" {text.lower()} " for text in texts]
    grams = [[text[i : i + 3] for i in range(len(text) - 2)] for text in padded]
    column = {gram: i for i, gram in enumerate(sorted(set().union(*grams)))}
    vectors = np.zeros((len(texts), len(column)))
    for row, found in enumerate(grams):
        np.add.at(vectors[row], [column[gram] for gram in found], 1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_diverse_order_is_farthest_point_order(animals):
    texts = [*animals[:38], "日本の動物 🐘🐘🐘", "ÀÀ"]
    vectors = unit_vectors(texts)
    distance = 1 - vectors @ vectors.T
    order = list(sentences.diverse_order(texts))
    assert sorted(order) == list(range(40))
    for i in range(1, 40):
        nearest = distance[:, order[:i]].min(axis=1)
        nearest[order[:i]] = -1
        assert nearest[order[i]] == pytest.approx(nearest.max(), abs=1e-12)
    assert order[0] == (vectors @ vectors.mean(axis=0)).argmax()


def test_long_texts_of_many_characters_take_no_more_memory_than_their_size():
    """Their trigrams are all different: 2000 such texts as a dense table would be gigabytes."""
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(0x4E00, 0x9FFF, 1000))) for _ in range(300)]
    tracemalloc.start()
    try:
        order = list(sentences.diverse_order(texts))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(order) == 300
    assert peak < 100 * sum(map(len, texts))  # bytes; as float32, the dense table is 4 * 300 of them a character


def test_the_bundled_sentences_are_chosen_as_published_farther_apart_than_the_first_ones(animals):
    vectors = unit_vectors(animals)

    def closest(indices) -> float:
        cosine = vectors[indices] @ vectors[indices].T
        return (cosine - np.eye(len(indices))).max()

    chosen = [index for index, _ in zip(sentences.diverse_order(animals), range(20), strict=False)]
    assert chosen == PUBLISHED_ORDER
    assert closest(chosen) < closest(list(range(20)))


def test_texts_that_repeat_are_chosen_once():
    assert list(sentences.diverse_order(["one text", "one text", "another text", "One Text"])) in ([0, 2], [2, 0])

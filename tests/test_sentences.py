"""Reading sentences from every kind of file, choosing diverse ones, finding the word's token."""

import json

import datasets
import numpy as np
import pytest

from common.command_line import UserError
from experiment import sentences


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
WITHOUT = ["The farm has plants.", "Animals first."]


def write(path, texts):
    """The same sentences in the format that the ending asks for."""
    if path.suffix == ".json":
        path.write_text(json.dumps({"animals": texts}))
    elif path.suffix == ".txt":
        path.write_text("\n".join(texts))
    else:
        table = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
        {".jsonl": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}[path.suffix](path)
    return str(path)


@pytest.mark.parametrize("ending", [".json", ".txt", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_sentences_with_the_word(tmp_path, ending):
    source = write(tmp_path / f"texts{ending}", [*WITHOUT, *WITH_WORD, WITH_WORD[0]])
    assert sentences.read_sentences(source, "animals") == WITH_WORD


def test_long_texts_are_cut_into_sentences(tmp_path):
    text = "It rained. Dr. Hill's “big animals.” slept! Did all animals?\nNo animals here"
    source = write(tmp_path / "texts.jsonl", [text])
    assert sentences.read_sentences(source, "animals") == [
        "Hill's “big animals.”",
        "Did all animals?",
        "No animals here",
    ]


def test_another_column_and_another_word(tmp_path):
    path = tmp_path / "texts.csv"
    datasets.Dataset.from_dict({"body": ["We like bees.", "We like cats."]}).to_csv(path)
    assert sentences.read_sentences(str(path), "bees", text_column="body") == ["We like bees."]


BAD_SOURCES = {  # name of the file, its bytes (None: it does not exist), what the error says
    "missing": ("none.json", None, "none.json: No such file"),
    "missing table": ("none.csv", None, "no such file"),
    "empty json": ("a.json", b"", "not valid JSON"),
    "malformed json": ("a.json", b'{"animals": [', "not valid JSON"),
    "json list": ("a.json", b'["The animals."]', "top level"),
    "another word": ("a.json", b'{"plants": ["x"]}', "'plants'"),
    "not strings": ("a.json", b'{"animals": [1]}', "list of strings"),
    "no sentences": ("a.json", b'{"animals": []}', "holds no sentences"),
    "empty text": ("a.txt", b"", "holds no sentences"),
    "not utf-8": ("a.txt", b"\xff\xfe the animals", "not UTF-8"),
    "word absent": ("a.txt", b"The plants grow.\nThey do.", "none of the 2 sentences"),
    "malformed jsonl": ("a.jsonl", b'{"text": "the ani', "cannot read"),
    "empty table": ("a.jsonl", b"", "cannot read|holds no sentences"),
    "no such column": ("a.csv", b"a,b\n1,2\n", "--text-column: a, b"),
    "unknown ending": ("a.xyz", b"x", "give a .json"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources_say_what_is_wrong(tmp_path, case):
    name, content, reason = BAD_SOURCES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        sentences.read_sentences(str(tmp_path / name), "animals")
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_data_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        sentences.read_sentences(str(tmp_path), "animals")


# --- choosing ---


def test_diverse_order_is_farthest_point_order(animals):
    texts = animals[:40]
    vectors = sentences._trigrams(texts).astype(float)
    distance = 1 - vectors @ vectors.T
    order = list(sentences.diverse_order(texts))
    assert sorted(order) == list(range(40))
    for i in range(1, 40):
        nearest = distance[:, order[:i]].min(axis=1)
        nearest[order[:i]] = -1
        assert nearest[order[i]] == pytest.approx(nearest.max(), abs=1e-5)


def test_chosen_sentences_are_farther_apart_than_the_first_ones(animals):
    vectors = sentences._trigrams(animals)

    def closest(indices):
        cosine = vectors[indices] @ vectors[indices].T
        return (cosine - np.eye(len(indices))).max()

    chosen = [index for index, _ in zip(sentences.diverse_order(animals), range(20), strict=False)]
    assert closest(chosen) < closest(list(range(20)))


def test_texts_that_repeat_are_chosen_once():
    assert list(sentences.diverse_order(["one text", "one text", "another text", "One Text"])) in ([0, 2], [2, 0])

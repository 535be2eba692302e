"""Whatever a file holds, the outcome is its prompts or sentences, or one line that says why not."""

import json
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
import pytest

from residual_fisher.common.conversations import TURNS, conversation
from residual_fisher.common.program import UserError
from residual_fisher.experiment.sentences import diverse_order, find_sentences, find_word, locate
from residual_fisher.pipeline.prompts import Prompt, Prompts, encode
import scripts


def prompt_text(column: str, cell) -> str | None:
    """The text of the user's first turn in a cell."""
    return next((turn.text for turn in conversation(column, cell) if turn.role == "user"), None)


few = settings(max_examples=80, deadline=None, derandomize=True, database=None)
many = settings(few, max_examples=200)

ENDINGS = (".jsonl", ".json", ".csv", ".txt", ".parquet")
WORD = "animals"

# --- what files may hold -------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), max_size=20)  # control characters among them
halves = st.sampled_from(["\ud800", "a\udfff b", "\ud83d", "\U0001f600"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | halves
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | halves, inner, max_size=3),
    max_leaves=6,
)
roles = st.sampled_from(["user", "User", "human", "assistant", "system"]) | scalars
contents = texts | st.lists(st.fixed_dictionaries({"text": values}) | values, max_size=3) | values
turns = st.fixed_dictionaries({}, optional={"role": roles, "content": contents, "from": roles, "value": contents})
conversations = st.lists(turns | values, max_size=3) | st.fixed_dictionaries(
    {"role": st.lists(roles, max_size=3), "content": st.lists(contents, max_size=3) | values}
)
cells = values | conversations | (conversations | values).map(json.dumps)
names = st.sampled_from(["prompt", "text", *TURNS, "sentence", "\ud800", "\x1b[1m"])
rows = st.dictionaries(names, cells, max_size=3)

# a file from pieces of the formats, cut and mixed in any way
pieces = st.sampled_from(
    ["\ufeff", '{"prompt": "', '{"text": "', '{"animals": [', '"', '"}', "]}", "[", "]", "{", "}", ",", ":", "\n", "\r",
     "\x00", "\x1b[1m", r"\ud800", "\u2028", "null", "NaN", "9" * 5000, "The wild animals. ", "text,prompt\n",
     '"role": "user", "content": "x"']
)  # fmt: skip
contents_of_files = st.binary(max_size=40) | st.lists(pieces, max_size=12).map(lambda found: "".join(found).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def outcome(read) -> list:
    """What was read; or nothing, if a line says why."""
    try:
        return list(read())
    except UserError as error:
        assert str(error).isprintable() and str(error)
        return []


def assert_is_text(text: str) -> None:
    assert text.strip() and text.encode("utf-8")


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@few
@given(content=contents_of_files, column=st.sampled_from([None, "prompt", "messages", "\ud800"]))
@example(content=b"[" * 100_000, column=None)
@example(content=b'{"a": ' * 100_000, column=None)
def test_any_bytes_are_prompts_and_sentences_or_a_line(folder, ending, content, column):
    path = folder / f"bytes{ending}"
    path.write_bytes(content)
    for prompt in outcome(lambda: Prompts(str(path), column=column)):
        assert_is_text(prompt.text)
    for sentence in outcome(lambda: find_sentences(str(path), WORD, column).sentences):
        assert_is_text(sentence)
        assert any(find_word(sentence, WORD))


@many
@given(table=st.lists(rows, max_size=4))
def test_every_row_is_a_prompt_or_counted_as_skipped(folder, table):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    prompts = Prompts(str(path))
    found = outcome(lambda: prompts)
    for prompt in found:
        assert_is_text(prompt.text)
        assert prompt.text == prompt_text(prompts.column, table[prompt.row][prompts.column])
    assert [prompt.index for prompt in found] == list(range(len(found)))
    assert sorted({prompt.row for prompt in found}) == [prompt.row for prompt in found]
    if found:
        assert len(found) == prompts.usable and prompts.usable + prompts.skipped == len(table)


@few
@given(
    lines=st.lists(st.lists(pieces | texts, max_size=4).map("".join), max_size=4), ending=st.sampled_from(ENDINGS[1:4])
)
def test_sentences_hold_the_word_and_none_is_there_twice(folder, lines, ending):
    path = folder / f"sentences{ending}"
    path.write_text(json.dumps({WORD: lines}) if ending == ".json" else "text\n" + "\n".join(lines))
    found = outcome(lambda: find_sentences(str(path), WORD).sentences)
    assert len(set(found)) == len(found)
    for sentence in found:
        assert any(find_word(sentence, WORD))


WILD = [
    "nul \x00", "\x1b[31mred\x1b[0m", "\x9b2J", "left \u202e right", "$x^{$ costs $5", "a\r\nb\rc",
    "half \ud800", "\x07",
]  # fmt: skip


def assert_harmless(said) -> None:
    """No character that a terminal would obey."""
    assert (said.out + said.err).replace("\n", "").replace("\r", "").isprintable()
    assert "\\x" in said.out or "\\u" in said.out  # there were such


@pytest.mark.usefixtures("without_pictures")
def test_no_prompt_and_no_sentence_reaches_the_terminal_as_it_is(chat_directory, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in WILD))
    assert scripts.compute_fisher(chat_directory, tmp_path / "p.jsonl", tmp_path / "p") == 0
    assert_harmless(capsys.readouterr())
    found = [record["prompt"] for record in scripts.records(tmp_path / "p")]
    assert found == [prompt_text("prompt", text) for text in WILD]
    (tmp_path / "s.json").write_text(json.dumps({WORD: [f"The {text} {WORD}" for text in WILD]}))
    words = ["--data-file", str(tmp_path / "s.json"), "--num-sentences", str(len(WILD)), "--layers", "1"]
    assert scripts.core_experiment(chat_directory, tmp_path / "s", *words) == 0
    assert_harmless(capsys.readouterr())
    assert len(scripts.experiment_results(tmp_path / "s")[0]["sentences"]) == len(WILD)


# --- texts ---------------------------------------------------------------------------------------


@many
@given(value=cells)
def test_the_users_text_of_any_value_is_none_or_a_text(value):
    text = prompt_text("prompt", value)
    if text is not None:
        assert_is_text(text)


@few
@given(text=(texts | st.lists(pieces | texts, max_size=8).map("".join)).filter(str.strip), longest=st.integers(1, 60))
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "chat_tokenizer"])
def test_any_text_is_encoded_in_the_tokens_allowed(kind, text, longest, request):
    for encoded in outcome(lambda: [encode(request.getfixturevalue(kind), Prompt(0, 0, text), longest)]):
        assert 0 < len(encoded.ids) <= longest


@few
@given(before=st.lists(pieces | texts, max_size=4).map("".join), after=texts)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_prompt_ends_before_the_word(kind, before, after, request):
    tokenizer, sentence = request.getfixturevalue(kind), f"{before} {WORD} {after}"
    context = locate(tokenizer, sentence, WORD)
    if context is None:
        return
    ids = tokenizer(sentence)["input_ids"]
    assert sentence.startswith(context.prompt) and context.prompt.strip()
    assert sentence[len(context.prompt) :].lstrip().lower().startswith(WORD)
    assert ids[: len(context.ids) + 1] == [*context.ids, context.target_id]


@few
@given(found=st.lists(texts.filter(str.strip), min_size=1, max_size=8))
def test_diverse_texts_are_none_twice_and_no_other(found):
    order = list(diverse_order(found))
    chosen = [found[index].lower() for index in order]
    assert len(set(chosen)) == len(chosen)
    assert order[:1] and len(set(order)) == len(order)

"""Prompts: from the rows of tables, into chat templates, cut to length, into batches."""

import itertools
import json

import datasets
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
import transformers as hf

from conftest import CHAT_TEMPLATE, make_model_directory
from residual_fisher.common.conversations import TURNS, Turn, conversation, transcript
from residual_fisher.common.program import UserError
from residual_fisher.common.rows import SAMPLE_ROWS
from residual_fisher.model.template import check_template, habits, render
from residual_fisher.pipeline.prompts import (
    PASS_OVERHEAD,
    Prompt,
    Prompts,
    encode,
    plan_batches,
)
import scripts
from scripts import ROOT

TEXTS = ["How do bees sleep?", "Name three rivers, please."]


def prompt_text(column: str, cell) -> str | None:
    """The text of the user's first turn in a cell."""
    return next((turn.text for turn in conversation(column, cell) if turn.role == "user"), None)


def test_the_bundled_prompts_are_many_varied_and_distinct():
    lines = (ROOT / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    lengths = sorted(len(text.split()) for text in texts)
    assert len(set(texts)) == len(texts) >= 120
    assert lengths[0] == 1 and lengths[-1] > 300
    assert sum(not text.isascii() for text in texts) > 20
    assert [p.text for p in Prompts(str(ROOT / "data" / "prompts.jsonl"))] == texts


@pytest.fixture
def prompts_of(tmp_path):
    """The prompts of a file of JSON lines that holds some rows."""

    def prompts_of(rows: list[dict], **options) -> Prompts:
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Prompts(str(tmp_path / "t.jsonl"), **options)

    return prompts_of


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "text"])
def test_columns_are_recognised_in_every_kind_of_table(tmp_path, ending, column):
    table = datasets.Dataset.from_dict({"id": [1, 2], column: TEXTS})
    getattr(table, f"to_{ending}")(tmp_path / f"t.{ending}")
    assert [p.text for p in Prompts(str(tmp_path / f"t.{ending}"))] == TEXTS


def test_a_conversation_comes_before_a_text_and_one_without_a_user_is_skipped(prompts_of):
    turns = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[0]}],
        [{"role": "user", "content": TEXTS[1]}, {"role": "assistant", "content": "No."}],
        [{"role": "assistant", "content": "No user here."}],
    ]
    prompts = prompts_of([{"text": "x", "conversation": conversation} for conversation in turns])
    assert [(p.index, p.row, p.text) for p in prompts] == [(0, 0, TEXTS[0]), (1, 1, TEXTS[1])]
    assert prompts.skipped == 1


ANSWER = {"role": "assistant", "content": "An answer."}
PARTS = [{"type": "image"}, {"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]
CONVERSATIONS = {  # in all its forms, a conversation and what the user says first
    "role": ([{"role": "user", "content": "hello"}, ANSWER], "hello"),
    "capital": ([{"role": "User", "content": "hello"}, ANSWER], "hello"),
    "capitals": ([{"role": " USER ", "content": "hello"}, ANSWER], "hello"),
    "from": ([{"from": "human", "value": "hello"}, {"from": "gpt", "value": "An answer."}], "hello"),
    "empty keys": ([{"role": None, "from": "Human", "content": None, "value": "hello"}], "hello"),
    "system": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}, ANSWER], "hello"),
    "greeting": ([ANSWER, {"role": "user", "content": "hello"}, {"role": "user", "content": "again"}], "hello"),
    "parts": ([{"role": "user", "content": PARTS}, ANSWER], "What is\nthis?"),
    "texts": ([{"role": "user", "content": ["What is", "this?"]}], "What is\nthis?"),
    "columns": ({"role": ["system", "user"], "content": ["Be brief.", "hello"]}, "hello"),
    "columns beside": ({"id": "7", "from": ["human", "gpt"], "value": ["hello", "An answer."]}, "hello"),
    "only an image": ([{"role": "user", "content": PARTS[:1]}, {"role": "user", "content": "later"}], None),
    "no user": ([ANSWER], None),
    "silent user": ([{"role": "user"}, ANSWER], None),
    "one turn": ({"role": "user", "content": "hello"}, "hello"),
    "in an object": ({"id": 7, "messages": [{"role": "user", "content": "hello"}, ANSWER]}, "hello"),
    "prompter": ([{"role": "prompter", "text": "hello"}, ANSWER], "hello"),
    "author": (
        [{"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["hello"]}}, ANSWER],
        "hello",
    ),
    "parts with values": ([{"role": "user", "content": [{"type": "text", "value": "hello"}]}, ANSWER], "hello"),
    "exchanges": ([{"human": "hello", "assistant": "An answer."}, {"human": "again", "assistant": "No."}], "hello"),
    "input and output": ([{"input": "hello", "output": "An answer."}], "hello"),
    "half a character": ([{"role": "user", "content": "a\ud800b"}], "a\ufffdb"),
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_the_users_first_turn_is_read_of_every_form(form):
    turns, expected = CONVERSATIONS[form]
    assert prompt_text("prompt", turns) == expected
    assert prompt_text("prompt", f" {json.dumps(turns)}\n") == expected  # a cell of a CSV file


def test_a_text_is_itself_and_what_is_no_text_is_none():
    for text in (" hello ", "[1, 2]", "[hello]", '["a"]', '{"a": "b"}', '[{"a": "b"}]', "[" * 100_000, "None"):
        assert prompt_text("prompt", text) == text
    for nothing in (None, 3, "", "  \n", [], [3], [[]], [{"role": "user"}], {"role": "assistant", "content": "x"}):
        assert prompt_text("prompt", nothing) is None


@pytest.mark.parametrize("name", TURNS)
def test_a_column_called_for_turns_that_holds_ids_is_no_prompt(name, prompts_of):
    rows = [{name: f"conv_{number}", "prompt": text} for number, text in enumerate(TEXTS)]
    prompts = prompts_of(rows)
    assert [p.text for p in prompts] == TEXTS and prompts.column == "prompt"
    with pytest.raises(UserError, match=rf"2 rows, all empty or no conversation in the column '{name}'$"):
        list(prompts_of(rows, column=name))


@pytest.mark.parametrize("written", [json.dumps, repr])
def test_a_chat_in_a_csv_file_is_read_without_its_answer(written, tmp_path):
    turns = [written([{"role": "user", "content": text}, ANSWER]) for text in TEXTS]
    datasets.Dataset.from_dict({"messages": turns}).to_csv(tmp_path / "t.csv")
    assert [p.text for p in Prompts(str(tmp_path / "t.csv"))] == TEXTS


def test_lists_of_texts_and_of_pairs_are_turns():
    assert conversation("data", ["hello", "An answer.", "again"]) == [
        Turn("user", "hello"), Turn("assistant", "An answer."), Turn("user", "again")
    ]  # fmt: skip
    assert conversation("turns", ["hello", "again"]) == [Turn("user", "hello"), Turn("user", "again")]
    assert conversation("history", [["hello", "An answer."], ["again", ""]]) == [
        Turn("user", "hello"), Turn("assistant", "An answer."), Turn("user", "again"), Turn("assistant", None)
    ]  # fmt: skip


# --- transcripts ---

TRANSCRIPTS = {  # one talk, as many forms write it down; {0} and {2} are the user's, {1} is an answer
    "hh": "\n\nHuman: {0}\n\nAssistant: {1}\n\nHuman: {2}\n\nAssistant: ",
    "user": "User: {0}\nAssistant: {1}\nUser: {2}",
    "guanaco": "### Human: {0}### Assistant: {1}### Human: {2}### Assistant:",
    "alpaca": "### Instruction:\n{0}\n\n### Response:\n{1}\n\n### Instruction:\n{2}",
    "chatml": "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n{1}<|im_end|>\n"
    "<|im_start|>user\n{2}<|im_end|>\n",
    "llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{0}<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n{1}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{2}<|eot_id|>",
    "llama 2": "<s>[INST] {0} [/INST] {1} </s><s>[INST] {2} [/INST]",
    "gemma": "<bos><start_of_turn>user\n{0}<end_of_turn>\n<start_of_turn>model\n{1}<end_of_turn>\n"
    "<start_of_turn>user\n{2}",
    "zephyr": "<|user|>\n{0}</s>\n<|assistant|>\n{1}</s>\n<|user|>\n{2}</s>\n<|assistant|>\n",
    "oasst": "<|prompter|>{0}<|endoftext|><|assistant|>{1}<|endoftext|><|prompter|>{2}<|endoftext|>",
    "vicuna": "USER: {0} ASSISTANT: {1}</s>USER: {2} ASSISTANT:",
}  # fmt: skip
SAID = ("How do bees sleep?", "In hives.\n\nThey rest.", "Name: three rivers, please.")


@pytest.mark.parametrize("form", TRANSCRIPTS)
def test_a_transcript_is_read_turn_by_turn(form):
    turns = [Turn(role, text) for role, text in zip(("user", "assistant", "user"), SAID, strict=True)]
    assert transcript(TRANSCRIPTS[form].format(*SAID)) == turns
    assert conversation("text", TRANSCRIPTS[form].format(*SAID)) == turns
    assert conversation("text", whole := TRANSCRIPTS[form].format(*SAID), False) == [Turn("user", whole)]


def test_what_stands_before_a_transcript_is_a_system_turn():
    before = "Below is an instruction that describes a task."
    assert transcript(f"{before}\n\n### Instruction:\nName it.\n\n### Input:\na lemon\n\n### Response:\nYellow.") == [
        Turn("system", before), Turn("user", "Name it.\n\na lemon"), Turn("assistant", "Yellow.")
    ]  # fmt: skip
    assert transcript("A chat of two. USER: Hello ASSISTANT: Yes.")[:2] == [
        Turn("system", "A chat of two."), Turn("user", "Hello")
    ]  # fmt: skip
    assert transcript("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST]") == [
        Turn("system", "Be brief."), Turn("user", "Hello")
    ]  # fmt: skip
    assert transcript("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n") == [
        Turn("system", "Be brief."), Turn("user", "Hello")
    ]  # fmt: skip


NO_TRANSCRIPTS = [
    "Human: what is this?", "Go on with this talk:\nHuman: hello\nAssistant: yes", "What does <|im_start|> mean?",
    "Assistant: I am here.", "What is the difference between User: and Human: in a prompt?", "### Notes:\nHuman beings",
    "Assistant: hello\nHuman: hello",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_TRANSCRIPTS)
def test_a_text_that_only_speaks_of_turns_is_itself(text):
    assert transcript(text) == [] and conversation("text", text) == [Turn("user", text)]


# --- the parts of a row ---


def test_what_goes_on_in_a_second_column_is_joined(prompts_of):
    rows = [{"instruction": "Name the colour.", "input": "a lemon", "output": "It is yellow."},
            {"instruction": "Say hello.", "input": "", "output": "Hello to you."}]  # fmt: skip
    prompts = prompts_of(rows)
    assert [p.text for p in prompts] == ["Name the colour.\n\na lemon", "Say hello."]
    assert prompts.column == "instruction, input" and prompts.unread == ["output"]
    dolly = prompts_of([{"instruction": "Who?", "context": "The king came.", "response": "The king."}])
    assert [p.text for p in dolly] == ["Who?\n\nThe king came."]
    assert [p.text for p in prompts_of(rows, column="instruction")] == ["Name the colour.", "Say hello."]
    assert [p.text for p in prompts_of(rows, column=("output", "input"))] == [
        "It is yellow.\n\na lemon",
        "Hello to you.",
    ]


def test_of_a_table_of_single_turns_the_users_are_read_and_the_others_counted(prompts_of):
    roles = ("prompter", "assistant", "User", "system", "narrator")
    prompts = prompts_of([{"role": role, "text": f"by {role}"} for role in roles])
    assert [(p.row, p.text) for p in prompts] == [(0, "by prompter"), (2, "by User"), (4, "by narrator")]
    assert prompts.skipped == 2 and prompts.left_out["rows by others than the user"] == 1
    only = prompts_of([{"role": "assistant", "text": "Yes."}] * 2)
    with pytest.raises(UserError, match=r"2 rows, all empty .* or \(2 of them\) by others than the user$"):
        list(only)


TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Welcome."},
    {"role": "user", "content": "one"}, {"role": "user", "content": "more"}, {"role": "assistant", "content": "two"},
    {"role": "tool", "content": "2"}, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
]  # fmt: skip
SYSTEM = Turn("system", "Be brief.")
CHOSEN = {  # by --turns: what stands before, the text, and how many turns are left out
    "first": ((SYSTEM,), "one", 6),
    "last": ((SYSTEM,), "three", 6),
    "all": ((SYSTEM, Turn("user", "one\n\nmore"), Turn("assistant", "two")), "three", 3),
}


@pytest.mark.parametrize("turns", CHOSEN)
def test_the_turns_asked_for_make_the_prompt(turns, prompts_of):
    before, text, left = CHOSEN[turns]
    prompts = prompts_of([{"messages": TALK}], turns=turns)
    assert [(p.before, p.text) for p in prompts] == [(before, text)]
    assert dict(+prompts.left_out) == {"answers and other turns": left} and prompts.with_system == 1
    dropping = prompts_of([{"messages": TALK}], turns=turns, system="drop")
    assert [(p.before, p.text) for p in dropping] == [(before[1:], text)]
    assert dropping.left_out["system turns"] == 1 and dropping.with_system == 0


def test_a_column_of_system_texts_is_a_system_turn(prompts_of):
    rows = [{"system_prompt": "Be brief.", "question": "Why?"}, {"system_prompt": "", "question": "How?"}]
    assert [(p.before, p.text) for p in prompts_of(rows)] == [((SYSTEM,), "Why?"), ((), "How?")]


def test_a_template_that_takes_a_system_turn_gets_it_and_another_goes_without(chat_tokenizer, byte_level):
    prompt = Prompt(0, 0, "Hello", (SYSTEM,))
    encoded = encode(chat_tokenizer, prompt, 100)
    assert habits(chat_tokenizer) == (False, True)
    assert chat_tokenizer.decode(encoded.ids) == "!system: Be brief.user: Hello assistant:" and encoded.prompt == prompt
    refusing = hf.PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer, eos_token="!")
    for template in (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    ):
        refusing.chat_template = template
        encoded = encode(refusing, prompt, 100)
        assert habits(refusing) == (False, False)
        assert refusing.decode(encoded.ids) == "Hello" and encoded.prompt.before == ()
    refusing.chat_template = None
    assert refusing.decode(encode(refusing, prompt, 100).ids) == "Be brief.\n\nHello"


def test_a_template_of_parts_gets_parts(byte_level):
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer, eos_token="!")
    part = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: " + part + "{% endfor %}"
    check_template(tokenizer)
    assert habits(tokenizer) == (True, True)
    decoded = tokenizer.decode(encode(tokenizer, Prompt(0, 0, "Hello", (SYSTEM,)), 100).ids)
    assert decoded == "system: Be brief.user: Hello"


def test_words_that_mean_nothing_elsewhere_are_prompts(tmp_path):
    words = ["None", "NA", "null", "nan"]
    (tmp_path / "t.csv").write_text("\n".join(["\ufeffprompt", *words]), encoding="utf-8")
    (tmp_path / "t.txt").write_text("\n".join(words), encoding="utf-8-sig")
    for name in ("t.csv", "t.txt"):
        assert [p.text for p in Prompts(str(tmp_path / name))] == words


def test_the_column_is_chosen_by_its_first_rows(prompts_of):
    prompts = prompts_of([{"prompt": "", "text": "x"}] * (SAMPLE_ROWS - 1) + [{"prompt": "at last", "text": "x"}] * 2)
    assert [(p.index, p.row, p.text) for p in prompts] == [(0, SAMPLE_ROWS - 1, "at last"), (1, SAMPLE_ROWS, "at last")]
    assert (prompts.usable, prompts.skipped) == (2, SAMPLE_ROWS - 1)


NOTHING = {  # files without a prompt, the column asked for, and what is said of each
    "empty.jsonl": ("", None, "it holds no rows"),
    "header.csv": ("prompt,id\n", None, "it holds no rows"),
    "blank.jsonl": ('{"prompt": ""}\n' * 3, None, "3 rows, all empty or no text in the column 'prompt'"),
    "numbers.jsonl": ('{"prompt": 7, "id": 1}\n' * 150, None, "150 rows, all empty or no text in the column 'prompt'"),
    "column.csv": ("prompt,empty\nhello,\n", "empty", "1 rows, all empty or no text in the column 'empty'"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_no_usable_prompt_is_said_with_the_column(name, tmp_path):
    text, column, reason = NOTHING[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} has no usable prompt: {reason}$"):
        list(Prompts(str(tmp_path / name), column=column))


def test_rows_without_a_text_are_skipped_and_counted(prompts_of):
    prompts = prompts_of([{"prompt": text} for text in ("", TEXTS[0], None, "   ", TEXTS[1])])
    assert [(p.index, p.row) for p in prompts] == [(0, 1), (1, 4)]
    assert prompts.skipped == 3


def test_a_seed_shuffles_the_rows_the_same_way_each_time(prompts_of):
    rows = [{"prompt": f"number {i}"} for i in range(50)]
    first, again, other = ([p.text for p in prompts_of(rows, shuffle=seed)] for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(p.text for p in prompts_of(rows))


@pytest.mark.parametrize(
    ("name", "text", "column", "said"),
    [
        ("t.jsonl", '{"a": "x", "b": "y"}', None, "has the columns a, b: say with --prompt-column"),
        ("t.jsonl", '{"prompt": "x"}', "query", "no column 'query': "),
        ("t.jsonl", '{"prompt": "x"', None, "cannot read"),
        ("t.odd", "no table", None, "give a .jsonl"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_said_in_one_line(tmp_path, name, text, column, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        list(Prompts(str(tmp_path / name), column=column))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_gated_dataset_says_how_to_log_in():
    refused = ConnectionError("Dataset 'some/chats' is a gated dataset on the Hub.\nVisit its page.")
    hint = r"gated dataset on the Hub \(accept its terms on the hub, then log in with `hf auth login`"
    with scripts.calls_of(datasets, "load_dataset", refused), pytest.raises(UserError, match=hint):
        list(Prompts("some/chats"))


# --- templates and length ---


def test_a_prompt_is_the_models_own_chat_template_around_the_text(chat_tokenizer):
    encoded = encode(chat_tokenizer, Prompt(0, 0, TEXTS[0]), 100)
    assert chat_tokenizer.decode(encoded.ids) == f"!user: {TEXTS[0]} assistant:"
    assert not encoded.truncated
    assert encoded.ids.count(chat_tokenizer.eos_token_id) == 1  # the template's, and no second one


def test_without_a_template_a_prompt_is_the_bare_text(sentencepiece):
    encoded = encode(sentencepiece, Prompt(0, 0, TEXTS[0]), 100)
    assert encoded.ids == sentencepiece(TEXTS[0])["input_ids"]
    assert encoded.ids[0] == sentencepiece.bos_token_id


@pytest.mark.parametrize("length", [12, 20, 40])
def test_too_long_a_text_loses_its_end_and_the_template_stays_whole(chat_tokenizer, length):
    text = " ".join(TEXTS * 20) + " 日本語"
    encoded = encode(chat_tokenizer, Prompt(0, 0, text), length)
    assert encoded.truncated
    assert length - 2 <= len(encoded.ids) <= length
    decoded = chat_tokenizer.decode(encoded.ids)
    assert decoded.startswith("!user: ") and decoded.endswith(" assistant:")
    assert text.startswith(decoded.removeprefix("!user: ").removesuffix(" assistant:"))


def test_a_text_of_just_the_length_is_left_alone(chat_tokenizer):
    whole = encode(chat_tokenizer, Prompt(0, 0, TEXTS[0]), 100)
    assert encode(chat_tokenizer, Prompt(0, 0, TEXTS[0]), len(whole.ids)) == whole
    assert encode(chat_tokenizer, Prompt(0, 0, TEXTS[0]), len(whole.ids) - 1).truncated


def test_no_room_for_a_text_is_said(chat_tokenizer):
    found = encode(chat_tokenizer, Prompt(0, 7, TEXTS[0]), 4)
    assert found.failed == "--max-length 4 leaves no room for its text" and len(found.ids) == 4


@pytest.fixture
def templated(byte_level):
    """A tokenizer whose template a test may choose."""
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=byte_level.backend_tokenizer, eos_token="!", name_or_path="some/model"
    )


CLOCKS = {  # templates that tell the time, and what they tell
    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}": "26 Jul 2024",
    "{{ strftime_now('%d %b %Y') }}": "26 Jul 2024",
    "{{ strftime_now('%A, %-d %B %Y, %H:%M:%S') }}": "Friday, 26 July 2024, 00:00:00",
    "{% set now = strftime_now if strftime_now is defined %}{{ now('%Y-%m-%d') }}": "2024-07-26",
    "{%- macro today() %}{{ strftime_now('%F') }}{% endmacro -%} \n {{ today() }}": "2024-07-26",
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_template_that_tells_the_time_tells_the_same_one_every_day(clock, templated):
    templated.chat_template = clock + CHAT_TEMPLATE
    ids = encode(templated, Prompt(0, 0, TEXTS[0]), 200).ids
    assert templated.decode(ids) == f"{CLOCKS[clock]}!user: {TEXTS[0]} assistant:"


@pytest.mark.parametrize("start", ["", "\n", "  \n", "  {% if true %}\nx{% endif %}", "{#- nothing -#}\n"])
def test_a_stopped_clock_changes_nothing_else_of_a_template(start, templated):
    templated.chat_template = start + CHAT_TEMPLATE
    expected = render(templated, "hello")
    templated.chat_template = start + CHAT_TEMPLATE + "{# strftime_now #}"
    assert render(templated, "hello") == expected


TEXT = "{{ messages[0].content }}"
FAILING = {  # templates, and what is said of them
    "{% if %}": "fails: Expected an expression",
    TEXT + "{{ raise_exception('Only for\nadults') }}": "fails: Only for",
    "{{ nothing.at.all }}": "fails: 'nothing' is undefined",
    TEXT + "{{ 1 / 0 }}": "fails: division by zero",
    "{{ '' }}": "renders nothing",
    "{{ messages[1:] and messages[1].content }} ": "leaves out the user's text",
    "Answer:": "leaves out the user's text",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_a_line_that_names_it(template, templated):
    templated.chat_template = template
    with pytest.raises(UserError) as caught:
        check_template(templated)
    assert str(caught.value).startswith(f"the chat template of some/model {FAILING[template]}")
    assert str(caught.value).isprintable()


def test_of_several_templates_the_default_is_taken(templated):
    templated.chat_template = {"default": TEXT, "rag": "{{ documents }}"}
    check_template(templated)
    assert templated.decode(encode(templated, Prompt(0, 0, TEXTS[0]), 200).ids) == TEXTS[0]
    del templated.chat_template["default"]
    with pytest.raises(UserError, match="multiple chat templates with no default"):
        check_template(templated)


@pytest.mark.usefixtures("without_pictures")
def test_a_run_with_a_template_that_leaves_out_the_text_stops_at_once(templated, dataset, tmp_path, capsys):
    templated.chat_template = "Answer:"
    model = make_model_directory(tmp_path / "model", templated)
    assert scripts.compute_fisher(model, dataset, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"the chat template of {model} leaves out the user's text" in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# --- without a template ---


def word_tokenizer(pattern: str) -> hf.PreTrainedTokenizerFast:
    """Words are tokens; `pattern` says which special tokens go before and after a text ($A)."""
    words = ["<s>", "</s>", "<unk>", "a", "b", "c"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=[("<s>", 0), ("</s>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("pattern", ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A </s> </s>"])
@pytest.mark.parametrize("text", ["a b", "a </s>", "</s>", "<s> b", "a <s> </s> b"])
def test_what_a_tokenizer_puts_in_front_stays_and_what_it_puts_behind_goes(pattern, text):
    tokenizer = word_tokenizer(pattern)
    front = [0] * pattern.count("<s>")
    assert encode(tokenizer, Prompt(0, 0, text), 10).ids == front + tokenizer.encode(text, add_special_tokens=False)


def test_a_cut_text_ends_with_its_own_token_too():
    encoded = encode(word_tokenizer("<s> $A </s>"), Prompt(0, 0, "a b c a b c"), 4)
    assert encoded.truncated and encoded.ids == [0, 3, 4, 5]


def test_a_text_without_a_token_is_named():
    with pytest.raises(UserError, match=r"the tokenizer makes no token of '\\u200b' \(row 7\)"):
        encode(word_tokenizer("<s> $A </s>"), Prompt(3, 7, "\u200b"), 10)


# --- batches ---


def cost(lengths, batches) -> int:
    return sum(max(lengths[i] for i in batch) * len(batch) + PASS_OVERHEAD for batch in batches)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_batches_hold_every_prompt_once_and_cost_the_least(size):
    lengths = [40, 900, 45, 300, 50, 310, 44, 870, 41]
    batches = plan_batches(lengths, size)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert max(map(len, batches)) <= size
    order, costs = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    for cut in itertools.product([False, True], repeat=len(lengths) - 1):
        edges = [0, *(i + 1 for i, here in enumerate(cut) if here), len(lengths)]
        plan = [order[a:b] for a, b in itertools.pairwise(edges)]
        if max(map(len, plan)) <= size:
            costs.append(cost(lengths, plan))
    assert cost(lengths, batches) == min(costs)


def test_no_prompts_make_no_batches():
    assert plan_batches([], 8) == []

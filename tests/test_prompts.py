"""Prompts: from the rows of tables, into chat templates, cut to length, into batches."""

import itertools
import json

import datasets
import pytest

from common.command_line import UserError
from conftest import CHAT_TEMPLATE
from pipeline.prompts import OVERHEAD, Prompt, Prompts, encode, plan_batches, user_text
from scripts import ROOT

TEXTS = ["How do bees sleep?", "Name three rivers, please."]


def test_the_bundled_prompts_are_many_varied_and_distinct():
    lines = (ROOT / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    lengths = sorted(len(text.split()) for text in texts)
    assert len(set(texts)) == len(texts) >= 120
    assert lengths[0] == 1 and lengths[-1] > 300
    assert sum(not text.isascii() for text in texts) > 20
    assert [p.text for p in Prompts(str(ROOT / "data" / "prompts.jsonl"))] == texts


def save(path, table: datasets.Dataset):
    writer = {".jsonl": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}[path.suffix]
    writer(path)
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "text"])
def test_columns_are_recognised_in_every_kind_of_table(tmp_path, ending, column):
    table = datasets.Dataset.from_dict({"id": [1, 2], column: TEXTS})
    assert [p.text for p in Prompts(save(tmp_path / f"t{ending}", table))] == TEXTS


def test_json_and_text_files_are_read(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps([{"prompt": text} for text in TEXTS]))
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    for name in ("t.json", "t.txt"):
        assert [p.text for p in Prompts(str(tmp_path / name))] == TEXTS


def test_the_first_user_turn_of_a_conversation_is_taken(tmp_path):
    turns = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[0]}],
        [{"role": "user", "content": TEXTS[1]}, {"role": "assistant", "content": "No."}],
        [{"role": "assistant", "content": "No user here."}],
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "x", "conversation": t}) + "\n" for t in turns))
    prompts = Prompts(str(tmp_path / "t.jsonl"))
    assert [(p.index, p.row, p.text) for p in prompts] == [(0, 0, TEXTS[0]), (1, 1, TEXTS[1])]
    assert prompts.skipped == 1


def test_the_user_text_of_other_forms():
    assert user_text([{"from": "human", "value": "hello"}]) == "hello"
    parts = [{"type": "image"}, {"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]
    assert user_text([{"role": "user", "content": parts}]) == "What is\nthis?"
    for nothing in (None, 3, "", "  \n", [], ["hello"], [{"role": "user"}], {"role": "user", "content": "x"}):
        assert user_text(nothing) is None


def test_rows_without_a_text_are_skipped_and_counted(tmp_path):
    rows = [{"prompt": text} for text in ("", TEXTS[0], None, "   ", TEXTS[1])]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = Prompts(str(tmp_path / "t.jsonl"))
    assert [(p.index, p.row) for p in prompts] == [(0, 1), (1, 4)]
    assert prompts.skipped == 3


def test_a_seed_shuffles_the_rows_the_same_way_each_time(tmp_path):
    path = save(tmp_path / "t.jsonl", datasets.Dataset.from_dict({"prompt": [f"number {i}" for i in range(50)]}))
    first, again, other = ([p.text for p in Prompts(path, shuffle=seed)] for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(p.text for p in Prompts(path))


@pytest.mark.parametrize(
    ("name", "text", "column", "said"),
    [
        ("t.jsonl", '{"a": "x", "b": "y"}', None, "has the columns a, b: say with --prompt-column"),
        ("t.jsonl", '{"prompt": "x"}', "query", "no column 'query': "),
        ("t.jsonl", '{"prompt": "x"', None, "cannot read"),
        ("t.parquet", "no parquet", None, "cannot read"),
        ("t.xlsx", "no table", None, "give a .jsonl"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_said_in_one_line(tmp_path, name, text, column, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        list(Prompts(str(tmp_path / name), column=column))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_hub_dataset_are_said():
    with pytest.raises(UserError, match=r"none\.jsonl: no such file$"):
        list(Prompts("none.jsonl"))
    with pytest.raises(UserError, match="no/such-dataset: no such file, and as a dataset of the hub"):
        list(Prompts("no/such-dataset"))


def test_a_gated_dataset_says_how_to_log_in(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("Dataset 'some/chats' is a gated dataset on the Hub.\nVisit its page.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as caught:
        list(Prompts("some/chats"))
    assert "gated dataset on the Hub (accept its terms on the hub, then log in with `hf auth login`" in str(
        caught.value
    )


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
    with pytest.raises(UserError, match="--max-length 4 leaves no room"):
        encode(chat_tokenizer, Prompt(0, 0, TEXTS[0]), 4)


def test_a_template_that_tells_the_date_tells_the_same_one_every_day(chat_tokenizer):
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    chat_tokenizer.chat_template = dated
    try:
        ids = encode(chat_tokenizer, Prompt(0, 0, TEXTS[0]), 100).ids
    finally:
        chat_tokenizer.chat_template = CHAT_TEMPLATE
    assert chat_tokenizer.decode(ids).startswith("26 Jul 2024")


# --- batches ---


def cost(lengths, batches) -> int:
    return sum(max(lengths[i] for i in batch) * len(batch) + OVERHEAD for batch in batches)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_batches_hold_every_prompt_once_and_cost_the_least(size):
    lengths = [40, 900, 45, 300, 50, 310, 44, 870, 41]
    batches = plan_batches(lengths, size)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert max(map(len, batches)) <= size
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = itertools.product([False, True], repeat=len(lengths) - 1)
    every = []
    for cut in cuts:
        edges = [0, *(i + 1 for i, here in enumerate(cut) if here), len(lengths)]
        every.append([order[a:b] for a, b in itertools.pairwise(edges)])
    allowed = [plan for plan in every if max(map(len, plan)) <= size]
    assert cost(lengths, batches) == min(cost(lengths, plan) for plan in allowed)


def test_no_prompts_make_no_batches():
    assert plan_batches([], 8) == []

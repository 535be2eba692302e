"""Rows of every kind of file, and the column that is meant."""

import datasets
import pytest

from residual_fisher.common.program import UserError
from residual_fisher.common.rows import SAMPLE_ROWS, parse_json, read_column, read_rows, text_of
import scripts

TWO = [{"a": "1st", "b": "x"}, {"a": "2nd", "b": "y"}]
FILES = {  # of every kind of file, what it holds, and the rows that are read of it
    "lines.jsonl": ('{"a": "1st", "b": "x"}\n\n{"a": "2nd", "b": "y"}', TWO),
    "lines.json": ('{"a": "1st", "b": "x"}\n{"a": "2nd", "b": "y"}\n', TWO),
    "list.json": ('[{"a": "1st", "b": "x"},\n {"a": "2nd", "b": "y"}]', TWO),
    "list.jsonl": ('[{"a": "1st", "b": "x"}, {"a": "2nd", "b": "y"}]', TWO),
    "columns.json": ('{"a": ["1st", "2nd"], "b": ["x", "y"]}', TWO),
    "columns over lines.json": ('{\n"a": ["1st", "2nd"],\n"b": ["x", "y"]\n}', TWO),
    "one row.json": ('{"a": "1st", "b": "x"}', TWO[:1]),
    "one row over lines.json": ('{\n"a": "1st",\n"b": "x"}', TWO[:1]),
    "turns.json": ('{"a": [{"role": "user"}, {"role": "bot"}]}', [{"a": [{"role": "user"}, {"role": "bot"}]}]),
    "unequal.json": ('{"a": ["1st"], "b": []}', [{"a": ["1st"], "b": []}]),
    "texts.json": ('["1st", "2nd"]', [{"text": "1st"}, {"text": "2nd"}]),
    "texts.jsonl": ('"1st"\n"2nd"', [{"text": "1st"}, {"text": "2nd"}]),
    "no rows.json": ("[]", []),
    "nothing.json": ("", []),
    "nothing.jsonl": (" \n\n", []),
    "table.csv": ('a,b\n1st,x\n\n2nd,"y"\n', TWO),
    "old mac.csv": ("a,b\r1st,x\r2nd,y\r", TWO),
    "short row.csv": ("a,b\n1st\n2nd,y\n", [{"a": "1st"}, TWO[1]]),
    "words.csv": ("a\nNone\nNA\nnull\nnan\n-\n0\n", [{"a": a} for a in ("None", "NA", "null", "nan", "-", "0")]),
    "nothing.csv": ("", []),
    "lines.txt": ("1st\r\n2nd", [{"text": "1st"}, {"text": "2nd"}]),
    "separators.txt": ("one\u2028line\x0c\x00\n", [{"text": "one\u2028line\x0c\x00"}]),
    "big number.jsonl": ('{"a": ' + "9" * 5000 + ', "b": NaN}', None),
}  # fmt: skip


def write(path, text: str, mark: str = "") -> str:
    path.write_bytes((mark + text).encode())
    return str(path)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_its_rows(name, mark, tmp_path):
    text, expected = FILES[name]
    rows = list(read_rows(write(tmp_path / name, text, mark)))
    assert rows == expected if expected is not None else [set(row) for row in rows] == [{"a", "b"}]


def test_a_parquet_file_gives_its_rows(tmp_path):
    rows = [{"a": f"{number}", "turns": [{"role": "user"}] * number} for number in range(250)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    assert list(read_rows(str(tmp_path / "t.parquet"))) == rows


DAMAGED = {  # what a file holds, and what is said of it
    "key twice.jsonl": ('{"a": 1}\n\n{"a": 1, "a": 2}', r"'a' is there twice \(line 3\)"),
    "key twice.json": ('{"a": [1], "a": [2]}', "'a' is there twice"),
    "cut.jsonl": ('\n{"a": "x"}\n{"a": ', r"Expecting value \(line 3, column 7\)"),
    "cut.json": ('[{"a": "x"},\n {"a": ', r"Expecting value \(line 2, column 8\)"),
    "number.jsonl": ('{"a": "x"}\n3', r"neither an object with columns nor a text \(line 2\)"),
    "number.json": ('["x", 3]', r"neither an object with columns nor a text \(item 2\)"),
    "nested.jsonl": ("[" * 100_000, "nested too deeply"),
    "nested.json": ('{"a": ' * 100_000, "nested too deeply"),
    "column twice.csv": ("a,b,a\n1,2,3", "'a' is there twice"),
    "comma.csv": ("a,b\n1,2\nwell, yes, no\n", r"3 cells for 2 columns: is a comma not in quotes\? \(line 3\)"),
    "open quote.csv": ('a,b\n1,"2\n', r"unexpected end of data \(line 2\)"),
    "pages.parquet": ("no parquet", "."),
}


@pytest.mark.parametrize("shuffle", [None, 1])
@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_said_with_its_place(name, shuffle, tmp_path):
    text, reason = DAMAGED[name]
    source = write(tmp_path / name, text)
    with pytest.raises(UserError, match=reason) as caught:
        list(read_rows(source, shuffle=shuffle))
    assert str(caught.value).startswith(f"cannot read {source}: ") and str(caught.value).isprintable()


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt"])
def test_bytes_that_are_no_text_are_said(ending, tmp_path):
    (tmp_path / f"t{ending}").write_bytes(b'"a"\n\xff\xfe')
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        list(read_rows(str(tmp_path / f"t{ending}")))


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + ".txt", "folder"])
def test_a_name_that_is_no_file_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"cannot read {name}: "):
        list(read_rows(name))


def test_what_the_hub_says_is_printed_as_one_short_line():
    refused = ConnectionError("\x1b[31mno\x00 answer " + "x" * 1000 + "\nmore")
    with scripts.calls_of(datasets, "load_dataset", refused), pytest.raises(UserError) as caught:
        list(read_rows("some/chats"))
    said = str(caught.value)
    assert r"of the hub: \x1b[31mno\x00 answer x" in said and said.isprintable() and len(said) < 400


# --- JSON ---


def test_json_numbers_of_any_length_and_line_breaks_are_read():
    assert parse_json('{"a": ' + "9" * 5000 + ', "b": "x\ny", "c": 7}') == {"a": float("inf"), "b": "x\ny", "c": 7}


def test_the_place_in_a_file_of_json_lines_is_said():
    with pytest.raises(ValueError, match=r"\(line 12, column 2\)"):
        parse_json("[,", line=12)


# --- choosing ---


def test_a_text_is_whole_characters_and_not_blank():
    assert text_of("a \U0001f600 b") == "a \U0001f600 b"
    assert text_of(parse_json(r'"\ud83d\ude00 \ud83d \ude00"')) == "\U0001f600 \ufffd \ufffd"
    assert [text_of(cell) for cell in ("", " \n\u3000", None, 3.0, ["x"], b"x")] == [None] * 6


def choose(rows, asked=None):
    return read_column("t.csv", iter(rows), asked, ["x", "y"], "--column", lambda name, cell: text_of(cell))[0]


def test_the_first_recognised_column_that_can_be_read_is_chosen():
    assert choose([{"x": "1", "y": "2"}]) == "x"
    assert choose([{"x": 1, "y": ""}, {"x": 1, "y": "2"}]) == "y"
    assert choose([{"z": "0"}, {"y": ""}, {"x": 1}]) == "x"  # none can: the first that is there
    assert choose([{"x": "1", "z": 2}], asked="z") == "z"


def test_a_column_that_is_not_there_is_said_with_those_that_are():
    with pytest.raises(UserError, match=r"^no column 'w': t.csv has the columns x, z$"):
        choose([{"x": "1", "z": 2}], asked="w")
    with pytest.raises(UserError, match=r"^t.csv has the columns z: say with --column which one to read$"):
        choose([{"z": 2}] * SAMPLE_ROWS)
    with pytest.raises(UserError, match=r"^t.csv has no columns: say with --column"):
        choose([{}])

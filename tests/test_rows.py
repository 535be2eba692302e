"""Rows of every kind of file, and the column that is meant."""

import bz2
import gzip
import lzma
import sys

import datasets
import pandas
import pytest

from residual_fisher.common.program import UserError
from residual_fisher.common.rows import SAMPLE_ROWS, open_table, parse_json, read_rows, text_of
from residual_fisher.common.sources import KINDS, files_of
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
    "commas.jsonl": ('{"a": "1st", "b": "x"},\n{"a": "2nd", "b": "y"},\n', TWO),
    "objects over lines.jsonl": ('{\n"a": "1st",\n"b": "x"\n}\n{\n"a": "2nd",\n"b": "y"\n}\n', TWO),
    "lines.ndjson": ('{"a": "1st", "b": "x"}\n{"a": "2nd", "b": "y"}', TWO),
    "one line of lists.jsonl": ('{"n": "1", "turns": ["a", "b"]}', [{"n": "1", "turns": ["a", "b"]}]),
    "wrapped.json": ('{"version": "1", "data": [{"a": "1st", "b": "x"}, {"a": "2nd", "b": "y"}]}', TWO),
    "by name.json": ('{"one": {"a": "1st", "b": "x"}, "two": {"a": "2nd", "b": "y"}}', TWO),
    "numbered columns.json": ('{"a": {"0": "1st", "1": "2nd"}, "b": {"0": "x", "1": "y"}}', TWO),
    "numbered rows.json": ('{"0": {"a": "1st", "b": "x"}, "1": {"a": "2nd", "b": "y"}}', TWO),
    "split.json": ('{"columns": ["a", "b"], "index": [0, 1], "data": [["1st", "x"], ["2nd", "y"]]}', TWO),
    "numbered texts.json": ('{"5": "1st",\n "25": "2nd"}', [{"text": "1st"}, {"text": "2nd"}]),
    "texts beside.json": ('{"about": "x", "prompts": ["1st", "2nd"]}', [{"prompts": "1st"}, {"prompts": "2nd"}]),
    "chats.json": ('[[{"role": "user"}], [{"role": "bot"}]]', [{"messages": [{"role": r}]} for r in ("user", "bot")]),
    "chats.jsonl": ('[{"role": "user"}]\n[{"role": "bot"}]', [{"messages": [{"role": r}]} for r in ("user", "bot")]),
    "semicolons.csv": ("a;b\n1st;x\n2nd;y\n", TWO),
    "semicolons and commas.csv": ('a;b\n"1st";x\n"2nd, or third; yes";y, z\n', None),
    "tabs.csv": ("a\tb\n1st\tx\n2nd\ty\n", TWO),
    "bars.csv": ("a|b\n1st|x\n2nd|y\n", TWO),
    "tabs.tsv": ("a\tb\n1st\tx\n2nd\ty\n", TWO),
    "commas in one column.tsv": ("a\nwell, yes\n", [{"a": "well, yes"}]),
    "excel.csv": ("sep=;\r\na;b\r\n1st;x\r\n2nd;y\r\n", TWO),
    "semicolons in texts.csv": ("a,b\nx; y,1\nz; w,2\n", [{"a": "x; y", "b": "1"}, {"a": "z; w", "b": "2"}]),
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
    assert rows == expected if expected is not None else all(set(row) == {"a", "b"} for row in rows) and rows


def test_a_parquet_file_gives_its_rows(tmp_path):
    rows = [{"a": f"{number}", "turns": [{"role": "user"}] * number} for number in range(250)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    assert list(read_rows(str(tmp_path / "t.parquet"))) == rows


def test_pandas_writes_what_is_read(tmp_path):
    frame = pandas.DataFrame(TWO)
    for orient in ("records", "columns", "index", "split", "table"):
        frame.to_json(tmp_path / f"{orient}.json", orient=orient)
        assert [{"a": row["a"], "b": row["b"]} for row in read_rows(str(tmp_path / f"{orient}.json"))] == TWO, orient


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.txt"])
def test_packed_files_and_utf_16_give_the_same_rows(name, tmp_path):
    text = {"t.csv": "a,b\n1st,x\n2nd,ÿ\n", "t.jsonl": '{"a": "1st"}\n{"a": "ÿ"}\n', "t.txt": "1st\nÿ\n"}[name]
    plain = list(read_rows(write(tmp_path / name, text)))
    (tmp_path / f"16{name}").write_bytes(text.encode("utf-16"))
    assert list(read_rows(str(tmp_path / f"16{name}"))) == plain
    for ending, pack in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        (tmp_path / f"{name}{ending}").write_bytes(pack.compress(text.encode()))
        assert list(read_rows(str(tmp_path / f"{name}{ending}"))) == plain


def test_zstandard_is_read_where_its_package_is_and_named_where_not(tmp_path, monkeypatch):
    path = tmp_path / "t.txt.zst"
    path.write_bytes(bytes.fromhex("28b52ffd20084100003173740a326e640a"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r"packed with Zstandard: `pip install zstandard`"):
        list(read_rows(str(path)))
    monkeypatch.undo()
    pytest.importorskip("zstandard")
    assert list(read_rows(str(path))) == [{"text": "1st"}, {"text": "2nd"}]


def test_an_arrow_file_and_a_saved_dataset_give_their_rows(tmp_path):
    parts = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(TWO), "test": datasets.Dataset.from_list(TWO[:1])}
    )
    parts.save_to_disk(tmp_path / "all")
    parts["test"].save_to_disk(tmp_path / "one")
    assert list(read_rows(str(tmp_path / "all"))) == TWO and list(read_rows(str(tmp_path / "one"))) == TWO[:1]
    assert list(read_rows(str(tmp_path / "all"), split="test")) == TWO[:1]
    with pytest.raises(UserError, match="it has no split 'dev', only train, test"):
        list(read_rows(str(tmp_path / "all"), split="dev"))
    stored = next((tmp_path / "one").glob("*.arrow")).rename(tmp_path / "odd [1] name.arrow")
    assert list(read_rows(str(stored))) == TWO[:1]


@pytest.fixture
def shards(tmp_path):
    for number in (1, 2, 10):
        write(tmp_path / f"part-{number}.jsonl", f'{{"a": "{number}"}}')
    write(tmp_path / "README.md", "about")
    write(tmp_path / "LICENSE.txt", "all rights")
    return tmp_path


def test_files_of_a_folder_a_pattern_and_a_list_are_read_in_order(shards):
    expected = [{"a": "1"}, {"a": "2"}, {"a": "10"}]
    assert list(read_rows(str(shards))) == list(read_rows(f"{shards}/part-*.jsonl")) == expected
    several = tuple(f"{shards}/part-{number}.jsonl" for number in (10, 1))
    assert list(read_rows(several)) == [{"a": "10"}, {"a": "1"}]
    assert sorted(row["a"] for row in read_rows(str(shards), shuffle=1)) == ["1", "10", "2"]
    assert files_of(str(shards)) == [f"{shards}/part-{number}.jsonl" for number in (1, 2, 10)]


def test_numbers_in_names_of_any_script_are_in_order(tmp_path):
    for name in ("a1٣2", "a1b2", "a1٢2"):
        write(tmp_path / f"{name}.jsonl", f'{{"a": "{name}"}}')
    assert len(list(read_rows(str(tmp_path)))) == 3


def test_of_a_folder_that_has_splits_one_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path / "data" / f"{name}.jsonl", f'{{"a": "{name}"}}')
    with pytest.warns(UserWarning, match="1 of its 3 files are not of the split 'train'"):
        assert [row["a"][:11] for row in read_rows(str(tmp_path))] == ["train-00000", "train-00001"]
    with pytest.warns(UserWarning, match="2 of its 3"):
        assert [row["a"][:4] for row in read_rows(str(tmp_path), split="test")] == ["test"]
    with pytest.raises(UserError, match="no files of the split 'validation', only of test, train"):
        list(read_rows(str(tmp_path), split="validation"))


def test_a_folder_of_several_kinds_and_one_of_none_are_said(shards):
    write(shards / "t.csv", "a\n1\n")
    with pytest.raises(UserError, match=r"of several kinds \(3 .jsonl, 1 .csv\): name them"):
        list(read_rows(str(shards)))
    (shards / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder holds no \.jsonl, "):
        list(read_rows(str(shards / "empty")))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 60724\n"


@pytest.mark.parametrize("ending", KINDS)
def test_a_git_lfs_pointer_is_no_data(ending, tmp_path):
    with pytest.raises(UserError, match=r"a Git LFS pointer, not the file itself: run `git lfs pull`"):
        list(read_rows(write(tmp_path / f"t{ending}", POINTER)))


NO_FILES = {  # names that are none of a file, and what is said of each
    "none.jsonl": "no such file",
    "none.csv.gz": "no such file",
    "none*.csv": "no file has such a name",
    "/no/where": "no such file or folder",
    "../where": "no such file or folder",
    "two words": "no such file or folder, and no dataset on the hub has such a name",
    r"C:\data\chats.jsonl": "it is a path of Windows",
    "https://huggingface.co/datasets/some/chats/tree/main": "it is an address: give the dataset's name, some/chats",
    "s3://bucket/chats": "it is an address: give the path of a downloaded dataset, or a name on the hub",
}


@pytest.mark.parametrize("name", NO_FILES)
def test_a_name_of_no_file_is_told_without_asking_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        list(read_rows(name))
    assert str(caught.value).startswith(f"cannot read {name}: {NO_FILES[name]}")


def test_a_configuration_or_a_split_of_a_file_has_no_effect_and_is_said(tmp_path):
    source = write(tmp_path / "t.csv", "a\n1\n")
    with pytest.raises(UserError, match="it has no configuration 'en'"):
        list(read_rows(source, config="en"))
    with pytest.raises(UserError, match="it has no split 'test'"):
        list(read_rows(source, split="test"))


def test_files_of_other_kinds_say_what_to_do(tmp_path):
    for name, what in (("t.xlsx", "save it as .csv"), ("t.zip", "unpack it"), ("t.md", "give a .jsonl, ")):
        with pytest.raises(UserError, match=what):
            list(read_rows(write(tmp_path / name, "x")))


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
    "pages.parquet": ("no parquet", "Parquet"),
    "two lists.json": ('{"train": [{"a": 1}], "test": [{"a": 2}]}', "several lists of rows, 'train', 'test': keep one"),
    "tables.json": ('[["a", "b"], ["1st", "x"]]', r"neither an object with columns nor a text \(item 1\)"),
    "comma at the end.json": ('[{"a": "x"},]', "line 1, column 1"),
    "semicolons.csv": ("a;b\n1;2\nwell; yes; no\n", r"3 cells for 2 columns: is ';' not in quotes\? \(line 3\)"),
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
    asked = [asked] if asked else []
    return open_table("t.csv", iter(rows), asked, ["x", "y"], "--column", lambda name, row: text_of(row.get(name)))


def test_the_first_recognised_column_that_can_be_read_is_chosen():
    assert choose([{"x": "1", "y": "2"}]).columns == ["x"]
    assert choose([{"X": "1", "y": "2"}]).columns == ["X"]
    assert choose([{"x": 1, "y": ""}, {"x": 1, "y": "2"}]).columns == ["y"]
    assert choose([{"z": "0"}, {"y": ""}, {"x": 1}]).columns == ["x"]  # none can: the first that is there
    assert choose([{"x": "1", "z": 2}], asked="z").columns == ["z"]
    assert choose([{"z": 3}, {"z": "only one"}]).columns == ["z"]
    with pytest.raises(UserError, match="has the columns How do bees sleep"):  # a table without a header
        choose([{"How do bees sleep?": "And owls?"}])


def test_columns_that_hold_texts_and_are_not_read_are_named():
    rows = [{"x": "1", "id": "7", "more": "a longer text", "zh": "动物", "n": 3, "label": "yes"}] * 3
    assert choose(rows).unread == ["more", "zh"]
    assert choose(rows, asked="more").unread == ["zh"]


def test_columns_beside_the_chosen_one_are_read_with_it():
    def table(asked):
        rows = iter([{"X": "1", "Input": "of x", "z": "3"}])
        beside = ["input", "none"]
        return open_table("t", rows, asked, ["x"], "--column", lambda *_: True, lambda name: beside * (name == "x"))

    assert table([]).columns == ["X", "Input"]
    assert table(["X"]).columns == ["X"] and table(["X", "z"]).columns == ["X", "z"]


def test_a_column_that_is_not_there_is_said_with_those_that_are():
    with pytest.raises(UserError, match=r"^no column 'w': t.csv has the columns x, z$"):
        choose([{"x": "1", "z": 2}], asked="w")
    with pytest.raises(UserError, match=r"^t.csv has the columns z: say with --column which one to read$"):
        choose([{"z": 2}] * SAMPLE_ROWS)
    with pytest.raises(UserError, match=r"^t.csv has no columns: say with --column"):
        choose([{}])

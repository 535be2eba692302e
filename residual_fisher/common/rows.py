"""Rows of tables (local files of any common kind, or a hub dataset as a stream), the choice of columns, strict JSON.

Parquet, Arrow, saved datasets and the hub are read by the library `datasets`. JSON, CSV and text are read here, since
it guesses the types of their columns: in a CSV file it takes the prompts None and NA for nothing and 007 for a number,
in JSON lines a column of dates for timestamps, and half a character ends the run.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
import csv
import glob
from itertools import chain, islice
import json
import os
import re
from typing import NamedTuple

import numpy as np

from residual_fisher.common.program import UserError, hub_hint
from residual_fisher.common.sources import (
    KINDS,
    OTHER_KINDS,
    POINTER_SAID,
    Source,
    ending_of,
    files_of,
    is_pointer,
    is_saved,
    name_of,
    names_of,
    opened,
)
from residual_fisher.common.text import excerpt, first_line

SAMPLE_ROWS = 100  # first rows, from which a column is chosen
PARQUET_ROWS = 100  # rows read at once: each may hold images
DIALECT_LINES = 20  # first lines of a CSV file, by which its separator is found
SEPARATORS = ",;\t|"
KNOWN_KINDS = f"give a {', '.join(KINDS)} file, a folder of them, or a dataset of the hub"
MANY_COLUMNS = 50  # texts in an object: so many are not one row's


# --- reading -------------------------------------------------------------------------------------


class Row(dict):
    """A row of a file that is read line by line."""

    def __init__(self, cells: Mapping | Iterable[tuple], line: int):
        super().__init__(cells)
        self.line = line  # the number of its first line in the file, from 1


def read_rows(source: Source, split: str = "train", config: str | None = None, shuffle: int | None = None) -> Iterator:
    """The rows of `source`, as dicts, read lazily.

    Args:
        source: files, folders, or the name of a hub dataset.
        split, config: part of a hub dataset; the split also of a folder.
        shuffle: seed of a shuffle in a buffer of 10,000 rows; None keeps the dataset's order.
    Raises:
        UserError: the rows cannot be read, for whatever reason.
    """
    local = files_of(source, split) is not None
    if local and config is not None:
        raise UserError(f"{name_of(source)} is no dataset of the hub: it has no configuration {config!r}")
    if local and split != "train" and not os.path.isdir(name_of(source)):
        raise UserError(f"{name_of(source)} is no folder and no dataset of the hub: it has no split {split!r}")
    try:
        if local and shuffle is None:
            yield from _local_rows(source, split)
            return
        datasets = _quiet_datasets()
        if local:
            rows = datasets.IterableDataset.from_generator(_local_rows, gen_kwargs={"source": source, "split": split})
        else:
            rows = datasets.load_dataset(source, config, split=split, streaming=True)
        yield from rows if shuffle is None else rows.shuffle(seed=shuffle, buffer_size=10_000)
    except UserError:
        raise
    except Exception as error:  # a malformed file or a network failure: the user can mend any of them
        hint = hub_hint(error, "")
        hint = hint and f" ({hint}; or give a local file)"
        what = f"no such file, and as a dataset of the hub: {excerpt(first_line(error), 300)}"
        raise UserError(f"cannot read {name_of(source)}: {what}{hint}") from error


def _quiet_datasets():
    import datasets  # takes a second, and most runs read a small file

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    return datasets


def _local_rows(source: Source, split: str) -> Iterator[dict]:
    for part in names_of(source):
        if os.path.isdir(part) and is_saved(part):
            yield from _rows_of(part, lambda folder: _saved_rows(folder, split))
            continue
        for path in files_of(part, split):
            kind = ending_of(path)
            if kind not in READERS:
                raise UserError(f"cannot read {path}: {OTHER_KINDS.get(kind, KNOWN_KINDS)}")
            yield from _rows_of(path, READERS[kind])


def _rows_of(path: str, read: Callable[[str], Iterator[dict]]) -> Iterator[dict]:
    """Raises UserError: `read` fails, with the name of the file."""
    try:
        yield from read(path)
    except UserError:
        raise
    except UnicodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text") from error
    except Exception as error:
        raise UserError(f"cannot read {path}: {excerpt(first_line(error), 300)}") from error


def _saved_rows(folder: str, split: str) -> Iterator[dict]:
    datasets = _quiet_datasets()
    saved = datasets.load_from_disk(folder)
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"it has no split {split!r}, only {', '.join(saved)}")
        saved = saved[split]
    yield from saved.to_iterable_dataset().decode(False)


def _arrow_rows(path: str) -> Iterator[dict]:
    if is_pointer(path):
        raise ValueError(POINTER_SAID)
    kind = ending_of(path)[1:]
    options = {"batch_size": PARQUET_ROWS} if kind == "parquet" else {}
    files = glob.escape(os.path.abspath(path))
    rows = _quiet_datasets().load_dataset(kind, data_files=files, split="train", streaming=True, **options)
    yield from rows.decode(False)  # images stay bytes


def _text_rows(path: str) -> Iterator[dict]:
    with opened(path) as file:
        yield from (Row({"text": line.rstrip("\n")}, number) for number, line in enumerate(file, 1))


def _csv_rows(path: str) -> Iterator[dict]:
    csv.field_size_limit(1 << 30)
    with opened(path, newline="") as file:
        head = list(islice(file, DIALECT_LINES))
        named = re.fullmatch(r"sep=(.)[\r\n]*", head[0], re.IGNORECASE) if head else None  # as Excel writes it
        head = head[1:] if named else head
        separator = named[1] if named else _separator(head, "\t" if ending_of(path) == ".tsv" else ",")
        lines = csv.reader(chain(head, file), delimiter=separator, strict=True)
        try:
            header = next(lines, [])
            _refuse_twice(name for name in header if name)
            end = lines.line_num
            for cells in lines:
                start, end = end + 1 + (named is not None), lines.line_num
                if len(cells) > len(header):
                    what = "a comma" if separator == "," else repr(separator)
                    raise csv.Error(f"{len(cells)} cells for {len(header)} columns: is {what} not in quotes?")
                if cells:
                    yield Row(zip(header, cells, strict=False), start)
        except csv.Error as error:
            raise ValueError(f"{error} (line {lines.line_num + (named is not None)})") from error


def _separator(lines: list[str], usual: str) -> str:
    """What makes the most columns of the first of these lines, and as many of half of the others."""
    best, most = usual, 1
    for separator in dict.fromkeys(usual + SEPARATORS):
        first, *others = [len(cells) for cells in csv.reader(lines, delimiter=separator) if cells] or [0]
        if first > most and 2 * others.count(first) >= len(others):
            best, most = separator, first
    return best


# --- JSON ----------------------------------------------------------------------------------------


def _json_rows(path: str) -> Iterator[dict]:
    """Rows of JSON lines, or of one or several JSON values over all lines; the first two lines tell which."""
    with opened(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        head = list(islice(lines, 2))
        starts = [_start_of_value(line) for _, line in head]
        several = len(head) == 2 or ending_of(path) in (".jsonl", ".ndjson")
        if starts[:1] == ["["]:
            several = starts == ["[", "["]
        if starts and starts[0] and several:
            for number, line in chain(head, lines):
                yield Row(_row(parse_json(COMMA_AT_END.sub("", line), number), f"line {number}"), number)
            return
    with opened(path) as file:
        values = list(_values(file.read()))
    yield from _table(values[0] if len(values) == 1 else values)


def _start_of_value(line: str) -> str:
    """The first character of a JSON value that is a line of its own, with or without a comma behind; else nothing."""
    text = line.strip().removesuffix(",")
    try:
        json.loads(text, parse_int=float, strict=False)
    except (ValueError, RecursionError):
        return ""
    return text[0]


def _table(value) -> list[dict]:
    """The rows of a JSON value, in any of the shapes in which programs write tables.

    A list holds rows. So does an object's only list of objects, whatever else the object holds; and an object of
    objects, by their names. An object of columns holds lists of one length, or objects with the same numbers as names.
    Any other object is one row: a list of turns, which have a role, is a conversation.
    """
    if isinstance(value, list):
        return [_row(item, f"item {number}") for number, item in enumerate(value, 1)]
    row = _row(value, "line 1")
    cells = list(row.values())
    if all(isinstance(cell, dict) and cell for cell in cells):
        numbered = all(cell.keys() == cells[0].keys() and all(map(str.isdecimal, cell)) for cell in cells)
        return _rows_of_columns({name: list(cell.values()) for name, cell in row.items()}) if numbered else cells
    lists = {name: cell for name, cell in row.items() if isinstance(cell, list)}
    if set(row) >= {"columns", "data"} and len(lists) >= 2:  # as pandas writes it with orient="split"
        return [dict(zip(map(str, lists["columns"]), cells, strict=False)) for cells in lists["data"]]
    of_rows = [name for name, cell in lists.items() if cell and all(map(_is_row, cell))]
    if len(of_rows) > 1:
        raise ValueError(f"it holds several lists of rows, {excerpt(', '.join(map(repr, of_rows)), 100)}: keep one")
    if of_rows:
        return _table(lists[of_rows[0]])
    if len(lists) == len(row):
        plain = not any(isinstance(cell, dict) for column in cells for cell in column)
        return _rows_of_columns(row) if plain and len(set(map(len, cells))) == 1 else [row]
    if len(lists) == 1 and not any(isinstance(cell, dict) for cell in cells):
        name, texts = next(iter(lists.items()))
        return [{name: text} for text in texts] if texts and all(isinstance(text, str) for text in texts) else [row]
    if all(isinstance(cell, str) for cell in cells) and (all(map(str.isdecimal, row)) or len(row) > MANY_COLUMNS):
        return [{"text": cell} for cell in cells]
    return [row]


def _is_row(value) -> bool:
    """Whether an item of a list is a row: an object, though not a turn, or a conversation."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(turn, dict) for turn in value)
    return isinstance(value, dict) and not {"role", "from"} & value.keys()


def _rows_of_columns(columns: dict[str, list]) -> list[dict]:
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _row(value, where: str) -> dict:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and _is_row(value):
        return {"messages": value}
    if not isinstance(value, dict):
        raise ValueError(f"neither an object with columns nor a text ({where})")
    return value


READERS = {
    ".jsonl": _json_rows, ".json": _json_rows, ".ndjson": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows,
    ".parquet": _arrow_rows, ".arrow": _arrow_rows, ".txt": _text_rows,
}  # fmt: skip


def parse_json(text: str, line: int | None = None):
    """The value of a JSON text.

    Integers are read as floats, since Python limits an int to 4,300 digits and none is used. NaN is accepted, which
    pandas writes for a missing cell. So are line breaks within a text.

    Args:
        line: number of the line, in a file of JSON lines.
    Raises:
        ValueError: it is not JSON, is nested too deeply, or an object has a key twice; a one-line message.
    """
    with _one_line_errors(line):
        return json.loads(text, **JSON_OPTIONS)


def _values(text: str) -> Iterator:
    """The JSON values of a text, one after another, with commas between them or without. Raises: see `parse_json`."""
    decoder, end = json.JSONDecoder(**JSON_OPTIONS), 0
    with _one_line_errors():
        while (start := BETWEEN_VALUES.match(text, end).end()) < len(text):
            value, end = decoder.raw_decode(text, start)
            yield value


def _object(pairs: list[tuple]) -> dict:
    _refuse_twice(key for key, _ in pairs)
    return dict(pairs)


JSON_OPTIONS = {"parse_int": float, "object_pairs_hook": _object, "strict": False}
COMMA_AT_END = re.compile(r",\s*$")
BETWEEN_VALUES = re.compile(r"[\s,]*")


@contextmanager
def _one_line_errors(line: int | None = None) -> Iterator[None]:
    where = f" (line {line})" if line else ""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} (line {error.lineno + (line or 1) - 1}, column {error.colno})") from error
    except ValueError as error:
        raise ValueError(f"{error}{where}") from error
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply{where}") from error


def _refuse_twice(names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{excerpt(repr(name), 40)} is there twice")


# --- choosing ------------------------------------------------------------------------------------


def text_of(cell) -> str | None:
    """The text of a cell; None if it is blank or not a string.

    A lone surrogate becomes U+FFFD: JSON can express it, but no UTF-8 file can hold it.
    """
    if not isinstance(cell, str) or not cell.strip():
        return None
    return cell.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Table(NamedTuple):
    """Rows, and which of their columns to read."""

    columns: list[str]  # the first is the one asked for, or chosen; none if there are no rows
    unread: list[str]  # others that hold texts
    rows: Iterator[dict]


def open_table(
    source: Source,
    rows: Iterator[dict],
    asked: Sequence[str],
    recognised: Sequence[str],
    flag: str,
    readable: Callable[[str, dict], bool],
    beside: Callable[[str], Sequence[str]] = lambda column: (),
) -> Table:
    """The columns asked for, or the first recognised one with a readable cell, or the first that exists.

    Of a single column the name does not matter.

    Args:
        source, flag: what the rows are of, and the option that names a column, for the error message.
        asked: column names; none to choose one.
        recognised: column names in lower case, in order of preference.
        readable: whether a row has something to read in a column (name, row).
        beside: of a column chosen, the names of those, in lower case, that are read with it.
    Raises:
        UserError: no such column exists.
    """
    first = list(islice(rows, SAMPLE_ROWS))
    names = list(dict.fromkeys(name for row in first for name in row))
    if not first:
        return Table([], [], iter(()))
    by_lower = {str(name).lower(): name for name in reversed(names)}
    there = list(asked) or [by_lower[name] for name in recognised if name in by_lower]
    if not there and len(names) == 1 and len(str(names[0]).split()) < 3:  # more words are no name, but a row
        there = [name for name in names if any(readable(name, row) for row in first)]
    if missing := [name for name in there if name not in names] or not there:
        has = f"{name_of(source)} has "
        has += f"the columns {excerpt(', '.join(map(str, names)), 200)}" if names else "no columns"
        raise UserError(f"no column {missing[0]!r}: {has}" if there else f"{has}: say with {flag} which one to read")
    columns = list(asked)
    if not asked:
        column = next((name for name in there if any(readable(name, row) for row in first)), there[0])
        more = (by_lower[name] for name in beside(str(column).lower()) if name in by_lower)
        columns = list(dict.fromkeys([column, *more]))
    unread = [name for name in names if name not in columns and _holds_texts(row.get(name) for row in first)]
    return Table(columns, unread, chain(first, rows))


def _holds_texts(cells: Iterable) -> bool:
    """Whether most of some cells are texts of several words, or not in Latin letters."""
    texts = [cell.strip() for cell in cells if isinstance(cell, str) and cell.strip()]
    return 2 * sum(" " in text or not text.isascii() for text in texts) > len(texts)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of the indices 0 ... count - 1, the first and the last included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))

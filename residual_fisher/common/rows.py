"""Rows of a table (a local file, or a hub dataset as a stream), the choice of a column, and strict JSON."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
import csv
from itertools import chain, islice
import json
import os
from pathlib import Path

import numpy as np

from residual_fisher.common.program import UserError, hub_hint
from residual_fisher.common.text import excerpt, first_line

SAMPLE_ROWS = 100  # first rows, from which a column is chosen
PARQUET_ROWS = 100  # rows read at once: each may hold images


# --- reading -------------------------------------------------------------------------------------


def read_rows(source: str, split: str = "train", config: str | None = None, shuffle: int | None = None) -> Iterator:
    """The rows of `source`, as dicts, read lazily.

    Args:
        source: a file with one of the suffixes of READERS, or the name of a hub dataset.
        split, config: part of a hub dataset.
        shuffle: seed of a shuffle in a buffer of 10,000 rows; None keeps the dataset's order.
    Raises:
        UserError: the rows cannot be read, for whatever reason.
    """
    read = READERS.get(Path(source).suffix.lower())
    if os.path.exists(source) and (read is None or not os.path.isfile(source)):
        raise UserError(f"cannot read {source}: give a {', '.join(READERS)} file or a dataset of the hub")
    if read and not os.path.isfile(source):
        raise UserError(f"cannot read {source}: no such file")
    try:
        if read and shuffle is None:
            yield from read(source)
            return
        import datasets  # takes a second, and most runs read a small file

        datasets.disable_progress_bars()
        if read:
            rows = datasets.IterableDataset.from_generator(read, gen_kwargs={"path": source})
        else:
            rows = datasets.load_dataset(source, config, split=split, streaming=True)
        yield from rows if shuffle is None else rows.shuffle(seed=shuffle, buffer_size=10_000)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {source}: it is not UTF-8 text") from error
    except Exception as error:  # a malformed file or a network failure: the user can mend any of them
        what = "" if read else "no such file, and as a dataset of the hub: "
        hint = hub_hint(error, "")
        hint = hint and f" ({hint}; or give a local file)"
        raise UserError(f"cannot read {source}: {what}{excerpt(first_line(error), 300)}{hint}") from error


def _json_rows(path: str) -> Iterator[dict]:
    """Rows of JSON lines, or of one JSON value over all lines; the suffix and the first line tell which."""
    with open(path, encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        head = list(islice(lines, 2))
        if not head:
            return
        if path.lower().endswith(".jsonl"):
            by_line = not head[0][1].lstrip().startswith("[")
        else:
            by_line = len(head) == 2 and _is_json(head[0][1])
        if by_line:
            yield from (_row(parse_json(line, number), f"line {number}") for number, line in chain(head, lines))
            return
        file.seek(0)
        yield from _table(parse_json(file.read()))


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _table(value) -> list[dict]:
    """The rows of a JSON value: a list of rows, an object of columns (lists of one length), or one row.

    A list of objects is not a column: it may be a conversation, a list of turns.
    """
    if isinstance(value, list):
        return [_row(item, f"item {number}") for number, item in enumerate(value, 1)]
    row = _row(value, "line 1")
    columns = list(row.values())
    lists = all(isinstance(column, list) and not any(isinstance(cell, dict) for cell in column) for column in columns)
    if not lists or len(set(map(len, columns))) > 1:
        return [row]
    return [dict(zip(row, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _row(value, where: str) -> dict:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"neither an object with columns nor a text ({where})")
    return value


def _csv_rows(path: str) -> Iterator[dict]:
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            header = next(lines, [])
            _refuse_twice(name for name in header if name)
            for cells in filter(None, lines):
                if len(cells) > len(header):
                    raise csv.Error(f"{len(cells)} cells for {len(header)} columns: is a comma not in quotes?")
                yield dict(zip(header, cells, strict=False))
        except csv.Error as error:
            raise ValueError(f"{error} (line {lines.line_num})") from error


def _text_rows(path: str) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig") as file:
        yield from ({"text": line.rstrip("\n")} for line in file)


def _parquet_rows(path: str) -> Iterator[dict]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(PARQUET_ROWS):
            yield from batch.to_pylist()


READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows, ".txt": _text_rows}


# --- JSON ----------------------------------------------------------------------------------------


def parse_json(text: str, line: int | None = None):
    """The value of a JSON text.

    Integers are read as floats, since Python limits an int to 4,300 digits and none is used. NaN is accepted, which
    pandas writes for a missing cell. So are line breaks within a text.

    Args:
        line: number of the line, in a file of JSON lines.
    Raises:
        ValueError: it is not JSON, is nested too deeply, or an object has a key twice; a one-line message.
    """
    where = f" (line {line})" if line else ""
    try:
        return json.loads(text, parse_int=float, object_pairs_hook=_object, strict=False)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} (line {error.lineno + (line or 1) - 1}, column {error.colno})") from error
    except ValueError as error:
        raise ValueError(f"{error}{where}") from error
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply{where}") from error


def _object(pairs: list[tuple]) -> dict:
    _refuse_twice(key for key, _ in pairs)
    return dict(pairs)


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


def read_column(
    source: str, rows: Iterator[dict], asked: str | None, recognised: Sequence[str], flag: str, read: Callable
) -> tuple[str | None, Iterator]:
    """The column asked for, or else the first recognised one with a readable cell, or else the first that exists.

    Args:
        source, flag: what the rows are of, and the option that names a column, for the error message.
        asked: a column name, or None to choose one.
        recognised: column names, in order of preference.
        read: reads a cell of a column (name, cell); None if it cannot be read.
    Returns:
        Its name (None if there are no rows), and what `read` makes of its cell in each row, read lazily.
    Raises:
        UserError: no such column exists.
    """
    first = list(islice(rows, SAMPLE_ROWS))
    if not first:
        return None, iter(())
    names = dict.fromkeys(name for row in first for name in row)
    there = [name for name in (recognised if asked is None else [asked]) if name in names]
    if not there:
        has = f"{source} has " + (f"the columns {excerpt(', '.join(map(str, names)), 200)}" if names else "no columns")
        raise UserError(f"{has}: say with {flag} which one to read" if asked is None else f"no column {asked!r}: {has}")
    column = next((name for name in there if any(read(name, row.get(name)) is not None for row in first)), there[0])
    return column, (read(column, row.get(column)) for row in chain(first, rows))


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of the indices 0 ... count - 1, the first and the last included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))

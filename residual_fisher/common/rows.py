"""Rows of a table: a local file, or a dataset of the hub as a stream; the column that is meant; a few of many rows."""

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

JUDGED = 100  # rows by which a column is chosen
PARQUET_ROWS = 100  # read at once: they may hold images


# --- reading -------------------------------------------------------------------------------------


def read_rows(source: str, split: str = "train", config: str | None = None, shuffle: int | None = None) -> Iterator:
    """The rows of `source`, as dicts, read as they are asked for.

    Args:
        source: a file with one of the endings of READERS, or the name of a dataset on the hub.
        split, config: which part of a hub dataset.
        shuffle: a seed to shuffle with, in a buffer of 10,000 rows; None for the dataset's order.
    Raises:
        UserError: whatever keeps the rows from being read, in a line.
    """
    read = READERS.get(Path(source).suffix.lower())
    if os.path.exists(source) and (read is None or not os.path.isfile(source)):
        raise UserError(f"cannot read {source}: give a {', '.join(READERS)} file or a dataset of the hub")
    if read and not os.path.isfile(source):
        raise UserError(f"cannot read {source}: no such file")
    try:
        if read is None or shuffle is not None:
            import datasets  # takes a second, and most runs read a small file

            datasets.disable_progress_bars()
        if read is None:
            rows = datasets.load_dataset(source, config, split=split, streaming=True)
        elif shuffle is None:
            rows = read(source)
        else:
            rows = datasets.IterableDataset.from_generator(read, gen_kwargs={"path": source})
        if shuffle is not None:
            rows = rows.shuffle(seed=shuffle, buffer_size=10_000)
        yield from rows
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {source}: it is not UTF-8 text") from error
    except Exception as error:  # whatever a reader or the network brings, the user can mend it
        what = "" if read else "no such file, and as a dataset of the hub: "
        hint = hub_hint(error, "")
        hint = hint and f" ({hint}; or give a local file)"
        raise UserError(f"cannot read {source}: {what}{excerpt(first_line(error), 300)}{hint}") from error


def _json_rows(path: str) -> Iterator[dict]:
    """Of JSON lines, or of one JSON value over all lines: which of the two, the ending and the first line say."""
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
    """The rows of a list; of an object of columns, which are lists of one length; or the one row that an object is.

    A list of objects is no column: the turns of a conversation are one.
    """
    if isinstance(value, list):
        return [_row(item, f"item {number}") for number, item in enumerate(value, 1)]
    row = _row(value, "line 1")
    if not all(isinstance(cells, list) and not any(isinstance(cell, dict) for cell in cells) for cells in row.values()):
        return [row]
    if len({len(cells) for cells in row.values()}) > 1:
        return [row]
    return [dict(zip(row, cells, strict=True)) for cells in zip(*row.values(), strict=True)]


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
    """The value of a JSON text; its numbers, of which none is used, as floats: an int has at most 4,300 digits.

    NaN is read too: it is what pandas writes for a cell that is missing. So are line breaks within a text.

    Args:
        line: where the text stands in a file of JSON lines.
    Raises:
        ValueError: it is not JSON, is nested too deeply, or an object has a key twice; in a line.
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
    """The text of a cell; None if it is blank or no text.

    Half of a surrogate pair, which JSON can express and no file can hold, becomes U+FFFD.
    """
    if not isinstance(cell, str) or not cell.strip():
        return None
    return cell.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def choose_column(
    source: str, rows: Sequence[dict], asked: str | None, recognised: Sequence[str], flag: str, read: Callable
) -> str:
    """The column asked for; or the first recognised one of which a cell in `rows` can be read, or that is there at all.

    Args:
        rows: the first JUDGED ones.
        flag: asks for a column.
        read: what is read of a column's name and a cell; None if nothing.
    Raises:
        UserError: there is no such column.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    has = f"{source} has " + (f"the columns {excerpt(', '.join(map(str, names)), 200)}" if names else "no columns")
    if asked is not None and asked not in names:
        raise UserError(f"no column {asked!r}: {has}")
    there = [asked] if asked is not None else [name for name in recognised if name in names]
    if not there:
        raise UserError(f"{has}: say with {flag} which one to read")
    return next((name for name in there if any(read(name, row.get(name)) is not None for row in rows)), there[0])


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of the indices 0 ... count - 1, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))

"""Rows of a table: a local file, or a dataset of the hub as a stream; the column that is meant; a few of many rows."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
import csv
import json
import os
from pathlib import Path

import numpy as np

from common.command_line import UserError, excerpt, first_line, hub_hint

JUDGED = 100  # rows by which a column is chosen


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
        raise UserError(f"cannot read {source}: {what}{first_line(error)}{hint}") from error


def _json_rows(path: str) -> Iterator[dict]:
    """Of JSON lines, if the first line is a whole object; else of one list of objects or texts, or object of lists."""
    with open(path, encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        number, first = next(lines, (1, ""))
        try:
            rows = [_row(parse_json(first, number))] if first else []
        except ValueError:
            if path.lower().endswith(".jsonl") and not first.lstrip().startswith("["):
                raise
            rows = _table(parse_json("\n" * (number - 1) + first + file.read()))
        yield from rows
        yield from (_row(parse_json(line, number), number) for number, line in lines)


def _table(value) -> list[dict]:
    if isinstance(value, dict):
        if len({len(column) if isinstance(column, list) else None for column in value.values()} | {None}) != 2:
            return [value]  # not all of them lists of one length
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return [_row(item) for item in value] if isinstance(value, list) else [_row(value)]


def _row(value, line: int = 1) -> dict:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"no object with columns (line {line})")
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
                    raise ValueError(f"{len(cells)} cells for {len(header)} columns: is a comma not in quotes?")
                yield dict(zip(header, cells, strict=False))
        except ValueError as error:
            raise ValueError(f"{error} (line {lines.line_num})") from error
        except csv.Error as error:
            raise ValueError(f"{error} (line {lines.line_num})") from error


def _text_rows(path: str) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig") as file:
        yield from ({"text": line.rstrip("\n")} for line in file)


def _parquet_rows(path: str) -> Iterator[dict]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1000):
            yield from batch.to_pylist()


READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows, ".txt": _text_rows}


# --- JSON ----------------------------------------------------------------------------------------


def parse_json(text: str, line: int | None = None):
    """The value of a JSON text; its numbers, which no one asks for here, as floats of any length.

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


def whole_characters(text: str) -> str:
    """`text` without halves of a surrogate pair, which JSON can express and no file can hold: they become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# --- choosing ------------------------------------------------------------------------------------


def choose_column(
    source: str, rows: Sequence[dict], asked: str | None, recognised: Sequence[str], flag: str, usable: Callable
) -> str:
    """The column asked for; or the first recognised one that has a usable cell in `rows`, or else is there at all.

    Args:
        rows: the first JUDGED ones.
        flag: asks for a column.
        usable: says it of a column's name and a cell.
    Raises:
        UserError: there is no such column.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    has = f"{source} has the columns {excerpt(', '.join(map(str, names)), 200)}"
    if asked is not None and asked not in names:
        raise UserError(f"no column {asked!r}: {has}")
    there = [asked] if asked is not None else [name for name in recognised if name in names]
    if not there:
        raise UserError(f"{has}: say with {flag} which one to read")
    return next((name for name in there if any(usable(name, row.get(name)) for row in rows)), there[0])


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of the indices 0 ... count - 1, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))

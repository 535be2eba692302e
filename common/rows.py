"""Rows of a table: a local file, or a dataset of the hub as a stream; and a few of many rows."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.command_line import UserError, first_line, hub_hint

READERS = {  # ending -> reader in `datasets`
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def read_rows(source: str, split: str = "train", config: str | None = None, shuffle: int | None = None) -> Iterator:
    """The rows of `source`, as dicts, read as they are asked for.

    Args:
        source: a file with one of the endings of READERS, or the name of a dataset on the hub.
        split, config: which part of a hub dataset.
        shuffle: a seed to shuffle with, in a buffer of 10,000 rows; None for the dataset's order.
    Raises:
        UserError: whatever keeps the rows from being read, in a line.
    """
    path = Path(source)
    reader = READERS.get(path.suffix.lower())
    if path.exists() and (reader is None or not path.is_file()):
        raise UserError(f"cannot read {source}: give a {', '.join(READERS)} file or a dataset of the hub")
    if reader and not path.is_file():
        raise UserError(f"cannot read {source}: no such file")

    import datasets  # takes a second, and most runs of the experiment read a small file

    datasets.disable_progress_bars()
    try:
        if reader:
            rows = datasets.load_dataset(reader, data_files=str(path), split="train", streaming=True)
        else:
            rows = datasets.load_dataset(source, config, split=split, streaming=True)
        if shuffle is not None:
            rows = rows.shuffle(seed=shuffle, buffer_size=10_000)
        yield from rows
    except Exception as error:  # whatever a reader or the network brings, the user can mend it
        what = "" if reader else "no such file, and as a dataset of the hub: "
        hint = hub_hint(error, "")
        hint = hint and f" ({hint}; or give a local file)"
        raise UserError(f"cannot read {source}: {what}{first_line(error)}{hint}") from error


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of the indices 0 ... count - 1, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))

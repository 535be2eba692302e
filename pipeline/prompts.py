"""Chat prompts: the user's text from the rows of a dataset, and the tokens that the model reads."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.command_line import UserError
from common.rows import read_rows

COLUMNS = ("conversation", "messages", "prompt", "instruction", "question", "text")  # recognised, in this order
# Some chat templates state the day's date: results must not change overnight.
DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Prompt:
    """A user's text, and where it came from."""

    index: int  # among the usable rows
    row: int  # among all rows of the dataset
    text: str


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model reads it."""

    prompt: Prompt
    ids: list[int]
    truncated: bool  # the user's text was shortened


class Prompts:
    """The prompts of a dataset, in order, read as they are asked for.

    Rows without a usable text (empty, or no text at all) are passed over, and counted in `skipped`.
    """

    def __init__(
        self,
        source: str,
        split: str = "train",
        column: str | None = None,
        config: str | None = None,
        shuffle: int | None = None,
    ):
        """`column` holds a text, or turns of which the user's first counts; None: the first row's first of COLUMNS.

        The other arguments are those of `common.rows.read_rows`.
        """
        self.source, self.column = source, column
        self.rows = read_rows(source, split, config, shuffle)
        self.usable, self.skipped = 0, 0

    def __iter__(self) -> Iterator[Prompt]:
        """Raises UserError: the dataset cannot be read, or has no such column."""
        for number, row in enumerate(self.rows):
            if number == 0:
                self.column = _choose_column(self.source, row, self.column)
            text = user_text(row.get(self.column))
            if text is None:
                self.skipped += 1
                continue
            self.usable += 1
            yield Prompt(self.usable - 1, number, text)


def _choose_column(source: str, row: dict, asked: str | None) -> str:
    has = f"{source} has the columns {', '.join(map(str, row))}"
    if asked is not None and asked not in row:
        raise UserError(f"no column {asked!r}: {has}")
    column = asked or next((name for name in COLUMNS if name in row), None)
    if column is None:
        raise UserError(f"{has}: say with --prompt-column which one holds the prompts")
    return column


def user_text(value) -> str | None:
    """The text of a cell: itself, or the first user turn of a conversation; None if there is none.

    A turn is {"role": "user", "content": text} or {"from": "human", "value": text}; a content may be a list
    of parts, of which those of text count.
    """
    if isinstance(value, list):
        turns = (turn for turn in value if isinstance(turn, dict))
        turn = next((t for t in turns if t.get("role", t.get("from")) in ("user", "human")), {})
        value = turn.get("content", turn.get("value"))
        if isinstance(value, list):
            parts = [part.get("text") for part in value if isinstance(part, dict)]
            value = "\n".join(part for part in parts if isinstance(part, str))
    return value if isinstance(value, str) and value.strip() else None


def encode(tokenizer, prompt: Prompt, max_length: int) -> Encoded:
    """The prompt in the tokenizer's chat template, if it has one, in at most `max_length` tokens.

    What is too long loses the end of the user's text; the template around it stays whole.

    Raises:
        UserError: the template alone is longer.
    """

    def ids(text: str) -> list[int]:
        if not tokenizer.chat_template:
            return tokenizer(text)["input_ids"]
        turn = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, date_string=DATE)
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template brings its own

    whole = ids(prompt.text)
    if len(whole) <= max_length:
        return Encoded(prompt, whole, truncated=False)
    lengths = range(len(prompt.text))
    kept = bisect.bisect_right(lengths, max_length, key=lambda n: len(ids(prompt.text[:n]))) - 1
    if kept <= 0:
        raise UserError(f"--max-length {max_length} leaves no room for a user's text: give more")
    return Encoded(prompt, ids(prompt.text[:kept]), truncated=True)


# --- batches -------------------------------------------------------------------------------------

# What a pass costs beside its tokens, in tokens: reading the weights, starting the kernels.
OVERHEAD = 256


def plan_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which prompts to run together: indices into `lengths`, at most `size` a batch, long ones first.

    Sorted by length, so that little is padded; of all ways to cut the sorted list, the one for which padded
    tokens and the passes' overhead are least, found by dynamic programming. A function of its arguments alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best = [(0, 0)]  # of the first `end` prompts: the least cost, and where its last batch begins
    for end in range(1, len(order) + 1):
        starts = range(max(0, end - size), end)
        best.append(min((best[s][0] + lengths[order[s]] * (end - s) + OVERHEAD, s) for s in starts))
    batches, end = [], len(order)
    while end:
        start = best[end][1]
        batches.append(order[start:end])
        end = start
    return batches[::-1]

"""Chat prompts: the user's text from the rows of a dataset, and the tokens that the model reads."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice

from residual_fisher.common.program import UserError
from residual_fisher.common.rows import JUDGED, choose_column, parse_json, read_rows, text_of
from residual_fisher.common.text import excerpt, first_line

TURNS = ("conversation", "conversations", "messages")  # columns of these names hold conversations, and no texts
COLUMNS = (*TURNS, "prompt", "instruction", "question", "text")  # recognised, in this order
USER = ("user", "human")  # a turn's role, in lower case
# Some chat templates tell the day's date, some the hour: results must not change overnight.
NOW = datetime(2024, 7, 26)
DATE = NOW.strftime("%d %b %Y")


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
        """`column` holds texts, or turns of which the user's first counts; None: the first of COLUMNS that does.

        The other arguments are those of `common.rows.read_rows`.
        """
        self.source, self.column = source, column
        self.rows = read_rows(source, split, config, shuffle)
        self.usable, self.skipped = 0, 0

    def __iter__(self) -> Iterator[Prompt]:
        """Raises UserError: the dataset cannot be read, has no such column, or no text in it."""
        first = list(islice(self.rows, JUDGED))
        if not first:
            raise UserError(f"{self.source} has no usable prompt: it holds no rows")
        self.column = choose_column(self.source, first, self.column, COLUMNS, "--prompt-column", prompt_text)
        for number, row in enumerate(chain(first, self.rows)):
            text = prompt_text(self.column, row.get(self.column))
            if text is None:
                self.skipped += 1
                continue
            self.usable += 1
            yield Prompt(self.usable - 1, number, text)
        if not self.usable:
            what = "conversation" if self.column in TURNS else "text"
            where = f"in the column {excerpt(repr(self.column), 100)}"
            raise UserError(f"{self.source} has no usable prompt: {self.skipped} rows, all empty or no {what} {where}")


# --- the user's text -----------------------------------------------------------------------------


def prompt_text(column: str, cell) -> str | None:
    """The user's text in a cell of a column, which has to hold turns if it is called so; None if there is none."""
    return first_user_turn(turns_of(cell) or []) if column in TURNS else user_text(cell)


def user_text(cell) -> str | None:
    """The text of a cell: the user's first turn if it is a conversation, else itself; None if there is none."""
    turns = turns_of(cell)
    return text_of(cell) if turns is None else first_user_turn(turns)


def turns_of(cell) -> list[dict] | None:
    """The turns of a conversation: a list, a dict of columns, or either as JSON text; None if it is none of them.

    A turn is {"role": "user", "content": text} or {"from": "human", "value": text}.
    """
    if isinstance(cell, str):
        try:
            cell = parse_json(cell) if cell.lstrip().startswith(("[", "{")) else None
        except ValueError:
            return None
    if isinstance(cell, dict):
        columns = {name: column for name, column in cell.items() if isinstance(column, list)}
        cell = [dict(zip(columns, items, strict=False)) for items in zip(*columns.values(), strict=False)]
    turns = [turn for turn in cell if isinstance(turn, dict) and _role(turn)] if isinstance(cell, list) else []
    return turns or None


def _role(turn: dict) -> str | None:
    role = turn.get("role") or turn.get("from")
    return role.strip().lower() if isinstance(role, str) else None


def first_user_turn(turns: Sequence[dict]) -> str | None:
    """What the user says first, whatever precedes it; None if that is blank, or no text.

    A content may be a list of parts, of which those of text count.
    """
    turn = next((turn for turn in turns if _role(turn) in USER), {})
    content = turn.get("content") or turn.get("value")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "\n".join(part for part in parts if isinstance(part, str))
    return text_of(content)


# --- tokens --------------------------------------------------------------------------------------


def encode(tokenizer, prompt: Prompt, max_length: int) -> Encoded:
    """The prompt in the tokenizer's chat template, if it has one, in at most `max_length` tokens.

    What is too long loses the end of the user's text; the template around it stays whole.

    Raises:
        UserError: the template alone is longer, or fails; or there is no token.
    """

    def ids(text: str) -> list[int]:
        return _in_template(tokenizer, text) if tokenizer.chat_template else _bare(tokenizer, text)

    whole, kept = ids(prompt.text), len(prompt.text)
    if len(whole) > max_length:
        lengths = range(len(prompt.text))
        kept = bisect.bisect_right(lengths, max_length, key=lambda n: len(ids(prompt.text[:n]))) - 1
        if kept <= 0:
            raise UserError(f"--max-length {max_length} leaves no room for a user's text: give more")
    truncated = kept < len(prompt.text)
    encoded = Encoded(prompt, ids(prompt.text[:kept]) if truncated else whole, truncated)
    if not encoded.ids:
        raise UserError(f"the tokenizer makes no token of {excerpt(repr(prompt.text), 60)} (row {prompt.row})")
    return encoded


def _bare(tokenizer, text: str) -> list[int]:
    """The tokens of a text, and what the tokenizer puts in front of them.

    What it puts behind (an end-of-sequence token) is left out: the next token would be that of another text.
    """
    whole, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    if not bare:
        return []
    starts = range(len(whole) - len(bare) + 1)
    start = next((start for start in starts if whole[start : start + len(bare)] == bare), None)
    if start is None:
        raise UserError(f"{tokenizer.name_or_path} is not supported: its tokenizer puts special tokens into a text")
    return whole[: start + len(bare)]


def _in_template(tokenizer, text: str) -> list[int]:
    return tokenizer(render(tokenizer, text), add_special_tokens=False)["input_ids"]  # the template brings its own


def render(tokenizer, text: str) -> str:
    """A user's text in the tokenizer's chat template, whatever the day.

    Raises:
        UserError: the template is malformed, raises, or renders nothing.
    """
    turn = [{"role": "user", "content": text}]
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = STOPPED_CLOCK + template
        rendered = tokenizer.apply_chat_template(
            turn, chat_template=template, tokenize=False, add_generation_prompt=True, date_string=DATE
        )
    except Exception as error:  # a template is a program that came with the model
        raise UserError(f"{_template_of(tokenizer)} fails: {excerpt(first_line(error), 200)}") from error
    if not rendered.strip():
        raise UserError(f"{_template_of(tokenizer)} renders nothing")
    return rendered


def _template_of(tokenizer) -> str:
    return f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"


def _stopped_clock() -> str:
    """A template's beginning that has its `strftime_now` tell NOW.

    transformers lets no function be given to a template, but a macro goes before its own. The line break is
    the block's: templates are read with trim_blocks.
    """
    told = {f"%{letter}": NOW.strftime(f"%{letter}") for letter in "aAbBcdDeFGHIjmMpRSTuUVwWxXyYzZ"}
    told |= {f"%-{letter}": told[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMSy"}
    replaced = "".join(f"|replace({directive!r}, {value!r})" for directive, value in told.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


STOPPED_CLOCK = _stopped_clock()


def check_template(tokenizer) -> None:
    """Raises UserError: a chat template renders different texts alike."""
    if tokenizer.chat_template and render(tokenizer, "yes") == render(tokenizer, "no"):
        raise UserError(f"{_template_of(tokenizer)} leaves out the user's text: every prompt would be the same")


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

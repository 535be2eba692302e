"""Chat prompts: the user's text from a dataset's rows, its tokens in the chat template, and the plan of batches."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from residual_fisher.common.program import UserError
from residual_fisher.common.rows import parse_json, read_column, read_rows, text_of
from residual_fisher.common.text import excerpt, first_line

TURNS = ("conversation", "conversations", "messages")  # columns of these names must hold conversations, not texts
PROMPT_COLUMNS = (
    *TURNS,
    "prompt",
    "instruction",
    "question",
    "text",
)  # recognised, in this order
USER_ROLES = ("user", "human")  # in lower case
# The time that chat templates are given: some state the date or the hour, and results must not change overnight.
FIXED_TIME = datetime(2024, 7, 26)


@dataclass(frozen=True)
class Prompt:
    """A user's text, and its place in the dataset."""

    index: int  # number among the usable rows
    row: int  # number among all rows
    text: str


@dataclass(frozen=True)
class Encoded:
    """A prompt's tokens, as the model reads them."""

    prompt: Prompt
    ids: list[int]
    truncated: bool  # the end of the user's text was cut


@dataclass
class Prompts:
    """The prompts of a dataset, in order, read lazily, to be iterated once. The arguments are those of `read_rows`."""

    source: str
    split: str = "train"
    column: str | None = None  # holds texts or conversations; None takes the first of PROMPT_COLUMNS that does
    config: str | None = None
    shuffle: int | None = None
    usable: int = field(default=0, init=False)  # rows read that have a usable text
    skipped: int = field(default=0, init=False)  # rows read that have none

    def __iter__(self) -> Iterator[Prompt]:
        """Raises UserError: the dataset cannot be read, or has no such column, or no text in it."""
        rows = read_rows(self.source, self.split, self.config, self.shuffle)
        self.column, texts = read_column(self.source, rows, self.column, PROMPT_COLUMNS, "--prompt-column", prompt_text)
        if self.column is None:
            raise UserError(f"{self.source} has no usable prompt: it holds no rows")
        for row, text in enumerate(texts):
            if text is None:
                self.skipped += 1
                continue
            self.usable += 1
            yield Prompt(self.usable - 1, row, text)
        if not self.usable:
            what = "conversation" if self.column in TURNS else "text"
            where = f"in the column {excerpt(repr(self.column), 100)}"
            raise UserError(f"{self.source} has no usable prompt: {self.skipped} rows, all empty or no {what} {where}")


# --- the user's text -----------------------------------------------------------------------------


def prompt_text(column: str, cell) -> str | None:
    """The first turn by the user if a cell is a conversation, otherwise its text; None if that is blank or missing.

    In the columns of TURNS, what is not a conversation has no text. Of a turn that is a list of parts, the texts are
    joined.
    """
    turns = _turns(cell)
    if not turns:
        return None if column in TURNS else text_of(cell)
    turn = next((turn for turn in turns if _role(turn) in USER_ROLES), {})
    content = turn.get("content") or turn.get("value")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "\n".join(part for part in parts if isinstance(part, str))
    return text_of(content)


def _turns(cell) -> list[dict]:
    """The turns of a conversation; none if the cell is not one.

    A conversation is a list of turns, a dict of columns, or either as JSON text. A turn is
    {"role": "user", "content": text} or {"from": "human", "value": text}.
    """
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        try:
            cell = parse_json(cell)
        except ValueError:
            return []
    if isinstance(cell, dict):
        columns = {name: column for name, column in cell.items() if isinstance(column, list)}
        cell = [dict(zip(columns, items, strict=False)) for items in zip(*columns.values(), strict=False)]
    return [turn for turn in cell if isinstance(turn, dict) and _role(turn)] if isinstance(cell, list) else []


def _role(turn: dict) -> str | None:
    role = turn.get("role") or turn.get("from")
    return role.strip().lower() if isinstance(role, str) else None


# --- tokens --------------------------------------------------------------------------------------


def encode(tokenizer, prompt: Prompt, max_length: int) -> Encoded:
    """At most `max_length` tokens of the prompt, in the tokenizer's chat template if it has one.

    A longer prompt loses the end of the user's text; the template around it stays intact.

    Raises:
        UserError: the template fails or leaves no room for a text, or the text has no token.
    """

    def ids(text: str) -> list[int]:
        if not tokenizer.chat_template:
            return _bare(tokenizer, text)
        return tokenizer(render(tokenizer, text), add_special_tokens=False)["input_ids"]  # the template has its own

    found, kept = ids(prompt.text), len(prompt.text)
    if len(found) > max_length:
        lengths = range(len(prompt.text))
        kept = bisect.bisect_right(lengths, max_length, key=lambda n: len(ids(prompt.text[:n]))) - 1
        if kept <= 0:
            raise UserError(f"--max-length {max_length} leaves no room for a user's text: give more")
        found = ids(prompt.text[:kept])
    if not found:
        raise UserError(f"the tokenizer makes no token of {excerpt(repr(prompt.text), 60)} (row {prompt.row})")
    return Encoded(prompt, found, kept < len(prompt.text))


def _bare(tokenizer, text: str) -> list[int]:
    """The tokens of a text, with the special tokens that the tokenizer puts in front.

    Those that it puts behind (end of sequence) are left out: the next token would begin another text.
    """
    special, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    if not bare:
        return []
    starts = range(len(special) - len(bare) + 1)
    start = next((start for start in starts if special[start : start + len(bare)] == bare), None)
    if start is None:
        raise UserError(f"{tokenizer.name_or_path} is not supported: its tokenizer puts special tokens into a text")
    return special[: start + len(bare)]


def render(tokenizer, text: str) -> str:
    """A user's text in the tokenizer's chat template, at FIXED_TIME.

    Raises:
        UserError: the template is malformed, raises, or renders nothing.
    """
    try:
        template = tokenizer.get_chat_template()
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            chat_template=FIXED_CLOCK + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=True,
            date_string=FIXED_TIME.strftime("%d %b %Y"),
        )
    except Exception as error:  # a template is a program that came with the model
        raise UserError(f"{_template_of(tokenizer)} fails: {excerpt(first_line(error), 200)}") from error
    if not rendered.strip():
        raise UserError(f"{_template_of(tokenizer)} renders nothing")
    return rendered


def _template_of(tokenizer) -> str:
    return f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"


def _fixed_clock() -> str:
    """A macro at the beginning of a template that makes its `strftime_now` give FIXED_TIME.

    transformers passes no function to a template, but a macro takes precedence over its own. The line break belongs to
    the block: templates are read with trim_blocks.
    """
    values = {f"%{letter}": FIXED_TIME.strftime(f"%{letter}") for letter in "aAbBcdDeFGHIjmMpRSTuUVwWxXyYzZ"}
    values |= {f"%-{letter}": values[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMSy"}
    replaced = "".join(f"|replace({directive!r}, {value!r})" for directive, value in values.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


FIXED_CLOCK = _fixed_clock()


def check_template(tokenizer) -> None:
    """Raises UserError if the chat template renders two different texts alike."""
    if tokenizer.chat_template and render(tokenizer, "yes") == render(tokenizer, "no"):
        raise UserError(f"{_template_of(tokenizer)} leaves out the user's text: every prompt would be the same")


# --- batches -------------------------------------------------------------------------------------

# The fixed cost of a pass, as a number of tokens: reading the weights, starting the kernels.
PASS_OVERHEAD = 256


def plan_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of prompts to run together, as indices into `lengths`: at most `size` each, long prompts first.

    Prompts are sorted by length, so that little is padded. Dynamic programming finds the cuts of the sorted list with
    the fewest padded tokens plus PASS_OVERHEAD a batch. The plan is a function of the arguments alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best = [(0, 0)]  # by number of prompts: the least cost, and the start of its last batch
    for end in range(1, len(order) + 1):
        starts = range(max(0, end - size), end)
        best.append(min((best[s][0] + lengths[order[s]] * (end - s) + PASS_OVERHEAD, s) for s in starts))
    batches, end = [], len(order)
    while end:
        start = best[end][1]
        batches.append(order[start:end])
        end = start
    return batches[::-1]

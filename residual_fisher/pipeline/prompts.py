"""Chat prompts: the user's text from a dataset's rows, its tokens in the chat template, and the plan of batches."""

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
import itertools

from residual_fisher.common.conversations import TURNS, Turn, conversation, speaker
from residual_fisher.common.program import UserError
from residual_fisher.common.rows import open_table, read_rows, text_of
from residual_fisher.common.sources import Source, name_of
from residual_fisher.common.text import excerpt
from residual_fisher.model.template import habits, render
from residual_fisher.model.words import prompt_tokens

# Columns that are recognised, in this order
PROMPT_COLUMNS = (
    *TURNS, "prompt", "instruction", "question", "text", "prompts", "query", "user_input", "user", "goal", "behavior",
    "problem", "turns", "dialog", "dialogue", "chosen", "content", "input", "inputs",
)  # fmt: skip
SECOND_HALVES = {"instruction": ("input", "context")}  # of a column, those that go on where it ends: Alpaca's, Dolly's
SYSTEM_COLUMNS = ("system", "system_prompt")
ROLE_COLUMNS = ("role", "from", "speaker", "sender", "author")


@dataclass(frozen=True)
class Prompt:
    """A user's text, and its place in the dataset."""

    index: int  # number among the usable rows
    row: int  # number among all rows
    text: str
    before: tuple[Turn, ...] = ()  # what the model reads first: a system turn, earlier turns

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All that the model reads: equal prompts have equal ones."""
        return (*self.before, Turn("user", self.text))


@dataclass(frozen=True)
class Encoded:
    """A prompt's tokens, as the model reads them."""

    prompt: Prompt
    ids: list[int]
    truncated: bool  # the end of the user's text was cut
    failed: str | None = None  # why the model cannot be asked this: `ids` are then what has room before the text


@dataclass
class Prompts:
    """The prompts of a dataset, in order, read lazily, to be iterated once."""

    source: Source  # this, `split`, `config` and `shuffle` are the arguments of `read_rows`
    split: str = "train"
    column: str | tuple[str, ...] | None = None  # holds texts or conversations; of several, the texts are joined
    config: str | None = None
    shuffle: int | None = None
    turns: str = "first"  # the user's first or last turn, or all up to the last, answers among them
    system: str = "keep"  # or "drop"
    raw: bool = False  # a text is taken as it is, though it looks like a transcript
    usable: int = field(default=0, init=False)  # rows read that have a usable text
    skipped: int = field(default=0, init=False)  # rows read that have none
    with_system: int = field(default=0, init=False)  # prompts that begin with a system turn
    left_out: Counter = field(default_factory=Counter, init=False)  # of rows read: parts that are not in the prompts
    unread: list[str] = field(default_factory=list, init=False)  # columns that hold texts and are not read

    def __iter__(self) -> Iterator[Prompt]:
        """Raises UserError: the dataset cannot be read, or has no such column, or no text in it."""
        rows = read_rows(self.source, self.split, self.config, self.shuffle)
        asked = [self.column] if isinstance(self.column, str) else self.column or []

        def readable(column: str, row: dict) -> bool:
            return any(turn.role == "user" and turn.text for turn in self._turns([column], row))

        def beside(column: str) -> list[str]:
            return [*SECOND_HALVES.get(column, ()), *SYSTEM_COLUMNS]

        table = open_table(self.source, rows, asked, PROMPT_COLUMNS, "--prompt-column", readable, beside)
        self.unread = table.unread
        if not table.columns:
            raise UserError(f"{name_of(self.source)} has no usable prompt: it holds no rows")
        self.column = ", ".join(map(str, table.columns))
        for number, row in enumerate(table.rows):
            found = self._choose(self._turns(table.columns, row))
            if found is None:
                self.skipped += 1
                continue
            self.usable += 1
            yield Prompt(self.usable - 1, number, found[-1].text, tuple(found[:-1]))
        if not self.usable:
            what = "conversation" if str(table.columns[0]).lower() in TURNS else "text"
            where = f"in the column {excerpt(repr(self.column), 100)}"
            about = f"{self.skipped} rows, all empty or no {what} {where}"
            if others := self.left_out["rows by others than the user"]:
                about += f", or ({others} of them) by others than the user"
            raise UserError(f"{name_of(self.source)} has no usable prompt: {about}")

    def _turns(self, columns: Sequence[str], row: dict) -> list[Turn]:
        """The turns of a row: of its first column, to which others add their text, or a system turn."""
        column, *others = columns
        turns = conversation(str(column), row.get(column), transcripts=not self.raw)
        cells = {str(name).lower(): text_of(row.get(name)) for name in others}
        scene = [Turn("system", text) for name, text in cells.items() if text and name in SYSTEM_COLUMNS]
        if [turn.role for turn in turns] in ([], ["user"]):
            texts = [turn.text for turn in turns] + [t for name, t in cells.items() if name not in SYSTEM_COLUMNS]
            roles = (speaker(row[name]) for name in row if str(name).lower() in ROLE_COLUMNS)
            role = next(filter(None, roles), "user")  # of a table that has one turn a row
            turns = [Turn(role, "\n\n".join(filter(None, texts)))] if any(texts) else []
        return [*scene, *turns]

    def _choose(self, turns: list[Turn]) -> list[Turn] | None:
        """Of a row's turns, those that make the prompt: the last is the user's. None if it has no text."""
        places = [place for place, turn in enumerate(turns) if turn.role == "user"]
        if not places:
            self.left_out["rows by others than the user"] += any(turn.role != "system" for turn in turns)
            return None
        last = places[0] if self.turns == "first" else places[-1]
        if turns[last].text is None:
            return None
        first = places[0] if self.turns == "all" else last
        said = [turn for turn in turns if turn.text]
        kept = [turn for turn in turns[first : last + 1] if turn.text and turn.role in ("user", "assistant")]
        system = [turn.text for turn in turns[:last] if turn.text and turn.role == "system"]
        self.left_out["answers and other turns"] += sum(turn.role != "system" for turn in said) - len(kept)
        if self.system == "drop":
            self.left_out["system turns"] += len(system)
        elif system:
            self.with_system += 1
            return [Turn("system", "\n\n".join(system)), *_alternating(kept)]
        return _alternating(kept)


def _alternating(turns: list[Turn]) -> list[Turn]:
    """Turns of one side that follow each other, as one: many chat templates refuse them."""
    sides = itertools.groupby(turns, key=lambda turn: turn.role)
    return [Turn(role, "\n\n".join(turn.text for turn in several)) for role, several in sides]


# --- tokens --------------------------------------------------------------------------------------


def encode(tokenizer, prompt: Prompt, max_length: int) -> Encoded:
    """At most `max_length` tokens of the prompt, in the tokenizer's chat template if it has one.

    A longer prompt loses the end of the user's text; the template around it stays intact.

    Raises:
        UserError: the template fails, or the text has no token.
    """

    if tokenizer.chat_template and not habits(tokenizer).takes_system:
        prompt = replace(prompt, before=tuple(turn for turn in prompt.before if turn.role != "system"))

    def ids(text: str) -> list[int]:
        if not tokenizer.chat_template:
            return prompt_tokens(tokenizer, "\n\n".join([*(turn.text for turn in prompt.before), text]))
        rendered = render(tokenizer, text, prompt.before)
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template has its own special tokens

    found, kept = ids(prompt.text), len(prompt.text)
    if len(found) > max_length:
        lengths = range(len(prompt.text))
        kept = bisect.bisect_right(lengths, max_length, key=lambda n: len(ids(prompt.text[:n]))) - 1
        if kept <= 0:
            return Encoded(prompt, found[:max_length], True, f"--max-length {max_length} leaves no room for its text")
        found = ids(prompt.text[:kept])
    if not found:
        raise UserError(f"the tokenizer makes no token of {excerpt(repr(prompt.text), 60)} (row {prompt.row})")
    return Encoded(prompt, found, kept < len(prompt.text))


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

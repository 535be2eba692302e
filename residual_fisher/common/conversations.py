"""Conversations: their turns, in the forms in which datasets hold them."""

import ast
from collections.abc import Iterator
import itertools
import re
from typing import NamedTuple

from residual_fisher.common.rows import parse_json, text_of

TURNS = ("conversation", "conversations", "messages")  # columns of these names must hold conversations, not texts
SPEAKERS = {
    "user": ("user", "human", "prompter", "instruction", "input"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "ai", "response", "output"),
    "system": ("system", "developer"),
}
ROLE_KEYS, TEXT_KEYS = ("role", "from", "speaker", "sender", "author"), ("content", "value", "text", "message")


class Turn(NamedTuple):
    """What one side says at a time."""

    role: str  # user, assistant, system, or what the dataset calls it
    text: str | None  # None if it is blank, or no text

    @property
    def message(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.text}


def speaker(name) -> str | None:
    """The role that a name stands for: user, assistant or system; None if it is another."""
    name = name.strip().lower() if isinstance(name, str) else ""
    return next((role for role, names in SPEAKERS.items() if name in names), None)


def conversation(column: str, cell, transcripts: bool = True) -> list[Turn]:
    """The turns of a cell: of a conversation, of a transcript, or the one of a text. None if there are none.

    In the columns of TURNS, a text that is no transcript has none.

    Args:
        transcripts: whether a text may be one.
    """
    if turns := turns_of(cell, alternating=column.lower() != "turns"):
        return turns
    text = text_of(cell)
    if text is None:
        return []
    if transcripts and (turns := transcript(text)):
        return turns
    return [] if column.lower() in TURNS else [Turn("user", text)]


# --- lists of turns ------------------------------------------------------------------------------


def turns_of(cell, alternating: bool = True) -> list[Turn]:
    """The turns of a conversation; none if the cell is not one.

    A conversation is a list of turns, a dict of columns, a dict that holds one of these as "messages", or any of them
    as the text of JSON or of a Python literal. A turn is {"role": "user", "content": text} or {"from": "human",
    "value": text}; or an object of a whole exchange, {"human": text, "assistant": text}. In lists of texts, or of pairs
    of texts, user and assistant take turns; or if not `alternating`, all are the user's.
    """
    if isinstance(cell, str):
        cell = _parsed(cell)
    if isinstance(cell, dict):
        if _role(cell):
            cell = [cell]
        elif inner := next((value for name, value in cell.items() if str(name).lower() in TURNS), None):
            return turns_of(inner)
        else:
            columns = {name: column for name, column in cell.items() if isinstance(column, list)}
            cell = [dict(zip(columns, items, strict=False)) for items in zip(*columns.values(), strict=False)]
    if not isinstance(cell, list):
        return []
    if cell and all(isinstance(pair, list) and len(pair) == 2 for pair in cell):
        cell = [text for pair in cell for text in pair]
    if cell and all(isinstance(text, str) for text in cell):
        return [Turn("assistant" if alternating and i % 2 else "user", text_of(text)) for i, text in enumerate(cell)]
    return [turn for item in cell if isinstance(item, dict) for turn in _turns_of_item(item)]


def _parsed(text: str):
    """What a text that begins like a list or an object stands for, if it holds objects; else None."""
    if not (text.lstrip().startswith(("[", "{")) and "{" in text):
        return None
    try:
        return parse_json(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _role(item: dict) -> str | None:
    name = next((item[key] for key in ROLE_KEYS if item.get(key)), None)
    name = name.get("role") if isinstance(name, dict) else name
    return speaker(name) or name.strip().lower() if isinstance(name, str) else None


def _turns_of_item(item: dict) -> Iterator[Turn]:
    if role := _role(item):
        yield Turn(role, _text(next((item[key] for key in TEXT_KEYS if item.get(key)), None)))
    elif any(speaker(name) == "user" for name in item):
        yield from (Turn(role, _text(value)) for name, value in item.items() if (role := speaker(name)))


def _text(content) -> str | None:
    """A text; of a list of parts, the texts."""
    if isinstance(content, dict):
        content = content.get("parts") or [content]
    if isinstance(content, list):
        parts = [_part(part) if isinstance(part, dict) else part for part in content]
        content = "\n".join(part for part in parts if isinstance(part, str))
    return text_of(content)


def _part(part: dict):
    return next((part[key] for key in ("text", "value", "content") if isinstance(part.get(key), str)), None)


# --- transcripts ---------------------------------------------------------------------------------

# What begins a turn, by form: whose turn it is in the only group that has matched.
TAGS = re.compile(
    r"<\|im_start\|>\s*(\w+)|<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>|<start_of_turn>\s*(\w+)"
    r"|<[|｜](prompter|user|assistant|system)(?:_token)?[|｜]>",
    re.IGNORECASE,
)
HEADINGS = re.compile(r"###\s*(Human|User|Assistant|System|Instruction|Input|Response)\s*:")
LINES = re.compile(r"^[ \t]*(Human|User|Assistant|System)[ \t]*:", re.MULTILINE)
CAPITALS = re.compile(r"\b(USER|HUMAN|ASSISTANT|SYSTEM)[ \t]*:")
BRACKETS = re.compile(
    r"\[INST\]\s*(?:<<SYS>>(?P<system>.*?)<</SYS>>)?(?P<user>.*?)\[/INST\](?P<assistant>[^\[]*)", re.DOTALL
)
AROUND = (
    "<s>", "</s>", "<bos>", "<eos>", "<end_of_turn>", "<|begin_of_text|>", "<|im_end|>", "<|eot_id|>", "<|end|>",
    "<|endoftext|>", "<|end_of_text|>",
)  # fmt: skip  # special tokens that begin or end a turn


def transcript(text: str) -> list[Turn]:
    """The turns of a text that writes down a conversation, in one of the usual forms; none of any other text.

    It begins with a turn. Only before "### Instruction:" and "USER:" something may stand, which is a system turn. An
    answer follows, or is asked for, but where the marks are special tokens.
    """
    text = _bare(text) or ""
    if text.startswith("[INST]"):
        found = (match.group(role) for match in BRACKETS.finditer(text) for role in ("system", "user", "assistant"))
        sides = itertools.cycle(("system", "user", "assistant"))
        return [Turn(role, kept) for role, said in zip(sides, found, strict=False) if (kept := _bare(said))]
    for form in (TAGS, HEADINGS, LINES, CAPITALS):
        marks = [mark for mark in form.finditer(text) if speaker(mark[mark.lastindex])]
        roles = [speaker(mark[mark.lastindex]) for mark in marks]
        if "user" not in roles or (form is not TAGS and "assistant" not in roles[roles.index("user") :]):
            continue
        before = _bare(text[: marks[0].start()])
        if before and not (form is CAPITALS or marks[0][1] == "Instruction"):
            continue
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        turns = [Turn("system", before)] if before else []
        for role, mark, end in zip(roles, marks, ends, strict=True):
            said = _bare(text[mark.end() : end])
            if said and turns and turns[-1].role == role:  # an instruction and its input
                turns[-1] = Turn(role, f"{turns[-1].text}\n\n{said}")
            elif said:
                turns.append(Turn(role, said))
        return turns if any(turn.role == "user" for turn in turns) else []
    return []


def _bare(said: str | None) -> str | None:
    """What is said, without the special tokens around it."""
    said = (said or "").strip()
    while token := next((token for token in AROUND if said.startswith(token)), None):
        said = said.removeprefix(token).lstrip()
    while token := next((token for token in AROUND if said.endswith(token)), None):
        said = said.removesuffix(token).rstrip()
    return text_of(said)

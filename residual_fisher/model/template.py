"""Chat templates: what a model reads of a conversation."""

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from residual_fisher.common.conversations import Turn
from residual_fisher.common.program import UserError
from residual_fisher.common.text import excerpt, first_line

# The time that chat templates are given: some state the date or the hour, and results must not change overnight.
FIXED_TIME = datetime(2024, 7, 26)


def render(tokenizer, text: str, before: Sequence[Turn] = ()) -> str:
    """A user's text in the tokenizer's chat template, after the turns `before`, at FIXED_TIME.

    Raises:
        UserError: the template is malformed, raises, or renders nothing.
    """
    return render_turns(tokenizer, [*before, Turn("user", text)])


def render_turns(tokenizer, turns: Sequence[Turn]) -> str:
    """A conversation in the tokenizer's chat template, at FIXED_TIME; with the beginning of an answer if it lacks one.

    Raises:
        UserError: see `render`.
    """
    rendered = _render(tokenizer, [turn.message for turn in turns], habits(tokenizer).in_parts)
    if not rendered.strip():
        raise UserError(f"{_template_of(tokenizer)} renders nothing")
    return rendered


def _render(tokenizer, messages: list[dict], in_parts: bool = False) -> str:
    if in_parts:
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        template = tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            messages,
            chat_template=FIXED_CLOCK + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=messages[-1]["role"] != "assistant",
            date_string=FIXED_TIME.strftime("%d %b %Y"),
        )
    except Exception as error:  # a template is a program that came with the model
        raise UserError(f"{_template_of(tokenizer)} fails: {excerpt(first_line(error), 200)}") from error


class Habits(NamedTuple):
    """What a chat template does with messages."""

    in_parts: bool  # it writes a text only if it is a list of parts
    takes_system: bool  # it writes a system turn


def habits(tokenizer) -> Habits:
    """Tried out, once for each template."""
    return _habits(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _habits(tokenizer, template: str) -> Habits:
    def writes(role: str, in_parts: bool) -> bool:
        """Whether two texts of a role make a difference."""
        said = [[{"role": role, "content": text}, {"role": "user", "content": "Go on."}] for text in ("yes", "no")]
        try:
            first, second = (_render(tokenizer, turns[: 1 if role == "user" else 2], in_parts) for turns in said)
        except UserError:
            return False
        return first != second

    in_parts = not writes("user", False) and writes("user", True)
    return Habits(in_parts, writes("system", in_parts))


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

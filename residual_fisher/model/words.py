"""Directions of the residual stream in words: the tokens that they raise and lower, written so that they can be read.

An eigenvalue of F is a sum over tokens, lambda = v^T F v = sum_t p_t (g_t v)^2, of which each token has a share. The
sign of its slope g_t v = d log p_t / ds says whether it gains or loses along v.

What is returned here may run beside another thread that tokenizes with the same tokenizer.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import lru_cache
import re
from typing import NamedTuple
import unicodedata

import torch
from torch import Tensor

from residual_fisher.common.program import UserError

TOKENS_RECORDED = 8  # of each direction

# How byte-level tokenizers (GPT-2's, and most since) write bytes: printable ones as they are, the others from 256 on.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
_BYTES = {chr(byte): byte for byte in _PLAIN} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
SPACE = "·"


class TokenShares(NamedTuple):
    """The tokens with the largest shares of each direction's curvature u^T F u, the largest first."""

    ids: Tensor  # (..., n, tokens) int64
    shares: Tensor  # (..., n, tokens): those of all counted tokens sum to 1, or are 0 if the curvature is
    slopes: Tensor  # (..., n, tokens): d log p_t along u, nats per unit
    positions: Tensor | None = None  # (..., n, tokens) int64, in the answer, if F is of one

    def records(self, place: tuple[int, ...], write: Callable[[int], str]) -> list[list[dict]]:
        """JSON-ready records of each direction at one index of "..."; tokens without a share are left out."""

        def record(id_: int, share: float, slope: float, position: int | None = None) -> dict:
            where = {} if position is None else {"position": position}
            return {"token": write(id_), "id": id_, **where, "share": share, "slope": slope}

        directions = zip(*(part[place].tolist() for part in self if part is not None), strict=True)
        return [[record(*token) for token in zip(*parts, strict=True) if token[1] > 0] for parts in directions]


def token_shares(
    slopes: Tensor,
    p: Tensor,
    tokens: Tensor | None = None,
    num: int = TOKENS_RECORDED,
    positions: Tensor | None = None,
) -> TokenShares:
    """The `num` tokens with the largest shares p_t slope_t^2 of each direction's curvature.

    Of the tokens that F counts: `slopes` (..., n, k), probabilities `p`, ids `tokens` and `positions` in an answer, all
    (..., k). Without `tokens`: all ids.
    """

    def of_largest(values: Tensor) -> Tensor:
        return values[..., None, :].expand(parts.shape).gather(-1, at)

    parts = p[..., None, :] * slopes**2  # (..., n, k)
    largest, at = parts.topk(min(num, parts.shape[-1]))
    shares = largest / parts.sum(-1, keepdim=True).clamp(min=torch.finfo(parts.dtype).tiny)
    ids = at if tokens is None else of_largest(tokens)
    return TokenShares(ids, shares, slopes.gather(-1, at), None if positions is None else of_largest(positions))


def token_writer(tokenizer) -> Callable[[int], str]:
    """Writes a token, given its id, so that no two different texts look alike: "·animals", "\\n", "\\xe2" (half a
    character).

    A space is written as a middle dot. The backslash and all other characters that do not print are escaped, and so
    is a combining mark at the beginning, which would print on the character before it.
    """

    def write(token: int) -> str:
        try:
            piece = tokenizer.convert_ids_to_tokens(token)  # as the vocabulary spells it
        except (IndexError, KeyError):  # raised by tokenizers written in Python
            piece = None
        if not piece:  # heads are often padded to a round number of rows
            return f"<{token}>"
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False) or piece
        if "\ufffd" in text:  # part of a character
            known = all(character in _BYTES for character in piece)
            text = bytes(map(_BYTES.get, piece)).decode("utf-8", "surrogateescape") if known else piece
        elif piece.startswith("▁"):  # decoding a single token drops its first space
            text = piece.replace("▁", " ")
        first = _escaped(text[0]) if unicodedata.category(text[0]).startswith("M") else _written(text[0])
        return first + "".join(map(_written, text[1:]))

    return write


def token_of(tokenizer, text: str, option: str = "") -> int:
    """The one token of `text`, preferably after a space, as a word of its own. `option` names it in the error.

    Raises:
        UserError: `text` is no token, or several.
    """
    # a tokenizer that adds a space itself makes two tokens of the first
    found = [tokenizer(spelling, add_special_tokens=False)["input_ids"] for spelling in (f" {text}", text)]
    if single := [ids[0] for ids in found if len(ids) == 1]:
        return single[0]
    pieces = " ".join(map(token_writer(tokenizer), found[0]))
    raise UserError(f"{option}{text!r} has to be one token, and is {len(found[0])}: {pieces}")


def _written(character: str) -> str:
    if character == " ":
        return SPACE
    return character if character.isprintable() and character not in ("\\", SPACE) else _escaped(character)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of an incomplete character
        return f"\\x{code - 0xDC00:02x}"
    # not "\\x..", which is a byte
    return f"\\u{code:04x}" if 0x80 <= code <= 0xFF else character.encode("unicode_escape").decode()


def prompt_words_test(tokenizer, write: Callable[[int], str]) -> Callable[[str, Sequence[str]], list[bool]]:
    """A test of which written tokens a prompt contains; answers often begin with words of the question.

    A prompt contains a token if this tokenizer splits one of its words, capitalised or not and after a space or not, so
    that it begins with the token. It also contains a token that is not ASCII and occurs in its text, since some scripts
    put no spaces between words.
    """
    # Encoding sets a tokenizer's truncation and padding first, which another thread may be using.
    tokenizer = deepcopy(tokenizer)

    @lru_cache(maxsize=1 << 16)
    def beginnings(word: str) -> frozenset[str]:
        forms = {word, word[:1].upper() + word[1:]}
        pieces = [tokenizer.encode(form, add_special_tokens=False) for word in forms for form in (word, f" {word}")]
        texts = (next((text for id_ in ids if (text := write(id_).strip(SPACE))), None) for ids in pieces)
        return frozenset(text for text in texts if text)

    def contained(prompt: str, tokens: Sequence[str]) -> list[bool]:
        texts = [token.strip(SPACE) for token in tokens]
        # Splitting a word takes long, so only words that one of the tokens may begin are split.
        letters = tuple(_first_letters(text) for text in texts if text)
        parts = any(PART_OF_CHARACTER.match(text) for text in texts)
        words = (
            word
            for word in set(re.findall(r"\w+", prompt))
            if _folded(word).startswith(letters) or (parts and not word.isascii())
        )
        first = frozenset().union(*map(beginnings, words))
        return [text in first or (text != "" and not text.isascii() and text in prompt) for text in texts]

    return contained


PART_OF_CHARACTER = re.compile(r"\\[xu]|<0x")  # as `token_writer` writes it
UNKNOWN = re.compile(r"<(?!0x).+>|\[.+\]")  # what a vocabulary without bytes has in place of a word, as <unk>


def _folded(text: str) -> str:
    """A text without what a tokenizer may change of it: case, accents, and forms of the same character."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKD", text.upper()).casefold()
    return "".join(character for character in text if not unicodedata.combining(character))


def _first_letters(text: str) -> str:
    """What a word begins with, folded, if this written token may begin it; nothing if any word may."""
    return "" if UNKNOWN.fullmatch(text) else re.match(r"\w+|.?", _folded(text))[0]


def summary_line(tokens: list[dict], num: int = 3) -> str:
    """The tokens that a direction moves most, "lost ← → gained" along +v, from its record."""
    sides = ([t["token"] for t in tokens if sign * t["slope"] > 0][:num] for sign in (-1, 1))
    return " ← → ".join(" ".join(side) or "-" for side in sides)


def prompt_tokens(tokenizer, text: str) -> list[int]:
    """The tokens of a text, with the special tokens that the tokenizer puts in front.

    Those that it puts behind (end of sequence) are left out: the next token would begin another text.

    Raises:
        UserError: it puts special tokens into a text.
    """
    special, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    if not bare:
        return []
    starts = range(len(special) - len(bare) + 1)
    start = next((start for start in starts if special[start : start + len(bare)] == bare), None)
    if start is None:
        raise UserError(f"{tokenizer.name_or_path} is not supported: its tokenizer puts special tokens into a text")
    return special[: start + len(bare)]

"""What directions of the residual stream say: the tokens that they raise and lower, written so that a reader sees them.

An eigenvalue of F is a sum over tokens, lambda = v^T F v = sum_t p_t (g_t v)^2: each token has a share of it, and the
sign of its slope g_t v = d log p_t / ds says whether it gains or loses along v.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
import re
from typing import NamedTuple
import unicodedata

import torch
from torch import Tensor

TOKENS_RECORDED = 8  # tokens recorded for a direction

# How byte-level tokenizers (GPT-2's, and most since) write bytes: printable ones as they are, the others from 256 on.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
_BYTES = {chr(byte): byte for byte in _PLAIN} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
SPACE = "·"


class TokenShares(NamedTuple):
    """The tokens with the largest shares of each direction's curvature u^T F u, the largest first."""

    ids: Tensor  # (..., n, said) int64
    shares: Tensor  # (..., n, said): all counted tokens' sum to 1, or are 0 where F has no curvature
    slopes: Tensor  # (..., n, said): d log p_t along u, nats per unit

    def records(self, place: tuple[int, ...], show: Callable[[int], str]) -> list[list[dict]]:
        """Of each direction at one place of "...", as they are written to JSON; without tokens that have no share."""
        columns = zip(*(part[place].tolist() for part in self), strict=True)
        return [
            [
                {"token": show(token), "id": token, "share": share, "slope": slope}
                for token, share, slope in zip(*direction, strict=True)
                if share > 0
            ]
            for direction in columns
        ]


def token_shares(slopes: Tensor, p: Tensor, tokens: Tensor | None = None, num: int = TOKENS_RECORDED) -> TokenShares:
    """
    Args:
        slopes: (..., n, k), of the tokens that F counts.
        p: (..., k), their probabilities.
        tokens: (..., k) int64, which they are; None for the whole vocabulary.
    """
    parts = p[..., None, :] * slopes**2
    largest, at = parts.topk(min(num, parts.shape[-1]))
    shares = largest / parts.sum(-1, keepdim=True).clamp(min=torch.finfo(parts.dtype).tiny)
    ids = at if tokens is None else tokens[..., None, :].expand(parts.shape).gather(-1, at)
    return TokenShares(ids, shares, slopes.gather(-1, at))


def token_writer(tokenizer) -> Callable[[int], str]:
    """Writes tokens by id so that no two of different text look alike: "·animals", "\\n", "\\xe2" (half a character).

    A space is a middle dot; everything else that does not print, and the backslash, is an escape. So is a mark at the
    beginning, which would print on what stands before it.
    """

    def show(token: int) -> str:
        piece = _piece(tokenizer, token)
        if not piece:  # heads are often padded to a round number of rows
            return f"<{token}>"
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False) or piece
        if "\ufffd" in text:  # part of a character
            known = all(character in _BYTES for character in piece)
            text = bytes(map(_BYTES.get, piece)).decode("utf-8", "surrogateescape") if known else piece
        elif piece.startswith("▁"):  # decoding a single token drops its first space
            text = piece.replace("▁", " ")
        is_mark = unicodedata.category(text[0]).startswith("M")
        return (_escaped(text[0]) if is_mark else _written(text[0])) + "".join(map(_written, text[1:]))

    return show


def _piece(tokenizer, token: int) -> str | None:
    """How the vocabulary writes a token; None if it has none of this id."""
    try:
        return tokenizer.convert_ids_to_tokens(token)
    except (IndexError, KeyError):  # what tokenizers written in Python do
        return None


def _written(character: str) -> str:
    if character == " ":
        return SPACE
    return character if character.isprintable() and character not in ("\\", SPACE) else _escaped(character)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that belongs to no whole character
        return f"\\x{code - 0xDC00:02x}"
    # the whole character of such a code is not that byte
    return f"\\u{code:04x}" if 0x80 <= code <= 0xFF else character.encode("unicode_escape").decode()


def prompt_words_test(tokenizer, show: Callable[[int], str]) -> Callable[[str, Sequence[str]], list[bool]]:
    """Tells which tokens, as they are shown, a prompt holds: answers often begin with a question's words.

    A token is in a prompt if a word there begins with it, as this tokenizer splits it, whether with a large letter, a
    space before it or without; or if its text is there and is not ASCII, since some scripts put no spaces.
    """

    @lru_cache(maxsize=1 << 16)
    def beginnings(word: str) -> frozenset[str]:
        forms = {word, word[:1].upper() + word[1:]}
        pieces = [tokenizer.encode(form, add_special_tokens=False) for word in forms for form in (word, f" {word}")]
        texts = (next((text for id_ in ids if (text := show(id_).strip(SPACE))), None) for ids in pieces)
        return frozenset(text for text in texts if text)

    def found(prompt: str, tokens: Sequence[str]) -> list[bool]:
        first = frozenset().union(*map(beginnings, set(re.findall(r"\w+", prompt))))
        texts = [token.strip(SPACE) for token in tokens]
        return [text in first or (text != "" and not text.isascii() and text in prompt) for text in texts]

    return found


def summary_line(said: list[dict], num: int = 3) -> str:
    """The tokens that one direction moves most, "lost ← → gained" along +v; they hold no spaces themselves."""
    sides = ([t["token"] for t in said if sign * t["slope"] > 0][:num] for sign in (-1, 1))
    return " ← → ".join(" ".join(side) or "-" for side in sides)

"""Sentences that contain the target word: reads them, chooses diverse ones, finds the token of the word."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np
import scipy.sparse

from residual_fisher.common.program import UserError
from residual_fisher.common.rows import parse_json, read_column, read_rows, text_of
from residual_fisher.common.text import excerpt, first_line
from residual_fisher.common.trigrams import trigrams
from residual_fisher.model.words import token_writer

TEXT_COLUMNS = ("text", "sentence", "content")  # recognised without --text-column, in this order
CANDIDATES = 2000  # sentences with the word after which reading stops, unless more are wanted: enough to choose from
SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))\s+|\n+""")


# --- reading -------------------------------------------------------------------------------------


class Matches(NamedTuple):
    """The sentences that contain a word."""

    sentences: list[str]  # in the order of the source, without duplicates
    read: int  # number of sentences read to find them


def find_sentences(
    source: str,
    word: str,
    text_column: str | None = None,
    config: str | None = None,
    split: str = "train",
    num: int = 0,
) -> Matches:
    """The sentences of a file or hub dataset that contain `word`.

    Args:
        source: a .json file {word: [sentences]}, a .txt file with one sentence a line, a .jsonl, .csv or .parquet file,
            or the name of a hub dataset (streamed).
        text_column, config, split: column, configuration and split of a dataset.
        num: number of sentences wanted; reading stops at CANDIDATES of them, or at `num` if that is more.
    Raises:
        UserError: unreadable, malformed or empty source, or no sentence with the word.
    """
    found, read = {}, 0
    for text in _texts(source, word, text_column, config, split):
        read += 1
        if next(find_word(text, word), None) is not None:
            found[" ".join(text.split())] = None
        if len(found) == max(CANDIDATES, num):
            break
    if not read:
        raise UserError(f"{source} holds no sentences")
    if not found:
        raise UserError(f"none of the {read} sentences of {source} has {word!r} as a whole word after another word")
    return Matches(list(found), read)


def _texts(source: str, word: str, column: str | None, config: str | None, split: str) -> Iterator[str]:
    """The sentences of a source, without blank ones."""
    suffix, name = Path(source).suffix.lower(), None
    if suffix == ".json":
        texts = map(text_of, _json_list(Path(source), word))
    else:
        rows, read = read_rows(source, split, config), lambda _, cell: text_of(cell)
        name, texts = read_column(source, rows, column, TEXT_COLUMNS, "--text-column", read)
    one_each = suffix in (".json", ".txt")  # each text is one sentence
    found = False
    for text in filter(None, texts):
        found = True
        yield from filter(str.strip, [text] if one_each else SENTENCE_END.split(text))
    if name is not None and not found:
        raise UserError(f"{source} holds no sentences: no text in the column {excerpt(repr(name), 100)}")


def _json_list(path: Path, word: str) -> list[str]:
    try:
        data = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f'{path} should hold {{"{word}": [sentences]}}, but its top level is no object')
    if word not in data:
        has = excerpt(", ".join(map(repr, data)), 200) or "none"
        raise UserError(f"{path} has no list for the target word {word!r}; it has {has}")
    if not isinstance(data[word], list) or not all(isinstance(s, str) for s in data[word]):
        raise UserError(f"{path} should hold a list of strings under {word!r}")
    return data[word]


# --- choosing ------------------------------------------------------------------------------------


def diverse_order(texts: Sequence[str]) -> Iterator[int]:
    """Indices of `texts` in farthest-point order: each next one is farthest from all before it (Gonzalez, 1985).

    The distance of two texts is 1 - cosine of their counts of lower-cased character trigrams. The first is the most
    typical text, nearest to the mean. Ties go to the lower index, so the order is a function of the texts alone. Texts
    equal to an earlier one are left out.
    """
    counts = _trigrams(texts)
    by_trigram = counts.T.tocsr()
    norms = np.sqrt(counts.multiply(counts).sum(axis=1))

    def cosines(index: int) -> np.ndarray:  # products of integers: ties are exact
        return (counts[[index]] @ by_trigram).toarray()[0] / (norms * norms[index])

    chosen = int((counts @ (by_trigram @ (1 / norms)) / norms).argmax())
    nearest = np.full(len(texts), np.inf)
    while True:
        yield chosen
        nearest = np.minimum(nearest, 1 - cosines(chosen))
        nearest[chosen] = -np.inf
        chosen = int(nearest.argmax())
        if nearest[chosen] < 1e-6:
            return


def _trigrams(texts: Sequence[str]) -> scipy.sparse.csr_array:
    """Counts of character trigrams, (texts, distinct trigrams); sparse, since a text has few of them."""
    grams = [*map(trigrams, texts)]
    distinct, column = np.unique(np.concatenate(grams), return_inverse=True)
    row = np.repeat(np.arange(len(texts)), [len(part) for part in grams])
    ones = np.ones(len(row))
    return scipy.sparse.csr_array(scipy.sparse.coo_array((ones, (row, column)), shape=(len(texts), len(distinct))))


# --- finding the word ----------------------------------------------------------------------------


def find_word(text: str, word: str) -> Iterator[int]:
    """Character offsets of `word` in `text`: as a whole word, ignoring case, after at least one other word."""
    for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE):
        if re.search(r"\w", text[: match.start()]):
            yield match.start()


@dataclass(frozen=True)
class Context:
    """A sentence cut just before its target word: the prompt, and the token to predict."""

    sentence: str
    prompt: str  # the sentence up to the target word
    ids: list[int]  # the prompt's tokens, cut from those of the sentence
    target_id: int  # the next token: the first one of the target word
    steer_id: int | None = None  # token that steering raises; None for target_id

    @property
    def position(self) -> int:
        """Index of the prompt's last token, where the residual stream is read and perturbed."""
        return len(self.ids) - 1


def locate(tokenizer, sentence: str, word: str) -> Context | None:
    """The context of the first occurrence of `word` with a token before it; None if there is none.

    Tokens are matched by character offsets, never by their text. Byte-level tokenizers write a space as Ġ,
    SentencePiece as ▁. A word may be several tokens, share one with the bracket before it, or be dropped.
    """
    encoded = tokenizer(sentence, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    for start in find_word(sentence, word):
        of_word = (i for i, (begin, end) in enumerate(offsets) if begin < start + len(word) and end > max(start, begin))
        index = next(of_word, None)
        if index is not None and any(end > begin for begin, end in offsets[:index]):
            return Context(sentence, sentence[:start].rstrip(), ids[:index], ids[index])
    return None


def token_of(tokenizer, text: str) -> int:
    """The one token of `text`, preferably after a space, as a word of its own.

    Raises:
        UserError: `text` is no token, or several.
    """
    # a tokenizer that adds a space itself makes two tokens of the first
    found = [tokenizer(spelling, add_special_tokens=False)["input_ids"] for spelling in (f" {text}", text)]
    if single := [ids[0] for ids in found if len(ids) == 1]:
        return single[0]
    pieces = " ".join(map(token_writer(tokenizer), found[0]))
    raise UserError(f"--steer-token {text!r} has to be one token, and is {len(found[0])}: {pieces}")

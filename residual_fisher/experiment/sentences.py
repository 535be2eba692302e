"""Sentences that contain the target word: reading them, choosing diverse ones, finding the word's token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np
import scipy.sparse

from residual_fisher.common.program import UserError
from residual_fisher.common.rows import JUDGED, choose_column, parse_json, read_rows, text_of
from residual_fisher.common.text import excerpt, first_line
from residual_fisher.model.words import shown_by
=======
from residual_fisher.model.words import token_writer
from residual_fisher.model.words import token_writer

TEXT_COLUMNS = ("text", "sentence", "content")  # recognised when --text-column is not given
# Enough to choose from: a dataset is read until it has given so many sentences with the word, or as many as are wanted.
CANDIDATES = 2000
SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))\s+|\n+""")


# --- reading -------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The sentences that contain a word, in order, none twice."""

    sentences: list[str]
    read: int  # how many sentences they were found among


def find_sentences(
    source: str,
    word: str,
    text_column: str | None = None,
    config: str | None = None,
    split: str = "train",
    num: int = 0,
) -> Found:
    """The sentences of a file or hub dataset that contain `word`.

    Args:
        source: a .json file {word: [sentences]}, a .txt file with a sentence a line, a .jsonl, .csv or
            .parquet file, or the name of a dataset on the hub (streamed).
        text_column, config, split: which part of a dataset to read.
        num: how many are wanted; of more than CANDIDATES, only so many are read.
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
    return Found(list(found), read)


def read_sentences(*source, **options) -> list[str]:
    """The sentences that `find_sentences` finds."""
    return find_sentences(*source, **options).sentences


def _texts(source: str, word: str, column: str | None, config: str | None, split: str) -> Iterator[str]:
    """The sentences of a source, without blank ones."""
    ending = Path(source).suffix.lower()
    cells = _json_list(Path(source), word) if ending == ".json" else _column(source, column, config, split)
    whole = ending in (".json", ".txt")  # each text is a sentence
    for text in filter(None, map(text_of, cells)):
        yield from filter(str.strip, [text] if whole else SENTENCE_END.split(text))


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


def _column(source: str, asked: str | None, config: str | None, split: str) -> Iterator:
    """The cells of the column that holds the texts.

    Raises:
        UserError: there is none, or no text in it.
    """
    rows = read_rows(source, split, config)
    first = list(islice(rows, JUDGED))
    if not first:
        return
    column = choose_column(source, first, asked, TEXT_COLUMNS, "--text-column", lambda _, cell: text_of(cell))
    texts = 0
    for row in chain(first, rows):
        texts += text_of(row.get(column)) is not None
        yield row.get(column)
    if not texts:
        raise UserError(f"{source} holds no sentences: no text in the column {excerpt(repr(column), 100)}")


# --- choosing ------------------------------------------------------------------------------------


def diverse_order(texts: Sequence[str]) -> Iterator[int]:
    """Indices of `texts`, each next one the farthest from all before it (Gonzalez, 1985).

    The distance of two texts is 1 - cosine of their counts of character trigrams, lower-cased. The
    first is the most typical, the nearest to the mean. Ties go to the lower index, so the order is
    a function of the texts alone; texts equal to an earlier one are left out.
    """
    counts = _trigrams(texts)
    by_trigram = counts.T.tocsr()
    norms = np.sqrt(counts.multiply(counts).sum(axis=1))

    def cosines(index: int) -> np.ndarray:  # the products are of whole numbers, so that ties are exact
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
    """Counts of character trigrams, (texts, distinct trigrams); sparse: long texts have few in common."""
    grams = []
    for text in texts:
        codes = np.frombuffer(f" {text.lower()} ".encode("utf-32-le"), dtype="<u4").astype(np.int64)
        grams.append(codes[:-2] << 42 | codes[1:-1] << 21 | codes[2:])  # a character has 21 bits
    distinct, column = np.unique(np.concatenate(grams), return_inverse=True)
    row = np.repeat(np.arange(len(texts)), [len(part) for part in grams])
    ones = np.ones(len(row))
    return scipy.sparse.csr_array(scipy.sparse.coo_array((ones, (row, column)), shape=(len(texts), len(distinct))))


# --- finding the word ----------------------------------------------------------------------------


def find_word(text: str, word: str) -> Iterator[int]:
    """Where `word` begins in `text` as a whole word, in any case, with another word before it."""
    for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE):
        if re.search(r"\w", text[: match.start()]):
            yield match.start()


@dataclass(frozen=True)
class Context:
    """A sentence cut just before its target word: what the model reads, and what it should predict."""

    sentence: str
    prompt: str  # the sentence up to the target word
    ids: list[int]  # the prompt's tokens, as they stand in the tokenized sentence
    target_id: int  # the next token: the first of the target word
    steer_id: int | None = None  # the token that steering raises, if it is another

    @property
    def position(self) -> int:
        """Index of the prompt's last token, the one whose residual stream is read and perturbed."""
        return len(self.ids) - 1


def locate(tokenizer, sentence: str, word: str) -> Context | None:
    """The sentence's first occurrence of `word` that has a token before it, or None.

    Tokens are matched by character offsets, never by their text: byte-level tokenizers write a space
    as Ġ, SentencePiece as ▁, and a word may be several tokens or share one with the bracket before it.
    A tokenizer may also drop it.
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
    """The token that `text` is, as a word of its own if there is such a token.

    Raises:
        UserError: it is none, or several.
    """
    written = (f" {text}", text)  # a tokenizer that puts a space before every word makes two of the first
    found = [tokenizer(words, add_special_tokens=False)["input_ids"] for words in written]
    for ids in found:
        if len(ids) == 1:
            return ids[0]
    pieces = " ".join(map(token_writer(tokenizer), found[0]))
    raise UserError(f"--steer-token {text!r} has to be one token, and is {len(found[0])}: {pieces}")

"""Sentences that contain the target word: reading them, choosing diverse ones, finding the word's token."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
import json
from pathlib import Path
import re

import numpy as np

from common.command_line import UserError
from common.rows import read_rows

TABLES = (".jsonl", ".csv", ".parquet")
TEXT_COLUMNS = ("text", "sentence", "content")  # recognised when --text-column is not given
# Enough to choose from; a data set is read until so many sentences with the word have been found.
MAX_CANDIDATES = 2000
SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))\s+|\n+""")


# --- reading -------------------------------------------------------------------------------------


def read_sentences(
    source: str, word: str, text_column: str | None = None, config: str | None = None, split: str = "train"
) -> list[str]:
    """The sentences of a file or hub dataset that contain `word`, in order, none twice.

    Args:
        source: a .json file {word: [sentences]}, a .txt file with a sentence a line, a .jsonl, .csv or
            .parquet file, or the name of a dataset on the hub (streamed).
        text_column, config, split: which part of a dataset to read.
    Raises:
        UserError: unreadable, malformed or empty source, or no sentence with the word.
    """
    path = Path(source)
    if path.suffix.lower() == ".json":
        texts = _json_texts(path, word)
    elif path.suffix.lower() == ".txt":
        texts = _read(path).splitlines()
    elif path.suffix.lower() in TABLES or not path.exists():
        texts = _dataset_texts(source, text_column, config, split)
        texts = (sentence for text in texts for sentence in SENTENCE_END.split(text))
    else:
        raise UserError(f"cannot read {source}: give a .json, .txt, .jsonl, .csv or .parquet file")

    found, read = {}, 0
    for text in texts:
        read += 1
        if next(find_word(text, word), None) is not None:
            found[" ".join(text.split())] = None
        if len(found) == MAX_CANDIDATES:
            break
    if not read:
        raise UserError(f"{source} holds no sentences")
    if not found:
        raise UserError(f"none of the {read} sentences of {source} has {word!r} as a whole word after another word")
    return list(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from error


def _json_texts(path: Path, word: str) -> list[str]:
    try:
        data = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f'{path} should hold {{"{word}": [sentences]}}, but its top level is no object')
    if word not in data:
        raise UserError(
            f"{path} has no list for the target word {word!r}; it has {', '.join(map(repr, data)) or 'none'}"
        )
    if not isinstance(data[word], list) or not all(isinstance(s, str) for s in data[word]):
        raise UserError(f"{path} should hold a list of strings under {word!r}")
    return data[word]


def _dataset_texts(source: str, column: str | None, config: str | None, split: str) -> Iterator[str]:
    for row in read_rows(source, split, config):
        column = column or next((c for c in TEXT_COLUMNS if c in row), None)
        if column not in row:
            raise UserError(f"choose the column of {source} with --text-column: {', '.join(map(str, row))}")
        if isinstance(row[column], str):
            yield row[column]


# --- choosing ------------------------------------------------------------------------------------


def diverse_order(texts: Sequence[str]) -> Iterator[int]:
    """Indices of `texts`, each next one the farthest from all before it (Gonzalez, 1985).

    The distance of two texts is 1 - cosine of their counts of character trigrams, lower-cased. The
    first is the most typical, the nearest to the mean. Ties go to the lower index, so the order is
    a function of the texts alone; texts equal to an earlier one are left out.
    """
    vectors = _trigrams(texts)
    chosen = int((vectors @ vectors.mean(axis=0)).argmax())
    nearest = np.full(len(texts), np.inf)
    while True:
        yield chosen
        nearest = np.minimum(nearest, 1 - vectors @ vectors[chosen])
        nearest[chosen] = -np.inf
        chosen = int(nearest.argmax())
        if nearest[chosen] < 1e-6:
            return


def _trigrams(texts: Iterable[str]) -> np.ndarray:
    """Unit vectors of trigram counts, (texts, distinct trigrams) float32."""
    counts = []
    for text in texts:
        text = f" {text.lower()} "
        counts.append(Counter(text[i : i + 3] for i in range(len(text) - 2)))
    column = {gram: i for i, gram in enumerate(sorted(set().union(*counts)))}
    vectors = np.zeros((len(counts), len(column)), dtype=np.float32)
    for row, count in enumerate(counts):
        vectors[row, [column[gram] for gram in count]] = list(count.values())
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


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

    @property
    def position(self) -> int:
        """Index of the prompt's last token, the one whose residual stream is read and perturbed."""
        return len(self.ids) - 1


def locate(tokenizer, sentence: str, word: str) -> Context | None:
    """The sentence's first occurrence of `word` that has a token before it, or None.

    Tokens are matched by character offsets, never by their text: byte-level tokenizers write a space
    as Ġ, SentencePiece as ▁, and a word may be several tokens or share one with the bracket before it.
    """
    encoded = tokenizer(sentence, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    for start in find_word(sentence, word):
        index = next(i for i, (begin, end) in enumerate(offsets) if end > max(start, begin))
        if any(end > begin for begin, end in offsets[:index]):
            return Context(sentence, sentence[:start].rstrip(), ids[:index], ids[index])
    return None

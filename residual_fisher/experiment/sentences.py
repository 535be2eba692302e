"""Sentences that contain the target word: reads them, chooses diverse ones, finds the token of the word."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
import difflib
from itertools import accumulate, groupby, islice
import math
import re
from typing import NamedTuple
import warnings

import numpy as np
import scipy.sparse

from residual_fisher.common.program import UserError
from residual_fisher.common.rows import open_table, read_rows, text_of
from residual_fisher.common.sources import Source, ending_of, files_of, name_of
from residual_fisher.common.text import excerpt
from residual_fisher.common.trigrams import trigrams
from residual_fisher.experiment.splitting import split_sentences
from residual_fisher.model.words import prompt_tokens

TEXT_COLUMNS = ("text", "sentence", "content", "sentences", "document", "article", "passage")  # in this order
CANDIDATES = 2000  # sentences with the word after which reading stops, unless more are wanted: enough to choose from
LINES = 1000  # of a text file that are looked at together, for where they were wrapped
LONG = 400  # characters of a sentence, which few have
MOST_WORDS = 50_000  # words remembered, to name those like one that is not found
# Letters of scripts that put no spaces between words: Thai, Lao, Khmer, Japanese, Chinese
UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


# --- reading -------------------------------------------------------------------------------------


class Matches(NamedTuple):
    """The sentences that contain a word."""

    sentences: list[str]  # in the order of the source, without duplicates
    read: int  # number of sentences read to find them
    lines: dict[str, int]  # by sentence, the line of the source on which it begins, from 1, where it is known


def find_sentences(
    source: Source,
    word: str,
    text_column: str | None = None,
    config: str | None = None,
    split: str = "train",
    num: int = 0,
    occurrence: int | str = 1,
) -> Matches:
    """The sentences of files or of a hub dataset that contain `word`.

    Args:
        source: see `rows.read_rows`; or a .json file {word: [sentences]}. All other texts are cut into sentences.
        text_column, config, split: column, configuration and split of a dataset.
        num: number of sentences wanted; reading stops at CANDIDATES of them, or at `num` if that is more.
        occurrence: of the word, see `locate`: sentences that have fewer are left out.
    Raises:
        UserError: unreadable, malformed or empty source, or no sentence with the word.
    """
    found, words, read, least = {}, set(), 0, 1 if occurrence == "last" else occurrence
    for text, line in _sentences(source, word, text_column, config, split):
        read += 1
        if sum(1 for _ in islice(find_word(text, word), least)) == least:
            found.setdefault(" ".join(text.split()), line)
        elif not found and len(words) < MOST_WORDS:
            words.update(re.findall(r"\w+", text.lower()))
        if len(found) == max(CANDIDATES, num):
            break
    name = name_of(source)
    if not read:
        raise UserError(f"{name} holds no sentences")
    if not found:
        near = ", ".join(map(repr, difflib.get_close_matches(word.lower(), sorted(words), 3, 0.75)))
        hint = f"; did you mean {near}?" if near and word.lower() not in words else ""
        times = f" {least} times" if least > 1 else ""
        what = f"{word!r} as a whole word after another word{times}"
        raise UserError(f"none of the {read} sentences of {name} has {what}{excerpt(hint, 200)}")
    if long := sum(len(text) > LONG for text in found):
        longest = max(found, key=len)
        what = f"{long} of {len(found)} sentences with {word!r} have more than {LONG} characters, the longest "
        what += f"{len(longest)}{on_line(found[longest])}"
        warnings.warn(f"{what}: is each a single sentence?", stacklevel=2)
    return Matches(list(found), read, {text: line for text, line in found.items() if line})


def on_line(line: int | None) -> str:
    """Where a sentence is, as messages say it behind the sentence; nothing if it is not known."""
    return f" (line {line})" if line else ""


def _sentences(
    source: Source, word: str, column: str | None, config: str | None, split: str
) -> Iterator[tuple[str, int | None]]:
    """The sentences of a source, without blank ones, and of a single file the line on which each begins."""
    rows, asked = read_rows(source, split, config), [column] if column else []

    def readable(name: str, row: dict) -> bool:
        return any(_texts(row.get(name)))

    table = open_table(source, rows, asked, (word.lower(), *TEXT_COLUMNS), "--text-column", readable)
    if not table.columns:
        return
    name, found, files = table.columns[0], False, files_of(source, split) or [""]
    texts = (([row], text) for row in table.rows for text in _texts(row.get(name)))
    if set(map(ending_of, files)) == {".txt"}:
        texts = _blocks(table.rows)
    as_it_is = str(name).lower() == word.lower()  # a list of sentences
    for rows, text in texts:
        found = True
        for sentence, place in [(text, 0)] if as_it_is else _placed(text, split_sentences(text)):
            row = rows[min(place, len(rows) - 1)]
            yield sentence, getattr(row, "line", None) if len(files) == 1 else None
    if not found:
        raise UserError(f"{name_of(source)} holds no sentences: no text in the column {excerpt(repr(name), 100)}")


def _texts(cell) -> Iterator[str]:
    """The texts of a cell, which may hold a list of them."""
    return filter(None, map(text_of, cell if isinstance(cell, list) else [cell]))


def _blocks(rows: Iterator[dict]) -> Iterator[tuple[list[dict], str]]:
    """Lines without a blank one between them, together: the rows that they are, and their text."""
    for is_text, block in groupby(rows, key=lambda row: bool(row["text"].strip())):
        while is_text and (some := list(islice(block, LINES))):
            yield some, "\n".join(row["text"] for row in some)


def _placed(text: str, sentences: Iterator[str]) -> Iterator[tuple[str, int]]:
    """The sentences of a text, and the number of the line on which each begins, from 0.

    Sentences are all of the text but for white space, so what counts are the other characters before a sentence.
    """
    ends, before = list(accumulate(map(_inked, text.split("\n")))), 0
    for sentence in sentences:
        yield sentence, bisect_right(ends, before)
        before += _inked(sentence)


def _inked(text: str) -> int:
    """How many characters of a text are no white space."""
    return sum(map(len, text.split()))


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
    """Character offsets of `word` in `text`: as a whole word, ignoring case, after at least one other word.

    Where a script puts no spaces between words, any part of a text may be one.
    """
    before, after = ("" if re.match(f"[{UNSPACED}]", end) else r"\w" for end in (word[:1], word[-1:]))
    pattern = (f"(?<!{before})" if before else "") + re.escape(word) + (f"(?!{after})" if after else "")
    for match in re.finditer(pattern, text, re.IGNORECASE):
        if re.search(r"\w", text[: match.start()]):
            yield match.start()


@dataclass(frozen=True)
class Context:
    """A sentence cut just before its target word: the prompt, and the token to predict."""

    sentence: str
    prompt: str  # the sentence up to the target word
    ids: list[int]  # the prompt's tokens, cut from those of the sentence
    target_id: int | None  # the next token: the first one of the target word; None for the model's own prediction
    steer_id: int | None = None  # token that steering raises; None for target_id
    line: int | None = None  # on which the sentence begins in its file, where it is known

    @property
    def position(self) -> int:
        """Index of the prompt's last token, where the residual stream is read and perturbed."""
        return len(self.ids) - 1


def locate(tokenizer, sentence: str, word: str, occurrence: int | str = 1) -> Context | None:
    """The context of an occurrence of `word` with a token before it; None if there is none.

    Args:
        occurrence: 1 for the first such, and so on, or "last".

    Tokens are matched by character offsets, never by their text. Byte-level tokenizers write a space as Ġ,
    SentencePiece as ▁. A word may be several tokens, share one with the bracket before it, or be dropped.
    """
    encoded = tokenizer(sentence, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    found = None
    for start in find_word(sentence, word):
        of_word = (i for i, (begin, end) in enumerate(offsets) if begin < start + len(word) and end > max(start, begin))
        index = next(of_word, None)
        if index is None or not any(end > begin for begin, end in offsets[:index]):
            continue
        found = Context(sentence, sentence[:start].rstrip(), ids[:index], ids[index])
        if occurrence == 1:
            return found
        if occurrence != "last":
            occurrence -= 1
            found = None
    return found


def find_contexts(
    tokenizer, found: Matches, word: str, occurrence: int | str = 1, longest: float = math.inf
) -> list[Context]:
    """The sentences in which the tokenizer lets the word be found, their prompts of at most `longest` tokens.

    Diverse ones come first.

    Raises:
        UserError: there are none.
    """
    located = []
    for text in found.sentences:
        if context := locate(tokenizer, text, word, occurrence):
            located.append(replace(context, line=found.lines.get(text)))
    if not located:
        raise UserError(f"in none of {len(found.sentences)} sentences does a token stand before {word!r}")
    contexts = [context for context in located if len(context.ids) <= longest]
    if not contexts:
        least = min(len(context.ids) for context in located)
        raise UserError(
            f"the model has positions for {longest} tokens, and every sentence has more before {word!r}, {least} at "
            "least: give it shorter ones, or choose another model"
        )
    return [contexts[index] for index in diverse_order([context.prompt for context in contexts])]


def take_prompts(tokenizer, prompts: Sequence[str], longest: float = math.inf) -> list[Context]:
    """The contexts of prompts that are taken as they are, in their order, without a target word.

    Raises:
        UserError: one of them has no token, or more than `longest`.
    """
    contexts = []
    for prompt in prompts:
        ids, said = prompt_tokens(tokenizer, prompt), f"--prompt {excerpt(repr(prompt), 60)}"
        if not ids:
            raise UserError(f"the tokenizer makes no token of {said}")
        if len(ids) > longest:
            raise UserError(f"the model has positions for {longest} tokens, and {said} has {len(ids)}: shorten it")
        contexts.append(Context(prompt, prompt, ids, None))
    return contexts

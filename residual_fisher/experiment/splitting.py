"""Cuts texts into sentences, by rules: those of English, with the marks and the commonest abbreviations of others."""

from collections.abc import Iterator
from itertools import pairwise
import re

CLOSING = r"[\"'”’»)\]）」』】]"
# A mark that may end a sentence, and what closes with it: before white space, or anywhere in scripts without spaces.
MARK = re.compile(rf"(?:[.!?…।۔؟]+{CLOSING}*(?=\s))|(?:[。！？｡]+{CLOSING}*)")
ENDS = re.compile(rf"[.!?…:;。！？｡।۔؟]{CLOSING}*\s*$")
OPENING = "\"'“‘«(["
LINE_BREAK, BLANK_LINE = re.compile(r"\r\n|\r|\n"), re.compile(r"\n\s*\n")
NEAR = 100  # characters on either side of a mark that are looked at

TITLES = {
    "mr", "mrs", "ms", "dr", "prof", "gen", "sen", "rep", "gov", "capt", "cmdr", "lt", "col", "sgt", "maj", "rev",
    "hon", "pres", "messrs", "sra", "dra", "mme", "mlle", "hr", "fr",
}  # fmt: skip  # a name follows
INSIDE = {
    "approx", "ca", "e.g", "eg", "i.e", "ie", "cf", "vs", "viz", "incl", "excl", "resp", "z.b", "d.h", "bzw", "ggf",
    "p.ex", "p.ej",
}  # fmt: skip  # the sentence goes on
BEFORE_NUMBERS = {
    "no", "nos", "nr", "fig", "figs", "eq", "eqs", "vol", "ch", "sec", "art", "p", "pp", "tab", "ref", "refs", "tel",
    "ext", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec",
}  # fmt: skip
# The sentence may end with these: it does if the next word begins a sentence more often than not.
EITHER = {
    "inc", "ltd", "co", "corp", "bros", "jr", "sr", "st", "mt", "ft", "ave", "blvd", "rd", "al", "ed", "eds", "dept",
    "univ", "est", "esq", "ph.d", "nat", "usw", "u.a",
}  # fmt: skip
STARTERS = {
    "a", "after", "all", "an", "and", "as", "at", "but", "by", "did", "do", "does", "even", "every", "finally", "for",
    "from", "he", "her", "here", "his", "how", "however", "i", "if", "in", "is", "it", "its", "many", "most", "my",
    "no", "nobody", "not", "now", "on", "one", "or", "our", "she", "since", "so", "some", "that", "the", "their",
    "then", "there", "these", "they", "this", "those", "to", "two", "we", "what", "when", "where", "which", "while",
    "who", "why", "with", "yes", "yet", "you", "your",
}  # fmt: skip
ACRONYM = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")  # U.S
TIMES = {"a.m", "p.m", "etc"}


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a text, without the white space around them.

    A line is a paragraph; but lines that are the wrapped lines of one paragraph are joined.
    """
    for paragraph in _paragraphs(text):
        cased, start = any(map(str.isupper, paragraph)), 0
        for mark in MARK.finditer(paragraph):
            if _is_end(paragraph, start, mark, cased):
                yield paragraph[start : mark.end()].strip()
                start = mark.end()
        if rest := paragraph[start:].strip():
            yield rest


def _paragraphs(text: str) -> Iterator[str]:
    for block in BLANK_LINE.split(text):
        lines = [line.strip() for line in LINE_BREAK.split(block) if line.strip()]
        if _is_wrapped(lines):
            yield " ".join(lines)
        else:
            yield from lines


def _is_wrapped(lines: list[str]) -> bool:
    """Whether lines break where they were full: most that end within a sentence are followed by a small letter.

    A list of texts in small letters has a first line that begins with one, too.
    """
    following = [after[0] for line, after in pairwise(lines) if not ENDS.search(line)]
    begins = lines[0].lstrip(OPENING)[:1] if lines else ""
    return not begins.islower() and sum(map(str.islower, following)) * 2 > len(following)


def _is_end(text: str, start: int, mark: re.Match, cased: bool) -> bool:
    """Whether a mark ends the sentence that begins at `start`.

    Args:
        cased: the text has capital letters, so that sentences begin with one.
    """
    said = mark[0]
    if said[0] in "。！？｡":
        return True
    after = text[mark.end() : mark.end() + NEAR].lstrip().lstrip(OPENING)
    if not after or (cased and after[0].islower()):
        return not after
    if not said.startswith(".") or said.startswith(".."):
        return True
    before = text[max(start, mark.start() - NEAR) : mark.start()].split() or [""]
    word = before[-1].lstrip(OPENING + "-–—/")
    key, follows = word.lower(), re.match(r"[\w’']*", after)[0].lower()
    if before == [word] and word.isdecimal():  # the number of a list's item
        return False
    if key in TITLES or key in INSIDE:
        return False
    if key in BEFORE_NUMBERS and follows[:1].isdecimal():
        return False
    if key in TIMES or len(said) > 1:
        return True
    if key in EITHER or ACRONYM.fullmatch(word) or (len(word) == 1 and word.isupper()):
        return follows in STARTERS
    return True

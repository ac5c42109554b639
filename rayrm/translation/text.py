"""From a text to the sentences that are translated, and back to a text of the same layout."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rayrm.sentences import LETTER, split_line

_ADDRESS = re.compile(r"\w+://\S+|www\.\S+")
_MARKER = r"(?:[-*+–—]|#{1,6}|\d{1,3}[.)]|\(?(?:\d{1,3}|[A-Za-z])\)|\[[ xX]\])(?=\s)"
_HAN_NUMBER = "[一二三四五六七八九十]{1,3}"
_PREFIX = re.compile(
    rf"\s*(?:(?:>|[•‣◦●▪]|{_MARKER}|\d{{1,3}}[、）]|{_HAN_NUMBER}、|[（(](?:\d{{1,3}}|{_HAN_NUMBER})[）)])\s*)*+"
)
_FENCE = re.compile(r"`{3,}(?=[^`]*$)|~{3,}")
_CLAUSE = re.compile(r"[,;:،؛](?=\s)|[，、；：—]")
_SPACE = re.compile(r"\s+")
_BLANKS = re.compile(r"[^\S\n\r\v\f\x1c-\x1e\x85\u2028\u2029]*")


class SplitText(NamedTuple):
    """`gaps[0] + sentences[0] + gaps[1] + … + gaps[-1]` is the text."""

    sentences: tuple[str, ...]
    """What is to be translated: no white space at the ends, at least one letter."""
    gaps: tuple[str, ...]
    """What is kept, one more than sentences: white space, list markers, code, addresses, numbers that stand alone."""
    is_compat: bool
    """Whether one space stands between any two sentences, whatever stood there."""


def split_text(
    text: str, max_length: int = 800, measure: Callable[[str], int] = len, is_compat: bool = False
) -> SplitText:
    """The sentences of a text, and what stands between them.

    Lines, markers of lists, quotes and headings, cells of tables, indentation and fenced code are kept. A sentence of
    more than `max_length` by `measure`, characters unless told, is cut near its middle: at a clause, else at a space,
    else within a word. `is_compat` takes every line as plain sentences, as M-RewardBench's script does.
    """
    sentences: list[str] = []
    gaps = [""]
    for piece, is_prose in ((line, True) for line in text.splitlines()) if is_compat else _read_layout(text):
        if not is_prose:
            gaps[-1] += piece
            continue
        for part in (part for whole in split_line(piece) for part in _fit(whole, max_length, measure)):
            core = part.strip()
            if core and (is_compat or _has_words(core)):
                start = part.index(core)
                gaps[-1] += part[:start]
                sentences.append(core)
                gaps.append(part[start + len(core) :])
            else:
                gaps[-1] += part
    if is_compat:
        gaps = ["", *[" "] * (len(sentences) - 1), ""] if sentences else [""]
    return SplitText(tuple(sentences), tuple(gaps), is_compat)


def join_text(split: SplitText, translations: Sequence[str]) -> str:
    """The text with a translation in the place of each sentence; with the sentences themselves, the same text.

    Between two sentences of a line there is a space if the translation is in a script that has them, and none if it
    is in one that does not; `is_compat` always has one.
    """
    text = split.gaps[0]
    for index, (translation, gap) in enumerate(zip(translations, split.gaps[1:], strict=True)):
        pair = (translation, *translations[index + 1 : index + 2])
        before = split.sentences[index : index + 2]
        text += translation + (gap if split.is_compat or len(pair) < 2 else _fit_gap(gap, before, pair))
    return text


def _fit_gap(gap: str, before: tuple[str, ...], after: tuple[str, ...]) -> str:
    if before == after or not _BLANKS.fullmatch(gap):
        return gap
    if not (is_wide(after[0][-1:]) and is_wide(after[1][:1])):
        return gap or " "
    return gap if is_wide(before[0][-1:]) else ""


def is_wide(character: str) -> bool:
    """Whether a character is of a script that puts no spaces between words: Chinese or Japanese."""
    # Hangul is as wide, and has spaces.
    wide = character != "" and unicodedata.east_asian_width(character) in "WF"
    return wide and "HANGUL" not in unicodedata.name(character, "")


def _read_layout(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a text in their order, and whether each is prose."""
    fence = ""
    for line in text.splitlines(keepends=True):
        if fence:
            yield line, False
            rest = line.strip(" \t\r\n>")
            if len(rest) >= len(fence) and set(rest) == set(fence):
                fence = ""
            continue
        match = _PREFIX.match(line)
        prefix = match.group() if match else ""
        body = line[len(prefix) :].rstrip()
        if opened := _FENCE.match(body):
            fence = opened.group()
            yield line, False
            continue
        yield prefix, False
        if body.startswith("|") and body.endswith("|"):
            yield from ((cell, cell != "|") for cell in re.split(r"(\|)", body))
        else:
            yield body, True
        yield line[len(prefix) + len(body) :], False


def _has_words(sentence: str) -> bool:
    return LETTER.search(sentence) is not None and not _ADDRESS.fullmatch(sentence)


def _fit(sentence: str, max_length: int, measure: Callable[[str], int]) -> list[str]:
    if len(sentence) < 2 or measure(sentence.strip()) <= max_length:
        return [sentence]
    place = _find_cut(sentence)
    return [*_fit(sentence[:place], max_length, measure), *_fit(sentence[place:], max_length, measure)]


def _find_cut(sentence: str) -> int:
    middle, margin = len(sentence) // 2, max(1, len(sentence) // 4)
    for pattern in (_CLAUSE, _SPACE):
        places = [match.end() for match in pattern.finditer(sentence, len(sentence) // 4, len(sentence) - margin)]
        if places:
            return min(places, key=lambda place: abs(place - middle))
    # A vowel sign or an accent stays with its letter.
    while middle < len(sentence) - 1 and unicodedata.category(sentence[middle]).startswith("M"):
        middle += 1
    return middle

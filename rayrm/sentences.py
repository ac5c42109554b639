"""Where sentences end, by the rules of the script that they are written in: no language has to be known."""

from __future__ import annotations

import re
from collections.abc import Iterator

LETTER = re.compile(r"[^\W\d_]")
"""A letter of any script."""
_ALWAYS = "。！？｡।॥؟۔።။។៕།։"
"""Marks that end a sentence even where no white space follows."""
_CLOSERS = "\"'”’»›」』）】》〉)\\]}*_"
_HAN = "\u3040-\u30ff\u3400-\u9fff"
_THAI = "\u0e01-\u0eff"
_BOUNDARY = re.compile(
    # Japanese goes on after a quotation: 「はい。」と言った。
    rf"(?<![{_ALWAYS}])[{_ALWAYS}][{_ALWAYS}.!?…]*+[{_CLOSERS}]*+(?!(?<=[」』])[とっ])"
    # A run of marks is looked at from its start alone, or 10,000 dots would be looked at 10,000 times.
    rf"|(?<![.!?…])[.!?…]++[{_CLOSERS}]*+(?=\s)"
    rf"|(?<![.!?…])[!?]++[{_CLOSERS}]*+(?=[{_HAN}])"
    # The Greek question mark.
    r"|(?<=[\u0370-\u03ff\u1f00-\u1fff]);(?=\s)"
    # Thai and Lao have no mark: a space parts two clauses, but not where it stands before a sign of repetition.
    rf"|(?<=[{_THAI}])(?=\s+[{_THAI}])(?!\s+[ๆฯໆ])"
)
_NEXT_WORD = re.compile(r"[\s\"'“‘«„(\[¿¡*_]*(\w*)")
_LAST_WORD = re.compile(r"[^\s(\[{\"'“‘«„/–—]*$")
_DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")
_LONGEST_ABBREVIATION = 20
_ALWAYS_ABBREVIATED = """
mr mrs ms mx dr prof rev hon st gen col lt sgt capt gov messrs vs cf approx dept
hr fr dipl ing bzw ca evtl ggf sog vgl inkl mme mlle mgr sra srta dra ud uds ej sig dott avv
dhr mevr bijv drs np tzn tj ul např tzv örn sn ул тыс проф см гр
"""
_ABBREVIATED_BEFORE_NUMBERS = """
no nr núm art fig figs pp vol ch sec eq ref tab kap abs cap pág стр рис ст
jan feb mar apr jun jul aug sep sept oct nov dec
"""
_CAPITAL_AFTER_ORDINALS = (
    "Januar Februar März April Mai Juni Juli August September Oktober November Dezember Jahrhundert Jh"
)
_ABBREVIATIONS = frozenset(_ALWAYS_ABBREVIATED.split())
_BEFORE_NUMBERS = frozenset(_ABBREVIATED_BEFORE_NUMBERS.split())
_AFTER_ORDINALS = frozenset(_CAPITAL_AFTER_ORDINALS.split())


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence of a text, with the white space before it; together they are the text.

    The end of a line ends a sentence. What has no letter belongs to the sentence before it, or to the first one, and
    white space at the end of the text to the last one.
    """
    found: list[tuple[int, int]] = []
    start = end = 0
    has_letter = False
    for piece in (piece for line in text.splitlines(keepends=True) for piece in split_line(line)):
        if LETTER.search(piece):
            if has_letter:
                found.append((start, start + len(text[start:end].rstrip())))
                start = found[-1][1]
            has_letter = True
        end += len(piece)
    return [*found, (start, end)] if text else []


def split_line(line: str) -> Iterator[str]:
    """Sentences of one line, with the white space before each; together they are the line."""
    start = 0
    for match in _BOUNDARY.finditer(line):
        if _ends_sentence(line, start, match):
            yield line[start : match.end()]
            start = match.end()
    yield line[start:]


def _ends_sentence(line: str, start: int, match: re.Match[str]) -> bool:
    marks = match.group()
    if not LETTER.search(line, start, match.start()):
        return False
    if not marks.startswith((".", "!", "?", "…")):
        return True
    following = _NEXT_WORD.match(line, match.end())
    word_after = following.group(1) if following else ""
    if word_after[:1].islower():
        return False
    if not marks.startswith(".") or marks.startswith(".."):
        return True
    found = _LAST_WORD.search(line[max(start, match.start() - _LONGEST_ABBREVIATION) : match.start()])
    return not _is_abbreviation(found.group() if found else "", word_after)


def _is_abbreviation(word: str, word_after: str) -> bool:
    """Whether a full stop after `word` is likely to be part of it. Where in doubt it is: a long sentence harms less."""
    folded = word.casefold()
    if len(word) == 1 and word.upper() != word.lower():
        return True
    if folded in _ABBREVIATIONS or _DOTTED.fullmatch(word):
        return True
    if folded in _BEFORE_NUMBERS:
        return word_after[:1].isdigit()
    return word.isdigit() and len(word) <= 2 and word_after in _AFTER_ORDINALS

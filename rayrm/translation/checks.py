"""What is wrong with a translation, as far as it shows without knowing the languages."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from pydantic import Field

from rayrm.config import Config
from rayrm.languages import script_fraction, short_code, unicode_scripts

_DENSE_CHARACTER = 2.5
"""Letters of an alphabet that say as much as one Chinese, Japanese or Korean character."""
_SLACK = 10
"""Letters added to both sides of a length ratio, so that a greeting may become twice as long."""
_MIN_REPEATS = 4
_LOOP = re.compile(r"(.{1,100}?)\1{" + str(_MIN_REPEATS - 1) + ",}", re.DOTALL)
_NGRAM = 8
"""Letters in a row that two languages seldom share but in names."""
_MIN_LETTERS = 20
"""Fewest letters of a translation that can be told from a name or a loan word."""


class TranslationChecks(Config):
    """Bounds that a translation keeps; sizes are letters, of which a Chinese, Japanese or Korean one counts 2.5."""

    min_length_ratio: float = Field(0.4, ge=0, le=1)
    """Smallest size of a translation by that of its source."""
    max_length_ratio: float = Field(2.5, ge=1)
    """Largest size of a translation by that of its source."""
    max_loop: int = Field(24, ge=1)
    """Most letters that a translation may spend on saying something four or more times in a row, beyond its source."""
    max_copied_fraction: float = Field(0.5, ge=0, le=1)
    """Largest share of a translation's runs of 8 letters that stand in its source too."""
    min_script_fraction: float = Field(0.5, ge=0, le=1)
    """Smallest share of a translation's letters that are in the script of its language."""


def find_faults(source: str, translation: str, tgt_lang: str, checks: TranslationChecks) -> list[str]:
    """Reasons to doubt that `translation` says what `source` says, code left out of both; empty where there are none.

    - `empty`: it has no text, and its source has; nothing else is looked at then;
    - `length_ratio`: it is much shorter or longer than its source;
    - `repetition`: it says something over and over that its source does not;
    - `source_copy`: most of it is its source, from 20 letters on;
    - `wrong_script`: it is not in the script of `tgt_lang`, an ISO or FLORES code. Unknown codes pass.
    """
    if not translation.strip():
        return ["empty"] if source.strip() else []
    ratio = (_measure(translation) + _SLACK) / (_measure(source) + _SLACK)
    scripts = unicode_scripts(short_code(tgt_lang))
    found = {
        "length_ratio": not checks.min_length_ratio <= ratio <= checks.max_length_ratio,
        "repetition": longest_loop(translation) - longest_loop(source) > checks.max_loop,
        "source_copy": copied_fraction(source, translation) > checks.max_copied_fraction,
        "wrong_script": scripts is not None and script_fraction(translation, scripts) < checks.min_script_fraction,
    }
    return [reason for reason, is_found in found.items() if is_found]


def longest_loop(text: str) -> int:
    """Letters of the longest stretch of a text in which the same 1 to 100 letters come four or more times in a row."""
    return max((len(match.group()) for match in _LOOP.finditer(_letters(text))), default=0)


def copied_fraction(source: str, translation: str) -> float:
    """Share of a translation's runs of 8 letters that stand in its source too; 0 where it has fewer than 20 letters."""
    letters = _letters(translation)
    if len(letters) < _MIN_LETTERS:
        return 0.0
    runs = _runs(letters)
    return len(runs & _runs(_letters(source))) / len(runs)


@lru_cache(maxsize=2)
def _letters(text: str) -> str:
    """Letters and vowel signs of a text, folded; no white space, digits or marks."""
    return "".join(character for character in text.casefold() if unicodedata.category(character)[0] in "LM")


def _runs(letters: str) -> set[str]:
    return {letters[start : start + _NGRAM] for start in range(len(letters) - _NGRAM + 1)}


def _measure(text: str) -> float:
    return sum(_DENSE_CHARACTER if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in _letters(text))

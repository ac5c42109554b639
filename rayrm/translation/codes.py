"""Codes of languages: those of our table and those of NLLB and FLORES."""

from __future__ import annotations

from rayrm.languages import LANGUAGES

_SHORT_CODES = {language.flores: code for code, language in LANGUAGES.items()}


def short_code(code: str) -> str:
    """The table's code of a language that is named by its FLORES code; any other code stands for itself."""
    return _SHORT_CODES.get(code, code)


def flores_code(code: str) -> str:
    """The FLORES code of a language of the table; any other code stands for itself."""
    return LANGUAGES[code].flores if code in LANGUAGES else code

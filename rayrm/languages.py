"""One table of languages: code, English name, script, NLLB/FLORES code."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple


class Language(NamedTuple):
    """A language as prompts, filters and translation models name it."""

    code: str
    """ISO 639-1 code, or 639-3 where there is none."""
    name: str
    """English name, as prompts write it."""
    script: str
    """ISO 15924 code of the usual script."""
    flores: str
    """NLLB and FLORES-200 code."""


_ROWS = """
en English Latn eng_Latn
de German Latn deu_Latn
fr French Latn fra_Latn
nl Dutch Latn nld_Latn
it Italian Latn ita_Latn
es Spanish Latn spa_Latn
pt Portuguese Latn por_Latn
ko Korean Hang kor_Hang
ru Russian Cyrl rus_Cyrl
zh Chinese Hans zho_Hans
zh-Hant Traditional_Chinese Hant zho_Hant
ar Arabic Arab arb_Arab
bg Bulgarian Cyrl bul_Cyrl
bn Bengali Beng ben_Beng
ca Catalan Latn cat_Latn
cs Czech Latn ces_Latn
da Danish Latn dan_Latn
el Greek Grek ell_Grek
et Estonian Latn est_Latn
fa Persian Arab pes_Arab
fi Finnish Latn fin_Latn
he Hebrew Hebr heb_Hebr
hi Hindi Deva hin_Deva
hr Croatian Latn hrv_Latn
hu Hungarian Latn hun_Latn
id Indonesian Latn ind_Latn
ja Japanese Jpan jpn_Jpan
lt Lithuanian Latn lit_Latn
lv Latvian Latn lvs_Latn
no Norwegian Latn nob_Latn
pl Polish Latn pol_Latn
ro Romanian Latn ron_Latn
sk Slovak Latn slk_Latn
sl Slovenian Latn slv_Latn
sr Serbian Cyrl srp_Cyrl
sv Swedish Latn swe_Latn
sw Swahili Latn swh_Latn
ta Tamil Taml tam_Taml
te Telugu Telu tel_Telu
th Thai Thai tha_Thai
tr Turkish Latn tur_Latn
uk Ukrainian Cyrl ukr_Cyrl
ur Urdu Arab urd_Arab
vi Vietnamese Latn vie_Latn
"""
_WRITTEN_IN = {
    "Hans": ("CJK",),
    "Hant": ("CJK",),
    "Jpan": ("CJK", "HIRAGANA", "KATAKANA"),
    "Hang": ("HANGUL",),
    "Latn": ("LATIN",),
    "Cyrl": ("CYRILLIC",),
    "Arab": ("ARABIC",),
    "Grek": ("GREEK",),
    "Hebr": ("HEBREW",),
    "Deva": ("DEVANAGARI",),
    "Beng": ("BENGALI",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Thai": ("THAI",),
}


def _read(row: str) -> Language:
    code, name, script, flores = row.split()
    return Language(code, name.replace("_", " "), script, flores)


LANGUAGES = {language.code: language for language in map(_read, _ROWS.strip().splitlines())}


def language_name(code: str) -> str:
    """English name of a language; a code that is not in the table stands for itself."""
    return LANGUAGES[code].name if code in LANGUAGES else code


def unicode_scripts(code: str) -> tuple[str, ...] | None:
    """First words of the Unicode names of a language's letters (`LATIN`, `CYRILLIC` …); None if unknown."""
    return _WRITTEN_IN[LANGUAGES[code].script] if code in LANGUAGES else None


def script_fraction(text: str, scripts: tuple[str, ...]) -> float:
    """The share of a text's letters that are of `scripts`, first words of Unicode names; 1 without any letter."""
    letters = [_script(character) for character in text if character.isalpha()]
    return sum(script in scripts for script in letters) / len(letters) if letters else 1.0


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    return re.split(r"[ -]", unicodedata.name(character, ""), maxsplit=1)[0]

"""One table of languages: code, English name, script, NLLB/FLORES code, family, resource class."""

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
    family: str
    """Family, the widest group of related languages."""
    resource_class: int | None
    """Class of Joshi et al. (arXiv 2004.09095), 0 (no data) to 5 (most data).

    Null where they give the code no class of its own, such as Traditional Chinese.
    """


_ROWS = """
en English Latn eng_Latn Indo-European 5
de German Latn deu_Latn Indo-European 5
fr French Latn fra_Latn Indo-European 5
nl Dutch Latn nld_Latn Indo-European 4
it Italian Latn ita_Latn Indo-European 4
es Spanish Latn spa_Latn Indo-European 5
pt Portuguese Latn por_Latn Indo-European 4
ko Korean Hang kor_Hang Koreanic 4
ru Russian Cyrl rus_Cyrl Indo-European 4
zh Chinese Hans zho_Hans Sino-Tibetan 5
zh-Hant Traditional_Chinese Hant zho_Hant Sino-Tibetan -
ar Arabic Arab arb_Arab Afro-Asiatic 5
bg Bulgarian Cyrl bul_Cyrl Indo-European 3
bn Bengali Beng ben_Beng Indo-European 3
ca Catalan Latn cat_Latn Indo-European 4
cs Czech Latn ces_Latn Indo-European 4
da Danish Latn dan_Latn Indo-European 3
el Greek Grek ell_Grek Indo-European 3
et Estonian Latn est_Latn Uralic 3
fa Persian Arab pes_Arab Indo-European 4
fi Finnish Latn fin_Latn Uralic 4
he Hebrew Hebr heb_Hebr Afro-Asiatic 3
hi Hindi Deva hin_Deva Indo-European 4
hr Croatian Latn hrv_Latn Indo-European 4
hu Hungarian Latn hun_Latn Uralic 4
id Indonesian Latn ind_Latn Austronesian 3
ja Japanese Jpan jpn_Jpan Japonic 5
lt Lithuanian Latn lit_Latn Indo-European 3
lv Latvian Latn lvs_Latn Indo-European 3
no Norwegian Latn nob_Latn Indo-European -
pl Polish Latn pol_Latn Indo-European 4
ro Romanian Latn ron_Latn Indo-European 3
sk Slovak Latn slk_Latn Indo-European 3
sl Slovenian Latn slv_Latn Indo-European 3
sr Serbian Cyrl srp_Cyrl Indo-European 4
sv Swedish Latn swe_Latn Indo-European 4
sw Swahili Latn swh_Latn Niger-Congo 2
ta Tamil Taml tam_Taml Dravidian 3
te Telugu Telu tel_Telu Dravidian 1
th Thai Thai tha_Thai Tai-Kadai 3
tr Turkish Latn tur_Latn Turkic 4
uk Ukrainian Cyrl ukr_Cyrl Indo-European 3
ur Urdu Arab urd_Arab Indo-European 3
vi Vietnamese Latn vie_Latn Austroasiatic 4
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
    code, name, script, flores, family, resource_class = row.split()
    known = None if resource_class == "-" else int(resource_class)
    return Language(code, name.replace("_", " "), script, flores, family, known)


LANGUAGES = {language.code: language for language in map(_read, _ROWS.strip().splitlines())}


_SHORT_CODES = {language.flores: language.code for language in LANGUAGES.values()}
_PRIMARY_SUBTAGS = {flores.split("_")[0]: code.split("-")[0] for flores, code in _SHORT_CODES.items()}


def short_code(code: str) -> str:
    """The table's code of a language that is named by its FLORES code; any other code stands for itself."""
    return _SHORT_CODES.get(code, code)


def primary_subtag(code: str) -> str:
    """A language without script and region, in the table's codes: `zh` of zh-Hant, zh_TW and zho_Hans, `pt` of pt-BR."""
    first = re.split("[-_]", code)[0].lower()
    return _PRIMARY_SUBTAGS.get(first, first)


def is_english(code: str) -> bool:
    """Whether a code is that of English, in whatever script and region."""
    return primary_subtag(code) == "en"


def flores_code(code: str) -> str:
    """The FLORES code of a language of the table; any other code stands for itself."""
    return LANGUAGES[code].flores if code in LANGUAGES else code


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

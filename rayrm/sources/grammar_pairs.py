"""Preferences from the small grammar: a sentence and a spoilt copy of it, the same ones in every language."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa

from rayrm.rows import Preference
from rayrm.seeds import seed_of
from rayrm.sources.grammar import GrammarConfig, Meaning, draw_meaning, draw_meanings, render_sentence

SUBSETS = ("replaced", "swapped", "dropped")
"""What was done to the copy: another word of the kind, two neighbours in each other's place, a word left out."""


def write_pairs(config: GrammarConfig) -> pa.Table:
    """Preference rows in English and in each of the languages: `num_sentences` of them in each.

    The prompt is a sentence, chosen the same sentence, and rejected its spoilt copy. A row has the same id and group in
    all languages, and the same is done to it.
    """
    rows = []
    for number, meaning in enumerate(draw_meanings(config)):
        rng = random.Random(seed_of(config.seed, "pairs", str(number)))
        subset = SUBSETS[number % len(SUBSETS)]
        other, place = replace_part(meaning, rng), rng.random()
        for lang in ("en", *config.languages):
            right = render_sentence(meaning, lang)
            wrong = render_sentence(other, lang) if subset == "replaced" else spoil(right, subset, place)
            rows.append(_row(f"{config.seed}-{number}", lang, subset, right, wrong))
    kinds = {name: kind for name, kind in Preference.columns.items() if kind is not None}
    return pa.Table.from_pylist(rows, pa.schema(list(kinds.items())))


def replace_part(meaning: Meaning, rng: random.Random) -> Meaning:
    """The same meaning with another subject, verb or object."""
    while True:
        other, part = draw_meaning(rng), rng.choice(("subject", "verb", "objects"))
        fits = len(other.objects) == len(meaning.objects)
        if fits and getattr(other, part) != getattr(meaning, part):
            return meaning._replace(**{part: getattr(other, part)})


def spoil(sentence: str, subset: str, place: float) -> str:
    """A sentence of at least three words with two neighbours swapped or a word dropped, `place` (0 to 1) of its way in.

    It begins with a capital letter and ends with a full stop as before.
    """
    words = sentence[0].lower() + sentence[1:].removesuffix(".")
    parts = words.split()
    index = int(place * (len(parts) - 1))
    if subset == "swapped":
        parts[index], parts[index + 1] = parts[index + 1], parts[index]
    else:
        del parts[index]
    text = " ".join(parts)
    return text[0].upper() + text[1:] + "."


def _row(row_id: str, lang: str, subset: str, right: str, wrong: str) -> dict[str, Any]:
    return {
        "id": row_id,
        "group": row_id,
        "prompt": [{"role": "user", "content": right}],
        "chosen": [{"role": "assistant", "content": right}],
        "rejected": [{"role": "assistant", "content": wrong}],
        "margin": None,
        "src_lang": None,
        "tgt_lang": None,
        "lang": lang,
        "subset": subset,
    }

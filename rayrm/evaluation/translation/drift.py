"""What goes wrong with translations that no metric names: cut, empty, copied, in another language, all alike."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rayrm.evaluation.translation.metrics import tokenize
from rayrm.evaluation.translation.policies import Answers
from rayrm.languages import script_fraction, unicode_scripts

MIN_SCRIPT_FRACTION = 0.5
"""A text with a smaller share of letters in its language's script is in the wrong script."""
MIN_CHARACTERS = 12
"""A shorter text does not tell its language."""
SHARES = ("unfinished", "empty", "dropped", "source_copy", "wrong_script", "wrong_language")


class LanguageGuess:
    """Tells the languages of a test set apart by sequences of three characters, learned from the set's own texts."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        """`texts` are pairs of a language and a text in it."""
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for lang, text in dict.fromkeys(texts):
            counts[lang].update(_trigrams(text))
        num_known = len(set().union(*counts.values()))
        totals = {lang: own.total() + num_known for lang, own in counts.items()}
        self._unseen = {lang: -math.log(total) for lang, total in totals.items()}
        self._logs = {
            lang: {part: math.log((num + 1) / totals[lang]) for part, num in own.items()}
            for lang, own in counts.items()
        }

    def guess(self, text: str) -> str | None:
        """The language whose texts make this one most likely; None for a short text, or where there is no choice."""
        if len(text) < MIN_CHARACTERS or len(self._logs) < 2:
            return None
        parts = _trigrams(text)
        fits = {lang: sum(logs.get(part, self._unseen[lang]) for part in parts) for lang, logs in self._logs.items()}
        return max(fits, key=lambda lang: fits[lang])


def measure_drift(rows: Sequence[dict[str, Any]], answers: Answers, guess: LanguageGuess) -> dict[str, float | None]:
    """Shares of a policy's texts, lengths and variety, over all rows and by language pair, as `<name>/en-de`.

    `num_rows` counts rows. Shares, 0 to 1: `unfinished` was cut, `empty` has no text, `dropped` had no answer (and is
    empty too), `source_copy` is its source but for case and white space, `wrong_script` has most letters in another
    script, `wrong_language` looks most like another language of the set; the last two are of the texts that can be told,
    null without any. `length_ratio` is characters of all texts by those of their references. `distinct_1` and
    `distinct_2` are different tokens and pairs of them by all of their number: of a pair a mean over samples, over all
    rows a mean over pairs; `reference_distinct_2` is that of the references.
    """
    pairs: defaultdict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        pairs[f"{row['src_lang']}-{row['tgt_lang']}"].append(index)
    counts = {name: Counter[str]() for name in pairs}
    variety = {}
    for name, own in pairs.items():
        for index in own:
            counts[name] += _count_row(rows[index], answers, index, guess)
        variety[name] = _measure_variety([rows[index] for index in own], [[s[i] for i in own] for s in answers.samples])
    means = {key: sum(found[key] for found in variety.values()) / len(variety) for key in next(iter(variety.values()))}
    found: dict[str, float | None] = {**_shares(sum(counts.values(), Counter())), **means}
    for name in pairs:
        found |= {f"{key}/{name}": value for key, value in {**_shares(counts[name]), **variety[name]}.items()}
    return found


def _count_row(row: dict[str, Any], answers: Answers, index: int, guess: LanguageGuess) -> Counter[str]:
    texts = [sample[index] for sample in answers.samples]
    counts = Counter(rows=1, texts=len(texts), unfinished=answers.num_unfinished[index])
    counts["dropped"] = len(texts) * answers.is_dropped[index]
    counts["reference_length"] = len(texts) * len(row["reference"].strip())
    scripts, source = unicode_scripts(row["tgt_lang"]), _fold(row["source"])
    for text in map(str.strip, texts):
        counts["length"] += len(text)
        if not text:
            counts["empty"] += 1
            continue
        counts["source_copy"] += _fold(text) == source
        if scripts:
            counts["of_known_script"] += 1
            counts["wrong_script"] += script_fraction(text, scripts) < MIN_SCRIPT_FRACTION
        if (lang := guess.guess(text)) is not None:
            counts["of_known_language"] += 1
            counts["wrong_language"] += lang != row["tgt_lang"]
    return counts


def _shares(counts: Counter[str]) -> dict[str, float | None]:
    told = {"wrong_script": counts["of_known_script"], "wrong_language": counts["of_known_language"]}
    found: dict[str, float | None] = {"num_rows": counts["rows"]}
    for name in SHARES:
        total = told.get(name, counts["texts"])
        found[name] = counts[name] / total if total else None
    return {**found, "length_ratio": counts["length"] / counts["reference_length"]}


def _measure_variety(rows: Sequence[dict[str, Any]], samples: Sequence[Sequence[str]]) -> dict[str, float]:
    lang = rows[0]["tgt_lang"]
    tokens = [tokenize(texts, lang) for texts in samples]
    found = {f"distinct_{n}": sum(distinct(own, n) for own in tokens) / len(tokens) for n in (1, 2)}
    return {**found, "reference_distinct_2": distinct(tokenize([row["reference"] for row in rows], lang), 2)}


def distinct(texts: Iterable[Sequence[str]], n: int) -> float:
    """Different sequences of `n` tokens by all of them (Li et al., arXiv 1510.03055); 0 without any."""
    counts = Counter(tuple(tokens[i : i + n]) for tokens in texts for i in range(len(tokens) - n + 1))
    return len(counts) / counts.total() if counts else 0.0


def _trigrams(text: str) -> list[str]:
    padded = f" {_fold(text)} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()

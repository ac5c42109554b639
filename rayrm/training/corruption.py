"""Pairs of a reference and a spoilt copy of it, with a number that says how much is left of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rayrm.seeds import seed_of

MAX_NGRAM = 4


class Reference(NamedTuple):
    """A text to spoil."""

    id: str
    group: str
    lang: str
    text: str


class SpoiltPair(NamedTuple):
    """A reference, what became of it, and how like they are: 1 is the same text, 0 has nothing in common."""

    reference: str
    candidate: str
    target: float


def words_of(text: str) -> list[str]:
    """Words between blanks; single characters where a script writes no blanks."""
    words = text.split()
    return words if len(words) > 1 else list(text.strip())


def similarity(reference: str, candidate: str) -> float:
    """From 0 to 1: the mean of word similarity and character similarity.

    Word similarity is 1 − Levenshtein distance / words of the longer text; character similarity is the mean F1 of
    n-grams of 1 to 4 characters without blanks, over those n that one of the texts has.
    """
    first, second = words_of(reference), words_of(candidate)
    longest = max(len(first), len(second))
    by_words = 1 - edit_distance(first, second) / longest if longest else 1.0
    return (by_words + _ngram_f1("".join(first), "".join(second))) / 2


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Insertions, deletions and replacements that turn one list of words into the other, at the least."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _ngram_f1(first: str, second: str) -> float:
    scores = []
    for n in range(1, MAX_NGRAM + 1):
        left, right = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (first, second))
        if left or right:
            scores.append(2 * (left & right).total() / (left.total() + right.total()))
    return sum(scores) / len(scores) if scores else 1.0


class Spoiler:
    """Spoils references with words and sentences of other references of the same language."""

    def __init__(self, references: Sequence[Reference], seed: int) -> None:
        self.seed = seed
        self.texts: dict[str, list[str]] = {}
        for reference in references:
            self.texts.setdefault(reference.lang, []).append(reference.text)
        self.operations: tuple[Callable[[list[str], random.Random, str], list[str]], ...] = (
            self._drop,
            self._replace,
            self._replace,
            self._swap,
            self._duplicate,
            self._insert,
            self._truncate,
            self._splice,
            self._babble,
        )

    def spoil(self, reference: Reference, number: int) -> SpoiltPair:
        """The `number`-th pair of a reference; it hangs on the seed, the row's id and language, and `number` alone.

        One pair in ten is the same text and one in ten an unrelated one; the others had one to all words touched.
        """
        rng = random.Random(seed_of(self.seed, reference.id, reference.lang, str(number)))
        kind = rng.random()
        if kind < 0.1:
            return SpoiltPair(reference.text, reference.text, 1.0)
        if kind < 0.2:
            other = self._other(rng, reference.lang)
            return SpoiltPair(reference.text, other, similarity(reference.text, other))
        words = words_of(reference.text)
        blank = " " if len(reference.text.split()) > 1 else ""
        # The square makes light damage, which is what candidates mostly differ by, more frequent than heavy damage.
        for _ in range(1 + int(rng.random() ** 2 * len(words))):
            words = rng.choice(self.operations)(words, rng, reference.lang)
        candidate = blank.join(words)
        return SpoiltPair(reference.text, candidate, similarity(reference.text, candidate))

    def _other(self, rng: random.Random, lang: str) -> str:
        return rng.choice(self.texts[lang])

    def _word(self, rng: random.Random, lang: str) -> str:
        return rng.choice(words_of(self._other(rng, lang)) or [""])

    def _drop(self, words: list[str], rng: random.Random, _lang: str) -> list[str]:
        if len(words) < 2:
            return words
        at = rng.randrange(len(words))
        return words[:at] + words[at + 1 :]

    def _replace(self, words: list[str], rng: random.Random, lang: str) -> list[str]:
        at = rng.randrange(len(words))
        return [*words[:at], self._word(rng, lang), *words[at + 1 :]]

    def _insert(self, words: list[str], rng: random.Random, lang: str) -> list[str]:
        at = rng.randrange(len(words) + 1)
        return [*words[:at], self._word(rng, lang), *words[at:]]

    def _swap(self, words: list[str], rng: random.Random, _lang: str) -> list[str]:
        first, second = rng.randrange(len(words)), rng.randrange(len(words))
        words = list(words)
        words[first], words[second] = words[second], words[first]
        return words

    def _duplicate(self, words: list[str], rng: random.Random, _lang: str) -> list[str]:
        at = rng.randrange(len(words))
        return [*words[: at + 1], *words[at:]]

    def _truncate(self, words: list[str], rng: random.Random, _lang: str) -> list[str]:
        return words[: rng.randint((len(words) + 1) // 2, len(words))]

    def _splice(self, words: list[str], rng: random.Random, lang: str) -> list[str]:
        other = words_of(self._other(rng, lang))
        keep = rng.randint(len(words) // 2, len(words))
        return words[:keep] + other[keep : len(words)] or words

    def _babble(self, words: list[str], rng: random.Random, _lang: str) -> list[str]:
        keep = rng.randint(1, len(words))
        return words[:keep] + words[keep - 1 : keep] * (len(words) - keep)

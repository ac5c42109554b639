"""Score candidates of the demo corpus by their errors: its grammar has exactly one translation of a sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayrm.config import NOT_IDENTITY, Config, Workers
from rayrm.scoring.base import Span

_TOKEN = re.compile(r"\w+|[^\w\s]")


class GrammarScoring(Config):
    """Minus the number of errors in a candidate, measured against the one translation that the grammar has."""

    type: Literal["grammar"] = "grammar"
    name: str = Field("grammar", min_length=1)
    """Field of `scores` and `status` that holds the result."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that score."""


class GrammarScorer:
    """Counts errors; needs no model."""

    needs: ClassVar[tuple[str, ...]] = ("reference",)
    """Columns without which no row can be scored."""

    def __init__(self, config: GrammarScoring) -> None:
        self.config = config

    def score(self, rows: list[dict[str, Any]]) -> list[list[tuple[float | None, str]]]:
        """One (minus the number of errors, `ok`) for each of a row's `candidates`.

        Without a text (`empty`) or a reference (`error`) the score is null.
        """
        return [[_outcome(text, row["reference"]) for text in row["candidates"] or []] for row in rows]

    def spans(self, rows: list[dict[str, Any]]) -> list[list[list[Span] | None]]:
        """The errors of each of a row's `candidates`, -1 each, so that they sum to its score; null without a score."""
        return [
            [
                None if score is None else mark_errors(str(text), str(row["reference"]))
                for text, (score, _) in zip(row["candidates"] or [], outcomes, strict=True)
            ]
            for row, outcomes in zip(rows, self.score(rows), strict=True)
        ]


def count_errors(candidate: str, reference: str) -> int:
    """How many words and marks of a candidate are wrong, missing, extra or misplaced; 0 only for the same words.

    A word in the wrong place is one error, a wrong word instead of the right one is one error. What is left of the
    longer text after taking out the longest common subsequence is counted; case does not matter.
    """
    found, wanted = _words(candidate), _words(reference)
    return max(len(found), len(wanted)) - len(_match(found, wanted))


def mark_errors(candidate: str, reference: str) -> list[Span]:
    """The errors that `count_errors` counts, by their place in the candidate, -1 each.

    A word that is wrong, extra or misplaced is marked itself. A missing one is a mark of no length at the end of the
    word before it; before the first word it is a mark on that one, and without any word on the whole candidate.
    """
    places = [match.span() for match in _TOKEN.finditer(candidate)]
    found, wanted = _words(candidate), _words(reference)
    matches = _match(found, wanted)
    marks = [places[i] for i in sorted({*range(len(found))} - {i for i, _ in matches})]
    first = places[0] if places else (0, len(candidate))
    for before in _find_missing(found, wanted, matches):
        marks.append((places[before][1],) * 2 if before >= 0 else first)
    return [Span(start, end, -1.0) for start, end in sorted(marks)]


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _TOKEN.findall(text)]


def _match(found: Sequence[str], wanted: Sequence[str]) -> list[tuple[int, int]]:
    """Places in `found` and in `wanted` of a longest common subsequence, ascending."""
    # lengths[i][j] is that of what is left from i and j on.
    lengths = [[0] * (len(wanted) + 1)]
    for word in reversed(found):
        below, row = lengths[-1], [0]
        for j in range(len(wanted) - 1, -1, -1):
            row.append(below[j + 1] + 1 if word == wanted[j] else max(below[j], row[-1]))
        lengths.append(row[::-1])
    lengths.reverse()
    matches: list[tuple[int, int]] = []
    i = j = 0
    while i < len(found) and j < len(wanted):
        if found[i] == wanted[j]:
            matches.append((i, j))
            i, j = i + 1, j + 1
        elif lengths[i + 1][j] >= lengths[i][j + 1]:
            i += 1
        else:
            j += 1
    return matches


def _find_missing(found: Sequence[str], wanted: Sequence[str], matches: Sequence[tuple[int, int]]) -> list[int]:
    """For each word that no word of the candidate stands for, the place of the word before it, -1 before the first.

    Each word that is left in `found` stands for one of `wanted`: for the same word elsewhere if there is one, else for
    one that is missing at its own place, else for any.
    """
    left = Counter(found)
    left.subtract(found[i] for i, _ in matches)
    missing: list[tuple[int, int]] = []
    i = j = 0
    for next_i, next_j in [*matches, (len(found), len(wanted))]:
        num_here = next_i - i
        for word in wanted[j:next_j]:
            rank = 2
            if left[word] > 0:
                left[word] -= 1
                rank = 0
            elif num_here > 0:
                num_here -= 1
                rank = 1
            missing.append((rank, next_i - 1))
        i, j = next_i + 1, next_j + 1
    num_missing = max(0, len(wanted) - len(found))
    return [before for _, before in sorted(missing, key=lambda each: -each[0])[:num_missing]]


def _outcome(candidate: str | None, reference: str | None) -> tuple[float | None, str]:
    if not (candidate or "").strip():
        return None, "empty"
    if not (reference or "").strip():
        return None, "error"
    return -float(count_errors(str(candidate), str(reference))), "ok"

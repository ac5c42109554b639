"""Score candidates of the demo corpus by their errors: its grammar has exactly one translation of a sentence."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayrm.config import NOT_IDENTITY, Config, Workers

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


def count_errors(candidate: str, reference: str) -> int:
    """How many words and marks of a candidate are wrong, missing, extra or misplaced; 0 only for the same words.

    A word in the wrong place is one error, a wrong word instead of the right one is one error. What is left of the
    longer text after taking out the longest common subsequence is counted; case does not matter.
    """
    found, wanted = (_TOKEN.findall(text.casefold()) for text in (candidate, reference))
    lengths = [0] * (len(wanted) + 1)
    for word in found:
        diagonal = 0
        for column, other in enumerate(wanted, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return max(len(found), len(wanted)) - lengths[-1]


def _outcome(candidate: str | None, reference: str | None) -> tuple[float | None, str]:
    if not (candidate or "").strip():
        return None, "empty"
    if not (reference or "").strip():
        return None, "error"
    return -float(count_errors(str(candidate), str(reference))), "ok"

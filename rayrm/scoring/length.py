"""Score how far the length of a translation is from what its source lets expect; reward models like short texts."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from rayrm.config import NOT_IDENTITY, Config, Workers
from rayrm.scoring.base import Outcome


class LengthScoring(Config):
    """−|ln(characters of the candidate / characters expected)|: 0 at the expected length, −0.69 at half and at twice it.

    Expected are the characters of the source times the usual ratio of its language pair.
    """

    type: Literal["length"] = "length"
    name: str = Field("length", min_length=1)
    """Field of `scores` and `status` that holds the result."""
    ratios: dict[str, PositiveFloat] = Field({})
    """Usual characters of a translation for each of its source, by language pair such as `en-de`; 1 for all others."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that score."""


class LengthScorer:
    """Counts characters; needs no model."""

    needs: ClassVar[tuple[str, ...]] = ("source",)
    """Columns without which no row can be scored."""

    def __init__(self, config: LengthScoring) -> None:
        self.config = config

    def score(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """One (score, `ok`) for each of a row's `candidates`.

        Without a text (`empty`) or a source (`error`) the score is null.
        """
        return [[self._outcome(text, row) for text in row["candidates"] or []] for row in rows]

    def _outcome(self, text: str | None, row: dict[str, Any]) -> Outcome:
        length, source = len((text or "").strip()), len((row["source"] or "").strip())
        if not length:
            return None, "empty"
        if not source:
            return None, "error"
        expected = source * self.config.ratios.get(f"{row['src_lang']}-{row['tgt_lang']}", 1.0)
        return -abs(math.log(length / expected)), "ok"

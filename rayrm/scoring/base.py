"""What a scorer of preferences is, and what the kinds of models are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

REWARD_MODEL, IMPLICIT, REF_FREE, CUSTOM = "Seq. Classifier", "DPO", "DPO Ref. Free", "Custom Classifier"
"""What RewardBench calls models with a head, policies that are read by their own probabilities beside those of their
reference and alone, and all others."""
Outcome = tuple[float | None, str]


class Span(NamedTuple):
    """A part of a candidate that a scorer marks."""

    start: int
    end: int
    """Characters of the candidate; the same as `start` for what lies between two of them."""
    score: float


class Scorer(Protocol):
    """What turns candidates into numbers; `scorer(config)` loads whatever it needs."""

    needs: ClassVar[tuple[str, ...]]
    """Columns without which no row can be scored."""

    def score(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """One (score or null, status) for each candidate of each row; rows have the columns `READS`, `tools` and `needs`."""
        ...


class SpanScorer(Scorer, Protocol):
    """What also tells which parts of a candidate its score comes from."""

    def spans(self, rows: list[dict[str, Any]]) -> list[list[list[Span] | None]]:
        """The marked parts of each candidate of each row, none of them where nothing is to be marked.

        Null for a candidate that has no score.
        """
        ...


class PreferenceScorer(Protocol):
    """What tells the better one of two completions: by a score of each, or, where it `compares`, only of both."""

    model_type: ClassVar[str]
    """What RewardBench calls such models, where they do not compare."""

    @property
    def needs(self) -> tuple[str, ...]:
        """As `Scorer.needs`, beside prompt, languages, anchor and tools."""
        ...

    @property
    def compares(self) -> bool:
        """Whether it has `compare`, and no `score` that could be used."""
        ...

    def score(self, rows: list[dict[str, Any]]) -> list[list[Outcome]]:
        """As `Scorer.score`."""
        ...

    def compare(self, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[Outcome, Outcome]]:
        """(log p, status) of each of two rows with one candidate, where p is the chance that it is the better one.

        Both are null where there is none, and `error` where the rows have not the same prompt.
        """
        ...

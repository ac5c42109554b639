"""Whether a model prefers the same side of a row in every language that the row is translated into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from rayrm.evaluation.analysis.agreement import labels
from rayrm.evaluation.analysis.correlation import pearson
from rayrm.evaluation.analysis.grid import ENGLISH, Grid, pairs_of
from rayrm.evaluation.preferences import Floats


class Translated(NamedTuple):
    """A model on the same rows in two languages."""

    model: str
    language: str
    other_language: str
    num_rows: int
    flips: float
    """Share of rows whose reward gap has another sign, a tie having one of its own; of judges, another verdict."""
    gap_difference: float | None
    """Mean size of the difference of both gaps, in standard deviations of the model's rewards; null for judges."""
    correlation: float | None
    """Pearson's correlation of the gaps; null for judges, and where gaps are all the same."""


class Steadiness(NamedTuple):
    """Means over pairs of languages."""

    model: str
    num_pairs: int
    flips: float
    gap_difference: float | None
    correlation: float | None


def compare_translations(grid: Grid, spreads: Mapping[str, float]) -> list[Translated]:
    """Every model on every two languages. `spreads` has the standard deviation of a model's rewards.

    A row counts where the model has a gap, or a result, in both languages.
    """
    coded = labels(grid.credits)
    found = []
    for number, model in enumerate(grid.models):
        for one, two in pairs_of(grid.languages):
            gaps = (grid.gaps[number, one], grid.gaps[number, two])
            results = (coded[number, one], coded[number, two])
            compared = _compare(gaps, results, spreads.get(model, 0.0))
            if compared is not None:
                found.append(Translated(model, grid.languages[one], grid.languages[two], *compared))
    return found


def _compare(
    gaps: tuple[Floats, Floats], results: tuple[Floats, Floats], spread: float
) -> tuple[int, float, float | None, float | None] | None:
    known = np.isfinite(gaps[0]) & np.isfinite(gaps[1])
    if known.any():
        one, two = gaps[0][known], gaps[1][known]
        difference = float(np.abs(one - two).mean()) / spread if spread else None
        return int(known.sum()), float((np.sign(one) != np.sign(two)).mean()), difference, pearson(one, two)
    known = np.isfinite(results[0]) & np.isfinite(results[1])
    if not known.any():
        return None
    return int(known.sum()), float((results[0][known] != results[1][known]).mean()), None, None


def summarise_translations(compared: Sequence[Translated], against_english: bool) -> list[Steadiness]:
    """Each model's means over all pairs of languages, or over those with English, fewest flips first."""
    found = []
    for model in dict.fromkeys(item.model for item in compared):
        own = [
            item
            for item in compared
            if item.model == model and (not against_english or ENGLISH in (item.language, item.other_language))
        ]
        if own:
            flips = fmean(item.flips for item in own)
            differences = _mean([item.gap_difference for item in own])
            found.append(Steadiness(model, len(own), flips, differences, _mean([item.correlation for item in own])))
    return sorted(found, key=lambda item: item.flips)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

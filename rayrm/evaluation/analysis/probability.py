"""How well σ of a reward gap, what Bradley-Terry takes it for, serves as the probability that a side is right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rayrm.evaluation.analysis.grid import ENGLISH, Grid
from rayrm.evaluation.preferences import Floats


class Bin(NamedTuple):
    """Rows of about the same confidence."""

    low: float
    """Least confidence of the bin, σ(|gap|)."""
    high: float
    confidence: float
    """Mean confidence of its rows."""
    accuracy: float
    """Share of its rows where the preferred side is right; a tie counts half."""
    num_rows: int


class Probability(NamedTuple):
    """How well a model's probabilities fit what is right."""

    model: str
    language: str
    """`all` for all languages other than English together, where there are any."""
    num_rows: int
    expected_error: float
    """Expected calibration error (arXiv 1706.04599): mean over rows of their bin's |accuracy − confidence|."""
    brier: float
    """Mean of (1 − σ(gap))²: 0 at the best, 0.25 for ties."""
    log_loss: float
    """Mean of −log σ(gap): 0 at the best, log 2 = 0.693 for ties."""
    bins: list[Bin]


def measure_probability(grid: Grid, num_bins: int) -> list[Probability]:
    """Each model with rewards, in each language and in all but English together, for rows with two answers."""
    others = [number for number, code in enumerate(grid.languages) if code != ENGLISH]
    slices = {"all": others, **{code: [number] for number, code in enumerate(grid.languages)}}
    found = []
    for number, model in enumerate(grid.models):
        for name, languages in slices.items():
            gaps = grid.gaps[number, languages].ravel()
            gaps = gaps[np.isfinite(gaps) & np.isfinite(grid.lengths[number, languages].ravel())]
            if len(gaps):
                bins = confidence_bins(gaps, num_bins)
                error = sum(part.num_rows * abs(part.accuracy - part.confidence) for part in bins) / len(gaps)
                losses = np.logaddexp(0, -gaps)
                brier = float(((1 - np.exp(-losses)) ** 2).mean())
                found.append(Probability(model, name, len(gaps), error, brier, float(losses.mean()), bins))
    return found


def confidence_bins(gaps: Floats, num_bins: int) -> list[Bin]:
    """Rows by their confidence in `num_bins` bins of equal width from 0.5 to 1; bins without a row are left out."""
    confidence = np.exp(-np.logaddexp(0, -np.abs(gaps)))
    right = (np.sign(gaps) + 1) / 2
    codes = np.minimum((2 * (confidence - 0.5) * num_bins).astype(int), num_bins - 1)
    width = 0.5 / num_bins
    found = []
    for code in np.unique(codes).tolist():
        inside = codes == code
        edges = (0.5 + code * width, 0.5 + (code + 1) * width)
        means = (float(confidence[inside].mean()), float(right[inside].mean()))
        found.append(Bin(*edges, *means, int(inside.sum())))
    return found

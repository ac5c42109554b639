"""Correlations of two lists of numbers; null where there is none."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from rayrm.evaluation.preferences import Floats


def pearson(first: ArrayLike, second: ArrayLike) -> float | None:
    """Pearson's correlation of the places where both are numbers, -1 to 1.

    Null with fewer than two such places, and where either list is the same everywhere.
    """
    one, two = _shared(first, second)
    if len(one) < 2 or (one == one[0]).all() or (two == two[0]).all():
        return None
    one, two = one - one.mean(), two - two.mean()
    return float(np.clip((one @ two) / np.sqrt((one @ one) * (two @ two)), -1, 1))


def spearman(first: ArrayLike, second: ArrayLike) -> float | None:
    """Spearman's rank correlation, equal values sharing the mean of their ranks; null as `pearson`."""
    one, two = _shared(first, second)
    return pearson(ranks(one), ranks(two))


def ranks(values: Floats) -> Floats:
    """Rank of each value from 1, equal values sharing the mean of their ranks."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[codes].astype(float)


def _shared(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    one, two = np.asarray(first, float), np.asarray(second, float)
    known = np.isfinite(one) & np.isfinite(two)
    return one[known], two[known]

"""Which models differ by more than chance: paired tests, and groups of models that do not."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from rayrm.evaluation.analysis.grid import Grid, pairs_of

Test = Literal["exact", "chi_squared"]
MIN_CHI_SQUARED = 25
"""Discordant rows from which χ² stands in for the exact binomial test."""


class Difference(NamedTuple):
    """McNemar's test (1947) of two models on the rows that both have, each with its translations as one."""

    model: str
    other_model: str
    num_rows: int
    better: int
    """Rows where the first model has more right, over all languages in which both have the row."""
    worse: int
    """Rows where it has fewer right."""
    test: Test
    """Two-sided `exact` binomial, or `chi_squared` with Edwards' continuity correction from 25 differing rows on."""
    p_value: float
    adjusted: float
    """The p-value after Holm's correction (1979) for all pairs of models."""


def compare_all(grid: Grid) -> list[Difference]:
    """Every two models with a row in common. In one language this is the test on single rows."""
    found = []
    for one, two in pairs_of(grid.models):
        differences = grid.credits[one] - grid.credits[two]
        known = np.isfinite(differences).any(axis=0)
        if known.any():
            signs = np.sign(np.nansum(differences[:, known], axis=0).round(9))
            better, worse = int((signs > 0).sum()), int((signs < 0).sum())
            test, p_value = mcnemar(better, worse)
            names = (grid.models[one], grid.models[two])
            found.append(Difference(*names, int(known.sum()), better, worse, test, p_value, p_value))
    adjusted = holm([difference.p_value for difference in found])
    return [difference._replace(adjusted=value) for difference, value in zip(found, adjusted, strict=True)]


def mcnemar(better: int, worse: int) -> tuple[Test, float]:
    """Which test is made of so many discordant rows, and its two-sided p-value; 1 without any."""
    num = better + worse
    if num < MIN_CHI_SQUARED:
        tail = sum(math.comb(num, k) for k in range(min(better, worse) + 1)) / 2**num
        return "exact", min(1.0, 2 * tail)
    statistic = max(0, abs(better - worse) - 1) ** 2 / num
    return "chi_squared", math.erfc(math.sqrt(statistic / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order of `p_values`."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def letter_groups(models: Sequence[str], differences: Sequence[Difference], alpha: float) -> dict[str, str]:
    """Model to its letters: models that share one do not differ at `alpha` after Holm's correction.

    Insert-and-absorb (Piepho 2004); the first of `models` has the first letter. Models that were never compared, with
    no row in common, share letters too.
    """
    groups = [set(models)]
    for item in differences:
        if item.adjusted >= alpha:
            continue
        split = []
        for group in groups:
            both = item.model in group and item.other_model in group
            split += [group - {item.model}, group - {item.other_model}] if both else [group]
        groups = [g for i, g in enumerate(split) if not any(g < h or (g == h and j < i) for j, h in enumerate(split))]
    order = {model: number for number, model in enumerate(models)}
    groups.sort(key=lambda group: sorted(order[model] for model in group))
    names = {index: _letter(index) for index in range(len(groups))}
    return {model: "".join(names[i] for i, group in enumerate(groups) if model in group) for model in models}


def _letter(index: int) -> str:
    letters = string.ascii_lowercase
    return letters[index] if index < len(letters) else f"({index + 1})"

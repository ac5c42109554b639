"""How far two lists of verdicts agree beyond chance: a model with itself in English, and models with one another."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayrm.evaluation.analysis.grid import ENGLISH, Grid, pairs_of
from rayrm.evaluation.preferences import Floats

Constant = Literal["", "same", "different"]


class Agreement(NamedTuple):
    """Cohen's κ of two lists of labels, and the share of rows where they are equal."""

    num_rows: int
    share: float
    kappa: float
    """1 where both lists are one and the same label throughout, for which κ's formula has no value."""
    constant: Constant
    """`same` or `different` when each list has a single label: one and the same, or not."""


class Compared(NamedTuple):
    """The agreement of two lists of results."""

    model: str
    other_model: str
    language: str
    other_language: str
    agreement: Agreement


class Consistency(NamedTuple):
    """A model's κ with its own results in English, over languages."""

    model: str
    mean: float
    deviation: float
    """Population standard deviation over the languages."""
    num_languages: int
    num_constant: int
    """Languages with one and the same label throughout in both, which count as κ = 1."""


def labels(credits: Floats) -> Floats:
    """1 for a right row, 0 for a wrong one, 2 for anything between; NaN stays."""
    return np.where(np.isnan(credits), np.nan, np.where(credits == 1, 1.0, np.where(credits == 0, 0.0, 2.0)))


def cohen_kappa(first: Floats, second: Floats) -> Agreement | None:
    """The agreement of two lists of labels where both have one; null where no row has both."""
    known = np.isfinite(first) & np.isfinite(second)
    if not known.any():
        return None
    one, two = first[known], second[known]
    kinds = np.unique(np.concatenate([one, two]))
    share = float((one == two).mean())
    chance = float(sum((one == kind).mean() * (two == kind).mean() for kind in kinds))
    constant: Constant = ""
    if len(np.unique(one)) == 1 and len(np.unique(two)) == 1:
        constant = "same" if share == 1 else "different"
    kappa = 1.0 if constant == "same" else (share - chance) / (1 - chance)
    return Agreement(int(known.sum()), share, kappa, constant)


def compare_with_english(grid: Grid) -> list[Compared]:
    """Each model's results in each language against its own in English, on rows that have both."""
    english = grid.language(ENGLISH)
    if english is None:
        return []
    coded = labels(grid.credits)
    found = []
    for number, model in enumerate(grid.models):
        for language, code in enumerate(grid.languages):
            agreement = None if language == english else cohen_kappa(coded[number, language], coded[number, english])
            if agreement is not None:
                found.append(Compared(model, model, code, ENGLISH, agreement))
    return found


def compare_models(grid: Grid) -> list[Compared]:
    """Every two models in each language, on rows that both have."""
    coded = labels(grid.credits)
    found = []
    for one, two in pairs_of(grid.models):
        for language, code in enumerate(grid.languages):
            agreement = cohen_kappa(coded[one, language], coded[two, language])
            if agreement is not None:
                found.append(Compared(grid.models[one], grid.models[two], code, code, agreement))
    return found


def summarise_agreement(compared: Sequence[Compared]) -> list[Consistency]:
    """Mean and deviation of κ for each model, from the highest mean down."""
    found = []
    for model in dict.fromkeys(item.model for item in compared):
        own = [item.agreement for item in compared if item.model == model]
        values = [agreement.kappa for agreement in own]
        constant = sum(agreement.constant == "same" for agreement in own)
        found.append(Consistency(model, fmean(values), pstdev(values), len(own), constant))
    return sorted(found, key=lambda item: -item.mean)


class RowAgreement(NamedTuple):
    """How the models together judge the rows of a subset in a language and in English."""

    language: str
    subset: str
    num_rows: int
    mean_kappa: float
    """Mean over rows of the κ across models; a row where all models say the same in both counts as 1."""
    num_constant: int
    """Rows where every model says the same in both languages."""


def agreement_by_row(grid: Grid) -> list[RowAgreement]:
    """κ across models of every row against its original in English, by language and subset.

    A row counts where two models or more have both.
    """
    english = grid.language(ENGLISH)
    if english is None:
        return []
    coded = labels(grid.credits)
    found = []
    for language, code in enumerate(grid.languages):
        if language == english:
            continue
        both = np.isfinite(coded[:, language]) & np.isfinite(coded[:, english])
        counted = np.flatnonzero(both.sum(axis=0) > 1)
        rows = {row: cohen_kappa(coded[:, language, row], coded[:, english, row]) for row in counted.tolist()}
        for subset in np.unique(grid.subsets[counted]).tolist():
            own = [value for row, value in rows.items() if value is not None and grid.subsets[row] == subset]
            constant = sum(value.constant == "same" for value in own)
            found.append(RowAgreement(code, subset, len(own), fmean(value.kappa for value in own), constant))
    return found


def matrix_of_models(grid: Grid, compared: Sequence[Compared]) -> NDArray[np.float64]:
    """Mean κ over languages of every two models, 1 on the diagonal; NaN where they have no row in common."""
    places = {model: number for number, model in enumerate(grid.models)}
    values: dict[tuple[int, int], list[float]] = {}
    for item in compared:
        values.setdefault((places[item.model], places[item.other_model]), []).append(item.agreement.kappa)
    matrix = np.full((len(places), len(places)), np.nan)
    np.fill_diagonal(matrix, 1.0)
    for (one, two), found in values.items():
        matrix[one, two] = matrix[two, one] = fmean(found)
    return matrix

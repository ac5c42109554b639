"""Whether a model follows the length of answers; for rows with one right and one wrong answer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayrm.evaluation.analysis.correlation import spearman
from rayrm.evaluation.analysis.grid import ENGLISH, Grid
from rayrm.evaluation.preferences import Floats

LENGTH_CATEGORIES = {
    "longer": ("alpacaeval-easy", "alpacaeval-hard", "xstest-should-respond"),
    "neutral": (
        "alpacaeval-length",
        "hep-cpp",
        "hep-go",
        "hep-java",
        "hep-js",
        "hep-python",
        "hep-rust",
        "llmbar-adver-GPTOut",
        "llmbar-natural",
        "math-prm",
        "mt-bench-med",
    ),
    "shorter": (
        "donotanswer",
        "llmbar-adver-GPTInst",
        "llmbar-adver-manual",
        "llmbar-adver-neighbor",
        "mt-bench-easy",
        "mt-bench-hard",
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
    ),
}
"""RewardBench's word on its subsets: where the right answer is mostly the longer one, neither, or the shorter one."""
SIDES = ("longer", "equal", "shorter")


class LengthBias(NamedTuple):
    """A model's results by how long the right answer is beside the wrong one."""

    model: str
    language: str
    """`all` for all languages other than English together, where there are any."""
    num_rows: dict[str, int]
    """`longer`, `equal` and `shorter` to rows whose right answer is that."""
    accuracy: dict[str, float | None]
    """The same to the mean of what those rows count; null without a row."""
    correlation: float | None
    """Spearman's, of the right answer's extra characters with the reward gap; of judges, with what the row counts."""


class CategoryAccuracy(NamedTuple):
    """A model on the subsets of RewardBench's length categories, a plain mean over rows."""

    model: str
    language: str
    accuracy: dict[str, float | None]
    """Category to accuracy; null without a row."""


def length_bias(grid: Grid) -> list[LengthBias]:
    """The length bias of each model in each language and in all but English together."""
    found = []
    for number, model in enumerate(grid.models):
        for name, languages in _slices(grid).items():
            extra, credits, gaps = (
                values[number, languages].ravel() for values in (grid.lengths, grid.credits, grid.gaps)
            )
            known = np.isfinite(extra) & np.isfinite(credits)
            if not known.any():
                continue
            extra, credits, gaps = extra[known], credits[known], gaps[known]
            sides = dict(zip(SIDES, (extra > 0, extra == 0, extra < 0), strict=True))
            counts = {side: int(rows.sum()) for side, rows in sides.items()}
            means = {side: _mean(credits[rows]) for side, rows in sides.items()}
            followed = gaps if np.isfinite(gaps).any() else credits
            found.append(LengthBias(model, name, counts, means, spearman(extra, followed)))
    return found


def by_length_category(grid: Grid) -> list[CategoryAccuracy]:
    """Accuracy in RewardBench's length categories; empty for a set with none of its subsets."""
    inside = {name: np.isin(grid.subsets, subsets) for name, subsets in LENGTH_CATEGORIES.items()}
    if not any(rows.any() for rows in inside.values()):
        return []
    found = []
    for number, model in enumerate(grid.models):
        for language, codes in _slices(grid).items():
            credits: Floats = grid.credits[number, codes]
            means = {name: _mean(_known(credits, rows)) for name, rows in inside.items()}
            if any(value is not None for value in means.values()):
                found.append(CategoryAccuracy(model, language, means))
    return found


def _slices(grid: Grid) -> dict[str, list[int]]:
    others = [number for number, code in enumerate(grid.languages) if code != ENGLISH]
    return {"all": others, **{code: [number] for number, code in enumerate(grid.languages)}}


def _known(credits: Floats, rows: NDArray[np.bool_]) -> Floats:
    values = credits[:, rows].ravel()
    return values[np.isfinite(values)]


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None

"""Scores by source and target language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rayrm import files
from rayrm.evaluation.preferences import Floats
from rayrm.evaluation.sheets import write_sheet
from rayrm.evaluation.translation.bootstrap import LangPair
from rayrm.evaluation.translation.measuring import SetResult
from rayrm.evaluation.translation.policies import MATRICES
from rayrm.languages import is_english


class Matrix(NamedTuple):
    """A metric by source (rows) and target (columns) language, English first; NaN where there is no such pair."""

    sources: list[str]
    targets: list[str]
    values: Floats


def make_matrix(found: dict[str, Any], metric: str, pairs: Sequence[LangPair]) -> Matrix:
    """The matrix of a metric among the metrics of a policy, or of a difference."""
    sources, targets = (sorted({pair[side] for pair in pairs}, key=lambda c: (not is_english(c), c)) for side in (0, 1))
    values = np.full((len(sources), len(targets)), np.nan)
    for source, target in pairs:
        value = found[f"{metric}/{source}-{target}"]
        values[sources.index(source), targets.index(target)] = np.nan if value is None else value
    return Matrix(sources, targets, values)


def write_matrices(output: str, results: dict[str, SetResult], metrics: Sequence[str]) -> None:
    """Write `<output>/matrices/<set>/<policy>/<metric>.csv`, a row for each source language."""
    for name, result in results.items():
        for policy, found in result.metrics.items():
            for metric in metrics:
                matrix = make_matrix(found, metric, result.pairs)
                rows = [
                    [source, *("" if np.isnan(value) else f"{value:.4f}" for value in values)]
                    for source, values in zip(matrix.sources, matrix.values, strict=True)
                ]
                path = files.join(output, MATRICES, name, policy, f"{metric}.csv")
                write_sheet(path, ["source", *matrix.targets], rows)

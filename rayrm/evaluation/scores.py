"""Scored rows → how the scores of each scorer lie: constants of a composed reward."""

from __future__ import annotations

import logging
import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayrm.errors import EvaluationError, SchemaError
from rayrm.evaluation.report import Table
from rayrm.rewarding import RewardingConfig, choose_scorer
from rayrm.rows import Scored
from rayrm.scoring.reward_model import LANGUAGES, Calibration, Spread, language_of
from rayrm.shards import read_schemas

log = logging.getLogger("rayrm")
COLUMNS = [*LANGUAGES, "scores"]
"""Columns of Scored rows that are measured."""


class Measured(NamedTuple):
    """How scores lie."""

    scores: dict[str, Calibration]
    """By scorer."""
    num_unscored: dict[str, int]
    """Texts without a finite score, by scorer."""


def check_scores(path: str) -> None:
    """Raise SchemaError unless the rows at `path` have scores."""
    Scored.check_files(path)
    for name, schema in read_schemas(path):
        kind = schema.field("scores").type
        if not pa.types.is_struct(kind) or not kind.num_fields:
            raise SchemaError(f"Column 'scores' of '{name}' is {kind}, and scores are a struct with a field a scorer.")
        for field in kind:
            choose_scorer(schema, RewardingConfig(scorer=field.name), f"'{name}'")


def measure_scores(tables: Iterable[pa.Table], rows: str) -> Measured:
    """Mean and standard deviation of the scores of each scorer, over all texts and by language.

    `rows` is the fingerprint of the rows. Scores that are null or not finite are left out and counted; a language with
    fewer than two different ones has no numbers. Raises EvaluationError when all scores of a scorer are fewer than two,
    or all the same.
    """
    values: dict[str, dict[str, array[float]]] = defaultdict(lambda: defaultdict(lambda: array("d")))
    num_unscored: dict[str, int] = defaultdict(int)
    for table in tables:
        for row in table.to_pylist():
            language = language_of(row)
            for name, listed in (row["scores"] or {}).items():
                found = listed or []
                scores = [score for score in found if score is not None and math.isfinite(score)]
                values[name][language].extend(scores)
                num_unscored[name] += len(found) - len(scores)
    if not values:
        raise EvaluationError("There are no scores to measure; score the candidates first, by score_candidates.")
    calibrations = {name: _calibrate(name, own, num_unscored[name], rows) for name, own in values.items()}
    return Measured(calibrations, dict(num_unscored))


def _calibrate(name: str, values: Mapping[str, array[float]], num_unscored: int, rows: str) -> Calibration:
    spreads = {language: measure_spread(np.array(values[language])) for language in sorted(values)}
    overall = measure_spread(np.concatenate([np.array(own) for own in values.values()]))
    if overall is None:
        num = sum(map(len, values.values()))
        raise EvaluationError(
            f"There are {num:,} scores of '{name}' ({num_unscored:,} more are null) and no two that differ, so that they "
            "have no spread; calibrate on more rows, or leave this scorer out of the reward."
        )
    if unmeasured := [language for language, spread in spreads.items() if spread is None]:
        log.warning("no calibration of %s for %s: no two scores differ", name, ", ".join(unmeasured))
    languages = {language: spread for language, spread in spreads.items() if spread is not None}
    return Calibration(**overall.model_dump(), languages=languages, rows=rows)


def measure_spread(values: np.ndarray[Any, np.dtype[np.float64]]) -> Spread | None:
    """Mean and standard deviation (of the values themselves); None unless two of them differ."""
    if not values.size or values.min() == values.max():
        return None
    return Spread(mean=float(values.mean()), std=float(values.std()), num=values.size)


def scores_table(scores: Mapping[str, Calibration]) -> Table:
    """For each scorer a row for all scores and one for those of each language."""
    cells = [
        [name, language, f"{part.num:,}", f"{part.mean:.4f}", f"{part.std:.4f}"]
        for name, calibration in scores.items()
        for language, part in {"all": calibration, **calibration.languages}.items()
    ]
    return Table(["scorer", "language", "scores", "mean", "standard deviation"], cells, num_labels=2)

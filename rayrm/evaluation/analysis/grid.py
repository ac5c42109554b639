"""Results of several evaluations, gathered by set: the rows, and their numbers as arrays that analyses work on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayrm.errors import ConfigError, EvaluationError
from rayrm.evaluation.benchmarks import BENCHMARKS, BestOf, mean_credits, score_benchmark, score_ties
from rayrm.evaluation.preferences import Floats
from rayrm.evaluation.results import by_model_and_language

ENGLISH = "en"
"""The language that others are compared with."""
Row = Mapping[str, Any]


class Grid(NamedTuple):
    """The numbers of one set; arrays are models × languages × rows, NaN where there is none.

    A row and its translations share a place on the last axis.
    """

    models: list[str]
    languages: list[str]
    """English first, then in alphabetical order."""
    ids: list[str]
    groups: NDArray[np.int64]
    """Number of each row's group."""
    subsets: NDArray[np.str_]
    """Subset of each row, empty where it has none."""
    credits: Floats
    """What a row counts, 0 to 1."""
    gaps: Floats
    """Reward of the worst right answer minus that of the best wrong one."""
    lengths: Floats
    """Characters of the right answer minus those of the wrong one; NaN for rows with more than two answers."""

    def language(self, code: str) -> int | None:
        """Number of a language; null when the set is not in it."""
        return self.languages.index(code) if code in self.languages else None


class EvaluatedSet(NamedTuple):
    """All that is known of one set."""

    name: str
    benchmark: str | None
    rows: dict[str, dict[str, list[dict[str, Any]]]]
    """Result rows by model and language."""
    types: dict[str, str]
    """Model to its kind."""
    grid: Grid


def gather_sets(rows: Iterable[dict[str, Any]], wanted: Sequence[str] = ()) -> list[EvaluatedSet]:
    """The sets of Result rows, in the order in which they come; `wanted` selects some of them.

    Raises ConfigError for a wanted set that is not there, and EvaluationError when there is no row, a row comes twice,
    or a set is two benchmarks at once.
    """
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["set"]].append(row)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ConfigError(f"'sets' names '{missing[0]}', and the inputs hold {', '.join(found) or 'no row at all'}.")
    if not found:
        raise EvaluationError("The inputs hold no row; nothing is analysed.")
    return [_gather(name, found[name]) for name in (wanted or found)]


def _gather(name: str, rows: list[dict[str, Any]]) -> EvaluatedSet:
    seen: set[tuple[str, str, str]] = set()
    for row in rows:
        key = (row["model"], row["lang"], row["id"])
        if key in seen:
            raise EvaluationError(
                f"Row '{row['id']}' of '{name}' in {row['lang']} comes twice for '{row['model']}'; give each evaluation once."
            )
        seen.add(key)
    benchmarks = sorted({row["benchmark"] or "no benchmark" for row in rows})
    if len(benchmarks) > 1:
        raise EvaluationError(f"'{name}' is {' and '.join(benchmarks)} at once; analyse one of them.")
    types = {row["model"]: row["model_type"] for row in rows}
    grid = make_grid(rows)
    return EvaluatedSet(name, rows[0]["benchmark"], by_model_and_language(rows), types, grid)


def make_grid(rows: Sequence[Row]) -> Grid:
    """Result rows of one set as arrays."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    languages = sorted({row["lang"] for row in rows}, key=lambda code: (code != ENGLISH, code))
    ids = list(dict.fromkeys(row["id"] for row in rows))
    places = [{name: number for number, name in enumerate(names)} for names in (models, languages, ids)]
    shape = (len(models), len(languages), len(ids))
    credits, gaps, lengths = (np.full(shape, np.nan) for _ in range(3))
    groups, subsets = [""] * len(ids), [""] * len(ids)
    for row in rows:
        at = (places[0][row["model"]], places[1][row["lang"]], places[2][row["id"]])
        groups[at[2]] = row["group"]
        subsets[at[2]] = row["subset"] or ""
        credits[at] = math.nan if row["credit"] is None else row["credit"]
        gaps[at] = reward_gap(row)
        if len(row["lengths"]) == 2:
            lengths[at] = row["lengths"][0] - row["lengths"][1]
    codes = np.unique(np.array(groups, dtype=str), return_inverse=True)[1].astype(np.int64)
    return Grid(models, languages, ids, codes, np.array(subsets, dtype=str), credits, gaps, lengths)


def reward_gap(row: Row) -> float:
    """Reward of a row's worst right answer minus that of its best wrong one; NaN where a reward is missing."""
    rewards, num = row["rewards"], row["num_correct"]
    if not rewards or not 0 < num < len(rewards) or any(r is None or not math.isfinite(r) for r in rewards):
        return math.nan
    return float(min(rewards[:num]) - max(rewards[num:]))


def all_rewards(rows: Iterable[Row]) -> Floats:
    """Every reward of Result rows that is a number."""
    found = [reward for row in rows for reward in row["rewards"] or () if reward is not None]
    values = np.array(found, float)
    return values[np.isfinite(values)]


def pairs_of(names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Numbers of every two of `names`, the smaller one first."""
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            yield first, second


def score_credits(
    benchmark: str | None, subsets: Sequence[str], credits: Floats, ties: Sequence[BestOf]
) -> float | None:
    """A set's score in one language by what its rows count, as `score_results` puts it together; NaN counts nothing.

    `ties` are the rows of the subset Ties, whose credits are NaN.
    """
    known = np.isfinite(credits)
    if benchmark is None:
        return float(credits[known].mean()) if known.any() else None
    scores = mean_credits(np.asarray(subsets)[known].tolist(), credits[known].tolist())
    score = score_ties(ties).score if ties else None
    if score is not None:
        scores[ties[0].subset] = score
    return score_benchmark(BENCHMARKS[benchmark], scores).overall if scores else None

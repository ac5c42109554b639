"""Reward models that decide together: their rewards brought to one scale, and then to one number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayrm.errors import ConfigError
from rayrm.evaluation.analysis.grid import EvaluatedSet, all_rewards, score_credits
from rayrm.evaluation.analysis.leaderboard import Scores, average
from rayrm.evaluation.benchmarks import TIES, BestOf
from rayrm.evaluation.preferences import Floats
from rayrm.evaluation.results import own_id

Method = Literal["mean", "worst", "uncertainty"]
METHODS: tuple[Method, ...] = ("mean", "worst", "uncertainty")


class Ensemble(NamedTuple):
    """What models get together on a set."""

    models: tuple[str, ...]
    method: Method
    """`mean`, `worst` (the smallest), or `uncertainty` (the mean minus a penalty times the standard deviation)."""
    scores: Scores
    """Language to the set's score, by rows that every model has rewards for; null where there is none."""
    average: float | None
    """Mean over the languages other than English; null when one of them has no score, or there is none."""
    num_rows: int
    """Rows, over all languages, that every model has rewards for."""


class Rewards(NamedTuple):
    """The rewards of all reward models in one language, in standard deviations from each model's mean."""

    values: Floats
    """Models × rows × answers; NaN where there is no reward, and behind a row's last answer."""
    num_answers: NDArray[np.int64]
    """Answers of each row."""
    rows: list[dict[str, Any]]
    """A Result row each: its id, subset and number of right answers count."""


def combine(values: Floats, method: Method, penalty: float) -> Floats:
    """One reward from those of several models along the first axis; NaN where a model has none."""
    if method == "worst":
        return np.min(values, axis=0)
    mean = np.mean(values, axis=0)
    return mean if method == "mean" else mean - penalty * np.std(values, axis=0)


def rewarding_models(evaluated: EvaluatedSet) -> list[str]:
    """The models whose rewards differ, so that they can be brought to one scale."""
    found = []
    for model, languages in evaluated.rows.items():
        rewards = all_rewards(row for rows in languages.values() for row in rows)
        if len(rewards) > 1 and rewards.std() > 0:
            found.append(model)
    return found


def check_ensembles(evaluated: EvaluatedSet, wanted: Iterable[Sequence[str]]) -> None:
    """Raise ConfigError for a list that names a model twice, or one without rewards on this set."""
    models = rewarding_models(evaluated)
    for members in wanted:
        unknown = [model for model in members if model not in models]
        if unknown or len(set(members)) < len(members):
            named = f"'{unknown[0]}'" if unknown else "a model twice"
            raise ConfigError(
                f"'ensembles' names {named}, and an ensemble is made of different models with rewards on "
                f"'{evaluated.name}': {', '.join(models) or 'there is none'}."
            )


def measure_ensembles(evaluated: EvaluatedSet, wanted: Iterable[Sequence[str]], penalty: float) -> list[Ensemble]:
    """The scores of each list of models by each method, in the order of `wanted`."""
    models = rewarding_models(evaluated)
    standardised = standardise(evaluated, models)
    found = []
    for members in wanted:
        numbers = [models.index(model) for model in members]
        for method in METHODS:
            scores, num_rows = {}, 0
            for code, rewards in standardised.items():
                scores[code], num = _score(evaluated.benchmark, rewards, numbers, method, penalty)
                num_rows += num
            found.append(Ensemble(tuple(members), method, scores, average(scores), num_rows))
    return found


def all_combinations(models: Sequence[str]) -> list[tuple[str, ...]]:
    """Every set of two models or more."""
    return [members for size in range(2, len(models) + 1) for members in combinations(models, size)]


def standardise(evaluated: EvaluatedSet, models: Sequence[str]) -> dict[str, Rewards]:
    """Language to the rewards of `models`, each minus the mean of all that model's rewards, over their deviation.

    Mean and (population) standard deviation are over all languages of the set.
    """
    scales = {}
    for model in models:
        rewards = all_rewards(row for rows in evaluated.rows[model].values() for row in rows)
        scales[model] = (rewards.mean(), rewards.std())
    found = {}
    for code in evaluated.grid.languages:
        rows = {row["id"]: row for model in models for row in evaluated.rows[model].get(code, ())}
        places = {name: number for number, name in enumerate(rows)}
        sizes = np.array([len(row["lengths"]) for row in rows.values()], np.int64)
        values = np.full((len(models), len(rows), max(sizes, default=0)), np.nan)
        for number, model in enumerate(models):
            mean, deviation = scales[model]
            for row in evaluated.rows[model].get(code, ()):
                known = np.array(row["rewards"] or (), float)
                values[number, places[row["id"]], : len(known)] = (known - mean) / deviation
        values[~np.isfinite(values)] = np.nan
        found[code] = Rewards(values, sizes, list(rows.values()))
    return found


def _score(
    benchmark: str | None, rewards: Rewards, members: Sequence[int], method: Method, penalty: float
) -> tuple[float | None, int]:
    if not rewards.rows:
        return None, 0
    values = combine(rewards.values[members], method, penalty)
    answers = np.arange(values.shape[1]) < rewards.num_answers[:, None]
    known = (np.isfinite(values) | ~answers).all(axis=1)
    subsets = [row["subset"] or "" for row in rewards.rows]
    is_ties = np.array([benchmark is not None and subset == TIES for subset in subsets])
    ties = [
        BestOf(
            own_id(rewards.rows[i]["id"], TIES),
            TIES,
            rewards.rows[i]["num_correct"],
            values[i, : rewards.num_answers[i]].tolist(),
        )
        for i in np.flatnonzero(is_ties)
    ]
    num_correct = np.array([row["num_correct"] for row in rewards.rows])
    credits = np.where(known & ~is_ties, ensemble_credits(values, rewards.num_answers, num_correct), np.nan)
    return score_credits(benchmark, subsets, credits, ties), int(known.sum())


def ensemble_credits(values: Floats, num_answers: NDArray[np.int64], num_correct: NDArray[np.int64]) -> Floats:
    """What rows count whose first `num_correct` answers are right: of pairs 1 if the right one is above the other; of
    more answers the share of right ones among the best."""
    filled = np.where(np.isnan(values), -np.inf, values)
    best = filled == filled.max(axis=1, keepdims=True)
    right = np.arange(values.shape[1]) < num_correct[:, None]
    shared = (best & right).sum(axis=1) / best.sum(axis=1)
    return np.where((num_answers == 2) & (shared < 1), 0.0, shared)

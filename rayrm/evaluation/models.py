"""Evaluate a reward model on prepared sets: reward its rows, and tell what they count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from rayrm import files
from rayrm.errors import ConfigError, EvaluationError
from rayrm.evaluation.benchmarks import TIES, Benchmark, best_of_credit, pair_credit
from rayrm.evaluation.preferences import RewardedPreference
from rayrm.evaluation.rewarding import RewardingJob, find_split, reward_preferences
from rayrm.evaluation.sets import Prepared
from rayrm.rows import Candidates, Preference, Scored
from rayrm.runs import RowsJob, transform_rows
from rayrm.scoring import (
    PreferenceScoring,
    check_preference_scoring,
    does_compare,
    model_type_of,
    score_candidates,
)
from rayrm.scoring.reward_model import RewardModelScoring
from rayrm.shards import iter_tables, read_table
from rayrm.splits import is_held_out


class Evaluation(NamedTuple):
    """What all models are evaluated with."""

    output: str
    """Folder of the rewarded rows, `<output>/<model>/<type of rows>`."""
    split: Literal["all", "held_out"]
    shard_rows: int
    max_failed_fraction: float
    benchmark: str | None


class EvaluatedModel(NamedTuple):
    """A model with its rewarded rows."""

    config: PreferenceScoring
    tables: dict[str, pa.Table]
    """By type of rows: RewardedPreference rows for `preference`, Scored rows for `best_of` and `conversation`."""
    results: list[dict[str, Any]]
    """Result rows of the preferences and of the sets with right and wrong answers."""

    def sets(self, rows: str) -> list[str]:
        """The names of the sets with rows of one type."""
        return sorted(set(self.tables[rows]["set"].to_pylist())) if rows in self.tables else []

    def select(self, rows: str, name: str) -> pa.Table:
        """The rows of one type and set."""
        table = self.tables[rows]
        return table.filter(pa.array([found == name for found in table["set"].to_pylist()], pa.bool_()))


def check_held_out(models: Sequence[PreferenceScoring], prepared: Sequence[Prepared]) -> None:
    """Raise ConfigError for a model without a split, and EvaluationError when no row of a type was held out of it."""
    for model in models:
        if not isinstance(model, RewardModelScoring):
            raise ConfigError(
                f"split is 'held_out', and '{model.name}' is no model that was trained here; set split=all."
            )
        split = find_split(model.model)
        for part in prepared:
            if part.rows != "preference":
                raise ConfigError(
                    f"split is 'held_out', and the sets hold {part.rows} rows too; take pairs alone, or all rows."
                )
            groups = (group for table in iter_tables(part.path, ["group"]) for group in table["group"].to_pylist())
            if not any(is_held_out(group, split.fraction, split.seed) for group in groups):
                raise EvaluationError(f"No {part.rows} row is of a group that the training of '{model.name}' held out.")


def check_subsets(benchmark: Benchmark, prepared: Sequence[Prepared]) -> None:
    """Raise EvaluationError for a set and language without a row of the benchmark's subsets, which would have no score."""
    known = {subset.name for section in benchmark.sections for subset in section.subsets} | set(benchmark.prior_sets)
    for part in prepared:
        found: defaultdict[tuple[str, str], set[str | None]] = defaultdict(set)
        for table in iter_tables(part.path, ["set", "lang", "subset"]):
            for name, lang, subset in zip(*(table[n].to_pylist() for n in ("set", "lang", "subset")), strict=True):
                found[name, lang].add(subset)
        for (name, lang), subsets in found.items():
            if not subsets & known:
                told = ", ".join(sorted(subset or "none" for subset in subsets)[:5])
                raise EvaluationError(
                    f"No row of '{name}' in {lang} is of a subset of {benchmark.name}, such as '{sorted(known)[0]}'; "
                    f"found {told}; name the column of subsets by columns, or leave benchmark out."
                )


def check_rows(models: Sequence[PreferenceScoring], prepared: Sequence[Prepared]) -> None:
    """Raise ConfigError for rows that a model cannot reward, before it is loaded.

    These are rows of languages for which it is not calibrated, and single answers for a model that compares two.
    """
    for model in models:
        check_preference_scoring(model, [part.path for part in prepared])
        if (others := [part.rows for part in prepared if part.rows != "preference"]) and does_compare(model):
            raise ConfigError(
                f"'{model.name}' compares two completions, and the sets hold {' and '.join(others)} rows, in which single "
                "ones are rewarded; take sets of pairs for it."
            )


def evaluate_model(model: PreferenceScoring, prepared: Sequence[Prepared], how: Evaluation) -> EvaluatedModel:
    """Reward the rows of all sets that are not rewarded yet. Raises EvaluationError when too many rewards failed."""
    tables: dict[str, pa.Table] = {}
    for part in prepared:
        output = files.join(how.output, model.name, part.rows)
        if part.rows == "preference":
            _reward_preferences(model, part, output, how)
        else:
            _score(model, part, output, how)
        tables[part.rows] = read_table(output)
    return _evaluated(model, tables, how.benchmark)


def read_model(model: PreferenceScoring, prepared: Sequence[Prepared], how: Evaluation) -> EvaluatedModel:
    """What `evaluate_model` gave when it was complete."""
    tables: dict[str, pa.Table] = {
        part.rows: read_table(files.join(how.output, model.name, part.rows)) for part in prepared
    }
    return _evaluated(model, tables, how.benchmark)


def _reward_preferences(model: PreferenceScoring, part: Prepared, output: str, how: Evaluation) -> None:
    job = RewardingJob(
        input=part.path,
        output=output,
        shard_rows=how.shard_rows,
        reward_model=model,
        split=how.split,
        max_failed_fraction=how.max_failed_fraction,
    )
    stage = partial(reward_preferences, config=job)
    transform_rows(job, Preference, RewardedPreference, stage, {model.name: how.max_failed_fraction})


class ScoringJob(RowsJob):
    """Candidates rows and the reward model that scores them."""

    reward_model: PreferenceScoring
    """The reward model."""


def _score(model: PreferenceScoring, part: Prepared, output: str, how: Evaluation) -> None:
    job = ScoringJob(input=part.path, output=output, shard_rows=how.shard_rows, reward_model=model)
    stage = partial(score_candidates, config=model)
    transform_rows(job, Candidates, Scored, stage, {model.name: how.max_failed_fraction})


def _evaluated(model: PreferenceScoring, tables: dict[str, pa.Table], benchmark: str | None) -> EvaluatedModel:
    about = {"model": model.name, "model_type": model_type_of(model), "benchmark": benchmark}
    results = []
    if "preference" in tables:
        results += [{**about, **row} for row in pair_results(tables["preference"], model.name)]
    if "best_of" in tables:
        results += [{**about, **row} for row in best_of_results(tables["best_of"], model.name, benchmark is not None)]
    return EvaluatedModel(model, tables, results)


KEYS = ("set", "id", "group", "lang", "subset")


def pair_results(table: pa.Table, name: str) -> list[dict[str, Any]]:
    """RewardedPreference rows as Result rows, but for what they say of the model; a tie has no credit."""
    read = ("chosen", "rejected", "chosen_reward", "rejected_reward", "status")
    found = []
    for row in table.select([*KEYS, *read]).to_pylist():
        rewards = [row["chosen_reward"], row["rejected_reward"]]
        found.append(
            {
                **{key: row[key] for key in KEYS},
                "num_correct": 1,
                "rewards": rewards,
                "lengths": [sum(len(turn["content"]) for turn in row[side]) for side in ("chosen", "rejected")],
                "credit": pair_credit(*rewards),
                "status": worst_status(row["status"][name]),
            }
        )
    return found


def best_of_results(table: pa.Table, name: str, is_benchmark: bool) -> list[dict[str, Any]]:
    """Scored rows with `num_correct` as Result rows, but for what they say of the model.

    The credit is that of `best_of_credit`; rows of a benchmark's Ties have none, for they count together.
    """
    found = []
    for row in table.select([*KEYS, "num_correct", "candidates", "scores", "status"]).to_pylist():
        rewards = row["scores"][name]
        has_credit = not (is_benchmark and row["subset"] == TIES)
        found.append(
            {
                **{key: row[key] for key in KEYS},
                "num_correct": int(row["num_correct"]),
                "rewards": rewards,
                "lengths": [len(text) for text in row["candidates"]],
                "credit": best_of_credit(rewards, int(row["num_correct"])) if has_credit else None,
                "status": worst_status(row["status"][name]),
            }
        )
    return found


def worst_status(words: Sequence[str]) -> str:
    """The first word of a score that is not there; else `truncated` where one is, else `ok`."""
    failed = [word for word in words if word not in ("ok", "truncated")]
    return failed[0] if failed else "truncated" if "truncated" in words else "ok"

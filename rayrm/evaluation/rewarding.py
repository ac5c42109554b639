"""Preference → RewardedPreference: reward both sides of every preference with a scorer of preferences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from rayrm import cluster, files
from rayrm.config import NOT_IDENTITY
from rayrm.errors import ConfigError
from rayrm.models.folders import read_mark
from rayrm.rows import TEXTS, Preference, map_table, on_kept, set_column
from rayrm.runs import RowsJob
from rayrm.scoring import PreferenceScoring, load_preference_scorer
from rayrm.scoring.base import Outcome
from rayrm.scoring.reward_model import LANGUAGES, RewardModelScoring
from rayrm.splits import is_held_out

if TYPE_CHECKING:
    from ray.data import Dataset

READS = ("anchor", "tools", *LANGUAGES)
"""Columns that every scorer sees beside the prompt and both sides."""


class RewardingJob(RowsJob):
    """Preference rows and the reward model that is to agree with them."""

    reward_model: PreferenceScoring
    """The model that is evaluated."""
    split: Literal["all", "held_out"] = "all"
    """Rows that count: all, or those whose group the reward model's own training held out."""
    max_failed_fraction: float = Field(0.05, ge=0, le=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most rewards that may be null; a run with more fails at its end and keeps what it wrote."""


class Split(NamedTuple):
    """The held-out part of a training run."""

    fraction: float
    seed: int


def find_split(model: str) -> Split:
    """The held-out split that the reward model at `model` was trained with, from its completion mark.

    Raises ConfigError when the mark is not there or when the training held nothing out.
    """
    training = read_mark(model).get("config", {}).get("training", {})
    if not training.get("held_out_fraction"):
        raise ConfigError(
            f"split is 'held_out', and '{files.join(model, files.CHECKPOINT_MARK)}' names no held-out share; "
            "evaluate a reward model that was trained with training.held_out_fraction above 0, or set split=all."
        )
    return Split(training["held_out_fraction"], training["seed"])


def reward_preferences(preferences: Dataset, config: RewardingJob) -> Dataset:
    """Reward both sides of the rows of `config.split`; other rows are dropped and counted as `trained_on`.

    Adds chosen_reward, rejected_reward and status. A model that compares two completions gives each side log p, where p
    is the chance that it is the better one; their gap is the log-odds. Raises ResourceError when the cluster can never
    hold the actors, and ConfigError where nobody knows what was held out.
    """
    split = None
    if config.split == "held_out":
        if not isinstance(config.reward_model, RewardModelScoring):
            raise ConfigError(
                f"split is 'held_out', and '{config.reward_model.name}' is no model that was trained here; set split=all."
            )
        split = find_split(config.reward_model.model)
    workers = config.reward_model.workers
    cluster.require(workers.num_workers, workers.num_cpus, workers.num_gpus, "The reward model's evaluation")
    return preferences.map_batches(
        RewardStage,
        fn_constructor_args=(config.reward_model, split),
        batch_format="pyarrow",
        batch_size=None,
        **workers.pool(),
    )


def keep_held_out(row: dict[str, Any], split: Split) -> tuple[dict[str, Any] | None, list[str]]:
    """Drop a row whose group was trained on."""
    held_out = is_held_out(row["group"], split.fraction, split.seed)
    return ({}, []) if held_out else (None, ["trained_on"])


class RewardStage:
    """An actor that holds a scorer of preferences."""

    def __init__(self, config: PreferenceScoring, split: Split | None) -> None:
        self.config = config
        self.split = split
        self.scorer = load_preference_scorer(config)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Reward the kept rows of a shard that are in the split."""
        # Here and not in a stage of its own, which would wait for a CPU when actors hold them all.
        if self.split is not None:
            table = map_table(table, keep_held_out, self.split, ("group",), Preference)
        return on_kept(table, self.reward)

    def reward(self, table: pa.Table) -> pa.Table:
        """`table` with chosen_reward, rejected_reward and status."""
        reads = dict.fromkeys(("prompt", *READS, *self.scorer.needs, "chosen", "rejected"))
        rows = table.select([name for name in reads if name in table.column_names]).to_pylist()
        found = self._compare(rows) if self.scorer.compares else self._score(rows)
        for index, name in enumerate(("chosen_reward", "rejected_reward")):
            table = set_column(table, name, pa.array([pair[index][0] for pair in found], pa.float64()))
        words = [[status for _, status in pair] for pair in found]
        status = pa.StructArray.from_arrays([pa.array(words, TEXTS)], [self.config.name])
        return set_column(table, "status", status)

    def _compare(self, rows: list[dict[str, Any]]) -> list[tuple[Outcome, Outcome]]:
        return self.scorer.compare([(self._question(row, "chosen"), self._question(row, "rejected")) for row in rows])

    def _score(self, rows: list[dict[str, Any]]) -> list[tuple[Outcome, Outcome]]:
        """Sides of the same prompt are candidates of one question: some scorers cut those alike."""
        questions: list[dict[str, Any]] = []
        for row in rows:
            chosen, rejected = self._question(row, "chosen"), self._question(row, "rejected")
            if chosen["prompt"] == rejected["prompt"]:
                questions.append({**chosen, "candidates": chosen["candidates"] + rejected["candidates"]})
            else:
                questions += [chosen, rejected]
        found = iter([outcome for outcomes in self.scorer.score(questions) for outcome in outcomes])
        return list(zip(found, found, strict=True))

    def _question(self, row: dict[str, Any], side: str) -> dict[str, Any]:
        """What the scorer reads: the conversation up to the last message of a side, and that message as the candidate."""
        messages = row[side] or [{"role": "assistant", "content": ""}]
        question = {name: row.get(name) for name in (*READS, *self.scorer.needs)}
        return {**question, "candidates": [messages[-1]["content"]], "prompt": [*row["prompt"], *messages[:-1]]}

"""RewardedPreference rows → how a reward model's raw rewards lie, which its checkpoint then holds."""

from __future__ import annotations

import logging
from array import array
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from rayrm import files
from rayrm.errors import CheckpointError, ConfigError, EvaluationError
from rayrm.evaluation.report import Table
from rayrm.evaluation.rewarding import RewardingJob, find_split
from rayrm.evaluation.scores import measure_spread
from rayrm.models.folders import read_mark
from rayrm.rows import Preference
from rayrm.scoring.reward_model import (
    LANGUAGES,
    Calibration,
    RewardModelScoring,
    check_gives_rewards,
    check_reward_model,
    language_of,
)

log = logging.getLogger("rayrm")
SIDES = ("chosen_reward", "rejected_reward")
COLUMNS = [*LANGUAGES, *SIDES]
"""Columns of RewardedPreference rows that a calibration is made of."""


class CalibratingJob(RewardingJob):
    """Preference rows and the reward model whose rewards of them are its calibration."""

    reward_model: RewardModelScoring
    """The reward model that is calibrated."""


def check_calibrating(config: CalibratingJob) -> None:
    """Find out, before any actor starts, whether there are rows, and a checkpoint that can hold a calibration.

    Raises CheckpointError, ConfigError or SchemaError.
    """
    model = config.reward_model.model
    if config.reward_model.calibration != "none":
        raise ConfigError(
            f"reward_model.calibration is '{config.reward_model.calibration}', and a calibration is made of raw "
            "rewards; leave it out."
        )
    check_reward_model(config.reward_model)
    if "digest" not in read_mark(model):
        raise CheckpointError(
            f"'{model}' has no completion mark {files.CHECKPOINT_MARK}, which holds a calibration; calibrate a model "
            "that train_reward_model has made."
        )
    check_gives_rewards(model)
    if config.split == "held_out":
        find_split(model)
    Preference.check_files(config.input)


def measure_calibration(tables: Iterable[pa.Table], rows: str) -> tuple[Calibration, int]:
    """The calibration by the rewards of RewardedPreference rows, both sides alike, and how many rewards are null.

    `rows` is the fingerprint of the rows. A language with fewer than two different rewards is left out. Raises
    EvaluationError when all rewards together are too few or all the same.
    """
    rewards: dict[str, array[float]] = defaultdict(lambda: array("d"))
    num_unscored = 0
    for table in tables:
        for row in table.to_pylist():
            found = [row[side] for side in SIDES if row[side] is not None]
            num_unscored += len(SIDES) - len(found)
            rewards[language_of(row)].extend(found)
    spreads = {language: measure_spread(np.array(rewards[language])) for language in sorted(rewards)}
    overall = measure_spread(np.concatenate([np.array(values) for values in rewards.values()] or [np.zeros(0)]))
    if overall is None:
        num = sum(map(len, rewards.values()))
        raise EvaluationError(
            f"There are {num:,} rewards ({num_unscored:,} more are null) and no two that differ, so that they have no "
            "spread; calibrate on more rows, and on a model that tells them apart."
        )
    if unmeasured := [language for language, spread in spreads.items() if spread is None]:
        log.warning("no calibration for %s: no two rewards differ", ", ".join(unmeasured))
    languages = {language: spread for language, spread in spreads.items() if spread is not None}
    return Calibration(**overall.model_dump(), languages=languages, rows=rows), num_unscored


def store_calibration(model: str, calibration: Calibration) -> None:
    """Write `calibration` into the completion mark of the checkpoint `model`, whose identity stays as it is."""
    mark, stored = read_mark(model), calibration.model_dump()
    if mark.get("calibration") != stored:
        files.write_json(files.join(model, files.CHECKPOINT_MARK), {**mark, "calibration": stored})


def calibration_table(calibration: Calibration) -> Table:
    """A row for all rewards and for those of each language."""
    spreads = {"all": calibration, **calibration.languages}
    cells = [[name, f"{part.num:,}", f"{part.mean:.4f}", f"{part.std:.4f}"] for name, part in spreads.items()]
    return Table(["language", "rewards", "mean", "standard deviation"], cells)

"""Probe rows: a few pairs whose rewards stand in the checkpoint, and tell whether a model is still the one it was."""

from __future__ import annotations

from typing import Any

import torch

from rayrm.errors import CheckpointError
from rayrm.models.reward_model import Pair, Rendering, check_rendering, load_rewarder
from rayrm.training.launch import TrainingWorkers, fetch
from rayrm.training.preferences import split_side

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
"""Most that a reward may move, as a share of its size or of 1, when the saved model is loaded again."""


def probe_sides(row: dict[str, Any]) -> list[Pair]:
    """The chosen and the rejected side of a probe row."""
    sides = [split_side(row["prompt"], row[name]) for name in ("chosen", "rejected")]
    return [side for side in sides if side is not None]


def check_saved(
    path: str, rendering: dict[str, Any], probe: list[dict[str, Any]], precision: str, workers: TrainingWorkers
) -> None:
    """Load the model at `path` in a process of its own and compare its rewards with those of the probe rows.

    Raises CheckpointError when it does not load, renders in another way, or gives other rewards.
    """
    import ray

    task = ray.remote(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus, max_retries=2)(probe_rewards)
    (rewards,) = fetch([task.remote(path, rendering, probe, precision)], "checking")
    for row, found in zip(probe, rewards, strict=True):
        for expected, reward in zip(row["rewards"], found, strict=True):
            if reward is None or abs(expected - reward) > TOLERANCES[precision] * max(1.0, abs(expected)):
                raise CheckpointError(
                    f"The model saved at '{path}' gives row '{row['id']}' the reward {reward}, and gave it {expected} "
                    "before it was saved; it is not marked complete."
                )


def probe_rewards(
    path: str, rendering: dict[str, Any], probe: list[dict[str, Any]], precision: str
) -> list[list[float | None]]:
    """Rewards of both sides of each probe row by the model as it lies at `path`.

    Raises CheckpointError when it does not load or renders in another way.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rewarder = load_rewarder(path, Rendering(rendering["chat_template"], rendering["max_length"]), dtype=dtype)
    check_rendering(path, rendering["fingerprint"], rewarder.renderer.fingerprint())
    return [[reward for reward, _ in rewarder.rewards(probe_sides(row))] for row in probe]

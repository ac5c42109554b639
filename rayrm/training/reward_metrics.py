"""Metrics of a reward model on pairs, counted over all of them and not over batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def measure_pairs(rewards: Floats, losses: Floats, languages: Sequence[str]) -> dict[str, float]:
    """`eval_loss`, `eval_accuracy`, `eval_margin` and mean rewards; accuracy and margin by language pair too.

    `rewards` [2, pairs] holds the chosen sides first; a tie is a miss; the margin is the mean gap between the sides.
    """
    gaps = rewards[0] - rewards[1]
    metrics = {
        "eval_loss": float(losses.mean()),
        "eval_chosen_reward": float(rewards[0].mean()),
        "eval_rejected_reward": float(rewards[1].mean()),
        **_compare(gaps, ""),
    }
    names = np.array(languages)
    for name in sorted(set(languages)):
        metrics |= _compare(gaps[names == name], f"/{name}")
    return metrics


def _compare(gaps: Floats, suffix: str) -> dict[str, float]:
    return {f"eval_accuracy{suffix}": float((gaps > 0).mean()), f"eval_margin{suffix}": float(gaps.mean())}

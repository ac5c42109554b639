"""Metrics of a reward model on pairs, counted over all of them and not over batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NUM_BINS = 10


class MeasuredPairs(NamedTuple):
    """What a model gave to pairs, and what is known of them; a place in each array is a pair."""

    rewards: Floats
    """[2, pairs], chosen sides first."""
    losses: Floats
    """[pairs]."""
    extra_lengths: NDArray[np.int64]
    """Tokens of the chosen side minus tokens of the rejected one, [pairs]."""
    languages: NDArray[np.str_]
    """Language or language pair, [pairs]."""
    subsets: NDArray[np.str_]
    """Subset, or an empty string, [pairs]."""

    def select(self, mask: NDArray[np.bool_]) -> MeasuredPairs:
        """The pairs of a mask."""
        columns: Any = (column[..., mask] for column in self)
        return MeasuredPairs(*columns)


def measure_pairs(pairs: MeasuredPairs) -> dict[str, float]:
    """Metrics of all pairs as `eval_accuracy`, of a language as `eval_accuracy/en-de`, of a subset as `…/subset/chat`.

    `accuracy` counts a tie as a miss, `accuracy_half_ties` as half a hit; `margin` is the mean gap between the sides;
    `brier` is the mean of (1 − σ(gap))²; `ece` is the expected calibration error of σ(|gap|) in ten equal bins from
    0.5 to 1 (arXiv 1706.04599), where a tie is half a hit; rewards have means and standard deviations;
    `length_correlation` is Pearson's r of gap and extra length; the last two are the accuracies of the pairs whose
    chosen side is the longer and the shorter one. What is not defined (no such pair, no spread) is left out.
    """
    found = _measure(pairs, "")
    for names, prefix in ((pairs.languages, "/"), (pairs.subsets, "/subset/")):
        for name in np.unique(names[names != ""]).tolist():
            found |= _measure(pairs.select(names == name), f"{prefix}{name}")
    return found


def _measure(pairs: MeasuredPairs, suffix: str) -> dict[str, float]:
    gaps = pairs.rewards[0] - pairs.rewards[1]
    hits = gaps > 0
    metrics = {
        "loss": pairs.losses.mean(),
        "accuracy": hits.mean(),
        "accuracy_half_ties": (np.sign(gaps).mean() + 1) / 2,
        "margin": gaps.mean(),
        "brier": (_sigmoid(-gaps) ** 2).mean(),
        "ece": expected_calibration_error(gaps),
    }
    for side, rewards in zip(("chosen", "rejected"), pairs.rewards, strict=True):
        metrics |= {f"{side}_reward": rewards.mean(), f"{side}_reward_std": rewards.std()}
    if gaps.std() and pairs.extra_lengths.std():
        metrics["length_correlation"] = np.corrcoef(gaps, pairs.extra_lengths)[0, 1]
    for name, mask in (("longer", pairs.extra_lengths > 0), ("shorter", pairs.extra_lengths < 0)):
        if mask.any():
            metrics[f"accuracy_chosen_{name}"] = hits[mask].mean()
    return {f"eval_{name}{suffix}": float(value) for name, value in metrics.items()}


def expected_calibration_error(gaps: Floats) -> float:
    """Mean distance of σ(|gap|) from the share of hits, over equal bins of σ(|gap|) weighted by their pairs."""
    confidence, hits = _sigmoid(np.abs(gaps)), (np.sign(gaps) + 1) / 2
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    return float(np.abs(np.bincount(bins, weights=confidence - hits)).sum() / len(gaps))


def _sigmoid(x: Floats) -> Floats:
    half: Floats = np.tanh(x / 2)
    return (1 + half) / 2

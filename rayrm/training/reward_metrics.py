"""Metrics of a reward model, counted over all rows and not over batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rayrm.training.objectives.base import Measured

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

    `accuracy` counts a tie as a miss, `accuracy_half_ties` as half a hit, and `ties` is the number of pairs whose sides
    have the same reward; `margin` is the mean gap between the sides; `brier` is the mean of (1 − σ(gap))²; `ece` is the
    expected calibration error of σ(|gap|) in ten equal bins from 0.5 to 1 (arXiv 1706.04599), where a tie is half a hit;
    rewards have means and standard deviations; `length_correlation` is Pearson's r of gap and extra length,
    `length_correlation_spearman` that of their ranks; the last two are the accuracies of the pairs whose chosen side is
    the longer and the shorter one. What is not defined (no such pair, no spread) is left out.
    `eval_accuracy_worst_language` is the lowest accuracy of a language.
    """
    found: dict[str, float] = {}
    for mask, suffix in by_slice(pairs.languages, pairs.subsets):
        found |= _measure(pairs.select(mask), suffix)
    return found | _worst_language(found)


def by_slice(languages: NDArray[np.str_], subsets: NDArray[np.str_]) -> Iterator[tuple[NDArray[np.bool_], str]]:
    """A mask of rows, and what stands behind a metric's name: all rows, each language, each subset."""
    yield np.ones(len(languages), bool), ""
    for names, prefix in ((languages, "/"), (subsets, "/subset/")):
        for name in np.unique(names[names != ""]).tolist():
            yield names == name, f"{prefix}{name}"


def _worst_language(found: Mapping[str, float]) -> dict[str, float]:
    """What a model that is chosen by its weakest language is chosen by; nothing where no row has a language."""
    each = [value for name, value in found.items() if name.startswith("eval_accuracy/") and "/subset/" not in name]
    return {"eval_accuracy_worst_language": min(each)} if each else {}


def _measure(pairs: MeasuredPairs, suffix: str) -> dict[str, float]:
    gaps = pairs.rewards[0] - pairs.rewards[1]
    hits = gaps > 0
    metrics = {
        "loss": pairs.losses.mean(),
        "accuracy": hits.mean(),
        "accuracy_half_ties": (np.sign(gaps).mean() + 1) / 2,
        "ties": (gaps == 0).sum(),
        "margin": gaps.mean(),
        "brier": (_sigmoid(-gaps) ** 2).mean(),
        "ece": expected_calibration_error(gaps),
    }
    for side, rewards in zip(("chosen", "rejected"), pairs.rewards, strict=True):
        metrics |= {f"{side}_reward": rewards.mean(), f"{side}_reward_std": rewards.std()}
    if correlations := _correlate(gaps, pairs.extra_lengths.astype(float)):
        metrics["length_correlation"], metrics["length_correlation_spearman"] = correlations
    for name, mask in (("longer", pairs.extra_lengths > 0), ("shorter", pairs.extra_lengths < 0)):
        if mask.any():
            metrics[f"accuracy_chosen_{name}"] = hits[mask].mean()
    return {f"eval_{name}{suffix}": float(value) for name, value in metrics.items()}


def expected_calibration_error(gaps: Floats) -> float:
    """Mean distance of σ(|gap|) from the share of hits, over equal bins of σ(|gap|) weighted by their pairs."""
    confidence, hits = _sigmoid(np.abs(gaps)), (np.sign(gaps) + 1) / 2
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    return float(np.abs(np.bincount(bins, weights=confidence - hits)).sum() / len(gaps))


def measure_ratings(measured: Measured, names: Sequence[str], is_logit: bool) -> dict[str, float]:
    """Metrics of all rows, of each language and of each subset: the loss, and for each rating, in the unit that is
    learned, `mse_<rating>`, `pearson_<rating>` and `spearman_<rating>` over the rows that have it.

    A correlation of fewer than two rows, or without spread, is left out.
    """
    found: dict[str, float] = {}
    outputs = measured.outputs[0, :, 0]
    values = _sigmoid(outputs) if is_logit else outputs
    for mask, suffix in by_slice(measured.languages, measured.subsets):
        found[f"eval_loss{suffix}"] = float(measured.losses[mask].mean())
        for index, name in enumerate(names):
            wanted = measured.targets[mask, index]
            known = ~np.isnan(wanted)
            given, wanted = values[mask, index][known], wanted[known]
            if len(wanted):
                found[f"eval_mse_{name}{suffix}"] = float(((given - wanted) ** 2).mean())
            if correlations := _correlate(given, wanted):
                found[f"eval_pearson_{name}{suffix}"], found[f"eval_spearman_{name}{suffix}"] = correlations
    return found


def measure_verdicts(measured: Measured) -> dict[str, float]:
    """Metrics of logits that say whether something is right: of all rows, of each language and of each subset.

    A label above one half means right. `accuracy` takes a logit above 0 for right; `accuracy_right` and
    `accuracy_wrong` are those of what is right and of what is wrong; `brier` is the mean of (label − σ(logit))²; `ece`
    as for pairs; `auc` is the probability that something right has a higher logit than something wrong, a tie being
    half. What is not defined is left out. `eval_accuracy_worst_language` is the lowest accuracy of a language.
    """
    found: dict[str, float] = {}
    for mask, suffix in by_slice(measured.languages, measured.subsets):
        labels = measured.targets[mask]
        known = ~np.isnan(labels)
        logits, labels = measured.outputs[0, mask, :, 0][known], labels[known]
        is_right = labels > 0.5
        hits = (logits > 0) == is_right
        metrics = {
            "loss": measured.losses[mask].mean(),
            "accuracy": hits.mean(),
            "brier": ((labels - _sigmoid(logits)) ** 2).mean(),
            "ece": expected_calibration_error(np.where(is_right, logits, -logits)),
            "logit": logits.mean(),
        }
        if is_right.any():
            metrics["accuracy_right"] = hits[is_right].mean()
        if not is_right.all():
            metrics["accuracy_wrong"] = hits[~is_right].mean()
        if is_right.any() and not is_right.all():
            num_right, num_wrong = is_right.sum(), (~is_right).sum()
            above = rank(logits)[is_right].sum() - num_right * (num_right + 1) / 2
            metrics["auc"] = above / (num_right * num_wrong)
        found |= {f"eval_{name}{suffix}": float(value) for name, value in metrics.items()}
    return found | _worst_language(found)


def _correlate(first: Floats, second: Floats) -> tuple[float, float] | None:
    """Pearson's r of two arrays [n] and of their ranks (Spearman's); None where one of them has no spread."""
    # Not std, which rounds: that of three times 0.1 is above 0.
    if len(first) < 2 or not np.ptp(first) or not np.ptp(second):
        return None
    return float(np.corrcoef(first, second)[0, 1]), float(np.corrcoef(rank(first), rank(second))[0, 1])


def rank(values: Floats) -> Floats:
    """Ranks from 1, ties sharing their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: Floats = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return found


def _sigmoid(x: Floats) -> Floats:
    half: Floats = np.tanh(x / 2)
    return (1 + half) / 2

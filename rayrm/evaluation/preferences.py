"""How often a reward model agrees with preferences, beside a judge that looks at nothing but length."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from rayrm.config import Config
from rayrm.errors import EvaluationError
from rayrm.rows import Preference, RowType
from rayrm.seeds import seed_of

Floats = NDArray[np.float64]

RewardedPreference = RowType(
    "RewardedPreference",
    {**Preference.columns, "chosen_reward": pa.float64(), "rejected_reward": pa.float64(), "status": None},
    (*Preference.nullable, "chosen_reward", "rejected_reward"),
)
"""A Preference with the rewards of its two sides; `status` has one word for each, the chosen side first."""


class BootstrapConfig(Config):
    """How intervals are drawn around a metric."""

    num_resamples: int = Field(1000, ge=1)
    """Resamples of the groups, with replacement; an interval holds the middle of their metrics."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Share of the resamples that an interval holds."""
    seed: int = 0
    """Seed of the resamples."""


class Pairs(NamedTuple):
    """The numbers of n preferences that metrics are made of, one entry a row."""

    gaps: Floats
    """Reward of the chosen side minus that of the rejected one; NaN where either has no reward."""
    extra_length: Floats
    """Characters of the chosen completion minus those of the rejected one."""
    groups: NDArray[np.int64]
    """Number of the row's group; rows of one group are resampled together."""
    languages: NDArray[np.str_]
    """`en-de` where the row has both languages, else the completion's language, `de`."""
    subsets: NDArray[np.str_]
    """The row's subset, empty where it has none."""

    def select(self, chosen: NDArray[np.bool_]) -> Pairs:
        """The rows where `chosen` is true."""
        return Pairs(
            self.gaps[chosen],
            self.extra_length[chosen],
            self.groups[chosen],
            self.languages[chosen],
            self.subsets[chosen],
        )


class Slice(NamedTuple):
    """The metrics of some rows: all, those of a language pair, or those of a subset."""

    kind: str
    """`all`, `language` or `subset`."""
    name: str
    """The language pair or the subset; empty for all."""
    metrics: dict[str, Any]
    """Metric to number, and `<metric>_interval` to its two bounds. A slice without a scored row has only counts."""

    @property
    def suffix(self) -> str:
        """What stands behind a metric's name: nothing, `/en-de`, or `/subset/flores`."""
        return {"all": "", "language": f"/{self.name}", "subset": f"/subset/{self.name}"}[self.kind]


def read_pairs(rows: pa.Table) -> Pairs:
    """The numbers of RewardedPreference rows. A reward that is null or not finite makes its row unscored."""
    rewards = [_floats(rows[name]) for name in ("chosen_reward", "rejected_reward")]
    with np.errstate(invalid="ignore"):
        gaps = rewards[0] - rewards[1]
    gaps[~np.isfinite(gaps)] = np.nan
    lengths = [[sum(len(m["content"]) for m in side) for side in rows[n].to_pylist()] for n in ("chosen", "rejected")]
    groups = np.unique(np.array(rows["group"].to_pylist(), dtype=str), return_inverse=True)[1]
    languages = zip(*(rows[name].to_pylist() for name in ("src_lang", "tgt_lang", "lang")), strict=True)
    return Pairs(
        gaps,
        np.array(lengths[0], float) - np.array(lengths[1], float),
        groups,
        np.array([f"{src}-{tgt}" if src and tgt else lang for src, tgt, lang in languages], dtype=str),
        np.array([subset or "" for subset in rows["subset"].to_pylist()], dtype=str),
    )


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.array([np.nan if value is None else value for value in column.to_pylist()], float)


def measure(pairs: Pairs, config: BootstrapConfig, what: str) -> list[Slice]:
    """Metrics of all rows, then of each language pair, then of each subset. `what` names the rows in messages.

    Raises EvaluationError when no row has two rewards.
    """
    if not np.isfinite(pairs.gaps).any():
        raise EvaluationError(f"None of the {len(pairs.gaps):,} rows of {what} has two rewards; nothing is measured.")
    slices = [Slice("all", "", _measure_slice(pairs, config, "all"))]
    for kind, names in (("language", pairs.languages), ("subset", pairs.subsets)):
        for name in np.unique(names[names != ""]).tolist():
            chosen = pairs.select(names == name)
            slices.append(Slice(kind, name, _measure_slice(chosen, config, f"{kind} {name}")))
    return slices


def flatten(slices: list[Slice]) -> dict[str, Any]:
    """All slices as one dict with keys such as `accuracy`, `accuracy/en-de`, `accuracy_interval/subset/flores`."""
    return {f"{name}{part.suffix}": value for part in slices for name, value in part.metrics.items()}


def _measure_slice(pairs: Pairs, config: BootstrapConfig, name: str) -> dict[str, Any]:
    scored = np.isfinite(pairs.gaps)
    counts = {"num_rows": int(scored.sum()), "num_unscored": int((~scored).sum())}
    if not counts["num_rows"]:
        return counts
    pairs = pairs.select(scored)
    columns, length_only = row_credits(pairs)
    lows, highs = bootstrap(np.stack(list(columns.values()), axis=1), pairs.groups, config, name)
    metrics: dict[str, Any] = {
        **counts,
        "num_groups": len(np.unique(pairs.groups)),
        "num_ties": int((pairs.gaps == 0).sum()),
        "length_only": length_only,
        "longer_accuracy": float(prefers_longer(pairs).mean()),
        "shorter_accuracy": float(1 - prefers_longer(pairs).mean()),
    }
    for index, (metric, column) in enumerate(columns.items()):
        metrics[metric] = float(column.mean())
        metrics[f"{metric}_interval"] = [float(lows[index]), float(highs[index])]
    return metrics


def prefers_longer(pairs: Pairs) -> Floats:
    """1 where the chosen completion is the longer one, 0 where it is the shorter one, and 0.5 for equal lengths."""
    return (np.sign(pairs.extra_length) + 1) / 2


def row_credits(pairs: Pairs) -> tuple[dict[str, Floats], str]:
    """Metric to its credit in each row (the metric is their mean), and which length the length-only judge prefers.

    `accuracy` gives 1 for a positive gap and nothing for a tie, `accuracy_half_ties` gives 0.5 for a tie.
    `length_only_accuracy` is that of a judge that always prefers the longer completion, or always the shorter one,
    whichever is right more often on these very rows; equal lengths give it 0.5, the toss of a coin. Both are in its
    favour: it is never below 0.5. `accuracy_gain` is `accuracy` minus `length_only_accuracy`, row by row.
    """
    hits = (pairs.gaps > 0).astype(float)
    longer = prefers_longer(pairs)
    name, length_only = ("longer", longer) if longer.mean() >= 0.5 else ("shorter", 1 - longer)
    credits = {
        "accuracy": hits,
        "accuracy_half_ties": hits + 0.5 * (pairs.gaps == 0),
        "mean_margin": pairs.gaps,
        "length_only_accuracy": length_only,
        "accuracy_gain": hits - length_only,
    }
    return credits, name


def bootstrap(values: Floats, groups: NDArray[np.int64], config: BootstrapConfig, name: str) -> tuple[Floats, Floats]:
    """Percentile intervals of the means of the columns of `values` (rows × metrics): their lower and upper bounds.

    Whole groups are drawn with replacement, as many as there are, and all metrics are taken from the same draws.
    `name` is part of the seed, so that slices do not share their chance.
    """
    numbers, codes = np.unique(groups, return_inverse=True)
    num_groups = len(numbers)
    columns = np.column_stack([values, np.ones(len(values))])
    sums = np.stack([np.bincount(codes, weights=column, minlength=num_groups) for column in columns.T], axis=1)
    rng = np.random.default_rng(seed_of(config.seed, name))
    chunk = max(1, 2_000_000 // num_groups)
    means = []
    for start in range(0, config.num_resamples, chunk):
        num = min(chunk, config.num_resamples - start)
        drawn = rng.integers(0, num_groups, (num, num_groups)) + np.arange(num)[:, None] * num_groups
        times = np.bincount(drawn.ravel(), minlength=num * num_groups).reshape(num, num_groups)
        totals = times @ sums
        means.append(totals[:, :-1] / totals[:, -1:])
    tail = (1 - config.confidence) / 2
    lows, highs = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return lows, highs

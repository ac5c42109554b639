"""Intervals and paired differences of corpus metrics: groups of rows are resampled, the same ones for all policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrm.evaluation.preferences import BootstrapConfig, Floats
from rayrm.evaluation.translation.metrics import Score
from rayrm.languages import is_english
from rayrm.seeds import seed_of

Ints = NDArray[np.int64]
LangPair = tuple[str, str]
ALL = ""
"""The mean over all language pairs."""
MIN_GROUPS = 10
"""Groups of a language pair with fewer of which there is no interval: resamples of a few are too much alike."""
_CHUNK = 4_000_000


class Resampler:
    """Draws the groups of a test set again and again; each draw is a weight for every row.

    A group's rows stand in several language pairs and are drawn together, so that the mean over pairs has the interval
    that it should have. The first draw has every row once: it is the score itself.
    """

    def __init__(self, pairs: Sequence[LangPair], groups: Sequence[str], config: BootstrapConfig, name: str) -> None:
        self.pairs = sorted(set(pairs), key=lambda pair: [(not is_english(code), code) for code in pair])
        """The language pairs, English first."""
        places = {pair: place for place, pair in enumerate(self.pairs)}
        codes = np.array([places[pair] for pair in pairs])
        self.rows: list[Ints] = [np.flatnonzero(codes == place) for place in range(len(self.pairs))]
        """The rows of each pair."""
        found = np.unique(np.array(groups, dtype=str), return_inverse=True)
        self.num_groups = len(found[0])
        self.groups: Ints = found[1].astype(np.int64)
        self.config = config
        self.seed = seed_of(config.seed, "translation", name)

    def draw(self, statistics: Sequence[Floats], score: Score) -> Floats:
        """Scores of shape (1 + resamples, pairs), the whole set first; a draw without a row of a pair is NaN.

        `statistics` has one array (samples, rows of the pair, numbers) for each pair. A score is taken of each sample's
        corpus, and averaged over the samples.
        """
        found = []
        for times in self._times():
            found.append(
                np.stack(
                    [
                        _score(times[:, self.groups[rows]], numbers, score)
                        for rows, numbers in zip(self.rows, statistics, strict=True)
                    ],
                    axis=1,
                )
            )
        return np.concatenate(found)

    def slice(self, draws: Floats, is_known: NDArray[np.bool_] | None = None) -> dict[str, Floats]:
        """`slice_draws` of draws; `is_known` tells the rows that they were made of, where those are not all."""
        used = [rows if is_known is None else rows[is_known[rows]] for rows in self.rows]
        return slice_draws(draws, self.pairs, [len(np.unique(self.groups[rows])) for rows in used])

    def _times(self) -> Iterator[Floats]:
        """How often each group is drawn, (draws, groups), a chunk of draws at a time; the same in every call."""
        yield np.ones((1, self.num_groups))
        rng = np.random.default_rng(self.seed)
        chunk = max(1, _CHUNK // self.num_groups)
        for start in range(0, self.config.num_resamples, chunk):
            num = min(chunk, self.config.num_resamples - start)
            drawn = rng.integers(0, self.num_groups, (num, self.num_groups))
            flat = drawn + np.arange(num)[:, None] * self.num_groups
            times = np.bincount(flat.ravel(), minlength=num * self.num_groups)
            yield times.reshape(num, self.num_groups).astype(float)


def _score(times: Floats, numbers: Floats, score: Score) -> Floats:
    totals = np.stack([times @ sample for sample in numbers], axis=1)
    scores = score(totals).mean(axis=1)
    return np.where(times.any(axis=1), scores, np.nan)


def direction_of(pair: LangPair) -> str:
    """`en-x`, `x-en` or `x-x`."""
    return "-".join("en" if is_english(code) else "x" for code in pair)


def slice_draws(draws: Floats, pairs: Sequence[LangPair], num_groups: Sequence[int]) -> dict[str, Floats]:
    """Draws (draws, pairs) by slice: unweighted means over all pairs and by direction, then the pairs.

    A direction without a pair is left out; so are, in a draw's mean, pairs that it has no row of. `num_groups` are the
    groups of each pair: a slice that has a pair with fewer than `MIN_GROUPS` has its first draw alone, and so no interval.
    """
    directions = np.array([direction_of(pair) for pair in pairs])
    chosen = {ALL: np.ones(len(pairs), bool)}
    chosen |= {name: own for name in ("en-x", "x-en", "x-x") if (own := directions == name).any()}
    chosen |= {"-".join(pair): np.arange(len(pairs)) == place for place, pair in enumerate(pairs)}
    few = np.array([0 < num < MIN_GROUPS for num in num_groups])
    return {name: _mean(draws[: 1 if few[own].any() else None, own]) for name, own in chosen.items()}


def _mean(draws: Floats) -> Floats:
    known = np.isfinite(draws)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, draws, 0.0).sum(axis=1) / known.sum(axis=1))


def summarise(name: str, slices: dict[str, Floats], confidence: float) -> dict[str, Any]:
    """`<name>/<slice>` and `<name>_interval/<slice>`, the middle `confidence` of the resamples; null where there are none."""
    found: dict[str, Any] = {}
    for suffix, draws in _by_suffix(slices):
        value, resamples = draws[0], draws[1:][np.isfinite(draws[1:])]
        tail = (1 - confidence) / 2
        interval = np.quantile(resamples, [tail, 1 - tail]).tolist() if len(resamples) else None
        found[f"{name}{suffix}"] = float(value) if np.isfinite(value) else None
        found[f"{name}_interval{suffix}"] = interval if np.isfinite(value) else None
    return found


def summarise_difference(name: str, slices: dict[str, Floats], confidence: float) -> dict[str, Any]:
    """As `summarise`, of differences, with `<name>_p_value/<slice>`.

    The p-value is two-sided: twice the share of resamples that lie at or beyond zero, on the side where fewer do, the
    whole set counted as one of them; null without resamples.
    """
    found = summarise(name, slices, confidence)
    for suffix, draws in _by_suffix(slices):
        known = draws[np.isfinite(draws)]
        # The resamples are centred on the difference, so those beyond zero are as likely as it is under no difference.
        beyond = min((known[1:] <= 0).sum(), (known[1:] >= 0).sum()) + 1
        found[f"{name}_p_value{suffix}"] = min(1.0, float(2 * beyond / len(known))) if len(known) > 1 else None
    return found


def _by_suffix(slices: dict[str, Floats]) -> Iterator[tuple[str, Floats]]:
    for name, draws in slices.items():
        yield (f"/{name}" if name else ""), draws

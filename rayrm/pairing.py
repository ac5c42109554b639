"""Pair the best and the worst candidate of each prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rayrm.config import Config
from rayrm.rows import Preference, map_rows

if TYPE_CHECKING:
    from ray.data import Dataset


class PairingConfig(Config):
    """Which two candidates of a prompt become a preference."""

    min_margin: float = Field(0.0, ge=0)
    """Smallest reward gap between chosen and rejected, in the reward's own unit; a gap of 0 is never a pair."""
    valid_score_range: tuple[float, float] | None = None
    """Candidates with a reward outside these two bounds (both included) are left out."""
    min_chosen_reward: float | None = None
    """Smallest reward of a chosen candidate; the rejected one may lie below."""
    max_candidates: int | None = Field(None, ge=2)
    """Only the first so many candidates of a prompt take part."""
    max_pairs_per_lang_pair: int | None = Field(None, ge=1)
    """Most pairs that a language pair may give."""
    pick: Literal["largest_margin", "sample"] = "largest_margin"
    """Which pairs stay under `max_pairs_per_lang_pair`: the widest margins, or a seeded sample."""
    seed: int = 0
    """Seed of `pick: sample`; the draw hangs on a row's id alone."""


READS = ("id", "src_lang", "tgt_lang", "lang", "candidates", "rewards")


def pair_candidates(rewarded: Dataset, config: PairingConfig) -> Dataset:
    """One Preference for each prompt with a wide enough gap; other prompts are dropped and counted.

    Reads prompt, candidates, rewards. Adds chosen, rejected, margin; drops candidates, rewards.
    """
    pairs = map_rows(rewarded, pair_row, config, reads=READS, writes=Preference)
    if config.max_pairs_per_lang_pair is None:
        return pairs
    limits = find_limits(pairs, config)
    return map_rows(
        pairs, limit_row, (config, limits), reads=("id", "src_lang", "tgt_lang", "lang", "margin"), writes=Preference
    )

"""Turn scores into rewards and pair the best and the worst candidate of each prompt: Scored → Preference rows.

Prints how many pairs each language pair has, and stores it as `languages` in `run.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from rayrm.config import parse_args, run_job
from rayrm.matrix import count_languages, draw_languages, summarise_languages
from rayrm.pairing import PairingConfig, find_limits, pair_candidates
from rayrm.rewarding import RewardingConfig, check_rewarding, reward_candidates
from rayrm.rows import Preference, Scored
from rayrm.runs import RowsJob, read_rows, transform_rows
from rayrm.scoring.identity import check_calibrations_of_rows
from rayrm.shards import iter_tables, read_schemas

if TYPE_CHECKING:
    from ray.data import Dataset


class BuildPreferences(RowsJob):
    """Rewards and pairs from scores."""

    shard_rows: int = Field(8192, ge=1)
    """Rows that are committed together; what is done is never done again."""
    rewarding: RewardingConfig = RewardingConfig()
    """Which scores become rewards."""
    pairing: PairingConfig = PairingConfig()
    """Which candidates become pairs."""


def main(argv: Sequence[str] | None = None) -> None:
    """Build the preferences of `argv`. Raises SchemaError or ConfigError when the rows have no such scores."""
    config = parse_args(BuildPreferences, argv)
    for name, schema in read_schemas(config.input):
        Scored.check(schema, f"'{name}'")
        check_rewarding(schema, config.rewarding, f"'{name}'")
    if config.rewarding.composition is not None:
        check_calibrations_of_rows(config.rewarding.composition, config.input)

    def stage(scored: Dataset) -> Dataset:
        # A resumed run gets only the rows that are left, and the limits hang on all of them.
        whole = read_rows(config.input, Scored, config.shard_rows)
        limits = find_limits(reward_candidates(whole, config.rewarding), config.pairing)
        return pair_candidates(reward_candidates(scored, config.rewarding), config.pairing, limits)

    def summarise(output: str) -> dict[str, Any]:
        read = count_languages(iter_tables(config.input, ["src_lang", "tgt_lang", "lang"]))
        written = count_languages(iter_tables(output, ["src_lang", "tgt_lang", "lang"]))
        return {"languages": summarise_languages(written, wanted=read)}

    done = transform_rows(config, Scored, Preference, stage, summarise=summarise)
    print(draw_languages(done["languages"]))


if __name__ == "__main__":
    run_job(main)

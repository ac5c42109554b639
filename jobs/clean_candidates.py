"""Clean sampled candidates: cut, strip, and leave out what is empty, double, copied or in the wrong script.

Candidates → Candidates rows. All that is left out is counted by reason in `run.json`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayrm.cleaning import CleaningConfig, check_filters, check_unscored, clean_candidates
from rayrm.config import parse_args, run_job
from rayrm.rows import Candidates
from rayrm.runs import RowsJob, transform_rows
from rayrm.shards import list_shards, read_shard


class CleanCandidates(RowsJob):
    """Clean candidates."""

    cleaning: CleaningConfig = CleaningConfig()
    """What is done to a candidate, and which go out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises SchemaError when the rows are scored already, or a filter has nothing to look at."""
    config = parse_args(CleanCandidates, argv)
    for shard in list_shards(config.input, config.shard_rows)[:1]:
        rows = read_shard(shard)
        check_unscored(rows.schema, f"'{config.input}'")
        Candidates.check(rows.schema, f"'{config.input}'")
        check_filters(rows, config.cleaning, f"'{config.input}'")
    transform_rows(config, Candidates, Candidates, lambda rows: clean_candidates(rows, config.cleaning))


if __name__ == "__main__":
    run_job(main)

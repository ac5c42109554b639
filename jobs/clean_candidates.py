"""Clean sampled candidates: cut, strip, and leave out what is empty, double, copied or in the wrong script.

Candidates → Candidates rows. All that is left out is counted by reason in `run.json`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayrm.cleaning import CleaningConfig, check_filters, check_unscored, clean_candidates
from rayrm.config import parse_args, run_job
from rayrm.rows import Candidates
from rayrm.runs import RowsJob, transform_rows
from rayrm.shards import iter_tables, read_schemas


class CleanCandidates(RowsJob):
    """Clean candidates."""

    cleaning: CleaningConfig = CleaningConfig()
    """What is done to a candidate, and which go out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises SchemaError when the rows are scored already, or a filter has nothing to look at."""
    config = parse_args(CleanCandidates, argv)
    for name, schema in read_schemas(config.input):
        check_unscored(schema, f"'{name}'")
        Candidates.check(schema, f"'{name}'")
    check_filters(iter_tables(config.input, ["lang", "source"]), config.cleaning, f"'{config.input}'")
    transform_rows(config, Candidates, Candidates, lambda rows: clean_candidates(rows, config.cleaning))


if __name__ == "__main__":
    run_job(main)

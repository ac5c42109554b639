"""Turn foreign preferences, ratings or steps into Preference, Rated or Stepwise rows: a mixture of any number of sets.

Reads parquet, JSONL, CSV or hub datasets. Prints how many rows each source gave and why others were dropped, and stores
it as `sources` in `run.json`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field
from tqdm import tqdm

from rayrm import files
from rayrm.config import NOT_IDENTITY, parse_args, run_job
from rayrm.counts import describe_counts
from rayrm.evaluation.report import Table, format_table
from rayrm.rows import with_hidden
from rayrm.runs import commit_shard, finish_run, shard_path, start_run
from rayrm.sources.kinds import ROW_KINDS
from rayrm.sources.preferences import PreferencesConfig, make_tables, select_rows, sum_counts
from rayrm.sources.tables import rebatch

log = logging.getLogger("rayrm")


class PreparePreferences(PreferencesConfig):
    """Rows of one type from foreign sets."""

    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for the rows and their `run.json`."""
    shard_rows: int = Field(8192, ge=1)
    """Rows in each file that is written."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the rows of `argv`. Raises SchemaError when a source is not what its config says, or gives too few rows."""
    config = parse_args(PreparePreferences, argv)
    with tqdm(unit="row", desc="reading", disable=not sys.stderr.isatty()) as bar:
        selected = select_rows(config, bar.update)
    counts, tables = sum_counts(selected), make_tables(selected, config)
    if start_run(config):
        write_rows(config, tables, counts["written"])
        sources = {part.source.title: part.counts for part in selected}
        finish_run(config, {"counts": counts, "sources": sources})
    done = files.read_json(files.join(config.output, files.RUN_MARK))
    log.info("%s: %s", config.output, describe_counts(done["counts"]))
    print(format_table(tabulate(done["sources"])))


def write_rows(config: PreparePreferences, tables: Iterable[pa.Table], num_rows: int) -> None:
    """Write the shards of `tables` that are not there yet."""
    num_shards = -(-num_rows // config.shard_rows)
    with tqdm(total=num_rows, unit="row", desc=config.output, disable=not sys.stderr.isatty()) as bar:
        for index, table in enumerate(rebatch(tables, config.shard_rows)):
            path = shard_path(config.output, index, num_shards)
            if not files.exists(path):
                commit_shard(path, with_hidden(table), ROW_KINDS[config.rows].row_type)
            bar.update(table.num_rows)


def tabulate(sources: dict[str, dict[str, Any]]) -> Table:
    """A row for each source: what was read, written, and dropped for each reason that occurred."""
    reasons = sorted({reason for counts in sources.values() for reason in counts["dropped"]})
    rows = [
        [name, f"{counts['read']:,}", f"{counts['written']:,}", *(f"{counts['dropped'].get(r, 0):,}" for r in reasons)]
        for name, counts in sources.items()
    ]
    return Table(["source", "read", "written", *reasons], rows)


if __name__ == "__main__":
    run_job(main)

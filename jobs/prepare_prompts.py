"""Turn parallel text into Prompt rows: direct translation, or between two languages with an English anchor.

Reads parquet, JSONL, CSV or a hub dataset. Prints how many rows each language pair has, and stores it as `languages` in
`run.json`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field
from tqdm import tqdm

from rayrm import files
from rayrm.config import NOT_IDENTITY, Config, parse_args, run_job
from rayrm.counts import describe_counts
from rayrm.errors import SchemaError
from rayrm.matrix import count_languages, draw_languages, summarise_languages
from rayrm.rows import Prompt, with_hidden
from rayrm.runs import INPUT, commit_shard, finish_run, shard_path, start_run
from rayrm.sources.parallel import ParallelConfig, Selection, find_references, find_targets, make_prompts, select_texts
from rayrm.sources.tables import open_tables, rebatch

log = logging.getLogger("rayrm")


class PreparePrompts(Config):
    """Prompts from parallel text."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """A parquet, JSONL or CSV file or a folder of them (any fsspec path), or the hub id of a dataset."""
    split: str | None = None
    """Split of a hub dataset; left out, `train`."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for the rows and their `run.json`."""
    shard_rows: int = Field(8192, ge=1)
    """Rows in each file that is written."""
    prompts: ParallelConfig = ParallelConfig()
    """How rows become prompts."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the prompts of `argv`. Raises SchemaError when the input lacks a column, or when no row is left."""
    config = parse_args(PreparePrompts, argv)
    read = open_tables(config.input, config.split)
    where = f"'{config.input}'"
    targets = find_targets(read(), config.prompts, where) if config.prompts.type == "anchored" else ()
    references = find_references(read(), config.prompts, where) if config.prompts.references else None
    selection = Selection(config.prompts, targets, references)
    num_rows = sum(len(selection.pairs(text)) for _, texts in select_texts(read, selection, where) for text in texts)
    counts = {"read": selection.read, "written": num_rows, "dropped": dict(sorted(selection.dropped.items()))}
    if not num_rows:
        raise SchemaError(f"{where} gives no prompt: {describe_counts({**counts, 'status': {}})}.")
    if start_run(config):
        languages = write_prompts(config, read, Selection(config.prompts, targets, references), num_rows)
        finish_run(config, {"counts": {**counts, "status": {}}, "languages": languages})
    done = files.read_json(files.join(config.output, files.RUN_MARK))
    log.info("%s: %s", config.output, describe_counts(done["counts"]))
    print(draw_languages(done["languages"]))


def write_prompts(
    config: PreparePrompts, read: Callable[[], Iterable[pa.Table]], selection: Selection, num_rows: int
) -> dict[str, Any]:
    """Write the shards that are not there yet, and count the languages of all of them."""
    num_shards = -(-num_rows // config.shard_rows)
    taken = select_texts(read, selection, f"'{config.input}'")
    prompts = (make_prompts(table, texts, selection) for table, texts in taken)

    def write() -> Iterable[pa.Table]:
        with tqdm(total=num_rows, unit="row", desc=config.output, disable=not sys.stderr.isatty()) as bar:
            for index, table in enumerate(rebatch(prompts, config.shard_rows)):
                path = shard_path(config.output, index, num_shards)
                if not files.exists(path):
                    commit_shard(path, with_hidden(table), Prompt)
                bar.update(table.num_rows)
                yield table

    return summarise_languages(count_languages(write()), wanted=selection.wanted)


if __name__ == "__main__":
    run_job(main)

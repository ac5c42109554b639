"""Write a parallel corpus from a small grammar: English with German, Russian and Spanish, in both directions.

For trials without data or network. The parquet file has the columns `src_text, trg_text, src_lang, trg_lang` that
`prepare_prompts` reads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pyarrow.parquet as pq
from pydantic import Field

from rayrm import files
from rayrm.config import NOT_IDENTITY, Config, parse_args, run_job
from rayrm.runs import finish_run, start_run
from rayrm.sources.grammar import GrammarConfig, write_sentences

log = logging.getLogger("rayrm")


class WriteCorpus(Config):
    """A corpus from the grammar."""

    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for `corpus.parquet`."""
    grammar: GrammarConfig = GrammarConfig()
    """How large the corpus is."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpus of `argv`."""
    config = parse_args(WriteCorpus, argv)
    if not start_run(config):
        return
    table = write_sentences(config.grammar)
    with files.atomic_file(files.join(config.output, "corpus.parquet")) as handle:
        pq.write_table(table, handle)
    finish_run(config, {"counts": {"written": table.num_rows}})
    log.info("%s: %s rows", config.output, f"{table.num_rows:,}")


if __name__ == "__main__":
    run_job(main)

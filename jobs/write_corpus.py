"""Write a corpus from a small grammar of English, German, Russian and Spanish, for trials without data or network.

Parallel sentences stand in `corpus.parquet`, with the columns `src_text, trg_text, src_lang, trg_lang` that
`prepare_prompts` reads, English with each other language in both directions. Preferences stand in
`preferences.parquet`: a sentence before a spoilt copy of it, the same ones in every language.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import pyarrow.parquet as pq
from pydantic import Field, model_validator

from rayrm import files
from rayrm.config import NOT_IDENTITY, Config, parse_args, run_job
from rayrm.runs import finish_run, start_run
from rayrm.sources.grammar import GrammarConfig, write_sentences
from rayrm.sources.grammar_pairs import write_pairs

log = logging.getLogger("rayrm")
WRITERS = {"parallel": ("corpus.parquet", write_sentences), "preferences": ("preferences.parquet", write_pairs)}


class WriteCorpus(Config):
    """A corpus from the grammar."""

    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for the file."""
    rows: Literal["parallel", "preferences"] = "parallel"
    """What is written."""
    grammar: GrammarConfig = GrammarConfig()
    """How large the corpus is."""

    @model_validator(mode="after")
    def _check_languages(self) -> WriteCorpus:
        if self.rows == "parallel" and not self.grammar.languages:
            raise ValueError("parallel rows need a language beside English; name one in grammar.languages")
        return self


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpus of `argv`."""
    config = parse_args(WriteCorpus, argv)
    if not start_run(config):
        return
    name, write = WRITERS[config.rows]
    table = write(config.grammar)
    with files.atomic_file(files.join(config.output, name)) as handle:
        pq.write_table(table, handle)
    finish_run(config, {"counts": {"written": table.num_rows}})
    log.info("%s: %s rows", config.output, f"{table.num_rows:,}")


if __name__ == "__main__":
    run_job(main)

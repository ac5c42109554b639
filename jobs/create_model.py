"""Create a small language model with random weights and a tokenizer trained on the texts of Prompt or Preference rows.

For those who start without a checkpoint: `train_policy` and `train_reward_model` train it. Writes `<output>/model`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pyarrow as pa
from pydantic import Field

from rayrm import files
from rayrm.config import NOT_IDENTITY, Config, parse_args, run_job
from rayrm.models.creation import CreationConfig, create_model
from rayrm.rows import Prompt
from rayrm.runs import INPUT, finish_run, start_run
from rayrm.shards import read_table
from rayrm.training.launch import MARK, MODEL

log = logging.getLogger("rayrm")
MESSAGES = ("prompt", "chosen", "rejected")
"""Columns of messages."""


class CreateModel(Config):
    """A model from nothing, for the texts of some Prompt or Preference rows."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Prompt or Preference rows on whose texts the tokenizer is trained."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for `model/` with its `rayrm.json`."""
    model: CreationConfig = CreationConfig()
    """Sizes of the model and its tokenizer."""


def main(argv: Sequence[str] | None = None) -> None:
    """Create the model of `argv`, unless it is there. Raises SchemaError when the input has no Prompt rows."""
    config = parse_args(CreateModel, argv)
    rows = read_table(config.input, list(dict.fromkeys([*Prompt.columns, *MESSAGES])))
    Prompt.check(rows.schema, f"'{config.input}'")
    if not start_run(config, mark=MARK):
        return
    facts = create_model(list_texts(rows), config.model, files.join(config.output, MODEL))
    finish_run(config, facts, mark=MARK)
    log.info("%s: %s parameters, %s tokens", config.output, f"{facts['num_parameters']:,}", facts["vocab_size"])


def list_texts(rows: pa.Table) -> Iterator[str]:
    """Every source, reference and message of the rows."""
    for name in ("source", "reference"):
        if name in rows.column_names:
            yield from (text for text in rows[name].to_pylist() if text)
    for name in MESSAGES:
        if name in rows.column_names:
            yield from (message["content"] for messages in rows[name].to_pylist() for message in messages or [])


if __name__ == "__main__":
    run_job(main)

"""Word the prompts of preferences as instructions, and leave out pairs that are too long for training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field, model_validator

from rayrm import cluster
from rayrm.config import NOT_IDENTITY, TEMPLATE, Config, Workers
from rayrm.models.folders import load_tokenizer
from rayrm.models.rendering import Renderer, load_template
from rayrm.prompts import Instructions, direct_prompt, diverse_prompt
from rayrm.rows import TEXTS, Preference, RowType, map_table, on_kept, set_column
from rayrm.runs import INPUT

if TYPE_CHECKING:
    from ray.data import Dataset

READS = ("id", "source", "src_lang", "tgt_lang")
TranslationPreference = RowType(
    "Preference (of a translation)", {**Preference.columns, "source": pa.string()}, ("margin", "subset")
)
"""A Preference whose prompt can be made again from its source and languages."""


class InstructingConfig(Config):
    """The wording of prompts, and how long a rendered conversation may be."""

    instructions: Instructions = "fixed"
    """The recipe's fixed instruction, or one of twenty chosen by a row's id."""
    seed: int = 0
    """Seed of `instructions: diverse`."""
    max_length: int | None = Field(None, ge=1)
    """Most tokens of a rendered chat, of prompt and longer side together; left out, no pair is too long."""
    tokenizer: str | None = Field(None, json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id of the model whose tokenizer counts; needed for `max_length`."""
    chat_template: str | None = Field(None, json_schema_extra=TEMPLATE)  # type: ignore[arg-type]
    """Name or path of the chat template that is counted, or none; null for the tokenizer's own."""
    workers: Workers = Field(default_factory=Workers, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Actors that render and count."""

    @model_validator(mode="after")
    def _check_filter(self) -> InstructingConfig:
        if (self.max_length is None) != (self.tokenizer is None):
            raise ValueError("max_length and tokenizer go together; set both or neither")
        if self.chat_template is not None and self.tokenizer is None:
            raise ValueError("chat_template counts tokens only with max_length and tokenizer")
        return self


def instruct_preferences(preferences: Dataset, config: InstructingConfig) -> Dataset:
    """Replace the prompt of every pair by an instruction to translate its source.

    Reads id, source, src_lang, tgt_lang, chosen, rejected; replaces prompt. Dropped and counted: rows without source
    or languages (`no_source`), and pairs with a side over `max_length` (`overlength`). Raises ResourceError when the
    cluster can never hold the actors.
    """
    workers = config.workers
    cluster.require(workers.num_workers, workers.num_cpus, workers.num_gpus, "instruct_preferences")
    return preferences.map_batches(
        Instructor, fn_constructor_args=(config,), batch_format="pyarrow", batch_size=None, **workers.pool()
    )


def load_renderer(config: InstructingConfig) -> Renderer | None:
    """What renders and counts; None without a tokenizer. Raises CheckpointError or ConfigError."""
    if config.tokenizer is None:
        return None
    tokenizer = load_tokenizer(config.tokenizer)
    return Renderer(tokenizer, load_template(config.chat_template, tokenizer, config.tokenizer))


def instruct_row(row: dict[str, Any], config: InstructingConfig) -> tuple[dict[str, Any] | None, list[str]]:
    """The new prompt of a row, or None and why not."""
    source, src_lang, tgt_lang = row["source"], row["src_lang"], row["tgt_lang"]
    if not source or not src_lang or not tgt_lang:
        return None, ["no_source"]
    if config.instructions == "diverse":
        text = diverse_prompt(source, src_lang, tgt_lang, row["id"], config.seed)
    else:
        text = direct_prompt(source, src_lang, tgt_lang)
    return {"prompt": [{"role": "user", "content": text}]}, []


def count_tokens(row: dict[str, Any], renderer: Renderer) -> int:
    """Tokens of a row's rendered chat with its longer side; a side without a message counts as an empty one."""
    sides = [row[name] or [{"role": "assistant", "content": ""}] for name in ("chosen", "rejected")]
    pairs = [([*row["prompt"], *side[:-1]], side[-1]["content"] or "") for side in sides]
    return max(len(renderer.pair_ids(*pair).ids) for pair in pairs)


class Instructor:
    """The instructions and the tokenizer of one actor."""

    def __init__(self, config: InstructingConfig) -> None:
        self.config = config
        self.renderer = load_renderer(config)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Preference rows of whole shards → the same rows with new prompts."""
        table = map_table(table, instruct_row, self.config, READS, TranslationPreference)
        return table if self.renderer is None else on_kept(table, self._filter)

    def _filter(self, table: pa.Table) -> pa.Table:
        assert self.renderer is not None and self.config.max_length is not None
        rows = table.select(["prompt", "chosen", "rejected"]).to_pylist()
        fits = [count_tokens(row, self.renderer) <= self.config.max_length for row in rows]
        reasons = zip(table["_dropped"].to_pylist(), fits, strict=True)
        dropped = [before if fit else [*before, "overlength"] for before, fit in reasons]
        table = set_column(table, "_kept", pa.array(fits, pa.bool_()))
        return set_column(table, "_dropped", pa.array(dropped, TEXTS))

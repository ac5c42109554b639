"""The rows that policies translate: prompts with references, FLORES-200 folders, parallel files."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from rayrm import files
from rayrm.config import NOT_IDENTITY, Config
from rayrm.errors import SchemaError
from rayrm.evaluation.translation.metrics import check_tokenizers
from rayrm.languages import LANGUAGES
from rayrm.rows import Prompt, RowType, with_hidden
from rayrm.runs import INPUT, commit_shard, finish_run, shard_path, start_run
from rayrm.seeds import seed_of
from rayrm.shards import read_table
from rayrm.sources.flores import Sentence, find_languages, make_directions, read_flores
from rayrm.sources.parallel import (
    ENGLISH,
    ParallelColumns,
    ParallelConfig,
    Selection,
    Text,
    make_prompts,
    select_texts,
)
from rayrm.sources.tables import open_tables
from rayrm.splits import is_held_out

NAME = r"^\w[\w.-]*$"
NEEDED = ("source", "reference", "src_lang", "tgt_lang")
"""Columns that a Prompt may leave empty, and a translation that is measured may not."""
SetRow = RowType("SetRow", {**Prompt.columns, "set": pa.string()}, ("anchor", "subset"))
"""A Prompt of a test set, with that set's name."""


class PromptSet(Config):
    """Prompt rows with references, such as prepare_prompts writes them."""

    type: Literal["prompts"] = "prompts"
    name: str = Field("prompts", pattern=NAME)
    """What reports call it."""
    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder of a finished run, or a parquet or JSONL file or folder of Prompt rows (any fsspec path)."""


class FloresSet(Config):
    """A folder like FLORES-200's: `<input>/<split>/<code>.<split>`, a sentence a line, in all ordered directions."""

    type: Literal["flores"] = "flores"
    name: str = Field("flores", pattern=NAME)
    """What reports call it."""
    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """The folder (any fsspec path)."""
    split: str = "devtest"
    """Folder and ending of the files."""
    languages: list[str] | None = Field(None, min_length=2)
    """ISO codes of the languages; null for all that have a file and stand in the table of languages."""

    @field_validator("languages")
    @classmethod
    def _check_languages(cls, languages: list[str] | None) -> list[str] | None:
        if unknown := [code for code in languages or () if code not in LANGUAGES]:
            raise ValueError(f"there is no language {', '.join(unknown)}; the codes are {', '.join(LANGUAGES)}")
        if twice := [code for code, num in Counter(languages or ()).items() if num > 1]:
            raise ValueError(f"the language {twice[0]} is named twice")
        return languages


class ParallelSet(Config):
    """A parallel file, each row from its source into its target language, or in all directions by way of English."""

    type: Literal["parallel"] = "parallel"
    name: str = Field("parallel", pattern=NAME)
    """What reports call it."""
    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """A parquet, JSONL or CSV file or a folder of them (any fsspec path), or the hub id of a dataset."""
    split: str | None = None
    """Split of a hub dataset; left out, `train`."""
    columns: ParallelColumns = ParallelColumns()
    """What the columns are called."""
    languages: tuple[str, ...] | None = None
    """Take only these languages, and English; left out, all that the file has."""
    directions: Literal["as_is", "all"] = "as_is"
    """as_is: from a row's source into its target. all: the texts that share an English side are one sentence, and are
    translated from each of its languages into each other one."""


TranslationSet = Annotated[PromptSet | FloresSet | ParallelSet, Field(discriminator="type")]
"""The config of any test set, told apart by `type`."""


class TranslatedRows(Config):
    """Test sets, and which of their rows count."""

    sets: list[TranslationSet] = Field(min_length=1)
    """The sets, each of the type prompts, flores or parallel."""
    split: Literal["all", "held_out"] = "all"
    """Rows that count: all, or those of the groups that a training with this fraction and seed held out."""
    held_out_fraction: float | None = Field(None, gt=0, lt=1)
    """With `split: held_out`, the training's `held_out_fraction`."""
    held_out_seed: int = 0
    """With `split: held_out`, the training's `seed`."""
    max_rows_per_lang_pair: int | None = Field(None, ge=1)
    """Take at most so many rows of a language pair and set, of groups that a hash draws; it draws the same groups in
    every pair. Null for all."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for what the job writes."""
    shard_rows: int = Field(512, ge=1)
    """Rows that are committed together; what is done is never done again."""

    @model_validator(mode="after")
    def _check_sets(self) -> TranslatedRows:
        names = Counter(part.name for part in self.sets)
        if twice := [name for name, num in names.items() if num > 1]:
            raise ValueError(f"several sets are called '{twice[0]}'; give each a name of its own")
        if (self.split == "held_out") != (self.held_out_fraction is not None):
            raise ValueError("split: held_out and held_out_fraction go together; set both or neither")
        return self


def write_rows(config: TranslatedRows) -> dict[str, Any]:
    """Write the rows of all sets to `config.output` as SetRow rows, once; give the counts of each set.

    Raises SchemaError for rows that cannot be measured: without a source, a reference or a language, or with an id that
    stands twice in a language; and ConfigError when the tokenizer of a target language is not installed.
    """
    mark = files.join(config.output, files.RUN_MARK)
    tables, counts = ([], {}) if files.exists(mark) else _read_sets(config)
    if start_run(config):
        table = pa.concat_tables(tables)
        num_shards = -(-table.num_rows // config.shard_rows)
        for index in range(num_shards):
            part = with_hidden(table.slice(index * config.shard_rows, config.shard_rows))
            commit_shard(shard_path(config.output, index, num_shards), part, SetRow)
        finish_run(config, {"counts": counts})
    found: dict[str, Any] = files.read_json(mark)["counts"]
    return found


def _read_sets(config: TranslatedRows) -> tuple[list[pa.Table], dict[str, Any]]:
    tables, counts = [], {}
    for part in config.sets:
        table, dropped = READERS[part.type](part)
        num_read = table.num_rows + sum(dropped.values())
        table = Prompt.conform(table).select(list(Prompt.columns))
        _check_rows(table, part)
        table = _select(table, config, dropped)
        if not table.num_rows:
            told = ", ".join(f"{num:,} {reason}" for reason, num in dropped.items() if num) or "it is empty"
            raise SchemaError(f"No row of '{part.input}' is left to translate: {told}.")
        kept = {reason: num for reason, num in sorted(dropped.items()) if num}
        counts[part.name] = {"read": num_read, "written": table.num_rows, "dropped": kept, "status": {}}
        tables.append(table.append_column("set", pa.array([part.name] * table.num_rows, pa.string())))
    return tables, counts


def _read_prompts(part: PromptSet) -> tuple[pa.Table, Counter[str]]:
    Prompt.check_files(part.input)
    return read_table(part.input, list(Prompt.columns)), Counter()


def _read_flores(part: FloresSet) -> tuple[pa.Table, Counter[str]]:
    languages = part.languages or find_languages(part.input, part.split)
    return make_directions(read_flores(part.input, part.split, languages)), Counter()


def _read_parallel(part: ParallelSet) -> tuple[pa.Table, Counter[str]]:
    selection = Selection(ParallelConfig(columns=part.columns, languages=part.languages), ())
    taken = select_texts(open_tables(part.input, part.split), selection, f"'{part.input}'")
    if part.directions == "as_is":
        tables = [make_prompts(table, texts, selection).select(list(Prompt.columns)) for table, texts in taken]
        return pa.concat_tables(tables), selection.dropped
    return make_directions(_align(text for _, texts in taken for text in texts)), selection.dropped


def _align(texts: Iterable[Text]) -> list[Sentence]:
    """The texts that share an English side, as sentences; of several in one language the first counts."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for text in texts:
        sides = {text.other_lang: text.other, text.lang: text.source}
        if ENGLISH in sides:
            for lang, side in sorted(sides.items(), key=lambda item: item[0] != ENGLISH):
                found[sides[ENGLISH]].setdefault(lang, side)
    keys = {english: files.digest(english) for english in found}
    return [Sentence(keys[english], keys[english], own) for english, own in found.items()]


READERS: dict[str, Any] = {"prompts": _read_prompts, "flores": _read_flores, "parallel": _read_parallel}
"""Tag to what reads a set as Prompt rows, and counts what it left out."""


def _check_rows(table: pa.Table, part: Any) -> None:
    ids, langs = table["id"].to_pylist(), table["lang"].to_pylist()
    for name in (*NEEDED, "id", "group", "lang", "prompt"):
        values = table[name].to_pylist()
        lacking = [i for i, value in enumerate(values) if not (value.strip() if isinstance(value, str) else value)]
        if lacking:
            raise SchemaError(
                f"{len(lacking):,} of the {table.num_rows:,} rows of '{part.input}' have no {name}, the first one is "
                f"'{ids[lacking[0]]}'; a translation is measured against a reference, by its languages."
            )
    keys = Counter(zip(ids, langs, strict=True))
    if twice := [key for key, num in keys.items() if num > 1]:
        raise SchemaError(f"The id '{twice[0][0]}' stands twice in {twice[0][1]} in '{part.input}'; ids are unique.")
    check_tokenizers(table["tgt_lang"].to_pylist())


def _select(table: pa.Table, config: TranslatedRows, dropped: Counter[str]) -> pa.Table:
    if config.held_out_fraction is not None:
        groups = table["group"].to_pylist()
        keep = [is_held_out(group, config.held_out_fraction, config.held_out_seed) for group in groups]
        dropped["trained_on"] += keep.count(False)
        table = table.filter(pa.array(keep, pa.bool_()))
    if config.max_rows_per_lang_pair is not None:
        rows = _draw(table, config.max_rows_per_lang_pair)
        dropped["over_limit"] += table.num_rows - len(rows)
        table = table.take(rows)
    return table


def _draw(table: pa.Table, limit: int) -> Sequence[int]:
    pairs: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    groups = table["group"].to_pylist()
    for index, pair in enumerate(zip(table["src_lang"].to_pylist(), table["tgt_lang"].to_pylist(), strict=True)):
        pairs[pair].append(index)
    drawn = (heapq.nsmallest(limit, rows, key=lambda i: (seed_of(0, "limit", groups[i]), i)) for rows in pairs.values())
    return sorted(index for rows in drawn for index in rows)

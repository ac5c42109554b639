"""Foreign preferences, ratings, steps and answers → rows of ours: a mixture of sources, of one type."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from rayrm.config import Config
from rayrm.counts import describe_counts
from rayrm.errors import SchemaError
from rayrm.rows import HIDDEN
from rayrm.runs import INPUT
from rayrm.seeds import seed_of
from rayrm.sources.kinds import COMMON, ROW_KINDS, RowKind, make_row
from rayrm.sources.tables import find_columns, list_objectives, open_tables, read_fields
from rayrm.sources.validation import REASONS, Fields, InvalidRow, require


class SourceColumns(Config):
    """What the columns of a source are called. One that is named must be there; null leaves one out that is there."""

    id: str | None = "id"
    """The rows' own ids; a row without one has a hash of its content."""
    group: str | None = "group"
    """What rows share that no split may part; a row without it has a hash of its prompt."""
    prompt: str | None = "prompt"
    """Text or messages; needed where an answer is no whole conversation."""
    system: str | None = "system"
    """Text of a system turn to put before the prompt."""
    tools: str | None = "tools"
    """Tool schemas, as a list or its JSON."""
    chosen: str | None = "chosen"
    """The better answer: text, messages, or a whole conversation that ends with it."""
    rejected: str | None = "rejected"
    """The worse answer, in any of the same forms."""
    chosen_score: str | None = "chosen_score"
    """Somebody's score of the better answer."""
    rejected_score: str | None = "rejected_score"
    """Somebody's score of the worse answer."""
    margin: str | None = "margin"
    """By how much chosen is better."""
    label: str | None = "label"
    """Probability that chosen is better, 0 to 1."""
    completion: str | None = "completion"
    """The answer that is rated, in any of the same forms."""
    messages: str | None = "messages"
    """A whole conversation that ends with the answer that is rated; read where there is no column `completion`."""
    ratings: str | dict[str, str] | None = "ratings"
    """A struct of a number for each objective, or the column of each objective by its name."""
    steps: str | None = "steps"
    """The steps of an answer, a list of texts."""
    labels: str | None = "labels"
    """For each step whether it is right: a boolean, a number from 0 to 1, `+` or `-`, or null."""
    correct: str | None = "chosen"
    """The right answers of several, a list of texts."""
    incorrect: str | None = "rejected"
    """The wrong ones."""
    weight: str | None = "weight"
    """How much a row counts, 0 or more."""
    lang: str | None = "lang"
    """Language code of the answers."""
    src_lang: str | None = "src_lang"
    """Language code of the text to translate, where the answers are translations."""
    tgt_lang: str | None = "tgt_lang"
    """Language code that it is translated into."""
    subset: str | None = "subset"
    """Part of the source that a row belongs to."""
    keep: tuple[str, ...] = ()
    """Further columns that ride along as they are."""


class PreferenceSource(Config):
    """One dataset of a mixture."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """A parquet, JSONL or CSV file or a folder of them (any fsspec path), or the hub id of a dataset."""
    config: str | None = None
    """Configuration of a hub dataset, or of a folder with a copy of one."""
    split: str | None = None
    """Split of a hub dataset or of a copy; left out, `train`."""
    name: str | None = None
    """What the source is called in counts, in `subset` where a row has none of its own, and before the rows' own ids
    (`name/id`), so that those of several sources stay apart; left out, the input is its name in counts alone."""
    ids_within_subset: bool = False
    """Whether ids are those of a subset: each row's subset is put before its id, and no name."""
    columns: SourceColumns = SourceColumns()
    """What its columns are called."""
    lang: str | None = None
    """Language code of rows that have none of their own."""
    max_rows: int | None = Field(None, ge=1)
    """Take at most so many valid rows, a sample that hangs on the seed and on the rows' ids."""
    weight: float = Field(1.0, gt=0)
    """How much a row of this source counts: a factor of the rows' own weights."""
    margin_from_scores: bool = False
    """Whether a row without a margin of its own has the difference of its scores."""

    @property
    def title(self) -> str:
        """What counts and messages call the source."""
        return self.name or self.input


class PreferencesConfig(Config):
    """Which sources become rows of which type, and what is done about rows that are invalid."""

    rows: Literal["preference", "rated", "stepwise", "best_of", "conversation"] = "preference"
    """preference: pairs of a chosen and a rejected answer. rated: answers with ratings. stepwise: answers in steps.
    best_of: right and wrong answers, as candidates of which the first `num_correct` are right. conversation: a prompt
    with one candidate, its answer."""
    sources: list[PreferenceSource] = Field(min_length=1)
    """Datasets, one after the other."""
    on_invalid: dict[str, Literal["drop", "error"]] = Field({})
    """What to do about a row that is invalid, by reason: drop and count it, as for every reason left out, or end."""
    min_kept_fraction: float = Field(0.5, ge=0, le=1)
    """Smallest share of each source's rows that must be valid; fewer mean that its columns are misread."""
    seed: int = 0
    """Seed of the samples that `max_rows` takes."""

    @field_validator("on_invalid")
    @classmethod
    def _check_reasons(cls, policies: dict[str, Any]) -> dict[str, Any]:
        for reason in policies:
            if reason not in REASONS:
                raise ValueError(f"'{reason}' is no reason; they are {', '.join(REASONS)}")
        return policies

    @model_validator(mode="after")
    def _check_sources(self) -> PreferencesConfig:
        known = {*COMMON, *ROW_KINDS[self.rows].fields, "keep"}
        written = {*ROW_KINDS[self.rows].columns, *HIDDEN}
        titles = Counter(source.title for source in self.sources)
        for source in self.sources:
            if titles[source.title] > 1:
                raise ValueError(f"two sources are called '{source.title}'; give each a name of its own")
            foreign = sorted(source.columns.model_fields_set - known)
            if foreign:
                raise ValueError(f"columns.{foreign[0]} of '{source.title}' is no field of {self.rows} rows")
            taken = sorted(written.intersection(source.columns.keep))
            if taken:
                raise ValueError(f"'{source.title}' keeps '{taken[0]}', a column that is written anyway")
            if source.margin_from_scores and self.rows != "preference":
                raise ValueError(f"'{source.title}' has margin_from_scores, and {self.rows} rows have no margin")
        return self


class Selected(NamedTuple):
    """The rows that are taken of a source."""

    source: PreferenceSource
    read: Callable[[], Iterable[pa.Table]]
    """Gives the tables of the source, the same each time."""
    is_taken: NDArray[np.bool_]
    """One for each row."""
    counts: dict[str, Any]
    schemas: list[pa.Schema]
    """Those of its tables, each once."""


def select_rows(config: PreferencesConfig, advance: Callable[[int], Any]) -> list[Selected]:
    """Read all sources once and find the rows to take; `advance` is told how many rows more have been read.

    Of rows with one id and language the first is valid. Remembers a digest of every one, some 200 bytes. Raises
    SchemaError when a source lacks a column, keeps too few rows, or has an invalid row whose policy is `error`.
    """
    opened = [(source, open_tables(source.input, source.split, source.config)) for source in config.sources]
    seen: set[bytes] = set()
    return [_select(source, read, config, seen, advance) for source, read in opened]


def _select(
    source: PreferenceSource,
    read: Callable[[], Iterable[pa.Table]],
    config: PreferencesConfig,
    seen: set[bytes],
    advance: Callable[[int], Any],
) -> Selected:
    kind = ROW_KINDS[config.rows]
    valid: dict[bytes, tuple[int, int]] = {}
    dropped: Counter[str] = Counter()
    schemas: dict[pa.Schema, None] = {}
    num_rows = 0
    for table in read():
        schemas[table.schema] = None
        for fields in read_fields(table, find_columns(table.schema, source, kind)):
            num_rows += 1
            try:
                row = make_row(fields, source, kind)
                key = hashlib.blake2b(f"{row['id']}\x1f{row['lang']}".encode(), digest_size=12).digest()
                require(key not in seen and key not in valid, "duplicate_id")
            except InvalidRow as error:
                if config.on_invalid.get(error.reason) == "error":
                    raise _refusal(error.reason, fields, num_rows, source) from error
                dropped[error.reason] += 1
                continue
            valid[key] = (seed_of(config.seed, row["id"]), num_rows - 1)
        advance(table.num_rows)
    _check_kept(_counts(num_rows, len(valid), dropped), config.min_kept_fraction, source)
    taken = list(valid)
    if source.max_rows is not None and len(valid) > source.max_rows:
        dropped["over_limit"] = len(valid) - source.max_rows
        taken = heapq.nsmallest(source.max_rows, valid, key=lambda key: (valid[key][0], key))
    seen.update(taken)
    is_taken = np.zeros(num_rows, bool)
    is_taken[[valid[key][1] for key in taken]] = True
    return Selected(source, read, is_taken, _counts(num_rows, len(taken), dropped), list(schemas))


def _counts(num_read: int, num_written: int, dropped: Mapping[str, int]) -> dict[str, Any]:
    return {"read": num_read, "written": num_written, "dropped": dict(sorted(dropped.items())), "status": {}}


def _refusal(reason: str, fields: Fields, number: int, source: PreferenceSource) -> SchemaError:
    own_id = fields.get("id")
    row = f"Row {number:,}" if own_id is None else f"Row {number:,} with the id '{own_id}'"
    return SchemaError(
        f"{row} of '{source.title}' is invalid by {reason}: {REASONS[reason]}; mend it, or set "
        f"on_invalid.{reason}=drop."
    )


def _check_kept(counts: dict[str, Any], min_fraction: float, source: PreferenceSource) -> None:
    if not counts["written"]:
        raise SchemaError(f"'{source.title}' gives no row: {describe_counts(counts)}.")
    if counts["written"] < min_fraction * counts["read"]:
        hint = " (a name keeps the ids of a source apart from others)" if "duplicate_id" in counts["dropped"] else ""
        raise SchemaError(
            f"'{source.title}' gives too few rows: {describe_counts(counts)}, and min_kept_fraction asks for "
            f"{min_fraction:g} of them; name other columns{hint}, or lower min_kept_fraction."
        )


def sum_counts(selected: Iterable[Selected]) -> dict[str, Any]:
    """The counts of all sources together."""
    read, written, dropped = 0, 0, Counter[str]()
    for part in selected:
        read += part.counts["read"]
        written += part.counts["written"]
        dropped.update(part.counts["dropped"])
    return _counts(read, written, dropped)


def make_tables(selected: Sequence[Selected], config: PreferencesConfig) -> Iterator[pa.Table]:
    """The rows that are taken, all with the same columns; every source is read again as they are asked for.

    Raises SchemaError at once when sources keep a column of one name that holds different things.
    """
    kind = ROW_KINDS[config.rows]
    return _make_tables(selected, kind, _own_schema(selected, kind), _kept_schema(selected))


def _make_tables(selected: Sequence[Selected], kind: RowKind, own: pa.Schema, kept: pa.Schema) -> Iterator[pa.Table]:
    for part in selected:
        start = 0
        for table in part.read():
            indices = np.flatnonzero(part.is_taken[start : start + table.num_rows]).tolist()
            start += table.num_rows
            foreign = table.take(indices)
            fields = read_fields(foreign, find_columns(table.schema, part.source, kind))
            rows = pa.Table.from_pylist([make_row(row, part.source, kind) for row in fields], own)
            for field in kept:
                is_kept = field.name in part.source.columns.keep
                values = foreign[field.name].cast(field.type) if is_kept else pa.nulls(len(indices), field.type)
                rows = rows.append_column(field, values)
            yield rows


def _own_schema(selected: Iterable[Selected], kind: RowKind) -> pa.Schema:
    columns = dict(kind.columns)
    if "ratings" in columns:
        names: dict[str, None] = {}
        for source, schema in ((part.source, schema) for part in selected for schema in part.schemas):
            names.update(dict.fromkeys(list_objectives(schema, find_columns(schema, source, kind))))
        columns["ratings"] = pa.struct([(name, pa.float64()) for name in names])
    return pa.schema(list(columns.items()))


def _kept_schema(selected: Iterable[Selected]) -> pa.Schema:
    schemas = [pa.schema([])]
    for part in selected:
        keep = part.source.columns.keep
        schemas += [pa.schema([found.field(name).with_nullable(True) for name in keep]) for found in part.schemas]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise SchemaError(
            f"Sources keep a column that does not hold the same in all of them: {error}; leave it out of columns.keep."
        ) from error

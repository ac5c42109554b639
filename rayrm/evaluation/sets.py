"""The rows that models are evaluated on: any set of preferences, of right and wrong answers, or of conversations."""

from __future__ import annotations

import heapq
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from rayrm import files
from rayrm.config import NOT_IDENTITY, Config
from rayrm.counts import describe_counts
from rayrm.errors import ConfigError, RayRMError
from rayrm.evaluation.benchmarks import BENCHMARKS, PRIOR_DATASET, REWARD_BENCH, Benchmark
from rayrm.languages import LANGUAGES
from rayrm.rows import set_column, with_hidden
from rayrm.runs import INPUT, abandon_run, commit_shard, finish_run, shard_path, start_run
from rayrm.seeds import seed_of
from rayrm.sources.detection import Rows, find_rows, find_source_columns
from rayrm.sources.kinds import ROW_KINDS
from rayrm.sources.preferences import PreferencesConfig, PreferenceSource, SourceColumns, make_tables, select_rows
from rayrm.sources.tables import holds, open_tables

log = logging.getLogger("rayrm")
T = TypeVar("T")
SETS = "sets"
"""Folder of an output with the rows that models are evaluated on."""
READ_LATER = ("anchor", "source", "reference", "translated_from")
"""Columns beside a row's own that scorers and judges may read; all others ride along in `metadata`."""


class EvaluationSet(Config):
    """One set that models are evaluated on."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """A parquet, JSONL or CSV file or a folder of them (any fsspec path), a JSON file, a folder with a copy of a hub
    dataset, or the hub id of a dataset."""
    name: str = Field("preferences", pattern=r"^[\w.-]+$")
    """What reports and results call it; sets of one name count as one."""
    config: str | None = None
    """Configuration of a hub dataset or of a copy, such as a language."""
    split: str | None = None
    """Split of a hub dataset or of a copy; left out, `train`."""
    rows: Literal["preference", "best_of", "conversation"] | None = None
    """What it holds: pairs, right and wrong answers as lists, or whole conversations; null to see by its columns."""
    columns: SourceColumns = SourceColumns()
    """What its columns are called; those that are not named here are found by their usual names."""
    lang: str = "en"
    """ISO or FLORES code of rows that have no language of their own."""
    subset: str | None = None
    """Subset of all of its rows, put before their ids; null for their own."""
    max_rows: int | None = Field(None, ge=1)
    """Take at most so many rows, a sample that hangs on their ids."""

    @field_validator("lang")
    @classmethod
    def _check_lang(cls, lang: str) -> str:
        if lang not in LANGUAGES and lang not in {language.flores for language in LANGUAGES.values()}:
            raise ValueError(f"there is no language {lang}; the codes are {', '.join(LANGUAGES)}")
        return lang


class EvaluatedOn(Config):
    """What models are evaluated on."""

    benchmark: Literal["reward_bench", "m_reward_bench", "reward_bench_2"] | None = None
    """How scores are put together; without `sets`, also which rows are read, from the hub."""
    benchmark_copy: str | None = Field(None, json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder with copies of the benchmark's datasets, each called by the last part of its hub id; null for the hub."""
    sets: list[EvaluationSet] = Field([])
    """The sets; with a benchmark, rows of its subsets, such as translations of it."""
    languages: list[str] | None = None
    """ISO codes of the languages whose rows count; null for all."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for rows, results, metrics and whatever else is made of them."""
    shard_rows: int = Field(512, ge=1)
    """Rows that are committed together; what is done is never done again."""

    @model_validator(mode="after")
    def _check_sets(self) -> EvaluatedOn:
        if not self.sets and self.benchmark is None:
            raise ValueError("there is nothing to evaluate on; set benchmark or sets")
        if self.benchmark_copy is not None and (self.benchmark is None or self.sets):
            raise ValueError("benchmark_copy is read for a benchmark without sets only")
        if unknown := [code for code in self.languages or () if code not in LANGUAGES]:
            raise ValueError(f"there is no language {', '.join(unknown)}; the codes are {', '.join(LANGUAGES)}")
        return self

    @property
    def all_sets(self) -> list[EvaluationSet]:
        """The sets, or those of the benchmark."""
        if self.benchmark is None or self.sets:
            return self.sets
        return benchmark_sets(BENCHMARKS[self.benchmark], self.languages, self.benchmark_copy)

    @property
    def prepared(self) -> PreparedSets:
        """The sets as rows of ours, in the output."""
        folder = files.join(self.output, SETS)
        return PreparedSets(
            sets=self.all_sets,
            languages=self.languages,
            keep=self.needed_columns(),
            output=folder,
            shard_rows=self.shard_rows,
        )

    def needed_columns(self) -> list[str]:
        """Columns of the sets that something reads beside those of all rows."""
        return []

    def count_rows(self) -> dict[str, dict[str, Any]]:
        """What was read, written and dropped of each set."""
        found: dict[str, dict[str, Any]] = files.read_json(files.join(self.output, SETS, files.RUN_MARK))["sets"]
        return found


class PreparedSets(Config):
    """Sets as rows of ours, in a folder for each type of rows."""

    sets: list[EvaluationSet] = Field(min_length=1)
    """The sets."""
    languages: list[str] | None = None
    """ISO codes of the languages whose rows count; null for all."""
    keep: list[str] = Field([])
    """Further columns that ride along as they are, and not in `metadata`."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for the rows."""
    shard_rows: int = Field(512, ge=1)
    """Rows in each file that is written."""


class Prepared(NamedTuple):
    """Where the rows of one type are, and how many."""

    rows: Rows
    path: str
    num_rows: int


def benchmark_sets(benchmark: Benchmark, languages: Sequence[str] | None, copy: str | None) -> list[EvaluationSet]:
    """The sets of a benchmark, from the hub or from copies of its datasets in the folder `copy`.

    A copy is called by the last part of its hub id. A benchmark that is translated has a set for each of `languages`
    (null: all of its own), where English is RewardBench itself. Raises ConfigError for a language that it is not translated into.
    """

    def where(dataset: str) -> str:
        return files.join(copy, dataset.rpartition("/")[2]) if copy else dataset

    common: dict[str, Any] = {"name": benchmark.name, "input": where(benchmark.dataset), "split": benchmark.split}
    if benchmark.languages:
        known = {language.code: language for language in benchmark.languages}
        wanted = list(known) if languages is None else [code for code in languages if code != "en"]
        english = {"name": benchmark.name, "input": where(REWARD_BENCH.dataset), "split": REWARD_BENCH.split}
        if unknown := [code for code in wanted if code not in known]:
            raise ConfigError(
                f"{benchmark.name} is not translated into {', '.join(unknown)}; its languages are {', '.join(known)}."
            )
        translated = [EvaluationSet(**common, config=known[code].flores, lang=code) for code in wanted]
        return [*([EvaluationSet(**english)] if "en" in (languages or ()) else []), *translated]
    prior = {"name": benchmark.name, "input": where(PRIOR_DATASET)}
    return [EvaluationSet(**common)] + [
        EvaluationSet(**prior, split=name, subset=name) for name in benchmark.prior_sets
    ]


def claim_sets(config: EvaluatedOn, check: Callable[[list[Prepared]], T]) -> T:
    """What `check` makes of the rows of all sets of a run that has just started.

    Gives up the output again, if nothing was done there before, when sets cannot be had or the check refuses them.
    """
    output = files.join(config.output, SETS)
    is_new = not files.exists(files.join(output, files.RUN_MARK))
    try:
        return check(prepare_sets(config.prepared))
    except RayRMError:
        fs, inner = files.filesystem(output)
        if is_new:
            if fs.exists(inner):
                fs.rm(inner, recursive=True)
            abandon_run(config)
        raise


def prepare_sets(config: PreparedSets) -> list[Prepared]:
    """Read all sets into folders below `config.output`, once; what was dropped is counted in its `run.json`.

    Each row has the name of its set in `set`, and what else its file holds of it as JSON in `metadata`. Raises ConfigError
    and SchemaError as the sets ask for it, and ConfigError when no row is in one of the languages.
    """
    if start_run(config):
        tables: defaultdict[Rows, list[pa.Table]] = defaultdict(list)
        counts: dict[str, Any] = {}
        for part in config.sets:
            rows, table, told = _read_set(part, config)
            title = " ".join(filter(None, (part.name, part.config or part.subset, part.input)))
            counts[title] = told
            log.info("%s: %s", title, describe_counts(told))
            tables[rows].append(table)
        whole = {rows: pa.concat_tables(parts, promote_options="permissive") for rows, parts in tables.items()}
        num_rows = {rows: table.num_rows for rows, table in whole.items() if table.num_rows}
        if not num_rows:
            raise ConfigError(f"No row of the sets is in one of the languages {', '.join(config.languages or [])}.")
        for rows in num_rows:
            _write(files.join(config.output, rows), _with_own_keys(whole[rows]), rows, config.shard_rows)
        finish_run(config, {"num_rows": num_rows, "sets": counts})
    done = files.read_json(files.join(config.output, files.RUN_MARK))["num_rows"]
    return [Prepared(rows, files.join(config.output, rows), num) for rows, num in done.items()]


def _read_set(part: EvaluationSet, config: PreparedSets) -> tuple[Rows, pa.Table, dict[str, Any]]:
    first = next(iter(open_tables(part.input, part.split, part.config)()), pa.table({}))
    rows = find_rows(first.schema, part.rows, part.columns, part.input)
    columns = find_source_columns(first, rows, part.columns)
    uniqueness = _check_ids(part, columns)
    if uniqueness == "repeated":
        columns = columns.model_copy(update={"id": None})
    source = PreferenceSource(
        input=part.input,
        config=part.config,
        split=part.split,
        name=part.subset,
        columns=columns,
        lang=part.lang,
        ids_within_subset=uniqueness == "within_subset",
    )
    selecting = PreferencesConfig(rows=rows, sources=[source])
    selected = select_rows(selecting, lambda num: None)
    table = pa.concat_tables(make_tables(selected, selecting), promote_options="permissive")
    counts = selected[0].counts
    if config.languages is not None:
        table = table.filter(pa.array([lang in config.languages for lang in table["lang"].to_pylist()], pa.bool_()))
        other = counts["written"] - table.num_rows
        dropped = {**counts["dropped"], **({"other_language": other} if other else {})}
        counts = {**counts, "written": table.num_rows, "dropped": dropped}
    if part.max_rows is not None and table.num_rows > part.max_rows:
        ids = table["id"].to_pylist()
        drawn = heapq.nsmallest(part.max_rows, range(len(ids)), key=lambda index: (seed_of(0, ids[index]), index))
        counts = {
            **counts,
            "written": part.max_rows,
            "dropped": {**counts["dropped"], "over_limit": len(ids) - len(drawn)},
        }
        table = table.take(sorted(drawn))
    if part.subset is not None:
        table = set_column(table, "subset", pa.array([part.subset] * table.num_rows, pa.string()))
    return rows, _with_metadata(table, columns.keep, config.keep, part.name), counts


def _check_ids(part: EvaluationSet, columns: SourceColumns) -> Literal["own", "within_subset", "repeated"]:
    """Whether ids are the rows' own, those of a subset, or not to be told apart even there, as ids of prompts."""
    if columns.id is None:
        return "own"
    ids: Counter[Any] = Counter()
    whole: Counter[Any] = Counter()
    for table in open_tables(part.input, part.split, part.config)():
        absent = [None] * table.num_rows
        subset, lang, own = (
            table[name].to_pylist() if name in table.column_names else absent
            for name in (columns.subset, columns.lang, columns.id)
        )
        rows = [row for row in zip(own, lang, subset, strict=True) if row[0] not in (None, "")]
        ids.update(row[:2] for row in rows)
        whole.update(rows)
    if max(ids.values(), default=0) <= 1:
        return "own"
    return "within_subset" if max(whole.values()) == 1 and part.subset is None else "repeated"


def _with_metadata(table: pa.Table, kept: Sequence[str], needed: Sequence[str], name: str) -> pa.Table:
    """`table` with its set's name, and with its kept columns but for those that are read as JSON in `metadata`."""
    texts = {column for column in READ_LATER if column in kept and holds("subset", table.schema.field(column).type)}
    packed = [column for column in kept if column not in texts and column not in needed]
    values = table.select(packed).to_pylist() if packed else [{}] * table.num_rows
    told = [json.dumps(value, ensure_ascii=False, default=str) for value in values]
    table = table.drop_columns(packed).append_column("metadata", pa.array(told, pa.string()))
    for column in texts:
        table = set_column(table, column, table[column].cast(pa.string()))
    return table.append_column("set", pa.array([name] * table.num_rows, pa.string()))


def _with_own_keys(table: pa.Table) -> pa.Table:
    """`table` without rows whose set, id and language an earlier row has: those of several sets of one name."""
    seen: set[tuple[str, ...]] = set()
    fresh = []
    for key in zip(*(table[name].to_pylist() for name in ("set", "subset", "id", "lang")), strict=True):
        fresh.append(key not in seen)
        seen.add(key)
    if not all(fresh):
        log.warning("%d rows stand in several sets of one name and count once", fresh.count(False))
    return table.filter(pa.array(fresh, pa.bool_()))


def _write(output: str, table: pa.Table, rows: Rows, shard_rows: int) -> None:
    num_shards = -(-table.num_rows // shard_rows)
    for index in range(num_shards):
        part = with_hidden(table.slice(index * shard_rows, shard_rows))
        commit_shard(shard_path(output, index, num_shards), part, ROW_KINDS[rows].row_type)

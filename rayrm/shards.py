"""Rows on disk: parquet, JSONL and CSV files cut into shards by position: the same input gives the same shards.

A CSV file has a header line, and all of its columns are text; a cell with nothing in it, not even quotes, is null.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.json as pj
import pyarrow.parquet as pq

from rayrm import files
from rayrm.errors import ConfigError, SchemaError

SUFFIXES = (".parquet", ".jsonl", ".csv")
"""How the names of files of rows end."""
BLOCK_BYTES = 1 << 26
"""Bytes parsed at a time; no row of a JSONL or CSV file may be longer."""


class Shard(NamedTuple):
    """Rows `start` (included) to `stop` (not included) of one file."""

    path: str
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """How many rows the shard has."""
        return self.stop - self.start


def list_files(path: str) -> list[str]:
    """The parquet, JSONL and CSV files at `path`, sorted by name. Raises ConfigError when there are none."""
    fs, inner = files.filesystem(path)
    if not fs.exists(inner):
        raise ConfigError(f"There is nothing at '{path}'; give a parquet, JSONL or CSV file, or a folder of them.")
    names = sorted(fs.find(inner)) if fs.isdir(inner) else [inner]
    found = [name for name in names if name.endswith(SUFFIXES) and "/." not in name[len(inner) :]]
    if not found:
        raise ConfigError(f"'{path}' holds no .parquet or .jsonl file, and no .csv file.")
    return [fs.unstrip_protocol(name) if "file" not in fs.protocol else name for name in found]


def list_shards(path: str, shard_rows: int) -> list[Shard]:
    """Cut every file at `path` into shards of at most `shard_rows` rows; files without rows give none."""
    shards = []
    for name in list_files(path):
        num_rows = _count(name)
        shards += [Shard(name, i, min(i + shard_rows, num_rows)) for i in range(0, num_rows, shard_rows)]
    return shards


def read_shard(shard: Shard, limit: int | None = None) -> pa.Table:
    """The rows of a shard, or the first `limit` of them. Raises SchemaError for a file that cannot be read.

    Holds no more of a parquet file than the shard, however long its row groups are.
    """
    stop = shard.stop if limit is None else min(shard.stop, shard.start + limit)
    if _is_text(shard.path):
        return _read_text(shard.path).slice(shard.start, stop - shard.start)
    with _open(shard.path) as handle:
        return _read(shard.path, lambda: _read_slice(pq.ParquetFile(handle), shard.start, stop))


def _read_slice(file: pq.ParquetFile, start: int, stop: int) -> pa.Table:
    groups: list[int] = []
    first = seen = 0
    for index in range(file.num_row_groups):
        size = file.metadata.row_group(index).num_rows
        if seen < stop and seen + size > start:
            first = seen if not groups else first
            groups.append(index)
        seen += size
    batches = []
    if groups:
        for batch in file.iter_batches(max(1, stop - start), row_groups=groups):
            begin, end = max(start - first, 0), min(stop - first, batch.num_rows)
            if begin < end:
                batches.append(batch.slice(begin, end - begin))
            first += batch.num_rows
            if first >= stop:
                break
    return pa.Table.from_batches(batches, file.schema_arrow).replace_schema_metadata(None)


def read_schemas(path: str) -> Iterator[tuple[str, pa.Schema]]:
    """Every file at `path` that has rows, with its schema. Raises SchemaError for a file that cannot be read."""
    for name in list_files(path):
        if _is_text(name):
            table = _read_text(name)
            num_rows, schema = table.num_rows, table.schema
        else:
            metadata = _metadata(name)
            num_rows, schema = metadata.num_rows, metadata.schema.to_arrow_schema()
        if num_rows:
            yield name, schema


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """All rows at `path` as one table, in file order; `columns` selects those that are there."""
    tables = list(iter_tables(path, columns))
    if not tables:
        return read_shard(Shard(list_files(path)[0], 0, 0))
    return pa.concat_tables(tables, promote_options="permissive")


def iter_tables(path: str, columns: list[str] | None = None, num_rows: int = 1 << 16) -> Iterator[pa.Table]:
    """All rows at `path` in file order, at most `num_rows` a table; `columns` selects those that are there.

    A JSONL or CSV file comes as one table. Raises SchemaError for a file that cannot be read.
    """
    for name in list_files(path):
        if _is_text(name):
            table = _read_text(name)
            yield table if columns is None else table.select([c for c in columns if c in table.column_names])
            continue
        with _open(name) as handle:
            file = _read(name, lambda handle=handle: pq.ParquetFile(handle))  # type: ignore[misc]
            wanted = columns and [c for c in columns if c in file.schema_arrow.names]
            batches = file.iter_batches(num_rows, columns=wanted)
            while (batch := _read(name, lambda batches=batches: next(batches, None))) is not None:  # type: ignore[misc]
                yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def _count(name: str) -> int:
    return int(_read_text(name).num_rows if _is_text(name) else _metadata(name).num_rows)


def _metadata(name: str) -> pq.FileMetaData:
    with _open(name) as handle:
        return _read(name, lambda: pq.read_metadata(handle))


def _is_text(name: str) -> bool:
    return not name.endswith(".parquet")


def _read_text(name: str) -> pa.Table:
    fs, inner = files.filesystem(name)
    # The types of a JSONL column hang on the whole file, and so do the line ends between quotes of a CSV file: every
    # shard needs all of it parsed.
    return _parse_text(name, str(fs.ukey(inner))) if fs.size(inner) else pa.table({})


@lru_cache(maxsize=1)
def _parse_text(name: str, version: str) -> pa.Table:
    parse = _parse_csv if name.endswith(".csv") else _parse_jsonl
    with _open(name) as handle:
        return _read(name, lambda: parse(handle, name))


def _parse_jsonl(handle: Any, name: str) -> pa.Table:
    return pj.read_json(handle, pj.ReadOptions(block_size=BLOCK_BYTES))


def _parse_csv(handle: Any, name: str) -> pa.Table:
    reading, parsing = pv.ReadOptions(block_size=BLOCK_BYTES), pv.ParseOptions(newlines_in_values=True)
    names = pv.open_csv(handle, reading, parsing).schema.names
    twice = [column for column in dict.fromkeys(names) if names.count(column) > 1]
    if twice:
        raise SchemaError(f"'{name}' has several columns '{twice[0]}'; rename all but one.")
    handle.seek(0)
    converting = pv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    return pv.read_csv(handle, reading, parsing, converting)


def _open(name: str) -> Any:
    fs, inner = files.filesystem(name)
    return _read(name, lambda: fs.open(inner, "rb"))


def _read(name: str, read: Any) -> Any:
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise SchemaError(f"'{name}' cannot be read as {name.rsplit('.', 1)[-1]}: {reason}.") from error

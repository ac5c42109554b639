"""Foreign data as Arrow tables: parquet and JSONL at any path, or a dataset of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from rayrm import files
from rayrm.errors import ConfigError
from rayrm.shards import iter_tables

TABLE_ROWS = 8192


def open_tables(path: str, split: str | None) -> Callable[[], Iterable[pa.Table]]:
    """What reads the rows at `path` from the start, as tables, each time it is called.

    `split` is that of a hub dataset (null: `train`). Raises ConfigError for a split of local files, and for a dataset
    that the hub does not give.
    """
    if not files.is_hub_id(path):
        if split is not None:
            raise ConfigError(
                f"split is '{split}', and '{path}' is no hub dataset; give the file of the split as input."
            )
        return lambda: iter_tables(path, num_rows=TABLE_ROWS)
    import datasets

    try:
        dataset = datasets.load_dataset(path, split=split or "train").with_format("arrow")
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise ConfigError(f"There is nothing at '{path}', and the hub gives no such dataset: {reason}.") from error

    def read() -> Iterator[pa.Table]:
        for table in dataset.iter(TABLE_ROWS):
            yield table.replace_schema_metadata(None)

    return read


def rebatch(tables: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `num_rows`, but for the last."""
    waiting: list[pa.Table] = []
    size = 0
    for table in tables:
        waiting.append(table)
        size += table.num_rows
        if size >= num_rows:
            whole = pa.concat_tables(waiting, promote_options="permissive")
            while whole.num_rows >= num_rows:
                yield whole.slice(0, num_rows)
                whole = whole.slice(num_rows)
            waiting, size = [whole], whole.num_rows
    if size:
        yield pa.concat_tables(waiting, promote_options="permissive")

"""Row types: which columns a file of rows has, and how rows go through a stage.

A stage sees Arrow tables that are whole shards. Beside the columns of the row type a table carries three hidden
columns: `_shard` (number of the shard), `_kept` (false for a row that a stage has dropped) and `_dropped` (the
reasons of all that was dropped in making this row). A dropped row stays in the table until it is written, so that
what was read and what was dropped can be counted exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from rayrm.errors import SchemaError
from rayrm.shards import read_schemas

if TYPE_CHECKING:
    from ray.data import Dataset

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""Chat messages in TRL's conversational format."""
TEXTS = pa.list_(pa.string())
NUMBERS = pa.list_(pa.float64())
HIDDEN = ("_shard", "_kept", "_dropped")


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


class RowType:
    """A named contract of columns. `nullable` columns may hold null; others ride along."""

    def __init__(self, name: str, columns: dict[str, pa.DataType | None], nullable: Sequence[str] = ()) -> None:
        self.name = name
        self.columns = columns
        """Column to Arrow type; None where the type depends on the scorers."""
        self.nullable = frozenset(nullable)

    def __repr__(self) -> str:
        return self.name

    def check(self, schema: pa.Schema, where: str) -> None:
        """Raise SchemaError unless `schema` has every column of this type with a type that casts to it."""
        missing = [name for name in self.columns if name not in schema.names and name not in self.nullable]
        if missing:
            raise SchemaError(
                f"{where} is not a file of {self.name} rows: it lacks {', '.join(missing)}; "
                f"found {', '.join(n for n in schema.names if n not in HIDDEN)}."
            )
        for name, expected in self.columns.items():
            if expected is None or name not in schema.names:
                continue
            found = schema.field(name).type
            if not _castable(found, expected):
                raise SchemaError(f"Column '{name}' of {where} is {found}, and a {self.name} row needs {expected}.")

    def check_files(self, path: str) -> None:
        """Raise SchemaError unless there are rows at `path`, and every file of them passes `check`."""
        found = False
        for name, schema in read_schemas(path):
            self.check(schema, f"'{name}'")
            found = True
        if not found:
            raise SchemaError(f"'{path}' holds no rows; a run needs at least one.")

    def conform(self, table: pa.Table) -> pa.Table:
        """Cast the columns of this type to their contract and add nullable ones that are absent as null."""
        for name, expected in self.columns.items():
            if name not in table.column_names:
                kind = expected or pa.null()
                table = table.append_column(pa.field(name, kind), pa.nulls(table.num_rows, kind))
            elif expected is not None and table.schema.field(name).type != expected:
                index = table.column_names.index(name)
                table = table.set_column(index, pa.field(name, expected), table[name].cast(expected))
        return table


def _castable(found: pa.DataType, expected: pa.DataType) -> bool:
    if found == expected or pa.types.is_null(found):
        return True
    if pa.types.is_string(expected):
        return bool(pa.types.is_large_string(found) or pa.types.is_dictionary(found))
    if pa.types.is_floating(expected):
        return bool(pa.types.is_floating(found) or pa.types.is_integer(found))
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return bool(is_list and _castable(found.value_type, expected.value_type))
    if pa.types.is_struct(expected):
        if not pa.types.is_struct(found):
            return False
        names = {field.name for field in found}
        return all(f.name in names and _castable(found.field(f.name).type, f.type) for f in expected)
    return False


_PROMPT: dict[str, pa.DataType | None] = {
    "id": pa.string(),
    "group": pa.string(),
    "prompt": MESSAGES,
    "source": pa.string(),
    "reference": pa.string(),
    "anchor": pa.string(),
    "src_lang": pa.string(),
    "tgt_lang": pa.string(),
    "lang": pa.string(),
    "subset": pa.string(),
}
_OPTIONAL = ("source", "reference", "anchor", "src_lang", "tgt_lang", "subset")

Prompt = RowType("Prompt", _PROMPT, _OPTIONAL)
Candidates = RowType("Candidates", {**_PROMPT, "candidates": TEXTS}, _OPTIONAL)
Scored = RowType("Scored", {**_PROMPT, "candidates": TEXTS, "scores": None, "status": None}, _OPTIONAL)
Rewarded = RowType("Rewarded", {**_PROMPT, "candidates": TEXTS, "rewards": NUMBERS}, _OPTIONAL)
Preference = RowType(
    "Preference",
    {
        "id": pa.string(),
        "group": pa.string(),
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "margin": pa.float64(),
        "src_lang": pa.string(),
        "tgt_lang": pa.string(),
        "lang": pa.string(),
        "subset": pa.string(),
    },
    ("margin", "src_lang", "tgt_lang", "subset"),
)

Rated = RowType(
    "Rated",
    {
        "id": pa.string(),
        "group": pa.string(),
        "prompt": MESSAGES,
        "completion": MESSAGES,
        "ratings": None,
        "src_lang": pa.string(),
        "tgt_lang": pa.string(),
        "lang": pa.string(),
        "subset": pa.string(),
    },
    ("src_lang", "tgt_lang", "subset"),
)
"""A completion with `ratings`, a struct of a number or null for each objective."""
Stepwise = RowType(
    "Stepwise",
    {
        "id": pa.string(),
        "group": pa.string(),
        "prompt": MESSAGES,
        "steps": TEXTS,
        "labels": NUMBERS,
        "src_lang": pa.string(),
        "tgt_lang": pa.string(),
        "lang": pa.string(),
        "subset": pa.string(),
    },
    ("src_lang", "tgt_lang", "subset"),
)
"""A completion cut into steps, each with the probability that it is right, or null where nobody knows."""

RowFunction = Callable[..., tuple[dict[str, Any] | None, list[str]]]
"""`(row, config) → (new columns or None to drop the row, reasons of all that was dropped)`."""


def map_rows(dataset: Dataset, function: RowFunction, config: Any, *, reads: Sequence[str], writes: RowType) -> Dataset:
    """Apply a plain row function to every kept row; what it returns is added to the row.

    `function` sees only the columns `reads` (fewer is faster: the others stay in Arrow). Columns of `reads` that
    `writes` does not have, and that are none of a Prompt's own, are removed.
    """
    kwargs = {"function": function, "config": config, "reads": tuple(reads), "writes": writes}
    return dataset.map_batches(map_table, fn_kwargs=kwargs, batch_format="pyarrow", batch_size=None)


def map_table(table: pa.Table, function: RowFunction, config: Any, reads: Sequence[str], writes: RowType) -> pa.Table:
    """`map_rows` for one table."""
    table = with_hidden(table)
    kept = table["_kept"].to_pylist()
    dropped = table["_dropped"].to_pylist()
    added: dict[str, list[Any]] = {}
    columns = [table[name].to_pylist() for name in reads]
    for index in range(table.num_rows):
        if not kept[index]:
            continue
        row = {name: column[index] for name, column in zip(reads, columns, strict=True)}
        new, reasons = function(row, config)
        if reasons:
            dropped[index] = dropped[index] + reasons
        if new is None:
            kept[index] = False
            continue
        for name, value in new.items():
            if name not in added:
                added[name] = [None] * table.num_rows
            added[name][index] = value
    for name in reads:
        if name not in writes.columns and name not in _PROMPT:
            table = table.drop_columns(name)
    for name, values in added.items():
        table = set_column(table, name, pa.array(values, type=writes.columns.get(name)))
    for name, kind in writes.columns.items():
        if name not in table.column_names and kind is not None:
            table = set_column(table, name, pa.nulls(table.num_rows, kind))
    table = set_column(table, "_kept", pa.array(kept, pa.bool_()))
    return set_column(table, "_dropped", pa.array(dropped, TEXTS))


def with_hidden(table: pa.Table) -> pa.Table:
    """`table` with the hidden columns of a shard; rows without them are kept rows of shard 0."""
    num = table.num_rows
    if "_shard" not in table.column_names:
        table = table.append_column("_shard", pa.array([0] * num, pa.int32()))
    if "_kept" not in table.column_names:
        table = table.append_column("_kept", pa.array([True] * num, pa.bool_()))
    if "_dropped" not in table.column_names:
        table = table.append_column("_dropped", pa.array([[]] * num, TEXTS))
    return table


def drop_nulls(table: pa.Table, row_type: RowType) -> pa.Table:
    """Drop the rows that have null in a column where their type has none, as `null_<column>`."""
    table = with_hidden(table)
    for name in row_type.columns:
        if name in row_type.nullable or not table[name].null_count:
            continue
        gone = table[name].is_null().to_pylist()
        dropped = [
            [*old, f"null_{name}"] if new else old for old, new in zip(table["_dropped"].to_pylist(), gone, strict=True)
        ]
        table = set_column(table, "_kept", pc.and_(table["_kept"], pc.invert(pa.array(gone))))
        table = set_column(table, "_dropped", pa.array(dropped, TEXTS))
    return table


def set_column(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Replace a column, or append it."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


def on_kept(table: pa.Table, function: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """Run `function` on the rows of a shard that are still kept, and put the dropped ones back behind them."""
    table = with_hidden(table)
    kept = table.filter(table["_kept"])
    gone = table.filter(pc.invert(table["_kept"]))
    return pa.concat_tables([function(kept), gone], promote_options="default")

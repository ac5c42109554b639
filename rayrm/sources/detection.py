"""Which column of a foreign set is which, by its name and by what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa

from rayrm.errors import SchemaError
from rayrm.sources.kinds import COMMON, ROW_KINDS
from rayrm.sources.preferences import SourceColumns
from rayrm.sources.tables import holds

Rows = Literal["preference", "best_of", "conversation"]
NAMES = {
    "prompt": ("prompt", "question", "input", "instruction"),
    "subset": ("subset", "source", "category"),
    "lang": ("lang", "language", "target_language"),
    "messages": ("messages", "conversation", "conversations"),
}
"""Names that a field goes by, best first; any other field goes by its own alone."""
_ANSWERS: dict[Rows, tuple[str, ...]] = {
    "best_of": ("correct", "incorrect"),
    "preference": ("chosen", "rejected"),
    "conversation": ("messages",),
}
"""Fields that make rows of a type, in the order in which types are tried."""


_NOT_LOOKED_FOR = {"weight", "label", "completion"}
"""Fields that say nothing to an evaluation; an answer that is judged stands at the end of its conversation."""


def find_rows(schema: pa.Schema, rows: Rows | None, given: SourceColumns, where: str) -> Rows:
    """The type of rows that a set holds: best_of for lists of answers, preference for two, else conversation.

    `rows` is what is wanted, null for the first that fits, and `given` names columns. Raises SchemaError, naming the
    columns that are there.
    """
    for kind in _ANSWERS if rows is None else (rows,):
        if all(_find(schema, field, _names_of(field, given)) for field in _ANSWERS[kind]):
            return kind
    wanted = "chosen and rejected, or messages" if rows is None else " and ".join(_ANSWERS[rows])
    raise SchemaError(
        f"'{where}' has no columns {wanted} that hold {'answers' if rows is None else f'{rows} rows'}; found "
        f"{', '.join(f'{field.name} ({field.type})' for field in schema) or 'no column'}; name its columns by columns."
    )


def find_source_columns(first: pa.Table, rows: Rows, given: SourceColumns) -> SourceColumns:
    """What the columns of a set are called that begins with the rows `first`, and which further ones ride along.

    What `given` names stays. Of conversations before and behind which a prompt stands too, that is not read.
    """
    names = first.column_names
    if {"instruction", "input"} <= set(names) and "prompt" not in names and "prompt" not in given.model_fields_set:
        raise SchemaError(
            "A set has both columns instruction and input, and no prompt; join them, or name one by columns.prompt."
        )
    kind = ROW_KINDS[rows]
    fields = {*COMMON, *kind.fields}
    columns: dict[str, Any] = dict.fromkeys(fields & _NOT_LOOKED_FOR)
    for field in fields - _NOT_LOOKED_FOR:
        columns[field] = _find(first.schema, field, _names_of(field, given))
    if rows == "conversation" or (rows == "preference" and _is_conversation(first, columns["chosen"])):
        columns["prompt"] = None
    columns |= {field: getattr(given, field) for field in given.model_fields_set if field in fields}
    taken = {*columns.values(), *kind.columns}
    kept = given.keep or tuple(name for name in first.column_names if name not in taken)
    return SourceColumns.model_validate({**columns, "keep": kept})


def _names_of(field: str, given: SourceColumns) -> tuple[str, ...]:
    if field in given.model_fields_set:
        return tuple(filter(None, (getattr(given, field),)))
    return NAMES.get(field, (SourceColumns.model_fields[field].default,))


def _is_conversation(first: pa.Table, name: str | None) -> bool:
    """Whether a column holds whole conversations, and not answers alone."""
    for value in first[name].to_pylist() if name in first.column_names else ():
        if value:
            return not isinstance(value, str) and value[0]["role"] in ("system", "user")
    return False


def _find(schema: pa.Schema, field: str, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in schema.names and holds(field, schema.field(name).type)), None)

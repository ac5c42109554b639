"""Which column of a foreign set is which, by its name and by what it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

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
_ANSWERS: dict[Rows, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "best_of": (("correct", "incorrect"), ("chosen", "rejected")),
    "preference": (("chosen", "rejected"), ("chosen", "rejected")),
    "conversation": (("messages",), ("messages",)),
}
"""Fields that make rows of a type, and their names, in the order in which types are tried."""


_NOT_LOOKED_FOR = {"weight", "label", "completion"}
"""Fields that say nothing to an evaluation; an answer that is judged stands at the end of its conversation."""


def find_rows(schema: pa.Schema, rows: Rows | None, where: str) -> Rows:
    """The type of rows that a set holds: best_of for lists of answers, preference for two, else conversation.

    `rows` is what is wanted, null for the first that fits. Raises SchemaError, naming the columns that are there.
    """
    for kind in _ANSWERS if rows is None else (rows,):
        fields, names = _ANSWERS[kind]
        found = [_find(schema, field, NAMES.get(name, (name,))) for field, name in zip(fields, names, strict=True)]
        if all(found):
            return kind
    wanted = "chosen and rejected, or messages" if rows is None else " and ".join(_ANSWERS[rows][1])
    raise SchemaError(
        f"'{where}' has no columns {wanted} that hold {'answers' if rows is None else f'{rows} rows'}; found "
        f"{', '.join(f'{field.name} ({field.type})' for field in schema) or 'no column'}; name its columns by columns."
    )


def find_source_columns(schema: pa.Schema, rows: Rows, keep: Callable[[pa.Field], bool]) -> SourceColumns:
    """What the columns of a set are called. Those that are no field and that `keep` wants ride along."""
    kind = ROW_KINDS[rows]
    columns: dict[str, str | None] = {}
    for field in {*COMMON, *kind.fields} - _NOT_LOOKED_FOR:
        names = NAMES.get(field, (SourceColumns.model_fields[field].default,))
        columns[field] = _find(schema, field, names)
    columns |= dict.fromkeys(_NOT_LOOKED_FOR & {*COMMON, *kind.fields})
    if rows == "conversation":
        # It holds its prompt.
        columns["prompt"] = None
    taken = {*columns.values(), *kind.columns}
    kept = tuple(field.name for field in schema if field.name not in taken and keep(field))
    return SourceColumns.model_validate({**columns, "keep": kept})


def _find(schema: pa.Schema, field: str, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in schema.names and holds(field, schema.field(name).type)), None)

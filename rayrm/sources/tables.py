"""Foreign data as Arrow tables: parquet, JSONL and CSV at any path, or a dataset of the hub; and its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rayrm import files
from rayrm.errors import ConfigError, SchemaError
from rayrm.shards import iter_tables
from rayrm.sources.kinds import COMMON, RowKind

if TYPE_CHECKING:
    from rayrm.sources.preferences import PreferenceSource

TABLE_ROWS = 8192


def open_tables(path: str, split: str | None, config: str | None = None) -> Callable[[], Iterable[pa.Table]]:
    """What reads the rows at `path` from the start, as tables, each time it is called.

    `split` and `config` are those of a dataset of the hub (null: `train`, and its only configuration), or of a folder
    with a copy of one. A `.json` file holds a list of rows, or one a line. Raises ConfigError for a split of other local
    files, and for a dataset that cannot be had.
    """
    is_json = path.endswith(".json")
    if not files.is_hub_id(path) and (not is_json or split is not None or config is not None):
        if split is None and config is None:
            return lambda: _slice_tables(iter_tables(path, num_rows=TABLE_ROWS))
        if not Path(path).is_dir():
            told = f"split is '{split}'" if config is None else f"config is '{config}'"
            raise ConfigError(
                f"{told}, and '{path}' is no hub dataset, nor a local folder with a copy of one; give the file of the "
                "split as input."
            )
        if config is not None and Path(path, config).is_dir():
            path, config = str(Path(path, config)), None
    dataset = _load_dataset(path, split or "train", config)

    def read() -> Iterator[pa.Table]:
        for table in dataset.iter(TABLE_ROWS):
            yield table.replace_schema_metadata(None)

    return read


def _load_dataset(path: str, split: str, config: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.endswith(".json"):
            found = datasets.load_dataset("json", data_files=path, split="train")
        else:
            found = datasets.load_dataset(path, name=config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or repr(cause)).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"There is no dataset at '{path}' with split '{split}' and config '{config}', nor does the hub give one: "
            f"{reason}."
        ) from error
    return found.with_format("arrow")


def _slice_tables(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of at most TABLE_ROWS; one without rows stays, for its columns if it has any."""
    for table in tables:
        num_rows = max(1, table.num_rows) if table.num_columns else 0
        for start in range(0, num_rows, TABLE_ROWS):
            yield table.slice(start, TABLE_ROWS)


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


def find_columns(schema: pa.Schema, source: PreferenceSource, kind: RowKind) -> dict[str, str]:
    """The column of each field of a row that a file has; those of single ratings are called `ratings.<objective>`.

    Raises SchemaError when a column that is needed or named is not there, or holds something else.
    """
    columns = {field: getattr(source.columns, field) for field in (*COMMON, *kind.fields)}
    needed = {*kind.needs, *(field for field in source.columns.model_fields_set if columns.get(field) is not None)}
    if isinstance(columns.get("ratings"), dict):
        single = {f"{_RATING}{name}": column for name, column in columns.pop("ratings").items()}
        columns, needed = {**columns, **single}, {*needed, *single} - {"ratings"}
    whole = columns.pop("messages", None)
    if whole and ("messages" in needed or (columns["completion"] not in schema.names and whole in schema.names)):
        columns["completion"] = whole
    if source.margin_from_scores:
        needed |= {"chosen_score", "rejected_score"}
    if source.lang is None:
        needed.add("lang")
    found = {field: name for field, name in columns.items() if name in schema.names}
    answers = [found[field] for field in ("chosen", "rejected", "completion") if field in found]
    if any(_is_text(schema.field(name).type) for name in answers):
        needed.add("prompt")
    missing = [f"{columns[field] or field} (columns.{field})" for field in sorted(needed - {*found, "messages"})]
    missing += [f"{name} (columns.keep)" for name in source.columns.keep if name not in schema.names]
    if missing:
        hint = ", or the language of its rows by lang" if "lang" in needed - set(found) else ""
        raise SchemaError(
            f"'{source.title}' lacks {', '.join(missing)}; found {', '.join(schema.names) or 'no column'}; name its "
            f"columns by columns{hint}."
        )
    _check_types(schema, found, source)
    return found


def list_objectives(schema: pa.Schema, columns: Mapping[str, str]) -> list[str]:
    """The names of the ratings in a file, by what `find_columns` found."""
    single = [field.removeprefix(_RATING) for field in columns if field.startswith(_RATING)]
    return single or [field.name for field in schema.field(columns["ratings"]).type]


def read_fields(table: pa.Table, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The fields of each row, by what `find_columns` found."""
    values = {field: table[name].to_pylist() for field, name in columns.items()}
    single = [field for field in values if field.startswith(_RATING)]
    for row in zip(*values.values(), strict=True):
        fields = dict(zip(values, row, strict=True))
        if single:
            fields["ratings"] = {field.removeprefix(_RATING): fields.pop(field) for field in single}
        yield fields


def _check_types(schema: pa.Schema, columns: Mapping[str, str], source: PreferenceSource) -> None:
    for field, name in columns.items():
        found = schema.field(name).type
        what, is_held = _HOLDS["margin" if field.startswith(_RATING) else field]
        if not is_held(found):
            raise SchemaError(
                f"Column '{name}' of '{source.title}' is {found}, and columns.{field} needs {what}; name another column, "
                "or null for none."
            )


def holds(field: str, kind: pa.DataType) -> bool:
    """Whether a column of a type can hold a field of `SourceColumns`."""
    return _HOLDS[field][1](kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _is_key(kind: pa.DataType) -> bool:
    return bool(_is_text(kind) or pa.types.is_integer(kind))


def _is_number(kind: pa.DataType) -> bool:
    # Text may be that of a number: a CSV file has nothing else.
    is_numeric = pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_boolean(kind)
    return bool(is_numeric or _is_key(kind))


def _is_list(kind: pa.DataType, is_item: Callable[[pa.DataType], bool]) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(pa.types.is_null(kind) or (is_list and is_item(kind.value_type)))


def _is_message(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) and all(
        kind.get_field_index(name) >= 0 and _is_text(kind.field(name).type) for name in ("role", "content")
    )


def _is_chat(kind: pa.DataType) -> bool:
    return _is_text(kind) or _is_list(kind, _is_message)


def _is_ratings(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) and all(_is_number(field.type) for field in kind)


_RATING = "ratings."
_HOLDS: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    **dict.fromkeys(("id", "group"), ("text or whole numbers", _is_key)),
    **dict.fromkeys(("system", "lang", "src_lang", "tgt_lang", "subset"), ("text", _is_text)),
    **dict.fromkeys(
        ("prompt", "chosen", "rejected", "completion", "messages"), ("text or lists of role and content", _is_chat)
    ),
    **dict.fromkeys(("chosen_score", "rejected_score", "margin", "label", "weight"), ("numbers", _is_number)),
    "tools": ("lists", lambda kind: _is_text(kind) or _is_list(kind, lambda item: True)),
    "ratings": ("a struct of numbers", _is_ratings),
    **dict.fromkeys(("correct", "incorrect"), ("lists of text", lambda kind: _is_list(kind, _is_text))),
    "steps": ("lists of text", lambda kind: _is_list(kind, _is_text)),
    "labels": ("lists of numbers", lambda kind: _is_list(kind, _is_number)),
}

"""Translated rows in the files of M-RewardBench, and on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow.compute as pc

from rayrm import files
from rayrm.errors import ServiceError
from rayrm.languages import flores_code
from rayrm.rows import Message
from rayrm.shards import iter_tables, read_table

SIDES = ("prompt", "chosen", "rejected")


def write_translations(
    output: str, dataset: str, split: str, languages: Sequence[str], columns: Sequence[str]
) -> list[str]:
    """Write `{dataset with / → _}_{split}_{FLORES code}_translated.json` for each language of the rows at `output`.

    Each is one JSON array. A row has the translated `columns` as text, `target_language`, then the rest in its order.
    Gives the paths, those of languages without rows included.
    """
    stem = f"{dataset.replace('/', '_')}_{split}"
    paths = {lang: files.join(output, f"{stem}_{flores_code(lang)}_translated.json") for lang in languages}
    with ExitStack() as stack:
        handles = {lang: stack.enter_context(files.atomic_file(path)) for lang, path in paths.items()}
        written = dict.fromkeys(languages, 0)
        for row in _read(output):
            lang = row["lang"]
            _write(handles[lang], ",\n" if written[lang] else "[\n", _export_row(row, columns))
            written[lang] += 1
        for lang, handle in handles.items():
            handle.write(b"\n]" if written[lang] else b"[]")
    return list(paths.values())


def push_translations(output: str, hub_id: str, split: str) -> None:
    """Push the rows at `output` to the private dataset `hub_id`, a config for each language.

    Raises ServiceError when the hub refuses; the rows stay where they are.
    """
    from datasets import Dataset

    table = read_table(output)
    for lang in pc.unique(table["lang"]).to_pylist():
        try:
            rows = Dataset(table.filter(pc.equal(table["lang"], lang)))
            rows.push_to_hub(hub_id, config_name=lang, split=split, private=True)
        except Exception as error:
            # A hub's refusal, a name that no repository has, no connection: each its own error.
            reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
            raise ServiceError(
                f"The rows of '{lang}' at '{output}' could not be pushed to '{hub_id}': {reason}; run again to push."
            ) from error


def name_dataset(path: str) -> str:
    """What a set is called by its path: the name of its last folder or file, without how that ends."""
    return PurePosixPath(path.rstrip("/")).stem


def _read(output: str) -> Iterator[dict[str, Any]]:
    for table in iter_tables(output):
        yield from table.to_pylist()


def _export_row(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    plain = {name: _as_text(value) if name in SIDES else value for name, value in row.items()}
    plain["id"] = row["id"].removeprefix(f"{row['subset']}/")
    first = {**{name: plain[name] for name in columns}, "target_language": flores_code(row["lang"])}
    return {**first, **{name: value for name, value in plain.items() if name not in first}}


def _as_text(messages: Sequence[Message]) -> str:
    return "\n".join(turn["content"] or "" for turn in messages)


def _write(handle: IO[bytes], before: str, row: dict[str, Any]) -> None:
    text = json.dumps(row, indent=4, ensure_ascii=False, default=str)
    # Line feeds of texts are escaped: these are the layout's.
    handle.write((before + "    " + text.replace("\n", "\n    ")).encode())

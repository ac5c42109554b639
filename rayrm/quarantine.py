"""Rows that a run has dropped, kept for people to look into: as JSON lines, in a folder beside the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayrm import files
from rayrm.rows import HIDDEN

QUARANTINE = "quarantine"
"""Folder of an output with the rows that were dropped."""


def write_dropped(path: str, table: pa.Table) -> None:
    """Write the dropped rows of a shard as JSON lines, atomically; a file without any replaces one of an earlier try."""
    gone = table.filter(pc.invert(table["_kept"]))
    reasons = gone["_dropped"].to_pylist()
    rows = gone.drop_columns([name for name in HIDDEN if name in gone.column_names]).to_pylist()
    with files.atomic_file(path) as handle:
        for row, dropped in zip(rows, reasons, strict=True):
            text = json.dumps({**row, "dropped": dropped}, ensure_ascii=False, default=str)
            handle.write(text.encode() + b"\n")


def read_dropped(output: str) -> Iterator[dict[str, Any]]:
    """The rows in the quarantine of `output`, in the order of its shards; `dropped` holds a row's reasons."""
    fs, inner = files.filesystem(files.join(output, QUARANTINE))
    for name in sorted(fs.find(inner)) if fs.isdir(inner) else []:
        if name.endswith(".json"):
            with fs.open(name, "rb") as handle:
                yield from map(json.loads, handle)


def quarantine_path(output: str, index: int, total: int) -> str:
    """Where the dropped rows of shard `index` of `total` are kept: not under a name that is read as rows."""
    return files.join(output, QUARANTINE, f"shard-{index:05d}-of-{total:05d}.json")

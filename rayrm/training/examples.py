"""Prompt rows as token ids with labels, split into rows to train on and rows held out."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rayrm.errors import SchemaError
from rayrm.models.rendering import Rendered, Renderer
from rayrm.shards import read_table
from rayrm.splits import is_held_out

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""Label of a token that bears no loss."""
BATCH_ROWS = 1024


def read_examples(
    path: str, renderer: Renderer, held_out_fraction: float, seed: int
) -> tuple[Dataset, Dataset | None, dict[str, Any]]:
    """Rows to train on, rows held out by group (None when there are none), and how many went where.

    Both have `input_ids` and `labels`; the prompt's labels are -100. Rows without a reference, and those whose
    reference alone is longer than the renderer's bound, are dropped and counted. Raises SchemaError when none stays to
    train on, or none to hold out with a `held_out_fraction` above 0.
    """
    table = read_table(path, ["group", "prompt", "reference"])
    parts: dict[bool, list[pa.Table]] = {False: [], True: []}
    reasons: Counter[str] = Counter()
    for start in range(0, table.num_rows, BATCH_ROWS):
        rows = table.slice(start, BATCH_ROWS).to_pylist()
        kept = [row for row in rows if row["reference"]]
        reasons["no_reference"] += len(rows) - len(kept)
        rendered = render_rows(kept, renderer)
        held = [is_held_out(row["group"], held_out_fraction, seed) for row in kept]
        for side, tables in parts.items():
            tables.append(_to_table([r for r, h in zip(rendered, held, strict=True) if h == side and r.ids]))
        reasons.update(r.status for r in rendered if r.status != "ok")
    return to_datasets(parts, reasons, table.num_rows, held_out_fraction, path)


def to_datasets(
    parts: dict[bool, list[pa.Table]], reasons: Counter[str], num_read: int, held_out_fraction: float, path: str
) -> tuple[Dataset, Dataset | None, dict[str, Any]]:
    """The rows to train on (`parts[False]`), those held out, if any, and the counts; `truncated` rows are no dropped ones.

    Raises SchemaError when no row is left on a side that needs some.
    """
    train, held_out = (pa.concat_tables(tables) for tables in parts.values())
    num_truncated = reasons.pop("truncated", 0)
    counts = {
        "read": num_read,
        "trained": train.num_rows,
        "held_out": held_out.num_rows,
        "truncated": num_truncated,
        "dropped": {reason: num for reason, num in sorted(reasons.items()) if num},
    }
    if not train.num_rows:
        raise SchemaError(f"No row of '{path}' is left to train on: {counts}.")
    if held_out_fraction and not held_out.num_rows:
        raise SchemaError(
            f"held_out_fraction {held_out_fraction:g} holds out no row of '{path}' that can be used ({counts}); "
            "raise it, or set it to 0."
        )
    return _to_dataset(train, "train"), _to_dataset(held_out, "held_out") if held_out.num_rows else None, counts


def render_rows(rows: list[dict[str, Any]], renderer: Renderer) -> list[Rendered]:
    """The token ids of each row's prompt with its reference."""
    if not rows:
        return []
    heads = renderer.encode_all([renderer.prompt_text(row["prompt"]) for row in rows])
    texts = [renderer.completion_text(row["prompt"], row["reference"]) for row in rows]
    tails = renderer.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [renderer.join_ids(head, list(tail)) for head, tail in zip(heads, tails, strict=True)]


def _to_table(rendered: list[Rendered]) -> pa.Table:
    ids = [row.ids for row in rendered]
    labels = [[IGNORED] * row.num_prompt + row.ids[row.num_prompt :] for row in rendered]
    kind = pa.list_(pa.int32())
    return pa.table({"input_ids": pa.array(ids, kind), "labels": pa.array(labels, kind)})


def _to_dataset(table: pa.Table, name: str) -> Dataset:
    from datasets import Dataset
    from datasets.table import InMemoryTable

    # With a fingerprint of our own, datasets does not hash every row for one.
    return Dataset(InMemoryTable(table.combine_chunks()), fingerprint=name)

"""Counts of rows: what a shard read, wrote and dropped by reason, summed over a run and told in a sentence."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayrm import files
from rayrm.errors import EvaluationError

SCORED = ("ok", "truncated")
"""Status words of a score that is there."""
FOOTER = "rayrm"
"""Key of the counts in the footer of a shard's file."""


def count_rows(table: pa.Table, kept: pa.Table) -> dict[str, Any]:
    """Counts of a shard with its hidden columns, and of the rows of it that are kept."""
    return {
        "read": table.num_rows,
        "written": kept.num_rows,
        "dropped": dict(Counter(reason for row in table["_dropped"].to_pylist() for reason in row)),
        "status": _count_status(kept),
    }


def _count_status(table: pa.Table) -> dict[str, dict[str, int]]:
    if "status" not in table.column_names or not pa.types.is_struct(table.schema.field("status").type):
        return {}
    counters: dict[str, Counter[str]] = {field.name: Counter() for field in table.schema.field("status").type}
    for row in table["status"].to_pylist():
        for scorer, words in (row or {}).items():
            counters[scorer].update(words or [])
    return {scorer: dict(counter) for scorer, counter in counters.items()}


def read_counts(paths: Iterable[str]) -> dict[str, Any]:
    """Sum the counts in the footers of shards; `status` counts words by scorer."""
    sums: dict[str, Any] = {"read": 0, "written": 0, "dropped": Counter(), "status": defaultdict(Counter)}
    for path in paths:
        fs, inner = files.filesystem(path)
        with fs.open(inner, "rb") as handle:
            counts = json.loads(pq.read_schema(handle).metadata[FOOTER.encode()])
        sums["read"] += counts["read"]
        sums["written"] += counts["written"]
        sums["dropped"].update(counts["dropped"])
        for scorer, words in counts["status"].items():
            sums["status"][scorer].update(words)
    status = {scorer: dict(sorted(words.items())) for scorer, words in sorted(sums["status"].items())}
    return {**sums, "dropped": dict(sorted(sums["dropped"].items())), "status": status}


def describe_counts(counts: dict[str, Any]) -> str:
    """`100 rows read, 90 written, dropped: 10 few_candidates`."""
    text = f"{counts['read']:,} rows read, {counts['written']:,} written"
    if counts["dropped"]:
        text += ", dropped: " + ", ".join(f"{num:,} {reason}" for reason, num in counts["dropped"].items())
    if counts.get("truncated"):
        text += f", {counts['truncated']:,} of them truncated"
    failed = Counter[str]()
    for words in counts["status"].values():
        failed.update({word: num for word, num in words.items() if word not in SCORED})
    if failed:
        text += ", unscored: " + ", ".join(f"{num:,} {word}" for word, num in sorted(failed.items()))
    return text


def check_failures(counts: dict[str, Any], scorer: str, max_fraction: float, output: str) -> None:
    """Raise EvaluationError when more than `max_fraction` of the scores of `scorer` in `output` failed."""
    words = counts["status"].get(scorer, {})
    total = sum(words.values())
    failed = total - sum(words.get(word, 0) for word in SCORED)
    if failed > max_fraction * total:
        raise EvaluationError(
            f"{failed:,} of {total:,} scores of '{output}' failed ({describe_counts(counts)}); "
            f"max_failed_fraction allows {max_fraction:g}."
        )

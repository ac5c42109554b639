"""How many rows each language pair has: counted, summed up as facts, and drawn as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

LangPair = tuple[str, str]
NONE = "-"
"""Stands for a language that a row does not have."""


def count_languages(tables: Iterable[pa.Table]) -> Counter[LangPair]:
    """Rows by (`src_lang`, `tgt_lang`); without a target a row counts under its `lang`, without a source under `-`."""
    counts: Counter[LangPair] = Counter()
    for table in tables:
        absent = pa.nulls(table.num_rows, pa.string())
        columns = [table[n] if n in table.column_names else absent for n in ("src_lang", "tgt_lang", "lang")]
        pairs = pa.table(columns, ["src_lang", "tgt_lang", "lang"]).group_by(["src_lang", "tgt_lang", "lang"])
        for row in pairs.aggregate([([], "count_all")]).to_pylist():
            counts[row["src_lang"] or NONE, row["tgt_lang"] or row["lang"] or NONE] += row["count_all"]
    return counts


def summarise_languages(counts: Counter[LangPair], wanted: Iterable[LangPair] = ()) -> dict[str, Any]:
    """Facts about language pairs: `total`, `counts` and `shares` (0 to 1) by source and target, English first.

    `empty` names those of `wanted` that have no row.
    """
    total = counts.total()
    pairs = sorted((pair for pair, num in counts.items() if num), key=lambda p: (_order(p[0]), _order(p[1])))
    nested: dict[str, dict[str, int]] = {}
    for source, target in pairs:
        nested.setdefault(source, {})[target] = counts[source, target]
    return {
        "total": total,
        "counts": nested,
        "shares": {s: {t: round(num / total, 6) for t, num in row.items()} for s, row in nested.items()},
        "empty": [f"{s}-{t}" for s, t in sorted(set(wanted)) if not counts[s, t]],
    }


def draw_languages(facts: dict[str, Any]) -> str:
    """The facts of `summarise_languages` as a table of counts and one of per cent, a row for each source language."""
    counts, total = facts["counts"], facts["total"]
    sources = list(counts)
    targets = sorted({target for row in counts.values() for target in row}, key=_order)
    lines = [f"Rows by language, {total:,} in all (rows: source, columns: target)"]
    for unit in ("{:,.0f}", "{:.2f} %"):
        scale = 1.0 if unit.startswith("{:,") else 100 / max(total, 1)
        grid = [["", *targets, "total"]]
        for source in sources:
            numbers = [counts[source].get(target, 0) for target in targets]
            grid.append([source, *(unit.format(n * scale) for n in [*numbers, sum(numbers)])])
        sums = [sum(counts[source].get(target, 0) for source in sources) for target in targets]
        grid.append(["total", *(unit.format(n * scale) for n in [*sums, total])])
        widths = [max(len(row[column]) for row in grid) for column in range(len(grid[0]))]
        lines += ["", *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in grid)]
    if facts["empty"]:
        lines += ["", "Without a row: " + ", ".join(facts["empty"])]
    return "\n".join(lines)


def _order(lang: str) -> tuple[bool, str]:
    return lang != "en", lang

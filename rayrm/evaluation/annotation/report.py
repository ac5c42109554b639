"""The page of what people made of preferences: how often they agree with the right side, and with models."""

from __future__ import annotations

from collections.abc import Sequence

from rayrm.evaluation.annotation.annotations import Annotated, Verdicts
from rayrm.evaluation.report import Report, Section, Table, Text, Tile

NONE = "–"


def annotation_table(found: Sequence[Annotated]) -> Table:
    """A line for each language: answers, and agreement with the right side and with each model."""
    models = list(dict.fromkeys(model for item in found for model in item.models))
    header = ["language", "rows", "answers", "missing", "unreadable", "right side", "κ", "decided rows", *models]
    rows = [
        [
            item.lang,
            *(f"{num:,}" for num in (item.num_rows, item.num_answers, item.num_missing, item.num_unreadable)),
            _share(item.gold),
            NONE if item.gold.kappa is None else f"{item.gold.kappa:.2f}",
            _share(item.decided),
            *(_share(item.models[model]) if model in item.models else NONE for model in models),
        ]
        for item in found
    ]
    return Table(header, rows)


def build_annotation_report(found: Sequence[Annotated], lead: str, facts: dict[str, str]) -> Report:
    """The page: the counts over all languages, then a line for each."""
    num_answers = sum(item.num_answers for item in found)
    num_compared = sum(item.gold.num_rows for item in found)
    num_same = sum(round((item.gold.share or 0) * item.gold.num_rows) for item in found)
    share = f"{num_same / num_compared:.1%}" if num_compared else NONE
    tiles = [
        Tile("Agreement with the right side", share, f"{num_same:,} of {num_compared:,} answers"),
        Tile("Answers", f"{num_answers:,}", f"of {sum(item.num_rows for item in found):,} rows"),
        Tile("Missing", f"{sum(item.num_missing for item in found):,}", "neither right nor wrong"),
        Tile("Unreadable", f"{sum(item.num_unreadable for item in found):,}", "name neither A nor B"),
    ]
    about = (
        "Shares are of the rows where both sides of a comparison name an answer. Decided rows are those that count "
        "anything but half a point for the model by whose results they were chosen. A model names an answer where its "
        "row counts 1 or 0."
    )
    return Report(
        "What people prefer", lead, tiles, facts, [Section("Agreement", [Text(about), annotation_table(found)])]
    )


def _share(verdicts: Verdicts) -> str:
    return NONE if verdicts.share is None else f"{verdicts.share:.1%} ({verdicts.num_rows:,})"

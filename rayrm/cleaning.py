"""Clean candidates: cut, strip, and leave out what is empty, double, copied or in the wrong script."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from rayrm.config import Config
from rayrm.errors import SchemaError
from rayrm.languages import script_fraction, unicode_scripts
from rayrm.rows import Candidates, map_table

if TYPE_CHECKING:
    from ray.data import Dataset

_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_JOINTS = {"join": "; ", "space": " "}


class CleaningConfig(Config):
    """What is done to a candidate, and which candidates go out. Empty and repeated ones always do."""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A candidate ends before the first of these strings in it."""
    newlines: Literal["keep", "join", "space", "cut"] = "keep"
    """Line breaks, a run of them as one: kept, turned into `; `, turned into a space, or the text ends there."""
    drop_source_copies: bool = False
    """Leave out candidates that are their source but for case and white space."""
    min_script_fraction: float | None = Field(None, gt=0, le=1)
    """Smallest share of a candidate's letters in the script of its language; left out, scripts are not looked at."""


READS = ("source", "lang", "candidates")


def clean_candidates(candidates: Dataset, config: CleaningConfig) -> Dataset:
    """Clean every candidate; a row keeps its candidates in their order, and one without any is dropped.

    Reads source, lang, candidates; replaces candidates and removes num_unfinished, which counted the old ones. Counted
    are candidates that are `empty`, `duplicate`, `source_copy` or `wrong_script`, and rows with `no_candidates`. A row
    without a source, or in a language that is not in the table, passes the filter that would look at it.
    """
    return candidates.map_batches(clean_table, fn_kwargs={"config": config}, batch_format="pyarrow", batch_size=None)


def clean_table(table: pa.Table, config: CleaningConfig) -> pa.Table:
    """`clean_candidates` for one table."""
    if "num_unfinished" in table.column_names:
        table = table.drop_columns("num_unfinished")
    return map_table(table, clean_row, config, reads=READS, writes=Candidates)


def check_unscored(schema: pa.Schema, where: str) -> None:
    """Raise SchemaError when rows carry scores: what stands beside candidates would no longer fit them."""
    beside = [name for name in ("scores", "status", "spans", "rewards") if name in schema.names]
    if beside:
        raise SchemaError(
            f"{where} carries {', '.join(beside)} beside its candidates, and cleaning would part the two; "
            "clean before scoring."
        )


def check_filters(tables: Iterable[pa.Table], config: CleaningConfig, where: str) -> None:
    """Raise SchemaError when a filter would find nothing to look at in the columns `lang` and `source` of all rows."""
    if not config.drop_source_copies and config.min_script_fraction is None:
        return
    known: set[str | None] = set()
    has_rows = has_source = False
    for rows in tables:
        has_rows = has_rows or rows.num_rows > 0
        known.update(pc.unique(rows["lang"]).to_pylist())
        has_source = has_source or ("source" in rows.column_names and pc.any(rows["source"].is_valid()).as_py())
    if not has_rows:
        return
    if config.drop_source_copies and not has_source:
        raise SchemaError(f"{where} has no sources to compare with; set cleaning.drop_source_copies=false.")
    languages = sorted(filter(None, known))
    if config.min_script_fraction is not None and not any(map(unicode_scripts, languages)):
        raise SchemaError(
            f"{where} is in {', '.join(languages)}, whose scripts are not known; unset cleaning.min_script_fraction."
        )


def clean_row(row: dict[str, Any], config: CleaningConfig) -> tuple[dict[str, Any] | None, list[str]]:
    """The cleaned candidates of a row, or None if none is left; and the reasons of all that went out."""
    scripts = unicode_scripts(row["lang"]) if config.min_script_fraction is not None else None
    source = _fold(row["source"] or "") if config.drop_source_copies else ""
    reasons = []
    kept: dict[str, None] = {}
    for candidate in row["candidates"] or []:
        text = clean_text(candidate or "", config)
        if not text:
            reasons.append("empty")
        elif text in kept:
            reasons.append("duplicate")
        elif source and _fold(text) == source:
            reasons.append("source_copy")
        elif scripts and script_fraction(text, scripts) < (config.min_script_fraction or 0):
            reasons.append("wrong_script")
        else:
            kept[text] = None
    return ({"candidates": list(kept)}, reasons) if kept else (None, [*reasons, "no_candidates"])


def clean_text(text: str, config: CleaningConfig) -> str:
    """A candidate cut at the first stop string, without white space around it, its line breaks as configured."""
    ends = [text.find(stop) for stop in config.stop]
    text = text[: min((end for end in ends if end >= 0), default=len(text))].strip()
    if config.newlines == "cut":
        return _LINE_BREAKS.split(text, maxsplit=1)[0]
    return text if config.newlines == "keep" else _LINE_BREAKS.sub(_JOINTS[config.newlines], text)


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()

"""Translate preferences into any number of languages, the model loaded once an actor: Preference → Preference rows.

Prints how many rows each language has and why others were dropped, and stores it as `languages` in `run.json`. Dropped
rows are kept in `quarantine/` with their translations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import pyarrow.compute as pc
from pydantic import Field, model_validator

from rayrm.config import NOT_IDENTITY, parse_args, run_job
from rayrm.errors import EvaluationError
from rayrm.evaluation.report import Table, format_table
from rayrm.languages import short_code
from rayrm.quarantine import read_dropped
from rayrm.rows import Preference
from rayrm.runs import RowsJob, transform_rows
from rayrm.shards import iter_tables
from rayrm.translation import FAULTS, TranslationConfig, check_translation, translate_preferences
from rayrm.translation.exports import name_dataset, push_translations, write_translations

Counts = dict[str, dict[str, Any]]


class TranslatePreferences(RowsJob):
    """Preference rows → Preference rows in each language."""

    keeps_dropped: ClassVar[bool] = True
    shard_rows: int = Field(256, ge=1)
    """Rows that are committed together; what is done is never done again."""
    translation: TranslationConfig
    """The model, the languages, and what makes a translation unfit."""
    max_failed_fraction: float = Field(0.1, ge=0, le=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most translations that may have faults; a run with more fails at its end and keeps what it wrote."""
    json_output: bool = Field(False, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Whether each language is also written as one JSON file, named and laid out as M-RewardBench's."""
    dataset: str | None = Field(None, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """What the set is called in the names of these files; null for the name of the input."""
    split: str = Field("test", pattern=r"^\w+$", json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """What the split is called in the names of these files and on the hub, for rows have none."""
    hub_id: str | None = Field(None, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Private dataset on the hub that the rows are pushed to, a config for each language; null to push nothing."""

    @model_validator(mode="after")
    def _check_dataset(self) -> TranslatePreferences:
        if self.dataset is not None and not self.json_output:
            raise ValueError("dataset names the files of json_output; set that too")
        return self

    def rows_per_row(self) -> int:
        """One row in each language."""
        return len(self.translation.languages)


def main(argv: Sequence[str] | None = None) -> None:
    """Translate the rows of `argv`. Raises EvaluationError when too many translations have faults."""
    config = parse_args(TranslatePreferences, argv)
    check_translation(config.translation)
    languages = [short_code(code) for code in config.translation.languages]
    stage = partial(translate_preferences, config=config.translation)

    def summarise(output: str) -> dict[str, Any]:
        counts = count_languages(output, languages)
        check_faults(counts, config.max_failed_fraction, output)
        return {"languages": counts}

    done = transform_rows(config, Preference, Preference, stage, summarise=summarise)
    if config.json_output:
        dataset = config.dataset or name_dataset(config.input)
        write_translations(config.output, dataset, config.split, languages, config.translation.columns)
    if config.hub_id is not None:
        push_translations(config.output, config.hub_id, config.split)
    print(format_table(tabulate(done["languages"])))


def count_languages(output: str, languages: Sequence[str]) -> Counts:
    """For each language: rows written, texts translated twice, rows dropped by reason, and rows with any fault."""
    counts: Counts = {lang: {"written": 0, "retried": 0, "dropped": Counter(), "faulty": 0} for lang in languages}
    for table in iter_tables(output, ["lang", "num_retried"]):
        for lang, part in counts.items():
            rows = table.filter(pc.equal(table["lang"], lang))
            part["written"] += rows.num_rows
            part["retried"] += pc.sum(rows["num_retried"]).as_py() or 0
    for row in read_dropped(output):
        part = counts[row["lang"]]
        part["retried"] += row["num_retried"] or 0
        part["dropped"].update(row["dropped"])
        part["faulty"] += any(reason in FAULTS for reason in row["dropped"])
    return {lang: {**part, "dropped": dict(sorted(part["dropped"].items()))} for lang, part in counts.items()}


def check_faults(counts: Counts, max_fraction: float, output: str) -> None:
    """Raise EvaluationError when more than `max_fraction` of the translations have faults."""
    faulty = sum(part["faulty"] for part in counts.values())
    total = faulty + sum(part["written"] for part in counts.values())
    if faulty > max_fraction * total:
        raise EvaluationError(
            f"{faulty:,} of {total:,} translations of '{output}' have faults; look into its quarantine. "
            f"max_failed_fraction allows {max_fraction:g}."
        )


def tabulate(languages: Counts) -> Table:
    """A row for each language: rows written, texts translated twice, and rows dropped for each reason that occurred."""
    reasons = sorted({reason for part in languages.values() for reason in part["dropped"]})
    rows = [
        [
            lang,
            *(f"{part[name]:,}" for name in ("written", "retried")),
            *(f"{part['dropped'].get(r, 0):,}" for r in reasons),
        ]
        for lang, part in languages.items()
    ]
    return Table(["language", "written", "retried", *reasons], rows)


if __name__ == "__main__":
    run_job(main)

"""Write preferences for people to judge: `{lang}-annotation.csv` to fill in, and `{lang}-answer_key.csv` to keep.

Rows are chosen by what they count for a model, equally many of each kind, and their sides are swapped or not by the
row's id. `read_annotations` takes the files back.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rayrm import files
from rayrm.config import NOT_IDENTITY, Config, parse_args, run_job
from rayrm.errors import ConfigError
from rayrm.evaluation.annotation.annotations import (
    ANNOTATION,
    ANSWER_KEY,
    KEY_COLUMNS,
    TASK_COLUMNS,
    SamplingConfig,
    Task,
    make_task,
    sample_by_credit,
)
from rayrm.evaluation.results import read_results
from rayrm.evaluation.sheets import write_sheet
from rayrm.rows import Preference
from rayrm.runs import INPUT, finish_run, start_run
from rayrm.shards import iter_tables

log = logging.getLogger("rayrm")


class WriteAnnotations(Config):
    """Preferences, and the results by which some of them are chosen."""

    preferences: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Preference rows that hold the texts, in any number of languages."""
    results: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Output folder of evaluate_reward_model or judge_preferences on those rows."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for the files."""
    model: str | None = None
    """The model by whose credits rows are chosen; left out, the only one in the results."""
    set: str | None = None
    """The set of the rows; left out, the only one in the results."""
    sampling: SamplingConfig = SamplingConfig()
    """How rows are chosen."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises ConfigError, SchemaError or EvaluationError when there are no rows to choose from."""
    config = parse_args(WriteAnnotations, argv)
    tasks = choose_tasks(config)
    if not start_run(config):
        return
    for lang, rows in tasks.items():
        write_tasks(config.output, lang, rows)
        log.info("%s: %s rows to judge", lang, f"{len(rows):,}")
    finish_run(config, {"counts": {lang: len(rows) for lang, rows in tasks.items()}})


def choose_tasks(config: WriteAnnotations) -> dict[str, list[Task]]:
    """Language to the rows that people are to judge."""
    Preference.check_files(config.preferences)
    results = choose_results(config)
    texts = read_texts(config.preferences, results)
    known: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for (lang, name), row in results.items():
        if (lang, name) in texts:
            known[lang][name] = row["credit"]
    wanted = config.sampling.languages or sorted(known)
    if not wanted:
        raise ConfigError(f"No row of '{config.preferences}' has a result in '{config.results}'; ids must match.")
    seed = config.sampling.seed
    return {
        lang: [
            make_task(texts[lang, name], results[lang, name], seed)
            for name in sample_by_credit(known[lang], config.sampling, lang)
        ]
        for lang in wanted
    }


def choose_results(config: WriteAnnotations) -> dict[tuple[str, str], dict[str, Any]]:
    """The results of the model on the set that have a credit, for rows with two answers, by language and id."""
    rows = read_results(config.results).to_pylist()
    for field, column in (("model", "model"), ("set", "set")):
        there = sorted({row[column] for row in rows})
        wanted = getattr(config, field) or (there[0] if len(there) == 1 else None)
        if wanted not in there:
            found = f"is '{wanted}'" if wanted else "is not given"
            raise ConfigError(f"'{field}' {found}, and the results hold {', '.join(there) or 'no row'}; name one.")
        rows = [row for row in rows if row[column] == wanted]
    return {(r["lang"], r["id"]): r for r in rows if r["credit"] is not None and len(r["lengths"]) == 2}


def read_texts(path: str, results: dict[tuple[str, str], Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The Preference rows at `path` that have a result, by language and id."""
    columns = ["id", "lang", "prompt", "chosen", "rejected"]
    found = {}
    for table in iter_tables(path, columns):
        for row in table.to_pylist():
            if (row["lang"], row["id"]) in results:
                found[row["lang"], row["id"]] = row
    return found


def write_tasks(output: str, lang: str, tasks: Sequence[Task]) -> None:
    """Write the two files of a language."""
    seen = [[task.id, task.prompt, task.completion_a, task.completion_b, ""] for task in tasks]
    write_sheet(files.join(output, f"{lang}-{ANNOTATION}.csv"), TASK_COLUMNS, seen)
    key = [[task.id, task.set, task.subset, task.chosen, task.credit] for task in tasks]
    write_sheet(files.join(output, f"{lang}-{ANSWER_KEY}.csv"), KEY_COLUMNS, key)


if __name__ == "__main__":
    run_job(main)

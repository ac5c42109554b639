"""Take back the files that people filled in: how often they agree with the right side, and with models and judges.

Writes metrics.json, report.html, and for each language the rows where people disagree. A row without an answer counts
as neither right nor wrong.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from rayrm import files
from rayrm.config import NOT_IDENTITY, Config, parse_args, run_job
from rayrm.errors import ConfigError
from rayrm.evaluation.annotation.annotations import (
    ANNOTATION,
    ANSWER_KEY,
    TASK_COLUMNS,
    Annotated,
    Answer,
    Side,
    compare_answers,
    disagreements,
    model_sides,
    read_answers,
)
from rayrm.evaluation.annotation.report import annotation_table, build_annotation_report
from rayrm.evaluation.exports import path_of
from rayrm.evaluation.facts import list_facts
from rayrm.evaluation.report import format_table, write_report
from rayrm.evaluation.results import read_results
from rayrm.evaluation.sheets import read_sheet, write_sheet
from rayrm.runs import INPUT, finish_run, start_run

log = logging.getLogger("rayrm")
Credits = dict[str, dict[str, float | None]]
"""Model to id to what the row counts."""


class ReadAnnotations(Config):
    """Files that people filled in, and what they are compared with."""

    answer_key: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Output folder of write_annotations."""
    annotations: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder with `{lang}-annotation.csv` filled in: `A` or `B` under `preferred`."""
    results: list[str] = Field([], json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Output folders of evaluate_reward_model and judge_preferences, whose models people are compared with."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for the page, the metrics and the disagreements."""

    def further_inputs(self) -> dict[str, str]:
        """The files that people filled in: their folder may be the one that they were written to."""
        return {f"annotations.{lang}": sheet_path(self.annotations, lang, ANNOTATION) for lang in self.languages()}

    def languages(self) -> list[str]:
        """The languages of the key whose file is there."""
        fs, inner = files.filesystem(self.answer_key)
        names = [name.rpartition("/")[2] for name in (fs.find(inner, maxdepth=1) if fs.isdir(inner) else ())]
        end = f"-{ANSWER_KEY}.csv"
        keys = sorted(name.removesuffix(end) for name in names if name.endswith(end))
        return [lang for lang in keys if files.exists(sheet_path(self.annotations, lang, ANNOTATION))]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises ConfigError or SchemaError when files are missing or are not those that were written."""
    config = parse_args(ReadAnnotations, argv)
    if not config.languages():
        raise ConfigError(
            f"'{config.annotations}' holds no file '{{lang}}-{ANNOTATION}.csv' of a language that '{config.answer_key}' "
            "has an answer key of."
        )
    keys = {lang: read_sheet(sheet_path(config.answer_key, lang, ANSWER_KEY)) for lang in config.languages()}
    sheets = {lang: read_sheet(sheet_path(config.annotations, lang, ANNOTATION)) for lang in keys}
    answers = {
        lang: read_answers(rows, keys[lang], f"'{sheet_path(config.annotations, lang, ANNOTATION)}'")
        for lang, rows in sheets.items()
    }
    if not start_run(config):
        return
    credits = read_credits(config.results, keys)
    found = [compare_answers(lang, own, credits[lang]) for lang, own in answers.items()]
    for lang, own in answers.items():
        write_disagreements(config.output, lang, sheets[lang], own, credits[lang])
    metrics = {item.lang: to_json(item) for item in found}
    files.write_json(files.join(config.output, "metrics.json"), metrics)
    lead = f"Answers in {len(found)} {'language' if len(found) == 1 else 'languages'} from {config.annotations}."
    facts = list_facts(config)
    write_report(files.join(config.output, "report.html"), build_annotation_report(found, lead, facts))
    finish_run(config, {"metrics": metrics})
    print(f"\n{format_table(annotation_table(found))}", flush=True)


def sheet_path(folder: str, lang: str, kind: str) -> str:
    """Where a language's file stands."""
    return files.join(folder, f"{lang}-{kind}.csv")


def read_credits(folders: Sequence[str], keys: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, Credits]:
    """Language to what the rows of its key count for each model of the results."""
    wanted = {(lang, row["set"], row["id"]) for lang, key in keys.items() for row in key}
    found: dict[str, Credits] = {lang: defaultdict(dict) for lang in keys}
    for folder in folders:
        for row in read_results(folder).to_pylist():
            if (row["lang"], row["set"], row["id"]) in wanted:
                found[row["lang"]][row["model"]][row["id"]] = row["credit"]
    return found


def write_disagreements(
    output: str, lang: str, rows: Sequence[Mapping[str, str]], answers: Sequence[Answer], credits: Credits
) -> None:
    """Write the rows where people disagree with the right side, and with each model, as files of their own."""
    texts = {row["id"]: row for row in rows}
    others: dict[str, list[Side | None]] = {"gold": [answer.chosen for answer in answers]}
    others.update({path_of(model).replace("/", "___"): model_sides(answers, own) for model, own in credits.items()})
    for name, sides in others.items():
        found = [
            [*(texts[answer.id].get(column, "") for column in TASK_COLUMNS[:-1]), answer.preferred, side]
            for answer, side in zip(answers, sides, strict=True)
            if disagreements([answer], [side])
        ]
        path = files.join(output, f"{lang}-disagreements-{name}.csv")
        write_sheet(path, [*TASK_COLUMNS, "other"], found)


def to_json(item: Annotated) -> dict[str, Any]:
    """What was found in a language, ready for JSON."""
    values = item._asdict()
    models = {model: own._asdict() for model, own in item.models.items()}
    return {**values, "gold": item.gold._asdict(), "decided": item.decided._asdict(), "models": models}


if __name__ == "__main__":
    run_job(main)

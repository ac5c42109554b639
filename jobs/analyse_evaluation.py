"""Compare models and judges over languages; writes tables, figures, metrics.json and report.html.

Reads the results that evaluate_reward_model and judge_preferences wrote. Each set has a folder of CSV files, and its
figures stand in `<output>/figures` as PNG and SVG.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rayrm import files
from rayrm.config import NOT_IDENTITY, parse_args, run_job
from rayrm.errors import ConfigError
from rayrm.evaluation.analysis.analyse import AnalysisConfig, SetAnalysis, analyse_set, check_analysis, list_metrics
from rayrm.evaluation.analysis.drawings import Drawn, draw_analysis
from rayrm.evaluation.analysis.grid import EvaluatedSet, gather_sets
from rayrm.evaluation.analysis.report import build_report, leaderboard_table
from rayrm.evaluation.analysis.sheets import write_sheets
from rayrm.evaluation.drawing import save_figure
from rayrm.evaluation.facts import list_facts
from rayrm.evaluation.report import format_table, write_report
from rayrm.evaluation.results import read_results
from rayrm.runs import INPUT, finish_run, start_run

METRICS, REPORT = "metrics.json", "report.html"


class AnalyseEvaluation(AnalysisConfig):
    """Evaluations that are compared with one another."""

    inputs: list[str] = Field(min_length=1, json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Output folders of evaluate_reward_model and judge_preferences; a row may stand in one of them only."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for the page, the tables and the figures."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises ConfigError, SchemaError or EvaluationError when the inputs cannot be compared."""
    config = parse_args(AnalyseEvaluation, argv)
    sets = read_sets(config)
    check_analysis(sets, config)
    report = files.join(config.output, REPORT)
    if start_run(config):
        analyses = [analyse_set(evaluated, config) for evaluated in sets]
        metrics = {analysis.evaluated.name: list_metrics(analysis, config) for analysis in analyses}
        drawings = [write_set(config, analysis) for analysis in analyses]
        files.write_json(files.join(config.output, METRICS), metrics)
        page = build_report(analyses, drawings, describe(sets), list_facts(config), config)
        write_report(report, page)
        finish_run(config, {"metrics": metrics})
        for analysis in analyses:
            table = format_table(leaderboard_table(analysis, config.bootstrap.confidence))
            print(f"\n{analysis.evaluated.name}\n{table}")
    print(f"\nThe page with figures and tables: {report}", flush=True)


def read_sets(config: AnalyseEvaluation) -> list[EvaluatedSet]:
    """The sets of all inputs. Raises SchemaError when a folder holds no results."""
    rows: list[dict[str, Any]] = []
    for path in config.inputs:
        rows += read_results(path).to_pylist()
    sets = gather_sets(rows, config.sets)
    names = [folder_name(part.name) for part in sets]
    twice = [part.name for part, name in zip(sets, names, strict=True) if names.count(name) > 1]
    if twice:
        raise ConfigError(f"The sets {' and '.join(twice)} would share the folder '{folder_name(twice[0])}'; name one.")
    return sets


def folder_name(name: str) -> str:
    """A set's name as that of a folder."""
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "set"


def write_set(config: AnalyseEvaluation, analysis: SetAnalysis) -> dict[str, Drawn]:
    """Write the tables and figures of a set; give the figures."""
    name = folder_name(analysis.evaluated.name)
    write_sheets(files.join(config.output, name), analysis)
    drawn = draw_analysis(analysis, config.num_top)
    for part, figure in drawn.items():
        save_figure(figure.figure, files.join(config.output, "figures", f"{name}-{part}"))
    return drawn


def describe(sets: Sequence[EvaluatedSet]) -> str:
    """One sentence: how many models, on what, in how many languages."""
    models = {model for part in sets for model in part.grid.models}
    languages = {code for part in sets for code in part.grid.languages}
    counts = f"{len(models)} {'model' if len(models) == 1 else 'models'}"
    places = f"{len(languages)} {'language' if len(languages) == 1 else 'languages'}"
    return f"{counts} on {', '.join(part.name for part in sets)} in {places}."


if __name__ == "__main__":
    run_job(main)

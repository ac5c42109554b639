"""Measure reward models on preference sets and benchmarks; writes metrics.json, report.html and the benchmarks' own files.

Any number of models and sets, in any languages; each model is loaded once. Beside the accuracy stands that of a judge
that looks at length alone, and their paired difference, all with bootstrap intervals. The rewards of all rows stay in
`<output>/rows/<model>`; a run that was killed goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from rayrm import files
from rayrm.config import NOT_IDENTITY, parse_args, run_job
from rayrm.counts import describe_counts
from rayrm.evaluation.benchmarks import BENCHMARKS
from rayrm.evaluation.exporting import export_model, list_titles
from rayrm.evaluation.facts import list_facts
from rayrm.evaluation.models import (
    EvaluatedModel,
    Evaluation,
    check_held_out,
    check_rows,
    check_subsets,
    evaluate_model,
    read_model,
)
from rayrm.evaluation.overview import Overview, rewards_table
from rayrm.evaluation.preference_report import RewardedSet, build_report, measure_set, summary_table
from rayrm.evaluation.preferences import BootstrapConfig, flatten
from rayrm.evaluation.report import Section, Table, format_table, write_report
from rayrm.evaluation.results import write_results
from rayrm.evaluation.sets import EvaluatedOn, Prepared, claim_sets, prepare_sets
from rayrm.models.folders import read_mark
from rayrm.runs import finish_run, start_run
from rayrm.scoring import PreferenceScoring, check_preference_scoring
from rayrm.scoring.custom import CustomClass, CustomScoring
from rayrm.scoring.reward_model import RewardModelScoring

METRICS, REPORT = "metrics.json", "report.html"


class EvaluateRewardModel(EvaluatedOn):
    """Reward models and what they are measured on."""

    reward_models: list[PreferenceScoring] = Field(min_length=1)
    """The models, each with a `name` of its own."""
    split: Literal["all", "held_out"] = "all"
    """Rows that count: all, or those whose group each reward model's own training held out."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    """How intervals are drawn."""
    num_examples: int = Field(4, ge=0)
    """Worst misses and most confident hits that the page shows of the first model and set, so many of each."""
    max_failed_fraction: float = Field(0.05, ge=0, le=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most rewards of a model that may be null; a run with more fails at its end and keeps what it wrote."""

    @model_validator(mode="after")
    def _check_names(self) -> EvaluateRewardModel:
        names = [model.name for model in self.reward_models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several reward models are called '{twice[0]}'; give each a name of its own")
        return self

    def needed_columns(self) -> list[str]:
        """What scorers of others need."""
        custom = [model for model in self.reward_models if isinstance(model, CustomScoring)]
        return sorted({name for model in custom for name in CustomClass(model.scorer).needs})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises EvaluationError when too many rewards failed or a set has no row to measure."""
    config = parse_args(EvaluateRewardModel, argv)
    # What was finished needs neither the models nor a service again.
    if not files.exists(files.join(config.output, files.RUN_MARK)):
        for scoring in config.reward_models:
            check_preference_scoring(scoring)
    how = Evaluation(
        files.join(config.output, "rows"),
        config.split,
        config.shard_rows,
        config.max_failed_fraction,
        config.benchmark,
    )
    report = files.join(config.output, REPORT)
    if start_run(config):
        prepared = claim_sets(config, lambda found: check(config, found))
        models = [evaluate_model(model, prepared, how) for model in config.reward_models]
        overview, rewarded = measure(config, models)
        metrics = list_metrics(models, overview, rewarded)
        files.write_json(files.join(config.output, METRICS), metrics)
        write_results(config.output, (row for model in models for row in model.results))
        for model, title in zip(models, list_titles(config.reward_models), strict=True):
            export_model(model, title, config.benchmark, files.join(config.output, "exports"))
        sections = list_sections(models, overview)
        pairs = [part for parts in rewarded.values() for part in parts.values()]
        rows = {f"rows of {title}": describe_counts(counts) for title, counts in config.count_rows().items()}
        lead, facts = describe_evaluation(config, prepared), {**rows, **list_facts(config)}
        write_report(report, build_report(pairs, lead, facts, config.bootstrap, config.num_examples, sections))
        finish_run(config, {"metrics": metrics, "verified": list_verified(config)})
    else:
        prepared = prepare_sets(config.prepared)
        models = [read_model(model, prepared, how) for model in config.reward_models]
        overview, rewarded = measure(config, models)
    for parts in rewarded.values():
        for part in parts.values():
            print(f"\n{part.name}\n{format_table(summary_table(part.slices, config.bootstrap.confidence))}")
    for section in list_sections(models, overview):
        tables = [block for block in section.blocks if isinstance(block, Table)]
        print(f"\n{section.title}", *map(format_table, tables), sep="\n")
    print(f"\nThe page with figures and examples: {report}", flush=True)


def check(config: EvaluateRewardModel, prepared: list[Prepared]) -> list[Prepared]:
    """The rows of all sets, if each model can reward some of them."""
    if config.benchmark is not None:
        check_subsets(BENCHMARKS[config.benchmark], prepared)
    if config.split == "held_out":
        check_held_out(config.reward_models, prepared)
    else:
        check_rows(config.reward_models, prepared)
    return prepared


def measure(
    config: EvaluateRewardModel, models: Sequence[EvaluatedModel]
) -> tuple[Overview, dict[str, dict[str, RewardedSet]]]:
    """The scores of all models, and what else their preferences tell, by model and set."""
    found: dict[str, dict[str, RewardedSet]] = {}
    for model in models:
        parts = found.setdefault(model.config.name, {})
        for name in model.sets("preference"):
            title = f"{model.config.name} on {name}" if len(models) > 1 else name
            parts[name] = measure_set(title, model.select("preference", name), config.bootstrap)
    return Overview([row for model in models for row in model.results]), found


def list_metrics(
    models: Sequence[EvaluatedModel], overview: Overview, rewarded: dict[str, dict[str, RewardedSet]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Every metric by model and set."""
    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    for model in models:
        name = model.config.name
        metrics[name] = {each: overview.metrics(name, each) for each in overview.sets}
        for each, part in rewarded[name].items():
            metrics[name][each] |= flatten(part.slices)
    return metrics


def list_sections(models: Sequence[EvaluatedModel], overview: Overview) -> list[Section]:
    """What stands first on the page: the models beside one another, and the rewards of conversations."""
    sections = []
    if len(overview.models) > 1 or any(score.benchmark for score in overview.scores.values()):
        sections.append(overview.section())
    conversations = {m.config.name: m.tables["conversation"] for m in models if "conversation" in m.tables}
    if conversations:
        sections.append(Section("Rewards of conversations", [rewards_table(conversations)]))
    return sections


def list_verified(config: EvaluateRewardModel) -> dict[str, bool]:
    """Whether each model's checkpoint says how it was rendered in training."""
    models = [model for model in config.reward_models if isinstance(model, RewardModelScoring)]
    return {model.name: "rendering" in read_mark(model.model) for model in models}


def describe_evaluation(config: EvaluateRewardModel, prepared: Sequence[Prepared]) -> str:
    """One sentence: which models, how many rows, of what."""
    names = ", ".join(getattr(model, "model", None) or model.name for model in config.reward_models)
    rows = " and ".join(f"{part.num_rows:,} {part.rows} rows" for part in prepared)
    held_out = ", of which those count whose groups it was never trained on" if config.split == "held_out" else ""
    inputs = ", ".join(dict.fromkeys(part.input for part in config.all_sets))
    return f"{names} on {rows} of {inputs}{held_out}."


if __name__ == "__main__":
    run_job(main)

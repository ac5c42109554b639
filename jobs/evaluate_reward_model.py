"""Measure how often a reward model agrees with preferences; writes metrics.json and report.html.

Beside the accuracy stands that of a judge that looks at length alone, and their paired difference, all with bootstrap
intervals. The rewards of all rows stay in `<output>/rows/<set>`; a run that was killed goes on from there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import Field, field_validator

from rayrm import files
from rayrm.config import Config, parse_args, run_job
from rayrm.errors import EvaluationError
from rayrm.evaluation.preference_report import RewardedSet, build_report, measure_set, summary_table
from rayrm.evaluation.preferences import BootstrapConfig, RewardedPreference, flatten
from rayrm.evaluation.report import format_table, write_report
from rayrm.evaluation.rewarding import RewardingJob, find_split, reward_preferences
from rayrm.models.folders import read_mark
from rayrm.rows import Preference
from rayrm.runs import INPUT, finish_run, start_run, transform_rows, versions
from rayrm.scoring.reward_model import check_reward_model
from rayrm.shards import iter_tables, read_table
from rayrm.splits import is_held_out

MAIN = "preferences"
METRICS, REPORT = "metrics.json", "report.html"


class EvaluateRewardModel(RewardingJob):
    """A reward model and the preferences that it is measured on."""

    agreement: dict[str, str] = Field({}, json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Further Preference rows by name, such as pairs labelled by something else than the scorer; each has a section."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    """How intervals are drawn."""
    num_examples: int = Field(4, ge=0)
    """Worst misses and most confident hits that the page shows of the first set, so many of each."""

    @field_validator("agreement")
    @classmethod
    def _check_names(cls, sets: dict[str, str]) -> dict[str, str]:
        for name in sets:
            if name == MAIN or not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"'{name}' names a folder below rows/: use letters, digits, _ and -, and not '{MAIN}'")
        return sets


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises EvaluationError when too many rewards failed or a set has no row to measure."""
    config = parse_args(EvaluateRewardModel, argv)
    sets = {MAIN: config.input, **config.agreement}
    check(config, sets)
    report = files.join(config.output, REPORT)
    is_verified = "rendering" in read_mark(config.reward_model.model)
    if start_run(config):
        rewarded = [reward_rows(config, name, path) for name, path in sets.items()]
        metrics = {part.name: flatten(part.slices) for part in rewarded}
        files.write_json(files.join(config.output, METRICS), metrics)
        lead = describe_evaluation(config, rewarded[0])
        facts = {"verified": str(is_verified), **list_facts(config)}
        write_report(report, build_report(rewarded, lead, facts, config.bootstrap, config.num_examples))
        finish_run(config, {"metrics": metrics, "verified": is_verified})
    else:
        rewarded = [read_rewarded(config, name) for name in sets]
    for part in rewarded:
        print(f"\n{part.name}\n{format_table(summary_table(part.slices, config.bootstrap.confidence))}")
    print(f"\nThe page with figures and examples: {report}", flush=True)


def check(config: EvaluateRewardModel, sets: dict[str, str]) -> None:
    """Find out before any actor starts whether there is a model, a split and rows.

    Raises CheckpointError, ConfigError, SchemaError, or EvaluationError when a set has no row of the split.
    """
    model = config.reward_model.model
    # Rows that were trained on need no calibration.
    check_reward_model(config.reward_model, sets.values() if config.split == "all" else ())
    split = find_split(model) if config.split == "held_out" else None
    for path in sets.values():
        Preference.check_files(path)
        if split is None:
            continue
        groups = (group for table in iter_tables(path, ["group"]) for group in table["group"].to_pylist())
        if not any(is_held_out(group, split.fraction, split.seed) for group in groups):
            raise EvaluationError(f"'{path}' holds no row of a group that '{model}' held out of training.")


def reward_rows(config: EvaluateRewardModel, name: str, path: str) -> RewardedSet:
    """Reward the rows at `path` into `<output>/rows/<name>`, and measure them."""
    output = files.join(config.output, "rows", name)
    values: dict[str, Any] = {field: getattr(config, field) for field in RewardingJob.model_fields}
    job = RewardingJob(**{**values, "input": path, "output": output})
    stage = partial(reward_preferences, config=job)
    transform_rows(job, Preference, RewardedPreference, stage, {job.reward_model.name: job.max_failed_fraction})
    return read_rewarded(config, name)


def read_rewarded(config: EvaluateRewardModel, name: str) -> RewardedSet:
    """Measure the rows that stand rewarded in `<output>/rows/<name>`."""
    return measure_set(name, read_table(files.join(config.output, "rows", name)), config.bootstrap)


def describe_evaluation(config: EvaluateRewardModel, rewarded: RewardedSet) -> str:
    """One sentence: which model, how many rows, of what."""
    rows = f"{rewarded.rows.num_rows:,} preferences"
    held_out = " whose groups it was never trained on" if config.split == "held_out" else ""
    return f"{config.reward_model.model} on {rows} of {config.input}{held_out}."


def list_facts(config: Config) -> dict[str, str]:
    """Every field of the config by its dotted name, then the versions."""
    return {**_dotted(config.model_dump(mode="json")), **versions()}


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        found.update(_dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": str(value)})
    return found


if __name__ == "__main__":
    run_job(main)

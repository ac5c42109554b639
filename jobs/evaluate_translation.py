"""Let policies translate test sets and measure them; writes run.json, report.html and matrices by language pair.

BLEU and chrF by sacreBLEU, BLEURT, COMET in an environment of its own, with intervals, and the paired differences of
every two policies. An empty translation is scored like any other. Translations stay in `<output>/<policy>/candidates`,
scores beside them; a run that was killed goes on from there, and translates and scores nothing twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
from pydantic import Field, model_validator

from rayrm import files
from rayrm.config import NOT_IDENTITY, parse_args, run_job
from rayrm.counts import describe_counts
from rayrm.errors import RayRMError
from rayrm.evaluation.facts import list_facts
from rayrm.evaluation.preferences import BootstrapConfig
from rayrm.evaluation.report import format_table, write_report
from rayrm.evaluation.translation.comet import check_comet, score_comet
from rayrm.evaluation.translation.entropy import match_temperature
from rayrm.evaluation.translation.matrices import write_matrices
from rayrm.evaluation.translation.measuring import MetricsConfig, SetResult, measure_set
from rayrm.evaluation.translation.metrics import check_sacrebleu
from rayrm.evaluation.translation.policies import (
    PROMPTS,
    Answers,
    Policy,
    check_policy,
    read_answers,
    score_rows,
    translate_rows,
)
from rayrm.evaluation.translation.report import (
    build_report,
    differences_table,
    drift_table,
    means_table,
    tell_unscored,
)
from rayrm.evaluation.translation.sets import TranslatedRows, write_rows
from rayrm.runs import abandon_run, finish_run, start_run
from rayrm.shards import read_table

REPORT = "report.html"


class EvaluateTranslation(TranslatedRows):
    """Policies, what they translate, and what is measured of it."""

    policies: list[Policy] = Field(min_length=1)
    """The policies, each with a `name` of its own; a difference is a later one minus an earlier one."""
    metrics: MetricsConfig = MetricsConfig()
    """What is measured."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    """How intervals are drawn."""
    max_failed_fraction: float = Field(0.05, ge=0, le=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """The job fails when BLEURT or COMET have no score for a larger share of a policy's texts."""

    @model_validator(mode="after")
    def _check_policies(self) -> EvaluateTranslation:
        names = Counter(policy.name for policy in self.policies)
        if twice := [name for name, num in names.items() if num > 1]:
            raise ValueError(f"several policies are called '{twice[0]}'; give each a name of its own")
        drawing = {policy.name for policy in self.policies if policy.temperature and policy.entropy_of is None}
        for policy in self.policies:
            if policy.entropy_of is not None and policy.entropy_of not in drawing:
                raise ValueError(
                    f"entropy_of of '{policy.name}' is '{policy.entropy_of}', and the policies with a temperature of "
                    f"their own are {', '.join(sorted(drawing)) or 'none'}"
                )
        return self

    @property
    def rows(self) -> TranslatedRows:
        """The rows of all sets, in the output."""
        fields = {name: getattr(self, name) for name in TranslatedRows.model_fields}
        return TranslatedRows(**{**fields, "output": files.join(self.output, PROMPTS)})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises SchemaError for rows that cannot be measured, and what a policy or a scorer raises."""
    config = parse_args(EvaluateTranslation, argv)
    # What was finished needs neither the models nor their environments again.
    if not files.exists(files.join(config.output, files.RUN_MARK)):
        check(config)
    if start_run(config):
        counts = claim_rows(config)
        found = match_temperatures(config)
        policies = [
            policy.model_copy(update={"temperature": found[policy.name]["temperature"]} if policy.name in found else {})
            for policy in config.policies
        ]
        results = measure(config, {policy.name: answer(config, policy) for policy in policies})
        write_matrices(config.output, results, config.metrics.names)
        facts = {f"rows of {name}": describe_counts(own) for name, own in counts.items()} | list_facts(config)
        facts |= {f"temperature of {name}": describe_temperature(own) for name, own in found.items()}
        page = build_report(results, config.metrics.names, facts, config.bootstrap)
        write_report(files.join(config.output, REPORT), page)
        done = {name: result._asdict() for name, result in results.items()}
        finish_run(config, {"rows": counts, "temperatures": found, "results": done})
    print_tables(config)


def check(config: EvaluateTranslation) -> None:
    """Find out before anything is translated what would fail later."""
    check_sacrebleu()
    for policy in config.policies:
        check_policy(policy, config.metrics.bleurt)
    if config.metrics.comet is not None:
        check_comet(config.metrics.comet)


def claim_rows(config: EvaluateTranslation) -> dict[str, dict[str, object]]:
    """Write the rows of all sets; gives up the output again when they cannot be had."""
    try:
        return write_rows(config.rows)
    except RayRMError:
        abandon_run(config)
        raise


def match_temperatures(config: EvaluateTranslation) -> dict[str, dict[str, float]]:
    """What `match_temperature` finds, by the names of the policies that ask for it."""
    named = {policy.name: policy for policy in config.policies}
    return {
        name: match_temperature(policy, named[policy.entropy_of], config.rows.output, files.join(config.output, name))
        for name, policy in named.items()
        if policy.entropy_of is not None
    }


def describe_temperature(found: dict[str, float]) -> str:
    """A matched temperature as reports tell it."""
    return (
        f"{found['temperature']:.3f}, where its entropy is {found['entropy']:.2f} nats a token "
        f"({found['wanted']:.2f} wanted)"
    )


def answer(config: EvaluateTranslation, policy: Policy) -> dict[str, str]:
    """Translate all rows and score them; where the translations are, and the scores by scorer."""
    candidates = translate_rows(policy, config.rows.output, config.output, config.shard_rows)
    folder, limit = files.join(config.output, policy.name), config.max_failed_fraction
    found = {"": candidates}
    if (bleurt := config.metrics.bleurt) is not None:
        scored = files.join(folder, "scored")
        found["bleurt"] = score_rows(bleurt, candidates, scored, config.shard_rows, limit)
    if (comet := config.metrics.comet) is not None:
        found["comet"] = score_comet(comet, candidates, files.join(folder, "comet"), limit)
    return found


def measure(config: EvaluateTranslation, folders: dict[str, dict[str, str]]) -> dict[str, SetResult]:
    """What is measured of each set, of the answers of all policies."""
    table = read_table(config.rows.output)
    results = {}
    for part in config.sets:
        rows = table.filter(pa.array([name == part.name for name in table["set"].to_pylist()], pa.bool_()))
        answers: dict[str, Answers] = {}
        for policy in config.policies:
            scored = {name: folder for name, folder in folders[policy.name].items() if name}
            answers[policy.name] = read_answers(rows, policy.num_candidates, folders[policy.name][""], scored)
        results[part.name] = measure_set(part.name, rows, answers, config.metrics.names, config.bootstrap)
    return results


def print_tables(config: EvaluateTranslation) -> None:
    """Print what the finished run in the output found."""
    done = files.read_json(files.join(config.output, files.RUN_MARK))
    for name, found in done["results"].items():
        result = SetResult(**{**found, "pairs": [tuple(pair) for pair in found["pairs"]]})
        print(f"\n{name}: {describe_counts(done['rows'][name])}")
        for policy, own in done["temperatures"].items():
            print(f"temperature of {policy}: {describe_temperature(own)}")
        tables = [means_table(result, config.metrics.names, config.bootstrap)]
        if result.differences:
            tables.append(differences_table(result, config.metrics.names, config.bootstrap))
        print(*(f"\n{format_table(table)}" for table in (*tables, drift_table(result))), sep="\n")
        if unscored := tell_unscored(result, config.metrics.names):
            print(f"\n{unscored}")
    print(f"\nThe page with matrices and figures: {files.join(config.output, REPORT)}", flush=True)


if __name__ == "__main__":
    run_job(main)

"""Ask language models which answers are better; writes results.parquet, metrics.json and every word that they said.

Every answer is stored in `<output>/answers` as it comes: a run that was killed, or that stopped since an endpoint went
away, goes on from there when the same command is given, and asks no question twice that has an answer. Calls that
failed are asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from rayrm import files
from rayrm.config import NOT_IDENTITY, parse_args, run_job
from rayrm.counts import describe_counts
from rayrm.errors import EvaluationError
from rayrm.evaluation.answers import AnswerStore, Ledger
from rayrm.evaluation.asking import Asking, ask_all
from rayrm.evaluation.benchmarks import BENCHMARKS, NoVerdictRule
from rayrm.evaluation.cases import Case, read_cases
from rayrm.evaluation.judge_report import (
    PANEL,
    PANEL_TYPE,
    failed_fraction,
    ledger_table,
    measure_judge,
    summary_table,
    write_exports,
    write_judged,
)
from rayrm.evaluation.judges import Judge
from rayrm.evaluation.judging import Examiner, Verdict, check_benchmark, result_rows, rule_of, vote
from rayrm.evaluation.report import format_table
from rayrm.evaluation.results import JUDGE, write_results
from rayrm.evaluation.sets import EvaluatedOn, Prepared, claim_sets
from rayrm.runs import finish_run, start_run
from rayrm.scoring.judge import Judging

METRICS = "metrics.json"


class JudgePreferences(EvaluatedOn):
    """Judges, and the sets that they are asked about.

    Pairwise judges take pairs, four-way judges and ratings also right and wrong answers. Rows with several right answers,
    and those of the subset Ties, are rated by any judge; a row of Ties counts in that score, and has no credit of its own.
    """

    judges: list[Judge] = Field(min_length=1)
    """Asked one after the other: `type: endpoint` with name, url, model, key_variable, max_in_flight, prompt_price and
    completion_price (of a million tokens), or `type: local` with name, model, engine and num_replicas."""
    panel: list[str] = Field(default_factory=list)
    """Names of an odd number of judges whose majority is one more judge, called panel; empty for none. Without a
    majority of all members its status is error, and it counts nothing."""
    judging: Judging = Judging()
    """What the judges are asked and how their words are read."""
    tell_languages: bool = False
    """Tell judges the languages of conversation and answers: src_lang and tgt_lang where a row has them and was not
    translated as a whole, else lang."""
    no_verdict: NoVerdictRule | None = None
    """What an answer without a verdict counts. Null: half a point for pairs of a benchmark and a quarter in
    RewardBench 2, as their published numbers have it, and nothing in any other set. A call that failed never counts."""
    asking: Asking = Field(Asking(), json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """How often and how long endpoints are asked."""
    max_failed_fraction: float = Field(0.05, ge=0, le=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Most rows of a judge whose calls may have failed; a run with more stops, and asks them again when it goes on."""

    @model_validator(mode="after")
    def _names_are_told_apart(self) -> JudgePreferences:
        names = [judge.name for judge in self.judges]
        twice = [name for name, num in Counter([*names, PANEL]).items() if num > 1]
        if twice:
            raise ValueError(f"several judges are called {twice[0]}")
        unknown = [name for name in self.panel if name not in names]
        if unknown:
            raise ValueError(f"the panel names '{unknown[0]}', and the judges are {', '.join(names)}")
        if self.panel and (len(self.panel) % 2 == 0 or len(self.panel) < 3 or len(set(self.panel)) < len(self.panel)):
            raise ValueError(f"a panel has an odd number of different judges, 3 or more; found {', '.join(self.panel)}")
        if self.panel and self.judging.kind == "rating":
            raise ValueError("a panel votes on winners, and ratings name none; leave panel out")
        return self


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises EvaluationError when an endpoint is gone, too many calls failed, or there is no row."""
    config = parse_args(JudgePreferences, argv)
    examiner = Examiner(config.judging)
    # What was finished needs neither keys nor engines again.
    if not files.exists(files.join(config.output, files.RUN_MARK)):
        for judge in config.judges:
            judge.check()
            answers_of(config, judge)
    if start_run(config):
        cases = claim_sets(config, lambda prepared: list_cases(config, prepared))
        verdicts, ledgers = judge_all(config, examiner, cases)
        metrics = write_reports(config, cases, verdicts)
        ledger = {name: found._asdict() for name, found in ledgers.items()}
        finish_run(config, {"rows": config.count_rows(), "metrics": metrics, "ledger": ledger})
    print_tables(config)


def list_cases(config: JudgePreferences, prepared: Sequence[Prepared]) -> list[Case]:
    """What judges are asked about. Raises EvaluationError without a case, and when the benchmark can have no score."""
    cases = read_cases(prepared, config.judging.kind, config.tell_languages)
    if not any(case.fault is None for case in cases):
        raise EvaluationError("The sets have no row whose answers could be compared; nothing is judged.")
    if config.benchmark is not None:
        check_benchmark(config.benchmark, cases)
    return cases


def answers_of(config: JudgePreferences, judge: Any) -> AnswerStore:
    """The stored answers of a judge. Raises ConfigError when the output cannot hold them."""
    return AnswerStore(files.join(config.output, "answers", f"{judge.name}.jsonl"), judge.prices)


def judge_all(
    config: JudgePreferences, examiner: Examiner, cases: Sequence[Case]
) -> tuple[dict[str, list[Verdict]], dict[str, Ledger]]:
    """What each judge says of each case, the panel last, and what each judge took. Writes `rows/<judge>.parquet`."""
    verdicts: dict[str, list[Verdict]] = {}
    ledgers: dict[str, Ledger] = {}
    rule = rule_of(config.no_verdict, config.benchmark)
    for judge in config.judges:
        questions = [examiner.ask(case, judge.model) for case in cases]
        calls = {call.key: call for each in questions for _, call in each}
        with answers_of(config, judge) as store:
            if not all(store.is_answered(key) for key in calls):
                with judge.serve(config.output) as endpoint:
                    ask_all(endpoint, judge.name, calls, store, config.asking)
            found = [
                examiner.read(case, [asked for asked, _ in each], store.find, rule)
                for case, each in zip(cases, questions, strict=True)
            ]
            ledgers[judge.name] = store.ledger()
        write_verdicts(config, judge.name, cases, found)
        check_failed(config, judge.name, cases, found)
        # The panel needs no words.
        verdicts[judge.name] = [verdict._replace(texts=()) for verdict in found]
    if config.panel:
        members = zip(*(verdicts[name] for name in config.panel), strict=True)
        verdicts[PANEL] = [vote(case, votes, rule) for case, votes in zip(cases, members, strict=True)]
        write_verdicts(config, PANEL, cases, verdicts[PANEL])
    return verdicts, ledgers


def write_verdicts(config: JudgePreferences, name: str, cases: Sequence[Case], found: Sequence[Verdict]) -> None:
    """Write what a judge said of each row."""
    write_judged(files.join(config.output, "rows", f"{name}.parquet"), list(zip(cases, found, strict=True)))


def check_failed(config: JudgePreferences, name: str, cases: Sequence[Case], found: Sequence[Verdict]) -> None:
    """Raise EvaluationError when more of a judge's rows have a failed call than the config allows."""
    fraction = failed_fraction(list(zip(cases, found, strict=True)))
    if fraction > config.max_failed_fraction:
        details = (verdict.detail for case, verdict in zip(cases, found, strict=True) if not case.fault)
        told = Counter(detail for detail in details if detail).most_common(1)[0][0]
        raise EvaluationError(
            f"Judge '{name}' left {fraction:.1%} of the rows without an answer, and max_failed_fraction is "
            f"{config.max_failed_fraction:g}; the same command asks those again. Most often: {told}"
        )


def write_reports(
    config: JudgePreferences, cases: Sequence[Case], verdicts: dict[str, list[Verdict]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Write results, metrics and the files that leaderboards read; give the metrics."""
    rows: list[dict[str, Any]] = []
    metrics = {}
    for name, found in verdicts.items():
        judged = list(zip(cases, found, strict=True))
        kind = PANEL_TYPE if name == PANEL else JUDGE
        results = result_rows(name, kind, config.benchmark, judged)
        metrics[name] = measure_judge(judged, results)
        rows += results
    write_results(config.output, rows)
    files.write_json(files.join(config.output, METRICS), metrics)
    if config.benchmark is not None:
        write_exports(files.join(config.output, "exports"), BENCHMARKS[config.benchmark], rows, config.panel)
    return metrics


def print_tables(config: JudgePreferences) -> None:
    """Print what the finished run in the output found, and what it took."""
    done = files.read_json(files.join(config.output, files.RUN_MARK))
    for title, counts in done["rows"].items():
        print(f"{title}: {describe_counts(counts)}")
    print(f"\n{format_table(summary_table(done['metrics']))}")
    print(
        f"\n{format_table(ledger_table({name: Ledger(**found) for name, found in done['ledger'].items()}))}", flush=True
    )


if __name__ == "__main__":
    run_job(main)

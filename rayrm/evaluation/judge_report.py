"""What judges said, as files, metrics and a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayrm import files
from rayrm.evaluation.answers import Ledger
from rayrm.evaluation.benchmarks import Benchmark, count_verdicts
from rayrm.evaluation.cases import Case
from rayrm.evaluation.exports import Evaluated, Measured, write_eval_set, write_translated_verdicts
from rayrm.evaluation.judging import Verdict
from rayrm.evaluation.report import Table
from rayrm.evaluation.results import JUDGE, Score, by_language, by_model_and_language, score_languages, score_results
from rayrm.languages import flores_code
from rayrm.rows import NUMBERS, TEXTS, RowType

PANEL = "panel"
"""What the panel is called beside the judges."""
PANEL_TYPE = f"{JUDGE} PoLL"
"""What RewardBench calls a panel of judges."""
_INTEGERS = pa.list_(pa.int64())
Judged = RowType(
    "Judged",
    {
        "set": pa.string(),
        "id": pa.string(),
        "group": pa.string(),
        "lang": pa.string(),
        "subset": pa.string(),
        "winner": pa.int64(),
        "status": pa.string(),
        "credit": pa.float64(),
        "ratings": _INTEGERS,
        "probabilities": NUMBERS,
        "is_consistent": pa.bool_(),
        "orders": pa.list_(_INTEGERS),
        "verdicts": _INTEGERS,
        "statuses": TEXTS,
        "texts": TEXTS,
        "detail": pa.string(),
    },
    ("subset", "winner", "credit", "ratings", "probabilities", "is_consistent", "detail"),
)
"""What a judge said of a row; the columns are those of `Verdict`, and answers are numbered with the right ones first."""
Pairs = Sequence[tuple[Case, Verdict]]


def write_judged(path: str, judged: Pairs) -> None:
    """Write the rows of one judge; halves of characters in its words, which a cut may leave, become question marks."""
    rows = [
        {
            **{name: getattr(case, name) for name in ("set", "id", "group", "lang", "subset")},
            **_clean(verdict)._asdict(),
        }
        for case, verdict in judged
    ]
    schema = pa.schema([(name, kind) for name, kind in Judged.columns.items() if kind is not None])
    with files.atomic_file(path) as handle:
        pq.write_table(pa.Table.from_pylist(rows, schema), handle)


def _clean(verdict: Verdict) -> Verdict:
    def whole(text: str | None) -> str | None:
        return None if text is None else text.encode("utf-8", "replace").decode()

    return verdict._replace(texts=[whole(text) for text in verdict.texts], detail=whole(verdict.detail))


def measure_judge(judged: Pairs, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The metrics of one judge on each set, then those of each language behind a slash; `rows` are its Result rows.

    `accuracy` is the mean credit, null without any; `score` that of the benchmark, where there is one. The counts are of
    rows: with a verdict, with an answer and none, without an answer (failed), and not asked. `consistent_fraction` is
    of the rows with two orders that can be read, `first_place_fraction` of the verdicts for the answer that stood
    first: one half of pairs for a judge that does not look at the place.
    """
    metrics = {}
    for name in dict.fromkeys(case.set for case, _ in judged):
        own, own_rows = [each for each in judged if each[0].set == name], [row for row in rows if row["set"] == name]
        found = _measure(own, own_rows)
        for lang in sorted({case.lang for case, _ in own}):
            part = _measure([e for e in own if e[0].lang == lang], [row for row in own_rows if row["lang"] == lang])
            found |= {f"{metric}/{lang}": value for metric, value in part.items()}
        metrics[name] = found
    return metrics


def _measure(judged: Pairs, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    asked = [verdict for case, verdict in judged if not case.fault]
    # Where all ratings are there, several best ones are an answer and no lack of one.
    winners = [0 if verdict.ratings is not None and verdict.status == "ok" else verdict.winner for verdict in asked]
    consistent = [verdict.is_consistent for verdict in asked if verdict.is_consistent is not None]
    firsts = [
        named == order[0]
        for verdict in asked
        if verdict.ratings is None
        for named, order in zip(verdict.verdicts, verdict.orders, strict=False)
        if named is not None
    ]
    credits = [row["credit"] for row in rows if row["credit"] is not None]
    languages = by_language(rows)
    score = score_languages({lang: score_results(own) for lang, own in languages.items()}, [dict(row) for row in rows])
    measured: dict[str, Any] = {
        "accuracy": _mean(credits),
        "num_rows": len(judged),
        **count_verdicts(winners, [verdict.status for verdict in asked]),
        "num_not_asked": len(judged) - len(asked),
        "consistent_fraction": _mean(consistent),
        "first_place_fraction": _mean(firsts),
    }
    if score.benchmark is not None:
        measured |= {"score": score.score, "sections": score.benchmark.sections}
    return measured


def summary_table(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """A line for each judge, set and language, and for all of a set's languages where there are several."""
    has_score = any("score" in found for sets in metrics.values() for found in sets.values())
    header = ["judge", "set", "language", *(["score"] if has_score else []), "accuracy"]
    header += ["rows", "no verdict", "failed", "not asked", "consistent", "first place"]
    rows = []
    for judge, sets in metrics.items():
        for name, found in sets.items():
            languages = [key.partition("/")[2] for key in found if key.startswith("accuracy/")]
            for lang in [*languages, *([""] if len(languages) > 1 else [])]:
                rows.append([judge, name, lang or "all", *_cells(found, f"/{lang}" if lang else "", has_score)])
    return Table(header, rows, num_labels=3)


def _cells(found: Mapping[str, Any], suffix: str, has_score: bool) -> list[str]:
    counts = [f"{found[name + suffix]:,}" for name in ("num_rows", "num_no_verdict", "num_failed", "num_not_asked")]
    shares = [_share(found[f"{name}_fraction{suffix}"]) for name in ("consistent", "first_place")]
    score = [_share(found.get(f"score{suffix}"))] if has_score else []
    return [*score, _share(found[f"accuracy{suffix}"]), *counts, *shares]


def ledger_table(ledgers: Mapping[str, Ledger]) -> Table:
    """What each judge took, earlier runs of the same work included."""
    header = ["judge", "calls", "retries", "failures", "prompt tokens", "completion tokens", "unmetered", "cost"]
    rows = []
    for judge, found in ledgers.items():
        counts = [found.num_calls, found.num_retries, found.num_failures, found.prompt_tokens, found.completion_tokens]
        cost = "unknown" if found.cost is None else f"{found.cost:.4f}"
        rows.append([judge, *(f"{count:,}" for count in [*counts, found.num_unmetered]), cost])
    return Table(header, rows)


def write_exports(output: str, benchmark: Benchmark, rows: Sequence[dict[str, Any]], panel: Sequence[str]) -> None:
    """Write the benchmark's files of each judge: `eval-set/{model}.json` and `pref-sets/{model}.json`, or one a language.

    Sets that are several stand in folders of their names, and languages in folders of their FLORES-200 codes.
    """
    names = list(dict.fromkeys(row["set"] for row in rows))
    for name in names:
        folder = output if len(names) == 1 else files.join(output, name)
        for model, languages in by_model_and_language(row for row in rows if row["set"] == name).items():
            evaluated = Evaluated(model, JUDGE)
            if model == PANEL and panel:
                evaluated = Evaluated(f"PoLL/{'_'.join(panel)}", PANEL_TYPE)
            for lang, found in languages.items():
                code = flores_code(lang)
                where = files.join(folder, code) if benchmark.languages or len(languages) > 1 else folder
                score: Score = score_results(found)
                if benchmark.languages:
                    sections = {} if score.benchmark is None else score.benchmark.sections
                    measured = Measured(benchmark.dataset, code, score.subsets, sections)
                    write_translated_verdicts(where, evaluated, measured, [row["credit"] for row in found])
                    continue
                prior = {subset: value for subset, value in score.subsets.items() if subset in benchmark.prior_sets}
                core = {subset: value for subset, value in score.subsets.items() if subset not in prior}
                write_eval_set(where, evaluated, core)
                if prior:
                    write_eval_set(where, evaluated, prior, "pref-sets")


def failed_fraction(judged: Pairs) -> float:
    """Share of the cases that were asked about whose calls failed; 0 where nothing was asked."""
    asked: defaultdict[bool, int] = defaultdict(int)
    for case, verdict in judged:
        if not case.fault:
            asked[verdict.status in ("ok", "parse_error")] += 1
    return asked[False] / (asked[False] + asked[True]) if asked else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

"""What an evaluation found, row by row and without texts: the one form that reports and analyses of any model read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rayrm import files
from rayrm.errors import SchemaError
from rayrm.evaluation.benchmarks import (
    BENCHMARKS,
    TIES,
    BenchmarkScore,
    BestOf,
    mean_credits,
    score_benchmark,
    score_ties,
)
from rayrm.rows import NUMBERS, RowType

RESULTS = "results.parquet"
"""Name of the file with an evaluation's results, in its output folder."""
JUDGE = "Generative RM"
"""What RewardBench calls judges; `rayrm.scoring.base` has its names of reward models."""

Result = RowType(
    "Result",
    {
        "model": pa.string(),
        "model_type": pa.string(),
        "benchmark": pa.string(),
        "set": pa.string(),
        "id": pa.string(),
        "group": pa.string(),
        "lang": pa.string(),
        "subset": pa.string(),
        "num_correct": pa.int64(),
        "rewards": NUMBERS,
        "lengths": pa.list_(pa.int64()),
        "credit": pa.float64(),
        "status": pa.string(),
    },
    ("benchmark", "subset", "rewards", "credit"),
)
"""A row that a model was evaluated on: the answers that are right come first, `num_correct` of them.

`rewards` are raw, null as a whole for a judge that names a winner, null singly where there is none; `lengths` are the
answers' characters. `credit`, 0 to 1, is what the row counts; null where it counts nothing, with the reason in `status`.
`benchmark` is a key of `BENCHMARKS`, or null for any other set. The key of a row is (`model`, `set`, `id`, `lang`).
"""


class Score(NamedTuple):
    """What a model gets on a set in one language."""

    score: float | None
    """The benchmark's overall score, or the mean credit where the set is no benchmark's; null where it has none."""
    benchmark: BenchmarkScore | None
    """The parts of it; null for any other set."""
    subsets: dict[str, float]
    """Subset to its mean credit, or to its score for Ties."""
    num_rows: int
    """Rows with a credit, or with all rewards for Ties."""
    num_unscored: int


def write_results(output: str, rows: Iterable[dict[str, Any]]) -> str:
    """Write the results of an evaluation into its output folder; give the file's path."""
    path = files.join(output, RESULTS)
    schema = pa.schema([(name, kind) for name, kind in Result.columns.items() if kind is not None])
    with files.atomic_file(path) as handle:
        pq.write_table(pa.Table.from_pylist(list(rows), schema), handle)
    return path


def read_results(output: str) -> pa.Table:
    """The results of the evaluation in a folder. Raises SchemaError when there are none."""
    path = files.join(output, RESULTS)
    fs, inner = files.filesystem(path)
    if not fs.exists(inner):
        raise SchemaError(
            f"'{output}' holds no {RESULTS}; give the output of evaluate_reward_model or judge_preferences."
        )
    with fs.open(inner, "rb") as handle:
        table = pq.read_table(handle)
    Result.check(table.schema, f"'{path}'")
    return Result.conform(table)


def own_id(row_id: str, subset: str | None) -> str:
    """The id that a row has in its set, without the subset that keeps it apart from those of other subsets."""
    return row_id.removeprefix(f"{subset}/")


def score_results(rows: Sequence[dict[str, Any]]) -> Score:
    """The score of Result rows of one model, set and language."""
    name = next((row["benchmark"] for row in rows), None)
    ties = [row for row in rows if row["benchmark"] is not None and row["subset"] == TIES]
    others = [row for row in rows if row["benchmark"] is None or row["subset"] != TIES]
    credits = [row["credit"] for row in others]
    subsets = mean_credits([row["subset"] or "" for row in others], credits)
    num_rows = sum(credit is not None for credit in credits)
    if ties:
        found = score_ties(
            BestOf(own_id(row["id"], TIES), TIES, row["num_correct"], row["rewards"] or ()) for row in ties
        )
        num_rows += len(ties) - found.num_unscored
        if found.score is not None:
            subsets[TIES] = found.score
    num_unscored = len(rows) - num_rows
    if not subsets:
        return Score(None, None, {}, num_rows, num_unscored)
    if name is None:
        known = [credit for credit in credits if credit is not None]
        named = {subset: value for subset, value in subsets.items() if subset}
        return Score(sum(known) / len(known), None, named, num_rows, num_unscored)
    whole = score_benchmark(BENCHMARKS[name], subsets)
    return Score(whole.overall, whole, subsets, num_rows, num_unscored)


def score_languages(scores: Mapping[str, Score], rows: Sequence[dict[str, Any]]) -> Score:
    """The score of several languages together, from that of each and from all of their rows.

    That of a benchmark is the mean over the languages but English, as M-RewardBench has it, and null where one is; that
    of any other set is the mean credit of all rows.
    """
    if len(scores) == 1:
        return next(iter(scores.values()))
    if not scores or all(score.benchmark is None for score in scores.values()):
        return score_results(rows)
    foreign = [score for lang, score in scores.items() if lang != "en"]
    parts = [score.benchmark for score in foreign if score.benchmark is not None]
    sections = {name: _mean_of([part.sections[name] for part in parts]) for name in parts[0].sections}
    subsets = {name: [score.subsets[name] for score in foreign if name in score.subsets] for name in foreign[0].subsets}
    whole = BenchmarkScore(
        sections,
        _mean_of([part.prior_sets for part in parts]),
        _mean_of([part.overall for part in parts]),
        _mean_of([part.overall_without_prior for part in parts]),
        tuple(dict.fromkeys(name for part in parts for name in part.missing)),
    )
    return Score(
        whole.overall if len(parts) == len(foreign) else None,
        whole,
        {name: sum(values) / len(values) for name, values in subsets.items()},
        sum(score.num_rows for score in scores.values()),
        sum(score.num_unscored for score in scores.values()),
    )


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def by_language(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of one model and set by language, in the order in which they come."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["lang"]].append(dict(row))
    return dict(found)


def by_model_and_language(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Rows of one set by model and, within it, by language, in the order in which they come."""
    found: defaultdict[str, defaultdict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["model"]][row["lang"]].append(row)
    return {model: dict(languages) for model, languages in found.items()}

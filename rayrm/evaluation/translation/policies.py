"""Policies and what they answered: candidates from Ray Data actors, BLEURT beside them, read back row by row."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from rayrm import cluster, files
from rayrm.counts import SCORED
from rayrm.errors import EvaluationError
from rayrm.evaluation.preferences import Floats
from rayrm.evaluation.translation.bleurt import score_translations
from rayrm.evaluation.translation.sets import NAME
from rayrm.models.folders import check_model
from rayrm.rows import TEXTS, Candidates, Prompt, Scored, set_column
from rayrm.runs import RowsJob, transform_rows
from rayrm.sampling import SamplingConfig, check_sampling, sample_candidates
from rayrm.scoring.bleurt import BleurtScoring
from rayrm.shards import read_table

if TYPE_CHECKING:
    from ray.data import Dataset

PROMPTS, MATRICES = "prompts", "matrices"
"""Folders of an output beside those of the policies."""
KEY = ("set", "id", "lang")


class Policy(SamplingConfig):
    """A policy, and how it translates: greedily, unless it says otherwise."""

    name: str = Field("policy", pattern=NAME)
    """What reports call it, and its folder of the output."""
    prompt: Literal["as_is", "direct", "anchored"] = "direct"
    """What the policy reads: an instruction made of the row's source, without or with its English anchor, or the row's
    own prompt."""
    num_candidates: int = Field(1, ge=1)
    """Translations of each row; corpus metrics are taken of the first ones, the second ones … and averaged."""
    temperature: float = Field(0.0, ge=0)
    """Divisor of the logits; 0 for greedy decoding. With entropy_of, where the search begins."""
    entropy_of: str | None = None
    """Name of another policy: this one draws at the temperature at which its entropy is that of the other."""
    max_tokens: int = Field(768, ge=1)
    """Tokens at which a translation is cut."""

    @model_validator(mode="after")
    def _draws(self) -> Policy:
        if self.entropy_of is not None and not self.temperature:
            raise ValueError(
                f"entropy_of is {self.entropy_of}, and temperature 0; set the one to begin the search with"
            )
        return self

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in (PROMPTS, MATRICES):
            raise ValueError(f"the folder {name} of the output holds something else; take another name")
        return name


class GenerationJob(RowsJob):
    """Prompt rows → Candidates rows."""

    policy: Policy
    """The policy."""


class BleurtJob(RowsJob):
    """Candidates rows → Scored rows."""

    scoring: BleurtScoring
    """The scorer."""


class Answers(NamedTuple):
    """What a policy made of the rows of a set, in their order."""

    samples: list[list[str]]
    """Samples × rows; a row that the policy could not answer has empty texts, which count like any others."""
    num_unfinished: list[int]
    """Texts of each row that were cut."""
    is_dropped: list[bool]
    """Rows that the policy could not answer, such as those too long for it."""
    scores: dict[str, Floats]
    """Scorer to the mean score of each row's samples, NaN where it failed on one of them."""
    faults: dict[str, dict[str, int]]
    """Scorer to the status words of the texts that it failed on, with their number."""


def check_policy(policy: Policy, bleurt: BleurtScoring | None) -> None:
    """Check on the driver what would fail in the actors. Raises ConfigError or CheckpointError."""
    check_sampling(policy)
    if bleurt is not None:
        check_model(bleurt.model)


def translate_rows(policy: Policy, prompts: str, output: str, shard_rows: int) -> str:
    """Let a policy translate the rows at `prompts`; give the folder of its Candidates rows. What is done is kept."""
    workers = policy.workers
    cluster.require(workers.num_workers, workers.num_cpus, workers.num_gpus, f"Policy '{policy.name}'")
    folder = files.join(output, policy.name, "candidates")
    job = GenerationJob(input=prompts, output=folder, shard_rows=shard_rows, policy=policy)
    stage = partial(_answer_rows, policy=policy)
    transform_rows(job, Prompt, Candidates, stage, summarise=partial(_count_unanswered, policy=policy))
    return folder


def _answer_rows(prompts: Dataset, policy: Policy) -> Dataset:
    # It takes no CPU: the policies' actors may hold all of them.
    return sample_candidates(prompts, policy).map_batches(
        answer_dropped,
        fn_kwargs={"num_candidates": policy.num_candidates},
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=0,
    )


def answer_dropped(table: pa.Table, num_candidates: int) -> pa.Table:
    """Give empty texts to the rows that a policy dropped, so that they are measured; adds why, `unanswered`, or null.

    What a policy cannot answer is not left out: that would flatter it.
    """
    kept = table["_kept"].to_pylist()

    def fill(name: str, nothing: Any, kind: pa.DataType) -> pa.Table:
        own = table[name].to_pylist()
        values = [value if keep else nothing for keep, value in zip(kept, own, strict=True)]
        return set_column(table, name, pa.array(values, kind))

    reasons = [None if keep else ", ".join(own) for keep, own in zip(kept, table["_dropped"].to_pylist(), strict=True)]
    table = fill("candidates", [""] * num_candidates, TEXTS)
    table = fill("num_unfinished", 0, pa.int64())
    table = set_column(table, "unanswered", pa.array(reasons, pa.string()))
    table = set_column(table, "_dropped", pa.array([[]] * len(kept), TEXTS))
    return set_column(table, "_kept", pa.array([True] * len(kept), pa.bool_()))


def _count_unanswered(folder: str, policy: Policy) -> dict[str, Any]:
    reasons = read_table(folder, ["unanswered"])["unanswered"].to_pylist()
    counts = Counter(reason for reason in reasons if reason is not None)
    if counts.total() == len(reasons):
        told = ", ".join(f"{num:,} {reason}" for reason, num in counts.most_common())
        raise EvaluationError(
            f"Policy '{policy.name}' could answer none of the {len(reasons):,} rows ({told}); choose another prompt, a "
            "larger engine.max_model_len, or a set with shorter texts, into another output."
        )
    return {"unanswered": dict(counts)}


def score_rows(
    scoring: BleurtScoring, candidates: str, output: str, shard_rows: int, max_failed_fraction: float
) -> str:
    """Score Candidates rows with BLEURT; give the folder of the Scored rows. What is done is kept.

    Raises EvaluationError when more than `max_failed_fraction` of the texts have no score.
    """
    job = BleurtJob(input=candidates, output=output, shard_rows=shard_rows, scoring=scoring)
    stage = partial(score_translations, config=scoring)
    transform_rows(job, Candidates, Scored, stage, {scoring.name: max_failed_fraction})
    return output


def read_answers(rows: pa.Table, num_samples: int, candidates: str, scored: dict[str, str]) -> Answers:
    """What stands at `candidates` and, by scorer, in the folders `scored` for SetRow rows."""
    keys = list(zip(*(rows[name].to_pylist() for name in KEY), strict=True))
    own = _read(candidates, keys, ["candidates", "num_unfinished", "unanswered"])
    scores, faults = {}, {}
    for scorer, folder in scored.items():
        found = _read(folder, keys, ["scores", "status"])
        scores[scorer] = np.array([_mean(row["scores"]) for row in found])
        words = Counter(word for row in found for own_words in row["status"].values() for word in own_words)
        faults[scorer] = {word: num for word, num in sorted(words.items()) if word not in SCORED}
    return Answers(
        [[row["candidates"][sample] or "" for row in own] for sample in range(num_samples)],
        [row["num_unfinished"] for row in own],
        [row["unanswered"] is not None for row in own],
        scores,
        faults,
    )


def _read(folder: str, keys: list[tuple[str, str, str]], columns: list[str]) -> list[dict[str, Any]]:
    """The rows of `keys`, in that order."""
    rows = read_table(folder, [*KEY, *columns]).to_pylist()
    found = {(row["set"], row["id"], row["lang"]): row for row in rows}
    return [found[key] for key in keys]


def _mean(scores: dict[str, list[float | None]]) -> float:
    """Of a row's samples; NaN unless all have a score, for those without are the bad ones."""
    found = [score for own in scores.values() for score in own or ()]
    known = [score for score in found if score is not None]
    return sum(known) / len(known) if known and len(known) == len(found) else float("nan")

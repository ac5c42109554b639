"""Policies and what they answered: candidates from Ray Data actors, BLEURT beside them, read back row by row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from rayrm import cluster, files
from rayrm.evaluation.preferences import Floats
from rayrm.evaluation.translation.sets import NAME
from rayrm.models.folders import check_model
from rayrm.rows import Candidates, Prompt, Scored
from rayrm.runs import RowsJob, transform_rows
from rayrm.sampling import SamplingConfig, check_sampling, sample_candidates
from rayrm.scoring import score_candidates
from rayrm.scoring.bleurt import BleurtScoring
from rayrm.shards import read_table

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
    """Divisor of the logits; 0 for greedy decoding. With entropy_of, the highest one that is tried."""
    entropy_of: str | None = None
    """Name of another policy: this one draws at the temperature at which its entropy is that of the other."""
    max_tokens: int = Field(768, ge=1)
    """Tokens at which a translation is cut."""

    @model_validator(mode="after")
    def _draws(self) -> Policy:
        if self.entropy_of is not None and not self.temperature:
            raise ValueError(f"entropy_of is {self.entropy_of}, and temperature 0; set the highest temperature to try")
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
    """Samples × rows; a row that the policy could not answer has empty texts."""
    num_unfinished: list[int]
    """Texts of each row that were cut."""
    is_dropped: list[bool]
    """Rows that the policy could not answer, such as those too long for it."""
    scores: dict[str, Floats]
    """Scorer to the mean score of each row's samples, NaN where one of them has none."""


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
    transform_rows(job, Prompt, Candidates, partial(sample_candidates, config=policy))
    return folder


def score_rows(scoring: BleurtScoring, candidates: str, output: str, shard_rows: int) -> str:
    """Score Candidates rows with BLEURT; give the folder of the Scored rows. What is done is kept."""
    job = BleurtJob(input=candidates, output=output, shard_rows=shard_rows, scoring=scoring)
    transform_rows(job, Candidates, Scored, partial(score_candidates, config=scoring))
    return output


def read_answers(rows: pa.Table, num_samples: int, candidates: str, scored: dict[str, str]) -> Answers:
    """What stands at `candidates` and, by scorer, in the folders `scored` for SetRow rows."""
    found = _by_key(candidates, ["candidates", "num_unfinished"])
    keys = list(zip(*(rows[name].to_pylist() for name in KEY), strict=True))
    nothing: dict[str, Any] = {"candidates": [""] * num_samples, "num_unfinished": 0}
    own = [found.get(key, nothing) for key in keys]
    scores = {}
    for scorer, folder in scored.items():
        by_key = _by_key(folder, ["scores"])
        scores[scorer] = np.array([_mean(by_key[key]["scores"]) if key in by_key else np.nan for key in keys])
    return Answers(
        [[row["candidates"][sample] or "" for row in own] for sample in range(num_samples)],
        [row["num_unfinished"] for row in own],
        [key not in found for key in keys],
        scores,
    )


def _by_key(folder: str, columns: Sequence[str]) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = read_table(folder, [*KEY, *columns]).to_pylist()
    return {(row["set"], row["id"], row["lang"]): row for row in rows}


def _mean(scores: dict[str, list[float | None]]) -> float:
    """Of a row's samples; NaN unless all have a score, for those without are the bad ones."""
    found = [score for own in scores.values() for score in own or ()]
    known = [score for score in found if score is not None]
    return sum(known) / len(known) if known and len(known) == len(found) else float("nan")

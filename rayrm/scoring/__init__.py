"""Candidates → Scored: a scorer is chosen by its tag and hosted by Ray Data actors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from rayrm import cluster
from rayrm.errors import ConfigError, SchemaError
from rayrm.models.folders import check_model
from rayrm.rows import NUMBERS, TEXTS, set_column, with_hidden
from rayrm.scoring.bleurt import BleurtScorer, BleurtScoring
from rayrm.scoring.grammar import GrammarScorer, GrammarScoring
from rayrm.scoring.reward_model import (
    RewardModelScorer,
    RewardModelScoring,
    check_gives_rewards,
    check_reward_model,
)
from rayrm.shards import read_schemas

if TYPE_CHECKING:
    from ray.data import Dataset

Scoring = Annotated[BleurtScoring | RewardModelScoring | GrammarScoring, Field(discriminator="type")]
"""The config of any scorer, told apart by `type`."""
READS = ("prompt", "source", "reference", "anchor", "src_lang", "tgt_lang", "lang", "candidates")
"""Columns that a scorer sees."""


class Scorer(Protocol):
    """What turns candidates into numbers; `scorer(config)` loads whatever it needs."""

    needs: ClassVar[tuple[str, ...]]
    """Columns without which no row can be scored."""

    def score(self, rows: list[dict[str, Any]]) -> list[list[tuple[float | None, str]]]:
        """One (score or null, status) for each candidate of each row; rows have the columns `READS`."""
        ...


SCORERS: dict[str, Any] = {
    "bleurt": BleurtScorer,
    "reward_model": RewardModelScorer,
    "grammar": GrammarScorer,
}
"""Tag to the class that scores; none loads a model before it is called."""


def score_candidates(candidates: Dataset, config: Scoring) -> Dataset:
    """Score every candidate of every row.

    Reads the columns `READS`. Adds the field `config.name` to the structs `scores` and `status`;
    what other scorers left there stays. Raises ResourceError when the cluster can never hold the actors.
    """
    workers = config.workers
    cluster.require(workers.num_workers, workers.num_cpus, workers.num_gpus, f"Scorer '{config.name}'")
    return candidates.map_batches(
        ScoreStage, fn_constructor_args=(config,), batch_format="pyarrow", batch_size=None, **workers.pool()
    )


def check_scoring(path: str, config: Scoring) -> None:
    """Find out, before any actor starts, whether the rows at `path` can be scored.

    Raises SchemaError when a column is missing without which no row can be scored, ConfigError when another scorer
    has the name already or a calibration is missing, and CheckpointError when there is no model or one that compares.
    """
    for name, schema in read_schemas(path):
        missing = [column for column in SCORERS[config.type].needs if column not in schema.names]
        if missing:
            raise SchemaError(
                f"'{name}' has no column {', '.join(missing)}, which the scorer '{config.type}' compares with."
            )
        kind = schema.field("scores").type if "scores" in schema.names else pa.struct([])
        if not pa.types.is_struct(kind):
            raise SchemaError(f"Column 'scores' of '{name}' is {kind}, and scores are a struct with a field a scorer.")
        if config.name in [field.name for field in kind]:
            raise ConfigError(f"'{name}' has scores named '{config.name}' already; set another scoring.name.")
    if isinstance(config, RewardModelScoring):
        check_reward_model(config, [path])
        check_gives_rewards(config.model)
    elif isinstance(config, BleurtScoring):
        check_model(config.model)


class ScoreStage:
    """The scorer of one actor, applied to tables of whole shards."""

    def __init__(self, config: Scoring) -> None:
        self.name = config.name
        self.scorer: Scorer = SCORERS[config.type](config)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Score the rows that are kept; dropped ones get null."""
        table = with_hidden(table)
        kept = table["_kept"].to_pylist()
        rows = table.select(READS).filter(table["_kept"]).to_pylist()
        results = iter(self.scorer.score(rows) if rows else [])
        outcomes = [next(results) if keep else None for keep in kept]
        for row, outcome in zip(rows, (o for o in outcomes if o is not None), strict=True):
            if len(outcome) != len(row["candidates"] or []):
                raise RuntimeError(
                    f"scorer '{self.name}' gave {len(outcome)} scores for {len(row['candidates'])} texts"
                )
        for column, position, kind in (("scores", 0, NUMBERS), ("status", 1, TEXTS)):
            values = [None if outcome is None else [pair[position] for pair in outcome] for outcome in outcomes]
            table = set_column(table, column, _with_field(table, column, self.name, pa.array(values, kind)))
        return table


def _with_field(table: pa.Table, column: str, name: str, values: pa.Array) -> pa.Array:
    fields = {}
    if column in table.column_names and pa.types.is_struct(table.schema.field(column).type):
        struct = table[column].combine_chunks()
        fields = {field.name: pc.struct_field(struct, field.name) for field in struct.type}
    fields[name] = values
    return pa.StructArray.from_arrays(list(fields.values()), list(fields))

"""Candidates → Scored: a scorer is chosen by its tag and hosted by Ray Data actors.

Scorers of preferences are chosen in the same way. Each is a config and a class that is called with it; a class of one's
own is added by an entry point, see `rayrm.scoring.custom`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from rayrm import cluster
from rayrm.errors import ConfigError, SchemaError
from rayrm.models.folders import check_model
from rayrm.rows import NUMBERS, TEXTS, set_column, with_hidden
from rayrm.scoring.base import CUSTOM, REF_FREE, PreferenceScorer, Scorer
from rayrm.scoring.bleurt import BleurtScorer, BleurtScoring
from rayrm.scoring.custom import CustomClass, CustomScorer, CustomScoring, check_custom
from rayrm.scoring.grammar import GrammarScorer, GrammarScoring
from rayrm.scoring.implicit import ImplicitScorer, ImplicitScoring, check_implicit
from rayrm.scoring.length import LengthScorer, LengthScoring
from rayrm.scoring.pairwise import PairwiseScorer, PairwiseScoring, check_pairwise
from rayrm.scoring.reward_model import (
    RewardModelScorer,
    RewardModelScoring,
    check_gives_rewards,
    check_reward_model,
    compares,
)
from rayrm.scoring.service import (
    ServiceScorer,
    ServiceScoring,
    check_likeness,
    check_service,
    find_revision,
    recall_served,
)
from rayrm.shards import read_schemas

if TYPE_CHECKING:
    from ray.data import Dataset

Scoring = Annotated[
    BleurtScoring
    | RewardModelScoring
    | GrammarScoring
    | LengthScoring
    | ImplicitScoring
    | ServiceScoring
    | CustomScoring,
    Field(discriminator="type"),
]
"""The config of any scorer, told apart by `type`."""
PreferenceScoring = Annotated[
    RewardModelScoring | ImplicitScoring | PairwiseScoring | ServiceScoring | CustomScoring,
    Field(discriminator="type"),
]
"""The config of any scorer of preferences, told apart by `type`."""
READS = ("prompt", "source", "reference", "anchor", "src_lang", "tgt_lang", "lang", "candidates")
"""Columns that every scorer sees, beside `tools` and those that it needs."""

SCORERS: dict[str, Any] = {
    "bleurt": BleurtScorer,
    "reward_model": RewardModelScorer,
    "grammar": GrammarScorer,
    "length": LengthScorer,
    "implicit": ImplicitScorer,
    "service": ServiceScorer,
    "custom": CustomScorer,
}
"""Tag to the class that scores; none loads a model before it is called."""
PREFERENCE_SCORERS: dict[str, Any] = {
    "reward_model": RewardModelScorer,
    "implicit": ImplicitScorer,
    "pairwise": PairwiseScorer,
    "service": ServiceScorer,
    "custom": CustomScorer,
}
"""Tag to the class that tells the better one of two completions, a `PreferenceScorer`."""
CHECKS: dict[str, Any] = {
    "reward_model": check_reward_model,
    "implicit": check_implicit,
    "pairwise": check_pairwise,
    "service": check_service,
    "custom": check_custom,
}
"""Tag to the check of a config and the paths of its rows, before any actor starts."""


def score_candidates(candidates: Dataset, config: Scoring | PreferenceScoring) -> Dataset:
    """Score every candidate of every row; a scorer of preferences serves too, unless it compares.

    Reads the columns `READS`, `tools` and those that the scorer needs. Adds the field `config.name` to the structs
    `scores` and `status`; what other scorers left there stays. Raises ResourceError when the cluster can never hold the
    actors, and ServiceError for a service that cannot be reached.
    """
    revision = find_revision(config) if isinstance(config, ServiceScoring) else None
    workers = config.workers
    cluster.require(workers.num_workers, workers.num_cpus, workers.num_gpus, f"Scorer '{config.name}'")
    return candidates.map_batches(
        ScoreStage, fn_constructor_args=(config, revision), batch_format="pyarrow", batch_size=None, **workers.pool()
    )


def check_scoring(path: str, config: Scoring) -> None:
    """Find out, before any actor starts, whether the rows at `path` can be scored.

    Raises SchemaError when a column is missing without which no row can be scored, ConfigError when another scorer
    has the name already or this one only compares, and what `check_preference_scoring` raises.
    """
    needs = needs_of(config)
    for name, schema in read_schemas(path):
        missing = [column for column in needs if column not in schema.names]
        if missing:
            raise SchemaError(
                f"'{name}' has no column {', '.join(missing)}, which the scorer '{config.type}' compares with."
            )
        kind = schema.field("scores").type if "scores" in schema.names else pa.struct([])
        if not pa.types.is_struct(kind):
            raise SchemaError(f"Column 'scores' of '{name}' is {kind}, and scores are a struct with a field a scorer.")
        if config.name in [field.name for field in kind]:
            raise ConfigError(f"'{name}' has scores named '{config.name}' already; set another scoring.name.")
    if isinstance(config, BleurtScoring):
        check_model(config.model)
    elif isinstance(config, ServiceScoring) and needs:
        check_likeness(config)
    elif not isinstance(config, GrammarScoring | LengthScoring):
        check_preference_scoring(config, [path])
        if isinstance(config, RewardModelScoring):
            check_gives_rewards(config.model)
        elif does_compare(config):
            raise ConfigError(
                f"The scorer '{config.name}' of the type '{config.type}' compares two completions and gives a single "
                "one no score; take another, or evaluate this one on preferences."
            )


def needs_of(config: Scoring) -> tuple[str, ...]:
    """Columns without which a scorer can score no row. Raises ConfigError and ServiceError as `does_compare`."""
    if isinstance(config, CustomScoring):
        return CustomClass(config.scorer).needs
    if isinstance(config, ServiceScoring):
        return recall_served(config).needs
    return tuple(SCORERS[config.type].needs)


def check_preference_scoring(config: PreferenceScoring, paths: Sequence[str] = ()) -> None:
    """Find out, before any actor starts, whether there is what a scorer of preferences needs.

    `paths` hold the rows that are to be rewarded. Raises CheckpointError without a model that can be read, ConfigError
    without a template, a calibration, a class or a served model, and ServiceError when a service cannot be reached.
    """
    CHECKS[config.type](config, paths)


def does_compare(config: PreferenceScoring) -> bool:
    """Whether a scorer of preferences compares two completions, and gives a single one no reward; on the driver.

    Raises as `check_preference_scoring`.
    """
    if isinstance(config, RewardModelScoring):
        return compares(config.model)
    if isinstance(config, ServiceScoring):
        return recall_served(config).compares
    if isinstance(config, CustomScoring):
        return CustomClass(config.scorer).compares
    return isinstance(config, PairwiseScoring)


def model_type_of(config: PreferenceScoring) -> str:
    """What RewardBench calls such a model. Raises as `does_compare`."""
    if isinstance(config, CustomScoring):
        return CustomClass(config.scorer).model_type
    if isinstance(config, ImplicitScoring) and config.ref_model is None:
        return REF_FREE
    return CUSTOM if does_compare(config) else str(PREFERENCE_SCORERS[config.type].model_type)


def load_preference_scorer(config: PreferenceScoring) -> PreferenceScorer:
    """The scorer itself, on the machine where it is to run. Raises as its class does."""
    scorer: PreferenceScorer = PREFERENCE_SCORERS[config.type](config)
    return scorer


class ScoreStage:
    """The scorer of one actor, applied to tables of whole shards; a service must run `revision`."""

    def __init__(self, config: Scoring | PreferenceScoring, revision: str | None = None) -> None:
        self.name = config.name
        scorer = SCORERS[config.type](config)
        if revision is not None:
            # An actor that is started anew must not take the model of a service that was changed since.
            scorer.revision = revision
        self.scorer: Scorer = scorer

    def __call__(self, table: pa.Table) -> pa.Table:
        """Score the rows that are kept; dropped ones get null."""
        table = with_hidden(table)
        kept = table["_kept"].to_pylist()
        further = [name for name in ("tools", *getattr(self.scorer, "needs", ())) if name in table.column_names]
        rows = table.select(list(dict.fromkeys((*READS, *further)))).filter(table["_kept"]).to_pylist()
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

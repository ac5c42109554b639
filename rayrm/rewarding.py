"""Turn scores into rewards: those of one scorer as they are, or those of several as a composition says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from rayrm.composing import Composed, Composition, Key, Unit, compose, with_constants
from rayrm.config import Config
from rayrm.errors import ConfigError, SchemaError
from rayrm.rows import NUMBERS, TEXTS, set_column, with_hidden

if TYPE_CHECKING:
    from ray.data import Dataset


class RewardingConfig(Config):
    """Which scores become rewards, and in what unit."""

    scorer: str | None = None
    """Name of the scorer; left out, the rows must have exactly one."""
    scale: float = Field(1.0, gt=0)
    """Factor from score to reward; 100 makes percent of BLEURT scores."""
    composition: Composition | None = None
    """In the place of scorer and scale: how the scores of several become one reward."""

    @model_validator(mode="after")
    def _is_clear(self) -> Self:
        if self.composition is None:
            return self
        if self.scorer is not None or self.scale != 1.0:
            raise ValueError("scorer and scale are set beside composition, whose parts name scorers and weights")
        if cut := [part.name for part in self.composition.parts if part.unit == "sentences"]:
            raise ValueError(
                f"{', '.join(cut)} wants scores of sentences, and rows have scores of whole texts and spans"
            )
        return self


def reward_candidates(scored: Dataset, config: RewardingConfig) -> Dataset:
    """The scores of one scorer, times `scale`, as rewards, or the composed ones; without a score a reward is null.

    A score that is NaN is none, and in a composition neither is an infinite one; an aspect without one behind a closed
    gate takes no reward away. Reads candidates, scores, and for spans spans. Adds rewards; drops scores, status, spans.
    A row with another number of scores than of candidates is dropped as `unequal_lengths`. Raises ConfigError for a
    calibration that is not there.
    """
    if config.composition is not None:
        config = config.model_copy(update={"composition": with_constants(config.composition)})
    return scored.map_batches(
        reward_table, fn_kwargs={"config": config}, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
    )


def check_rewarding(schema: pa.Schema, config: RewardingConfig, where: str) -> None:
    """Find out whether rows have the scores that make rewards. Raises SchemaError or ConfigError as `choose_scorer`."""
    if config.composition is None:
        choose_scorer(schema, config, where)
        return
    for part in with_constants(config.composition).parts:
        names = _fields(schema, "scores")
        if names and part.scorer not in names:
            raise ConfigError(
                f"rewarding.composition names '{part.scorer}', and {where} has scores of {', '.join(names)} only."
            )
        choose_scorer(schema, RewardingConfig(scorer=part.scorer), where)
        if part.unit == "spans" and part.scorer not in _fields(schema, "spans"):
            raise ConfigError(
                f"{where} has no spans of '{part.scorer}', whose part in rewarding.composition is made of spans."
            )


def choose_scorer(schema: pa.Schema, config: RewardingConfig, where: str) -> str:
    """The name of the scorer to use. Raises SchemaError without scores, ConfigError when the choice is not clear."""
    names = _fields(schema, "scores")
    if not names:
        kind = schema.field("scores").type if "scores" in schema.names else pa.null()
        raise SchemaError(f"Column 'scores' of {where} is {kind}, and rewards need a struct of lists of numbers.")
    if config.scorer is None and len(names) > 1:
        raise ConfigError(f"{where} has scores of {', '.join(names)}; set rewarding.scorer to one of them.")
    name = config.scorer or names[0]
    if name not in names:
        raise ConfigError(f"rewarding.scorer is '{name}', and {where} has scores of {', '.join(names)} only.")
    values = schema.field("scores").type.field(name).type
    if not _is_list(values) or not (pa.types.is_floating(values.value_type) or pa.types.is_integer(values.value_type)):
        raise SchemaError(f"The scores '{name}' of {where} are {values}, and rewards need lists of numbers.")
    return str(name)


def reward_table(table: pa.Table, config: RewardingConfig) -> pa.Table:
    """`reward_candidates` for one table of Scored rows; constants of a composition must have been read."""
    table = with_hidden(table)
    if config.composition is None:
        rewards, equal = _scale(table, config)
    else:
        rewards, equal = _compose(table, config.composition)
    table = _drop(table, pc.invert(pc.fill_null(equal, False)), "unequal_lengths")
    table = set_column(table, "rewards", rewards)
    return table.drop_columns([column for column in ("scores", "status", "spans") if column in table.column_names])


def _scale(table: pa.Table, config: RewardingConfig) -> tuple[pa.Array, pa.ChunkedArray]:
    """Rewards of one scorer, and whether each row has as many as candidates."""
    name = choose_scorer(table.schema, config, "the rows")
    scores = pc.struct_field(table["scores"], name).cast(NUMBERS).combine_chunks()
    sizes = pc.list_value_length(scores)
    ends = np.cumsum(pc.fill_null(sizes, 0).to_numpy(zero_copy_only=False), dtype=np.int32)
    numbers = pc.list_flatten(scores)
    numbers = pc.multiply(pc.if_else(pc.is_nan(numbers), None, numbers), config.scale)
    rewards = pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), numbers)
    return rewards, pc.equal(sizes, pc.list_value_length(table["candidates"]))


def _compose(table: pa.Table, composition: Composition) -> tuple[pa.Array, pa.Array]:
    """As `_scale`, of a composition."""
    columns = [name for name in ("candidates", "scores", "spans") if name in table.column_names]
    rewards = [reward_row(row, composition) for row in table.select(columns).to_pylist()]
    return pa.array(rewards, NUMBERS), pa.array([row is not None for row in rewards])


def reward_row(row: dict[str, Any], composition: Composition) -> list[float | None] | None:
    """The composed reward of each candidate of a Scored row; None where the numbers of scores or spans do not fit."""
    texts = row["candidates"] or []
    listed = {part.key: _listed(row, part.key) for part in composition.parts}
    if any(units is None or len(units) != len(texts) for units in listed.values()):
        return None
    rewards: list[float | None] = []
    for index, text in enumerate(texts):
        text = text or ""
        found = {key: _units(text, key, (units or [])[index]) for key, units in listed.items()}
        composed = compose(text, found, composition)
        rewards.append(composed.total if isinstance(composed, Composed) else None)
    return rewards


def _listed(row: dict[str, Any], key: Key) -> list[Any] | None:
    scorer, kind = key
    listed: list[Any] | None = (row["spans" if kind == "spans" else "scores"] or {}).get(scorer)
    return listed


def _units(text: str, key: Key, found: Any) -> list[Unit] | None:
    if key[1] == "spans":
        return None if found is None else [Unit(each["start"], each["end"], each["score"]) for each in found]
    return [Unit(0, len(text), found)]


def _drop(table: pa.Table, mask: pa.ChunkedArray, reason: str) -> pa.Table:
    mask = pc.and_(mask, table["_kept"])
    if not pc.any(mask).as_py():
        return table
    reasons = zip(table["_dropped"].to_pylist(), mask.to_pylist(), strict=True)
    dropped = pa.array([[*before, reason] if hit else before for before, hit in reasons], TEXTS)
    return set_column(set_column(table, "_dropped", dropped), "_kept", pc.and_not(table["_kept"], mask))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _fields(schema: pa.Schema, column: str) -> list[str]:
    kind = schema.field(column).type if column in schema.names else None
    return [field.name for field in kind] if kind is not None and pa.types.is_struct(kind) else []

"""Turn the scores of one scorer into rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

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


def reward_candidates(scored: Dataset, config: RewardingConfig) -> Dataset:
    """The scores of one scorer, times `scale`, as rewards; a score that is NaN or null is a null reward.

    Reads candidates, scores. Adds rewards; drops scores, status, spans. A row with another number of scores than of
    candidates is dropped as `unequal_lengths`.
    """
    return scored.map_batches(
        reward_table, fn_kwargs={"config": config}, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
    )


def choose_scorer(schema: pa.Schema, config: RewardingConfig, where: str) -> str:
    """The name of the scorer to use. Raises SchemaError without scores, ConfigError when the choice is not clear."""
    kind = schema.field("scores").type if "scores" in schema.names else pa.null()
    if not pa.types.is_struct(kind) or kind.num_fields == 0:
        raise SchemaError(f"Column 'scores' of {where} is {kind}, and rewards need a struct of lists of numbers.")
    names = [field.name for field in kind]
    if config.scorer is None and len(names) > 1:
        raise ConfigError(f"{where} has scores of {', '.join(names)}; set rewarding.scorer to one of them.")
    name = config.scorer or names[0]
    if name not in names:
        raise ConfigError(f"rewarding.scorer is '{name}', and {where} has scores of {', '.join(names)} only.")
    values = kind.field(name).type
    if not _is_list(values) or not (pa.types.is_floating(values.value_type) or pa.types.is_integer(values.value_type)):
        raise SchemaError(f"The scores '{name}' of {where} are {values}, and rewards need lists of numbers.")
    return str(name)


def reward_table(table: pa.Table, config: RewardingConfig) -> pa.Table:
    """`reward_candidates` for one table of Scored rows."""
    table = with_hidden(table)
    name = choose_scorer(table.schema, config, "the rows")
    scores = pc.struct_field(table["scores"], name).cast(NUMBERS).combine_chunks()
    sizes = pc.list_value_length(scores)
    ends = np.cumsum(pc.fill_null(sizes, 0).to_numpy(zero_copy_only=False), dtype=np.int32)
    numbers = pc.list_flatten(scores)
    numbers = pc.multiply(pc.if_else(pc.is_nan(numbers), None, numbers), config.scale)
    rewards = pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), numbers)
    equal = pc.equal(sizes, pc.list_value_length(table["candidates"]))
    table = _drop(table, pc.invert(pc.fill_null(equal, False)), "unequal_lengths")
    table = set_column(table, "rewards", rewards)
    return table.drop_columns([column for column in ("scores", "status", "spans") if column in table.column_names])


def _drop(table: pa.Table, mask: pa.ChunkedArray, reason: str) -> pa.Table:
    mask = pc.and_(mask, table["_kept"])
    if not pc.any(mask).as_py():
        return table
    reasons = zip(table["_dropped"].to_pylist(), mask.to_pylist(), strict=True)
    dropped = pa.array([[*before, reason] if hit else before for before, hit in reasons], TEXTS)
    return set_column(set_column(table, "_dropped", dropped), "_kept", pc.and_not(table["_kept"], mask))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))

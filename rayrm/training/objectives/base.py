"""What all objectives have in common: how a row is rendered, what it costs, what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayrm.config import Config
from rayrm.models.readouts import Encoded, Readout
from rayrm.rows import Message, RowType

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from rayrm.models.rendering import Renderer

Floats = NDArray[np.float64]


class Example(NamedTuple):
    """A row as training sees it."""

    sides: list[Encoded]
    """Token sequences of the row, as many as the objective's `num_sides`."""
    targets: list[float]
    """What is known of the row; NaN where it is not."""


class Measured(NamedTuple):
    """What a model gave to n rows, and what is known of them."""

    outputs: Floats
    """[sides, n, reads, outputs]."""
    targets: Floats
    """[n, targets]; NaN where nothing is known, and behind the last target of a row."""
    losses: Floats
    """[n]."""
    lengths: NDArray[np.int64]
    """Tokens of each side, [sides, n]."""
    languages: NDArray[np.str_]
    """Language or language pair, [n]."""
    subsets: NDArray[np.str_]
    """Subset, or an empty string, [n]."""


class Objective(Config):
    """What is learned from a row."""

    use_weight: bool = True
    """Multiply a row's loss by the row's `weight`, where it has one."""

    rows: ClassVar[RowType]
    """Rows that are learned from."""
    columns: ClassVar[tuple[str, ...]]
    """Columns of them that `encode` reads."""
    num_sides: ClassVar[int] = 1
    """Token sequences of a row."""
    is_batchwise: ClassVar[bool] = False
    """Whether a row's loss hangs on the other rows of its global batch."""

    def check_schema(self, schema: pa.Schema, where: str) -> None:
        """Raise SchemaError unless the rows at `where` hold what is learned."""

    def readout(self, targets: Floats) -> Readout:
        """How the trained model is read; `targets` [n, targets] are those of the training rows."""
        raise NotImplementedError

    def to_units(self, targets: NDArray[np.float32], readout: Readout) -> NDArray[np.float32]:
        """Targets [rows, targets] in the unit of the model's outputs."""
        return targets

    def encode(self, row: Mapping[str, Any], renderer: Renderer) -> Example | str:
        """The row's token sequences and targets, or the reason why it is no use."""
        raise NotImplementedError

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each row, fp32 [rows], of outputs [sides, rows, reads, outputs] and targets [rows, targets]."""
        raise NotImplementedError

    def track(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Numbers of each row, [rows], whose means are logged while training."""
        raise NotImplementedError

    def measure(self, measured: Measured) -> dict[str, float]:
        """Metrics of held-out rows, with names that begin with `eval_`."""
        raise NotImplementedError


def split_side(prompt: Sequence[Message], turns: Sequence[Message]) -> tuple[list[Message], str] | None:
    """All turns but the last as the prompt, and the last one's text; None unless it is the assistant's."""
    if not turns or turns[-1]["role"] != "assistant":
        return None
    return [*prompt, *turns[:-1]], turns[-1]["content"] or ""


def check_pair(row: Mapping[str, Any]) -> list[tuple[list[Message], str]] | str:
    """Prompt and completion of both sides of a Preference row, or the reason why they are no pair."""
    sides = [split_side(row["prompt"], row[name]) for name in ("chosen", "rejected")]
    chosen, rejected = sides
    if chosen is None or rejected is None:
        return "not_ending_in_assistant"
    if not chosen[1].strip() or not rejected[1].strip():
        return "empty_content"
    return "identical_responses" if chosen == rejected else [chosen, rejected]

"""Objectives on single completions with numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from rayrm.errors import SchemaError
from rayrm.models.readouts import LastToken, Ratings, Readout
from rayrm.rows import Rated
from rayrm.training.objectives.base import Example, Floats, Measured, Objective, split_side
from rayrm.training.reward_metrics import measure_ratings, measure_verdicts

if TYPE_CHECKING:
    from torch import Tensor

    from rayrm.models.rendering import Renderer


class _OnRatings(Objective):
    rows: ClassVar = Rated
    columns: ClassVar = ("prompt", "completion", "ratings")

    @property
    def names(self) -> tuple[str, ...]:
        """Ratings that are learned."""
        raise NotImplementedError

    @property
    def is_bounded(self) -> bool:
        """Whether a rating is a probability."""
        raise NotImplementedError

    def check_schema(self, schema: pa.Schema, where: str) -> None:
        """Raise SchemaError unless the rows at `where` have all ratings that are learned."""
        kind = schema.field("ratings").type
        found = [field.name for field in kind] if isinstance(kind, pa.StructType) else []
        missing = [name for name in self.names if name not in found]
        if missing:
            raise SchemaError(
                f"Column 'ratings' of {where} lacks {', '.join(missing)}; it has {', '.join(found) or 'no fields'}."
            )

    def encode(self, row: Mapping[str, Any], renderer: Renderer) -> Example | str:
        """The completion; targets are its ratings, NaN where there is none.

        Reasons: not_ending_in_assistant, empty_content, no_rating, rating_not_in_0_to_1.
        """
        side = split_side(row["prompt"], row["completion"])
        if side is None:
            return "not_ending_in_assistant"
        if not side[1].strip():
            return "empty_content"
        found = row["ratings"] or {}
        values = [math.nan if found.get(name) is None else float(found[name]) for name in self.names]
        values = [value if math.isfinite(value) else math.nan for value in values]
        if all(math.isnan(value) for value in values):
            return "no_rating"
        if self.is_bounded and any(value < 0 or value > 1 for value in values):
            return "rating_not_in_0_to_1"
        return Example([LastToken().encode(renderer, *side)], values)


class Regression(_OnRatings):
    """One output a rating, fitted to what the rows say; ratings that a row does not have bear no loss."""

    type: Literal["regression"] = "regression"
    """Tag of the objective."""
    ratings: tuple[str, ...] = Field(min_length=1)
    """Fields of `ratings` that are learned, in the order of the model's outputs."""
    loss: Literal["mse", "huber", "bce"] = "mse"
    """Squared error, Huber's loss, or the cross-entropy of σ(output) with ratings from 0 to 1."""
    huber_delta: float = Field(1.0, gt=0)
    """Error, in the unit that is learned, from which Huber's loss is linear."""
    standardize: bool = True
    """Learn each rating less its mean and divided by its standard deviation over the training rows (not with bce)."""
    weights: dict[str, float] | None = None
    """Weight of each rating in the reward; null for their mean."""

    @field_validator("ratings")
    @classmethod
    def _are_distinct(cls, ratings: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(ratings)) < len(ratings):
            raise ValueError(f"a rating stands twice in {', '.join(ratings)}")
        return ratings

    @model_validator(mode="after")
    def _weights_are_known(self) -> Regression:
        if unknown := sorted({*(self.weights or {})} - {*self.ratings}):
            raise ValueError(f"weights names {', '.join(unknown)}, which is none of the ratings")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Ratings that are learned."""
        return self.ratings

    @property
    def is_bounded(self) -> bool:
        """Whether a rating is a probability."""
        return self.loss == "bce"

    def readout(self, targets: Floats) -> Readout:
        """All ratings, with the scale of the training rows."""
        num = len(self.ratings)
        means, stds = np.zeros(num), np.ones(num)
        if self.standardize and not self.is_bounded:
            num_known = (~np.isnan(targets)).sum(axis=0)
            missing = [name for name, num_rows in zip(self.ratings, num_known, strict=True) if not num_rows]
            if missing:
                raise SchemaError(f"No training row has the rating {', '.join(missing)}; leave it out of the ratings.")
            means, stds = np.nanmean(targets, axis=0), np.nanstd(targets, axis=0)
            stds[stds == 0] = 1.0
        even = dict.fromkeys(self.ratings, 1 / num)
        weights = tuple((even if self.weights is None else self.weights).get(name, 0.0) for name in self.ratings)
        scale = {"means": tuple(means.tolist()), "stds": tuple(stds.tolist())}
        return Ratings(names=self.ratings, weights=weights, is_logit=self.is_bounded, **scale)

    def to_units(self, targets: NDArray[np.float32], readout: Readout) -> NDArray[np.float32]:
        """Less the mean, divided by the standard deviation."""
        assert isinstance(readout, Ratings)
        found: NDArray[np.float32] = ((targets - np.array(readout.means)) / np.array(readout.stds)).astype(np.float32)
        return found

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the ratings that a row has."""
        from torch.nn import functional

        known = ~targets.isnan()
        found, wanted = outputs[0, :, 0], targets.nan_to_num()
        if self.loss == "mse":
            each = functional.mse_loss(found, wanted, reduction="none")
        elif self.loss == "huber":
            each = functional.huber_loss(found, wanted, reduction="none", delta=self.huber_delta)
        else:
            each = functional.binary_cross_entropy_with_logits(found, wanted, reduction="none")
        losses: Tensor = (each * known).sum(1) / known.sum(1)
        return losses

    def track(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The mean output."""
        return {"output": outputs[0, :, 0].mean(1)}

    def measure(self, measured: Measured) -> dict[str, float]:
        """`measure_ratings`."""
        return measure_ratings(measured, self.ratings, self.is_bounded)


class OutcomeReward(_OnRatings):
    """Whether a completion is right: the cross-entropy of σ(reward) with a rating from 0 to 1 (an ORM)."""

    type: Literal["outcome"] = "outcome"
    """Tag of the objective."""
    rating: str = "correct"
    """Field of `ratings` that says whether the completion is right, or how probably."""

    @property
    def names(self) -> tuple[str, ...]:
        """Ratings that are learned."""
        return (self.rating,)

    @property
    def is_bounded(self) -> bool:
        """Whether a rating is a probability."""
        return True

    def readout(self, targets: Floats) -> Readout:
        """The logit at the last token is the reward."""
        return LastToken()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each row; finite for any logit."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(outputs[0, :, 0, 0], targets[:, 0], reduction="none")

    def track(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Accuracy at a probability of one half, and the reward."""
        logits = outputs[0, :, 0, 0]
        return {"accuracy": ((logits > 0) == (targets[:, 0] > 0.5)).to(logits), "reward": logits}

    def measure(self, measured: Measured) -> dict[str, float]:
        """`measure_verdicts`."""
        return measure_verdicts(measured)

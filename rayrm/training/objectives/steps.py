"""The objective on completions that are judged step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rayrm.models.readouts import Readout, Steps
from rayrm.rows import Stepwise
from rayrm.training.objectives.base import Example, Floats, Measured, Objective
from rayrm.training.reward_metrics import measure_verdicts

if TYPE_CHECKING:
    from torch import Tensor

    from rayrm.models.rendering import Renderer


class ProcessReward(Objective):
    """Whether each step is right (a PRM, arXiv 2312.08935): cross-entropy of a logit at its end, all in one pass."""

    type: Literal["process"] = "process"
    """Tag of the objective."""
    separator: str = Field("\n\n", min_length=1)
    """Text that follows each step; scoring cuts completions there."""
    aggregate: Literal["mean", "min", "product", "last"] = "mean"
    """How the probabilities of the steps become the reward of a completion."""

    rows: ClassVar = Stepwise
    columns: ClassVar = ("prompt", "steps", "labels")

    def readout(self, targets: Floats) -> Readout:
        """A logit at the end of each step."""
        return self._steps

    @property
    def _steps(self) -> Steps:
        return Steps(separator=self.separator, aggregate=self.aggregate)

    def encode(self, row: Mapping[str, Any], renderer: Renderer) -> Example | str:
        """The steps; targets are their labels, NaN where there is none.

        Reasons: unequal_lengths, empty_content, separator_in_step, no_label, label_not_in_0_to_1.
        """
        steps, labels = row["steps"] or [], row["labels"] or []
        if len(steps) != len(labels):
            return "unequal_lengths"
        if not steps or not all((step or "").strip() for step in steps):
            return "empty_content"
        if any(self.separator in step for step in steps):
            # Scoring would find other steps.
            return "separator_in_step"
        values = [math.nan if label is None else float(label) for label in labels]
        if all(math.isnan(value) for value in values):
            return "no_label"
        if any(value < 0 or value > 1 for value in values):
            return "label_not_in_0_to_1"
        return Example([self._steps.encode_steps(renderer, row["prompt"], steps)], values)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the labelled steps of each row; finite for any logit."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        logits = outputs[0, :, :, 0]
        targets = targets[:, : logits.shape[1]]
        known = ~targets.isnan()
        each = binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
        losses: Tensor = (each * known).sum(1) / known.sum(1)
        return losses

    def track(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Share of a row's labelled steps on the right side of one half."""
        logits = outputs[0, :, :, 0]
        targets = targets[:, : logits.shape[1]]
        known = ~targets.isnan()
        hits = ((logits > 0) == (targets > 0.5)) & known
        return {"accuracy": hits.sum(1) / known.sum(1)}

    def measure(self, measured: Measured) -> dict[str, float]:
        """`measure_verdicts` over all labelled steps."""
        return measure_verdicts(measured)

"""Objectives on pairs of completions, each of which gets a reward of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rayrm.models.readouts import Gated, LastToken, Ratings, Readout
from rayrm.rows import Preference
from rayrm.training.objectives.base import Example, Floats, Measured, Objective, check_pair
from rayrm.training.reward_metrics import MeasuredPairs, measure_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from rayrm.models.rendering import Renderer

_ALLOWED = {"margin": (-math.inf, math.inf, "non_finite_margin"), "label": (0.0, 1.0, "label_not_in_0_to_1")}
"""Least and greatest finite number that a row may give, and the reason to drop a pair with any other value."""


class BradleyTerry(Objective):
    """−log σ(r_chosen − r_rejected), the likelihood of the preference under Bradley and Terry's model."""

    type: Literal["bradley_terry"] = "bradley_terry"
    """Tag of the objective."""
    use_margin: bool = False
    """Ask for a gap of at least the row's `margin`: the gap is r_chosen − r_rejected − margin."""
    use_label: bool = False
    """Take the row's `label` for the probability that its chosen side is the better one; without it, that is 1."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be labelled the wrong way round."""
    centering: float = Field(0.0, ge=0)
    """Weight of (r_chosen + r_rejected)², which keeps rewards around 0 (arXiv 2312.09244); 0.01 is a good start."""

    rows: ClassVar = Preference
    columns: ClassVar = ("prompt", "chosen", "rejected")
    num_sides: ClassVar = 2

    def readout(self, targets: Floats) -> Readout:
        """One reward at the last token."""
        return LastToken()

    @property
    def reading(self) -> LastToken | Gated:
        """Where each side is read."""
        return LastToken()

    def encode(self, row: Mapping[str, Any], renderer: Renderer) -> Example | str:
        """The chosen and the rejected side; targets are margin and label.

        Reasons: not_ending_in_assistant, empty_content, identical_responses, non_finite_margin, label_not_in_0_to_1.
        """
        sides = check_pair(row)
        if isinstance(sides, str):
            return sides
        targets = {"margin": 0.0, "label": 1.0}
        for name, (least, greatest, reason) in _ALLOWED.items():
            if getattr(self, f"use_{name}"):
                found = row.get(name)
                if not isinstance(found, int | float) or not math.isfinite(found) or not least <= found <= greatest:
                    return reason
                targets[name] = found
        return Example([self.reading.encode(renderer, *side) for side in sides], list(targets.values()))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of σ(gap) with the smoothed label p: −p log σ(gap) − (1 − p) log σ(−gap); finite for any gap."""
        chosen, rejected = outputs[:, :, 0, 0]
        return self.pair_losses(chosen, rejected, targets)

    def pair_losses(self, chosen: Tensor, rejected: Tensor, targets: Tensor) -> Tensor:
        """Loss of each pair of rewards: fp32 [pairs] of each side → fp32 [pairs]."""
        from torch.nn.functional import logsigmoid

        gap = chosen - rejected - targets[:, 0]
        label = targets[:, 1] * (1 - 2 * self.label_smoothing) + self.label_smoothing
        # log σ(−gap) = log σ(gap) − gap, which keeps the plain loss to one term.
        return -logsigmoid(gap) + (1 - label) * gap + self.centering * (chosen + rejected) ** 2

    def track(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Accuracy (a tie is a miss), margin, and both rewards."""
        chosen, rejected = outputs[:, :, 0, 0]
        gap = chosen - rejected
        return {"accuracy": (gap > 0).to(gap), "margin": gap, "chosen_reward": chosen, "rejected_reward": rejected}

    def measure(self, measured: Measured) -> dict[str, float]:
        """`measure_pairs`."""
        extra = measured.lengths[0] - measured.lengths[1]
        rewards = measured.outputs[:, :, 0, 0]
        return measure_pairs(MeasuredPairs(rewards, measured.losses, extra, measured.languages, measured.subsets))


class Odin(BradleyTerry):
    """Bradley-Terry on the sum of two heads, one of which is made to take all that length explains (arXiv 2402.07319).

    The reward is the quality head's output alone. Length is that of the completion in tokens, and correlations are
    Pearson's over all completions of a global batch.
    """

    type: Literal["odin"] = "odin"  # type: ignore[assignment]
    """Tag of the objective."""
    length_weight: float = Field(1.0, ge=0)
    """Weight of |corr(quality, length)| + 1 − corr(length head, length)."""
    orthogonality: float = Field(1.0, ge=0)
    """Weight of the |cos| between the weights of both heads."""

    is_batchwise: ClassVar = True

    def readout(self, targets: Floats) -> Readout:
        """Both heads; the reward is that of quality."""
        zeros, ones = (0.0, 0.0), (1.0, 1.0)
        return Ratings(names=("quality", "length"), weights=(1.0, 0.0), means=zeros, stds=ones, is_logit=False)

    def encode(self, row: Mapping[str, Any], renderer: Renderer) -> Example | str:
        """As Bradley-Terry; further targets are the tokens of both completions."""
        example, sides = super().encode(row, renderer), check_pair(row)
        if isinstance(example, str) or isinstance(sides, str):
            return example
        return example._replace(targets=[*example.targets, *(_num_tokens(renderer, text) for _, text in sides)])

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of the summed heads, and for every row alike the terms of length over all rows."""
        import torch

        quality, by_length = outputs[:, :, 0].unbind(-1)
        chosen, rejected = quality + by_length
        lengths = targets[:, 2:].T.flatten()
        entangled = correlation(quality.flatten(), lengths).abs() + 1 - correlation(by_length.flatten(), lengths)
        losses: Tensor = self.pair_losses(chosen, rejected, targets) + self.length_weight * torch.as_tensor(entangled)
        return losses


def _num_tokens(renderer: Renderer, text: str) -> float:
    return float(len(renderer.tokenizer(text, add_special_tokens=False)["input_ids"]))


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of two tensors [n]; 0, without a gradient, where one of them has no spread."""
    first, second = first - first.mean(), second - second.mean()
    scale = (first.square().sum() * second.square().sum()).sqrt()
    return (first * second).sum() / scale if scale > 0 else first.sum() * 0.0

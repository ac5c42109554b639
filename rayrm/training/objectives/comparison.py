"""The objective of a language model that compares two completions in its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from rayrm.models.readouts import Comparison, Readout
from rayrm.rows import Preference
from rayrm.training.objectives.base import Example, Floats, Measured, Objective, check_pair
from rayrm.training.reward_metrics import MeasuredPairs, by_slice, measure_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from rayrm.models.rendering import Renderer


class PairwiseComparison(Objective):
    """−log p of the word for the chosen completion, in both orders of the two, as the first token of an answer.

    A language model with a chat template learns it. Each pair is shown twice, with the chosen side as A and as B, so
    that no position is the better one. A question that is longer than max_length always drops its pair.
    """

    type: Literal["comparison"] = "comparison"
    """Tag of the objective."""
    words: tuple[str, str] = ("A", "B")
    """The answers for the first and the second completion; one token each."""

    rows: ClassVar = Preference
    columns: ClassVar = ("prompt", "chosen", "rejected")
    num_sides: ClassVar = 2

    def readout(self, targets: Floats) -> Readout:
        """log p of both words."""
        return Comparison(words=self.words)

    def encode(self, row: Mapping[str, Any], renderer: Renderer) -> Example | str:
        """The question in both orders, the chosen side first in the first one; targets are the tokens of both sides.

        Reasons: not_ending_in_assistant, empty_content, identical_responses, prompt_mismatch.
        """
        sides = check_pair(row)
        if isinstance(sides, str):
            return sides
        (prompt, chosen), (other, rejected) = sides
        if prompt != other:
            return "prompt_mismatch"
        orders = Comparison(words=self.words).encode_both(renderer, prompt, chosen, rejected)
        # Both orders have all tokens of both sides, so they do not say which side is the longer one.
        ids = renderer.tokenizer([chosen, rejected], add_special_tokens=False)["input_ids"]
        return Example(list(orders), [float(len(side)) for side in ids])

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over both orders."""
        return -(outputs[0, :, 0, 0] + outputs[1, :, 0, 1]) / 2

    def track(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Accuracy of the mean of both orders, the share of A, and the probability that both words have together."""
        first, second = outputs[:, :, 0].softmax(-1)
        chosen = (first[:, 0] + second[:, 1]) / 2
        return {
            "accuracy": (chosen > 0.5).to(chosen),
            "first_share": (first[:, 0] + second[:, 0]) / 2,
            "words_mass": outputs[:, :, 0].exp().sum(-1).mean(0),
        }

    def measure(self, measured: Measured) -> dict[str, float]:
        """`measure_pairs` of log p(chosen) and log p(rejected); also the share of A and the mass of both words."""
        first, second = _shares(measured.outputs[0, :, 0]), _shares(measured.outputs[1, :, 0])
        chosen = (first + 1 - second) / 2
        tiny = np.finfo(float).tiny
        rewards = np.log(np.maximum(np.stack([chosen, 1 - chosen]), tiny))
        extra = (measured.targets[:, 0] - measured.targets[:, 1]).astype(np.int64)
        found = measure_pairs(MeasuredPairs(rewards, measured.losses, extra, measured.languages, measured.subsets))
        mass = np.exp(measured.outputs[:, :, 0]).sum(-1).mean(0)
        values = {"first_share": (first + second) / 2, "words_mass": mass}
        for mask, suffix in by_slice(measured.languages, measured.subsets):
            found |= {f"eval_{name}{suffix}": float(value[mask].mean()) for name, value in values.items()}
        return found


def _shares(logs: Floats) -> Floats:
    """p(A) / (p(A) + p(B)) of log-probabilities [n, 2]."""
    shares: Floats = (1 + np.tanh((logs[:, 0] - logs[:, 1]) / 2)) / 2
    return shares

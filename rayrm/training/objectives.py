"""What a reward model learns from its pairs: a config for each objective, and the loss that its tag stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from rayrm.config import Config

if TYPE_CHECKING:
    from torch import Tensor


class BradleyTerry(Config):
    """−log σ(r_chosen − r_rejected), the likelihood of the preference under Bradley and Terry's model."""

    type: Literal["bradley_terry"] = "bradley_terry"
    """Tag of the objective."""
    use_margin: bool = False
    """Ask for a gap of at least the row's `margin`: the gap is r_chosen − r_rejected − margin."""
    use_label: bool = False
    """Take the row's `label` for the probability that its chosen side is the better one; without it, that is 1."""
    use_weight: bool = False
    """Multiply a pair's loss by the row's `weight`; a pair of weight 2 counts like two pairs."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be labelled the wrong way round."""
    centering: float = Field(0.0, ge=0)
    """Weight of (r_chosen + r_rejected)², which keeps rewards around 0 (arXiv 2312.09244); 0.01 is a good start."""


class Targets(NamedTuple):
    """What rows say of their pairs, each an fp32 tensor [pairs]."""

    margin: Tensor
    """The gap that is asked for; 0 unless the objective uses margins."""
    label: Tensor
    """Probability that the chosen side is the better one; 1 unless the objective uses labels."""
    weight: Tensor
    """How often the pair counts; 1 unless the objective uses weights."""


def bradley_terry_loss(objective: BradleyTerry, chosen: Tensor, rejected: Tensor, targets: Targets) -> Tensor:
    """Loss of each pair: fp32 tensors [pairs] → fp32 [pairs]; finite for any gap.

    The cross-entropy of σ(gap) with the smoothed label p: −p log σ(gap) − (1 − p) log σ(−gap).
    """
    from torch.nn.functional import logsigmoid

    gap = chosen - rejected - targets.margin
    label = targets.label * (1 - 2 * objective.label_smoothing) + objective.label_smoothing
    # log σ(−gap) = log σ(gap) − gap, which keeps the plain loss to one term.
    loss = -logsigmoid(gap) + (1 - label) * gap
    return targets.weight * (loss + objective.centering * (chosen + rejected) ** 2)


LOSSES: dict[str, Callable[..., Tensor]] = {"bradley_terry": bradley_terry_loss}
"""Tag to `loss(objective, chosen, rejected, targets)`, all of them per pair and in fp32."""

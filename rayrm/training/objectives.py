"""What a reward model learns from its pairs: a config for each objective, and the loss that its tag stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from rayrm.config import Config

if TYPE_CHECKING:
    from torch import Tensor


class BradleyTerry(Config):
    """−log σ(r_chosen − r_rejected), the likelihood of the preference under Bradley and Terry's model."""

    type: Literal["bradley_terry"] = "bradley_terry"
    """Tag of the objective."""
    use_margin: bool = False
    """Ask for a gap of at least the row's `margin`: −log σ(r_chosen − r_rejected − margin)."""


def bradley_terry_loss(objective: BradleyTerry, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Loss of each pair: three fp32 tensors [pairs] → fp32 [pairs]; finite for any gap."""
    from torch.nn.functional import logsigmoid

    gap = chosen - rejected
    return -logsigmoid(gap - margin if objective.use_margin else gap)


LOSSES: dict[str, Callable[..., Tensor]] = {"bradley_terry": bradley_terry_loss}
"""Tag to `loss(objective, chosen, rejected, margin)`, all of them per pair and in fp32."""

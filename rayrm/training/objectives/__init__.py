"""What a reward model learns from its rows: a config for each objective, told apart by its tag."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rayrm.training.objectives.comparison import PairwiseComparison
from rayrm.training.objectives.gated import GatedRatings
from rayrm.training.objectives.pairs import BradleyTerry, Odin
from rayrm.training.objectives.ratings import OutcomeReward, Regression
from rayrm.training.objectives.steps import ProcessReward

OBJECTIVES = {
    "bradley_terry": BradleyTerry,
    "odin": Odin,
    "regression": Regression,
    "outcome": OutcomeReward,
    "process": ProcessReward,
    "gated": GatedRatings,
    "comparison": PairwiseComparison,
}
"""Tag to objective."""
AnyObjective = Annotated[
    BradleyTerry | Odin | Regression | OutcomeReward | ProcessReward | GatedRatings | PairwiseComparison,
    Field(discriminator="type"),
]
"""The config of any objective."""

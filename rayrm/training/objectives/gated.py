"""The objective of a gate on top of several objectives (ArmoRM, arXiv 2406.12845)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayrm.models.readouts import Gated, Readout
from rayrm.runs import INPUT
from rayrm.training.gating import Gating
from rayrm.training.objectives.base import Floats
from rayrm.training.objectives.pairs import BradleyTerry
from rayrm.training.objectives.ratings import Regression


class GatedRatings(BradleyTerry):
    """Several ratings, each with a linear head, and a gate that weighs them by the prompt.

    The backbone stays as it is. Heads are fitted to `ratings` by ridge regression, the gate to the input's preferences.
    The settings of other trainings (lr, batches, epochs, LoRA, ZeRO) have no effect: `fit` has those of the gate, and
    micro_batch_size is that of the embeddings' passes.
    """

    type: Literal["gated"] = "gated"  # type: ignore[assignment]
    """Tag of the objective."""
    objectives: tuple[str, ...] = Field(min_length=1)
    """Fields of `ratings` that get a head, in the order of the model's scores."""
    ratings: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Rated rows that the heads are fitted to."""
    reference: str | None = Field(None, json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Rated rows on which `fit.verbosity` is taken out of the other scores, their ratings not counted; null for those
    of `ratings`."""
    fit: Gating = Gating()
    """How heads, penalties and gate are fitted."""

    @model_validator(mode="after")
    def _plain_loss(self) -> GatedRatings:
        wanted = [n for n in ("use_margin", "use_label", "label_smoothing", "centering") if getattr(self, n)]
        if wanted:
            raise ValueError(f"a gate is fitted to plain preferences, and knows no {', '.join(wanted)}; leave it out")
        return self

    def readout(self, targets: Floats) -> Readout:
        """All scores, weighed by the gate."""
        return self.reading

    @property
    def reading(self) -> Gated:
        """The end of the prompt, and the last token."""
        return Gated(names=self.objectives)

    @property
    def on_ratings(self) -> Regression:
        """How Rated rows are rendered for the heads."""
        return Regression(ratings=self.objectives, standardize=False)

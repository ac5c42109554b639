"""How much drift from the reference costs: a fixed coefficient, or one that seeks a target."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from rayrm.config import Config

Estimator = Literal["k1", "k2", "k3", "abs"]
MOST_ERROR = 0.2
"""The coefficient follows relative errors up to this one."""


class KLConfig(Config):
    """What keeps the policy near the model that it started from."""

    coefficient: float = Field(0.05, ge=0)
    """What one nat costs, in units of the reward; with a target, at the start. 0 turns the reference off."""
    estimator: Estimator = "k1"
    """What a drawn token tells of the divergence: k1 the log-ratio, k2 half its square, k3 exp(−d) − 1 + d, abs |d|."""
    part_of: Literal["reward", "loss"] = "reward"
    """Whether each token's cost is taken from its reward, or added to the loss, with a gradient of its own."""
    target: float | None = Field(None, gt=0)
    """Nats a completion that the coefficient seeks; null keeps it fixed."""
    horizon: int = Field(10000, ge=1)
    """Samples over which an error of 100 % would change the coefficient e-fold; errors count up to 20 %."""

    @model_validator(mode="after")
    def _agrees(self) -> KLConfig:
        if self.target is not None and not self.coefficient:
            raise ValueError("a coefficient of 0 cannot seek a target; start with a positive one")
        if "horizon" in self.model_fields_set and self.target is None:
            raise ValueError(
                f"a horizon of {self.horizon} does nothing without a target; set target too, or leave it out"
            )
        if self.part_of == "loss" and self.estimator == "k1":
            raise ValueError("the gradient of k1 in the loss is 0 on average; take k2 or k3 there")
        return self

    def adapt(self, coefficient: float, divergence: float, num_samples: int) -> float:
        """The coefficient behind a step of `num_samples` samples, whose mean k1 a completion was `divergence` nats.

        Multiplied by exp(clip(divergence / target − 1, ±0.2) · num_samples / horizon), whose beginning is arXiv
        1909.08593's 1 + …, and which stays positive where a step has more samples than the horizon.
        """
        if self.target is None:
            return coefficient
        error = min(max(divergence / self.target - 1, -MOST_ERROR), MOST_ERROR)
        return coefficient * math.exp(error * num_samples / self.horizon)

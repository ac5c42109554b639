"""Learning rates by step, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from rayrm.config import Config


class Optimization(Config):
    """AdamW with a learning rate that warms up and then follows a schedule."""

    lr: float = Field(1e-5, gt=0)
    """Highest learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after the warmup; the first two end at 0."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; norms and biases never decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are scaled down to this norm."""

    def rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of `step` of `num_steps`, counted from 0."""
        warmup = math.ceil(self.warmup_fraction * num_steps)
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        share = (step - warmup) / (num_steps - warmup)
        factor = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}
        return self.lr * factor[self.schedule]

    def optimizer(self, model: Any) -> Any:
        """AdamW over the parameters of `model` that train."""
        import torch

        trained = [p for p in model.parameters() if p.requires_grad]
        # ZeRO-3 leaves an empty shell of a parameter and keeps its true shape beside it.
        is_matrix = [len(getattr(p, "ds_shape", p.shape)) > 1 for p in trained]
        groups = [
            {"params": [p for p, m in zip(trained, is_matrix, strict=True) if m], "weight_decay": self.weight_decay},
            {"params": [p for p, m in zip(trained, is_matrix, strict=True) if not m], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr)

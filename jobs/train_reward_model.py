"""Train a reward model on Preference, Rated or Stepwise rows inside Ray Train and DeepSpeed.

Writes `<output>/model`, plain Hugging Face files with the chat template and, last, `rayrm.json`. A run that was
killed and is started again goes on from its last state.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rayrm.config import parse_args, run_job
from rayrm.counts import describe_counts
from rayrm.training.reward_model import RewardModelJob, train_reward_model

log = logging.getLogger("rayrm")


class TrainRewardModel(RewardModelJob):
    """A reward model from Preference, Rated or Stepwise rows, as its objective asks."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train the reward model of `argv`, unless it is there."""
    config = parse_args(TrainRewardModel, argv)
    done = train_reward_model(config)
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in done["metrics"].items() if "/" not in name)
    log.info("%s: %s; %s", config.output, describe_counts(done["counts"]), metrics)


if __name__ == "__main__":
    run_job(main)

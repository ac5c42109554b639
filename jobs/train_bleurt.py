"""Fit a small model of BLEURT's architecture on spoilt references, for places without a BLEURT checkpoint.

Writes `<output>/model`, which `score_candidates` and bleurt-pytorch load, with `rayrm.json` written last.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rayrm.config import parse_args, run_job
from rayrm.runs import finish_run, start_run
from rayrm.training.bleurt import BleurtJob, read_references, train_bleurt
from rayrm.training.launch import MARK

log = logging.getLogger("rayrm")


class TrainBleurt(BleurtJob):
    """A BLEURT model from Prompt rows with a reference."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job."""
    config = parse_args(TrainBleurt, argv)
    # Read first, so that rows without references claim no output.
    read_references(config.input, config.training)
    if start_run(config, mark=MARK):
        facts = train_bleurt(config)
        finish_run(config, facts, mark=MARK)
        log.info("%s: held-out correlation %s", config.output, facts["metrics"])


if __name__ == "__main__":
    run_job(main)

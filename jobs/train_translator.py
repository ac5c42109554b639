"""Train a small model of NLLB's architecture on parallel rows, for places without an NLLB checkpoint.

Writes `<output>/model`, which `translate_preferences` loads, with `rayrm.json` written last, and prints how well it
translates held-out rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rayrm import files
from rayrm.config import parse_args, run_job
from rayrm.runs import finish_run, start_run
from rayrm.training.launch import MARK
from rayrm.training.translator import TranslatorJob, describe_metrics, read_pairs, train_translator

log = logging.getLogger("rayrm")


class TrainTranslator(TranslatorJob):
    """An NLLB model from Prompt rows with a source and a reference."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job."""
    config = parse_args(TrainTranslator, argv)
    # Read first, so that rows without translations claim no output.
    read_pairs(config.input, config.training)
    if start_run(config, mark=MARK):
        finish_run(config, train_translator(config), mark=MARK)
    done = files.read_json(files.join(config.output, MARK))
    log.info("%s: %s steps on %s pairs", config.output, f"{done['steps']:,}", f"{done['num_pairs']:,}")
    print(describe_metrics(done["metrics"]))


if __name__ == "__main__":
    run_job(main)

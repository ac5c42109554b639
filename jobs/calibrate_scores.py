"""Measure how the scores of a policy's own samples lie: the constants that a composed reward is normalised by.

Takes Scored rows of what the start policy samples. Mean and standard deviation of each scorer stand in `run.json`, over
all texts and by language; `calibration` of a part of a composition reads those over all texts. So does what the scorers
were, as score_candidates says it: a run with another scorer refuses these numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pydantic import Field

from rayrm import files
from rayrm.config import NOT_IDENTITY, Config, parse_args, run_job
from rayrm.evaluation.report import format_table
from rayrm.evaluation.scores import COLUMNS, check_scores, measure_scores, scores_table
from rayrm.runs import INPUT, finish_run, start_run
from rayrm.scoring.identity import known_scorers
from rayrm.scoring.reward_model import Calibration
from rayrm.shards import iter_tables

log = logging.getLogger("rayrm")


class CalibrateScores(Config):
    """Scored rows whose scores are measured."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Output folder of score_candidates, or a parquet, JSONL or CSV file or folder with the same columns."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for `run.json`, which holds the numbers."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises SchemaError without scores, and EvaluationError for a scorer whose scores have no spread."""
    config = parse_args(CalibrateScores, argv)
    check_scores(config.input)
    if start_run(config):
        measured = measure_scores(iter_tables(config.input, COLUMNS), files.fingerprint(config.input))
        scores = {name: calibration.model_dump() for name, calibration in measured.scores.items()}
        scorers = known_scorers(config.input)
        if unknown := sorted(scores.keys() - scorers.keys()):
            log.warning(
                "'%s' does not say what scored %s, and no policy can be trained with these numbers by their path; score "
                "with score_candidates, or set mean and std.",
                config.input,
                ", ".join(unknown),
            )
        finish_run(config, {"scores": scores, "scorers": scorers, "num_unscored": measured.num_unscored})
    done = files.read_json(files.join(config.output, files.RUN_MARK))
    known = {name: Calibration(**own) for name, own in done["scores"].items()}
    print(f"\n{format_table(scores_table(known))}", flush=True)


if __name__ == "__main__":
    run_job(main)

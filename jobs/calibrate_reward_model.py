"""Measure how a reward model's raw rewards lie on preferences, and keep mean and standard deviation in its checkpoint.

Both sides of every row count, over all rows and by language. Scoring and evaluation use the numbers where
`calibration` says so. The rewards stay in `<output>/rows`; a run that was killed goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rayrm import files
from rayrm.config import parse_args, run_job
from rayrm.evaluation.calibration import (
    COLUMNS,
    CalibratingJob,
    calibration_table,
    check_calibrating,
    measure_calibration,
    store_calibration,
)
from rayrm.evaluation.preferences import RewardedPreference
from rayrm.evaluation.report import format_table
from rayrm.evaluation.rewarding import RewardingJob, reward_preferences
from rayrm.rows import Preference
from rayrm.runs import finish_run, start_run, transform_rows
from rayrm.scoring.reward_model import Calibration
from rayrm.shards import iter_tables


class CalibrateRewardModel(CalibratingJob):
    """A reward model and the preferences whose rewards it is calibrated by."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job. Raises EvaluationError when too many rewards failed or they have no spread."""
    config = parse_args(CalibrateRewardModel, argv)
    check_calibrating(config)
    if start_run(config):
        calibration, num_unscored = calibrate(config)
        finish_run(config, {"calibration": calibration.model_dump(), "num_unscored": num_unscored})
    done = files.read_json(files.join(config.output, files.RUN_MARK))
    calibration = Calibration(**done["calibration"])
    # Behind the run's own mark: a run that is killed in between writes it when it is started again.
    store_calibration(config.reward_model.model, calibration)
    print(f"\n{format_table(calibration_table(calibration))}", flush=True)


def calibrate(config: CalibrateRewardModel) -> tuple[Calibration, int]:
    """Reward the rows into `<output>/rows`; the calibration by them, and how many rewards are null."""
    output = files.join(config.output, "rows")
    values = {field: getattr(config, field) for field in RewardingJob.model_fields}
    job = RewardingJob(**{**values, "output": output})
    stage = partial(reward_preferences, config=job)
    done = transform_rows(job, Preference, RewardedPreference, stage, {job.reward_model.name: job.max_failed_fraction})
    return measure_calibration(iter_tables(output, COLUMNS), done["inputs"]["input"])


if __name__ == "__main__":
    run_job(main)

"""Train a reward model from preferences: what may be set, what is checked first, and the start."""

from __future__ import annotations

import sys
from typing import Any, Literal

from rayrm import cluster, files
from rayrm.errors import RayRMError
from rayrm.models.folders import check_model
from rayrm.rows import Preference
from rayrm.runs import abandon_run, finish_run, start_run
from rayrm.training.launch import MARK, MODEL, launch
from rayrm.training.objectives import BradleyTerry
from rayrm.training.settings import Training, TrainingJob
from rayrm.training.tracking import check_tracker


class RewardTraining(Training):
    """Learn to give the chosen side of each pair a higher reward than the rejected one; a row is a pair.

    The model to start from is a causal language model, which gets a new head, or a reward model. Scoring keeps to
    max_length too. The last step of an epoch takes what is left, and results do not hang on micro_batch_size.
    """

    objective: BradleyTerry = BradleyTerry()
    """What is learned from a pair."""
    on_overlength: Literal["drop", "truncate_prompt_left", "error"] = "drop"
    """What becomes of a pair with a longer side; a completion that is too long by itself always drops its pair."""


class RewardModelJob(TrainingJob):
    """From Preference rows to a reward model's checkpoint."""

    training: RewardTraining
    """What is trained, and how."""


def train_reward_model(config: RewardModelJob) -> dict[str, Any]:
    """Train into `<output>/model`, verify it in a process of its own, mark it complete, and return the mark.

    The mark holds the objective, the rendering, the counts, the metrics, and up to 16 probe rows with their rewards.
    Raises SchemaError when the input is no file of Preference rows or nothing of it is left, ConfigError when the
    tracker is not installed or the template is none, ResourceError when the cluster can never hold the workers, and
    CheckpointError when there is no model or no template, or training or saving fails.
    """
    what = f"Training into '{config.output}'"
    if not files.exists(files.join(config.output, MARK)):
        _check_job(config)
        cluster.require(config.workers.num_workers, config.workers.num_cpus, config.workers.num_gpus, what)
    if start_run(config, mark=MARK):
        finish_run(config, _train(config, what), mark=MARK)
    done: dict[str, Any] = files.read_json(files.join(config.output, MARK))
    return done


def _check_job(config: RewardModelJob) -> None:
    """All that needs no cluster, so that a config that cannot work claims no output."""
    from rayrm.training.preferences import check_renderer

    check_tracker(config.report_to)
    Preference.check_files(config.input)
    check_model(config.training.model)
    check_renderer(config.training)


def _train(config: RewardModelJob, what: str) -> dict[str, Any]:
    from rayrm.training.preferences import render_preferences
    from rayrm.training.probes import check_saved
    from rayrm.training.reward_loop import train_loop

    try:
        rendered = render_preferences(config.input, config.output, config.training)
    except RayRMError:
        # What must change is part of what the output was claimed for.
        abandon_run(config)
        raise
    given = {"job": config.model_dump(), "probe": rendered["probe"], "show_progress": sys.stderr.isatty()}
    facts = launch(train_loop, given, config.output, config.workers, what)
    rendering = {
        "chat_template": "none" if config.training.chat_template == "none" else None,
        "max_length": config.training.max_length,
        "fingerprint": rendered["fingerprint"],
    }
    precision = "bf16" if config.parallelism.uses_bf16(config.workers.num_gpus) else "fp32"
    check_saved(files.join(config.output, MODEL), rendering, facts["probe"], precision, config.workers)
    return {
        "objective": config.training.objective.model_dump(),
        "rendering": rendering,
        "counts": rendered["counts"],
        **facts,
    }

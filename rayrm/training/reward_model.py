"""Train a reward model from preferences: what may be set, what is checked first, and the start."""

from __future__ import annotations

import sys
from typing import Any, Literal

from pydantic import Field

from rayrm import cluster, files
from rayrm.config import NOT_IDENTITY, Config
from rayrm.errors import RayRMError, SchemaError
from rayrm.models.folders import check_model
from rayrm.rows import Preference
from rayrm.runs import INPUT, STARTED, finish_run, start_run
from rayrm.shards import list_shards, read_shard
from rayrm.training.launch import MARK, MODEL, Parallelism, TrainingWorkers, launch
from rayrm.training.objectives import BradleyTerry
from rayrm.training.optimization import Optimization
from rayrm.training.policy import LowRank
from rayrm.training.tracking import ReportTo, check_tracker


class RewardTraining(Optimization):
    """Learn to give the chosen side of each pair a higher reward than the rejected one."""

    model: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id to start from: a causal language model, which gets a new head, or a reward model."""
    chat_template: str | None = None
    """A packaged template, a .jinja file, or none; null takes the tokenizer's own. It is saved with the model."""
    max_length: int = Field(1024, ge=8)
    """Most tokens of a prompt with one completion; scoring keeps to it too."""
    on_overlength: Literal["drop", "truncate_prompt_left", "error"] = "drop"
    """What becomes of a pair with a longer side; a completion that is too long by itself always drops its pair."""
    objective: BradleyTerry = BradleyTerry()
    """What is learned from a pair."""
    attn_implementation: str | None = None
    """Attention of transformers: sdpa, eager, flash_attention_2 and others; null lets transformers choose."""
    lora: LowRank | None = None
    """Train LoRA updates and the whole head; null trains every weight."""
    held_out_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the groups that is never trained on, and evaluated."""
    eval_steps: int = Field(100, ge=1)
    """Steps between evaluations of the held-out pairs; they are evaluated once more at the end."""
    num_epochs: float = Field(1.0, gt=0)
    """Passes over the pairs."""
    max_steps: int | None = Field(None, ge=1)
    """Steps at which training ends, whatever num_epochs says."""
    global_batch_size: int = Field(64, ge=1)
    """Pairs a step, of all workers together; the last step of an epoch takes what is left."""
    micro_batch_size: int = Field(8, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Pairs a forward pass of one worker at the most; halved when memory runs out. Results do not hang on it."""
    seed: int = 0
    """Seed of the split, of the order of pairs, and of a new head."""


class RewardModelJob(Config):
    """From preferences to a reward model's checkpoint."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Preference rows."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for `model/` with its `rayrm.json`, `state/`, `logs/`, `metrics.jsonl` and `loss.png`."""
    training: RewardTraining
    """What is trained, and how."""
    workers: TrainingWorkers = Field(TrainingWorkers(), json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """The processes that train together."""
    parallelism: Parallelism = Parallelism()
    """How DeepSpeed shares the work of one step."""
    save_steps: int = Field(500, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Steps between states to resume from; the last two stay."""
    log_steps: int = Field(10, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Steps between records of the training loss."""
    report_to: ReportTo = Field("tensorboard", json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Where records go besides metrics.jsonl."""


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
    shards = list_shards(config.input, 1 << 62)
    if not shards:
        raise SchemaError(f"'{config.input}' holds no rows; training needs at least one.")
    Preference.check(read_shard(shards[0], limit=1).schema, f"'{config.input}'")
    check_model(config.training.model)
    check_renderer(config.training)


def _train(config: RewardModelJob, what: str) -> dict[str, Any]:
    from rayrm.training.preferences import render_preferences
    from rayrm.training.probes import check_saved
    from rayrm.training.reward_loop import train_loop

    try:
        rendered = render_preferences(config.input, config.output, config.training)
    except RayRMError:
        # Nothing was written yet, and what must change is part of what the output was claimed for.
        fs, inner = files.filesystem(files.join(config.output, STARTED))
        fs.rm(inner)
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

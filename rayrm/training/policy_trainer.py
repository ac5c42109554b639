"""What all ways to train a policy by a transformers Trainer share, as each Ray Train worker runs it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from datasets.utils.tqdm import disable_progress_bars
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from rayrm import files
from rayrm.models.rendering import Renderer
from rayrm.training.checkpoints import publish
from rayrm.training.curves import write_curves
from rayrm.training.launch import deepspeed_config, prepare_worker, start_deepspeed
from rayrm.training.memory import fitting_micro_batch, halved_when_out_of_memory
from rayrm.training.order import LengthGrouped
from rayrm.training.policy_model import export_policy, load_tokenizer
from rayrm.training.states import ReportStates, last_state
from rayrm.training.tracking import LOGS, set_places

if TYPE_CHECKING:
    from rayrm.training.policy import PolicyJob, PolicyTraining

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
FACTS = ("loss", "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
"""Metrics whose last value stands in the facts of a run."""

Build = Callable[["PolicyJob", dict[str, Any], Renderer], tuple[Any, dict[str, Any]]]
"""`(job, settings, renderer) → (the trainer with its model and rows, how many rows went where)`. `settings` are those of
`common_settings`; what is made of them must be made before the model, which ZeRO-3 partitions while it loads."""


class InOrder:
    """Put before a transformers Trainer: our order of rows, and states that hold DeepSpeed's parts alone."""

    def row_lengths(self) -> list[int]:
        """Tokens of each row to train on."""
        raise NotImplementedError

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> LengthGrouped:
        args = self.args
        rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._order = LengthGrouped(self.row_lengths(), rows_per_step, args.seed)
        return self._order

    def _run_epoch(self: Any, **kwargs: Any) -> None:
        self._order.set_epoch(kwargs["epoch"])
        # A run that is resumed behind its last step has nothing left to train.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: a state holds DeepSpeed's parts alone, and the finished model is gathered and verified."""


def run_training(config: dict[str, Any], build: Build) -> dict[str, Any]:
    """Train, evaluate and export on one worker; the facts of the run on rank 0."""
    job: PolicyJob = config["job"]
    num_workers, training = job.workers.num_workers, cast("PolicyTraining", job.training)
    prepare_worker(job.workers.num_cpus, use_gpu=job.workers.num_gpus > 0)
    start_deepspeed(use_gpu=job.workers.num_gpus > 0)
    if not config["show_progress"]:
        disable_progress_bar()
        disable_progress_bars()
    micro_batch = fitting_micro_batch(job.output, training.micro_batch_size)
    rows_per_worker = training.global_batch_size // num_workers
    with (
        TemporaryDirectory() as scratch,
        last_state(num_workers) as state,
        halved_when_out_of_memory(job.output, micro_batch, rows_per_worker),
    ):
        _set_trackers(job, scratch)
        settings = common_settings(job, micro_batch, scratch, config["show_progress"])
        tokenizer = load_tokenizer(training, config["template"])
        renderer = Renderer(tokenizer, config["template"], training.max_length)
        trainer, counts = build(job, settings, renderer)
        trainer.add_callback(ReportStates(job.output, num_workers))
        if not config["show_progress"]:
            trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=state)
        export_policy(training, trainer, renderer, job.output)
        if dist.get_rank() == 0:
            write_curves(trainer.state.log_history, job.output)
            if "://" in job.output and (Path(scratch) / LOGS).exists():
                publish(Path(scratch) / LOGS, files.join(job.output, LOGS))
    history = trainer.state.log_history
    return {
        "objective": job.training.type,
        "rendering": renderer.fingerprint(),
        "counts": counts,
        "steps": trainer.state.global_step,
        "micro_batch_size": micro_batch,
        **{name: record[name] for record in history for name in FACTS if name in record},
    }


def common_settings(job: PolicyJob, micro_batch: int, scratch: str, show_progress: bool) -> dict[str, Any]:
    """The settings of `job` in transformers' words, for steps of the same global batch with any micro batch."""
    training, parallelism = job.training, job.parallelism
    accumulation = training.global_batch_size // (micro_batch * job.workers.num_workers)
    bf16 = parallelism.uses_bf16(job.workers.num_gpus)
    return {
        # Each worker has its own folder, and reports its own files.
        "output_dir": scratch,
        "run_name": job.output,
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "deepspeed": deepspeed_config(parallelism, micro_batch, accumulation, bf16, training.max_grad_norm),
        "bf16": bf16,
        "use_cpu": not job.workers.num_gpus,
        "gradient_checkpointing": parallelism.gradient_checkpointing,
        "learning_rate": training.lr,
        "lr_scheduler_type": SCHEDULES[training.schedule],
        "warmup_steps": training.warmup_fraction,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "num_train_epochs": training.num_epochs,
        "max_steps": training.max_steps or -1,
        "eval_strategy": "steps" if training.held_out_fraction else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": "steps",
        "save_steps": job.save_steps,
        "logging_steps": job.log_steps,
        "report_to": job.report_to,
        "disable_tqdm": not show_progress,
        "dataloader_pin_memory": job.workers.num_gpus > 0,
        "seed": training.seed,
    }


def _set_trackers(job: PolicyJob, scratch: str) -> None:
    """Where trackers put their files, unless the environment says it; URLs get them at the end."""
    folder = Path(scratch if "://" in job.output else job.output) / LOGS
    if job.report_to != "none":
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder))
    set_places(str(folder))

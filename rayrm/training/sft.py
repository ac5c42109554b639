"""Supervised fine-tuning by TRL's SFTTrainer, as each Ray Train worker runs it."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import pyarrow.compute as pc
import torch
import torch.distributed as dist
from datasets.utils.tqdm import disable_progress_bars
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rayrm import files
from rayrm.models.rendering import Renderer
from rayrm.training.checkpoints import publish
from rayrm.training.curves import write_curves
from rayrm.training.examples import IGNORED, read_examples
from rayrm.training.launch import deepspeed_config, prepare_worker, start_deepspeed
from rayrm.training.memory import fitting_micro_batch, halved_when_out_of_memory
from rayrm.training.order import LengthGrouped
from rayrm.training.policy_model import export_policy, load_policy, load_tokenizer
from rayrm.training.states import ReportStates, last_state
from rayrm.training.tracking import LOGS, set_places

if TYPE_CHECKING:
    from rayrm.training.policy import PolicyJob

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class PolicyTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with our order of rows and, on a CPU, an output layer that sees only tokens that bear loss.

    TRL leaves the other tokens out on GPUs only, and computes the output layer twice.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bears_loss: torch.Tensor | None = None
        if self.args.use_cpu:
            model: Any = self.model
            model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        if self._bears_loss is None:
            return None
        return (inputs[0][:, :-1][self._bears_loss].unsqueeze(0),)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The summed cross-entropy of all tokens that bear loss, over their number in the whole step."""
        if return_outputs or not self.args.use_cpu:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = inputs["labels"][:, 1:]
        self._bears_loss = targets != IGNORED
        targets = targets[self._bears_loss]
        try:
            logits = model(**{name: x for name, x in inputs.items() if name != "labels"}, use_cache=False).logits[0]
        finally:
            self._bears_loss = None
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        if num_items_in_batch is None:
            return loss / max(1, len(targets))
        # DeepSpeed averages over workers, and the number counts the tokens of all of them.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args, rows = self.args, cast(Any, self.train_dataset)
        rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = pc.list_value_length(rows.data["input_ids"]).to_pylist()
        self._order = LengthGrouped(lengths, rows_per_step, args.seed)
        return self._order

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        self._order.set_epoch(kwargs["epoch"])
        # A run that is resumed behind its last step has nothing left to train.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: a state holds DeepSpeed's parts alone, and the finished model is gathered and verified."""


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Train, evaluate and export on one worker; the facts of the run on rank 0."""
    job: PolicyJob = config["job"]
    num_workers, training = job.workers.num_workers, job.training
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
        # Made before the model, which ZeRO-3 partitions while it loads.
        args = training_arguments(job, micro_batch, scratch, config["show_progress"])
        tokenizer = load_tokenizer(training, config["template"])
        renderer = Renderer(tokenizer, config["template"], training.max_length)
        trainer, counts = build_trainer(job, args, renderer)
        trainer.train(resume_from_checkpoint=state)
        export_policy(training, trainer, renderer, job.output)
        if dist.get_rank() == 0:
            write_curves(trainer.state.log_history, job.output)
            if "://" in job.output and (Path(scratch) / LOGS).exists():
                publish(Path(scratch) / LOGS, files.join(job.output, LOGS))
    history = trainer.state.log_history
    losses: dict[str, Any] = {key: record[key] for record in history for key in ("loss", "eval_loss") if key in record}
    return {
        "objective": training.type,
        "rendering": renderer.fingerprint(),
        "counts": counts,
        "steps": trainer.state.global_step,
        "micro_batch_size": micro_batch,
        **losses,
    }


def build_trainer(job: PolicyJob, args: SFTConfig, renderer: Renderer) -> tuple[PolicyTrainer, dict[str, Any]]:
    """The trainer with its model and rows, and how many rows went where."""
    training = job.training
    train, held_out, counts = read_examples(job.input, renderer, training.held_out_fraction, training.seed)
    if training.packing:
        train = pack_dataset(train, training.max_length)
        held_out = pack_dataset(held_out, training.max_length) if held_out is not None else None
    trainer = PolicyTrainer(
        model=load_policy(training, renderer.tokenizer, bool(args.bf16), training.load_in_8bit),
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=renderer.tokenizer,
        callbacks=[ReportStates(job.output, job.workers.num_workers)],
    )
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    return trainer, counts


def training_arguments(job: PolicyJob, micro_batch: int, scratch: str, show_progress: bool) -> SFTConfig:
    """The settings of `job` in TRL's words, for steps of the same global batch with any micro batch."""
    training, parallelism = job.training, job.parallelism
    accumulation = training.global_batch_size // (micro_batch * job.workers.num_workers)
    bf16 = parallelism.uses_bf16(job.workers.num_gpus)
    return SFTConfig(
        # Each worker has its own folder, and reports its own files.
        output_dir=scratch,
        run_name=job.output,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        deepspeed=deepspeed_config(parallelism, micro_batch, accumulation, bf16, training.max_grad_norm),
        bf16=bf16,
        use_cpu=not job.workers.num_gpus,
        gradient_checkpointing=parallelism.gradient_checkpointing,
        learning_rate=training.lr,
        lr_scheduler_type=SCHEDULES[training.schedule],
        warmup_steps=training.warmup_fraction,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        num_train_epochs=training.num_epochs,
        max_steps=training.max_steps or -1,
        max_length=training.max_length,
        packing=training.packing,
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="steps" if training.held_out_fraction else "no",
        eval_steps=training.eval_steps,
        save_strategy="steps",
        save_steps=job.save_steps,
        logging_steps=job.log_steps,
        report_to=job.report_to,
        disable_tqdm=not show_progress,
        dataloader_pin_memory=job.workers.num_gpus > 0,
        seed=training.seed,
    )


def _set_trackers(job: PolicyJob, scratch: str) -> None:
    """Where trackers put their files, unless the environment says it; URLs get them at the end."""
    folder = Path(scratch if "://" in job.output else job.output) / LOGS
    if job.report_to != "none":
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder))
    set_places(str(folder))

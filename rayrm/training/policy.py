"""Train a policy from rows: what may be set, what is checked before anything starts, and the start."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from rayrm.config import NOT_IDENTITY, Config
from rayrm.errors import CheckpointError, ConfigError, SchemaError
from rayrm.models.folders import check_model, load_tokenizer
from rayrm.models.rendering import load_template
from rayrm.rows import Prompt
from rayrm.runs import INPUT
from rayrm.shards import list_shards, read_shard, read_table
from rayrm.splits import is_held_out
from rayrm.training.launch import Parallelism, TrainingWorkers, launch
from rayrm.training.memory import fitting_micro_batch
from rayrm.training.tracking import ReportTo, check_tracker


class LowRank(Config):
    """LoRA (arXiv 2106.09685): train small matrices beside frozen ones; they are merged into the saved model."""

    r: int = Field(16, ge=1)
    """Rank of the update of each matrix."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of inputs of the update that training leaves out."""
    targets: str | list[str] = "all-linear"
    """Names of the layers that get an update; all-linear is every linear layer but the output embeddings."""


class SupervisedFinetuning(Config):
    """Learn to write each row's reference behind its prompt; only the reference's tokens bear loss."""

    type: Literal["sft"] = "sft"
    """What kind of training this is."""
    model: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id of the causal language model to start from."""
    chat_template: str | None = None
    """A packaged template, a .jinja file, or none; null takes the tokenizer's own. It is saved with the model."""
    added_special_tokens: list[str] = Field(default_factory=list)
    """Tokens that the tokenizer is to have, such as <|im_start|> and <|im_end|>; the embeddings grow as needed."""
    attn_implementation: str | None = None
    """Attention of transformers: sdpa, eager, flash_attention_2 and others; null lets transformers choose."""
    lora: LowRank | None = None
    """Train LoRA updates; null trains every weight."""
    load_in_8bit: bool = False
    """Hold the frozen weights in 8 bits (bitsandbytes); with LoRA, on GPUs, up to ZeRO-2."""
    max_length: int = Field(1024, ge=8)
    """Most tokens of prompt and reference; longer prompts lose their beginning, too long references their row."""
    packing: bool = False
    """Lay rows end to end up to max_length, each blind to the others; efficient with a flash attention."""
    held_out_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the groups that is never trained on, and evaluated."""
    eval_steps: int = Field(100, ge=1)
    """Steps between evaluations of the held-out rows; they are evaluated once more at the end."""
    lr: float = Field(7e-6, gt=0)
    """Highest learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after the warmup; the first two end at 0."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are scaled down to this norm."""
    num_epochs: float = Field(1.0, gt=0)
    """Passes over the rows."""
    max_steps: int | None = Field(None, ge=1)
    """Steps at which training ends, whatever num_epochs says."""
    global_batch_size: int = Field(64, ge=1)
    """Rows a step, of all workers together (with packing: rows laid end to end)."""
    micro_batch_size: int = Field(8, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Rows a forward pass of one worker; halved when memory runs out. The rest of a step is accumulated."""
    seed: int = 0
    """Seed of the split, of the order of rows, of dropout and of new weights."""

    @model_validator(mode="after")
    def _eight_bits(self) -> SupervisedFinetuning:
        if self.load_in_8bit and self.lora is None:
            raise ValueError("load_in_8bit holds weights that cannot be trained; set lora too")
        return self


class PolicyJob(Config):
    """From rows to a policy's checkpoint."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Prompt rows with a reference."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for `model/` with its `rayrm.json`, `state/`, `logs/`, `metrics.jsonl` and `loss.png`."""
    training: SupervisedFinetuning
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
    """Where records go besides metrics.jsonl; files lie in `<output>/logs` unless the environment says otherwise."""
    hub_id: str | None = Field(None, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Repository `owner/name` on the model hub that the finished model is pushed to; it is made private."""

    @model_validator(mode="after")
    def _fits_together(self) -> PolicyJob:
        training, workers = self.training, self.workers
        rows = training.micro_batch_size * workers.num_workers
        if training.global_batch_size % rows:
            raise ValueError(
                f"global_batch_size {training.global_batch_size} is no multiple of micro_batch_size "
                f"{training.micro_batch_size} × {workers.num_workers} workers"
            )
        if training.load_in_8bit and not workers.num_gpus:
            raise ValueError("load_in_8bit needs GPUs; set workers.num_gpus=1")
        if training.load_in_8bit and self.parallelism.zero_stage == 3:
            raise ValueError("8-bit weights cannot be partitioned; set parallelism.zero_stage to 2 or less")
        return self


def finetune(config: dict[str, Any]) -> dict[str, Any]:
    """The loop of `sft`."""
    from rayrm.training.sft import train_loop

    return train_loop(config)


LOOPS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"sft": finetune}
"""What each worker runs, by the tag of `training`."""


def train_policy(job: PolicyJob, template: str | None) -> dict[str, Any]:
    """Train into `<output>/model` and return the facts of the run; the mark is left to the caller.

    `template` is what `check_policy` gave. When memory runs out, training goes on from the last state with half the
    micro batch. Raises CheckpointError when training fails for good, and ResourceError when the cluster can never hold
    the workers.
    """
    config = {"job": job, "template": template, "show_progress": sys.stderr.isatty()}
    what = f"training into '{job.output}'"
    while True:
        before = fitting_micro_batch(job.output, job.training.micro_batch_size)
        try:
            return launch(LOOPS[job.training.type], config, job.output, job.workers, what)
        except CheckpointError:
            if fitting_micro_batch(job.output, job.training.micro_batch_size) == before:
                raise


def check_policy(job: PolicyJob) -> str | None:
    """The text of the chat template, after all that can be checked before workers start.

    Raises SchemaError when the rows have no references, CheckpointError when there is no model or no template, and
    ConfigError when a held-out share holds out nothing, or when 8-bit loading or the tracker is not installed.
    """
    check_tracker(job.report_to)
    shards = list_shards(job.input, 1 << 62)
    if not shards:
        raise SchemaError(f"'{job.input}' holds no rows; training needs at least one.")
    schema = read_shard(shards[0], limit=1).schema
    Prompt.check(schema, f"'{job.input}'")
    if "reference" not in schema.names:
        raise SchemaError(f"'{job.input}' lacks the column reference, which a policy learns to write.")
    _check_split(job.input, job.training)
    if job.training.load_in_8bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("load_in_8bit needs bitsandbytes, which is not installed; pip install 'rayrm[gpu]'.")
    path = job.training.model
    check_model(path)
    return load_template(job.training.chat_template, load_tokenizer(path), path)


def _check_split(path: str, training: SupervisedFinetuning) -> None:
    if not training.held_out_fraction:
        return
    groups = read_table(path, ["group"])["group"].unique().to_pylist()
    held_out = sum(is_held_out(group, training.held_out_fraction, training.seed) for group in groups)
    if not 0 < held_out < len(groups):
        raise ConfigError(
            f"held_out_fraction {training.held_out_fraction:g} holds out {held_out} of the {len(groups)} groups of "
            f"'{path}', and both sides need some; choose another, or set it to 0."
        )

"""Train a policy from rows: what may be set, what is checked before anything starts, and the start."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from rayrm.config import NOT_IDENTITY
from rayrm.errors import ConfigError, SchemaError
from rayrm.models.folders import check_model, load_tokenizer
from rayrm.models.rendering import load_template
from rayrm.rows import Prompt
from rayrm.shards import iter_tables, read_table
from rayrm.splits import is_held_out
from rayrm.training.launch import launch
from rayrm.training.settings import Training, TrainingJob
from rayrm.training.tracking import check_tracker


class SupervisedFinetuning(Training):
    """Learn to write each row's reference behind its prompt; only the reference's tokens bear loss.

    A longer prompt than max_length allows loses its beginning, a longer reference its row.
    """

    type: Literal["sft"] = "sft"
    """What kind of training this is."""
    lr: float = Field(7e-6, gt=0)
    """Highest learning rate of AdamW."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    added_special_tokens: list[str] = Field(default_factory=list)
    """Tokens that the tokenizer is to have, such as <|im_start|> and <|im_end|>; the embeddings grow as needed."""
    load_in_8bit: bool = False
    """Hold the frozen weights in 8 bits (bitsandbytes); with LoRA, on GPUs, up to ZeRO-2."""
    packing: bool = False
    """Lay rows end to end up to max_length, each blind to the others, and count batches in such rows; efficient with a
    flash attention."""

    @model_validator(mode="after")
    def _eight_bits(self) -> SupervisedFinetuning:
        if self.load_in_8bit and self.lora is None:
            raise ValueError("load_in_8bit holds weights that cannot be trained; set lora too")
        return self


class PolicyJob(TrainingJob):
    """From Prompt rows with a reference to a policy's checkpoint."""

    training: SupervisedFinetuning
    """What is trained, and how."""
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

    `template` is what `check_policy` gave. Raises CheckpointError when training fails for good, and ResourceError when
    the cluster can never hold the workers.
    """
    config = {"job": job, "template": template, "show_progress": sys.stderr.isatty()}
    return launch(LOOPS[job.training.type], config, job.output, job.workers, f"training into '{job.output}'")


def check_policy(job: PolicyJob) -> str | None:
    """The text of the chat template, after all that can be checked before workers start.

    Raises SchemaError when the rows have no references, CheckpointError when there is no model or no template, and
    ConfigError when a held-out share holds out nothing, or when 8-bit loading or the tracker is not installed.
    """
    check_tracker(job.report_to)
    Prompt.check_files(job.input)
    references = iter_tables(job.input, ["reference"])
    if not any(
        "reference" in table.column_names and table["reference"].is_valid().to_numpy().any() for table in references
    ):
        raise SchemaError(f"'{job.input}' has no reference in any row, and a policy learns to write them.")
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

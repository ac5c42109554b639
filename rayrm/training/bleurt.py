"""Fit a small BLEURT model on spoilt references: what may be set, what is checked before the start, and the start."""

from __future__ import annotations

import sys
from typing import Any

import pyarrow.compute as pc
from pydantic import Field, model_validator

from rayrm.config import NOT_IDENTITY, Config
from rayrm.errors import SchemaError
from rayrm.rows import Prompt
from rayrm.runs import INPUT
from rayrm.seeds import seed_of
from rayrm.shards import read_table
from rayrm.splits import is_held_out
from rayrm.training.corruption import Reference
from rayrm.training.launch import TrainingWorkers, launch
from rayrm.training.tracking import ReportTo, check_tracker


class BleurtTraining(Config):
    """A BLEURT model from random weights that learns how much is left of a reference. It has about 0.8 million of them."""

    vocab_size: int = Field(4000, ge=100)
    """Most entries of the WordPiece vocabulary; little text may give fewer."""
    hidden_size: int = Field(128, ge=16)
    """Width of the encoder."""
    intermediate_size: int = Field(256, ge=16)
    """Width of the feed-forward layers."""
    num_layers: int = Field(2, ge=1)
    """Transformer layers; matching words and adding the matches up takes two."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""
    max_length: int = Field(256, ge=16)
    """Most tokens of a pair; longer ones are cut as the scorer cuts them."""
    max_rows: int | None = Field(None, ge=2)
    """References to use at the most, drawn by seed; null for all."""
    max_steps: int = Field(600, ge=1)
    """Steps at which training ends. Every step spoils references anew."""
    batch_tokens: int = Field(2048, ge=1)
    """Most tokens of a step's pairs, padding included."""
    lr: float = Field(2e-3, gt=0)
    """Highest learning rate of AdamW; it falls to 0 in a straight line."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are scaled down to this norm."""
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the groups that is never trained on, and measured at the end."""
    seed: int = 0
    """Seed of the split, the weights, the order of rows and all that is done to them."""

    @model_validator(mode="after")
    def _divides(self) -> BleurtTraining:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
        return self


class BleurtJob(Config):
    """From Prompt rows with a reference to a BLEURT checkpoint."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Prompt rows; only their references are used."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for `model/` with its `rayrm.json`, `state/`, `metrics.jsonl` and `loss.png`."""
    training: BleurtTraining = BleurtTraining()
    """The model, and how it is trained."""
    workers: TrainingWorkers = Field(TrainingWorkers(), json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """The process that trains; there is one."""
    save_steps: int = Field(500, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Steps between states to resume from; the last two stay."""
    log_steps: int = Field(20, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Steps between records of the training loss."""
    report_to: ReportTo = Field("tensorboard", json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Where records go besides metrics.jsonl."""

    @model_validator(mode="after")
    def _one_worker(self) -> BleurtJob:
        if self.workers.num_workers != 1:
            raise ValueError(f"a model this small trains in 1 process, not in {self.workers.num_workers}")
        return self


def read_references(path: str, training: BleurtTraining) -> tuple[list[Reference], list[Reference]]:
    """References to train on and those that are held out, each text once a language.

    Raises SchemaError when a side is empty, and when the rows at `path` are no Prompt rows or have no references.
    """
    Prompt.check_files(path)
    table = read_table(path, ["id", "group", "lang", "reference"])
    if "reference" not in table.column_names:
        raise SchemaError(f"'{path}' lacks the column reference, which BLEURT is trained on.")
    table = table.filter(pc.is_valid(table["reference"]))
    texts = {(row["lang"], row["reference"]): row for row in table.to_pylist() if row["reference"].strip()}
    found = [Reference(row["id"], row["group"], lang, text) for (lang, text), row in texts.items()]
    found.sort(key=lambda reference: seed_of(training.seed, "order", reference.id, reference.lang))
    found = found[: training.max_rows]
    sides: tuple[list[Reference], list[Reference]] = ([], [])
    for reference in found:
        sides[is_held_out(reference.group, training.held_out_fraction, training.seed)].append(reference)
    if not all(sides):
        raise SchemaError(
            f"'{path}' has {len(sides[0])} references to train on and {len(sides[1])} in held-out groups; both sides "
            f"need some: give more rows, or another held_out_fraction than {training.held_out_fraction:g}."
        )
    return sides


def train_bleurt(job: BleurtJob) -> dict[str, Any]:
    """Train into `<output>/model` and return the facts of the run; the mark is left to the caller.

    Raises CheckpointError when training fails for good, ResourceError when the cluster can never hold the worker, and
    ConfigError when the tracker is not installed.
    """
    check_tracker(job.report_to)
    config = {"job": job.model_dump(), "show_progress": sys.stderr.isatty()}
    return launch(_loop, config, job.output, job.workers, f"training into '{job.output}'")


def _loop(config: dict[str, Any]) -> dict[str, Any]:
    from rayrm.training.bleurt_loop import train_loop

    return train_loop(config)

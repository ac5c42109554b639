"""Train a small NLLB model on parallel rows: what may be set, what is checked before the start, and the start."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from rayrm.config import NOT_IDENTITY, Config
from rayrm.errors import ConfigError, SchemaError
from rayrm.languages import LANGUAGES
from rayrm.rows import Prompt
from rayrm.runs import INPUT
from rayrm.seeds import seed_of
from rayrm.shards import read_table
from rayrm.splits import is_held_out
from rayrm.training.launch import TrainingWorkers, launch
from rayrm.training.tracking import ReportTo, check_tracker

COLUMNS = ("source", "reference", "src_lang", "tgt_lang")
_FLORES = {language.flores for language in LANGUAGES.values()}


class TranslatorTraining(Config):
    """A translation model from random weights, of about a million, that learns all directions of its rows at once."""

    vocab_size: int = Field(2000, ge=50)
    """Most entries of the BPE vocabulary, language codes not counted; little text may give fewer."""
    hidden_size: int = Field(128, ge=16)
    """Width of encoder and decoder."""
    intermediate_size: int = Field(256, ge=16)
    """Width of the feed-forward layers."""
    num_layers: int = Field(2, ge=1)
    """Transformer layers of the encoder, and as many of the decoder."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""
    max_length: int = Field(128, ge=16)
    """Most tokens of a sentence, special ones included; pairs with a longer one are left out of training."""
    max_rows: int | None = Field(None, ge=2)
    """Pairs to use at the most, drawn by seed; null for all."""
    max_steps: int = Field(600, ge=1)
    """Steps at which training ends."""
    batch_tokens: int = Field(1024, ge=1)
    """Most tokens of a step's sentences on either side, padding included."""
    lr: float = Field(3e-3, gt=0)
    """Highest learning rate of AdamW; it falls to 0 in a straight line."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of activations that a step of training leaves out."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are scaled down to this norm."""
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the groups that is never trained on, and translated at the end."""
    seed: int = 0
    """Seed of the split, the weights and the order of rows."""

    @model_validator(mode="after")
    def _divides(self) -> TranslatorTraining:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is no even multiple of num_heads {self.num_heads}")
        return self


class TranslatorJob(Config):
    """From Prompt rows with a source and a reference to an NLLB model."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Prompt rows; their sources, references and languages are used."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for `model/` with its `rayrm.json`, `metrics.jsonl` and `loss.png`."""
    training: TranslatorTraining = TranslatorTraining()
    """The model, and how it is trained."""
    workers: TrainingWorkers = Field(TrainingWorkers(), json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """The process that trains; there is one."""
    log_steps: int = Field(20, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Steps between records of the training loss."""
    report_to: ReportTo = Field("tensorboard", json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Where records go besides metrics.jsonl."""

    @model_validator(mode="after")
    def _one_worker(self) -> TranslatorJob:
        if self.workers.num_workers != 1:
            raise ValueError(f"a model this small trains in 1 process, not in {self.workers.num_workers}")
        return self


class Pair(NamedTuple):
    """A sentence and its translation."""

    id: str
    group: str
    source: str
    reference: str
    src_lang: str
    tgt_lang: str


def read_pairs(path: str, training: TranslatorTraining) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and those that are held out, each once a direction.

    Rows without a source, a reference or either language are passed over. Raises SchemaError when a side is empty,
    when the rows at `path` are no Prompt rows or have no source or reference, and for a language without a code.
    """
    Prompt.check_files(path)
    table = read_table(path, ["id", "group", *COLUMNS])
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise SchemaError(f"'{path}' lacks {', '.join(missing)}, and a translator is trained on {', '.join(COLUMNS)}.")
    rows = [row for row in table.to_pylist() if all((row[name] or "").strip() for name in COLUMNS)]
    unknown = {row[side] for row in rows for side in ("src_lang", "tgt_lang")} - LANGUAGES.keys() - _FLORES
    if unknown:
        raise SchemaError(
            f"'{path}' has rows in '{min(unknown)}', which is no language of the table; give its code there, such as "
            "'de', or NLLB's, such as 'deu_Latn'."
        )
    distinct = {tuple(row[name] for name in COLUMNS): Pair(**row) for row in rows}
    found = sorted(distinct.values(), key=lambda pair: seed_of(training.seed, "order", pair.id, *pair[2:]))
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in found[: training.max_rows]:
        sides[is_held_out(pair.group, training.held_out_fraction, training.seed)].append(pair)
    if not all(sides):
        raise SchemaError(
            f"'{path}' has {len(sides[0])} pairs to train on and {len(sides[1])} in held-out groups; both sides need "
            f"some: give more rows, or another held_out_fraction than {training.held_out_fraction:g}."
        )
    return sides


def train_translator(job: TranslatorJob) -> dict[str, Any]:
    """Train into `<output>/model` and return the facts of the run; the mark is left to the caller.

    Raises CheckpointError when training fails for good, ResourceError when the cluster can never hold the worker, and
    ConfigError when the tracker or sacrebleu is not installed.
    """
    check_tracker(job.report_to)
    if importlib.util.find_spec("sacrebleu") is None:
        raise ConfigError("A translator is measured by chrF, which needs sacrebleu; pip install 'rayrm[translation]'.")
    config = {"job": job.model_dump(), "show_progress": sys.stderr.isatty()}
    return launch(_loop, config, job.output, job.workers, f"training into '{job.output}'")


def describe_metrics(metrics: dict[str, float]) -> str:
    """The held-out measurement as a table, a line for each direction."""
    start = "eval_exact_match/"
    directions = sorted(name.removeprefix(start) for name in metrics if name.startswith(start))
    width = max(len("direction"), *map(len, directions))
    lines = [f"{'direction':<{width}}  exact match   chrF"]
    for direction in directions:
        exact, chrf = metrics[f"{start}{direction}"], metrics[f"eval_chrf/{direction}"]
        lines.append(f"{direction:<{width}}  {exact:11.3f}  {chrf:5.1f}")
    return "\n".join(lines)


def _loop(config: dict[str, Any]) -> dict[str, Any]:
    from rayrm.training.translator_loop import train_loop

    return train_loop(config)

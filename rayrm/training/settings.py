"""What every training job may be told, whatever it trains."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rayrm.config import NOT_IDENTITY, TEMPLATE, Config
from rayrm.runs import INPUT
from rayrm.training.launch import Parallelism, TrainingWorkers
from rayrm.training.optimization import Optimization
from rayrm.training.tracking import ReportTo


class LowRank(Config):
    """LoRA (arXiv 2106.09685): train small matrices beside frozen ones; they are merged into the saved model."""

    r: int = Field(16, ge=1)
    """Rank of the update of each matrix."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of inputs of the update that training leaves out."""
    targets: str | list[str] = "all-linear"
    """Names of the layers that get an update; all-linear is every linear layer but the output layer."""

    def add_to(self, model: Any, **settings: Any) -> Any:
        """peft's view of `model`, all of which is frozen but the updates; `settings` are more of peft's LoraConfig."""
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.targets, **settings
        )
        # One number format for all parameters, as ZeRO-3 needs.
        return get_peft_model(model, lora, autocast_adapter_dtype=False)


class Training(Optimization):
    """What is trained from rows, and for how long."""

    model: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Folder or hub id of the language model to start from."""
    chat_template: str | None = Field(None, json_schema_extra=TEMPLATE)  # type: ignore[arg-type]
    """A packaged template, a .jinja file, or none; null takes the tokenizer's own. It is saved with the model."""
    attn_implementation: str | None = None
    """Attention of transformers: sdpa, eager, flash_attention_2 and others; null lets transformers choose."""
    lora: LowRank | None = None
    """Train LoRA updates (and a reward model's whole head); null trains every weight."""
    max_length: int = Field(1024, ge=8)
    """Most tokens of a prompt with one completion; of the prompt alone where an encoder reads it."""
    held_out_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the groups that is never trained on, and evaluated."""
    eval_steps: int = Field(100, ge=1)
    """Steps between evaluations of the held-out rows; they are evaluated once more at the end."""
    num_epochs: float = Field(1.0, gt=0)
    """Passes over the rows."""
    max_steps: int | None = Field(None, ge=1)
    """Steps at which training ends, whatever num_epochs says."""
    global_batch_size: int = Field(64, ge=1)
    """Rows a step, of all workers together."""
    micro_batch_size: int = Field(8, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Rows a forward pass of one worker at the most; halved when memory runs out. The rest of a step is accumulated."""
    seed: int = 0
    """Seed of the split, of the order of rows, of dropout and of new weights."""


class TrainingJob(Config):
    """From rows to a checkpoint."""

    input: str = Field(json_schema_extra=INPUT)  # type: ignore[arg-type]
    """Rows to train on."""
    output: str = Field(json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Folder for `model/` with its `rayrm.json`, `state/`, `logs/`, `metrics.jsonl` and `loss.png`; with rewards also
    `samples/` and `report.html`."""
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

"""Train a policy from rows: what may be set, what is checked before anything starts, and the start."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayrm.config import NOT_IDENTITY
from rayrm.errors import ConfigError, SchemaError
from rayrm.models.folders import check_model, load_tokenizer
from rayrm.models.rendering import load_template
from rayrm.rows import Preference, Prompt
from rayrm.shards import iter_tables, read_schemas, read_table
from rayrm.splits import is_held_out
from rayrm.training.launch import launch
from rayrm.training.ppo.scorers import check_rewarded
from rayrm.training.ppo.settings import GRPO, PPO, RLOO, PolicyGradient
from rayrm.training.settings import Training, TrainingJob
from rayrm.training.tracking import check_tracker


class PolicyTraining(Training):
    """What every way to train a policy may be told."""

    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    load_in_8bit: bool = False
    """Hold the frozen weights in 8 bits (bitsandbytes); with LoRA, on GPUs, up to ZeRO-2."""

    @property
    def new_tokens(self) -> list[str]:
        """Tokens that the tokenizer is to have."""
        return []

    @model_validator(mode="after")
    def _eight_bits(self) -> PolicyTraining:
        if self.load_in_8bit and self.lora is None:
            raise ValueError("load_in_8bit holds weights that cannot be trained; set lora too")
        return self


class SupervisedFinetuning(PolicyTraining):
    """Learn to write each row's reference behind its prompt; only the reference's tokens bear loss.

    A longer prompt than max_length allows loses its beginning, a longer reference its row.
    """

    type: Literal["sft"] = "sft"
    """What kind of training this is."""
    lr: float = Field(7e-6, gt=0)
    """Highest learning rate of AdamW."""
    added_special_tokens: list[str] = Field(default_factory=list)
    """Tokens that the tokenizer is to have, such as <|im_start|> and <|im_end|>; the embeddings grow as needed."""
    packing: bool = False
    """Lay rows end to end up to max_length, each blind to the others, and count batches in such rows; efficient with a
    flash attention."""

    @property
    def new_tokens(self) -> list[str]:
        """Tokens that the tokenizer is to have."""
        return self.added_special_tokens


class PreferenceOptimization(PolicyTraining):
    """Make each row's chosen side likelier than its rejected one, against a frozen reference (DPO, arXiv 2305.18290).

    With the log-odds h = log(π/π_ref)(chosen) − log(π/π_ref)(rejected), sums over the tokens of a completion, the loss
    of a pair is −log σ(beta · h), or what `loss` says. The reference is a copy of the start model, or with LoRA the
    model without its updates. A longer prompt than max_length allows loses its beginning, a longer completion its row.
    """

    type: Literal["dpo"] = "dpo"
    """What kind of training this is."""
    lr: float = Field(5e-7, gt=0)
    """Highest learning rate of AdamW."""
    beta: float = Field(0.1, gt=0)
    """How closely the policy is held to its reference; more holds it closer."""
    loss: Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "apo_zero", "apo_down"] = "sigmoid"
    """TRL's name of the loss: sigmoid is DPO, sigmoid_norm the same with means over tokens for sums, robust allows for
    wrong labels (arXiv 2403.00409), hinge is max(0, 1 − beta · h) (arXiv 2305.10425), ipo (h per token − 1/(2 beta))²
    (arXiv 2310.12036), and apo_zero and apo_down (arXiv 2408.06266) move the chosen side up, or down."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that `loss: robust` takes to be labelled the wrong way round."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of a further term, the chosen side's mean −log π per token, averaged over rows; 0 for none."""
    precompute_reference: bool = False
    """Ask the reference once about all rows before training, and free its memory; not with LoRA, where it takes none."""

    @model_validator(mode="after")
    def _options_act(self) -> PreferenceOptimization:
        if (self.loss == "robust") != (self.label_smoothing > 0):
            raise ValueError("loss=robust and a label_smoothing above 0 go together; set both or neither")
        if self.precompute_reference and self.lora is not None:
            raise ValueError("precompute_reference frees a copy of the model, and with lora there is none")
        if self.lora is not None and self.lora.dropout:
            raise ValueError("dropout is off while the policy is compared with its reference; set lora.dropout=0")
        return self


AnyPolicyTraining = Annotated[
    SupervisedFinetuning | PreferenceOptimization | PPO | RLOO | GRPO, Field(discriminator="type")
]
"""The config of any way to train a policy."""


class PolicyJob(TrainingJob):
    """From rows to a policy's checkpoint.

    sft reads Prompt rows with a reference, dpo Preference rows, and ppo, rloo and grpo Prompt rows.
    """

    training: AnyPolicyTraining
    """What is trained, and how; sft when the type is left out."""
    save_steps: int = Field(500, ge=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Steps between states to resume from; the last two stay. With rewards 20, since steps take longer."""
    hub_id: str | None = Field(None, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Repository `owner/name` on the model hub that the finished model is pushed to; it is made private."""

    @field_validator("training", mode="before")
    @classmethod
    def _is_finetuning(cls, value: Any) -> Any:
        return {"type": "sft", **value} if isinstance(value, dict) else value

    @model_validator(mode="before")
    @classmethod
    def _saves_long_steps(cls, values: Any) -> Any:
        training = values.get("training") if isinstance(values, dict) else None
        has_rewards = isinstance(training, dict) and training.get("type") in ("ppo", "rloo", "grpo")
        return {"save_steps": 20, **values} if has_rewards else values

    @model_validator(mode="after")
    def _fits_together(self) -> PolicyJob:
        training, workers = self.training, self.workers
        if not isinstance(training, PolicyTraining):
            return self
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


def optimize_preferences(config: dict[str, Any]) -> dict[str, Any]:
    """The loop of `dpo`."""
    from rayrm.training.dpo import train_loop

    return train_loop(config)


def check_references(path: str) -> None:
    """Raise SchemaError unless the rows at `path` are Prompt rows, one of them at least with a reference."""
    Prompt.check_files(path)
    references = iter_tables(path, ["reference"])
    if any(
        "reference" in table.column_names and table["reference"].is_valid().to_numpy().any() for table in references
    ):
        return
    is_pairs = any({"chosen", "rejected"} <= set(schema.names) for _, schema in read_schemas(path))
    hint = "; Preference rows are learned from by training.type=dpo" if is_pairs else ""
    raise SchemaError(f"'{path}' has no reference in any row, and a policy learns to write them{hint}.")


def optimize_rewards(config: dict[str, Any]) -> dict[str, Any]:
    """The loop of `ppo`, `rloo` and `grpo`."""
    from rayrm.training.ppo.loop import train_loop

    return train_loop(config)


LOOPS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "sft": finetune,
    "dpo": optimize_preferences,
    "ppo": optimize_rewards,
    "rloo": optimize_rewards,
    "grpo": optimize_rewards,
}
"""What each worker runs, by the tag of `training`."""
CHECKS: dict[str, Callable[[str], None]] = {
    "sft": check_references,
    "dpo": Preference.check_files,
    "ppo": Prompt.check_files,
    "rloo": Prompt.check_files,
    "grpo": Prompt.check_files,
}
"""What raises SchemaError unless the rows at a path can be learned from, by the tag of `training`."""


def train_policy(job: PolicyJob, template: str | None) -> dict[str, Any]:
    """Train into `<output>/model` and return the facts of the run; the mark is left to the caller.

    `template` is what `check_policy` gave. Raises CheckpointError when training fails for good, and ResourceError when
    the cluster can never hold the workers.
    """
    config = {"job": job, "template": template, "show_progress": sys.stderr.isatty()}
    return launch(LOOPS[job.training.type], config, job.output, job.workers, f"training into '{job.output}'")


def check_policy(job: PolicyJob) -> str | None:
    """The text of the chat template, after all that can be checked before workers start.

    Raises SchemaError when the rows are none to learn from, CheckpointError when there is no model or no template, and
    ConfigError when a held-out share holds out nothing, or when 8-bit loading or the tracker is not installed.
    """
    check_tracker(job.report_to)
    CHECKS[job.training.type](job.input)
    _check_split(job.input, job.training)
    if (
        isinstance(job.training, PolicyTraining)
        and job.training.load_in_8bit
        and importlib.util.find_spec("bitsandbytes") is None
    ):
        raise ConfigError("load_in_8bit needs bitsandbytes, which is not installed; pip install 'rayrm[gpu]'.")
    if isinstance(job.training, PolicyGradient):
        check_rewarded(job.training, job.input, job.workers)
    path = job.training.model
    check_model(path)
    return load_template(job.training.chat_template, load_tokenizer(path), path)


def _check_split(path: str, training: Training) -> None:
    if not training.held_out_fraction:
        return
    groups = read_table(path, ["group"])["group"].drop_null().unique().to_pylist()
    held_out = sum(is_held_out(group, training.held_out_fraction, training.seed) for group in groups)
    if not 0 < held_out < len(groups):
        raise ConfigError(
            f"held_out_fraction {training.held_out_fraction:g} holds out {held_out} of the {len(groups)} groups of "
            f"'{path}', and both sides need some; choose another, or set it to 0."
        )

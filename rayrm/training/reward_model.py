"""Train a reward model: what may be set, what is checked first, and the start."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from rayrm import cluster, files
from rayrm.config import NOT_IDENTITY
from rayrm.errors import ConfigError, RayRMError
from rayrm.models.folders import check_model
from rayrm.runs import abandon_run, finish_run, start_run
from rayrm.shards import read_schemas
from rayrm.training.cards import write_card
from rayrm.training.checkpoints import push_to_hub
from rayrm.training.launch import MARK, MODEL, STATE, launch
from rayrm.training.objectives import AnyObjective
from rayrm.training.objectives.base import Objective
from rayrm.training.objectives.gated import GatedRatings
from rayrm.training.objectives.pairs import BradleyTerry
from rayrm.training.settings import Training, TrainingJob
from rayrm.training.tracking import check_tracker

if TYPE_CHECKING:
    from rayrm.models.reward_model import NewHead


class RewardTraining(Training):
    """Learn rewards from pairs of completions, or from single ones with numbers, as the objective says.

    The model to start from is a causal language model, which gets a new head, or a reward model. Scoring keeps to
    max_length too. The last step of an epoch takes what is left, and results do not hang on micro_batch_size, but
    for router_loss.
    """

    objective: AnyObjective = BradleyTerry()
    """What is learned from a row."""
    on_overlength: Literal["drop", "truncate_prompt_left", "error"] = "drop"
    """What becomes of a row with a longer side; a completion that is too long by itself always drops its row."""
    min_kept_fraction: float = Field(0.5, ge=0, le=1, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Least share of the rows that must be fit to be trained or held out."""
    shared_prefix: bool = False
    """Compute what the sides of a row begin with in common once, and no padding at all, with an attention of our own:
    the same loss and gradients in less time. Not for models that cap attention scores, and the like."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits (QLoRA, arXiv 2305.14314); with LoRA, up to ZeRO-2. The saved model has the
    weights that 4 bits stand for, so that it gives the rewards that were trained."""
    best_by: str | None = None
    """Metric of the held-out rows, such as accuracy, accuracy_worst_language or accuracy/de, whose best evaluation gives
    the final model; null for the last step."""
    head_init: Literal["initializer_range", "inverse_width", "zero"] = "initializer_range"
    """Standard deviation, around 0, of the head that a causal language model gets: the one of its config, or
    1 / (hidden size + 1), or 0. A reward model keeps its own head."""
    router_loss: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss of a mixture of experts (arXiv 2101.03961), taken over each forward pass."""

    @property
    def new_head(self) -> NewHead:
        """What a model without a head gets."""
        from rayrm.models.reward_model import NewHead

        return NewHead(self.seed, self.head_init)

    @model_validator(mode="after")
    def _best_of_something(self) -> RewardTraining:
        if self.best_by is not None and not self.held_out_fraction:
            raise ValueError(f"best_by is '{self.best_by}' and nothing is held out; set held_out_fraction too")
        return self

    @model_validator(mode="after")
    def _one_attention(self) -> RewardTraining:
        if self.shared_prefix and self.attn_implementation is not None:
            raise ValueError(f"shared_prefix has an attention of its own; leave out {self.attn_implementation!r}")
        return self

    @model_validator(mode="after")
    def _four_bits_are_frozen(self) -> RewardTraining:
        if self.load_in_4bit and self.lora is None:
            raise ValueError("load_in_4bit holds weights that cannot be trained; set lora too")
        return self


class RewardModelJob(TrainingJob):
    """From rows to a reward model's checkpoint."""

    training: RewardTraining
    """What is trained, and how."""
    hub_id: str | None = Field(None, json_schema_extra=NOT_IDENTITY)  # type: ignore[arg-type]
    """Repository `owner/name` on the model hub that the finished model is pushed to; it is made private."""

    @model_validator(mode="after")
    def _four_bits_are_whole(self) -> RewardModelJob:
        if self.training.load_in_4bit and self.parallelism.zero_stage == 3:
            raise ValueError("4-bit weights cannot be partitioned; set parallelism.zero_stage to 2 or less")
        return self


def train_reward_model(config: RewardModelJob) -> dict[str, Any]:
    """Train into `<output>/model`, verify it in a process of its own, mark it complete, and return the mark.

    The mark holds the objective, the rendering, the readout, the counts, the metrics, and up to 16 probe rows with what
    the model gave them. Raises SchemaError when the input has no rows for the objective or nothing of it is left,
    ConfigError when the tracker is not installed or the template is none, ResourceError when the cluster can never hold
    the workers, and CheckpointError when there is no model or no template, or training or saving fails.
    """
    what = f"Training into '{config.output}'"
    if not files.exists(files.join(config.output, MARK)):
        _check_job(config)
        cluster.require(config.workers.num_workers, config.workers.num_cpus, config.workers.num_gpus, what)
    if start_run(config, mark=MARK):
        finish_run(config, _train(config, what), mark=MARK)
    if config.hub_id is not None:
        push_to_hub(files.join(config.output, MODEL), config.hub_id)
    done: dict[str, Any] = files.read_json(files.join(config.output, MARK))
    return done


def _check_job(config: RewardModelJob) -> None:
    """All that needs no cluster, so that a config that cannot work claims no output."""
    from rayrm.training.rendered import check_renderer

    check_tracker(config.report_to)
    objective = config.training.objective
    _check_rows(config.input, objective)
    if isinstance(objective, GatedRatings):
        for path in (objective.ratings, objective.reference):
            if path is not None:
                _check_rows(path, objective.on_ratings)
    check_model(config.training.model)
    if config.training.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("load_in_4bit needs bitsandbytes, which is not installed; pip install bitsandbytes.")
    check_renderer(config.training)
    _check_network(config.training)


def _check_network(training: RewardTraining) -> None:
    from rayrm.models.loading import outline_network
    from rayrm.models.packing import make_packable
    from rayrm.models.reward_model import num_experts

    if not training.router_loss and not training.shared_prefix:
        return
    network = outline_network(training.model, is_language_model=training.objective.type == "comparison")
    if training.shared_prefix:
        make_packable(network)
    if training.router_loss and not num_experts(network.config.get_text_config()):
        raise ConfigError(f"router_loss is {training.router_loss:g}, and '{training.model}' is no mixture of experts.")


def _check_rows(path: str, objective: Objective) -> None:
    objective.rows.check_files(path)
    for name, schema in read_schemas(path):
        objective.check_schema(schema, f"'{name}'")


def _find_loop(config: RewardModelJob) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The loop of the objective, after rendering what it reads beside the input."""
    if isinstance(config.training.objective, GatedRatings):
        from rayrm.training import gate_loop

        gate_loop.render_ratings(config)
        return gate_loop.train_loop
    from rayrm.training import reward_loop

    return reward_loop.train_loop


def _check_best_by(best_by: str, config: RewardModelJob) -> None:
    """Raise ConfigError unless an evaluation will have the metric, by one of random outputs."""
    import numpy as np

    from rayrm.models.readouts import parse_readout
    from rayrm.training.best import read_merit
    from rayrm.training.objectives.base import Measured
    from rayrm.training.rendered import read_rendered

    objective = config.training.objective
    rows, rendered = read_rendered(config.output, objective.num_sides)
    some = rows.held_out
    shape = (objective.num_sides, len(some), rows.most_reads, parse_readout(rendered["readout"]).num_outputs)
    outputs = np.random.default_rng(0).normal(size=shape)
    targets, losses = rows.targets[some].astype(float), np.zeros(len(some))
    lengths, languages, subsets = rows.side_lengths[:, some], rows.languages[some], rows.subsets[some]
    read_merit(objective.measure(Measured(outputs, targets, losses, lengths, languages, subsets)), best_by)


def _abandon_unless_begun(config: RewardModelJob) -> None:
    """Give up the claim on an output without any state: what must change may be part of what it was claimed for."""
    fs, inner = files.filesystem(config.output)
    if any(fs.glob(f"{inner}/{name}") for name in (f"{STATE}/step-*", "best/step-*", "embeddings/*.npy")):
        return
    abandon_run(config)
    for path in [*fs.glob(f"{inner}/rendered*.parquet"), *fs.glob(f"{inner}/{STATE}")]:
        fs.rm(path, recursive=True)


def _train(config: RewardModelJob, what: str) -> dict[str, Any]:
    from rayrm.training.probes import check_saved
    from rayrm.training.rendered import render_rows

    given = {"job": config.model_dump(), "show_progress": sys.stderr.isatty()}
    training = config.training
    try:
        rendered = render_rows(config.input, config.output, training)
        loop = _find_loop(config)
        if training.best_by is not None and not isinstance(training.objective, GatedRatings):
            _check_best_by(training.best_by, config)
        facts = launch(loop, given, config.output, config.workers, what)
    except RayRMError:
        _abandon_unless_begun(config)
        raise
    mark = {
        "objective": training.objective.model_dump(),
        "rendering": {
            "chat_template": "none" if training.chat_template == "none" else None,
            "max_length": training.max_length,
            "fingerprint": rendered["fingerprint"],
        },
        "readout": rendered["readout"],
        "counts": rendered["counts"],
        **facts,
    }
    precision = "bf16" if config.parallelism.uses_bf16(config.workers.num_gpus) else "fp32"
    path = files.join(config.output, MODEL)
    check_saved(path, mark, training.objective, precision, config.workers)
    write_card(path, config, mark)
    return mark

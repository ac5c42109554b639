"""The loop that trains a reward model, as each Ray Train worker runs it.

All chance is drawn from the seed: new weights, the order of the rows (which hangs on the step alone), and LoRA's
dropout (which hangs on step and rank). A resumed run needs no generator's state.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from rayrm.errors import CheckpointError, ConfigError
from rayrm.models.inputs import packed_batch, padded_batch
from rayrm.models.loading import pad_id_of
from rayrm.models.packing import make_packable
from rayrm.models.readouts import Readout, parse_readout
from rayrm.models.reward_model import Penalties, num_experts
from rayrm.training.batches import batch_of_step, micro_batches, steps_per_epoch
from rayrm.training.best import find_best, keep_best, read_merit, read_weights
from rayrm.training.curves import write_curves
from rayrm.training.launch import deepspeed_config, prepare_worker, start_deepspeed
from rayrm.training.memory import fitting_micro_batch, halved_when_out_of_memory
from rayrm.training.objectives.base import Measured
from rayrm.training.objectives.pairs import Odin
from rayrm.training.probes import encode_probe
from rayrm.training.rendered import make_renderer, read_rendered
from rayrm.training.reward_model import RewardModelJob
from rayrm.training.reward_saving import add_updates, export_reward_model, gather_trained
from rayrm.training.states import WORLD, last_state
from rayrm.training.tracking import TRACKERS

PROGRESS = "progress.json"
ENGINE = "engine"


def train_loop(given: dict[str, Any]) -> dict[str, Any]:
    """Train from the last state to the end, save the model, and return its facts: steps, metrics and probe rewards."""
    job = RewardModelJob.model_validate(given["job"])
    prepare_worker(job.workers.num_cpus, job.workers.num_gpus > 0)
    micro_batch = fitting_micro_batch(job.output, job.training.micro_batch_size)
    with halved_when_out_of_memory(job.output, micro_batch, job.training.global_batch_size):
        trainer = RewardTrainer(job, micro_batch)
        with last_state(job.workers.num_workers) as state:
            if state is not None:
                trainer.load(state)
        trainer.train(given["show_progress"])
        return trainer.finish()


class Slope(NamedTuple):
    """A row's part in the loss of its global batch."""

    loss: torch.Tensor
    """[]."""
    slope: torch.Tensor
    """Gradient of the batch's summed loss by the row's outputs, [sides, reads, outputs]."""


class RewardTrainer:
    """One worker's share of the training."""

    def __init__(self, job: RewardModelJob, micro_batch_size: int) -> None:
        self.job = job
        self.training = job.training
        self.micro_batch_size = micro_batch_size
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.renderer = make_renderer(job.training.model, job.training.chat_template, job.training.max_length)
        self.objective = job.training.objective
        self.rows, self.rendered = read_rendered(job.output, self.objective.num_sides)
        self.readout = parse_readout(self.rendered["readout"])
        self.rows.targets = self.objective.to_units(self.rows.targets, self.readout)
        self.engine = make_engine(job, micro_batch_size, self.renderer.tokenizer, self.readout)
        self.device = self.engine.device
        self.epoch_steps = steps_per_epoch(len(self.rows.train), job.training.global_batch_size)
        self.num_steps = job.training.max_steps or math.ceil(job.training.num_epochs * self.epoch_steps)
        self.step = 0
        """Steps that are done."""
        self.sums: dict[str, float] = {}
        """Sums over the rows of the steps since the last record, and their number as `rows`."""
        self.history: list[dict[str, float]] = []
        self.best = find_best(job.output)

    def train(self, show_progress: bool) -> None:
        """Run the steps that are left; log, evaluate and save on the way."""
        from ray.experimental.tqdm_ray import tqdm

        job, is_first = self.job, self.rank == 0
        tracker = TRACKERS[job.report_to if is_first else "none"](job.output, job.training.model_dump(), self.step)
        bar = tqdm(total=self.num_steps, desc="training") if show_progress and is_first else None
        if bar is not None:
            bar.update(self.step)
        while self.step < self.num_steps:
            began = time.monotonic()
            self.train_step()
            is_last = self.step == self.num_steps
            if self.step % job.log_steps == 0 or is_last:
                tracker.log(self.record(self.summary(time.monotonic() - began)), self.step)
            if self.rows.held_out and (self.step % job.training.eval_steps == 0 or is_last):
                metrics = self.evaluate()
                tracker.log(self.record(metrics), self.step)
                self.write_history()
                self.keep_if_best(metrics)
            if self.step % job.save_steps == 0 and not is_last:
                self.save()
            if bar is not None:
                bar.update(1)
        if bar is not None:
            bar.close()
        tracker.close()

    def train_step(self) -> None:
        """One update from one global batch; its gradient is that of the mean loss over all rows of the batch."""
        batch = batch_of_step(self.step, len(self.rows.train), self.training.global_batch_size, self.training.seed)
        rows = [self.rows.train[index] for index in batch]
        self.engine.train()
        slopes = self.slopes(rows) if self.objective.is_batchwise else {}
        sums: dict[str, float] = {}
        for micro, is_padding in self.passes(rows):
            outputs, penalty = self.forward(micro)
            # DeepSpeed averages gradients over workers, and adds them up over forward passes. A worker that has no
            # row left takes part in the collectives with one that counts nothing.
            share = 0.0 if is_padding else self.world / len(rows)
            losses = self.losses(micro, outputs)
            if slopes:
                loss = sum((outputs[:, index] * slopes[row].slope).sum() for index, row in enumerate(micro)) * share
            else:
                loss = losses.sum() * share
            self.engine.backward(loss + penalty * len(micro) * share, scale_wrt_gas=False)
            tracked = {
                "loss": losses if not slopes else torch.stack([slopes[row].loss for row in micro]),
                **self.objective.track(outputs, self.targets(micro)),
                "rows": torch.ones(len(micro)),
            }
            for name, values in tracked.items():
                sums[name] = sums.get(name, 0.0) + (0.0 if is_padding else float(values.detach().double().sum()))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.training.rate_at(self.step, self.num_steps)
        self.engine.step()
        totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        found = dict(zip(sums, totals.tolist(), strict=True))
        self.step += 1
        if not math.isfinite(found["loss"]):
            # Before a state is saved that has it in its weights.
            raise CheckpointError(f"The loss is {found['loss']} at step {self.step}; try a lower lr or more warmup.")
        self.sums = {name: self.sums.get(name, 0.0) + num for name, num in found.items()}

    def passes(self, rows: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
        """The rows of each forward pass, and whether they only keep the other workers company.

        Dropout hangs on the step and the rank alone.
        """
        torch.manual_seed((self.training.seed << 32) + self.step * self.world + self.rank)
        for micro in micro_batches(rows, self.rows.lengths, self.micro_batch_size, self.rank, self.world):
            yield (micro, False) if micro else ([rows[0]], True)

    def forward(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of some rows, fp32 [sides, rows, reads, outputs], in one pass, and the penalty."""
        num_sides = self.objective.num_sides
        reads = [self.rows.reads[side][row].tolist() for side in range(num_sides) for row in rows]
        if self.training.shared_prefix:
            trees = [[side[row] for side in self.rows.sides] for row in rows]
            order = [tree * num_sides + side for side in range(num_sides) for tree in range(len(rows))]
            batch = packed_batch(trees, list(zip(order, reads, strict=True)), self.device)
        else:
            sides = [side[row] for side in self.rows.sides for row in rows]
            batch = padded_batch(sides, reads, self.renderer.tokenizer.pad_token_id, self.device)
        outputs, penalty = self.engine(**batch)
        return outputs.float().unflatten(0, (num_sides, len(rows))), penalty

    def targets(self, rows: Sequence[int]) -> torch.Tensor:
        """What is known of some rows, fp32 [rows, targets]."""
        return torch.from_numpy(self.rows.targets[list(rows)]).to(self.device)

    def losses(self, rows: Sequence[int], outputs: torch.Tensor) -> torch.Tensor:
        """Weighted loss of each row, fp32 [rows]."""
        weights = torch.from_numpy(self.rows.weights[list(rows)]).to(self.device)
        return weights * self.objective.losses(outputs, self.targets(rows))

    @torch.no_grad()
    def collect(self, rows: Sequence[int]) -> torch.Tensor:
        """Outputs of any number of rows, each computed once by one worker: fp32 [sides, rows, most reads, outputs]."""
        place = {row: index for index, row in enumerate(rows)}
        shape = (self.objective.num_sides, len(rows), self.rows.most_reads, self.readout.num_outputs)
        found = torch.zeros(shape, device=self.device)
        for micro, is_padding in self.passes(rows):
            outputs, _ = self.forward(micro)
            if not is_padding:
                found[:, [place[row] for row in micro], : outputs.shape[2]] = outputs
        dist.all_reduce(found)
        return found

    def slopes(self, rows: Sequence[int]) -> dict[int, Slope]:
        """For each row of a global batch, its loss, and the gradient of the batch's summed loss by its outputs.

        A loss that hangs on the whole batch needs the outputs of all of it, which a pass without gradients gives.
        """
        outputs = self.collect(rows).requires_grad_()
        losses = self.losses(rows, outputs)
        (slopes,) = torch.autograd.grad(losses.sum(), outputs)
        return {row: Slope(losses[index].detach(), slopes[:, index]) for index, row in enumerate(rows)}

    def summary(self, seconds: float) -> dict[str, float]:
        """Means over all rows since the last record; `seconds` is what the last step took."""
        num_rows = self.sums.pop("rows")
        found = {name: total / num_rows for name, total in self.sums.items()}
        self.sums = {}
        found |= {"lr": self.training.rate_at(self.step - 1, self.num_steps), "step_s": seconds}
        norm = self.engine.get_global_grad_norm()
        return found if norm is None else found | {"grad_norm": float(norm)}

    def record(self, metrics: dict[str, float]) -> dict[str, float]:
        """Keep the metrics of this step in the run's history."""
        self.history.append({"step": self.step, "epoch": self.step / self.epoch_steps, **metrics})
        return metrics

    def write_history(self) -> None:
        """Bring `metrics.jsonl` and `loss.png` up to date; drawing takes too long to do it with every record."""
        if self.rank == 0:
            write_curves(self.history, self.job.output)

    def evaluate(self) -> dict[str, float]:
        """Metrics over the held-out rows, each of them counted once whatever the number of workers."""
        self.engine.eval()
        held_out = self.rows.held_out
        outputs = self.collect(held_out)
        given = (outputs, self.targets(held_out), self.losses(held_out, outputs))
        arrays = [tensor.cpu().double().numpy() for tensor in given]
        rows = self.rows
        lengths, languages, subsets = rows.side_lengths[:, held_out], rows.languages[held_out], rows.subsets[held_out]
        return self.objective.measure(Measured(arrays[0], arrays[1], arrays[2], lengths, languages, subsets))

    def keep_if_best(self, metrics: dict[str, float]) -> None:
        """Keep what is trained so far when its evaluation is the best one by the metric that was asked for."""
        if self.training.best_by is None:
            return
        merit = read_merit(metrics, self.training.best_by)
        if self.best is not None and merit <= self.best["merit"]:
            return
        mark = {"step": self.step, "merit": merit, "metrics": metrics, "probe": self.read_probe()}
        state = gather_trained(self.engine.module.network, self.training.lora)
        if self.rank == 0:
            keep_best(self.job.output, mark, state)
        dist.barrier()
        self.best = find_best(self.job.output)

    def save(self) -> None:
        """Report the state of this step to Ray Train: every worker the files that it wrote."""
        from ray import train

        self.write_history()
        with TemporaryDirectory() as folder:
            self.engine.save_checkpoint(folder, tag=ENGINE)
            if self.rank == 0:
                progress = {"step": self.step, "sums": self.sums, "history": self.history}
                (Path(folder) / PROGRESS).write_text(json.dumps(progress))
                (Path(folder) / WORLD).write_text(json.dumps({"num_workers": self.world}))
            state = train.Checkpoint.from_directory(folder)
            train.report({"step": self.step}, state, checkpoint_dir_name=f"step-{self.step}")

    def load(self, folder: str) -> None:
        """Go on from a state. Raises CheckpointError when DeepSpeed does not find its part of it."""
        progress = json.loads((Path(folder) / PROGRESS).read_text())
        found, _ = self.engine.load_checkpoint(folder, tag=ENGINE)
        if found is None:
            raise CheckpointError(f"The state of step {progress['step']} in '{folder}' is incomplete; remove it.")
        self.step, self.sums, self.history = progress["step"], progress["sums"], progress["history"]

    def finish(self) -> dict[str, Any]:
        """Save the model whole, as it is or as it was at its best, and return the facts of the run."""
        self.write_history()
        metrics: dict[str, float] = {}
        for record in self.history:
            metrics |= record
        facts = {"steps": self.step, "metrics": metrics, "micro_batch_size": self.micro_batch_size}
        if self.best is None:
            facts["probe"] = self.read_probe()
            state = gather_trained(self.engine.module.network, self.training.lora)
        else:
            facts |= {"best_step": self.best["step"], "probe": self.best["probe"]}
            facts["metrics"] = metrics | self.best["metrics"]
            state = read_weights(self.best["folder"]) if self.rank == 0 else {}
        network = self.engine.module.network
        export_reward_model(network, state, self.training, self.renderer, self.readout, self.job.output)
        return facts

    @torch.no_grad()
    def read_probe(self) -> list[dict[str, Any]]:
        """The probe rows with the `outputs` [sides][reads][outputs] that the model as it was trained gives them."""
        self.engine.eval()
        found = []
        for row in self.rendered["probe"]:
            sides = encode_probe(row, self.objective, self.renderer)
            ids, reads = [side.ids for side in sides], [side.reads for side in sides]
            outputs, _ = self.engine(**padded_batch(ids, reads, self.renderer.tokenizer.pad_token_id, self.device))
            found.append(row | {"outputs": outputs.float().tolist()})
        return found


def make_engine(job: RewardModelJob, micro_batch_size: int, tokenizer: Any, readout: Readout) -> Any:
    """DeepSpeed's engine around the model of `job.training`, ready to train."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    training, parallelism = job.training, job.parallelism
    bf16 = parallelism.uses_bf16(job.workers.num_gpus)
    settings = deepspeed_config(parallelism, 2 * micro_batch_size, 1, bf16, training.max_grad_norm)
    # The last forward pass of a step is the one before `step()`, so steps may have different numbers of them.
    settings["managed_gradient_accumulation"] = False
    start_deepspeed(use_gpu=job.workers.num_gpus > 0)
    # While this object lives, transformers loads weights in ZeRO-3's parts.
    partitioned = HfDeepSpeedConfig(settings) if parallelism.zero_stage == 3 else None
    dtype = torch.bfloat16 if bf16 else torch.float32
    attention = training.attn_implementation
    model = readout.load(
        training.model,
        tokenizer,
        new_head=training.new_head,
        dtype=dtype,
        attn_implementation=attention,
        load_in_4bit=training.load_in_4bit,
    )
    if partitioned is not None:
        unset_hf_deepspeed_config()
    if training.shared_prefix:
        make_packable(model.network)
    if training.router_loss and not num_experts(model.network.config.get_text_config()):
        raise ConfigError(f"router_loss is {training.router_loss:g}, and '{training.model}' is no mixture of experts.")
    overlap = training.objective.orthogonality if isinstance(training.objective, Odin) else 0.0
    model.penalties = Penalties(training.router_loss, overlap)
    model.network.config.pad_token_id = pad_id_of(tokenizer)
    if training.lora is not None:
        add_updates(model.network, training.lora, training.seed)
    if parallelism.gradient_checkpointing:
        model.network.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = training.optimizer(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine

"""The loop that trains a reward model, as each Ray Train worker runs it.

All chance is drawn from the seed: new weights, the order of the pairs (which hangs on the step alone), and LoRA's
dropout (which hangs on step and rank). A resumed run needs no generator's state.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rayrm.errors import CheckpointError
from rayrm.models.reward_model import load_reward_model, pad_right
from rayrm.training.batches import batch_of_step, micro_batches, steps_per_epoch
from rayrm.training.curves import write_curves
from rayrm.training.launch import deepspeed_config, prepare_worker, start_deepspeed
from rayrm.training.memory import fitting_micro_batch, halved_when_out_of_memory
from rayrm.training.objectives import LOSSES, Targets
from rayrm.training.preferences import make_renderer, read_rendered
from rayrm.training.probes import probe_sides
from rayrm.training.reward_metrics import MeasuredPairs, measure_pairs
from rayrm.training.reward_model import RewardModelJob
from rayrm.training.reward_saving import add_updates, export_reward_model
from rayrm.training.states import WORLD, last_state
from rayrm.training.tracking import TRACKERS

PROGRESS = "progress.json"
ENGINE = "engine"
SUMS = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
"""What is summed over the pairs of the steps between two records; the number of pairs stands behind."""


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
        return trainer.finish(given["probe"])


class RewardTrainer:
    """One worker's share of the training."""

    def __init__(self, job: RewardModelJob, micro_batch_size: int) -> None:
        self.job = job
        self.training = job.training
        self.micro_batch_size = micro_batch_size
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.renderer = make_renderer(job.training.model, job.training.chat_template, job.training.max_length)
        self.pairs = read_rendered(job.output)
        self.engine = make_engine(job, micro_batch_size, self.renderer.tokenizer.pad_token_id)
        self.device = self.engine.device
        self.epoch_steps = steps_per_epoch(len(self.pairs.train), job.training.global_batch_size)
        self.num_steps = job.training.max_steps or math.ceil(job.training.num_epochs * self.epoch_steps)
        self.step = 0
        """Steps that are done."""
        self.sums = [0.0] * (len(SUMS) + 1)
        self.history: list[dict[str, float]] = []

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
            if self.pairs.held_out and (self.step % job.training.eval_steps == 0 or is_last):
                tracker.log(self.record(self.evaluate()), self.step)
                self.write_history()
            if self.step % job.save_steps == 0 and not is_last:
                self.save()
            if bar is not None:
                bar.update(1)
        if bar is not None:
            bar.close()
        tracker.close()

    def train_step(self) -> None:
        """One update from one global batch; its gradient is that of the mean loss over all pairs of the batch."""
        batch = batch_of_step(self.step, len(self.pairs.train), self.training.global_batch_size, self.training.seed)
        rows = [self.pairs.train[index] for index in batch]
        torch.manual_seed((self.training.seed << 32) + self.step * self.world + self.rank)
        self.engine.train()
        sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=self.device)
        for micro in micro_batches(rows, self.pairs.lengths, self.micro_batch_size, self.rank, self.world):
            rewards, losses = self.forward(micro or rows[:1])
            # DeepSpeed averages gradients over workers, and adds them up over forward passes. A worker that has no
            # pair left takes part in the collectives with one that counts nothing.
            share = self.world / len(rows) if micro else 0.0
            self.engine.backward(losses.sum() * share, scale_wrt_gas=False)
            if micro:
                sums += _sums(rewards.detach(), losses.detach())
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.training.rate_at(self.step, self.num_steps)
        self.engine.step()
        dist.all_reduce(sums)
        self.sums = [old + new for old, new in zip(self.sums, sums.tolist(), strict=True)]
        self.step += 1

    def forward(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards [2, pairs], chosen sides first, and losses [pairs] of some pairs, in one pass and in fp32."""
        sides = [self.pairs.chosen[row] for row in rows] + [self.pairs.rejected[row] for row in rows]
        ids, mask = pad_right(sides, self.renderer.tokenizer.pad_token_id, self.device)
        rewards = self.engine(ids, mask).float().view(2, -1)
        targets = Targets(*torch.from_numpy(self.pairs.targets[:, list(rows)]).to(self.device))
        objective = self.training.objective
        return rewards, LOSSES[objective.type](objective, rewards[0], rewards[1], targets)

    def summary(self, seconds: float) -> dict[str, float]:
        """Means over all pairs since the last record; `seconds` is what the last step took."""
        *sums, num_pairs = self.sums
        if not math.isfinite(sums[0]):
            raise CheckpointError(f"The loss is {sums[0]} at step {self.step}; try a lower lr or more warmup.")
        self.sums = [0.0] * len(self.sums)
        found = {name: total / num_pairs for name, total in zip(SUMS, sums, strict=True)}
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

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics over the held-out pairs, each of them counted once whatever the number of workers."""
        self.engine.eval()
        held_out = self.pairs.held_out
        place = {row: index for index, row in enumerate(held_out)}
        found = torch.zeros((3, len(held_out)), dtype=torch.float64, device=self.device)
        for micro in micro_batches(held_out, self.pairs.lengths, self.micro_batch_size, self.rank, self.world):
            rewards, losses = self.forward(micro or held_out[:1])
            if micro:
                found[:, [place[row] for row in micro]] = torch.cat([rewards, losses[None]]).double()
        dist.all_reduce(found)
        *rewards_found, losses_found = found.cpu().numpy()
        pairs, rows = self.pairs, np.array(held_out)
        columns = (column[rows] for column in (pairs.extra_lengths, pairs.languages, pairs.subsets))
        return measure_pairs(MeasuredPairs(np.stack(rewards_found), losses_found, *columns))

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

    def finish(self, probe: list[dict[str, Any]]) -> dict[str, Any]:
        """Save the model whole and return the facts of the run."""
        self.write_history()
        rewards = self.read_probe(probe)
        export_reward_model(self.engine.module.network, self.training, self.renderer, self.job.output)
        metrics: dict[str, float] = {}
        for record in self.history:
            metrics |= record
        return {
            "steps": self.step,
            "metrics": metrics,
            "micro_batch_size": self.micro_batch_size,
            "probe": [row | {"rewards": pair} for row, pair in zip(probe, rewards, strict=True)],
        }

    @torch.no_grad()
    def read_probe(self, probe: list[dict[str, Any]]) -> list[list[float]]:
        """Rewards of both sides of each probe row, by the model as it was trained."""
        self.engine.eval()
        rewards: list[list[float]] = []
        for row in probe:
            ids = [self.renderer.pair_ids(*side).ids for side in probe_sides(row)]
            rewards.append(self.engine(*pad_right(ids, self.renderer.tokenizer.pad_token_id, self.device)).tolist())
        return rewards


def _sums(rewards: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    gaps = rewards[0] - rewards[1]
    values = torch.stack([losses, (gaps > 0).to(gaps), gaps, rewards[0], rewards[1], torch.ones_like(gaps)])
    return values.double().sum(dim=1)


def make_engine(job: RewardModelJob, micro_batch_size: int, pad_id: int) -> Any:
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
    model = load_reward_model(
        training.model, head_seed=training.seed, dtype=dtype, attn_implementation=training.attn_implementation
    )
    if partitioned is not None:
        unset_hf_deepspeed_config()
    model.network.config.pad_token_id = pad_id
    if training.lora is not None:
        add_updates(model.network, training.lora, training.seed)
    if parallelism.gradient_checkpointing:
        model.network.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = training.optimizer(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine

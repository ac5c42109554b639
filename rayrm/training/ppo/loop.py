"""The loop of policy training with rewards, as each Ray Train worker runs it.

Rank 0 draws and scores, by actors of its own, and hands the samples to all workers; these learn together. All chance is
drawn from the seed: the order of the prompts and of the samples hangs on the step, and draws on the row and its visit.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from rayrm.errors import CheckpointError, ConfigError
from rayrm.training.batches import batch_of_step, steps_per_epoch
from rayrm.training.curves import write_curves
from rayrm.training.launch import prepare_worker
from rayrm.training.memory import fitting_micro_batch, halved_when_out_of_memory
from rayrm.training.policy_model import end_ids
from rayrm.training.ppo.collecting import Collected, Collector
from rayrm.training.ppo.engine import export_learned, make_engine, read_prompts
from rayrm.training.ppo.experience import Experience, compute_advantages, write_samples
from rayrm.training.ppo.learner import Learner
from rayrm.training.ppo.metrics import describe_experience, describe_samples, merge_records
from rayrm.training.ppo.rollouts import RolloutPool, tokens_needed
from rayrm.training.ppo.scorers import ScorerPool
from rayrm.training.ppo.settings import RewardedJob
from rayrm.training.ppo.weights import sampler_state
from rayrm.training.states import WORLD, last_state
from rayrm.training.tracking import TRACKERS

PROGRESS, ENGINE, AHEAD = "progress.json", "engine", "ahead.pt"
STEP_PARTS = ("wait", "prepare", "learn", "push")
"""What the learner does in a step, one after the other; the samples' own seconds run beside it or in its wait."""


def train_loop(given: dict[str, Any]) -> dict[str, Any]:
    """Train from the last state to the end, save the model, and return its facts."""
    job = RewardedJob.model_validate({name: getattr(given["job"], name) for name in RewardedJob.model_fields})
    prepare_worker(job.workers.num_cpus, job.workers.num_gpus > 0)
    micro_batch = fitting_micro_batch(job.output, job.training.micro_batch_size)
    with halved_when_out_of_memory(job.output, micro_batch, rows_per_worker=None):
        trainer = RewardedTrainer(job, given["template"], micro_batch)
        try:
            with last_state(job.workers.num_workers) as state:
                if state is not None:
                    trainer.load(state)
            trainer.train(given["show_progress"])
            return trainer.finish()
        finally:
            trainer.close()


class RewardedTrainer:
    """One worker's part of the run; rank 0 also has the samplers and the scorers."""

    def __init__(self, job: RewardedJob, template: str | None, micro_batch_size: int) -> None:
        self.job, self.training = job, job.training
        self.micro_batch_size = micro_batch_size
        self.rank = dist.get_rank()
        engine, self.renderer = make_engine(job, template, micro_batch_size)
        self.learner = Learner(engine, self.training, micro_batch_size, self.renderer.tokenizer.pad_token_id)
        self.rows, self.held_out, self.counts = read_prompts(job, self.renderer)
        self.epoch_steps = steps_per_epoch(len(self.rows), self.training.global_batch_size)
        self.num_steps = self.training.max_steps or max(1, round(self.training.num_epochs * self.epoch_steps))
        if self.learner.warmup_steps >= self.num_steps:
            raise ConfigError(
                f"value_warmup_steps {self.learner.warmup_steps} leaves none of the {self.num_steps} steps to the policy; "
                "lower it, or train for longer."
            )
        self.step = 0
        """Steps that are done."""
        self.coefficient = self.training.kl.coefficient
        """What a nat of divergence costs now."""
        self.history: list[dict[str, float]] = []
        self.since: list[dict[str, float]] = []
        """What was measured in the steps since the last record."""
        self.served: dict[str, str | None] = {}
        """Revisions of the models that services among the scorers run."""
        self.collected: Collected | None = None
        """The samples of the next step, once they are there."""
        self.experience: Experience | None = None
        """What the learner makes of those that it learns from; None where there are none."""
        self.seconds: dict[str, float] = {}
        """What the parts of the next step have taken so far."""
        self.thread = ThreadPoolExecutor(max_workers=1)
        room = tokens_needed(self.learner.network.policy.config, self.training.max_length)
        draws = self.training.rollouts, self.training.sampling
        self.rollouts = RolloutPool(self.training.model, *draws, room, end_ids(self.renderer))
        self.scorers = ScorerPool(self.training.scorers, self.training.rollouts.max_failures)
        self.collector = Collector(self.training, self.renderer.tokenizer, self.rollouts, self.scorers)

    def train(self, show_progress: bool) -> None:
        """Run the steps that are left; log, evaluate and save on the way."""
        from ray.experimental.tqdm_ray import tqdm

        if self.step == self.num_steps:
            return
        job, is_first = self.job, self.rank == 0
        tracker = TRACKERS[job.report_to if is_first else "none"](job.output, self.training.model_dump(), self.step)
        bar = tqdm(total=self.num_steps, desc="training") if show_progress and is_first else None
        if bar is not None:
            bar.update(self.step)
        if is_first:
            self.served = self.scorers.pin(self.served)
        # Services may take their time, for which DeepSpeed's own group would not wait.
        dist.barrier()
        self.push()
        if not self.step:
            tracker.log(self.evaluate(), 0)
        # Actors start with the first draw of this process, whose time says nothing of a step's.
        untimed = self.step + (1 if self.collected is None else 2)
        if self.collected is None:
            self.receive(self.begin(self.step))
        while self.step < self.num_steps:
            # Drawn by the weights of now, while they change.
            overlaps = self.training.overlap and self.step + 1 < self.num_steps
            ahead = self.begin(self.step + 1) if overlaps else None
            record, seconds = self.learn(), self.seconds
            if overlaps:
                self.receive(ahead)
            seconds["push"] = self.push()
            if self.step > untimed:
                record |= {f"seconds/{name}": taken for name, taken in seconds.items()}
                record["step_s"] = sum(seconds[name] for name in STEP_PARTS)
            self.since.append(record)
            is_last = self.step == self.num_steps
            if self.step % job.log_steps == 0 or is_last:
                tracker.log(self.record(merge_records(self.since)), self.step)
                self.since = []
            if self.held_out and (self.step % self.training.eval_steps == 0 or is_last):
                tracker.log(self.evaluate(), self.step)
            if bar is not None:
                bar.update(1)
            if self.step % job.save_steps == 0 or is_last:
                self.save()
            if not (overlaps or is_last):
                self.receive(self.begin(self.step))
        if bar is not None:
            bar.close()
        tracker.close()

    def push(self) -> float:
        """Hand the weights of now to the samplers; the next draw is theirs. Gives the seconds that it took."""
        began = time.monotonic()
        state = sampler_state(self.learner.network.policy)
        if self.rank == 0:
            self.rollouts.push(state, self.step)
        if self.learner.behaviour is not None:
            self.learner.behaviour.take()
        return time.monotonic() - began

    def begin(self, step: int) -> Future[Collected] | None:
        """Start to collect the samples of a step, in the background; on rank 0."""
        if self.rank != 0:
            return None
        rows = batch_of_step(step, len(self.rows), self.training.global_batch_size, self.training.seed)
        visit = str(step // self.epoch_steps)
        return self.thread.submit(self.collector.collect_step, [(row, self.rows[row]) for row in rows], visit)

    def receive(self, future: Future[Collected] | None) -> None:
        """Have the samples of the next step, on all workers, and what the learner says of them before it learns.

        Raises CheckpointError when sampler and learner have drifted apart, and what collecting raises.
        """
        began = time.monotonic()
        shared: list[Any] = [None]
        if future is not None:
            shared = [future.result()]
        dist.broadcast_object_list(shared, device=torch.device("cpu") if dist.get_backend() == "gloo" else None)
        collected: Collected = shared[0]
        waited = time.monotonic()
        kept = [sample for sample in collected.samples if sample.fault is None]
        self.collected = collected
        self.experience = self.learner.prepare(kept) if kept else None
        self.seconds = {**collected.seconds, "wait": waited - began, "prepare": time.monotonic() - waited}
        if self.experience is not None:
            self._check_drift(self.experience)

    def _check_drift(self, experience: Experience) -> None:
        drift, limit = float(experience.drift().sum() / experience.mask.sum()), self.job.max_drift
        if not drift <= limit:
            filters = self.training.filters
            because = (
                f"sampling has {', '.join(filters)} on, which the policy does not learn with"
                if filters
                else ("the sampler's numerics or weights are not the learner's")
            )
            raise CheckpointError(
                f"At step {self.step + 1} sampler and learner differ by {drift:.3g} nats a token, more than max_drift "
                f"{limit:g}: {because}; learning from such samples makes a policy collapse."
            )

    def learn(self) -> dict[str, float]:
        """The step whose samples are there, which is none where all were left out; gives what was measured.

        Counts it as done, and the samples as used.
        """
        assert self.collected is not None
        began, samples, experience = time.monotonic(), self.collected.samples, self.experience
        found = describe_samples(samples) | {"skipped": float(experience is None), "kl_coefficient": self.coefficient}
        if experience is not None:
            found |= self._learn_from(experience)
        self.step += 1
        self.collected = self.experience = None
        if self.rank == 0:
            write_samples(self.job.output, f"step-{self.step:06d}", samples)
        self.seconds["learn"] = time.monotonic() - began
        return found

    def _learn_from(self, experience: Experience) -> dict[str, float]:
        advantages, returns = compute_advantages(experience, self.training, self.coefficient)
        lr = self.learner.set_lr(self.step, self.num_steps)
        told = None if returns is None else returns.cpu().numpy()
        found = describe_experience(experience, told, self.learner.reference is not None)
        found |= self.learner.learn(experience, advantages, returns, self.step, self.coefficient)
        found |= {"lr": lr, "drift/limit": self.job.max_drift}
        # While values warm up the policy is its reference.
        if "kl" in found and self.step >= self.learner.warmup_steps:
            self.coefficient = self.training.kl.adapt(self.coefficient, found["kl"], len(experience.samples))
        return found

    def evaluate(self) -> dict[str, float]:
        """Rewards of the held-out prompts, drawn by the weights that were pushed last, with the same seeds each time."""
        if not self.held_out:
            return {}
        shared: list[Any] = [None]
        if self.rank == 0:
            samples = self.collector.collect(list(enumerate(self.held_out)), "held_out").samples
            write_samples(self.job.output, f"held-out-{self.step:06d}", samples)
            shared = [{f"eval_{name}": value for name, value in describe_samples(samples).items()}]
        dist.broadcast_object_list(shared)
        return self.record(shared[0])

    def record(self, metrics: dict[str, float]) -> dict[str, float]:
        """Keep the metrics of this step in the run's history, and bring its files up to date."""
        self.history.append({"step": self.step, "epoch": self.step / self.epoch_steps, **metrics})
        if self.rank == 0:
            write_curves(self.history, self.job.output)
        return metrics

    def save(self) -> None:
        """Report the state of this step to Ray Train: every worker the files that it wrote.

        With overlap it holds the samples of the next step, which were drawn by weights that are no more.
        """
        from ray import train

        if self.rank == 0:
            write_curves(self.history, self.job.output)
        with TemporaryDirectory() as folder:
            self.learner.engine.save_checkpoint(folder, tag=ENGINE)
            if self.rank == 0:
                progress = {"step": self.step, "coefficient": self.coefficient, "served": self.served}
                progress |= {"history": self.history, "since": self.since, "faults": list(self.collector.faults.last)}
                (Path(folder) / PROGRESS).write_text(json.dumps(progress))
                (Path(folder) / WORLD).write_text(json.dumps({"num_workers": dist.get_world_size()}))
                if self.collected is not None:
                    torch.save((self.collected, self.experience), Path(folder) / AHEAD)
            state = train.Checkpoint.from_directory(folder)
            train.report({"step": self.step}, state, checkpoint_dir_name=f"step-{self.step}")

    def load(self, folder: str) -> None:
        """Go on from a state. Raises CheckpointError when DeepSpeed does not find its part of it."""
        progress = json.loads((Path(folder) / PROGRESS).read_text())
        found, _ = self.learner.engine.load_checkpoint(folder, tag=ENGINE)
        if found is None:
            raise CheckpointError(f"The state of step {progress['step']} in '{folder}' is incomplete; remove it.")
        self.step, self.coefficient = progress["step"], progress["coefficient"]
        self.history, self.since, self.served = progress["history"], progress["since"], progress["served"]
        self.collector.faults.last.extend(progress["faults"])
        if (Path(folder) / AHEAD).exists():
            # A run's own file, which holds lists of samples beside tensors.
            self.collected, self.experience = torch.load(
                Path(folder) / AHEAD, map_location=self.learner.engine.device, weights_only=False
            )

    def finish(self) -> dict[str, Any]:
        """Save the policy whole and return the facts of the run."""
        export_learned(self.learner.network.policy, self.training, self.renderer, self.job.output)
        metrics: dict[str, float] = {}
        for record in self.history:
            metrics |= record
        return {
            "objective": self.training.type,
            "rendering": self.renderer.fingerprint(),
            "counts": self.counts,
            "steps": self.step,
            "micro_batch_size": self.micro_batch_size,
            "filters": self.training.filters,
            "metrics": metrics,
        }

    def close(self) -> None:
        """End the samplers and the scorers, and with them what they are at."""
        self.rollouts.close()
        self.scorers.close()
        self.thread.shutdown(cancel_futures=True)

"""The learner's share of a step on one worker: what its network says of completions, and the updates from them.

All workers hold the same arrays of a step; each computes its share of the rows and the sums are exchanged, so nothing
hangs on the number of workers or the size of a forward pass but the last digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rayrm.errors import CheckpointError
from rayrm.models.completing import decoder_start
from rayrm.training.batches import micro_batches
from rayrm.training.ppo.engine import OWN_LR
from rayrm.training.ppo.experience import Experience, Sample, equal_rewards_fraction, pad
from rayrm.training.ppo.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    estimate_kl,
    importance_ratio,
    token_weights,
)
from rayrm.training.ppo.network import ActorCritic, Judged, Reference, Snapshot, packed_batch, padded_batch
from rayrm.training.ppo.settings import PPO, CriticFree, RewardedTraining


class Learner:
    """A DeepSpeed engine around an `ActorCritic`, and what it needs to know of a step."""

    def __init__(self, engine: Any, training: RewardedTraining, micro_batch_size: int, pad_id: int) -> None:
        self.engine = engine
        self.training = training
        self.micro_batch_size = micro_batch_size
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.network: ActorCritic = engine.module
        policy = self.network.policy
        self.pad_id = pad_id
        self.start_id: int | None = decoder_start(policy) if policy.config.is_encoder_decoder else None
        self.warmup_steps = training.value_warmup_steps if isinstance(training, PPO) else 0
        self.network.entropy_learns = training.entropy_coefficient > 0
        self.reference = Reference(self.network.policy) if training.kl.coefficient else None
        self.behaviour = Snapshot(self.network.policy) if training.overlap else None
        """The weights that the samplers have, where they are not those of now."""

    def set_lr(self, step: int, num_steps: int) -> float:
        """Set the learning rates of `step` of `num_steps`, counted from 0, and give the policy's.

        It is 0 while values warm up, and its schedule begins behind that. The value head keeps a rate of its own.
        """
        lr = 0.0
        if step >= self.warmup_steps:
            lr = self.training.rate_at(step - self.warmup_steps, num_steps - self.warmup_steps)
        for group in self.engine.optimizer.param_groups:
            if OWN_LR not in group:
                group["lr"] = lr
        return lr

    def forward(self, samples: Sequence[Sample]) -> Judged:
        """One pass over some samples; `Judged` has their tokens one after the other."""
        prompts, completions = [sample.prompt_ids for sample in samples], [sample.ids for sample in samples]
        if self.training.shared_prefix:
            batch = packed_batch(prompts, completions)
        else:
            batch = padded_batch(prompts, completions, self.pad_id, self.start_id)
        return Judged(*self.engine(*batch.to(self.engine.device)))

    def passes(self, samples: Sequence[Sample], rows: Sequence[int]) -> list[tuple[list[int], bool]]:
        """The rows of each forward pass of this worker, and whether they only keep the other workers company."""
        most = self.micro_batch_size
        whole = self._groups(samples, rows)
        groups = [group[first : first + most] for group in whole for first in range(0, len(group), most)]
        lengths = [max(len(samples[row].prompt_ids) + len(samples[row].ids) for row in group) for group in groups]
        size = max(1, most // max(map(len, groups)))
        shares = micro_batches(range(len(groups)), lengths, size, self.rank, self.world)
        return [([row for n in share for row in groups[n]], False) if share else ([rows[0]], True) for share in shares]

    def _groups(self, samples: Sequence[Sample], rows: Sequence[int]) -> list[list[int]]:
        """The rows that belong together: each alone, or those of a prompt where they share it."""
        if not self.training.shared_prefix:
            return [[row] for row in rows]
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(samples[row].row, []).append(row)
        return list(groups.values())

    @torch.no_grad()
    def judge(self, samples: Sequence[Sample], weights: AbstractContextManager[Any] | None = None) -> Tensor:
        """Log-probabilities, entropies and values of all samples: fp32 [3, samples, tokens]; values 0 without a critic.

        With `weights`, by those that it puts into the model meanwhile.
        """
        self.engine.eval()
        width = max(len(sample.ids) for sample in samples)
        found = torch.zeros(3, len(samples), width, device=self.engine.device)
        self.engine.empty_partition_cache()
        with weights or nullcontext():
            for rows, is_padding in self.passes(samples, range(len(samples))):
                judged = self.forward([samples[row] for row in rows])
                if is_padding:
                    continue
                lengths = [len(samples[row].ids) for row in rows]
                for kind, values in enumerate(judged):
                    for row, part in zip(rows, values.split(lengths) if values is not None else (), strict=False):
                        found[kind, row, : len(part)] = part
            self.engine.empty_partition_cache()
        dist.all_reduce(found)
        return found

    def prepare(self, samples: Sequence[Sample]) -> Experience:
        """What the learner knows of a step's samples before it learns from them."""
        samples = list(samples)
        now = self.judge(samples)
        drawn = self.judge(samples, self.behaviour.active()) if self.behaviour else now
        ref = self.judge(samples, self.reference.active())[0] if self.reference else drawn[0]
        device = self.engine.device
        mask = pad([[1.0] * len(sample.ids) for sample in samples]).to(device)
        rewards = pad([sample.token_rewards for sample in samples]).to(device)
        lost = (rewards * mask).sum(1).double().cpu() - torch.tensor([sample.reward for sample in samples]).double()
        assert (lost.abs() <= 1e-5 * (1 + rewards.abs().sum(1).cpu())).all(), "completions lose rewards"
        return Experience(samples, mask, rewards, drawn[0], ref, now[2], drawn[1])

    def learn(
        self, experience: Experience, advantages: Tensor, returns: Tensor | None, step: int, coefficient: float
    ) -> dict[str, float]:
        """All updates of a step, and what was measured on the way: means over their tokens.

        `grad_norm` is that of the gradients before they are clipped. Raises CheckpointError when a loss or a gradient is
        not finite; the weights are then as they were before that update.
        """
        self.network.values_alone = step < self.warmup_steps
        sums: dict[str, float] = {}
        num_done = 0
        for rows in self._parts(experience.samples, step):
            found = self._update(experience, rows, (advantages, returns), step, coefficient)
            num_done += 1
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            limit = self.training.max_update_kl
            if limit is not None and found["update_kl"] > limit:
                break
        told = {name: value / num_done for name, value in sums.items()} | {"num_updates": num_done}
        if isinstance(self.training, CriticFree):
            told["equal_rewards_fraction"] = equal_rewards_fraction(experience.samples)
        return told

    def _parts(self, samples: Sequence[Sample], step: int) -> Iterator[list[int]]:
        """The rows of each update of a step."""
        groups = self._groups(samples, range(len(samples)))
        for epoch in range(self.training.num_updates):
            order = np.random.default_rng([self.training.seed, step, epoch]).permutation(len(groups))
            for part in np.array_split(order, min(self.training.num_mini_batches, len(order))):
                yield [row for group in part for row in groups[group]]

    def _update(
        self,
        experience: Experience,
        rows: list[int],
        targets: tuple[Tensor, Tensor | None],
        step: int,
        coefficient: float,
    ) -> dict[str, float]:
        """One change of the weights, by the samples `rows`."""
        self.engine.train()
        weights = torch.zeros_like(experience.mask)
        weights[rows] = token_weights(experience.mask[rows], self.training.reduction)
        num_tokens = float(experience.mask[rows].sum())
        sums: dict[str, float] = {}
        for share, is_padding in self.passes(experience.samples, rows):
            judged = self.forward([experience.samples[row] for row in share])
            inside = experience.mask[share].bool()
            # DeepSpeed averages gradients over workers, and adds them up over forward passes.
            counts = weights[share][inside] * (0.0 if is_padding else self.world)
            loss, measured = self._losses(judged, experience, share, targets, coefficient)
            self.engine.backward((loss * counts).sum(), scale_wrt_gas=False)
            measured["loss"] = loss * counts * num_tokens / self.world
            for name, values in measured.items():
                sums[name] = sums.get(name, 0.0) + (0.0 if is_padding else float(values.detach().double().sum()))
        totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(totals)
        means = dict(zip(sums, (totals / num_tokens).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise CheckpointError(f"The loss is {means['loss']} at step {step + 1}; try a lower lr or more warmup.")
        self.engine.step()
        if self.network.values_alone:
            forget_steps(self.engine.basic_optimizer)
        # DeepSpeed leaves out a step whose gradients are not finite.
        norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise CheckpointError(
                f"The norm of the gradient is {norm} at step {step + 1}; try a lower lr, more warmup, or precision fp32."
            )
        return means | {"grad_norm": norm}

    def _losses(
        self,
        judged: Judged,
        experience: Experience,
        rows: list[int],
        targets: tuple[Tensor, Tensor | None],
        coefficient: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token of some samples, and what is measured of each: [tokens]."""
        training = self.training
        inside = experience.mask[rows].bool()
        old, ref = experience.old[rows][inside], experience.ref[rows][inside]
        policy_loss, clipped = clipped_policy_loss(judged.logprobs, old, targets[0][rows][inside], training.clip_range)
        measured = {
            "policy_loss": policy_loss,
            "clip_fraction": clipped,
            "update_kl": estimate_kl(old, judged.logprobs, "k3"),
        }
        loss = policy_loss
        if judged.entropy is not None:
            loss = loss - training.entropy_coefficient * judged.entropy
        if coefficient and training.kl.part_of == "loss":
            # Of tokens as the policy of now would draw them.
            ratio = importance_ratio(judged.logprobs.detach(), old)
            loss = loss + coefficient * ratio * estimate_kl(judged.logprobs, ref, training.kl.estimator)
        if isinstance(training, PPO):
            assert judged.values is not None and targets[1] is not None
            value_loss, value_clipped = clipped_value_loss(
                judged.values, experience.values[rows][inside], targets[1][rows][inside], training.value_clip_range
            )
            measured |= {"value_loss": value_loss, "value_clip_fraction": value_clipped}
            value_loss = training.value_coefficient * value_loss
            loss = value_loss if self.network.values_alone else loss + value_loss
        return loss, measured


def forget_steps(optimizer: Any) -> None:
    """Let Adam's bias correction begin anew where there was no gradient yet: moments of 0 are those of no step."""
    for state in optimizer.state.values():
        if not state["exp_avg_sq"].any():
            state["step"].zero_()

"""What was drawn in a step, what it was rewarded with, and what the learner makes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rayrm import files
from rayrm.training.curves import SAMPLES
from rayrm.training.ppo.advantages import estimate_gae, group_relative, leave_one_out, whiten
from rayrm.training.ppo.losses import estimate_kl
from rayrm.training.ppo.settings import GRPO, PPO, RewardedTraining

RULES = ("too_short", "unfinished")
"""The rules of length, as they are counted, and as parts of the rewards that they give."""


@dataclass
class Sample:
    """A completion with its reward, or with the reason why it has none."""

    id: str
    """Id of the row, its visit and the number of the candidate; no two samples of a run share one."""
    row: int
    """Place of its prompt among the rows that are trained on, or among those held out."""
    lang: str
    """`en-de` or `de`."""
    prompt: str
    """The last turn of its prompt, for people to read."""
    prompt_ids: list[int]
    ids: list[int]
    """The completion's tokens, its end token included where it has one."""
    logprobs: list[float]
    """What the sampler says of each of them."""
    is_finished: bool
    """Whether it ended by itself."""
    text: str
    reward: float | None = None
    token_rewards: list[float] = field(default_factory=list)
    """The reward on its tokens; as many, and the same sum."""
    parts: dict[str, float] = field(default_factory=dict)
    """What each scorer added, or would have added to an open gate."""
    is_open: bool | None = None
    """Whether the gate let aspects in; None where there is no gate."""
    truncated: list[str] = field(default_factory=list)
    """Scorers that cut it, or its prompt or reference, and gave what was left a score."""
    fault: str | None = None
    """Why it is left out of the update, as it is counted; None for one that is learned from."""


@dataclass
class Experience:
    """The samples of a step that are learned from, right-padded: tensors are [samples, tokens], fp32."""

    samples: list[Sample]
    mask: Tensor
    """1 for the tokens of completions."""
    rewards: Tensor
    """Composed rewards on their tokens, the cost of divergence not yet taken off."""
    old: Tensor
    """Log-probabilities under the weights that drew, by the learner's own numerics."""
    ref: Tensor
    """Log-probabilities under the reference; equal to `old` where no divergence is counted."""
    values: Tensor
    """Values before learning; 0 without a critic."""
    entropy: Tensor
    """Entropy under the weights that drew."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(sample.ids) for sample in self.samples]

    def drift(self) -> Tensor:
        """|sampler − learner| of the log-probability of each token; 0 outside the mask."""
        sampled = pad([sample.logprobs for sample in self.samples]).to(self.old.device)
        return (sampled - self.old).abs() * self.mask


def pad(rows: Sequence[Sequence[float]]) -> Tensor:
    """Right-padded with 0: fp32 [rows, longest]. What belongs to the k-th token stands at place k."""
    found = torch.zeros(len(rows), max((len(row) for row in rows), default=0))
    for index, row in enumerate(rows):
        found[index, : len(row)] = torch.tensor(row)
    return found


def lone_samples(samples: Sequence[Sample]) -> set[str]:
    """Ids of the samples that are learned from, and whose prompt has no other such sample."""
    num: dict[int, int] = {}
    for sample in samples:
        if sample.fault is None:
            num[sample.row] = num.get(sample.row, 0) + 1
    return {sample.id for sample in samples if sample.fault is None and num[sample.row] == 1}


def equal_rewards_fraction(samples: Sequence[Sample]) -> float:
    """Share of the prompts whose completions all have the same reward: against one another they teach nothing."""
    rewards: dict[int, set[float | None]] = {}
    for sample in samples:
        rewards.setdefault(sample.row, set()).add(sample.reward)
    return sum(len(found) == 1 for found in rewards.values()) / len(rewards)


def compute_advantages(
    experience: Experience, training: RewardedTraining, coefficient: float
) -> tuple[Tensor, Tensor | None]:
    """Advantages and, with a critic, returns [samples, tokens]; `coefficient` is what a nat costs now."""
    mask = experience.mask
    rewards = experience.rewards
    if coefficient and training.kl.part_of == "reward":
        rewards = rewards - coefficient * estimate_kl(experience.old, experience.ref, training.kl.estimator) * mask
    returns = None
    if isinstance(training, PPO):
        advantages, returns = estimate_gae(rewards, experience.values, mask, training.gamma, training.lam)
    else:
        totals, groups = rewards.double().sum(1), [sample.row for sample in experience.samples]
        if isinstance(training, GRPO):
            relative = group_relative(totals, groups, training.scale_by_deviation)
        else:
            relative = leave_one_out(totals, groups)
        advantages = relative.to(rewards.dtype)[:, None] * mask
    if training.whiten_advantages:
        advantages = whiten(advantages, mask)
    return advantages, returns


def record_of(sample: Sample) -> dict[str, Any]:
    """What is written down of a sample."""
    return {
        "id": sample.id,
        "lang": sample.lang,
        "prompt": sample.prompt,
        "text": sample.text,
        "num_tokens": len(sample.ids),
        "is_finished": sample.is_finished,
        "reward": sample.reward,
        "parts": sample.parts,
        "fault": sample.fault,
    }


def write_samples(output: str, name: str, samples: Sequence[Sample]) -> None:
    """Write `<output>/samples/<name>.jsonl`, a line for each sample, also of those that were left out."""
    with files.atomic_file(files.join(output, SAMPLES, f"{name}.jsonl")) as handle:
        for sample in samples:
            handle.write(json.dumps(record_of(sample), ensure_ascii=False).encode() + b"\n")

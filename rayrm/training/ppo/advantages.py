"""Advantages of tokens from rewards: with a critic (GAE), or against the other samples of the prompt (RLOO, GRPO).

Arrays are right-padded: `[samples, tokens]`, with a mask that is 1 for the tokens of a completion, from its first one on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-8
GROUP_EPS = 1e-4


def estimate_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [samples, tokens] of generalised advantage estimation (arXiv 1506.02438).

    A completion is an episode: behind its last token there is no value. Both are 0 where `mask` is.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    values = values * mask
    for token in reversed(range(rewards.shape[1])):
        following = values[:, token + 1] if token + 1 < rewards.shape[1] else torch.zeros_like(running)
        delta = rewards[:, token] + gamma * following - values[:, token]
        running = (delta + gamma * lam * running) * mask[:, token]
        advantages[:, token] = running
    return advantages, (advantages + values) * mask


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with mean 0 and variance 1 (unbiased) over the mask; 0 outside. A single value becomes 0."""
    num = mask.sum()
    mean = (values * mask).sum() / num
    variance = ((values - mean).square() * mask).sum() / (num - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + EPS) * mask


def leave_one_out(rewards: Tensor, groups: Sequence[int]) -> Tensor:
    """Each sample's reward minus the mean of the others of its group [samples] (RLOO, arXiv 2402.14740).

    `groups` [samples] says which samples answer the same prompt; each group has two samples or more.
    """
    sums, nums = _group_sums(rewards, groups)
    return rewards - (sums - rewards) / (nums - 1)


def group_relative(rewards: Tensor, groups: Sequence[int], scale: bool = True) -> Tensor:
    """Each sample's reward minus its group's mean, over its unbiased standard deviation (GRPO, arXiv 2402.03300).

    Without `scale` it stays undivided (arXiv 2503.20783). Groups as in `leave_one_out`; equal rewards give 0.
    """
    sums, nums = _group_sums(rewards, groups)
    centred = rewards - sums / nums
    if not scale:
        return centred
    squares, _ = _group_sums(centred.square(), groups)
    return centred / ((squares / (nums - 1)).sqrt() + GROUP_EPS)


def _group_sums(values: Tensor, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For each sample the sum over its group, and the group's size."""
    _, place = torch.unique(torch.as_tensor(groups, device=values.device), return_inverse=True)
    size = int(place.max()) + 1
    sums = torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, place, values)
    nums = torch.zeros_like(sums).index_add_(0, place, torch.ones_like(values))
    return sums[place], nums[place]

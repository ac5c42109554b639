"""Losses of tokens, and how they become the loss of a batch.

Every loss is a tensor of tokens, of any shape; `token_weights` says what each of them counts. So the loss of a batch is
one sum, the same for any number of forward passes and processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayrm.training.ppo.kl import Estimator
from rayrm.training.ppo.settings import Reduction

MOST_LOG_RATIO = 20.0
"""Log-ratios count up to this one, of either sign, so that none becomes infinite."""


def importance_ratio(logprobs: Tensor, old: Tensor) -> Tensor:
    """ρ = exp(logprobs − old), the probability of each token now over that when it was drawn; of the shape given."""
    return _bounded(logprobs - old).exp()


def clipped_policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's loss (arXiv 1707.06347) and, 0 or 1, whether the clip took the gradient away; each of the shape given.

    −min(ρ·A, clip(ρ, 1−ε, 1+ε)·A) with ρ the `importance_ratio`.
    """
    ratio = importance_ratio(logprobs, old)
    free = -advantages * ratio
    bound = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, bound), (bound > free).to(logprobs.dtype)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²), and, 0 or 1, whether the clip decided; ½·(V − R)² without a clip."""
    if clip is None:
        return 0.5 * (values - returns).square(), torch.zeros_like(values)
    bound = torch.minimum(torch.maximum(values, old - clip), old + clip)
    free_loss, bound_loss = (values - returns).square(), (bound - returns).square()
    return 0.5 * torch.maximum(free_loss, bound_loss), (bound_loss > free_loss).to(values.dtype)


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """What a drawn token tells of KL(policy ‖ reference), in nats; of the shape given.

    With d = logprobs − ref_logprobs: k1 = d (unbiased, may be negative), k2 = ½d², k3 = exp(−d) − 1 + d (unbiased, never
    negative), abs = |d|. Source: http://joschu.net/blog/kl-approx.html.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        d = _bounded(d)
        return torch.expm1(-d) + d
    return d.abs()


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)


def token_weights(mask: Tensor, reduction: Reduction) -> Tensor:
    """What each token counts in the loss of a batch [samples, tokens]; 0 outside the mask.

    `token_mean`: all tokens of the batch alike; `sequence_mean`: each completion alike, the mean over its tokens;
    `sequence_sum`: the sum over a completion's tokens, the mean over completions.
    """
    if reduction == "token_mean":
        return mask / mask.sum().clamp(min=1)
    per_sample = mask / len(mask)
    return per_sample if reduction == "sequence_sum" else per_sample / mask.sum(1, keepdim=True).clamp(min=1)

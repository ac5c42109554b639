"""Log-probabilities and entropies from logits, without a second tensor as wide as the vocabulary in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Logits that are looked at together; some copies of so many in fp32 are held."""
LEAST = -1e30
"""Log-probability of what has none, as a logit of −∞ says: times 0 it is still 0."""


def judge_tokens(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each of `targets` [tokens], and the entropy in nats of the distribution that it is one of.

    `logits` [tokens, vocabulary] of any precision are divided by `temperature`; both results are fp32, or fp64 where
    logits are. Without `with_entropy` there is None. Both bear a gradient, which has the precision of `logits`.
    """
    logprobs, entropy = _Judge.apply(logits, targets, temperature, with_entropy)
    return logprobs, entropy


class _Judge(torch.autograd.Function):
    """Keeps the logits alone for the backward pass: log_softmax would keep as much again, in fp32."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logprobs, entropy = [], []
        for rows, chosen in _chunks(logits, targets):
            all_logprobs = _log_softmax(rows, temperature)
            logprobs.append(all_logprobs.gather(1, chosen[:, None]).squeeze(1))
            if with_entropy:
                entropy.append(_entropy(all_logprobs))
        ctx.save_for_backward(logits, targets)
        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        return torch.cat(logprobs), torch.cat(entropy) if with_entropy else None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, targets = ctx.saved_tensors
        found = torch.empty_like(logits)
        first = 0
        for rows, chosen in _chunks(logits, targets):
            part = slice(first, first := first + len(rows))
            all_logprobs = _log_softmax(rows, ctx.temperature)
            of_logprob, of_entropy = (None if g is None else g[part, None] / ctx.temperature for g in gradients)
            # d log p(chosen) / dx = [chosen] − p, and dH / dx = −p · (log p + H).
            factor = torch.zeros_like(all_logprobs)
            if of_entropy is not None:
                factor.add_(all_logprobs).add_(_entropy(all_logprobs)[:, None]).mul_(of_entropy)
            if of_logprob is not None:
                factor.add_(of_logprob)
            own = factor.mul_(all_logprobs.exp_()).neg_()
            if of_logprob is not None:
                own.scatter_add_(1, chosen[:, None], of_logprob)
            found[part] = own
        return found, None, None, None


def _chunks(logits: Tensor, targets: Tensor) -> Any:
    size = max(1, CHUNK // logits.shape[1])
    return zip(logits.split(size), targets.split(size), strict=True)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Of a few rows, in fp32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1).clamp_(min=LEAST)


def _entropy(logprobs: Tensor) -> Tensor:
    return -(logprobs.exp() * logprobs).sum(-1)

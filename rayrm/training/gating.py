"""What stands on the heads of a reward model with several objectives: a verbosity penalty and a gate.

The method is that of arXiv 2406.12845: a transform takes from each score what goes with verbosity; a gate, trained on
preferences, weighs the adjusted scores by the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayrm.errors import CheckpointError, ConfigError, SchemaError
from rayrm.training.optimization import Optimization
from rayrm.training.reward_metrics import rank
from rayrm.training.ridge import BLOCK_ROWS, Floats, RidgeConfig, fitting_device

if TYPE_CHECKING:
    from torch import Tensor

    from rayrm.models.gating import Gate

PENALTIES = (0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, *(twentieth / 20 for twentieth in range(4, 20)))
"""Penalties that are tried, 24 from 0 to 0.95; from 0.15 on they lie 0.05 apart."""
RECORD_STEPS = 100
"""Steps between two records of the gate's training."""


class Gating(RidgeConfig):
    """How heads, penalties and gate of a reward model with several objectives are fitted."""

    verbosity: str | None = None
    """Objective that no other may go along with; its own score bears no reward. Null leaves the scores as they are."""
    max_correlation: float = Field(0.03, ge=-1, le=1)
    """Highest rank correlation with verbosity that a score may keep on the reference rows."""
    hidden_size: int = Field(1024, ge=1)
    """Width of the gate's hidden layers."""
    num_hidden_layers: int = Field(3, ge=0)
    """Hidden layers of the gate."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the gate's hidden values that training leaves out."""
    temperature: float = Field(10.0, gt=0)
    """The gate's logits are divided by this; higher makes more even weights."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of AdamW for the gate, which falls to 0 along a cosine."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of the gate's matrices."""
    num_steps: int = Field(2000, ge=1)
    """Steps of the gate's training."""
    batch_size: int = Field(1024, ge=1)
    """Pairs a step; all of them where there are fewer."""


def find_transform(scores: Floats, objectives: Sequence[str], config: Gating) -> NDArray[np.float64]:
    """The transform [objectives, objectives] for the scores of reference rows [rows, objectives].

    It is the identity where the config names no verbosity. Raises ConfigError when none of the objectives has its name,
    and SchemaError as `find_penalties` does.
    """
    if config.verbosity is None:
        return np.eye(len(objectives))
    if config.verbosity not in objectives:
        raise ConfigError(f"'verbosity' is '{config.verbosity}', and the objectives are {', '.join(objectives)}.")
    verbosity = list(objectives).index(config.verbosity)
    return transform_matrix(find_penalties(scores, verbosity, config.max_correlation), verbosity)


def find_penalties(scores: Floats, verbosity: int, max_correlation: float = 0.03) -> NDArray[np.float64]:
    """How much of the verbosity score to take from each score, [objectives], for scores [rows, objectives].

    It is the smallest of `PENALTIES` with which Spearman's correlation of score − penalty · verbosity with verbosity is
    at most `max_correlation`, else 1. The sign counts: a score that falls with verbosity keeps its place. A score that
    is the same in all rows has no correlation. Verbosity itself gets 1. Raises SchemaError when there are fewer than
    two rows or a score is not finite.
    """
    if len(scores) < 2 or not np.isfinite(scores).all():
        raise SchemaError(
            f"The scores of the {len(scores)} reference rows cannot be compared with verbosity; give at least two rows "
            "with finite scores."
        )
    verbose = scores[:, verbosity]
    ranks = rank(verbose.astype(np.float64))
    penalties = np.ones(scores.shape[1])
    for column in range(scores.shape[1]):
        if column == verbosity:
            continue
        for penalty in PENALTIES:
            if _correlation(rank((scores[:, column] - penalty * verbose).astype(np.float64)), ranks) <= max_correlation:
                penalties[column] = penalty
                break
    return penalties


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's correlation; 0 where there is no spread."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def transform_matrix(penalties: Floats, verbosity: int) -> NDArray[np.float64]:
    """T [objectives, objectives] with `scores @ T`: each score less its penalty · verbosity, and 0 for verbosity itself.

    T is the identity with row `verbosity` set to minus the penalties, and 0 in that row's own column.
    """
    transform = np.eye(len(penalties))
    transform[verbosity] -= penalties
    transform[verbosity, verbosity] = 0.0
    return transform


class GatePairs(NamedTuple):
    """Preferences that a gate learns from; a place in each array is a pair."""

    prompts: Floats
    """Embeddings of the prompts, [pairs, hidden size]."""
    chosen: Floats
    """Scores of the chosen sides before the transform, [pairs, objectives]."""
    rejected: Floats
    """Those of the rejected sides."""
    is_held_out: NDArray[np.bool_]
    """Pairs that are measured and not trained on, [pairs]."""
    weights: NDArray[np.float32]
    """Weight of each pair in the loss, [pairs]."""


class FittedGate(NamedTuple):
    """A gate on the CPU, for evaluation, and how it came about."""

    gate: Gate
    history: list[dict[str, float]]
    """Records of `step`, the mean `loss` since the last record and, with pairs held out, their `eval_accuracy`."""


def fit_gate(
    pairs: GatePairs,
    transform: Floats,
    config: Gating,
    seed: int,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> FittedGate:
    """The gate with which Σ weights · (scores @ transform) tells chosen from rejected, by Bradley and Terry's loss.

    `seed` decides the first weights, the batches and the dropout; `progress` gets each record. A tie is a miss in
    `eval_accuracy`. Raises SchemaError when no pair is left to train on, and CheckpointError when the loss is not finite.
    """
    import torch

    from rayrm.models.gating import Gate

    trained = np.flatnonzero(~pairs.is_held_out)
    if not len(trained):
        raise SchemaError(f"All {len(pairs.prompts)} pairs are held out, and the gate has none to learn from.")
    differences = (np.asarray(pairs.chosen, np.float64) - pairs.rejected) @ transform
    widths = [pairs.prompts.shape[1], *[config.hidden_size] * config.num_hidden_layers, differences.shape[1]]
    optimization = Optimization(lr=config.lr, warmup_fraction=0.0, weight_decay=config.weight_decay)
    history: list[dict[str, float]] = []
    losses: list[Tensor] = []
    device = fitting_device()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed(seed)
        gate = Gate(widths, config.temperature, config.dropout).to(device)
        optimizer = optimization.optimizer(gate)
        for step, rows in enumerate(_batches(trained, config, seed)):
            for group in optimizer.param_groups:
                group["lr"] = optimization.rate_at(step, config.num_steps)
            weights = torch.from_numpy(pairs.weights[rows]).to(device)
            loss = (weights * gate_losses(reward_gaps(gate, pairs.prompts[rows], differences[rows]))).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if (step + 1) % RECORD_STEPS == 0 or step + 1 == config.num_steps:
                history.append({"step": step + 1, "loss": _mean(losses, step + 1)})
                history[-1] |= _measure(gate, pairs, differences)
                losses.clear()
                if progress is not None:
                    progress(history[-1])
    return FittedGate(gate.cpu().eval(), history)


def _mean(losses: Sequence[Tensor], step: int) -> float:
    mean = sum(float(loss) for loss in losses) / len(losses)
    if not math.isfinite(mean):
        raise CheckpointError(
            f"The gate's loss is {mean} at step {step}; try a lower lr, or look for embeddings and scores that are not "
            "finite."
        )
    return mean


def _measure(gate: Gate, pairs: GatePairs, differences: Floats) -> dict[str, float]:
    """`eval_accuracy` of the pairs that are held out; nothing where none is."""
    import torch

    rows = np.flatnonzero(pairs.is_held_out)
    if not len(rows):
        return {}
    hits = 0
    gate.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), BLOCK_ROWS):
            part = rows[start : start + BLOCK_ROWS]
            hits += int((reward_gaps(gate, pairs.prompts[part], differences[part]) > 0).sum())
    gate.train()
    return {"eval_accuracy": hits / len(rows)}


def _batches(rows: NDArray[np.int64], config: Gating, seed: int) -> Iterator[NDArray[np.int64]]:
    """`num_steps` batches of one size, from one new order of all rows after the other."""
    random = np.random.default_rng(seed)
    size = min(config.batch_size, len(rows))
    waiting = np.empty(0, np.int64)
    for _ in range(config.num_steps):
        if len(waiting) < size:
            waiting = np.concatenate([waiting, random.permutation(rows)])
        yield waiting[:size]
        waiting = waiting[size:]


def reward_gaps(gate: Gate, prompts: Floats, differences: Floats) -> Tensor:
    """Chosen less rejected reward of pairs, fp32 [pairs], whose adjusted scores differ by [pairs, objectives].

    Both sides have one prompt, and so one gate.
    """
    import torch

    device = gate.logit_scale.device
    weights = gate(torch.from_numpy(prompts).to(device, torch.float32))
    return (weights * torch.from_numpy(differences).to(device, torch.float32)).sum(dim=-1)


def gate_losses(gaps: Tensor) -> Tensor:
    """−log σ(gap); finite for any gap."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(gaps)

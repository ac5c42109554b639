"""A linear head for each objective, by ridge regression on embeddings (the first stage of arXiv 2406.12845)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayrm.config import Config
from rayrm.errors import SchemaError

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.floating[Any]]
"""Fp32 or fp64; arrays of embeddings may be memory-mapped and are read in blocks."""
BLOCK_ROWS = 4096
"""Rows that are read at a time."""


class RidgeConfig(Config):
    """How the heads are fitted."""

    alphas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4), min_length=1
    )
    """Strengths of the heads' penalty on their squared length; each objective takes what errs least on held-out rows."""
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of an objective's rated rows that choose its alpha; the head is then fitted to all of them."""


class Heads(NamedTuple):
    """A linear head for each objective: score = embedding · weights."""

    weights: NDArray[np.float64]
    """[objectives, hidden size]."""
    alphas: NDArray[np.float64]
    """The alpha that was chosen, [objectives]."""
    errors: NDArray[np.float64]
    """Mean squared error on the held-out rows, of the head that was fitted without them, [objectives]."""


def fit_heads(embeddings: Floats, ratings: Floats, objectives: Sequence[str], config: RidgeConfig, seed: int) -> Heads:
    """The heads that minimise Σ (rating − embedding · w)² + alpha · |w|², without an intercept.

    `embeddings` is [rows, hidden size] and `ratings` [rows, objectives], NaN where a row is not rated. Alpha is chosen
    on rows that `seed` draws; the head is then fitted to all rated rows, not only to those that were not held out. All
    sums are in fp64. Raises SchemaError for an objective with too few ratings and for a value that is not finite.
    """
    is_rated = ~np.isnan(ratings)
    rated_alike: dict[bytes, list[int]] = {}
    for column, name in enumerate(objectives):
        _check_enough(int(is_rated[:, column].sum()), name, config)
        # Objectives with ratings in the same rows share their sums.
        rated_alike.setdefault(is_rated[:, column].tobytes(), []).append(column)
    num_objectives = len(objectives)
    heads = Heads(np.empty((num_objectives, embeddings.shape[1])), np.empty(num_objectives), np.empty(num_objectives))
    for columns in rated_alike.values():
        rows = np.random.default_rng(seed).permutation(np.flatnonzero(is_rated[:, columns[0]]))
        num_held_out = round(config.validation_fraction * len(rows))
        sides = np.sort(rows[num_held_out:]), np.sort(rows[:num_held_out])
        fitted = _fit_ridge(embeddings, ratings[:, columns], sides, config.alphas)
        for array, found in zip(heads, fitted, strict=True):
            array[columns] = found
    return heads


def _check_enough(num_rated: int, name: str, config: RidgeConfig) -> None:
    if not num_rated:
        raise SchemaError(f"No row has a rating of '{name}'; leave it out of the objectives.")
    if not 0 < round(config.validation_fraction * num_rated) < num_rated:
        raise SchemaError(
            f"'{name}' is rated in {num_rated} rows, of which validation_fraction {config.validation_fraction:g} leaves "
            "none for one side; give more ratings, or leave it out of the objectives."
        )


def _fit_ridge(
    embeddings: Floats, ratings: Floats, sides: tuple[NDArray[np.int64], NDArray[np.int64]], alphas: Sequence[float]
) -> Heads:
    """Heads of objectives that have ratings in the same rows; `sides` are the rows to fit and to validate."""
    import torch

    hidden, num_objectives = embeddings.shape[1], ratings.shape[1]
    device = fitting_device()
    gram = torch.zeros((hidden, hidden), dtype=torch.float64, device=device)
    moments = torch.zeros((hidden, num_objectives), dtype=torch.float64, device=device)
    for x, y in _blocks(embeddings, ratings, sides[0]):
        gram.addmm_(x.T, x)
        moments.addmm_(x.T, y)
    candidates = torch.stack([_solve(gram, moments, alpha) for alpha in alphas])
    squares = torch.zeros((len(alphas), num_objectives), dtype=torch.float64, device=device)
    for x, y in _blocks(embeddings, ratings, sides[1]):
        squares += ((x @ candidates - y) ** 2).sum(dim=1)
        gram.addmm_(x.T, x)
        moments.addmm_(x.T, y)
    chosen = np.asarray(alphas)[squares.argmin(dim=0).cpu().numpy()]
    weights = torch.empty_like(moments)
    for alpha in np.unique(chosen):
        columns = np.flatnonzero(chosen == alpha)
        weights[:, columns] = _solve(gram, moments[:, columns], float(alpha))
    errors = squares.amin(dim=0) / len(sides[1])
    return Heads(weights.T.cpu().numpy(), chosen, errors.cpu().numpy())


def _solve(gram: Tensor, moments: Tensor, alpha: float) -> Tensor:
    # For nine alphas this costs a fifth of one decomposition into eigenvectors.
    import torch

    ridge = gram.clone()
    ridge.diagonal().add_(alpha)
    return torch.linalg.solve(ridge, moments)


def _blocks(embeddings: Floats, ratings: Floats, rows: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
    import torch

    device = fitting_device()
    for start in range(0, len(rows), BLOCK_ROWS):
        picked = rows[start : start + BLOCK_ROWS]
        x, y = embeddings[picked].astype(np.float64), ratings[picked].astype(np.float64)
        is_finite = np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)
        if not is_finite.all():
            raise SchemaError(f"The embedding or a rating of row {picked[~is_finite][0]} is not finite; drop that row.")
        yield torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


def fitting_device() -> str:
    """The GPU when there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

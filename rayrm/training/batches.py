"""Which rows a step trains on, and how they are shared out: the same rows for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def batch_of_step(step: int, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Rows of the global batch of `step`, counted from 0; the last batch of an epoch may be smaller.

    Every epoch is a permutation drawn from `seed` and its number, so the order hangs on nothing but the step.
    """
    epoch, position = divmod(step, steps_per_epoch(num_rows, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    batch: list[int] = order[position * batch_size : (position + 1) * batch_size].tolist()
    return batch


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Global batches in one pass over `num_rows` rows."""
    return -(-num_rows // batch_size)


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], micro_batch_size: int, rank: int, world: int
) -> Iterator[list[int]]:
    """The rows that process `rank` of `world` takes in each forward pass, longest first.

    All processes make the same number of passes and have rows of like length in the same pass; in the last pass some
    may get fewer rows than others, or none. Together they take every row once.
    """
    by_length = sorted(rows, key=lambda row: (-lengths[row], row))
    for start in range(0, len(by_length), micro_batch_size * world):
        yield by_length[start : start + micro_batch_size * world][rank::world]

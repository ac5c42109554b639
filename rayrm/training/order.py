"""The order in which rows are trained on: by seed and epoch alone, with rows of like length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

POOL_BATCHES = 50


class LengthGrouped:
    """A sampler whose every `batch_size` consecutive rows have nearly the same length, so that little is padding.

    The order hangs on `seed` and the epoch, so a resumed run goes on with the rows that were still to come, for any
    number of workers and any micro batch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator: Any = np.random.default_rng([self.seed, self.epoch])
        rows = generator.permutation(len(self.lengths))
        # The rows of the last batch, which may be smaller, are any rows, and stay last.
        whole = len(rows) - len(rows) % self.batch_size
        pools = np.split(rows[:whole], range(POOL_BATCHES * self.batch_size, whole, POOL_BATCHES * self.batch_size))
        grouped = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        batches = generator.permutation(grouped.reshape(-1, self.batch_size))
        yield from batches.ravel().tolist()
        yield from rows[whole:].tolist()

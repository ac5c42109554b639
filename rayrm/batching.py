"""Batches by token budget: rows of like length together, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices into `lengths`, longest first, in batches of at most `budget` padded tokens.

    A batch of n rows costs n × its longest row. A row that is longer than the budget is a batch of its own. Every
    index comes exactly once; rows of equal length keep their order. The first batch is the most costly one, so a
    budget that does not fit into memory shows at once.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch

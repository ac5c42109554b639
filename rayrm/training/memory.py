"""Training goes on with half the micro batch when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rayrm import files
from rayrm.errors import CheckpointError

log = logging.getLogger("rayrm")
MICRO_BATCH = "micro_batch.json"


def fitting_micro_batch(output: str, wanted: int) -> int:
    """Rows a forward pass that fit into memory as far as this run knows: `wanted`, or less after a failure."""
    found = files.read_json(files.join(output, MICRO_BATCH))
    return min(wanted, found["micro_batch_size"]) if found else wanted


@contextmanager
def halved_when_out_of_memory(output: str, micro_batch_size: int, rows_per_worker: int | None) -> Iterator[None]:
    """End the attempt when memory runs out, and have the next one use half the micro batch.

    The next micro batch divides `rows_per_worker`, the rows of a worker and step, so the global batch stays; null where
    any will do. Raises CheckpointError when a single row does not fit.
    """
    from accelerate.utils.memory import should_reduce_batch_size
    from ray.exceptions import RayError
    from torch import OutOfMemoryError

    try:
        yield
    except RuntimeError as error:
        # Other roles of a run have errors of theirs, which Ray gives the class of what was raised there.
        if isinstance(error, RayError):
            raise
        if not isinstance(error, OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        if micro_batch_size == 1:
            raise CheckpointError(
                "Memory runs out with a micro batch of one row; lower max_length, or turn on "
                "parallelism.gradient_checkpointing, offloading or a higher zero_stage."
            ) from error
        sizes = range(micro_batch_size // 2, 0, -1)
        smaller = next(size for size in sizes if rows_per_worker is None or rows_per_worker % size == 0)
        files.write_json(files.join(output, MICRO_BATCH), {"micro_batch_size": smaller})
        log.warning("out of memory with a micro batch of %d rows; going on with %d", micro_batch_size, smaller)
        raise

"""How many batches a replica runs at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayrm.serving.batching import Item, TokenBatcher
from rayrm.serving.config import HostedModel

LONGEST_LANE_S = 2.0
"""Seconds that a full batch may take on one thread for a replica to run one on each."""


def make_batcher(
    config: HostedModel, run: Callable[[list[Any]], Sequence[Any]], warm: Item, is_padded: bool
) -> TokenBatcher:
    """The queue before a model, after two runs of `warm`, the second of which tells the speed.

    On CPUs, many short batches with a thread each give more than one after another with all threads.
    """
    import torch

    num_threads = max(1, int(config.replicas.num_cpus))

    def tokens_a_second() -> float:
        torch.set_num_threads(num_threads)
        run([warm.payload])
        began = time.monotonic()
        run([warm.payload])
        return warm.num_tokens / max(time.monotonic() - began, 1e-6)

    # In a thread that ends, since its helpers end with it.
    with ThreadPoolExecutor(1) as thread:
        tokens_s = thread.submit(tokens_a_second).result()
    batch_s = config.token_budget * num_threads / tokens_s
    num_lanes = 1 if config.replicas.num_gpus or batch_s > LONGEST_LANE_S else num_threads

    def run_lane(payloads: list[Any], share: int) -> Sequence[Any]:
        # Each thread has a number of its own.
        torch.set_num_threads(share * num_threads // num_lanes)
        return run(payloads)

    return TokenBatcher(run_lane, config.token_budget, tokens_s / num_lanes, is_padded, config.cache_size, num_lanes)

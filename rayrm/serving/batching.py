"""Batches across requests, within a replica: by token budget, rows of like length together, the most urgent first.

A lane is a thread that runs the model. Whenever one is free, the item whose deadline is nearest goes, and with it as
many others as the budget holds, those of the most similar length first; so a long item waits for no more than the
batches of those before it, and short ones are not padded to its length. An item is refused at once when what stands
before it will take longer than its deadline, as told by the tokens waiting and the speed of the batches so far.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

SMOOTHING = 0.2
"""Share of the newest batch in the measured speed."""


class OverloadedError(Exception):
    """The queue's wait is longer than the deadline."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is longer than the deadline; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s
        """Seconds after which the queue will be short enough, as far as it is known now."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.retry_after_s,)


class Item(NamedTuple):
    """Something to be computed."""

    key: Hashable
    """Items with the same key give the same result; those in flight together are computed once."""
    payload: Any
    """What the model takes."""
    num_tokens: int
    """Tokens that the model computes for it."""


class Outcome(NamedTuple):
    """A result, and how it came about."""

    value: Any
    """What the model gave."""
    queue_s: float
    """Seconds from asking to the start of the batch; 0 from the cache."""
    run_s: float
    """Seconds that the batch took."""
    batch_tokens: int
    """Tokens of the batch, padding left out."""
    padded_tokens: int
    """Tokens of the batch, padding included."""


class _Waiting:
    """An item in the queue, and those who wait for it."""

    def __init__(self, item: Item, asked: float, deadline: float) -> None:
        self.item, self.asked, self.deadline = item, asked, deadline
        self.future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.waiters = 0


class TokenBatcher:
    """The queue before a model; to be used from one event loop."""

    def __init__(
        self,
        run: Callable[[list[Any], int], Sequence[Any]],
        token_budget: int,
        tokens_s: float,
        is_padded: bool,
        cache_size: int = 0,
        num_lanes: int = 1,
    ) -> None:
        """`run` gives one result for each payload, in order; it is called in threads, and told over how many lanes it
        may spread: all of them when nothing else runs or waits, else its own.

        `token_budget` bounds the tokens of a batch, with padding if `is_padded`; an item above it runs alone.
        `tokens_s` is a lane's speed to begin with. `cache_size` is how many results are remembered by their keys.
        """
        self._run = run
        self._budget = token_budget
        self._is_padded = is_padded
        self._cache_size = cache_size
        self._cache: OrderedDict[Hashable, Any] = OrderedDict()
        self._known: dict[Hashable, _Waiting] = {}
        # In the order in which they came.
        self._queue: dict[_Waiting, None] = {}
        # A thread that spreads over several processors keeps helpers, and with too many of them OpenMP lets all sleep
        # after each step; so the batches that spread share a thread.
        self._one = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._many = ThreadPoolExecutor(num_lanes, thread_name_prefix="lane")
        self._num_lanes = num_lanes
        self._num_awake = 0
        self._lanes: set[asyncio.Task[None]] = set()
        self._ends: dict[int, float] = {}
        self.tokens_s = tokens_s
        """Tokens a second of a lane, by the newest batches, the larger ones more than the smaller."""
        self._seen = (float(token_budget), token_budget / tokens_s)
        self.queued_tokens = 0
        """Tokens of all items that wait."""

    def wait_s(self) -> float:
        """Seconds until an item that comes now would start."""
        if len(self._ends) < self._num_lanes and not self._queue:
            return 0.0
        now = time.monotonic()
        left = sum(max(0.0, end - now) for end in self._ends.values())
        return (left + self.queued_tokens / self.tokens_s) / self._num_lanes

    async def submit(self, item: Item, deadline_s: float) -> Outcome:
        """The outcome of an item, within `deadline_s` seconds.

        Raises OverloadedError when the queue is too long for that, TimeoutError when it took longer after all, and what
        the model raised. An item that nobody waits for any more leaves the queue.
        """
        if item.key in self._cache:
            self._cache.move_to_end(item.key)
            return Outcome(self._cache[item.key], 0.0, 0.0, 0, 0)
        waiting = self._known.get(item.key)
        now = time.monotonic()
        if waiting is None:
            wait = self.wait_s()
            if wait > deadline_s:
                raise OverloadedError(wait - deadline_s)
            waiting = self._known[item.key] = _Waiting(item, now, now + deadline_s)
            self._queue[waiting] = None
            self.queued_tokens += item.num_tokens
            if self._num_awake < self._num_lanes:
                self._num_awake += 1
                lane = asyncio.create_task(self._drain())
                self._lanes.add(lane)
                lane.add_done_callback(self._lanes.discard)
        else:
            waiting.deadline = min(waiting.deadline, now + deadline_s)
        waiting.waiters += 1
        try:
            # Shielded, since others may wait for the same item.
            return await asyncio.wait_for(asyncio.shield(waiting.future), deadline_s)
        finally:
            waiting.waiters -= 1
            if not waiting.waiters and waiting in self._queue:
                self._leave(waiting)
                del self._known[item.key]

    def _leave(self, waiting: _Waiting) -> None:
        del self._queue[waiting]
        self.queued_tokens -= waiting.item.num_tokens

    async def _drain(self) -> None:
        try:
            while self._queue:
                await self._run_batch(self._next_batch())
        finally:
            # In the same step as the last look at the queue, so that whoever comes next wakes a lane.
            self._num_awake -= 1

    async def _run_batch(self, batch: list[_Waiting]) -> None:
        for waiting in batch:
            self._leave(waiting)
        sizes = [waiting.item.num_tokens for waiting in batch]
        total, padded = sum(sizes), self._cost(len(sizes), max(sizes), sum(sizes))
        share = 1 if self._queue or self._ends else self._num_lanes
        pool, payloads = self._one if share > 1 else self._many, [waiting.item.payload for waiting in batch]
        began = time.monotonic()
        self._ends[id(batch)] = began + total / self.tokens_s / share
        try:
            values = await asyncio.get_running_loop().run_in_executor(pool, self._run, payloads, share)
            if len(values) != len(batch):
                raise RuntimeError(f"the model gave {len(values)} results for {len(batch)} items")
        except Exception as error:
            # Whatever the model raised is for those who wait.
            for waiting in batch:
                del self._known[waiting.item.key]
                waiting.future.set_exception(error)
                # Read here, since there may be nobody left to hear of it.
                waiting.future.exception()
            return
        finally:
            del self._ends[id(batch)]
        taken = max(time.monotonic() - began, 1e-6)
        tokens, lane_s = self._seen
        self._seen = tokens + SMOOTHING * (total - tokens), lane_s + SMOOTHING * (taken * share - lane_s)
        self.tokens_s = self._seen[0] / self._seen[1]
        for waiting, value in zip(batch, values, strict=True):
            del self._known[waiting.item.key]
            self._remember(waiting.item.key, value)
            waiting.future.set_result(Outcome(value, began - waiting.asked, taken, total, padded))

    def _remember(self, key: Hashable, value: Any) -> None:
        if self._cache_size:
            self._cache[key] = value
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def _next_batch(self) -> list[_Waiting]:
        first = min(self._queue, key=lambda waiting: waiting.deadline)
        size = first.item.num_tokens
        if self._is_padded:
            others = sorted(self._queue, key=lambda waiting: abs(waiting.item.num_tokens - size))
        else:
            others = sorted(self._queue, key=lambda waiting: waiting.deadline)
        batch, longest, total = [first], size, size
        for waiting in others:
            if waiting is first:
                continue
            num = waiting.item.num_tokens
            if self._cost(len(batch) + 1, max(longest, num), total + num) > self._budget:
                break
            batch.append(waiting)
            longest, total = max(longest, num), total + num
        return batch

    def _cost(self, num: int, longest: int, total: int) -> int:
        return num * longest if self._is_padded else total

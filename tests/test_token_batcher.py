import asyncio
import threading
import time

import pytest

from rayrm.serving.autoscaling import wanted_replicas
from rayrm.serving.batching import Item, OverloadedError, TokenBatcher


class Model:
    """Doubles its payloads; runs when it is let, and writes down its batches."""

    def __init__(self):
        self.batches = []
        self.shares = []
        self.may_run = threading.Event()
        self.may_run.set()

    def __call__(self, payloads, share):
        self.batches.append(list(payloads))
        self.shares.append(share)
        assert self.may_run.wait(10)
        if "bad" in payloads:
            raise RuntimeError("broken")
        return [2 * payload for payload in payloads]


def batcher(model, budget=100, tokens_s=1e6, is_padded=True, **options):
    return TokenBatcher(model, budget, tokens_s, is_padded, **options)


async def behind_a_first_one(model, queue, items, deadline_s=10.0):
    """Outcomes of items that came while the model was busy, all together."""
    model.may_run.clear()
    first = asyncio.create_task(queue.submit(Item("first", 0, 1), 10.0))
    await asyncio.sleep(0.05)
    deadlines = deadline_s if isinstance(deadline_s, list) else [deadline_s] * len(items)
    tasks = [asyncio.create_task(queue.submit(i, d)) for i, d in zip(items, deadlines, strict=True)]
    await asyncio.sleep(0.05)
    model.may_run.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_an_item_alone_is_run_at_once():
    async def run():
        return await batcher(Model()).submit(Item("a", 21, 7), 1.0)

    found = asyncio.run(run())
    assert (found.value, found.batch_tokens, found.padded_tokens) == (42, 7, 7) and found.queue_s < 0.1


def test_items_of_like_length_go_together_within_the_budget_and_the_most_urgent_first():
    model = Model()
    lengths = [10, 50, 11, 48, 9, 12]
    items = [Item(index, length, length) for index, length in enumerate(lengths)]

    async def run():
        return await behind_a_first_one(model, batcher(model), items, [5.0, 4.0, 5.0, 5.0, 5.0, 5.0])

    found = asyncio.run(run())
    assert [outcome.value for outcome in found] == [2 * length for length in lengths]
    # 50 has the nearest deadline, and 48 is the only other one that fits; padding makes 2 × 50.
    assert model.batches[1:] == [[50, 48], [10, 11, 9, 12]]
    assert found[1].padded_tokens == 100 and found[1].batch_tokens == 98


def test_without_padding_the_tokens_count_as_they_are():
    model = Model()
    items = [Item(index, length, length) for index, length in enumerate([10, 60, 20, 11])]

    async def run():
        return await behind_a_first_one(model, batcher(model, is_padded=False), items)

    found = asyncio.run(run())
    assert model.batches[1:] == [[10, 60, 20], [11]] and found[0].padded_tokens == found[0].batch_tokens == 90


def test_a_long_item_waits_for_no_more_than_those_before_it():
    model = Model()
    items = [Item("long", 500, 500), *(Item(index, 10, 10) for index in range(30))]

    async def run():
        return await behind_a_first_one(model, batcher(model), items)

    asyncio.run(run())
    # Over the budget, so alone; and first, since it came first.
    assert model.batches[1] == [500] and sorted(map(len, model.batches[2:])) == [10, 10, 10]


def test_equal_items_in_flight_are_run_once_and_later_again_unless_remembered():
    for cache_size, num_runs in ((0, 2), (1, 1)):
        model = Model()
        queue = batcher(model, cache_size=cache_size)

        async def run(queue=queue, model=model):
            first = await behind_a_first_one(model, queue, [Item("a", 1, 1)] * 5)
            return [*first, await queue.submit(Item("a", 1, 1), 1.0)]

        assert [outcome.value for outcome in asyncio.run(run())] == [2] * 6
        assert sum(batch.count(1) for batch in model.batches) == num_runs


def test_the_cache_forgets_what_was_asked_longest_ago():
    model = Model()

    async def run():
        queue = batcher(model, cache_size=2)
        for key in ("a", "b", "a", "c", "a", "b"):
            await queue.submit(Item(key, key, 1), 1.0)

    asyncio.run(run())
    assert model.batches == [["a"], ["b"], ["c"], ["b"]]


def test_an_item_is_refused_when_the_queue_is_longer_than_its_deadline():
    model = Model()

    async def run():
        # 1000 tokens at 100 tokens a second: 10 s.
        queue = batcher(model, tokens_s=100.0)
        model.may_run.clear()
        waiting = [asyncio.create_task(queue.submit(Item(n, n, 500), 60.0)) for n in range(2)]
        await asyncio.sleep(0.05)
        assert 9 < queue.wait_s() < 10.1
        with pytest.raises(OverloadedError) as refused:
            await queue.submit(Item("late", 1, 1), 4.0)
        accepted = asyncio.create_task(queue.submit(Item("patient", 3, 1), 20.0))
        model.may_run.set()
        await asyncio.gather(*waiting)
        return refused.value.retry_after_s, (await accepted).value, queue.queued_tokens, queue.wait_s()

    retry_after_s, value, queued, wait_s = asyncio.run(run())
    assert 5 < retry_after_s < 6.1 and value == 6 and queued == 0 and wait_s == 0


def test_what_is_late_after_all_leaves_the_queue():
    model = Model()

    async def run():
        queue = batcher(model)
        found = asyncio.create_task(behind_a_first_one(model, queue, [Item("a", 1, 1)], 0.01))
        return await found, queue.queued_tokens

    (late,), queued = asyncio.run(run())
    assert isinstance(late, TimeoutError) and queued == 0 and model.batches == [[0]]


def test_who_leaves_takes_the_item_along_unless_others_wait_for_it():
    model = Model()

    async def run():
        queue = batcher(model)
        model.may_run.clear()
        first = asyncio.create_task(queue.submit(Item("first", 0, 1), 10.0))
        await asyncio.sleep(0.05)
        alone = asyncio.create_task(queue.submit(Item("alone", 1, 1), 10.0))
        both = [asyncio.create_task(queue.submit(Item("both", 2, 1), 10.0)) for _ in range(2)]
        await asyncio.sleep(0.05)
        alone.cancel()
        both[0].cancel()
        await asyncio.sleep(0.05)
        model.may_run.set()
        await first
        return (await both[1]).value

    assert asyncio.run(run()) == 4 and model.batches == [[0], [2]]


def test_a_batch_that_fails_fails_for_its_items_alone():
    model = Model()
    items = [Item("bad", "bad", 90), Item("good", 3, 50)]

    async def run():
        return await behind_a_first_one(model, batcher(model), items)

    bad, good = asyncio.run(run())
    assert isinstance(bad, RuntimeError) and good.value == 6


def test_lanes_run_batches_at_the_same_time_and_a_lone_one_has_them_all():
    model = Model()

    async def run():
        queue = batcher(model, budget=10, tokens_s=1.0, num_lanes=2)
        await queue.submit(Item("alone", 0, 5), 60.0)
        model.may_run.clear()
        tasks = [asyncio.create_task(queue.submit(Item(index, index, 10), 60.0)) for index in range(3)]
        await asyncio.sleep(0.1)
        running, wait_s = len(model.batches) - 1, queue.wait_s()
        model.may_run.set()
        return running, wait_s, await asyncio.gather(*tasks), queue.wait_s()

    running, wait_s, found, rest_s = asyncio.run(run())
    assert running == 2 and model.shares == [2, 1, 1, 1]
    assert [outcome.value for outcome in found] == [0, 2, 4] and rest_s == 0
    # Each lane's speed is that of the first batch by now; half of what runs and waits is before a lane.
    assert 0 < wait_s < 60


def test_a_lane_that_is_free_means_no_wait():
    model = Model()

    async def run():
        queue = batcher(model, budget=10, tokens_s=1.0, num_lanes=2)
        model.may_run.clear()
        task = asyncio.create_task(queue.submit(Item("a", 1, 10), 60.0))
        await asyncio.sleep(0.1)
        one = queue.wait_s()
        other = asyncio.create_task(queue.submit(Item("b", 1, 10), 60.0))
        await asyncio.sleep(0.1)
        both = queue.wait_s()
        model.may_run.set()
        await asyncio.gather(task, other)
        return one, both

    one, both = asyncio.run(run())
    # The first one has both lanes and would be done after 5 s, the second after 10; a lane waits for half of that.
    assert one == 0 and 7 < both < 7.6


def test_the_speed_follows_the_batches():
    def slow(payloads, share):
        time.sleep(0.05)
        return payloads

    async def run():
        queue = batcher(slow, tokens_s=1e6)
        for index in range(30):
            await queue.submit(Item(index, index, 10), 10.0)
        return queue.tokens_s

    assert 100 < asyncio.run(run()) < 2000


@pytest.mark.parametrize(("work_s", "requests", "wanted"), [(0, 0, 0), (0, 3, 1), (0.4, 1, 1), (7.5, 40, 4), (8, 1, 4)])
def test_replicas_are_those_that_bring_the_wait_to_its_target(work_s, requests, wanted):
    assert wanted_replicas(work_s, requests, 2.0) == wanted


def test_an_item_that_comes_as_a_lane_ends_is_run_at_once():
    model, later = Model(), []

    async def run():
        queue = batcher(model)
        remember = queue._remember

        def remember_and_ask(key, value):
            remember(key, value)
            if key == "a":
                later.append(asyncio.get_running_loop().create_task(queue.submit(Item("b", 2, 1), 1.0)))

        queue._remember = remember_and_ask
        await queue.submit(Item("a", 1, 1), 1.0)
        return await later[0]

    assert asyncio.run(run()).value == 4 and model.batches == [[1], [2]]


def test_a_wrong_number_of_results_is_an_error_of_the_batch_and_not_its_end():
    answers = iter([[1, 2], [3]])

    async def run():
        queue = batcher(lambda payloads, share: next(answers))
        with pytest.raises(RuntimeError, match="2 results for 1 items"):
            await queue.submit(Item("a", 1, 1), 1.0)
        return await queue.submit(Item("a", 1, 1), 1.0)

    assert asyncio.run(run()).value == 3


def test_large_batches_count_more_for_the_speed_than_small_ones():
    def timed(payloads, share):
        time.sleep(0.02 + 0.0001 * sum(payloads))
        return payloads

    async def run():
        queue = batcher(timed, budget=10_000, tokens_s=1e4)
        for index in range(10):
            await queue.submit(Item(index, 10, 10), 10.0)
        small = queue.tokens_s
        await queue.submit(Item("large", 5000, 5000), 10.0)
        return small, queue.tokens_s

    # Ten tokens take 21 ms, five thousand 0.52 s.
    small, both = asyncio.run(run())
    assert both > 0.7 * 5000 / 0.52 and small < 9000

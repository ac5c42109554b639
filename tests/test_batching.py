"""Batches by token budget."""

import random

from rayrm.batching import token_batches


def test_rows_of_like_length_share_a_batch():
    # Sorted: 9 | 4 4 | 2 2 2 (two rows of 4 cost 8; a row of 2 beside them would cost 12).
    assert list(token_batches([2, 9, 4, 2, 4, 2], 10)) == [[1], [2, 4], [0, 3, 5]]


def test_a_row_longer_than_the_budget_is_alone():
    assert list(token_batches([50, 3, 60], 10)) == [[2], [0], [1]]


def test_no_rows_no_batches():
    assert list(token_batches([], 10)) == []


def test_rows_without_tokens_fit_anywhere():
    assert list(token_batches([0, 0, 0], 1)) == [[0, 1, 2]]


def test_budget_holds_and_every_index_comes_once():
    rng = random.Random(0)
    lengths = [rng.randrange(1, 80) for _ in range(500)]
    batches = list(token_batches(lengths, 256))
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 256 for batch in batches)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)

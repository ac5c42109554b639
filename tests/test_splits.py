"""Held-out groups."""

from rayrm.splits import is_held_out

GROUPS = [f"group-{i}" for i in range(4000)]


def held_out(fraction, seed=0):
    return {group for group in GROUPS if is_held_out(group, fraction, seed)}


def test_nothing_and_everything():
    assert held_out(0.0) == set()
    assert held_out(1.0) == set(GROUPS)


def test_share_is_near_the_fraction():
    assert abs(len(held_out(0.1)) / len(GROUPS) - 0.1) < 0.02


def test_a_larger_fraction_keeps_the_groups_of_a_smaller_one():
    assert held_out(0.05) < held_out(0.2)


def test_seed_moves_the_split():
    assert held_out(0.5, seed=0) != held_out(0.5, seed=1)


def test_split_is_the_same_on_every_machine():
    assert [is_held_out(f"g{i}", 0.5, 7) for i in range(8)] == [
        False,
        True,
        True,
        False,
        True,
        False,
        True,
        True,
    ]

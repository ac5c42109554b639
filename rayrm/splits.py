"""Held-out rows, chosen by group so that no prompt stands on both sides of a split."""

from __future__ import annotations

from rayrm.seeds import seed_of


def is_held_out(group: str, fraction: float, seed: int) -> bool:
    """Whether the rows of `group` are held out; about `fraction` (0 to 1) of all groups are.

    Hangs on `seed` and `group` alone: other rows, their order and their number do not move a group, and a larger
    fraction holds out the groups of a smaller one and more.
    """
    return seed_of(seed, "held_out", group) < fraction * (1 << 31)

"""Chance that hangs on a row's id alone, so that sharding, concurrency and restarts do not move it."""

from __future__ import annotations

import hashlib


def seed_of(seed: int, *parts: str) -> int:
    """A number from 0 to 2³¹−1 drawn from a seed and texts, the same on every machine."""
    text = "\x1f".join([str(seed), *parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") & 0x7FFFFFFF

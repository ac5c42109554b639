"""Put what a text earned, and where, on the tokens that the text was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

UNFINISHED = "\ufffd"
"""What tokenizers show where the bytes of a character are not all there."""
Rewards = np.ndarray[Any, np.dtype[np.float64]]


class Point(NamedTuple):
    """A part of a reward, and where in the text it is earned."""

    end: int
    """Characters of the text up to which it belongs; all of them for what the whole text earns."""
    value: float


def place(points: Sequence[Point], ends: Sequence[int]) -> Rewards:
    """The reward of each token, float64 [num_tokens]; points on the same token add up.

    `ends[i]` is how many characters of the text the first i + 1 tokens make, as `token_ends` counts them. A point
    stands on the first token that reaches its end, and one at the end of the text on the last token, which may be an
    end token without text. Raises ValueError without tokens, for ends that go back, and when the rewards do not sum to
    the points, which is so for points that are not finite.
    """
    if not ends:
        raise ValueError(f"There are {len(points)} points to place and no tokens; leave out texts without tokens.")
    reached = np.asarray(ends, np.int64)
    if (np.diff(reached) < 0).any():
        raise ValueError(f"The ends of tokens go back: {list(ends)}; give those of growing beginnings of one text.")
    values = np.array([point.value for point in points], np.float64)
    wanted = np.array([point.end for point in points], np.int64)
    last = len(ends) - 1
    tokens = np.where(wanted >= reached[-1], last, np.searchsorted(reached, wanted))
    placed = np.zeros(len(ends), np.float64)
    np.add.at(placed, tokens, values)
    total, wanted_total = float(placed.sum()), float(values.sum())
    # Not the same as `>`: what is not a number is never within the tolerance.
    if not abs(total - wanted_total) <= 1e-9 * float(np.abs(values).sum()):
        raise ValueError(f"The rewards of {len(ends)} tokens sum to {total}, and the points to {wanted_total}.")
    return placed


def token_ends(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[int]:
    """How many characters of `decode(ids)` the first i + 1 tokens make, for each i; never fewer than the i before.

    `decode` leaves special tokens out. A character whose bytes are spread over tokens counts with the token that makes
    it whole; what is still not whole at the end counts with the last token. Where the text of a token hangs on more
    than the token before it, every beginning is decoded, whose cost is the square of their number.
    """
    ids, text = list(ids), decode(list(ids))
    ends: list[int] = []
    found = ""
    # Tokens from `start` are decoded together: what those before `read` make is known, and gives the others their
    # white space.
    start = read = 0
    for index in range(len(ids)):
        known, longer = decode(ids[start:read]), decode(ids[start : index + 1])
        if len(longer) > len(known) and longer.startswith(known) and not longer.endswith(UNFINISHED):
            found += longer[len(known) :]
            start, read = read, index + 1
        ends.append(len(found))
    if not text.startswith(found) or text[len(found) :].strip(UNFINISHED):
        ends = list(accumulate((_num_common(decode(ids[: n + 1]), text) for n in range(len(ids))), max))
    return [*ends[:-1], len(text)] if ends else []


def _num_common(first: str, second: str) -> int:
    """Characters with which both begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))

"""How many requests an endpoint gets at once: as many as it takes, found out while it is asked."""

from __future__ import annotations

import asyncio
import math
from collections import deque

START = 16
"""Requests at once to begin with."""
MIN_ROUND = 8
"""Requests of the shortest round."""
WAITED_FOR = 0.9
"""Share of a round's requests that are waited for, so that a few slow ones hold nothing up."""
CHANCE = 0.06
"""Share of requests that may come back for no reason, however few run at once."""
DEVIATIONS = 2.5
"""Standard deviations above `CHANCE` at which so many came back that it is no chance."""
SHRINK, GROW = 0.9, 1.1
"""Factors from one round to the next, when too many requests came back, and when not."""


class Limit:
    """Lets requests through so many at once that hardly any comes back because there are too many.

    A round is the first requests that are sent at the same limit, as many as it lets run at once. One of which few come
    back raises the limit, at first to twice as many; one of which more come back than by chance lowers it, to half when
    most do. A single one tells nothing: some endpoints send requests back at random.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.in_flight = 0
        """Requests that were let through and are not over; one that waits to be sent again is not over."""
        self._size = float(min(START, most))
        self._is_starting = True
        self._round = self._num_sent = self._num_over = self._num_back = 0
        self._waiting: deque[asyncio.Future[int]] = deque()

    @property
    def size(self) -> int:
        """Requests that may run at once."""
        return int(self._size)

    async def enter(self) -> int:
        """Wait for a place, first come, first served; give the number of the round that the request is part of."""
        if not self._waiting and self.in_flight < self.size:
            return self._take_place()
        place: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        return await place

    def leave(self) -> None:
        """Give a place back."""
        self.in_flight -= 1
        self._let_in()

    def note(self, number: int, came_back: bool) -> None:
        """Count what became of a request of round `number`: whether the endpoint did not take it now."""
        if number != self._round:
            return
        self._num_over += 1
        self._num_back += came_back
        if self._num_over >= WAITED_FOR * self._length():
            self._end_round()

    def _length(self) -> int:
        return max(MIN_ROUND, self.size)

    def _take_place(self) -> int:
        self.in_flight += 1
        self._num_sent += 1
        return self._round if self._num_sent <= self._length() else -1

    def _end_round(self) -> None:
        by_chance = CHANCE * self._num_over + DEVIATIONS * math.sqrt(self._num_over * CHANCE * (1 - CHANCE))
        if self._num_back > by_chance:
            self._is_starting = False
            self._size = max(1.0, self._size * (0.5 if 2 * self._num_back > self._num_over else SHRINK))
        else:
            grown = self._size * 2 if self._is_starting else max(self._size + 1, self._size * GROW)
            self._size = min(float(self.most), grown)
        self._round += 1
        self._num_sent = self._num_over = self._num_back = 0
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self.in_flight < self.size:
            place = self._waiting.popleft()
            # One that was cancelled while it waited takes no place.
            if not place.done():
                place.set_result(self._take_place())

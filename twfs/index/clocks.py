"""The clock of an open warehouse, which stamps uses, publishes and what counts from them.

It never goes back, over restarts too: it begins where the last use was. The wall clock, unless
another is given: a replay of a day that has passed runs on that day's time.
Leases are no part of it: a reader and the store must agree on their end whatever else happens.
"""

import time
from collections.abc import Callable
from typing import Final

from twfs.units import Millis

STAMP_MS_MAX: Final = 1 << 42  # the year 2109: a stamp from there on is damage, not a time

Clock = Callable[[], Millis]


def wall_ms() -> Millis:
    """Wall clock in milliseconds."""
    return Millis(time.time_ns() // 1_000_000)


class Steady:
    """A clock that never goes back behind *floor_ms*, nor behind what it said before."""

    def __init__(self, clock: Clock, floor_ms: int) -> None:
        self._clock = clock
        self._last = floor_ms if floor_ms < STAMP_MS_MAX else 0

    def __call__(self) -> Millis:
        """Milliseconds."""
        self._last = max(self._last, self._clock())
        return Millis(self._last)

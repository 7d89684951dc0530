"""The clock of an open warehouse, which stamps uses, publishes and what counts from them.

The wall clock, unless another is given: a replay of a day that has passed runs on that day's time.
Leases are no part of it: a reader and the store must agree on their end whatever else happens.
"""

import time
from collections.abc import Callable

from twfs.units import Millis

Clock = Callable[[], Millis]


def wall_ms() -> Millis:
    """Wall clock in milliseconds."""
    return Millis(time.time_ns() // 1_000_000)

"""Which session used a block last, as a number beside its stamp, and when each was last heard of.

A block that its own session's latest request did not use has been passed over: the session went on
from an earlier block, or began anew. Numbers are of this process only: after a restart no session
is known, so nothing counts as passed over until it is heard of again.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

NUMBERS_MAX: Final = 1 << 20  # 8 MB of times; the oldest number is given anew then
GROWTH_MIN: Final = 1024
UNKNOWN: Final = 0  # the number of no session: never heard of, so nothing of it is passed over


class SessionUses:
    """Numbers of sessions, and the time of the latest request of each. Not thread-safe."""

    def __init__(self, numbers_max: int = NUMBERS_MAX) -> None:
        self.latest_ms: npt.NDArray[np.uint64] = np.zeros(GROWTH_MIN, np.uint64)
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._keys: dict[int, tuple[Any, ...]] = {}
        self._numbers_max = numbers_max
        self._given = 0

    def number_of(self, key: tuple[Any, ...]) -> int:
        """The number of the session named *key*; a new one if it has none."""
        number = self._numbers.get(key)
        if number is None:
            number = self.new()
            self._numbers[key] = number
            self._keys[number] = key
        return number

    def new(self) -> int:
        """A number that no session has, or the one given longest ago."""
        self._given += 1
        number = (self._given - 1) % (self._numbers_max - 1) + 1
        if number >= len(self.latest_ms):
            more = np.zeros(min(2 * number, self._numbers_max), np.uint64)
            more[: len(self.latest_ms)] = self.latest_ms
            self.latest_ms = more
        before = self._keys.pop(number, None)
        if before is not None:
            del self._numbers[before]
        self.latest_ms[number] = 0
        return number

    def heard(self, number: int, now_ms: int) -> None:
        """A request of this session used its blocks at *now_ms*; UNKNOWN is never heard of."""
        if number != UNKNOWN:
            self.latest_ms[number] = max(int(self.latest_ms[number]), now_ms)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.latest_ms.nbytes

"""Which blocks are let in at all: not what is asked for once, and not more than flash should bear.

Both rules are off unless the settings say so. A block is refused before any byte of it is copied.
What is below a refused block is refused too: a match ends before it, so it would only take room.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twfs.config import AdmissionSettings
from twfs.hints import Retention
from twfs.index.clocks import Clock
from twfs.prefix import Names
from twfs.units import HASH_BYTES

DAY_MS: Final = 86_400_000
BURST_MS: Final = 3_600_000  # what may be written at once: the budget of an hour
BITS_PER_NAME: Final = 16  # with 4 of them set: 1 in 400 names is taken for one asked for before
FULL_PARTS: Final = 2  # a filter is full at half of the names: the one before is kept beside it


class Remembered:
    """Names that were asked for, the latest *names_max* of them at most: two filters by turns.

    A Bloom filter: no name is forgotten before its turn, and few are remembered that never came.
    """

    def __init__(self, names_max: int) -> None:
        bits = 1 << max(10, (names_max // FULL_PARTS * BITS_PER_NAME - 1).bit_length())
        self._mask = np.uint32(bits - 1)
        self._full = max(1, names_max // FULL_PARTS)
        self._now: npt.NDArray[np.bool_] = np.zeros(bits, np.bool_)
        self._before = np.zeros(bits, np.bool_)
        self._count = 0

    def asked(self, hashes: bytes, mix: int) -> list[bool]:
        """Which of *hashes* (16 bytes each, told apart by *mix*) came before; they all have now."""
        words = np.frombuffer(hashes, "<u4").reshape(-1, HASH_BYTES // 4)
        places = (words ^ np.uint32(mix & 0xFFFFFFFF)) & self._mask
        known = self._now[places].all(axis=1)
        seen = known | self._before[places].all(axis=1)
        self._now[places] = True
        self._count += int((~known).sum())
        if self._count >= self._full:
            self._now, self._before = self._before, self._now
            self._now[:] = False
            self._count = 0
        return [bool(each) for each in seen]

    @property
    def nbytes(self) -> int:
        """Bytes of both filters."""
        return self._now.nbytes + self._before.nbytes


class Budget:
    """Bytes that may be written: so many a day, evenly, and those of an hour at once."""

    def __init__(self, bytes_per_day: int, clock: Clock) -> None:
        self.bytes_per_day = bytes_per_day
        self._clock = clock
        self._burst = bytes_per_day * BURST_MS / DAY_MS
        self._level = self._burst
        self._at_ms = clock()

    def level(self) -> float:
        """Bytes that may be written now; below 0 after what is always let in."""
        now = max(self._clock(), self._at_ms)  # wall clocks are set back at times
        gained = (now - self._at_ms) * self.bytes_per_day / DAY_MS
        self._level, self._at_ms = min(self._burst, self._level + gained), now
        return self._level

    def spend(self, byte_count: int) -> None:
        """Count what is going to be written; negative gives it back."""
        self._level = min(self._burst, self.level() - byte_count)


@dataclass(frozen=True, slots=True)
class Asked:
    """The blocks that a put lacks, in its order: which of its names, and bytes on a device."""

    names: Names
    indices: Sequence[int]
    needs: Sequence[int]
    retention: Retention
    mix: int = 0  # tells models, groups and shards apart


@dataclass(slots=True)
class Admitted:
    """What became of them."""

    indices: list[int]
    first_touch: list[int]
    worn: list[int]


class Gate:
    """The rules of one warehouse. Not thread-safe: the warehouse's lock guards it."""

    def __init__(self, settings: AdmissionSettings, total_bytes: int, clock: Clock) -> None:
        self._second_touch = frozenset(settings.second_touch)
        self._remembered = Remembered(settings.remembered_names) if self._second_touch else None
        per_day = settings.budget_bytes_per_day(total_bytes)
        self._budget = None if per_day is None else Budget(per_day, clock)

    def admit(self, asked: Asked) -> Admitted:
        """Let in what the rules allow, of each chain a leading part; the rest is refused."""
        result = Admitted([], [], [])
        exempt = asked.retention in {Retention.DURABLE, Retention.PINNED}
        seen = self._seen(asked)
        left = None if self._budget is None or exempt else self._budget.level()
        refused: dict[bytes, list[int]] = {}  # and why: whatever is below them is refused alike
        for index, need, known in zip(asked.indices, asked.needs, seen, strict=True):
            at = HASH_BYTES * index
            why = refused.get(asked.names.parents[at : at + HASH_BYTES])
            if why is None and not known:
                why = result.first_touch
            elif why is None and left is not None and left < need:
                why = result.worn
            if why is None:
                result.indices.append(index)
                left = None if left is None else left - need
            else:
                why.append(index)
                refused[asked.names.hash_at(index)] = why
        return result

    def _seen(self, asked: Asked) -> list[bool]:
        """Which blocks the second-touch rule lets in."""
        if self._remembered is None or not asked.indices:
            return [True] * len(asked.indices)
        hashes = b"".join(asked.names.hash_at(index) for index in asked.indices)
        seen = self._remembered.asked(hashes, asked.mix)
        return seen if asked.retention in self._second_touch else [True] * len(seen)

    def spend(self, byte_count: int) -> None:
        """Count bytes that are going to be written against the budget; negative gives back."""
        if self._budget is not None:
            self._budget.spend(byte_count)

    def statistics(self) -> dict[str, Any]:
        """The rules that hold, and how much may be written now."""
        figures: dict[str, Any] = {"second_touch": sorted(self._second_touch)}
        if self._remembered is not None:
            figures["remembered_bytes"] = self._remembered.nbytes
        if self._budget is not None:
            figures["budget_bytes_per_day"] = self._budget.bytes_per_day
            figures["budget_left_bytes"] = int(self._budget.level())
        return figures

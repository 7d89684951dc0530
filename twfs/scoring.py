"""What a block is worth keeping: a policy gives every slot a score, and the least score goes first.

A policy only looks at the arrays of the slots, so one call costs a few milliseconds a million
blocks. What it needs to be told of uses, it keeps beside the stamps. Which blocks may go at all,
and in which order of rank, is decided elsewhere (`ranking`).
"""

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from twfs.slots import Slots

Scores = npt.NDArray[np.float64]  # by slot


class Policy(Protocol):
    """How blocks of one rank are put in order."""

    @property
    def name(self) -> str:
        """What the configuration calls it."""

    def scores(self, slots: Slots, now_ms: int) -> Scores:
        """The score of every slot in use at *now_ms*, len(slots) of them. Hold the lock."""


class Recency:
    """The least recently used goes first; stamps are milliseconds, which float64 holds exactly."""

    name: Final = "lru"

    def scores(self, slots: Slots, now_ms: int) -> Scores:  # noqa: ARG002 - age is not looked at
        """The time of the last use."""
        return slots.stamp[: len(slots)].astype(np.float64)


LRU: Final = Recency()

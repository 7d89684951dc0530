"""Which blocks go before which, whatever their score: small numbers by slot, the least first."""

from typing import Final

import numpy as np
import numpy.typing as npt

from twfs.core.state import Core
from twfs.hints import Retention
from twfs.policy.retention import PINNED, expired, over_share

Ranks = npt.NDArray[np.uint8]  # by slot

UNREACHABLE: Final = 0  # no match reaches it: detached, or below a hole
EXPIRED: Final = 1  # its time to live is over
OVER_SHARE: Final = 2  # its class holds more than its share
EPHEMERAL: Final = 3  # from here on by class
NEVER: Final = 255  # it may not be evicted: pinned


def rank_of(retention: Retention) -> int:
    """The rank of a block of that class that is reachable, in its time and within its share."""
    return EPHEMERAL + retention.rank


def ranks(core: Core, now_ms: int) -> Ranks:
    """The rank of every slot in use at *now_ms*, len(slots) of them. Hold the lock."""
    slots = core.slots
    classes = slots.retention[: len(slots)]
    found = classes.astype(np.uint8) + np.uint8(EPHEMERAL)
    found[over_share(slots, core.terms, core.allocator.total_bytes)] = OVER_SHARE
    found[expired(slots, core.terms, now_ms)] = EXPIRED
    found[slots.unreachable()] = UNREACHABLE
    found[classes == PINNED] = NEVER
    return found


def only(rank: Ranks, some: npt.NDArray[np.bool_]) -> Ranks:
    """*rank* for the slots of *some*; all others may not go."""
    return np.where(some, rank, np.uint8(NEVER))

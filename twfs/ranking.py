"""Which blocks go before which, whatever their score: small numbers by slot, the least first."""

from typing import Final

import numpy as np
import numpy.typing as npt

from twfs.core import Core

Ranks = npt.NDArray[np.uint8]  # by slot

UNREACHABLE: Final = 0  # no match reaches it: detached, or below a hole
STANDARD: Final = 1
NEVER: Final = 255  # it may not be evicted


def ranks(core: Core, now_ms: int) -> Ranks:  # noqa: ARG001 - for times to live
    """The rank of every slot in use at *now_ms*, len(slots) of them. Hold the lock."""
    found = np.full(len(core.slots), STANDARD, np.uint8)
    found[core.slots.unreachable()] = UNREACHABLE
    return found

"""Who must give way when room is short: a tenant at its quota itself, else who holds most.

A quota is never passed: what a tenant is charged for and what its puts have reserved count
together, under the lock in which room is reserved. Where the devices are full, the tenants that
hold the most for their weight go first, down to one level (weighted max-min fairness): who holds
less than its share loses nothing to others, and who needs less leaves the rest to them.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np

from twfs.core.state import Core
from twfs.errors import QuotaExceeded
from twfs.index.slots import IntArray

UNBOUNDED: Final = 1 << 62
LOW_WATER_PARTS: Final = 64  # 1/64 of a quota is kept free ahead of demand, as of the devices
LOW_WATER_BYTES_MAX: Final = 8 << 30


def room_bytes(core: Core, tenant: int) -> int:
    """Bytes that *tenant* may still be charged for; below 0 after its quota shrank. Hold the lock.

    UNBOUNDED without a quota.
    """
    quota = core.tenants.quota_of(tenant)
    return UNBOUNDED if quota is None else quota - core.charges.used(tenant)


def exceeded(core: Core, tenant: int, need: int) -> QuotaExceeded:
    """The error that says why not one block of *need* bytes can be charged to *tenant*."""
    charges, quota = core.charges, core.tenants.quota_of(tenant)
    return QuotaExceeded(
        f"tenant {core.tenants.name_of(tenant)} holds {charges.held[tenant]} bytes and has "
        f"{charges.reserved[tenant]} reserved of a quota of {quota}: a block of {need} does not "
        "fit, and nothing of its own may be evicted; release leases, end puts, or raise the quota "
        "with `twfs tenant set --quota`"
    )


def above_low_water_bytes(core: Core, tenant: int) -> int:
    """Bytes of *tenant* that should go ahead of demand; 0 if there is enough room yet."""
    quota = core.tenants.quota_of(tenant)
    if quota is None:
        return 0
    low = min(quota // LOW_WATER_PARTS, LOW_WATER_BYTES_MAX)
    return max(0, low - room_bytes(core, tenant))


def givers(core: Core, wanted_bytes: int) -> list[tuple[int, int]]:
    """Who gives how much of *wanted_bytes*: (tenant, bytes), the one that holds most first.

    No tenant falls below the level, in bytes for its weight, that the others come down to. Empty
    if all is of one tenant. Hold the lock.
    """
    held, weight_of = core.charges.held, core.tenants.weight_of
    holders = [tenant for tenant, held_bytes in held.items() if held_bytes > 0]
    if len(holders) < 2:
        return []
    falling = sorted(holders, key=lambda tenant: (-held[tenant] / weight_of(tenant), tenant))
    total, weights, level, giving = 0, 0, 0.0, 0
    for giving, tenant in enumerate(falling, 1):
        total += held[tenant]
        weights += weight_of(tenant)
        level = (total - wanted_bytes) / weights
        below = falling[giving] if giving < len(falling) else None
        if below is not None and level >= held[below] / weight_of(below):
            break
    shares = [
        (tenant, held[tenant] - max(0, int(level * weight_of(tenant))))
        for tenant in falling[:giving]
    ]
    return [(tenant, share) for tenant, share in shares if share > 0]


def by_payer(payers: IntArray, leaves: IntArray) -> Iterator[tuple[int, IntArray]]:
    """*leaves* apart by who is charged for them."""
    mine = payers[leaves]
    order = np.argsort(mine, kind="stable")
    tenants, starts = np.unique(mine[order], return_index=True)
    yield from zip(tenants.tolist(), np.split(leaves[order], starts[1:]), strict=True)

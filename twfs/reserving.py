"""Room for a put: extents within the devices, its tenant's quota and the bound on one user.

What is counted is counted in the same step under the lock in which it is reserved, so no bound is
ever passed, however many puts there are at once. What must go first is removed and waited for.
"""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any, Final

import numpy as np

from twfs import quotas
from twfs import slots as states
from twfs.core import Core
from twfs.errors import WarehouseFull
from twfs.evicting import submit_eviction, submit_own
from twfs.records import Extent
from twfs.units import ByteCount

ROOM_TRIES: Final = 32  # evict and try again: other puts may take what was freed for this one
RESERVED_PARTS: Final = 4  # of the space for puts of one user: never all that others need

Room = list[tuple[Extent, ...]]  # of one block each


def reserve(
    core: Core, needs: Sequence[ByteCount], *, tenant: int, uid: int | None
) -> tuple[Room, bool]:
    """Reserve blocks of *needs* bytes, as many leading ones as fit; may evict and wait.

    Returns what was got, to be ended by `release` or a publish, and whether the quota is what cut
    it short. WarehouseFull, or QuotaExceeded, if it is nothing.
    """
    if not core.allocator.allotted_bytes:
        raise WarehouseFull(
            "no device takes blocks: all are read-only, draining or offline; see `twfs device "
            "list`, and bring one back or add one"
        )
    room: Room = []
    try:
        for _ in range(ROOM_TRIES):
            with core.lock:
                wanted = leading(needs[len(room) :], _room_of(core, uid))
                going = _take(core, room, wanted, tenant=tenant, uid=uid)
            if not going:
                break
            wait(going)
        over = len(room) < len(needs) and _is_over(
            core, needs[len(room)], tenant=tenant, uid=uid, refused=not room
        )
    except BaseException:
        with core.lock:
            release(core, room, tenant=tenant, uid=uid)
        raise
    return room, over


def leading(needs: Sequence[ByteCount], room_bytes: int) -> Sequence[ByteCount]:
    """The leading *needs* that fit into *room_bytes* together."""
    ends = np.cumsum(needs)
    return needs[: int(np.searchsorted(ends, room_bytes, "right"))]


def _take(
    core: Core, room: Room, wanted: Sequence[ByteCount], *, tenant: int, uid: int | None
) -> Sequence[Future[Any]]:
    """Add blocks of *wanted* bytes to *room*; begin to evict for the rest. Hold the lock.

    Empty if there is no rest, or nothing to evict for it.
    """
    left = quotas.room_bytes(core, tenant)
    allowed = leading(wanted, left)
    got = core.allocator.reserve(allowed)
    core.count_reserved(uid, tenant, sum(allowed[: len(got)]))
    room += got
    going: list[Future[Any]] = []
    if len(allowed) < len(wanted):
        going += submit_own(core, tenant, sum(wanted) - left)
    missing = sum(allowed[len(got) :])
    if missing:
        going += submit_eviction(core, missing)
    short = len(got) < len(wanted) and not going
    if short and _being_removed(core, None if missing else tenant):
        going.append(core.metadata.submit(lambda _: None, settled=lambda _: None, urgent=True))
    return going


def _being_removed(core: Core, payer: int | None) -> bool:
    """Tell whether blocks of *payer* (None: of any) are on their way out, for other puts."""
    slots, here = core.slots, len(core.slots)
    going = slots.state[:here] == states.CONDEMNED
    return bool((going if payer is None else going & (slots.payer[:here] == payer)).any())


def _is_over(core: Core, need: int, *, tenant: int, uid: int | None, refused: bool) -> bool:
    """Tell whether the quota has no room for *need* bytes; if the put is *refused*, raise why."""
    with core.lock:
        over = quotas.room_bytes(core, tenant) < need
        if not refused:
            return over
        if over:
            core.counters.refused_puts += 1
            raise quotas.exceeded(core, tenant, need)
        raise _no_room(core, uid, need)


def release(core: Core, room: Room, *, tenant: int, uid: int | None) -> None:
    """Undo `reserve`. Hold the lock."""
    core.count_reserved(uid, tenant, -sum(each.length for extents in room for each in extents))
    for extents in room:
        core.allocator.release(extents)


def _room_of(core: Core, uid: int | None) -> int:
    """What the puts of *uid* may reserve more; None is bounded by the space alone."""
    total = core.allocator.total_bytes
    if uid is None:
        return total
    return max(0, total // RESERVED_PARTS - core.reserved_of[uid])


def _no_room(core: Core, uid: int | None, need: int) -> WarehouseFull:
    """The error that says why not one block of *need* bytes can be reserved."""
    if _room_of(core, uid) < need:
        return WarehouseFull(
            f"uid {uid} has {core.reserved_of[uid or 0]} bytes reserved for puts under way, "
            f"and one user may have 1/{RESERVED_PARTS} of the space: end some"
        )
    return WarehouseFull(
        f"no room for a block of {need} bytes: {core.allocator.free_bytes} bytes are free "
        "and nothing may be evicted; release leases or add a device"
    )

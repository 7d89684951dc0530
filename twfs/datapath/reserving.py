"""Room for a put: extents within the devices, its tenant's quota and the bound on one user.

What is counted is counted in the same step under the lock in which it is reserved, so no bound is
ever passed, however many puts there are at once. What must go first is removed and waited for.
"""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any, Final

import numpy as np

from twfs.core.state import Core
from twfs.errors import WarehouseFull
from twfs.eviction import quotas
from twfs.eviction.choosing import Newcomer
from twfs.eviction.evicting import submit_eviction, submit_own
from twfs.index import slots as states
from twfs.records import Extent
from twfs.store import PutOutcome
from twfs.units import ByteCount

ROOM_TRIES: Final = 32  # evict and try again: other puts may take what was freed for this one
RESERVED_PARTS: Final = 4  # of the space for puts of one user: never all that others need

Room = list[tuple[Extent, ...]]  # of one block each


def reserve(
    core: Core, needs: Sequence[ByteCount], *, tenant: int, uid: int | None,
    newcomer: Newcomer | None = None,
) -> tuple[Room, PutOutcome]:  # fmt: skip
    """Reserve blocks of *needs* bytes, as many leading ones as fit; may evict and wait.

    Nothing that is worth more than *newcomer* is evicted for it. Returns what was got, to be ended
    by `release` or a publish, and what becomes of the rest: NO_ROOM, OVER_QUOTA, or NOT_ADMITTED
    for what is worth less than all that could go. WarehouseFull, or QuotaExceeded, if nothing was
    got for one of the first two.
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
                over_bytes, missing_bytes = _take(core, room, wanted, tenant=tenant, uid=uid)
            going = _make_way(
                core, over_bytes, missing_bytes, tenant=tenant, newcomer=newcomer
            )  # fmt: skip
            wait(going)
            # What was evicted may be free only once its headers are overwritten.
            wiped = len(room) < len(needs) and core.wiper.drain()
            if not going and not wiped:
                break
        why = PutOutcome.NO_ROOM
        if len(room) < len(needs):
            kept_out = newcomer is not None and newcomer.kept_out
            why = _why_short(
                core, needs[len(room)], tenant=tenant, uid=uid, kept_out=kept_out, none=not room
            )
    except BaseException:
        with core.lock:
            release(core, room, tenant=tenant, uid=uid)
        raise
    return room, why


def leading(needs: Sequence[ByteCount], room_bytes: int) -> Sequence[ByteCount]:
    """The leading *needs* that fit into *room_bytes* together."""
    ends = np.cumsum(needs)
    return needs[: int(np.searchsorted(ends, room_bytes, "right"))]


def _take(
    core: Core, room: Room, wanted: Sequence[ByteCount], *, tenant: int, uid: int | None
) -> tuple[int, int]:
    """Add blocks of *wanted* bytes to *room*. Hold the lock.

    Returns bytes that must go first from what *tenant* is charged for, and from the devices.
    """
    left = quotas.room_bytes(core, tenant)
    allowed = leading(wanted, left)
    got = core.allocator.reserve(allowed)
    core.count_reserved(uid, tenant, sum(allowed[: len(got)]))
    room += got
    over_bytes = sum(wanted) - left if len(allowed) < len(wanted) else 0
    return over_bytes, sum(allowed[len(got) :])


def _make_way(
    core: Core, over_bytes: int, missing_bytes: int, *, tenant: int, newcomer: Newcomer | None
) -> Sequence[Future[Any]]:
    """Begin to evict; empty if nothing has to go, or nothing may."""
    going: list[Future[Any]] = []
    if over_bytes:
        with core.lock:
            going += submit_own(core, tenant, over_bytes, newcomer)
    if missing_bytes:
        going += submit_eviction(core, missing_bytes, newcomer=newcomer)
    if (over_bytes or missing_bytes) and not going:
        with core.lock:
            if _being_removed(core, None if missing_bytes else tenant):
                ended = core.metadata.submit(lambda _: None, settled=lambda _: None, urgent=True)
                going.append(ended)
    return going


def _being_removed(core: Core, payer: int | None) -> bool:
    """Tell whether blocks of *payer* (None: of any) are on their way out, for other puts."""
    slots, here = core.slots, len(core.slots)
    going = slots.state[:here] == states.CONDEMNED
    return bool((going if payer is None else going & (slots.payer[:here] == payer)).any())


def _why_short(
    core: Core, need: int, *, tenant: int, uid: int | None, kept_out: bool, none: bool
) -> PutOutcome:  # fmt: skip
    """Why there is no room for *need* bytes more; if there is *none* at all, raise it.

    A put that was *kept out* by what is worth more is no failure.
    """
    if kept_out:
        return PutOutcome.NOT_ADMITTED
    with core.lock:
        over = quotas.room_bytes(core, tenant) < need
        if not none:
            return PutOutcome.OVER_QUOTA if over else PutOutcome.NO_ROOM
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

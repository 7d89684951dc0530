"""Share groups: who is charged for a public block, and to whom that passes when it lets go.

A public block belongs to a share group and is charged to one of its members: first to who wrote it.
When another member has used it since the payer did, the charge passes to that one as soon as the
payer lets go: its quota needs the room, or it removes a session over the block. Who leaves the
group lets go of everything. The record says who is charged, so a charge passes in a transaction;
room in the quota of who takes over is reserved before.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from twfs.core.state import Core
from twfs.eviction import quotas
from twfs.index import slots as states
from twfs.index.slots import IntArray
from twfs.metadata import ledger
from twfs.metadata.tables import WriteView
from twfs.records import BlockKey
from twfs.units import ALIGN

PASSED_PER_COMMIT: Final = 2048  # as of evictions


@dataclass(frozen=True, slots=True)
class _Pass:
    """One block whose charge is to pass."""

    slot: int
    key: BlockKey
    before: int
    now: int
    byte_count: int


def let_go(
    core: Core, payer: int, wanted_bytes: int, *, lent: bool = True, among: IntArray | None = None
) -> tuple[list["Future[Any]"], int]:
    """Pass charges of *payer* worth *wanted_bytes* on to others with room; oldest use first.

    Only of blocks that another used later, unless *lent* is False; only of the slots *among*, if
    given. Returns what to wait for, and the bytes that are passing. Hold the lock.
    """
    slots = core.slots
    if among is None:
        here = slice(0, len(slots))
        if not core.tenants.shares:
            return [], 0
        among = np.flatnonzero((slots.payer[here] == payer) & (slots.other[here] != 0))
    may = (
        (slots.payer[among] == payer) & (slots.other[among] != 0)
        & (slots.state[among] == states.LIVE)
    )  # fmt: skip
    if lent:
        may &= slots.lent[among]
    waiting = among[may]
    passing: list[_Pass] = []
    total = 0
    for slot in waiting[np.argsort(slots.stamp[waiting], kind="stable")].tolist():
        if total >= wanted_bytes:
            break
        to = int(slots.other[slot])
        byte_count = int(slots.units[slot]) * ALIGN
        if _may_take(core, slot, to) and quotas.room_bytes(core, to) >= byte_count:
            core.charges.reserved[to] += byte_count
            passing.append(_Pass(slot, slots.key_of(slot), payer, to, byte_count))
            total += byte_count
    return _submit(core, passing), total


def _may_take(core: Core, slot: int, tenant: int) -> bool:
    """Tell whether *tenant* is a member of the group whose block *slot* holds."""
    return core.tenants.shares.get(tenant) == int(core.slots.tenant[slot])


def _submit(core: Core, passing: Sequence[_Pass]) -> list["Future[Any]"]:
    """Queue the change of who is charged; memory follows its commit. Hold the lock."""
    futures = []
    for first in range(0, len(passing), PASSED_PER_COMMIT):
        part = passing[first : first + PASSED_PER_COMMIT]
        futures.append(_submit_part(core, part))
    return futures


def _submit_part(core: Core, part: Sequence[_Pass]) -> "Future[Any]":
    def job(view: WriteView) -> list[bool]:
        return ledger.charge_to(view, [(each.key, each.before, each.now) for each in part])

    def after(done: list[bool]) -> None:
        with core.lock:
            for each, passed in zip(part, done, strict=True):
                if passed:
                    core.slots.charge_to(each.slot, each.now)

    def ended(_: "Future[list[bool]]") -> None:
        with core.lock:
            for each in part:
                core.charges.reserved[each.now] -= each.byte_count

    try:
        future = core.metadata.submit(job, after)
    except BaseException:
        for each in part:
            core.charges.reserved[each.now] -= each.byte_count
        raise
    future.add_done_callback(ended)
    return future


def leave(core: Core, tenant: int) -> None:
    """Let *tenant*, which no put is under way for, be charged for no public block; waits.

    What no other member used or has room for is charged to nobody: to the group, until one does.
    """
    with core.lock:
        slots, here = core.slots, len(core.slots)
        mine = np.flatnonzero(
            (slots.payer[:here] == tenant) & (slots.tenant[:here] != tenant)
            & (slots.state[:here] == states.LIVE)
        )  # fmt: skip
        futures, _ = let_go(core, tenant, quotas.UNBOUNDED, lent=False, among=mine)
    for future in futures:
        future.result()
    with core.lock:
        left = mine[(slots.payer[mine] == tenant) & (slots.state[mine] == states.LIVE)]
        passing = [
            _Pass(slot, slots.key_of(slot), tenant, int(slots.tenant[slot]), 0)
            for slot in left.tolist()
        ]
        futures = _submit(core, passing)
    for future in futures:
        future.result()


def claim(core: Core) -> None:
    """Charge members for blocks that they use and nobody is charged for, as far as they have room.

    Short where there are none; does not wait.
    """
    with core.lock:
        for tenant in core.tenants:
            if tenant.group and core.charges.held[tenant.id]:
                let_go(core, tenant.id, quotas.UNBOUNDED)

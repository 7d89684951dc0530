"""What the checker says of charges: who may be charged for a block, and whether the sums are true.

One function per invariant, as in invariants.py. The second is of memory, so of an open warehouse
alone.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from twfs.checking.snapshot import Snapshot
from twfs.checking.subject import Live, Subject
from twfs.core.state import Core
from twfs.index import slots as states
from twfs.index.charges import astray, sums_of
from twfs.tenants import Tenants, unpack_tenants
from twfs.units import ModelId


def payers_are_members(subject: Subject, taken: Snapshot) -> Iterator[str]:
    """I25: only a share group's block has a payer, and that is a member of the group."""
    with subject.metadata.read() as view:
        copy = view.meta("tenants")
    try:
        tenants = Tenants(() if copy is None else unpack_tenants(copy)[1])
    except ValueError:  # the next start takes the roster's
        return
    rows = taken.rows
    for row in np.flatnonzero(astray(rows["tenant"], rows["payer"], tenants)).tolist():
        if subject.unchanged(taken.key(row), taken.block(row)):
            payer, owner = int(rows["payer"][row]), int(rows["tenant"][row])
            yield f"block {taken.name(row)} of tenant {owner} is charged to {payer}, no member"


def charges_are_true(subject: Subject, taken: Snapshot) -> Iterator[str]:
    """I26: in memory tenants are charged for exactly the blocks that records charge to them."""
    if not isinstance(subject, Live):
        return
    core = subject.core
    yield from _wrong_slots(core, subject, taken)
    with core.lock:
        slots = core.slots
        here = np.flatnonzero(np.isin(slots.state[: len(slots)], (states.LIVE, states.CONDEMNED)))
        all_one = np.zeros(len(here), np.uint8)  # what class it is, is another invariant's
        meant = Counter(
            {
                account[:2]: byte_count
                for account, byte_count in sums_of(
                    slots.payer[here], slots.models()[here], all_one, slots.units[here]
                )
            }
        )
        charged: Counter[tuple[int, ModelId]] = Counter()
        for (tenant, model, _), cell in core.charges.cells.items():
            charged[tenant, model] += cell.held_bytes
        held = Counter(core.charges.held)
        reserved, all_reserved = sum(core.charges.reserved.values()), core.reserved_bytes
    for tenant, model in sorted(meant.keys() | charged.keys()):
        has, of = charged[tenant, model], meant[tenant, model]
        if has != of:
            yield f"tenant {tenant} is charged {has} bytes of model {model}, and has blocks of {of}"
    sums: Counter[int] = Counter()
    for (tenant, _), byte_count in meant.items():
        sums[tenant] += byte_count
    for tenant in sorted(sums.keys() | held.keys()):
        if sums[tenant] != held[tenant]:
            yield f"tenant {tenant} is charged {held[tenant]} bytes, its blocks have {sums[tenant]}"
    if reserved < all_reserved:  # more: what is charged elsewhere just now, beside the puts
        yield f"{all_reserved} bytes are reserved, and {reserved} of them charged to tenants"


def _wrong_slots(core: Core, subject: Live, taken: Snapshot) -> Iterator[str]:
    """Say which blocks memory charges to another tenant than the record does."""
    at = taken.rows["slot"].astype(np.int64)
    meant = np.where(taken.rows["payer"] != 0, taken.rows["payer"], taken.rows["tenant"])
    with core.lock:
        known = at < len(core.slots)
        payer = core.slots.payer[np.where(known, at, 0)]
    for row in np.flatnonzero(known & (payer != meant)).tolist():
        with core.metadata.read() as view:
            now = view.block(taken.key(row))
        if now is not None and now.charged == meant[row]:
            with core.lock:
                wrong = core.slots.payer[now.slot] != now.charged
            if wrong and subject.unchanged(taken.key(row), now):
                what = f"is charged to {payer[row]} in memory, not {meant[row]}"
                yield f"block {taken.name(row)} {what}"

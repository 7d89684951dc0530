"""Which blocks go next: the least (rank, score, -position, slot) of those that may go at all.

Only a live block without child and without lease is chosen (invariant I18), so a chain loses its
tail and never its middle; a parent follows its last child within the same choice, in its turn. What
is chosen is condemned there and then: nobody matches it any more. The choice is an iterator, so
that who takes a great many may let go of the lock in between: all blocks are looked at once, at the
beginning, and each again when its turn has come. One that was used meanwhile stays.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from twfs.core.state import Core
from twfs.eviction import quotas
from twfs.eviction.ranking import EXPIRED, NEVER, Ranks, only, ranks
from twfs.index import slots as states
from twfs.index.slots import IntArray, Slots
from twfs.policy.retention import PINNED, expired
from twfs.policy.scoring import LRU, Policy
from twfs.units import ALIGN

SORTED_AT_ONCE: Final = 8192  # leaves: sorting a million would take 0.3 s under the lock

_Turn = tuple[int, float, int, int, int]  # rank, score, -position, slot, stamp: the least first


@dataclass(frozen=True, slots=True)
class Order:
    """In which order blocks go: by rank, then by the score of *policy* at *now_ms*."""

    rank: Ranks  # by slot
    policy: Policy
    now_ms: int
    pinned_too: bool = False

    @staticmethod
    def of(core: Core) -> "Order":
        """The order of now, by ranks and the warehouse's policy. Hold the lock."""
        now_ms = core.clock()
        return Order(ranks(core, now_ms), core.policy, now_ms)

    @staticmethod
    def none(slots: Slots) -> "Order":
        """All may go, the least recently used first."""
        return Order(np.zeros(len(slots), np.uint8), LRU, 0, pinned_too=True)


@dataclass(slots=True)
class Newcomer:
    """What a put would store, of *tenant*: it takes the place of nothing that is worth more."""

    rank: int
    score: float
    tenant: int
    kept_out: bool = False  # by something that is


def choose_victims(core: Core, wanted_bytes: int, payer: int | None = None) -> list[int]:
    """Condemn slots worth *wanted_bytes*, in the order they are to go; see `victims`."""
    return list(victims(core, wanted_bytes, payer=payer))


def victims(
    core: Core, wanted_bytes: int, *, payer: int | None = None, newcomer: Newcomer | None = None
) -> Iterator[int]:
    """Condemn slots worth *wanted_bytes* one by one, in order. Hold the lock at each step.

    What no match reaches and what is expired first, then blocks of the tenants that hold most for
    their weight (see quotas.py), or with *payer* only what that tenant is charged for. None goes
    for a *newcomer* of the same rank and no higher score, but those by which another tenant is
    above its share.
    """
    core.expire()
    leaves, slots = core.slots.leaves(), core.slots
    order = Order.of(core)
    if payer is not None:
        mine = leaves[slots.payer[leaves] == payer]
        yield from _choose(
            core, mine, order, bytes_max=wanted_bytes, payer=payer, newcomer=newcomer
        )
        return
    offline = list(core.standings.offline)
    if offline:  # they make no room, and would be missed when their device is back
        there = leaves[~np.isin(slots.device[leaves], offline)]
        found: list[int] = []
        for slot in _choose_fairly(core, there, order, wanted_bytes, newcomer):
            found.append(slot)
            yield slot
        wanted_bytes -= _room_bytes(core, found)
        leaves = slots.leaves()
    if wanted_bytes > 0:
        yield from _choose_fairly(core, leaves, order, wanted_bytes, newcomer)


def _choose_fairly(
    core: Core, leaves: IntArray, order: Order, wanted_bytes: int, newcomer: Newcomer | None
) -> Iterator[int]:
    """Choose of *leaves* so that tenants give way by their weights; see quotas.py."""
    slots = core.slots
    found: list[int] = []

    def taken(chosen: Iterator[int]) -> Iterator[int]:
        found.clear()
        for slot in chosen:
            found.append(slot)
            yield slot

    useless = leaves[order.rank[leaves] <= EXPIRED]
    if len(useless):
        yield from taken(_choose(core, useless, order, bytes_max=wanted_bytes))
        wanted_bytes -= _room_bytes(core, found)
    shares = dict(quotas.givers(core, wanted_bytes)) if wanted_bytes > 0 else {}
    if shares:
        apart = dict(quotas.by_payer(slots.payer, leaves[slots.state[leaves] == states.LIVE]))
        for tenant, share in shares.items():
            mine = apart.get(tenant)
            if mine is not None and wanted_bytes > 0:
                own = newcomer if newcomer is not None and newcomer.tenant == tenant else None
                chosen = _choose(
                    core, mine, order, bytes_max=min(share, wanted_bytes), payer=tenant,
                    newcomer=own,
                )  # fmt: skip
                yield from taken(chosen)
                wanted_bytes -= _room_bytes(core, found)
    if wanted_bytes > 0:  # all are of one tenant, or those above the rest may not go
        left = leaves[slots.state[leaves] == states.LIVE]
        yield from _choose(core, left, order, bytes_max=wanted_bytes, newcomer=newcomer)


def _room_bytes(core: Core, victims: list[int]) -> int:
    """Bytes that may be allotted again once *victims* are gone; all, if nothing ever may."""
    dry = list(core.standings.dry) if core.allocator.allotted_bytes else []
    made = ~np.isin(core.slots.device[victims], dry)
    return int(core.slots.units[victims][made].sum()) * ALIGN


def choose_expired(core: Core, leaves: IntArray, blocks_max: int) -> list[int]:
    """Condemn up to *blocks_max* of *leaves*, and of what is above them, whose time is over."""
    order = Order.of(core)
    over = only(order.rank, expired(core.slots, core.terms, order.now_ms))
    return list(_choose(core, leaves, replace(order, rank=over), blocks_max=blocks_max))


def choose_blocks(core: Core, leaves: IntArray, blocks_max: int) -> list[int]:
    """Condemn up to *blocks_max* of *leaves* and of what is above them, whatever they are worth."""
    return list(_choose(core, leaves, Order.none(core.slots), blocks_max=blocks_max))


def _choose(
    core: Core, leaves: IntArray, order: Order, *, bytes_max: int = 1 << 62,
    blocks_max: int = 1 << 62, payer: int | None = None, newcomer: Newcomer | None = None,
) -> Iterator[int]:  # fmt: skip
    """Condemn *leaves*, and parents that become leaves, in *order*, until one limit is reached.

    With *payer* the bytes are of its account, and no parent of another's goes.
    """
    slots = core.slots
    rising: list[_Turn] = []  # parents whose last child has been condemned here
    missing: dict[int, int] = {}
    dry = core.standings.dry if core.allocator.allotted_bytes and payer is None else frozenset()
    freed = count = 0
    turns = _in_turn(slots, leaves, order)
    leaf = next(turns, None)
    while freed < bytes_max and count < blocks_max:
        if rising and (leaf is None or rising[0] < leaf):
            turn = heapq.heappop(rising)
        elif leaf is not None:
            turn, leaf = leaf, next(turns, None)
        else:
            break
        if newcomer is not None and turn[0] == newcomer.rank and turn[1] > newcomer.score:
            newcomer.kept_out = True
            break
        slot = turn[3]
        if not _may_go(slots, slot, turn, missing) or (
            slots.retention[slot] == PINNED and not order.pinned_too  # since the order was made
        ):
            continue
        slots.state[slot] = states.CONDEMNED
        if slots.device[slot] not in dry:  # what is freed there makes no room
            freed += int(slots.units[slot]) * ALIGN
        count += 1
        parent = int(slots.parent[slot])
        if parent != states.NONE:
            missing[parent] = missing.get(parent, int(slots.children[parent])) - 1
            others = payer is not None and slots.payer[parent] != payer
            if missing[parent] == 0 and not others and order.rank[parent] != NEVER:
                score = order.policy.score(slots, parent, order.now_ms)
                heapq.heappush(
                    rising,
                    (
                        int(order.rank[parent]), score, -int(slots.position[parent]), parent,
                        int(slots.stamp[parent]),
                    ),
                )  # fmt: skip
        yield slot


def _may_go(slots: Slots, slot: int, turn: _Turn, missing: dict[int, int]) -> bool:
    """Tell whether a block may be condemned still, now that its turn has come."""
    return bool(
        slots.state[slot] == states.LIVE
        and not slots.leases[slot]
        and slots.stamp[slot] == turn[4]
        and (slot in missing or not slots.children[slot])
    )


def _in_turn(slots: Slots, leaves: IntArray, order: Order) -> Iterator[_Turn]:
    """Yield *leaves* in the order they are to go; sorts few of many where few are wanted."""
    ranks_of = order.rank[leaves]
    for rank in np.unique(ranks_of).tolist():
        if rank == NEVER:
            break
        waiting = leaves[ranks_of == rank]
        scores, wanted = order.policy.scores(slots, waiting, order.now_ms), SORTED_AT_ONCE
        stamps = slots.stamp[waiting]
        while len(waiting):
            some = np.ones(len(waiting), np.bool_)
            if len(waiting) > wanted:
                some = scores <= np.partition(scores, wanted)[wanted]
            now, values, used = waiting[some], scores[some], stamps[some]
            depth = -slots.position[now].astype(np.int64)
            turn = np.lexsort((now, depth, values))
            for score, minus, slot, stamp in zip(
                values[turn].tolist(), depth[turn].tolist(), now[turn].tolist(),
                used[turn].tolist(), strict=True,
            ):  # fmt: skip
                yield rank, score, minus, slot, stamp
            waiting, scores, stamps = waiting[~some], scores[~some], stamps[~some]
            wanted = 2 * wanted

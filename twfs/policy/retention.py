"""What the retention classes promise, by slot: times to live, shares, and whether it was kept.

A class with a time to live promises a block that long from its last use; afterwards the block is
expired: it goes first, and in the background too. A pinned block is promised for good. What a
promise comes to is counted when eviction takes the block: kept if its time was over, broken if not.
Explicit removal, a lost epoch and a device that lost bytes are no eviction. Not thread-safe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from twfs.config import DEFAULT_SHARE, DEFAULT_TTL, Class, Config, duration_ms
from twfs.hints import Retention
from twfs.index.slots import CLASSES, LIVE, IntArray, Slots
from twfs.units import ALIGN, ByteCount

FOR_EVER: Final = 1 << 62  # a time to live that never ends; added to any stamp it fits 64 bits
PINNED: Final = Retention.PINNED.rank


@dataclass(frozen=True, slots=True)
class Terms:
    """Time to live and share of the space of every class, by its number."""

    ttl_ms: IntArray  # uint64, FOR_EVER where there is none
    shares: tuple[float, ...]

    @classmethod
    def of(cls, config: Config) -> "Terms":
        """The terms that *config* says, with the defaults where it says nothing."""
        ttl, shares = [], []
        for retention in Retention:
            given: Class = getattr(config.retention, retention)
            lives = duration_ms(DEFAULT_TTL[retention] if given.ttl is None else given.ttl)
            ttl.append(FOR_EVER if lives is None else lives)
            shares.append(DEFAULT_SHARE[retention] if given.share is None else given.share)
        return cls(np.array(ttl, np.uint64), tuple(shares))

    def promises(self, rank: int) -> bool:
        """Whether a block of that class is promised anything."""
        return rank == PINNED or int(self.ttl_ms[rank]) != FOR_EVER

    def ends(self, slots: Slots, some: IntArray) -> IntArray:
        """When the times to live of the blocks in the slots *some* are over, in ms."""
        last = np.maximum(slots.stamp[some], np.uint64(slots.known_from_ms))
        return np.asarray(last + self.ttl_ms[np.minimum(slots.retention[some], PINNED)])


@dataclass(slots=True)
class Promises:
    """What came of them since open, by class."""

    kept: list[int] = field(default_factory=lambda: [0] * CLASSES)
    broken: list[int] = field(default_factory=lambda: [0] * CLASSES)
    refused: int = 0  # pins that would not have fitted; every one was an error to who asked

    def judge(self, slots: Slots, terms: Terms, gone: Sequence[int], now_ms: int) -> None:
        """Count what eviction at *now_ms* made of the promises to the blocks in *gone*."""
        some = np.asarray(gone, np.int64)
        over = terms.ends(slots, some) <= np.uint64(now_ms)
        for rank in range(CLASSES):
            if terms.promises(rank):
                mine = slots.retention[some] == rank
                self.kept[rank] += int((mine & over).sum())
                self.broken[rank] += int((mine & ~over).sum())


def live(slots: Slots) -> IntArray:
    """Tell, by slot, which blocks are there for all."""
    return np.asarray(slots.state[: len(slots)] == LIVE)


def expired(slots: Slots, terms: Terms, now_ms: int) -> IntArray:
    """Tell, by slot, whose time to live is over."""
    here = len(slots)
    found = np.zeros(here, np.bool_)
    for rank, ttl_ms in enumerate(terms.ttl_ms.tolist()):
        if ttl_ms <= now_ms - slots.known_from_ms:
            old = slots.stamp[:here] <= np.uint64(now_ms - ttl_ms)
            found |= old & (slots.retention[:here] == rank)
    return found


def held_bytes(slots: Slots, rank: int) -> ByteCount:
    """Bytes on the devices of the blocks of one class."""
    here = len(slots)
    mine = live(slots) & (slots.retention[:here] == rank)
    return ByteCount(int(slots.units[:here][mine].sum()) * ALIGN)


def over_share(slots: Slots, terms: Terms, total_bytes: int) -> IntArray:
    """Tell, by slot, which blocks are what their class holds above its share: the longest unused.

    Pinned ones are none: their share is a limit to what may be promised.
    """
    here = len(slots)
    found = np.zeros(here, np.bool_)
    for rank in range(PINNED):
        if terms.shares[rank] >= 1:
            continue
        mine = np.flatnonzero(live(slots) & (slots.retention[:here] == rank))
        bytes_of = slots.units[mine].astype(np.int64) * ALIGN
        above = int(bytes_of.sum()) - int(terms.shares[rank] * total_bytes)
        if above > 0:
            order = np.lexsort((-slots.position[mine].astype(np.int64), slots.stamp[mine]))
            before = np.cumsum(bytes_of[order]) - bytes_of[order]
            found[mine[order[before < above]]] = True
    return found


def figures(slots: Slots, terms: Terms, promises: Promises, total_bytes: int) -> dict[str, Any]:
    """What `twfs status` says of every class."""
    here = len(slots)
    there = live(slots)
    said: dict[str, Any] = {}
    for retention in Retention:
        rank = retention.rank
        mine = there & (slots.retention[:here] == rank)
        kept, broken, ttl = promises.kept[rank], promises.broken[rank], int(terms.ttl_ms[rank])
        said[retention.value] = {
            "blocks": int(mine.sum()),
            "bytes": int(slots.units[:here][mine].sum()) * ALIGN,
            "limit_bytes": int(terms.shares[rank] * total_bytes),
            "ttl_ms": None if ttl == FOR_EVER else ttl,
            "promises_kept": kept,
            "promises_broken": broken,
            "promises_kept_ratio": kept / (kept + broken) if kept + broken else 1.0,
        }
    return said

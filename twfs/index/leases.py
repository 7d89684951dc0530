"""Leases: who may still be reading which blocks, and until when. In memory only.

A lease is a token that connections of one uid may join; its blocks are held until the last of them
has left or the deadline has passed. Deadlines are CLOCK_BOOTTIME, so that neither a clock change
nor a suspended machine prolongs them. Not thread-safe: the warehouse's lock guards it.
"""

import heapq
import itertools
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import numpy.typing as npt

from twfs.errors import LeaseEnded, TooLarge
from twfs.layout import Layout
from twfs.prefix import Names
from twfs.records import BlockKey
from twfs.tenants import EVERYBODY
from twfs.units import DIGEST_BYTES, HASH_BYTES, ByteCount, ModelId

TOKEN_BYTES: Final = 16
LEASES_PER_OWNER_MAX: Final = 4096  # an engine leases per waiting request; more is a leak
AGE_TERMS_MAX: Final = 60  # a lease may be renewed up to an hour of default terms


@dataclass(frozen=True, slots=True)
class Located:
    """What a reader needs of a match: rows by (group, shard, index), their extents, the lease."""

    token: bytes
    model: ModelId
    start: int  # blocks that the asker held itself
    blocks: int  # start + found
    located: "npt.NDArray[Any]"  # LOCATED_DTYPE
    extents: "npt.NDArray[Any]"  # EXTENT_DTYPE, in the order of the rows
    term_ms: int
    tenant: int = EVERYBODY

    def names(self, layout: Layout) -> Names:
        """Names as far as a lease tells them: the hashes; positions as if made of tokens."""
        spine = (self.located["group"] == layout.spine) & (self.located["shard"] == 0)
        hashes = bytes(HASH_BYTES * self.start) + self.located["prefix_hash"][spine].tobytes()
        positions = tuple(layout.block_tokens * (i + 1) for i in range(self.blocks))
        return Names(
            hashes, bytes(DIGEST_BYTES * self.blocks), bytes(HASH_BYTES * self.blocks), positions
        )


@dataclass(slots=True)
class _Lease:
    located: Located
    slots: "npt.NDArray[Any]"
    uid: int
    owners: dict[int, int]  # how often each has taken it: matches and joins not yet released
    deadline_ms: int
    last_deadline_ms: int
    bytes: ByteCount
    pin: int


@dataclass(slots=True)
class _Owner:
    uid: int
    bytes_max: int
    tokens: set[bytes] = field(default_factory=set)
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """A lease that is over: its slots are to be counted down."""

    slots: "npt.NDArray[Any]"
    pin: int  # the number of the pin that kept them


def boottime_ms() -> int:
    """Milliseconds since boot, suspended time included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Leases:
    """All leases of one warehouse; see the module's docstring."""

    def __init__(
        self, term_ms: int, bytes_per_owner_max: ByteCount, *,
        bytes_per_uid_max: ByteCount | None = None, unbounded: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.term_ms = term_ms
        self._bytes_per_uid_max = bytes_per_uid_max
        self._unbounded = unbounded  # users to whom that bound does not apply
        self._bytes_of_uid: Counter[int] = Counter()  # each lease once, whoever joined it
        self._bytes_max = bytes_per_owner_max
        self._leases: dict[bytes, _Lease] = {}
        self._owners: dict[int, _Owner] = {}
        self._deadlines: list[tuple[int, bytes]] = []
        self._numbers = itertools.count(1)
        self._granted = 0
        self._expired = 0

    def add_owner(self, uid: int, bytes_max: int | None = None) -> int:
        """Return a new owner: one connection, or the process that opened the warehouse.

        It may lease *bytes_max*, or what one client may.
        """
        number = next(self._numbers)
        self._owners[number] = _Owner(uid, self._bytes_max if bytes_max is None else bytes_max)
        return number

    @property
    def age_max_ms(self) -> int:
        """The longest that a lease can last, however often it is renewed."""
        return AGE_TERMS_MAX * self.term_ms

    def allow(self, bytes_per_owner_max: ByteCount) -> None:
        """Let owners to come lease so much."""
        self._bytes_max = bytes_per_owner_max

    @staticmethod
    def new_token() -> bytes:
        """Return a token that nobody can guess."""
        return os.urandom(TOKEN_BYTES)

    def uid_of(self, owner: int) -> int:
        """The user whose connection *owner* is; root for one that is not there."""
        of = self._owners.get(owner)
        return 0 if of is None else of.uid

    def tenant_of(self, token: bytes) -> int | None:
        """For which tenant a lease was granted; None if it is over."""
        lease = self._leases.get(token)
        return None if lease is None else lease.located.tenant

    def account_of(self, token: bytes) -> tuple[int, ModelId] | None:
        """For which tenant a lease was granted, and of which model; None if it is over."""
        lease = self._leases.get(token)
        return None if lease is None else (lease.located.tenant, lease.located.model)

    def room_bytes(self, owner: int) -> ByteCount:
        """Bytes that *owner* may lease more; 0 if it holds too many leases."""
        of = self._owners[owner]
        if len(of.tokens) >= LEASES_PER_OWNER_MAX:
            return ByteCount(0)
        return ByteCount(max(0, min(of.bytes_max - of.bytes, self._room_of_uid(of.uid))))

    def _room_of_uid(self, uid: int) -> int:
        """Bytes that all connections of *uid* together may lease more."""
        if self._bytes_per_uid_max is None or uid in self._unbounded:
            return 1 << 63
        return self._bytes_per_uid_max - self._bytes_of_uid[uid]

    def room(self, owner: int, wanted: int) -> None:
        """Raise TooLarge unless *owner* may hold another's *wanted* bytes too."""
        of = self._owners[owner]
        if len(of.tokens) >= LEASES_PER_OWNER_MAX or wanted > of.bytes_max - of.bytes:
            raise TooLarge(
                f"this client holds {len(of.tokens)} leases over {of.bytes} bytes; at most "
                f"{LEASES_PER_OWNER_MAX} over {of.bytes_max} are allowed: release some"
            )

    def grant(
        self, located: Located, slots: "npt.NDArray[Any]", lease_bytes: ByteCount, owner: int,
        pin: int = 0,
    ) -> None:  # fmt: skip
        """Enter the lease *located.token* over *slots*, pinned by *pin*, held by *owner*."""
        now = boottime_ms()
        deadline = now + self.term_ms
        of = self._owners[owner]
        self._leases[located.token] = _Lease(
            located, slots, of.uid, {owner: 1}, deadline, now + AGE_TERMS_MAX * self.term_ms,
            lease_bytes, pin,
        )  # fmt: skip
        of.tokens.add(located.token)
        of.bytes += lease_bytes
        self._bytes_of_uid[of.uid] += lease_bytes
        heapq.heappush(self._deadlines, (deadline, located.token))
        self._granted += 1

    def join(self, token: bytes, owner: int) -> Located:
        """Let *owner* hold the lease too, or once more; LeaseEnded if it is over or another uid's.

        Each join has a release of its own: a client's join and its release of another match of the
        same lease may cross, and a join that it gave up may be answered late.
        """
        lease = self._leases.get(token)
        of = self._owners[owner]
        if lease is None or lease.uid != of.uid or lease.deadline_ms <= boottime_ms():
            raise LeaseEnded("the lease is over, or belongs to another user")
        if owner not in lease.owners:
            self.room(owner, lease.bytes)
            lease.owners[owner] = 0
            of.tokens.add(token)
            of.bytes += lease.bytes
        lease.owners[owner] += 1
        return lease.located

    def held(self, token: bytes, owner: int) -> bool:
        """Tell whether *owner* holds the lease now."""
        lease = self._leases.get(token)
        return lease is not None and owner in lease.owners and lease.deadline_ms > boottime_ms()

    def renew(self, token: bytes, owner: int) -> int | None:
        """Give a full term from now, within the age limit; the term in ms, None if it is over."""
        lease = self._leases.get(token)
        now = boottime_ms()
        if lease is None or owner not in lease.owners or lease.deadline_ms <= now:
            return None
        lease.deadline_ms = min(now + self.term_ms, lease.last_deadline_ms)
        heapq.heappush(self._deadlines, (lease.deadline_ms, token))
        return lease.deadline_ms - now

    def release(self, token: bytes, owner: int) -> Ended | None:
        """Take back one match or join of *owner*; returns the lease if it was the last of all.

        Unknown tokens: None.
        """
        lease = self._leases.get(token)
        if lease is None or owner not in lease.owners:
            return None
        lease.owners[owner] -= 1
        return None if lease.owners[owner] else self._leave(lease, owner)

    def _leave(self, lease: _Lease, owner: int) -> Ended | None:
        """End *owner*'s part, however often it took it; returns the lease if no other is left."""
        token = lease.located.token
        del lease.owners[owner]
        of = self._owners[owner]
        of.tokens.discard(token)
        of.bytes -= lease.bytes
        if lease.owners:
            return None
        del self._leases[token]
        self._bytes_of_uid[lease.uid] -= lease.bytes
        if not self._bytes_of_uid[lease.uid]:
            del self._bytes_of_uid[lease.uid]
        return Ended(lease.slots, lease.pin)

    def end_owner(self, owner: int) -> list[Ended]:
        """End all parts of *owner*, whose connection has closed."""
        of = self._owners.get(owner)
        if of is None:
            return []
        ended = [self._leave(self._leases[token], owner) for token in list(of.tokens)]
        del self._owners[owner]
        return [lease for lease in ended if lease is not None]

    def expire(self) -> list[Ended]:
        """End every lease whose deadline has passed."""
        now = boottime_ms()
        ended = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, token = heapq.heappop(self._deadlines)
            lease = self._leases.get(token)
            if lease is None or lease.deadline_ms > now:
                continue
            self._expired += 1
            for owner in list(lease.owners):
                last = self._leave(lease, owner)
                if last is not None:
                    ended.append(last)
        return ended

    def statistics(self) -> dict[str, int]:
        """Leases held, granted and expired, and who holds them."""
        return {
            "leases": len(self._leases),
            "leases_granted": self._granted,
            "leases_expired": self._expired,
            "lease_owners": len(self._owners),
            "leased_bytes": sum(lease.bytes for lease in self._leases.values()),
        }


def key_of_row(model: ModelId, row: Any) -> BlockKey:
    """The full name of the block in a LOCATED_DTYPE *row*."""
    return BlockKey(model, row["prefix_hash"].tobytes(), int(row["group"]), int(row["shard"]))

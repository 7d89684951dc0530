"""What the connections of one daemon share: the warehouse, limits on threads, counters.

Also what a connection knows of its peer and of an open put. Touched in the event loop alone.
"""

import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from twfs.errors import ProtocolError, TooLarge
from twfs.prefix import Names
from twfs.protocol.codec import names_of
from twfs.protocol.messages import LookupNames, MatchNames

if TYPE_CHECKING:
    from twfs.datapath.putting import Put
    from twfs.warehouse import Warehouse

CLIENTS_MAX: Final = 192  # and so many of one user that another still gets in:
CLIENTS_PER_UID_MAX: Final = 128  # 8 ranks and a scheduler each of a dozen engines
COMMITS_MAX: Final = 32  # threads waiting for commits; group commit wants many
WRITES_MAX: Final = 8  # threads writing to devices
TOOLS_MAX: Final = 4  # threads listing, checking, evicting: never in the way of puts
TABLES_MAX: Final = 4  # clients that devices are being opened for: bounds descriptors
READS_MAX: Final = 8  # payloads held in memory for read_block


class Part:
    """At most half of the threads of *of*: one user's waiting requests never fill its queue.

    As much of a trio.CapacityLimiter as `to_thread.run_sync` needs.
    """

    def __init__(self, of: trio.CapacityLimiter) -> None:
        self._of = of
        self._own = trio.CapacityLimiter(max(1, int(of.total_tokens) // 2))

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        """Wait for a thread: first behind this user's other requests, then behind all users'."""
        await self._own.acquire_on_behalf_of(borrower)
        try:
            await self._of.acquire_on_behalf_of(borrower)
        except BaseException:
            self._own.release_on_behalf_of(borrower)
            raise

    def release_on_behalf_of(self, borrower: object) -> None:
        """Give the thread back."""
        self._of.release_on_behalf_of(borrower)
        self._own.release_on_behalf_of(borrower)


def part_of(limiter: trio.CapacityLimiter) -> trio.CapacityLimiter:
    """Return a Part of *limiter*, for run_sync, which takes anything like a CapacityLimiter."""
    return cast("trio.CapacityLimiter", Part(limiter))


@dataclass(slots=True)
class Account:
    """What all connections of one user hold, and the threads that they may wait for.

    An operator's are all there are: root's tools must get in when an engine has lost its mind.
    """

    clients_max: int
    arena_bytes_max: int
    commits: trio.CapacityLimiter
    writes: trio.CapacityLimiter
    tools: trio.CapacityLimiter
    reads: trio.Semaphore
    clients: int = 0
    arena_bytes: int = 0


@dataclass(slots=True)
class Shared:
    """What the connections of one daemon share; touched in the event loop alone."""

    warehouse: "Warehouse"
    arena_bytes_max: int
    arena_bytes: int = 0
    clients: int = 0
    dropped: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    arenas: Counter[str] = field(default_factory=Counter)  # made so far, by the kind of pages
    commits: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(COMMITS_MAX))
    writes: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(WRITES_MAX))
    tools: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(TOOLS_MAX))
    tables: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(TABLES_MAX))
    reads: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(READS_MAX))
    accounts: dict[int, Account] = field(default_factory=dict)  # of users that are connected

    def enter(self, uid: int) -> None:
        """Count a client of *uid*; TooLarge if there are too many, or too many of one user."""
        account = self.account(uid)
        if self.clients >= CLIENTS_MAX:
            raise TooLarge(f"{CLIENTS_MAX} clients are connected, the most allowed: close some")
        if account.clients >= account.clients_max:
            raise TooLarge(
                f"{account.clients} clients of uid {uid} are connected, the most allowed of one "
                "user: close some"
            )
        self.accounts[uid] = account
        account.clients += 1
        self.clients += 1

    def leave(self, uid: int) -> None:
        """Undo enter."""
        self.clients -= 1
        self.accounts[uid].clients -= 1
        if not self.accounts[uid].clients:
            del self.accounts[uid]

    def account(self, uid: int) -> Account:
        """What *uid* holds; a fresh one if it has no client."""
        known = self.accounts.get(uid)
        if known is not None:
            return known
        if uid in self.warehouse.tenants().operators:
            return Account(
                CLIENTS_MAX, self.arena_bytes_max, self.commits, self.writes, self.tools,
                trio.Semaphore(READS_MAX),
            )  # fmt: skip
        return Account(
            CLIENTS_PER_UID_MAX, self.arena_bytes_max // 2, part_of(self.commits),
            part_of(self.writes), part_of(self.tools), trio.Semaphore(READS_MAX // 2),
        )  # fmt: skip

    def check_arena(self, uid: int, byte_count: int) -> None:
        """Raise TooLarge unless *uid* may have an arena of *byte_count* more."""
        account = self.account(uid)
        if (
            self.arena_bytes + byte_count > self.arena_bytes_max
            or account.arena_bytes + byte_count > account.arena_bytes_max
        ):
            raise TooLarge(
                f"an arena of {byte_count} bytes: {self.arena_bytes} of {self.arena_bytes_max} "
                f"are given out, {account.arena_bytes} of {account.arena_bytes_max} of them to uid "
                f"{uid}; ask for less, or start the daemon with larger arena_bytes"
            )

    def add_arena(self, uid: int, byte_count: int) -> None:
        """Count arena bytes given to *uid*, or taken back."""
        self.arena_bytes += byte_count
        self.account(uid).arena_bytes += byte_count

    def statistics(self) -> dict[str, Any]:
        """Clients, requests by kind, errors by class, bytes."""
        return {
            "clients": self.clients,
            "clients_dropped": self.dropped,
            "arena_bytes": self.arena_bytes,
            "arena_bytes_max": self.arena_bytes_max,
            "arenas_made": dict(self.arenas),
            "received_bytes": self.received_bytes,
            "sent_bytes": self.sent_bytes,
            "requests": dict(self.requests),
            "errors": dict(self.errors),
        }


@dataclass(slots=True)
class OpenPut:
    """A put between its begin and its end."""

    put: "Put"
    wanted: set[int]  # lacking, and not handed over yet
    writing: int = 0
    closing: bool = False
    idle: trio.Event = field(default_factory=trio.Event)

    def leave_write(self) -> None:
        """Count a window that has been written."""
        self.writing -= 1
        if self.closing and not self.writing:
            self.idle.set()

    async def close(self) -> None:
        """Take no more windows, and wait for those under way."""
        self.closing = True
        if self.writing:
            await self.idle.wait()


def names_asked(request: MatchNames | LookupNames) -> Names:
    """Return the names of *request*, which asks from a block within them on; ProtocolError."""
    names = names_of(request.names)
    if request.start > len(names):
        raise ProtocolError(f"a match of {len(names)} names from block {request.start} on")
    return names


def peer_of(sock: trio.socket.SocketType) -> tuple[int, int]:
    """Return the peer's pid and uid, as the kernel vouches for them."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", data)
    return pid, uid

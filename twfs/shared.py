"""What the connections of one daemon share: the warehouse, limits on threads, counters.

Also what a connection knows of its peer and of an open put. Touched in the event loop alone.
"""

import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import trio

from twfs.errors import ProtocolError
from twfs.messages import LookupNames, MatchNames
from twfs.prefix import Names
from twfs.protocol import names_of

if TYPE_CHECKING:
    from twfs.putting import Put
    from twfs.warehouse import Warehouse

COMMITS_MAX: Final = 32  # threads waiting for commits; group commit wants many
WRITES_MAX: Final = 8  # threads writing to devices
TOOLS_MAX: Final = 4  # threads listing, checking, evicting: never in the way of puts
TABLES_MAX: Final = 4  # clients that devices are being opened for: bounds descriptors
READS_MAX: Final = 8  # payloads held in memory for read_block


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

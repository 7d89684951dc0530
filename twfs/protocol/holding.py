"""The leases that a client holds: which token over which connection, until when.

The LeaseHolder of its matches; granting is the daemon's. Thread-safe.
"""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass

from twfs.errors import NoDaemon
from twfs.protocol.link import Connector, Link
from twfs.protocol.messages import (
    AnyReply,
    Counted,
    LocatedBlocks,
    ReleaseLease,
    RenewLease,
    ReportBlock,
)
from twfs.records import BlockKey
from twfs.store import ReadOutcome, Served


def boottime_s() -> float:
    """Seconds since boot, suspended time included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class _Lease:
    """A token that this client holds: over which connection, until when, by how many matches."""

    link: int
    deadline_s: float  # CLOCK_BOOTTIME
    matches: int = 1


class Held:
    """A LeaseHolder over the connection that *connector* keeps; see the module's docstring."""

    def __init__(self, connector: Connector, timeout_s: float, counts: "Counter[str]") -> None:
        self._connector = connector
        self._timeout_s = timeout_s  # for an answer, and for a one-way request to be taken
        self._lock = threading.Lock()
        self._leases: dict[bytes, _Lease] = {}
        self._counts = counts

    def __len__(self) -> int:
        return len(self._leases)

    def enter(self, link: Link, reply: LocatedBlocks, deadline_s: float) -> None:
        """Note the lease that *reply* grants over *link*, and one more match under it."""
        with self._lock:
            lease = self._leases.get(reply.token)
            if lease is None:
                self._leases[reply.token] = _Lease(link.number, deadline_s)
            else:
                lease.deadline_s = deadline_s
                lease.matches += 1

    def held(self, token: bytes) -> bool:
        """See LeaseHolder.held; asks the kernel, not the daemon."""
        lease, link = self._leases.get(token), self._connector.now
        return (
            lease is not None
            and link is not None
            and link.number == lease.link
            and not self._connector.forked
            and link.channel.alive()
            and boottime_s() < lease.deadline_s
        )

    def release(self, token: bytes, served: Sequence[Served] = ()) -> None:
        """See LeaseHolder.release."""
        link = self._connector.now
        with self._lock:
            lease = self._leases.get(token)
            if lease is None:
                return
            lease.matches -= 1
            if not lease.matches:
                del self._leases[token]
        if link is not None and link.number == lease.link and not self._connector.forked:
            link.channel.tell(ReleaseLease(0, token, tuple(map(astuple, served))), self._timeout_s)

    def renew(self, token: bytes) -> bool:
        """See LeaseHolder.renew."""
        lease, link = self._leases.get(token), self._connector.now
        if lease is None or link is None or link.number != lease.link:
            return False
        before_s = boottime_s()
        with suppress(NoDaemon):
            reply = link.channel.call(RenewLease(0, token), self._timeout_s)
            if isinstance(reply, Counted) and reply.count is not None:
                lease.deadline_s = before_s + reply.count / 1000
                return True
        return False

    def report(self, key: BlockKey, generation: int, outcome: ReadOutcome) -> None:
        """See LeaseHolder.report."""
        link = self._connector.now
        if link is not None:
            link.stale = link.stale or outcome is ReadOutcome.DEVICE_ERROR
            link.channel.tell(ReportBlock(0, key.pack(), generation, outcome), self._timeout_s)

    def take_late(self, reply: AnyReply) -> None:
        """Release the lease of a match that had been given up."""
        link = self._connector.now
        if isinstance(reply, LocatedBlocks) and link is not None:
            with self._lock:
                self._counts["late_leases"] += 1
            link.channel.tell(ReleaseLease(0, reply.token), self._timeout_s)

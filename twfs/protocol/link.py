"""What comes with one connection of a client: channel, arena, devices; and one put over it.

A link lives until its connection ends; the next connection is another link. Thread-safe.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from twfs.devices.arena import Arena
from twfs.errors import InvalidInput, NoDaemon, ProtocolError, TwfsError
from twfs.hints import NO_HINT, Hint
from twfs.prefix import Names
from twfs.protocol.channel import Channel, greet
from twfs.protocol.codec import (
    arena_block_to_wire,
    error_of,
    hint_to_wire,
    names_to_wire,
    result_of,
    unpack_numbers,
)
from twfs.protocol.messages import (
    AbandonPut,
    AnyReply,
    AskDevices,
    BeginPut,
    Done,
    Failed,
    PublishPut,
    PutBegun,
    PutDone,
    Request,
    Welcome,
    WriteBlocks,
)
from twfs.protocol.wire import WireDevice
from twfs.readers.select import DeviceSource, Readers
from twfs.store import ArenaBlock, PutResult, Retention
from twfs.tenants import EVERYBODY
from twfs.units import ByteCount, DeviceIndex, ModelId

PUT_SECONDS_MAX: Final = 60.0  # for one step of a put: a window written, a commit durable
ATTEMPT_SECONDS: Final = 0.1  # a dead daemon is asked for this often at most
TABLE_SECONDS: Final = 1.0  # for the table of devices, which is asked for this often at most
ABANDON_SECONDS_MAX: Final = 5.0  # then the connection is closed, which abandons too


class Devices:
    """The devices of one warehouse as descriptors, and the readers on them; they follow its table.

    Thread-safe.
    """

    def __init__(
        self, warehouse: bytes, rows: Sequence[WireDevice], descriptors: Sequence[int]
    ) -> None:
        self.warehouse = warehouse
        self.rows = tuple(rows)
        self.sizes = {row.index: row.size_bytes for row in rows}
        self._lock = threading.Lock()
        self._closed = False
        self._sources = _sources_of(rows, descriptors)
        self.readers = Readers(self._sources)

    def are_those_of(self, welcome: Welcome) -> bool:
        """Tell whether a new connection has brought the same devices."""
        return (self.warehouse, self.rows) == (welcome.warehouse, welcome.devices)

    def follow(self, rows: Sequence[WireDevice], descriptors: Sequence[int]) -> None:
        """Take a newer table and its descriptors over; reads under way go on."""
        with self._lock:
            fresh = _sources_of(rows, descriptors)
            if self._closed:
                _close_fds(fresh.values())
                return
            sources: dict[DeviceIndex, DeviceSource] = {}
            for index in [DeviceIndex(row.index) for row in rows]:
                now, before = fresh.get(index), self._sources.get(index)
                if now is not None and before is not None and _same(now, before):
                    os.close(now.fd)
                    now = before
                kept = now or before  # one that is offline, or was not passed: what we have
                if kept is not None:
                    sources[index] = kept
            gone = [each for index, each in self._sources.items() if sources.get(index) != each]
            self._sources = sources
            self.rows = tuple(rows)
            self.sizes = {row.index: row.size_bytes for row in rows}
            self.readers.follow(sources, [partial(os.close, each.fd) for each in gone])

    def close(self) -> None:
        """Wait for reads under way, and close the descriptors. Idempotent."""
        self.readers.close()
        with self._lock:
            self._closed = True
            _close_fds(self._sources.values())
            self._sources = {}


def _sources_of(
    rows: Sequence[WireDevice], descriptors: Sequence[int]
) -> dict[DeviceIndex, DeviceSource]:
    """Devices to read from, of the rows that were passed and their descriptors."""
    passed = [row for row in rows if row.passed]
    return {
        DeviceIndex(row.index): DeviceSource(fd, Path(row.path), ByteCount(row.size_bytes))
        for row, fd in zip(passed, descriptors, strict=True)
    }


def _same(one: DeviceSource, other: DeviceSource) -> bool:
    """Tell whether two descriptors lead to one device."""
    a, b = os.fstat(one.fd), os.fstat(other.fd)
    return (a.st_dev, a.st_ino, a.st_rdev, one.path, one.size_bytes) == (
        b.st_dev, b.st_ino, b.st_rdev, other.path, other.size_bytes,
    )  # fmt: skip


def _close_fds(sources: Iterable[DeviceSource]) -> None:
    for source in sources:
        os.close(source.fd)


@dataclass(slots=True)
class Link:
    """One connection and what came with it."""

    number: int  # which connection of this client, from 1
    channel: Channel
    warehouse: UUID
    devices: Devices
    arena: Arena | None
    stale: bool = False  # a read of a device failed since the table was asked for
    asked_s: float = 0.0  # when that was, monotonic
    unknown: set[int] = field(default_factory=set)  # devices that the last table did not have
    asking: threading.Lock = field(default_factory=threading.Lock)

    def knows(self, numbers: Iterable[int]) -> bool:
        """Tell whether all these devices are known; asks for them if one is not.

        Also if a read has failed since: the device may be another one by now. Waits TABLE_SECONDS
        at most; where asking did not help before, it asks once in that time.
        """
        wanted = set(numbers)
        known = wanted <= self.devices.sizes.keys()
        if known and not self.stale:
            return True
        with self.asking:
            known = wanted <= self.devices.sizes.keys()
            now_s = time.monotonic()
            fresh = not wanted <= self.devices.sizes.keys() | self.unknown
            if known and not self.stale:
                return True
            if not fresh and now_s - self.asked_s < TABLE_SECONDS:
                return known
            self.asked_s, self.stale = now_s, False
            with suppress(NoDaemon):
                answer = self.channel.call_for_devices(AskDevices(0), TABLE_SECONDS)
                if answer is not None:
                    self.devices.follow(answer[0].devices, answer[1])
            self.unknown = wanted - self.devices.sizes.keys()
            return not self.unknown

    def ask(self, request: Request) -> AnyReply:
        """Return the reply to one step of a put; the connection ends if it takes too long."""
        reply = self.channel.call(request, PUT_SECONDS_MAX)
        if reply is None:
            error = NoDaemon(f"a step of a put took more than {PUT_SECONDS_MAX:.0f} s")
            self.channel.end(error)  # the daemon may still use the arena: it goes with it
            raise error
        if isinstance(reply, Failed):
            raise error_of(reply)
        return reply


class Arenas:
    """Closes the arenas of ended connections when the last put over them has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[int, int] = {}  # by link number
        self._ended: dict[int, Arena] = {}

    def enter(self, link: Link) -> None:
        """Count a put."""
        with self._lock:
            self._users[link.number] = self._users.get(link.number, 0) + 1

    def leave(self, link: Link) -> None:
        """Take back one enter."""
        with self._lock:
            self._users[link.number] -= 1
            self._close(link.number)

    def end(self, link: Link) -> None:
        """Let go of the arena of *link*, whose connection has ended."""
        with self._lock:
            if link.arena is not None:
                self._ended[link.number] = link.arena
                self._close(link.number)

    def _close(self, number: int) -> None:
        """Close the arena if it is ended and unused. Hold the lock."""
        if not self._users.get(number):
            self._users.pop(number, None)
            arena = self._ended.pop(number, None)
            if arena is not None:
                arena.close()


def open_link(
    path: Path, number: int, *, arena_bytes: int, hugetlb: bool, timeout_s: float,
    before: Devices | None,
) -> Link:  # fmt: skip
    """Connect and take over what the daemon hands out; errors as `greet`.

    The devices *before* are kept if they are the same, so that reads under way go on.
    """
    channel, welcome, descriptors = greet(
        path, arena_bytes=arena_bytes, hugetlb=hugetlb, timeout_s=timeout_s
    )
    arena = None
    try:
        if welcome.arena_bytes:
            arena = Arena.of_descriptor(descriptors[-1], welcome.arena_bytes)
            descriptors.pop()
    except (InvalidInput, OSError) as error:
        _refuse(channel, descriptors)
        raise ProtocolError(f"the daemon's arena cannot be used: {error}") from error
    if before is not None and before.are_those_of(welcome):
        devices = before
        for descriptor in descriptors:
            os.close(descriptor)
    else:
        devices = Devices(welcome.warehouse, welcome.devices, descriptors)
    return Link(number, channel, UUID(bytes=welcome.warehouse), devices, arena)


def _refuse(channel: Channel, descriptors: Sequence[int]) -> None:
    """Take back a connection that cannot be used."""
    channel.end(NoDaemon("the connection was refused"))
    for descriptor in descriptors:
        os.close(descriptor)


class Connector:
    """Keeps a client's one link, and makes the next when it has ended."""

    def __init__(
        self, path: Path, *, arena_bytes: int, hugetlb: bool, timeout_s: float,
        on_late: Callable[[AnyReply], None],
    ) -> None:  # fmt: skip
        self.now: Link | None = None
        self.devices: Devices | None = None
        self.arenas = Arenas()
        self._path = path
        self._arena_bytes = arena_bytes
        self._hugetlb = hugetlb
        self._timeout_s = timeout_s
        self._on_late = on_late
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._links = 0
        self._next_attempt_s = 0.0
        self._closed = False

    @property
    def forked(self) -> bool:
        """Whether this is another process than the one that connected."""
        return os.getpid() != self._pid

    def link(self) -> Link:
        """The link, made anew if it has ended; NoDaemon. InvalidInput after a fork."""
        link = self.now
        if link is not None and not self.forked and link.channel.alive():
            return link
        self._check_fork()
        try:
            return self.connect(self._timeout_s)
        except (TwfsError, OSError) as error:
            raise NoDaemon(str(error)) from error

    def connect(self, timeout_s: float) -> Link:
        """Return the link, made within *timeout_s* seconds if there is none; errors as greet."""
        self._check_fork()
        if not self._lock.acquire(timeout=timeout_s):
            raise NoDaemon("another thread is connecting")
        try:
            if self._closed:
                raise NoDaemon("this client is closed")
            if self.now is not None and self.now.channel.alive():
                return self.now
            now_s = time.monotonic()
            if now_s < self._next_attempt_s:
                raise NoDaemon(f"no daemon answered on {self._path} just now")
            self._next_attempt_s = now_s + ATTEMPT_SECONDS
            return self._open(timeout_s)
        finally:
            self._lock.release()

    def _check_fork(self) -> None:
        """Raise InvalidInput in a child of the process that connected."""
        if self.forked:
            raise InvalidInput("this client was made before a fork: connect in each process")

    def _open(self, timeout_s: float) -> Link:
        """Make the next link. Hold the lock."""
        if self.now is not None:
            self.arenas.end(self.now)
            self.now = None
        link = open_link(
            self._path, self._links + 1, arena_bytes=self._arena_bytes, hugetlb=self._hugetlb,
            timeout_s=timeout_s, before=self.devices,
        )  # fmt: skip
        link.channel.on_late = self._on_late
        if self.devices is not None and self.devices is not link.devices:
            # Reads of the old warehouse's blocks may be under way, and engines do not wait.
            threading.Thread(target=self.devices.close, name="twfs-devices").start()
        self._links += 1
        self.devices, self.now = link.devices, link
        return link

    def close(self) -> None:
        """End the link; wait for reads under way. Idempotent."""
        with self._lock:
            self._closed = True
            link, self.now = self.now, None
            devices, self.devices = self.devices, None
        if link is not None:
            link.channel.end(NoDaemon("this client is closed"))
            self.arenas.end(link)
        if devices is not None:
            devices.close()

    def statistics(self) -> dict[str, Any]:
        """The connection's, the arena's and the readers' figures."""
        link, devices = self.now, self.devices
        return {
            "connected": link is not None and link.channel.alive(),
            "reconnects": max(0, self._links - 1),
            "channel": None if link is None else link.channel.statistics(),
            "arena": None if link is None or link.arena is None else link.arena.statistics(),
            "readers": None if devices is None else devices.readers.statistics(),
        }


class RemotePut:
    """A PutPort over a link."""

    def __init__(
        self, link: Link, executor: ThreadPoolExecutor, model: ModelId, names: Names, *,
        group: int, shard: int, retention: Retention, tenant: int = EVERYBODY,
        hint: Hint = NO_HINT,
    ) -> None:  # fmt: skip
        self._link = link
        self._executor = executor
        self._count = len(names)
        wire = names_to_wire(names)
        reply = link.ask(
            BeginPut(0, model, wire, group, shard, retention, tenant, hint_to_wire(hint))
        )
        if not isinstance(reply, PutBegun):
            raise ProtocolError(f"the daemon answered with a {type(reply).__name__}")
        self._put = reply.put
        self._open = True
        self._lacking = unpack_numbers(reply.lacking)
        if self._lacking and max(self._lacking) >= self._count:
            raise ProtocolError(f"the daemon lacks block {max(self._lacking)} of {self._count}")

    @property
    def lacking(self) -> Sequence[int]:
        """See PutPort.lacking."""
        return self._lacking

    def write(self, blocks: Sequence[ArenaBlock]) -> "Future[None]":
        """See PutPort.write."""
        wire = tuple(map(arena_block_to_wire, blocks))
        try:
            return self._executor.submit(self._write, wire)
        except RuntimeError as error:
            raise NoDaemon("this client is closed") from error

    def _write(self, blocks: tuple[Any, ...]) -> None:
        reply = self._link.ask(WriteBlocks(0, self._put, blocks))
        if not isinstance(reply, Done):
            raise ProtocolError(f"the daemon answered with a {type(reply).__name__}")

    def publish(self) -> PutResult:
        """See PutPort.publish."""
        self._open = False  # whatever the answer: the daemon has ended it, or the connection
        reply = self._link.ask(PublishPut(0, self._put))
        if not isinstance(reply, PutDone) or len(reply.outcomes) != self._count:
            raise ProtocolError(f"the daemon answered a put of {self._count} blocks wrongly")
        return result_of(reply)

    def abandon(self) -> None:
        """See PutPort.abandon."""
        if self._open:
            self._open = False
            with suppress(TwfsError):
                request = AbandonPut(0, self._put)
                if self._link.channel.call(request, ABANDON_SECONDS_MAX) is None:
                    self._link.channel.end(NoDaemon("a put could not be abandoned in time"))

"""How each device stands (online, read-only, draining, offline), and who decides that.

Decided here alone, from what the devices themselves noticed: a write that is refused, writes that
fail one after the other or a flush that fails make a device read-only; a superblock that cannot be
read or is not its own, and I/O that does not end, put it offline. Blocks on an offline device are
misses; on any but an online one nothing is allotted. Device I/O of puts and reads goes through
here, in threads of each device's own, so that one that hangs holds up nobody else. Thread-safe.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as TookTooLong
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, ParamSpec, TypeVar

from twfs.devices.device import Device
from twfs.devices.extents import Allocator
from twfs.devices.flushing import Flusher
from twfs.errors import DeviceError, TwfsError
from twfs.metadata.tables import DeviceRecord
from twfs.units import DeviceIndex

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

HANG_SECONDS: Final = 10.0  # far above a drive's worst pause, well below a person's patience
BAD_WRITES_MAX: Final = 3  # in a row: one bad sector is no bad drive
LOOK_SECONDS: Final = 0.25  # who waits for I/O looks this often whether the device is given up
WRITE_THREADS: Final = 4  # writes in flight; more gain nothing on one drive (facts: 2 to 4)
READ_THREADS: Final = 16  # of the mount, reports and drains; engines read themselves


class DeviceState(StrEnum):
    """How a device stands; offline hides draining, and draining read-only."""

    ONLINE = "online"
    READ_ONLY = "read-only"
    DRAINING = "draining"
    OFFLINE = "offline"


def _pool(threads: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, f"twfs-{name}")


@dataclass(slots=True)
class Standing:
    """One device of the warehouse; *device* and *flusher* are None where it could not be opened."""

    record: DeviceRecord
    device: Device | None
    offline: str = ""  # why; empty: it is there
    read_only: str = ""  # why; empty: it takes writes
    cause: TwfsError | None = None  # why it could not be opened
    flusher: Flusher | None = None
    writers: ThreadPoolExecutor = field(default_factory=lambda: _pool(WRITE_THREADS, "write"))
    readers: ThreadPoolExecutor = field(default_factory=lambda: _pool(READ_THREADS, "read"))

    def __post_init__(self) -> None:
        if self.device is not None:
            self.flusher = Flusher(self.device)
            self.read_only = self.device.why_no_writes

    @property
    def index(self) -> DeviceIndex:
        """Its number."""
        return self.record.index

    @property
    def state(self) -> DeviceState:
        """How it stands."""
        if self.offline:
            return DeviceState.OFFLINE
        if self.record.draining:
            return DeviceState.DRAINING
        return DeviceState.READ_ONLY if self.read_only else DeviceState.ONLINE

    @property
    def notes(self) -> list[str]:
        """What an operator should know of it, one sentence each."""
        notes = [] if self.device is None else list(self.device.notes)
        if self.offline:
            notes.insert(0, f"offline, its blocks are misses: {self.offline}")
        elif self.read_only:
            notes.insert(0, f"read-only, nothing is stored there: {self.read_only}")
        return notes

    def give_up(self, why: str) -> None:
        """Let nobody wait for the device any more."""
        self.offline = why
        if self.device is not None and self.flusher is not None:
            self.device.give_up(f"is offline: {why}")
            self.flusher.give_up(f"{self.device.path} is offline: {why}")

    def judge(self) -> str:
        """Draw the consequences of what the device noticed; says what is new, in words."""
        device = self.device
        if device is None or self.offline:
            return ""
        if device.in_flight_s > HANG_SECONDS:
            self.give_up(f"it has not answered for {HANG_SECONDS:.0f} s")
            return self.notes[0]
        why = device.why_no_writes
        if not why and device.bad_writes >= BAD_WRITES_MAX:
            why = f"{device.bad_writes} writes in a row failed"
        if why and not self.read_only:
            self.read_only = why
            return self.notes[0]
        return ""

    def close(self) -> None:
        """Let go of threads and the device; waits for I/O under way unless it was given up."""
        waiting = not self.offline
        self.writers.shutdown(wait=waiting)
        self.readers.shutdown(wait=waiting)
        if self.flusher is not None:
            self.flusher.close()
        if self.device is not None and (waiting or self.device.idle()):
            self.device.close()


class Standings:
    """All devices of one warehouse. *lock* is the warehouse's, which guards *allocator*."""

    def __init__(
        self, lock: threading.RLock, allocator: Allocator, standings: Iterable[Standing]
    ) -> None:
        self._lock = lock
        self._allocator = allocator
        # The next five are replaced whole, never changed: readers take no lock.
        self.all: dict[int, Standing] = {each.index: each for each in standings}
        self.devices: dict[int, Device] = {}  # those that are there
        self.flushers: dict[int, Flusher] = {}
        self.offline: frozenset[int] = frozenset()
        self.dry: frozenset[int] = frozenset()  # nothing is allotted there
        self.serial = 0  # grows with every change
        self.follow()

    def follow(self) -> None:
        """Let everything follow how the devices stand now."""
        with self._lock:
            there = [each for _, each in sorted(self.all.items()) if not each.offline]
            self.devices = {each.index: each.device for each in there if each.device is not None}
            self.flushers = {each.index: each.flusher for each in there if each.flusher is not None}
            self.offline = frozenset(self.all) - frozenset(self.devices)
            online = [each.index for each in there if each.state is DeviceState.ONLINE]
            self.dry = frozenset(self.all) - frozenset(online)
            self._allocator.allot_on(online)
            self.serial += 1

    def replace(self, index: int, standing: Standing | None) -> None:
        """Put *standing* in the place of device *index*; None takes it out."""
        with self._lock:
            others = {number: each for number, each in self.all.items() if number != index}
            self.all = others if standing is None else {**others, index: standing}
            self.follow()

    def device(self, index: int) -> Device:
        """Return device *index*; DeviceError if it is offline."""
        device = self.devices.get(index)
        if device is None:
            raise DeviceError(f"device {index} is offline: see `twfs device list`")
        return device

    def look(self) -> None:
        """Judge every device by what it noticed; never waits for one."""
        with self._lock:
            news = [(each.index, each.judge()) for each in self.all.values()]
            if any(text for _, text in news):
                self.follow()
        for index, text in news:
            if text:
                log.warning("device %d: %s", index, text)

    def put_offline(self, index: int, why: str) -> None:
        """Take device *index* out of use: its blocks are misses until it is back."""
        with self._lock:
            standing = self.all.get(index)
            if standing is None or standing.offline:
                return
            standing.give_up(why)
            self.follow()
        log.warning("device %d: %s", index, standing.notes[0])

    def are_there(self, indices: Iterable[int]) -> bool:
        """Tell whether these devices are there, by their superblocks; else they go offline.

        Blocks, up to HANG_SECONDS for each.
        """
        good = True
        for index in set(indices):
            standing = self.all.get(index)
            if standing is None or standing.offline or standing.device is None:
                good = False
                continue
            try:
                why = self._submitted(standing.readers, standing.device.stranger).result(
                    HANG_SECONDS
                )
            except (TookTooLong, TwfsError) as error:
                why = str(error) or f"its superblock could not be read in {HANG_SECONDS:.0f} s"
            if why:
                self.put_offline(index, why)
                good = False
        return good

    @staticmethod
    def _submitted(
        pool: ThreadPoolExecutor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> "Future[T]":
        """Run *call* in *pool*; a future that has failed if the device was taken out meanwhile."""
        try:
            return pool.submit(call, *args, **kwargs)
        except RuntimeError as error:
            failed: Future[T] = Future()
            failed.set_exception(DeviceError(f"the device has been taken out: {error}"))
            return failed

    def write(
        self, index: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> "Future[T]":
        """Run *call*, which writes to device *index*, in a thread for that; wait says when."""
        standing = self.all.get(index)
        if standing is None or standing.offline:
            failed: Future[T] = Future()
            failed.set_exception(DeviceError(f"device {index} is offline: see `twfs device list`"))
            return failed
        return self._submitted(standing.writers, call, *args, **kwargs)

    def read(
        self, indices: Collection[int], call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return what *call*, which reads from the devices *indices*, returns.

        Waits for no device that is given up: DeviceError then. *call* must use memory of its own.
        """
        if not indices or any(index not in self.devices for index in indices):
            raise DeviceError(f"device {sorted(indices)} offline: see `twfs device list`")
        standing = self.all.get(min(indices))
        if standing is None:
            raise DeviceError(f"device {min(indices)} has been taken out")
        future = self._submitted(standing.readers, call, *args, **kwargs)
        if self.wait({future: indices}):
            raise DeviceError(f"a device of {sorted(indices)} went offline during a read")
        if future.cancelled():
            raise DeviceError(f"a device of {sorted(indices)} went offline before a read")
        return future.result()

    def wait(self, futures: "Mapping[Future[T], Collection[int]]") -> "list[Future[T]]":
        """Wait for *futures*, each with the devices it is on, but for those that are given up.

        Returns the ones that still run, on devices that went offline.
        """
        pending = set(futures)
        stuck: list[Future[T]] = []
        while pending:
            _, pending = wait(pending, LOOK_SECONDS)
            if not pending:
                break
            self.look()
            for future in [each for each in pending if self.offline & set(futures[each])]:
                pending.discard(future)
                if not future.cancel() and not future.done():
                    stuck.append(future)
        return stuck

    def flush(self, devices: Iterable[int]) -> set[int]:
        """Make what was written to *devices* durable; returns those where that failed."""
        failed: set[int] = set()
        asked = []
        for index in sorted(devices):
            flusher = self.flushers.get(index)
            if flusher is None:
                failed.add(index)
            else:
                asked.append((index, flusher, flusher.ask()))
        for index, flusher, ticket in asked:
            try:
                flusher.wait(ticket)
            except DeviceError:
                failed.add(index)
        if failed:
            self.look()
        return failed

    def close(self) -> None:
        """Let go of all devices."""
        for standing in self.all.values():
            standing.close()

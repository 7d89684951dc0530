"""Headers of removed blocks, overwritten before their extents are handed out.

One thread of its own takes all that waits at once: one flush of each device for all of it.
"""

import mmap
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

from twfs.devices.device import Device
from twfs.devices.extents import Allocator
from twfs.devices.flushing import Flusher
from twfs.devices.limbo import Freed
from twfs.units import ALIGN


class Wiper:
    """See the module's docstring. *lock* guards *allocator* and what waits here."""

    def __init__(
        self, allocator: Allocator, lock: threading.RLock,
        parts: Callable[[], tuple[Mapping[int, Device], Mapping[int, Flusher]]],
        count: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._allocator = allocator
        self._lock = lock
        self._parts = parts  # devices and their flushers, those that are there now
        self._count = count
        self._waiting: list[Freed] = []
        self._under_way: list[Future[None]] = []  # or failed, and nobody has looked yet
        self._thread = ThreadPoolExecutor(1, "twfs-erase")

    def hand_out(self, freed: Freed) -> None:
        """Let extents be reserved again, headers overwritten first. Any thread."""
        with self._lock:
            if freed.headers:
                with suppress(RuntimeError):  # it is closing: nothing is reserved any more
                    under_way = [e for e in self._under_way if not e.done() or e.exception()]
                    self._under_way = [*under_way, self._thread.submit(self._wipe)]
                    self._waiting.append(freed)
                    return
            self._allocator.release(freed.extents)

    def _wipe(self) -> None:
        """Overwrite the headers and flush, then let the extents go, also when that failed."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        headers = [header for freed in waiting for header in freed.headers]
        zeros = memoryview(mmap.mmap(-1, ALIGN))
        devices, flushers = self._parts()
        try:
            for header in headers:
                devices[header.device].write_from([zeros], header.offset)
            for index in {header.device for header in headers}:
                flushers[index].flush()
            with self._lock:
                self._count(len(headers))
        finally:
            with self._lock:
                for freed in waiting:
                    self._allocator.release(freed.extents)

    def drain(self) -> bool:
        """Wait for headers that are being overwritten, be it in vain; False if there are none."""
        with self._lock:
            waiting = [each for each in self._under_way if not each.done()]
        wait(waiting)
        return bool(waiting)

    def wait(self) -> None:
        """Wait for headers that are being overwritten; the first error of any of them."""
        with self._lock:
            waiting, self._under_way = self._under_way, []
        wait(waiting)
        for each in waiting:
            each.result()

    def close(self) -> None:
        """Finish what waits; what comes later is not overwritten."""
        self._thread.shutdown()

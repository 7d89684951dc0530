"""Waiting no longer than a deadline for devices that may hang, and knowing which do.

Only for I/O into a reader's own memory: what goes into the engine's must be waited for. Threads are
daemons, one set per device, so that a hung device keeps neither the others nor the process's end.
Thread-safe.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, Generic, TypeVar

from twfs.readers.base import DeviceSource

HUNG_S: Final = 2.0  # in flight and nothing came back for so long: the device hangs
FINISHERS: Final = 2  # threads of a device beside those that read
IDLE_S: Final = 300.0  # a thread with nothing to do ends: a new one is late on a busy machine

_Io = TypeVar("_Io")


class Watch:
    """The I/Os under way, by device: a device that answers none of them for HUNG_S is hung.

    It is no more when one of them ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[DeviceSource, dict[int, float]] = {}
        self._ended: dict[DeviceSource, float] = {}
        self._serial = 0

    def begin(self, source: DeviceSource) -> int:
        """Note that an I/O begins; return what end wants to know it by."""
        with self._lock:
            self._serial += 1
            self._flights.setdefault(source, {})[self._serial] = time.monotonic()
            return self._serial

    def end(self, source: DeviceSource, flight: int) -> None:
        """Note that it has ended, however."""
        with self._lock:
            flights = self._flights[source]
            del flights[flight]
            self._ended[source] = time.monotonic()
            if not flights:  # devices come and go: nothing stays of one that is not read
                del self._flights[source], self._ended[source]

    def hung(self, source: DeviceSource) -> bool:
        """Tell whether I/Os of *source* are under way and none has ended for HUNG_S."""
        with self._lock:
            flights = self._flights.get(source)
            if not flights:
                return False
            since = max(next(iter(flights.values())), self._ended.get(source, 0.0))
            return time.monotonic() - since > HUNG_S

    def statistics(self) -> dict[str, int]:
        """I/Os under way, by the device's path."""
        with self._lock:
            return {str(source.path): len(flights) for source, flights in self._flights.items()}


class Hands:
    """Up to *most* daemon threads, started as they are needed, that end when idle."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._idle = 0
        self._threads = 0

    def submit(self, call: Callable[[], None], times: int) -> None:
        """Have *call*, which must not raise, called so many times, as soon as threads are free."""
        with self._changed:
            self._calls.extend([call] * times)
            self._changed.notify(times)
            lacking = max(0, len(self._calls) - self._idle)
            fresh = min(lacking, self._most - self._threads)
            self._threads += fresh
        # Without the lock: each waits until its thread runs, and those before it are to go on.
        for _ in range(fresh):
            threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        """Call what was submitted; the body of each thread."""
        while True:
            with self._changed:
                self._idle += 1
                came = self._changed.wait_for(lambda: bool(self._calls), IDLE_S)
                self._idle -= 1
                if not came:
                    self._threads -= 1
                    return
                call = self._calls.popleft()
            call()
            del call  # it holds memory, which is not to wait for the next


class _Lane(Generic[_Io]):
    """What a TimedWave has to do on one device, through a descriptor of its own.

    *landed* is for those who wait to begin an I/O.
    """

    def __init__(
        self, source: DeviceSource, ios: Sequence[_Io], landed: threading.Condition
    ) -> None:
        self.ios = deque(ios)
        self.helpers = 0
        self.flying = 0  # I/Os under way
        self.landed = landed
        self.fd = os.dup(source.fd)  # an I/O left behind must not meet another's descriptor


class TimedWave(Generic[_Io]):
    """I/Os into the reader's own memory, *threads* at once per device; the caller only waits.

    *read* does one I/O on a descriptor; another begins when it has ended. What it returns goes to
    *finish*, which may write to the engine's memory and is never called, nor still at work, after
    `wait` has returned.
    """

    def __init__(
        self,
        ios: Mapping[DeviceSource, Sequence[_Io]],
        threads: int,
        read: Callable[[_Io, int], Any],
        finish: Callable[[_Io, Any], None],
    ) -> None:
        self._threads = threads
        self._read = read
        self._finish = finish
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._flying = 0  # I/Os under way
        self._finishing = 0
        self._closed = False
        self._over: Callable[[], None] | None = None
        self._failure: BaseException | None = None
        self._lanes: dict[DeviceSource, _Lane[_Io]] = {}
        for source, some in ios.items():
            with suppress(OSError):  # it was just closed: its I/Os are never done
                self._lanes[source] = _Lane(source, some, threading.Condition(self._lock))
        self._left = sum(len(lane.ios) for lane in self._lanes.values())  # not yet finished

    def begin(self, hands: Callable[[DeviceSource], Hands]) -> None:
        """Have the *hands* of each device begin."""
        for source, lane in self._lanes.items():
            lane.helpers = min(self._threads + FINISHERS, len(lane.ios))
            hands(source).submit(partial(self._help, lane), lane.helpers)

    def _help(self, lane: _Lane[_Io]) -> None:
        """Work one lane's I/Os off; the last to leave closes its descriptor."""
        while (io := self._take(lane)) is not None:
            came: Any = None
            failure: BaseException | None = None
            try:
                came = self._read(io, lane.fd)
            except BaseException as error:  # noqa: BLE001 - raised by wait, in the caller
                failure = error
            if self._landed(lane, failure):
                try:
                    self._finish(io, came)
                except BaseException as error:  # noqa: BLE001 - as above
                    failure = error
                with self._changed:
                    self._failure = self._failure or failure
                    self._finishing -= 1
                    self._left -= 1
                    if not self._left or self._failure or self._closed:
                        self._changed.notify_all()  # else nobody would do more than wait again

    def _take(self, lane: _Lane[_Io]) -> _Io | None:
        """Take the next I/O of *lane*, None when there is no more or nobody waits for it."""
        with self._lock:
            while lane.ios and not self._closed:
                if lane.flying == self._threads:
                    lane.landed.wait()
                    continue
                lane.flying += 1
                self._flying += 1
                io = lane.ios.popleft()
                if not lane.ios:
                    lane.landed.notify_all()  # nothing is left to wait for
                return io
            lane.helpers -= 1
            if not lane.helpers:
                os.close(lane.fd)
            return None

    def _landed(self, lane: _Lane[_Io], failure: BaseException | None) -> bool:
        """Note that an I/O of *lane* has ended; tell whether to finish it."""
        with self._lock:
            lane.flying -= 1
            lane.landed.notify()
            self._flying -= 1
            over = self._over if not self._flying else None
            if over is not None:
                self._over = None
            self._failure = self._failure or failure
            wanted = not self._closed and failure is None
            self._finishing += wanted
            if failure is not None:
                self._changed.notify_all()
        if over is not None:
            over()
        return wanted

    def wait(self, deadline: float) -> bool:
        """Wait until all is finished, or until *deadline* (time.monotonic); tell which.

        From then on nothing is begun or finished any more. Raises what a thread has raised, and
        KeyboardInterrupt at once, but for an I/O that is just being finished.
        """
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                with self._changed:
                    while self._left and not self._failure and not interrupt:
                        left_s = deadline - time.monotonic()
                        if left_s <= 0:
                            break
                        self._changed.wait(left_s)
                    self._close()
                    while self._finishing:
                        self._changed.wait()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
        if self._failure is not None:
            raise self._failure
        return not self._left

    def _close(self) -> None:
        """Have nothing begun or finished any more. Hold the lock."""
        self._closed = True
        for lane in self._lanes.values():
            lane.landed.notify_all()

    def when_over(self, call: Callable[[], None]) -> bool:
        """Have *call* called when no I/O is under way; True if that was now. Call after wait."""
        with self._lock:
            self._close()
            if self._flying:
                self._over = call
                return False
        call()
        return True

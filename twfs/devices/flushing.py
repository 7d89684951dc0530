"""One device flush for all who wait: a put needs a flush that began after its last write ended.

Thread-safe. A flush that failed is an error for everyone it was for, and is never retried: the
device takes no more writes after it. The flush runs in a thread of its own, so that nobody is
stuck behind a device that hangs once it has been given up.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

from twfs.devices.device import Device
from twfs.errors import DeviceError


class Flusher:
    """Shared flushes of one device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._condition = threading.Condition()
        self._thread = ThreadPoolExecutor(1, "twfs-flush")
        self._begun = 0
        self._ended = 0
        self._running = False
        self._given_up = ""
        self._errors: dict[int, BaseException] = {}
        self._asked = 0

    def flush(self) -> None:
        """Return once a flush that began after this call has ended; DeviceError."""
        self.wait(self.ask())

    def ask(self) -> int:
        """Ask for a flush that begins from now on; returns what wait wants."""
        with self._condition:
            self._asked += 1
            ticket = self._begun + 1
            self._begin()
        return ticket

    def _begin(self) -> None:
        """Begin a flush unless one is under way. Hold the condition."""
        if not self._running and not self._given_up:
            self._running = True
            self._begun += 1
            self._thread.submit(self._run, self._begun)

    def wait(self, ticket: int) -> None:
        """Return once the flush that was asked for has ended; DeviceError."""
        with self._condition:
            while self._ended < ticket:
                if self._given_up:
                    raise DeviceError(self._given_up)
                self._begin()
                self._condition.wait()
            failed = self._errors.get(ticket)
        if failed is not None:
            raise failed

    def _run(self, number: int) -> None:
        """Flush once, and tell all who wait; the body of the thread."""
        error: BaseException | None = None
        try:
            self._device.flush()
        except BaseException as failure:  # noqa: BLE001 - it is raised in every waiter
            error = failure
        with self._condition:
            if error is not None:
                self._errors[number] = error
            self._running = False
            self._ended = number
            self._condition.notify_all()

    def give_up(self, why: str) -> None:
        """Let all who wait fail, now and later: the device is gone, or hangs."""
        with self._condition:
            self._given_up = why
            self._condition.notify_all()

    def close(self) -> None:
        """End the thread; waits for a flush under way unless the device was given up."""
        self._thread.shutdown(wait=not self._given_up)

    def statistics(self) -> dict[str, int]:
        """Flushes asked for, and done."""
        return {"flushes_asked": self._asked, "flushes_done": self._ended}

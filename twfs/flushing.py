"""One device flush for all who wait: a put needs a flush that began after its last write ended.

Thread-safe. A flush that failed is an error for everyone it was for, and is never retried: the
device takes no more writes after it.
"""

import threading

from twfs.device import Device


class Flusher:
    """Shared flushes of one device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._condition = threading.Condition()
        self._begun = 0
        self._ended = 0
        self._running = False
        self._errors: dict[int, BaseException] = {}
        self._asked = 0

    def flush(self) -> None:
        """Return once a flush that began after this call has ended; DeviceError."""
        with self._condition:
            self._asked += 1
            ticket = self._begun + 1
            while self._ended < ticket:
                if self._running:
                    self._condition.wait()
                    continue
                self._running = True
                self._begun += 1
                number = self._begun
                self._condition.release()
                error: BaseException | None = None
                try:
                    self._device.flush()
                except BaseException as failure:  # noqa: BLE001 - it is raised in every waiter below
                    error = failure
                finally:
                    self._condition.acquire()
                if error is not None:
                    self._errors[number] = error
                self._running = False
                self._ended = number
                self._condition.notify_all()
            failed = self._errors.get(ticket)
        if failed is not None:
            raise failed

    def statistics(self) -> dict[str, int]:
        """Flushes asked for, and done."""
        return {"flushes_asked": self._asked, "flushes_done": self._ended}

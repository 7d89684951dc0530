"""Drains: a device is emptied in the background, at a bounded rate, until nothing is left on it.

A drain is durable in the list of devices: nothing is allotted on such a device after a restart
either, and asking again goes on with what is left. One thread per drain; it ends when the device is
empty, is offline, is taken back, or the warehouse closes. Thread-safe.
"""

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

from twfs.admin import moving
from twfs.core.state import Core
from twfs.errors import NoSpaceForImage, TwfsError, WarehouseClosed, WarehouseFull
from twfs.units import DeviceIndex

log = logging.getLogger(__name__)

RATE_BYTES_S: Final = 256 << 20  # of reading and of writing: a tenth of what one drive can
RETRY_SECONDS: Final = 2.0  # after no room, and while puts begun before still write there


@dataclass(slots=True)
class Drain:
    """One drain and how far it is."""

    core: Core
    device: DeviceIndex
    rate_bytes_s: int
    moved_blocks: int = 0
    moved_bytes: int = 0
    lost_blocks: int = 0
    done: bool = False
    waiting_for: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        name = f"twfs-drain-{self.device}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it, and wait for that: a batch that is under way is finished."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def running(self) -> bool:
        """Whether its thread still works."""
        return self._thread is not None and self._thread.is_alive()

    def progress(self) -> dict[str, Any]:
        """What has been done, and what it waits for."""
        return {
            "running": self.running, "done": self.done, "moved_blocks": self.moved_blocks,
            "moved_bytes": self.moved_bytes, "lost_blocks": self.lost_blocks,
            "waiting_for": self.waiting_for,
        }  # fmt: skip

    def _run(self) -> None:
        """The body of the thread."""
        try:
            while not self._stop.is_set():
                self._pass()
                if self._over():
                    break
                self._stop.wait(RETRY_SECONDS)
        except WarehouseClosed:
            pass
        except TwfsError as error:
            self.waiting_for = f"{error}; ask for the drain again"
            log.warning("the drain of device %d has ended: %s", self.device, error)
        except Exception:
            self.waiting_for = "an unexpected error, see the log; ask for the drain again"
            log.exception("the drain of device %d has ended", self.device)

    def _pass(self) -> None:
        """Move all that is there now."""
        began, before = time.monotonic(), self.moved_bytes
        for batch in moving.batches(moving.blocks_on(self.core, self.device)):
            if self._stop.is_set() or self.device in self.core.standings.offline:
                return
            try:
                moved = moving.move(self.core, batch)
            except (WarehouseFull, NoSpaceForImage) as error:
                self.waiting_for = str(error)
                return
            self.waiting_for = ""
            self.moved_blocks += moved.blocks
            self.moved_bytes += moved.moved_bytes
            self.lost_blocks += moved.lost
            ahead_s = (self.moved_bytes - before) / self.rate_bytes_s - (time.monotonic() - began)
            if ahead_s > 0:
                self._stop.wait(ahead_s)

    def _over(self) -> bool:
        """Tell whether there is nothing more to do here."""
        if self.device in self.core.standings.offline:
            self.waiting_for = "the device is offline"
            return True
        used, _ = moving.drained_bytes(self.core, self.device)
        if not used:
            self.done, self.waiting_for = True, ""
            log.info("device %d is empty: %d blocks moved", self.device, self.moved_blocks)
        elif not self.waiting_for:
            self.waiting_for = "puts that were under way"
        return not used

"""How fast the scrubber may read: little while anybody else uses the disks, more when nobody does.

A token bucket with two rates. What others do is told by the daemon's own counters and, for engines
that read the devices themselves, by the kernel's I/O statistics of the disks less what was read
here. Nothing here knows blocks.
"""

import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from twfs.core.state import Core
from twfs.devices.device import Device

# Of each device. 32 MiB/s is 1 to 2 % of what one NVMe drive gives, and still looks at 2.5 TiB a
# day; 256 MiB/s leaves 9/10 of the drive to the read that ends the idle time.
BUSY_BYTES_S: Final = 32 << 20
IDLE_BYTES_S: Final = 256 << 20
# What a read costs beside its bytes, as bytes: 0.2 to 0.5 ms of CPU a block. Without it small
# blocks would take a quarter of a core at the busy rate; so they are 30 a second, 1/60 of one.
# (With 256 KiB, 100 a second, reads of 64 KiB blocks lost 11 % on two cores.)
READ_COST_BYTES: Final = 1 << 20
BURST_BYTES: Final = 4 << 20  # what may be saved up: a few reads, so that no pause makes a storm
SAMPLE_S: Final = 0.1  # between two looks at the others: bounds how late the scrubber gives way
CALM_S: Final = 2.0  # without any use before the disks count as idle: engines pause to compute
FOREGROUND_BYTES_S: Final = 4 << 20  # of others' I/O: logs and heat stamps stay below
WAIT_MAX_S: Final = 0.5  # one wait: a rate that was raised meanwhile is seen
SECTOR_BYTES: Final = 512  # of the kernel's statistics, whatever the drive has
SECTORS_READ: Final = 2  # fields of /sys/dev/block/*/stat
SECTORS_WRITTEN: Final = 6

_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}  # system call numbers; glibc has no name for it
_IOPRIO_IDLE: Final = 3 << 13  # IOPRIO_CLASS_IDLE
_IOPRIO_WHO_PROCESS: Final = 1


class Stopped(Exception):
    """Raised by Pacer.take once the scrubber is to end."""


def lower_io_priority() -> None:
    """Put the calling thread's I/O behind everybody else's, where the I/O scheduler has classes.

    Its CPU priority stays: a thread that holds the interpreter's lock and does not get the CPU
    would delay every match.
    """
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)


def statistics_files(devices: Iterable[Device]) -> list[Path] | None:
    """The kernel's I/O statistics of the disks below *devices*; None unless all have some.

    An image's disk is its filesystem's; a partition's is the whole disk, for that is shared.
    """
    found = set()
    for device in devices:
        try:
            status = device.path.stat()
            number = status.st_rdev if device.is_block else status.st_dev
            folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
            if (folder / "partition").exists():
                folder = folder.parent
            moved_bytes(folder / "stat")
        except (OSError, ValueError, IndexError):
            return None
        found.add(folder / "stat")
    return sorted(found)


def moved_bytes(statistics: Path) -> int:
    """Bytes that a disk has read and written; OSError, ValueError or IndexError if not told."""
    fields = statistics.read_text().split()
    return SECTOR_BYTES * (int(fields[SECTORS_READ]) + int(fields[SECTORS_WRITTEN]))


class Foreground:
    """Whether anybody but the scrubber uses the warehouse or its disks. Of one thread."""

    def __init__(self, core: Core, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._clock = clock
        self._devices: dict[int, Device] = {}
        self._files: list[Path] | None = None
        self._looked = -SAMPLE_S
        self._used = -CALM_S
        self._moved = 0  # by the disks, at the last look
        self._own = 0  # by the scrubber, at the last look
        self._done: tuple[int, ...] = ()

    def busy(self, own_bytes: int) -> bool:
        """Tell whether there was use in the last CALM_S; *own_bytes*: read here so far, ever.

        No read of the scrubber's may be under way, or its bytes would count as another's.
        """
        now = self._clock()
        if now - self._looked >= SAMPLE_S:
            if self._uses(now - self._looked, own_bytes):
                self._used = now
            self._looked = now
        return now - self._used < CALM_S

    def _uses(self, seconds: float, own_bytes: int) -> bool:
        """Tell whether there was use since the last look, *seconds* ago."""
        counters = self._core.counters
        done = (
            counters.matches, counters.puts, counters.written_bytes, counters.mount_reads,
            counters.evicted_blocks,
        )  # fmt: skip
        used = done != self._done and bool(self._done)
        self._done = done
        if self._devices is not self._core.devices:  # the dict is replaced, never changed
            self._devices = self._core.devices
            self._files = statistics_files(self._devices.values())
            self._moved, self._own = self._total(), own_bytes
        if self._files is None:  # nobody tells what clients read: a lease may mean a read
            return used or self._core.leases.statistics()["leases"] > 0
        moved = self._total()
        others = (moved - self._moved) - (own_bytes - self._own)
        self._moved, self._own = moved, own_bytes
        return used or others > FOREGROUND_BYTES_S * seconds

    def _total(self) -> int:
        """Bytes moved by all disks so far."""
        try:
            return sum(map(moved_bytes, self._files or ()))
        except (OSError, ValueError, IndexError):  # a disk has gone
            return self._moved


class Pacer:
    """A token bucket that fills at the rate of the moment; thread-safe.

    `rate_bytes_s`: None lets it give way to others, 0 sets no limit, all else is kept as it is.
    """

    def __init__(
        self, foreground: Callable[[int], bool], devices: Callable[[], int], end: threading.Event,
        *, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """*foreground* is Foreground.busy, *devices* counts them; *end* ends every wait."""
        self.rate_bytes_s: int | None = None
        self.busy = False  # this and the next as they were at the last read
        self.present_bytes_s = 0
        self._foreground = foreground
        self._devices = devices
        self._end = end
        self._clock = clock
        self._turn = threading.Lock()
        self._credit = 0.0
        self._filled = clock()
        self._own_bytes = 0

    def take(self, byte_count: int) -> None:
        """Wait until *byte_count* bytes may be read; Stopped once the scrubber is to end."""
        with self._turn:
            self._raise_if_ended()
            rate = self._present_rate()
            cost = byte_count + (READ_COST_BYTES if self.rate_bytes_s is None else 0)
            self._fill(rate)
            self._credit -= cost
            while rate and self._credit <= -1:  # a part of a byte is owed to rounding
                self._end.wait(min(-self._credit / rate, WAIT_MAX_S))
                self._raise_if_ended()
                rate = self._present_rate()
                self._fill(rate)
            self._own_bytes += byte_count

    def _raise_if_ended(self) -> None:
        if self._end.is_set():
            raise Stopped

    def _present_rate(self) -> int:
        """Bytes a second at present; 0 is no limit."""
        rate = self.rate_bytes_s
        if rate is None:
            self.busy = self._foreground(self._own_bytes)
            rate = max(1, self._devices()) * (BUSY_BYTES_S if self.busy else IDLE_BYTES_S)
        self.present_bytes_s = rate
        return rate

    def _fill(self, rate: int) -> None:
        """Add what has come since the last time; without a limit nothing is owed."""
        now = self._clock()
        gained = (now - self._filled) * rate if rate else float("inf")
        self._credit = min(self._credit + gained, BURST_BYTES)
        self._filled = now

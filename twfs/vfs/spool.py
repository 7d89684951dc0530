"""Where the bytes of an import wait: one unlinked file, cut into regions. Not thread-safe."""

import os
import tempfile
from pathlib import Path
from typing import Final

from twfs.units import align_up

ZERO_BYTES: Final = 1 << 20  # written at a time to fill a gap


class Spool:
    """One unlinked file, cut into regions of equal size; a fresh region reads as zeros."""

    def __init__(self, directory: Path, region_bytes: int) -> None:
        self.region_bytes = align_up(region_bytes)
        self._fd, name = tempfile.mkstemp(prefix="import-", dir=directory)
        Path(name).unlink()
        self._reached: list[int] = []  # per region: up to where bytes were ever written
        self._free: list[int] = []

    def take(self) -> int:
        """Return the number of a region that is nobody's."""
        if self._free:
            return self._free.pop()
        self._reached.append(0)
        return len(self._reached) - 1

    def give_back(self, region: int) -> None:
        """Let another file have *region*."""
        self._free.append(region)

    def write(self, region: int, offset: int, data: bytes | memoryview, size: int) -> None:
        """Write *data*, and zeros between *size*, the file's end so far, and *offset*."""
        start = region * self.region_bytes
        at, stale = size, min(offset, self._reached[region])
        while at < stale:
            zeros = bytes(min(ZERO_BYTES, stale - at))
            at += self._all(zeros, start + at)
        self._all(data, start + offset)
        self._reached[region] = max(self._reached[region], offset + len(data))

    def _all(self, data: bytes | memoryview, at: int) -> int:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], at + done)
        return done

    def read(self, region: int, offset: int, size: int) -> bytes:
        """Return *size* bytes of *region*; what was never written is zeros."""
        found = os.pread(self._fd, size, region * self.region_bytes + offset)
        return found.ljust(size, b"\0")

    def close(self) -> None:
        """Let go of the disk space."""
        os.close(self._fd)

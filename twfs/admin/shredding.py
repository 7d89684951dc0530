"""Erasing extents: of purged blocks, before they are free, and of what is free.

The first 4 KiB of each, where a header may be, are overwritten in any case; the rest is discarded,
or overwritten where that was asked for or the device takes no discards. Then the device is flushed.
"""

import mmap
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

from twfs.core.state import Core
from twfs.devices.device import Device
from twfs.errors import DeviceError, WarehouseClosed
from twfs.metadata.tables import TO_OVERWRITE, WriteView
from twfs.records import Extent
from twfs.units import ALIGN, ByteCount, ByteOffset, DeviceIndex

BATCH_EXTENTS: Final = 256  # of a flush and a transaction
PIECE_BYTES: Final = 256 << 20  # of free space, taken out of the allocator at a time
PIECE_PARTS: Final = 64  # of all space, the same
ZEROS_BYTES: Final = 1 << 20
CLOSES: Final = "the warehouse closes: the next start erases the rest"


@dataclass(slots=True)
class Erased:
    """Bytes by what was done to them."""

    discarded: int = 0
    overwritten: int = 0


class Doomed:
    """What waits to be erased in one warehouse. One caller at a time, but for `why` and `tried`."""

    def __init__(self, core: Core, stop: threading.Event) -> None:
        self._core = core
        self._stop = stop
        self._zeros = memoryview(mmap.mmap(-1, ZEROS_BYTES))
        self._failed: dict[int, str] = {}
        self._erased = Erased()
        self.tried: set[Extent] = set()

    def take_erased(self) -> Erased:
        """What was erased since this was asked last."""
        found, self._erased = self._erased, Erased()
        return found

    def why(self, device: int) -> str:
        """Why what is on *device* could not be erased."""
        standing = self._core.standings.all.get(DeviceIndex(device))
        if standing is None:
            return "the device has been removed"
        return standing.offline or standing.read_only or self._failed.get(device, "")

    def erase(self) -> None:
        """Erase all that nobody reads any more, and make it free; what fails stays. Blocks.

        WarehouseClosed when asked to stop.
        """
        core = self._core
        with core.lock:
            for extent in [e for e in core.doomed if e.device not in core.standings.all]:
                del core.doomed[extent]
            ready = dict(core.doomed)
        if not ready:
            return
        self.tried = set(ready)
        core.metadata.settle()  # no power cut brings back a block whose bytes are gone
        on: dict[int, list[Extent]] = defaultdict(list)
        for extent in ready:
            on[extent.device].append(extent)
        for index, extents in on.items():
            device = core.devices.get(index)
            if device is None or core.standings.all[DeviceIndex(index)].read_only:
                continue
            try:
                for start in range(0, len(extents), BATCH_EXTENTS):
                    batch = extents[start : start + BATCH_EXTENTS]
                    if self._stop.is_set():
                        raise WarehouseClosed(
                            "the warehouse closes: the next start erases the rest"
                        )
                    for extent in batch:
                        done = self._erase_one(device, extent, ready[extent] == TO_OVERWRITE)
                        self._erased.discarded += done.discarded
                        self._erased.overwritten += done.overwritten
                    core.flushers[index].flush()
                    self._free(batch)
            except (DeviceError, KeyError) as error:  # or it has just been removed
                self._failed[index] = str(error)

    def _free(self, extents: list[Extent]) -> None:
        """Let erased extents be used again."""
        core = self._core

        def job(view: WriteView) -> list[Extent]:
            mine = [extent for extent in extents if view.in_limbo(extent)]
            for extent in mine:
                view.drop_limbo(extent)
                view.add_free(extent)
            return mine

        def settled(freed: list[Extent]) -> None:
            with core.lock:
                for extent in extents:
                    core.doomed.pop(extent, None)
                core.allocator.release(freed)
                core.counters.erased_blocks += len(freed)

        core.metadata.submit(job, settled=settled).result()

    def _erase_one(self, device: Device, extent: Extent, overwrite: bool) -> Erased:  # noqa: FBT001
        """Erase one extent; what was done with it. DeviceError."""
        if overwrite:
            self._overwrite(device, extent.offset, extent.length)
            return Erased(overwritten=extent.length)
        device.write_from([self._zeros[:ALIGN]], extent.offset)
        rest = extent.length - ALIGN
        start = ByteOffset(extent.offset + ALIGN)
        if not rest or device.clear(start, ByteCount(rest)):
            return Erased(discarded=extent.length)
        self._overwrite(device, start, rest)
        return Erased(overwritten=extent.length)

    def _overwrite(self, device: Device, offset: int, length: int) -> None:
        """Write zeros. DeviceError."""
        for at in range(0, length, ZEROS_BYTES):
            part = self._zeros[: min(ZEROS_BYTES, length - at)]
            device.write_from([part], ByteOffset(offset + at))

    def erase_free(self, overwrite: bool) -> tuple[Erased, int, list[str]]:  # noqa: FBT001
        """Erase what is free on every device; what was done, bytes left, and why these were."""
        done, left, notes = Erased(), 0, []
        for index, standing in sorted(self._core.standings.all.items()):
            device = standing.device
            why = standing.offline or standing.read_only
            if device is not None and not why:
                try:
                    if self._erase_free_of(device, standing.index, overwrite, done):
                        continue
                    why = "it takes no discards: overwrite what is free (--overwrite)"
                except DeviceError as error:
                    why = str(error)
            with self._core.lock:
                bytes_left = int(self._core.allocator.free_bytes_of(standing.index))
            left += bytes_left
            if bytes_left:
                notes.append(f"the free space of device {index} was not erased: {why}")
        return done, left, notes

    def _erase_free_of(
        self, device: Device, index: DeviceIndex, overwrite: bool, done: Erased  # noqa: FBT001
    ) -> bool:  # fmt: skip
        """Erase what is free on one device; False if it takes no discards. DeviceError."""
        core, at = self._core, 0
        most = max(min(PIECE_BYTES, core.allocator.total_bytes // PIECE_PARTS), ALIGN)
        most -= most % ALIGN
        while True:
            if self._stop.is_set():
                raise WarehouseClosed(CLOSES)
            with core.lock:
                piece = core.allocator.free_from(index, at, most)
                if piece is None:
                    break
                core.allocator.take([piece])
            try:
                if overwrite:
                    self._overwrite(device, piece.offset, piece.length)
                    done.overwritten += piece.length
                elif device.clear(piece.offset, piece.length):
                    done.discarded += piece.length
                else:
                    return False
                core.flushers[index].flush()
            finally:
                with core.lock:
                    if index in core.standings.all:
                        core.allocator.release([piece])
            at = piece.offset + piece.length
        return True

"""The allocator: which runs of each device's data area are free, in memory.

It does no I/O and knows nothing of blocks: the metadata keeps the committed truth, and the
warehouse loads it from there at open. Not thread-safe: the warehouse's lock guards it.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sortedcontainers import SortedDict, SortedList  # type: ignore[import-untyped]

from twfs.errors import CorruptMetadata
from twfs.records import Extent
from twfs.units import ALIGN, EXTENTS_MAX, ByteCount, ByteOffset, DeviceIndex, is_aligned

FIRST_EXTENT_MIN: Final = 2 * ALIGN  # a block's header and the first 4 KiB of its payload


@dataclass(frozen=True, slots=True)
class AllocatorStatistics:
    """What the allocator holds now, and what it did since it was made."""

    total_bytes: ByteCount
    free_bytes: ByteCount
    runs: int
    largest_run_bytes: ByteCount
    reservations: int  # calls of reserve
    short_reservations: int  # of these, calls that gave fewer blocks than asked
    blocks: int  # reserved
    split_blocks: int  # reserved in more than one extent


class _FreeRuns:
    """The free runs of one device in two orders; neighbours are always merged."""

    __slots__ = ("area", "by_length", "by_offset", "free_bytes", "index")

    def __init__(
        self, index: DeviceIndex, area: tuple[ByteOffset, ByteCount], free: Iterable[Extent]
    ) -> None:
        self.index = index
        self.area = area
        merged: list[list[int]] = []
        end_of_area = area[0] + area[1]
        for extent in sorted(free, key=lambda extent: extent.offset):
            aligned = is_aligned(extent.offset) and is_aligned(extent.length) and extent.length > 0
            end = extent.offset + extent.length
            if not aligned or extent.offset < area[0] or end > end_of_area:
                raise CorruptMetadata(
                    f"free run {extent} is not inside the data area of device {index} "
                    f"({area[0]} to {end_of_area}): run `twfs check`"
                )
            if merged and extent.offset < sum(merged[-1]):
                raise CorruptMetadata(
                    f"free run {extent} overlaps the one at {merged[-1][0]}: run `twfs check`"
                )
            if merged and extent.offset == sum(merged[-1]):
                merged[-1][1] += extent.length
            else:
                merged.append([extent.offset, extent.length])
        self.by_offset: Any = SortedDict(merged)  # offset -> length
        self.by_length: Any = SortedList((length, offset) for offset, length in merged)
        self.free_bytes = sum(length for _, length in merged)

    def largest(self) -> int:
        """Length of the largest run, 0 if there is none."""
        return int(self.by_length[-1][0]) if self.by_length else 0

    def best_fit(self, wanted: int, at_least: int) -> tuple[int, int] | None:
        """Offset and length of the smallest run of *wanted* bytes, else the largest of *at_least*.

        None if even that is not there.
        """
        place = self.by_length.bisect_left((wanted, 0))
        if place == len(self.by_length):
            if self.largest() < at_least:
                return None
            place = -1
        length, offset = self.by_length[place]
        return offset, length

    def remove(self, offset: int) -> int:
        """Take the whole run at *offset* out; returns its length."""
        length = int(self.by_offset.pop(offset))
        self.by_length.remove((length, offset))
        self.free_bytes -= length
        return length

    def _insert(self, offset: int, length: int) -> None:
        self.by_offset[offset] = length
        self.by_length.add((length, offset))
        self.free_bytes += length

    def add(self, offset: int, length: int) -> None:
        """Put a run back, merged with its neighbours; AssertionError if any of it is free."""
        assert is_aligned(offset), f"offset {offset} is not aligned"
        assert length > 0, f"a run of {length} bytes"
        assert is_aligned(length), f"length {length} is not aligned"
        assert self.area[0] <= offset, f"{offset} is before the data area"
        assert offset + length <= self.area[0] + self.area[1], f"{offset}+{length} is behind it"
        place = self.by_offset.bisect_left(offset)
        starts = self.by_offset.keys()
        after = starts[place] if place < len(starts) else None
        before = starts[place - 1] if place else None
        end = offset + length
        assert after is None or end <= after, f"{self.index}:{offset}+{length} is free already"
        if before is not None:
            before_end = before + self.by_offset[before]
            assert before_end <= offset, f"{self.index}:{offset}+{length} is free already"
            if before_end == offset:
                self.remove(before)
                offset = before
        if after == end:
            end += self.remove(after)
        self._insert(offset, end - offset)

    def cut(self, offset: int, length: int) -> None:
        """Take exactly this range out of the free run around it; AssertionError if used."""
        place = self.by_offset.bisect_right(offset)
        start = self.by_offset.keys()[place - 1] if place else None
        assert start is not None, f"{self.index}:{offset}+{length} is not free"
        end = start + self.by_offset[start]
        assert offset + length <= end, f"{self.index}:{offset}+{length} is not free"
        self.remove(start)
        if start < offset:
            self._insert(start, offset - start)
        if offset + length < end:
            self._insert(offset + length, end - offset - length)


class _Dealing:
    """One call of reserve: deals blocks over the devices, each into a run opened for its lot.

    The run open on a device is out of the free map; what is left of it goes back when another is
    opened, before a split, and at the end.
    """

    __slots__ = ("_devices", "_lots", "_open", "_turn")

    def __init__(self, devices: Sequence[_FreeRuns], turn: int, lengths: Sequence[int]) -> None:
        self._devices = devices
        self._turn = turn
        self._open: dict[int, list[int]] = {}  # place of the device -> [offset, bytes left]
        self._lots = self._planned_lots(lengths)

    def _planned_lots(self, lengths: Sequence[int]) -> list[int]:
        """Bytes that each device is going to get, if fragmentation does not forbid it."""
        lots = [0] * len(self._devices)
        turn = self._turn
        for length in lengths:
            for step in range(len(lots)):
                place = (turn + step) % len(lots)
                if lots[place] + length <= self._devices[place].free_bytes:
                    lots[place] += length
                    turn = place + 1
                    break
            else:
                break
        return lots

    def place(self, length: int) -> tuple[Extent, ...]:
        """Return the extents of the next block; none if it does not fit."""
        count = len(self._devices)
        for step in range(count):
            place = (self._turn + step) % count
            extent = self._from_device(place, length)
            if extent is not None:
                self._turn = (place + 1) % count
                return (extent,)
        return self._split(length)

    def _from_device(self, place: int, length: int) -> Extent | None:
        """One extent next to the last one of the same device, or in a newly opened run."""
        device, run = self._devices[place], self._open.get(place)
        if run is None or run[1] < length:
            fit = device.best_fit(max(self._lots[place], length), length)
            if fit is None:
                return None
            self._close(place)
            run = self._open[place] = list(fit)
            device.remove(fit[0])
        extent = Extent(device.index, ByteOffset(run[0]), ByteCount(length))
        run[0] += length
        run[1] -= length
        self._lots[place] = max(self._lots[place] - length, 0)
        return extent

    def _split(self, length: int) -> tuple[Extent, ...]:
        """Up to EXTENTS_MAX of the largest runs of all devices; none if they do not hold it."""
        self.close()
        largest = heapq.nlargest(
            EXTENTS_MAX,
            (
                (run_length, -place, offset)
                for place, device in enumerate(self._devices)
                for run_length, offset in device.by_length[-EXTENTS_MAX:]
            ),
        )
        if not largest or sum(run[0] for run in largest) < length:
            return ()
        if largest[0][0] < FIRST_EXTENT_MIN:
            return ()
        extents, missing = [], length
        for run_length, negative_place, offset in largest:
            device, taken = self._devices[-negative_place], min(run_length, missing)
            device.cut(offset, taken)
            extents.append(Extent(device.index, ByteOffset(offset), ByteCount(taken)))
            missing -= taken
            if not missing:
                break
        return tuple(extents)

    def _close(self, place: int) -> None:
        """Give what is left of the run open on a device back."""
        offset, left = self._open.pop(place, (0, 0))
        if left:
            self._devices[place].add(offset, left)

    def close(self) -> int:
        """Give back what is left of all open runs; returns whose turn is next."""
        for place in list(self._open):
            self._close(place)
        return self._turn


class Allocator:
    """The free runs of all devices. See the module's docstring for its threading rule."""

    def __init__(
        self,
        data_areas: Mapping[DeviceIndex, tuple[ByteOffset, ByteCount]],
        free: Iterable[Extent],
    ) -> None:
        """Load the *free* runs of the *data_areas* (offset and length by device).

        CorruptMetadata if they overlap each other or leave their data area.
        """
        runs: dict[DeviceIndex, list[Extent]] = {index: [] for index in sorted(data_areas)}
        for extent in free:
            if extent.device not in runs:
                raise CorruptMetadata(
                    f"free run {extent} is on a device that the warehouse does not have"
                )
            runs[extent.device].append(extent)
        self._devices = {
            index: _FreeRuns(index, data_areas[index], extents) for index, extents in runs.items()
        }
        self._order = list(self._devices.values())  # those that blocks are allotted on
        self._turn = 0
        self._reservations = self._short_reservations = self._blocks = self._split_blocks = 0

    def reserve(self, lengths: Sequence[ByteCount]) -> list[tuple[Extent, ...]]:
        """Take one tuple of extents per block of *lengths* bytes, for the leading part that fits.

        Blocks go to the devices in turn, and lie next to each other on each device in their order.
        A block that fits no single run is split over at most EXTENTS_MAX. The result ends before
        the first block that what is left cannot hold, so it may be empty.
        """
        for length in lengths:
            assert is_aligned(length), f"length {length} is not aligned"
            assert length >= FIRST_EXTENT_MIN, f"a block of {length} bytes has no payload"
        if not self._order:
            self._reservations += 1
            self._short_reservations += bool(lengths)
            return []
        dealing = _Dealing(self._order, self._turn % len(self._order), lengths)
        blocks: list[tuple[Extent, ...]] = []
        for length in lengths:
            extents = dealing.place(length)
            if not extents:
                break
            blocks.append(extents)
            self._split_blocks += len(extents) > 1
        self._turn = dealing.close()
        self._reservations += 1
        self._short_reservations += len(blocks) < len(lengths)
        self._blocks += len(blocks)
        return blocks

    def allot_on(self, devices: Iterable[DeviceIndex]) -> None:
        """Reserve on *devices* alone from now on; free runs of the others stay known."""
        wanted = set(devices)
        self._order = [of for index, of in sorted(self._devices.items()) if index in wanted]

    def add_device(self, device: DeviceIndex, area: tuple[ByteOffset, ByteCount]) -> None:
        """Let the allocator know an empty *device*; allot_on says when it is reserved on."""
        assert device not in self._devices, device
        free = Extent(device, area[0], area[1])
        self._devices[device] = _FreeRuns(device, area, [free])

    def remove_device(self, device: DeviceIndex) -> None:
        """Forget a *device* and its free runs."""
        self._order = [of for of in self._order if of.index != device]
        del self._devices[device]

    def release(self, extents: Iterable[Extent]) -> None:
        """Make *extents* free again, merged with their neighbours.

        AssertionError if any byte of them is free already or outside the data areas.
        """
        for extent in extents:
            self._devices[extent.device].add(extent.offset, extent.length)

    def take(self, extents: Iterable[Extent]) -> None:
        """Mark exactly these *extents* as used; AssertionError if any byte of them is not free."""
        for extent in extents:
            assert is_aligned(extent.offset), f"{extent} is not aligned"
            assert is_aligned(extent.length), f"{extent} is not aligned"
            self._devices[extent.device].cut(extent.offset, extent.length)

    @property
    def free_bytes(self) -> ByteCount:
        """Free bytes of the devices that blocks are allotted on."""
        return ByteCount(sum(device.free_bytes for device in self._order))

    @property
    def total_bytes(self) -> ByteCount:
        """Bytes of all data areas, free or not."""
        return ByteCount(sum(device.area[1] for device in self._devices.values()))

    @property
    def allotted_bytes(self) -> ByteCount:
        """Bytes of the data areas that blocks are allotted on, free or not."""
        return ByteCount(sum(device.area[1] for device in self._order))

    def free_bytes_of(self, device: DeviceIndex) -> ByteCount:
        """Free bytes of one *device*."""
        return ByteCount(self._devices[device].free_bytes)

    def runs(self) -> Iterator[Extent]:
        """All free runs by device and offset; the allocator must not change meanwhile."""
        for _, device in sorted(self._devices.items()):
            for offset, length in device.by_offset.items():
                yield Extent(device.index, ByteOffset(offset), ByteCount(length))

    def free_from(
        self, device: DeviceIndex, offset: int, length_max: int
    ) -> Extent | None:  # fmt: skip
        """The first free run of *device* from *offset* on, cut to *length_max*; None: no more."""
        if device not in self._devices:
            return None
        runs = self._devices[device].by_offset
        place = max(runs.bisect_right(offset) - 1, 0)
        for start in runs.keys()[place : place + 2]:
            at, end = max(start, offset), start + runs[start]
            if at < end:
                return Extent(device, ByteOffset(at), ByteCount(min(end - at, length_max)))
        return None

    def largest_run(self) -> ByteCount:
        """Length of the largest free run that may be allotted, 0 if nothing is free."""
        return ByteCount(max((device.largest() for device in self._order), default=0))

    def statistics(self) -> AllocatorStatistics:
        """What is free, in how many runs, and how reservations went so far."""
        return AllocatorStatistics(
            total_bytes=self.total_bytes,
            free_bytes=self.free_bytes,
            runs=sum(len(device.by_offset) for device in self._devices.values()),
            largest_run_bytes=self.largest_run(),
            reservations=self._reservations,
            short_reservations=self._short_reservations,
            blocks=self._blocks,
            split_blocks=self._split_blocks,
        )

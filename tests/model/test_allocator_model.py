"""The allocator against a bitmap per device: nothing overlaps, nothing is lost, runs are merged.

Random reservations, releases and takes over one to three small devices. A put that is cut short is
proved to have been cut where the bitmap, too, has no room.
"""

from itertools import groupby

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from twfs.devices.extents import FIRST_EXTENT_MIN, Allocator
from twfs.records import Extent
from twfs.units import ALIGN, EXTENTS_MAX, ByteCount, ByteOffset, DeviceIndex

START = 1 << 20


class AllocatorMachine(RuleBasedStateMachine):
    """Drives an Allocator and a bitmap of 4 KiB units side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.bitmaps: list[list[bool]] = []  # per device; True = free
        self.held: list[tuple[Extent, ...]] = []
        self.allocator = Allocator({}, [])

    @initialize(units=st.lists(st.integers(1, 60), min_size=1, max_size=3), data=st.data())
    def load(self, units: list[int], data: st.DataObject) -> None:
        """Start with random runs free, as after a long life."""
        self.bitmaps = [
            data.draw(st.lists(st.booleans(), min_size=count, max_size=count)) for count in units
        ]
        free = [run for run in self.free_runs() for run in halves(run)]
        self.allocator = Allocator(
            {
                DeviceIndex(index): (ByteOffset(START), ByteCount(count * ALIGN))
                for index, count in enumerate(units)
            },
            data.draw(st.permutations(free)),
        )

    def free_runs(self) -> list[Extent]:
        """What the bitmaps say is free, merged, in order."""
        runs = []
        for index, bitmap in enumerate(self.bitmaps):
            at = 0
            for is_free, run in groupby(bitmap):
                count = len(list(run))
                if is_free:
                    runs.append(extent(index, at, count))
                at += count
        return runs

    def mark(self, extents: tuple[Extent, ...], *, free: bool) -> None:
        """Change the bitmaps; every unit must be in the other state before."""
        for part in extents:
            first = (part.offset - START) // ALIGN
            for unit in range(first, first + part.length // ALIGN):
                assert self.bitmaps[part.device][unit] is not free
                self.bitmaps[part.device][unit] = free

    @rule(units=st.lists(st.integers(2, 30), max_size=8))
    def reserve(self, units: list[int]) -> None:
        lengths = [ByteCount(count * ALIGN) for count in units]
        found = self.allocator.reserve(lengths)
        assert len(found) <= len(lengths)
        for length, extents in zip(lengths, found, strict=False):
            assert 1 <= len(extents) <= EXTENTS_MAX
            assert sum(part.length for part in extents) == length
            assert extents[0].length >= FIRST_EXTENT_MIN
            self.mark(extents, free=False)
        self.held += found
        if len(found) < len(lengths):
            largest = sorted((run.length for run in self.free_runs()), reverse=True)
            fits = sum(largest[:EXTENTS_MAX]) >= lengths[len(found)]
            assert not fits or largest[0] < FIRST_EXTENT_MIN

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        extents = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.allocator.release(extents)
        self.mark(extents, free=True)

    @precondition(lambda self: self.free_runs())
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.free_runs()))
        units = run.length // ALIGN
        first = data.draw(st.integers(0, units - 1))
        count = data.draw(st.integers(1, units - first))
        taken = (extent(run.device, (run.offset - START) // ALIGN + first, count),)
        self.allocator.take(taken)
        self.mark(taken, free=False)
        self.held.append(taken)

    @invariant()
    def agrees_with_the_bitmaps(self) -> None:
        runs = self.free_runs()
        assert list(self.allocator.runs()) == runs
        assert self.allocator.free_bytes == sum(run.length for run in runs)
        assert self.allocator.largest_run() == max((run.length for run in runs), default=0)
        for index in range(len(self.bitmaps)):
            assert self.allocator.free_bytes_of(DeviceIndex(index)) == sum(
                run.length for run in runs if run.device == index
            )
        for device in self.allocator._order:  # the two orders hold the same runs
            assert sorted((length, at) for at, length in device.by_offset.items()) == list(
                device.by_length
            )


def extent(device: int, unit: int, units: int) -> Extent:
    return Extent(DeviceIndex(device), ByteOffset(START + unit * ALIGN), ByteCount(units * ALIGN))


def halves(run: Extent) -> list[Extent]:
    """*run* in two parts, to be merged again at load."""
    half = run.length // ALIGN // 2 * ALIGN
    parts = [
        Extent(run.device, run.offset, ByteCount(half)),
        Extent(run.device, ByteOffset(run.offset + half), ByteCount(run.length - half)),
    ]
    return [part for part in parts if part.length]


AllocatorMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
TestAllocator = AllocatorMachine.TestCase

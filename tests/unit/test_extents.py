"""The allocator gives the longest leading part, deals over devices, keeps a put's blocks together.

Also guaranteed: freed runs merge, a double free or foreign range is caught at once, and a state
that contradicts itself is refused at load. The model test compares it with a bitmap.
"""

import pytest

from twfs.devices.extents import Allocator
from twfs.errors import CorruptMetadata
from twfs.records import Extent
from twfs.units import ALIGN, EXTENTS_MAX, ByteCount, ByteOffset, DeviceIndex

START = 1 << 20


def extent(device: int, offset: int, units: int) -> Extent:
    """*units* of 4 KiB, *offset* units into the data area."""
    return Extent(DeviceIndex(device), ByteOffset(START + offset * ALIGN), ByteCount(units * ALIGN))


def allocator(*free: Extent, devices: int = 1, units: int = 1000) -> Allocator:
    area = (ByteOffset(START), ByteCount(units * ALIGN))
    return Allocator({DeviceIndex(index): area for index in range(devices)}, free)


def whole(devices: int, units: int = 1000) -> Allocator:
    return allocator(
        *(extent(index, 0, units) for index in range(devices)), devices=devices, units=units
    )


def blocks(*units: int) -> list[ByteCount]:
    return [ByteCount(count * ALIGN) for count in units]


def test_blocks_of_one_put_lie_next_to_each_other_in_chain_order() -> None:
    assert whole(1).reserve(blocks(2, 3, 4)) == [
        (extent(0, 0, 2),),
        (extent(0, 2, 3),),
        (extent(0, 5, 4),),
    ]


def test_blocks_are_dealt_over_devices_and_contiguous_on_each() -> None:
    assert whole(3).reserve(blocks(2, 3, 4, 5, 6)) == [
        (extent(0, 0, 2),),
        (extent(1, 0, 3),),
        (extent(2, 0, 4),),
        (extent(0, 2, 5),),
        (extent(1, 3, 6),),
    ]


def test_next_call_goes_on_with_the_next_device() -> None:
    free = whole(3)
    devices = [free.reserve(blocks(2))[0][0].device for _ in range(6)]
    assert devices == [0, 1, 2, 0, 1, 2]


def test_full_device_is_passed_over() -> None:
    free = allocator(extent(0, 0, 100), extent(2, 0, 100), devices=3)
    assert [found[0].device for found in free.reserve(blocks(2, 2, 2, 2))] == [0, 2, 0, 2]


def test_smallest_run_that_holds_the_whole_lot_is_taken() -> None:
    free = allocator(extent(0, 0, 50), extent(0, 100, 9), extent(0, 200, 8), extent(0, 300, 7))
    assert free.reserve(blocks(4, 4)) == [(extent(0, 200, 4),), (extent(0, 204, 4),)]


def test_without_such_a_run_the_largest_are_filled_in_turn() -> None:
    free = allocator(extent(0, 0, 10), extent(0, 100, 13), extent(0, 200, 4))
    assert free.reserve(blocks(4, 4, 4, 4, 4)) == [
        (extent(0, 100, 4),),
        (extent(0, 104, 4),),
        (extent(0, 108, 4),),
        (extent(0, 0, 4),),
        (extent(0, 4, 4),),
    ]
    assert list(free.runs()) == [extent(0, 8, 2), extent(0, 112, 1), extent(0, 200, 4)]


def test_block_that_fits_no_run_is_split_over_the_largest_of_all_devices() -> None:
    free = allocator(extent(0, 0, 3), extent(0, 10, 5), extent(1, 0, 4), devices=2)
    (extents,) = free.reserve(blocks(10))
    assert extents == (extent(0, 10, 5), extent(1, 0, 4), extent(0, 0, 1))
    assert list(free.runs()) == [extent(0, 1, 2)]
    assert free.statistics().split_blocks == 1


def test_split_uses_no_more_extents_than_a_header_holds() -> None:
    runs = [extent(0, 10 * place, 2) for place in range(EXTENTS_MAX + 1)]
    assert allocator(*runs).reserve(blocks(2 * EXTENTS_MAX + 1)) == []
    (extents,) = allocator(*runs).reserve(blocks(2 * EXTENTS_MAX))
    assert len(extents) == EXTENTS_MAX


def test_first_extent_always_has_room_for_header_and_payload() -> None:
    single = [extent(0, 2 * place, 1) for place in range(8)]
    assert allocator(*single).reserve(blocks(2)) == []
    (extents,) = allocator(*single, extent(0, 20, 2)).reserve(blocks(4))
    assert extents[0] == extent(0, 20, 2)


def test_result_is_the_longest_leading_part_that_fits() -> None:
    free = allocator(extent(0, 0, 10))
    assert len(free.reserve(blocks(4, 4, 4, 2))) == 2
    assert free.free_bytes == 2 * ALIGN
    assert free.statistics().short_reservations == 1
    assert free.reserve(blocks(4)) == []
    assert len(free.reserve(blocks(2, 2))) == 1
    assert free.reserve(blocks(2)) == []


def test_split_block_may_use_what_the_put_had_opened_but_not_filled() -> None:
    free = allocator(extent(0, 0, 10), extent(0, 20, 7))
    found = free.reserve(blocks(6, 6, 5))
    assert len(found) == 3
    assert sum(part.length for part in found[2]) == 5 * ALIGN
    assert free.free_bytes == 0


def test_freed_runs_merge_with_both_neighbours() -> None:
    free = whole(1, 30)
    first, second, third = (found[0] for found in free.reserve(blocks(10, 10, 10)))
    free.release([first])
    free.release([third])
    assert list(free.runs()) == [first, third]
    free.release([second])
    assert list(free.runs()) == [extent(0, 0, 30)]
    assert free.largest_run() == free.free_bytes == free.total_bytes == 30 * ALIGN


def test_neighbouring_runs_are_merged_at_load() -> None:
    free = allocator(extent(0, 10, 5), extent(0, 0, 10), extent(0, 20, 1))
    assert list(free.runs()) == [extent(0, 0, 15), extent(0, 20, 1)]


@pytest.mark.parametrize(("offset", "units"), [(0, 10), (5, 1), (9, 2), (12, 10), (19, 2), (0, 40)])
def test_double_free_is_caught(offset: int, units: int) -> None:
    free = allocator(extent(0, 0, 10), extent(0, 20, 10))
    with pytest.raises(AssertionError, match="free already"):
        free.release([extent(0, offset, units)])


@pytest.mark.parametrize(
    ("offset", "length"),
    [(START - ALIGN, ALIGN), (START + 1000 * ALIGN, ALIGN), (START + 1, ALIGN), (START, 5)],
)
def test_range_outside_the_data_area_or_misaligned_is_never_freed(offset: int, length: int) -> None:
    with pytest.raises(AssertionError):
        allocator().release([Extent(DeviceIndex(0), ByteOffset(offset), ByteCount(length))])


def test_taken_extents_are_out_of_the_free_runs() -> None:
    free = allocator(extent(0, 0, 30))
    free.take([extent(0, 10, 5), extent(0, 0, 2), extent(0, 29, 1)])
    assert list(free.runs()) == [extent(0, 2, 8), extent(0, 15, 14)]
    for used in (extent(0, 9, 2), extent(0, 10, 1), extent(0, 28, 2), extent(0, 500, 1)):
        with pytest.raises(AssertionError, match="not free"):
            free.take([used])


@pytest.mark.parametrize(
    "bad",
    [
        [extent(0, 0, 10), extent(0, 9, 3)],
        [extent(0, 0, 10), extent(0, 0, 10)],
        [extent(0, 995, 6)],
        [extent(0, -1, 2)],
        [extent(1, 0, 1)],
        [extent(0, 0, 0)],
        [Extent(DeviceIndex(0), ByteOffset(START + 100), ByteCount(ALIGN))],
    ],
)
def test_contradictory_state_is_refused_at_load(bad: list[Extent]) -> None:
    with pytest.raises(CorruptMetadata, match="free run"):
        allocator(*bad)


def test_impossible_blocks_are_bugs_of_the_caller() -> None:
    for length in (0, ALIGN, 2 * ALIGN + 1):
        with pytest.raises(AssertionError):
            whole(1).reserve([ByteCount(length)])


def test_warehouse_without_free_space_reserves_nothing() -> None:
    free = allocator()
    assert free.reserve(blocks(2)) == []
    assert free.reserve([]) == []
    assert (free.free_bytes, free.largest_run(), list(free.runs())) == (0, 0, [])


def test_figures_agree_with_the_runs() -> None:
    free = allocator(extent(0, 0, 10), extent(1, 5, 20), extent(1, 50, 1), devices=2)
    counts = free.statistics()
    assert (counts.runs, counts.largest_run_bytes) == (3, 20 * ALIGN)
    assert counts.free_bytes == free.free_bytes == 31 * ALIGN
    assert free.free_bytes_of(DeviceIndex(1)) == 21 * ALIGN
    assert counts.total_bytes == 2000 * ALIGN

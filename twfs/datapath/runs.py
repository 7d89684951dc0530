"""Blocks that wait in an arena, joined to the writes that they need: neighbours go in one.

Pure functions; any thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from twfs.errors import InvalidInput
from twfs.layout import Layout
from twfs.records import Block, Extent
from twfs.store import ArenaBlock
from twfs.units import ALIGN, IO_BYTES_MAX, ByteOffset, DeviceIndex, align_up

IOVECS_MAX: Final = 1000  # below the kernel's IOV_MAX of 1024


@dataclass(slots=True)
class Run:
    """Neighbours on one device that go in one write; *indices* into the blocks given."""

    device: DeviceIndex
    offset: ByteOffset
    end: int
    buffers: list[memoryview]
    indices: list[int]


def plan_runs(
    reserved: Mapping[int, Block], arena: memoryview, headers: memoryview,
    blocks: Sequence[ArenaBlock],
) -> list[Run]:  # fmt: skip
    """Cut *blocks* at the extents that are *reserved* for them, and join what are neighbours.

    Pads the payloads in *arena* with zeros. *headers* has 4 KiB for each of *blocks*, in order.
    """
    parts: list[tuple[Extent, list[memoryview], int]] = []
    for number, block in enumerate(blocks):
        padded = align_up(block.payload_bytes)
        start = block.arena_offset
        arena[start + block.payload_bytes : start + padded] = bytes(padded - block.payload_bytes)
        header = headers[number * ALIGN : (number + 1) * ALIGN]
        at = start - ALIGN  # where the header would lie, were it in the arena
        for extent in reserved[block.index].extents:
            stop = at + extent.length
            buffers = [arena[max(at, start) : stop]]
            if at < start:
                buffers.insert(0, header)
            parts.append((extent, buffers, number))
            at = stop
    runs: list[Run] = []
    for extent, buffers, number in sorted(parts, key=lambda part: (part[0].device, part[0].offset)):
        run = runs[-1] if runs else None
        if (
            run is None
            or (run.device, run.end) != (extent.device, extent.offset)
            or run.end - run.offset + extent.length > IO_BYTES_MAX
            or len(run.buffers) + 2 > IOVECS_MAX
        ):
            run = Run(extent.device, extent.offset, extent.offset, [], [])
            runs.append(run)
        run.buffers += buffers
        run.indices.append(number)
        run.end += extent.length
    return runs


def check_lengths(layout: Layout, group: int, lengths: Sequence[int], count: int) -> None:
    """Raise InvalidInput unless *lengths* are given for *count* blocks, where any are allowed."""
    if layout.any_length(group) != bool(lengths) or len(lengths) not in {0, count}:
        raise InvalidInput(f"{len(lengths)} lengths for {count} blocks of {layout.model}")
    if not all(layout.fits(group, length) for length in lengths):
        most = layout.block_bytes(group)
        raise InvalidInput(f"a block of {layout.model} has 1 to {most} bytes")

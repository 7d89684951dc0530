"""Moving blocks off a device while they are read: copy, verify, flush, then one transaction.

A reader never notices. Whoever leased a block reads its old place, which stays as it is until all
leases of that moment have ended; whoever matches it after the transaction gets the new one. The
order is that of a put: bytes and header are durable before the record leads to them (invariant
I17), generations are new (I20, I21), and the old place is free only once that is durable (I19).
All of it blocks.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

import numpy as np

from twfs.core.state import Core
from twfs.devices.payload import read_whole, verified
from twfs.errors import BadPayload, DeviceError, WarehouseFull
from twfs.eviction.evicting import spoil, submit_eviction
from twfs.index import slots as states
from twfs.metadata import ledger
from twfs.records import BLOCK_DTYPE, Block, BlockKey, Extent, Header
from twfs.units import ALIGN, ByteCount, ByteOffset, DeviceIndex, Generation

SCANNED_AT_ONCE: Final = 4096  # records: about 10 ms of one snapshot
BATCH_BLOCKS_MAX: Final = 64  # share a flush and a transaction
BATCH_BYTES_MAX: Final = 64 << 20
ROOM_TRIES: Final = 4  # evict and try again

Pair = tuple[BlockKey, Block]


@dataclass(slots=True)
class Copy:
    """A block on its way to *extents*."""

    key: BlockKey
    block: Block
    extents: tuple[Extent, ...]
    generation: Generation
    good: bool = False  # copied and flushed
    write: "Future[None] | None" = None  # one that hangs


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of one batch."""

    blocks: int = 0
    moved_bytes: int = 0
    lost: int = 0  # holes now: they could not be read, or did not verify


def blocks_on(core: Core, device: DeviceIndex) -> Iterator[Pair]:
    """Yield every block that has an extent on *device*, hole or not live included, by key."""
    size = BLOCK_DTYPE.itemsize
    behind = b""
    while True:
        with core.metadata.read() as view:
            pairs = list(islice(view.blocks_after(behind), SCANNED_AT_ONCE))
        if not pairs:
            return
        behind = pairs[-1][0]
        rows = np.frombuffer(b"".join(value[:size] for _, value in pairs), BLOCK_DTYPE)
        some = (rows["extent_count"] > 1) | (
            (rows["extent_count"] == 1) & (rows["device"] == device)
        )
        for at in np.flatnonzero(some).tolist():
            block = Block.unpack(pairs[at][1])
            if any(extent.device == device for extent in block.extents):
                yield BlockKey.unpack(pairs[at][0]), block


def batches(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    """Cut *pairs* into what is moved at once."""
    batch: list[Pair] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += pair[1].device_bytes
        if len(batch) == BATCH_BLOCKS_MAX or size >= BATCH_BYTES_MAX:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def move(core: Core, pairs: Sequence[Pair]) -> Moved:
    """Move these blocks to where blocks are allotted now; what is no more as told stays.

    A block that cannot be read, on devices that are there, becomes a hole. WarehouseFull if there
    is no room for any of them; WarehouseClosed.
    """
    with core.lock:
        live = _still_so(core, pairs)
        if not live:
            return Moved()
        pinned = np.array([block.slot for _, block in live], np.int64)
        pin = core.pin(pinned)  # so that nothing evicts them, and their bytes stay
    copies: list[Copy] = []
    future: Future[list[bool]] | None = None
    try:
        copies = _reserved(core, live)
        lost = sum(not _copy(core, each) and _lost(core, each) for each in copies)
        good = _flushed(core, copies)

        def after(done: list[bool]) -> None:
            with core.lock:
                core.unpin(pinned, pin)
                _settle(core, copies, {id(each) for each, moved in zip(good, done, strict=True)
                                       if moved})  # fmt: skip

        moves = [ledger.Move(each.key, each.block, each.generation, each.extents) for each in good]
        future = core.metadata.submit(lambda view: ledger.move(view, moves), after)
        done = future.result()
    except BaseException:
        if future is None or not _committed(future):
            with core.lock:
                core.unpin(pinned, pin)
                _settle(core, copies, set())
        raise
    moved = [each for each, well in zip(good, done, strict=True) if well]
    return Moved(len(moved), sum(each.block.device_bytes for each in moved), lost)


def _committed(future: "Future[list[bool]]") -> bool:
    """Tell whether the transaction of a move became durable; waits for that."""
    wait([future])
    return future.exception() is None


def _still_so(core: Core, pairs: Sequence[Pair]) -> list[Pair]:
    """Those of *pairs* that are as told, live and no holes. Hold the lock."""
    found = []
    with core.metadata.read() as view:
        for key, told in pairs:
            block = view.block(key)
            if (
                block is not None
                and block.generation == told.generation
                and not block.hole
                and core.slots.state[block.slot] == states.LIVE
            ):
                found.append((key, block))
    return found


def _reserved(core: Core, pairs: Sequence[Pair]) -> list[Copy]:
    """Reserve room for as many of *pairs* as there is, in order; WarehouseFull if for none."""
    needs = [block.device_bytes for _, block in pairs]
    extents: list[tuple[Extent, ...]] = []
    for _ in range(ROOM_TRIES):
        with core.lock:
            got = core.allocator.reserve(needs[len(extents) :])
            extents += got
            core.reserved_bytes += sum(needs[len(extents) - len(got) : len(extents)])
            missing = sum(needs[len(extents) :])
            room = missing and core.allocator.allotted_bytes
            futures = submit_eviction(core, missing) if room else []
        if not futures:
            break
        wait(futures)
    if pairs and not extents:
        raise WarehouseFull(
            f"no room elsewhere for a block of {needs[0]} bytes: nothing may be evicted; release "
            "leases or add a device, and the drain goes on"
        )
    try:
        generations, _ = core.take_numbers(len(extents))
    except BaseException:
        with core.lock:
            core.reserved_bytes -= sum(needs[: len(extents)])
            for each in extents:
                core.allocator.release(each)
        raise
    return [
        Copy(key, block, place, generation)
        for (key, block), place, generation in zip(pairs, extents, generations, strict=False)
    ]


def _copy(core: Core, copy: Copy) -> bool:
    """Read a block, prove it, and write it to its new place; False if it could not be read."""
    block = copy.block
    try:
        buffer = core.standings.read(
            {extent.device for extent in block.extents},
            lambda: read_whole(core.devices, copy.key, block),
        )
        header, _ = verified(buffer, copy.key, block)
    except (BadPayload, DeviceError):
        return False
    try:
        buffer[:ALIGN] = _new_header(core, copy, header)
    except DeviceError:
        return True
    copy.good = True
    at = 0
    for extent in copy.extents:
        part = buffer[at : at + extent.length]
        at += extent.length
        future = core.standings.write(extent.device, _write, core, extent, part)
        if core.standings.wait({future: (extent.device,)}):
            copy.write = future
        if copy.write is not None or future.cancelled() or future.exception() is not None:
            copy.good = False
            return True
    return True


def _write(core: Core, extent: Extent, part: memoryview) -> None:
    """Write one extent; DeviceError."""
    try:
        core.standings.device(extent.device).write_from([part], ByteOffset(extent.offset))
    except DeviceError:
        core.standings.look()
        raise


def _new_header(core: Core, copy: Copy, header: Header) -> bytes:
    """The header of the block in its new place: all but that, and the generation, is as it was."""
    block = replace(header.block, generation=copy.generation, extents=copy.extents)
    device = core.standings.device(copy.extents[0].device)
    return replace(header, device=device.uuid, block=block).pack(core.secret)


def _lost(core: Core, copy: Copy) -> bool:
    """Make a hole of a block that could not be read; False if its device is not there."""
    return spoil(core, copy.key, copy.block.generation)


def _flushed(core: Core, copies: Sequence[Copy]) -> list[Copy]:
    """Flush what was written to; those that are durable now."""
    good = [each for each in copies if each.good]
    bad = core.standings.flush({extent.device for each in good for extent in each.extents})
    return [each for each in good if not any(extent.device in bad for extent in each.extents)]


def _settle(core: Core, copies: Sequence[Copy], moved: set[int]) -> None:
    """Let memory follow: *moved* copies (by id) are the blocks now. Hold the lock, without pin."""
    places = []
    for each in copies:
        core.reserved_bytes -= each.block.device_bytes
        if id(each) in moved:
            slot = int(each.block.slot)
            core.slots.device[slot] = each.extents[0].device
            places.append((slot, each.block.extents))
            core.counters.moved_blocks += 1
            core.counters.moved_bytes += each.block.device_bytes
        else:
            core.release_after(each.extents, [] if each.write is None else [each.write])
    core.leave_places(places)
    core.changes += 1


def drained_bytes(core: Core, device: DeviceIndex) -> tuple[ByteCount, ByteCount]:
    """Bytes of blocks and reservations on *device*, and bytes that leases may still read."""
    with core.lock, core.metadata.read() as view:
        limbo = [each for each in view.runs("limbo") if each.device == device]
        leased = sum(each.length for each in view.leased_limbo() if each.device == device)
        area = core.standings.all[device].record.data_area[1]
        used = area - core.allocator.free_bytes_of(device) - sum(each.length for each in limbo)
    return ByteCount(used), ByteCount(leased)

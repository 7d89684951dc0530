"""One pass over the devices: every block header that may be believed, and whose payload verifies.

Devices are read in parallel, each from end to end in large windows, two of them in turn: while one
is read, the other is looked through. A block that lies whole in its window is verified there; what
is cut by a window's end or lies in several extents is left for `Scan.verify`. Nothing is written.

Memory: WINDOWS_BYTES_MAX for all windows together, VERIFIERS pieces of 16 MiB, and about 200 bytes
for each header found (while the metadata is written, about 700).
"""

import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

import numpy as np
import xxhash
from sortedcontainers import SortedDict  # type: ignore[import-untyped]

from twfs.checksums import xxh3_of
from twfs.devices.device import Device
from twfs.devices.payload import aligned_buffer
from twfs.devices.roster import Roster
from twfs.errors import DeviceError
from twfs.layout import Layout
from twfs.records import BLOCK_DTYPE, HEADER_MAGIC, Block, Extent, Header, sealed_with
from twfs.units import ALIGN, EXTENTS_MAX, IO_BYTES_MAX, ByteOffset, align_up

Array = np.ndarray[Any, Any]

WINDOW_BYTES: Final = 128 << 20  # so that few blocks are cut by a window's end
WINDOWS_BYTES_MAX: Final = 512 << 20  # all of them: two for each device, so smaller ones for many
WINDOW_BYTES_MIN: Final = 4 << 20
VERIFIERS: Final = 4  # blocks read apart at once
COARSE_BYTES: Final = 1 << 20  # what cannot be read is tried again in such pieces, then in 4 KiB
UNREADABLE_MAX: Final = 4096  # 4 KiB pieces of one device: beyond, it is failing altogether
RETENTION_MAX: Final = 3
ESTIMATE_SECONDS: Final = 1.0  # of reading, before the rest of the time is estimated

MAGIC_WORD: Final = int.from_bytes(HEADER_MAGIC, "little")
WORDS: Final = ALIGN // 8
NAMED: Final = struct.Struct("<16sQIHH")
# A block record without slot and flags, and its full name; *model* is its place in the roster.
FOUND_DTYPE: Final = np.dtype(
    [
        *BLOCK_DTYPE.descr,
        ("prefix_hash", "V16"), ("epoch", "<u8"), ("model", "<u4"), ("group", "<u2"),
        ("shard", "<u2"),
    ]
)  # fmt: skip
assert FOUND_DTYPE.itemsize == BLOCK_DTYPE.itemsize + NAMED.size


class Cause(StrEnum):
    """Why a header that was found is no block of the rebuilt warehouse."""

    DAMAGED = "damaged: it does not have its checksum"
    FORGED = "not sealed with the secret of this warehouse"
    FOREIGN = "of another warehouse or device"
    MISPLACED = "not where it says that it lies"
    NO_MODEL = "of a model that the roster does not name"
    LAYOUT = "of another layout than its model"
    OLD_EPOCH = "of an epoch that is over"
    SHAPE = "of a group, shard or length that its layout does not have"
    EXTENTS = "with extents that cannot be"
    NO_DEVICE = "partly on a device that is not here"
    PAYLOAD = "with a payload that does not have its checksum"
    OVERWRITTEN = "below a newer block"
    OLDER = "an older life of a block that is back"
    UNFIT = "that would hang below itself"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rebuild is; *seconds_left* is None before there is an estimate."""

    phase: str  # "reading", "verifying", "writing"
    done: int  # bytes, bytes, blocks
    total: int
    blocks: int  # headers found so far
    seconds_left: float | None


Watch = Callable[[Progress], None]


def unwatched(_: Progress) -> None:
    """For who does not want to know."""


@dataclass(frozen=True, slots=True)
class Meant:
    """One model of the roster, with what is asked for of every header computed once."""

    number: int
    epoch: int
    fingerprint: bytes
    shards: int
    layout: Layout

    @classmethod
    def of(cls, number: int, epoch: int, layout: Layout) -> "Meant":
        """That of the model that stands at place *number* of the roster."""
        return cls(number, epoch, layout.fingerprint, layout.shards, layout)

    def complaint(self, header: Header) -> Cause | None:
        """What in *header*, which names this model, is not of it; an epoch to come is."""
        if self.fingerprint != header.fingerprint:
            return Cause.LAYOUT
        if header.epoch < self.epoch:
            return Cause.OLD_EPOCH
        fits = (
            header.group < len(self.layout.groups)
            and header.shard < self.shards
            and self.layout.fits(header.group, header.block.payload_bytes)
            and header.block.retention <= RETENTION_MAX
        )
        return None if fits else Cause.SHAPE


class Found:
    """Blocks as they were found, packed: FOUND_DTYPE rows, and what does not fit one."""

    def __init__(self) -> None:
        self.packed = bytearray()
        self.tails: dict[int, bytes] = {}  # by row: extents behind the first, own key

    def __len__(self) -> int:
        return len(self.packed) // FOUND_DTYPE.itemsize

    def add(self, header: Header, model: int) -> None:
        """Append one."""
        packed, size = header.block.pack(), BLOCK_DTYPE.itemsize
        if len(packed) > size:
            self.tails[len(self)] = packed[size:]
        self.packed += packed[:size]
        self.packed += NAMED.pack(
            header.prefix_hash, header.epoch, model, header.group, header.shard
        )

    def extend(self, other: "Found") -> None:
        """Append all of *other*."""
        here = len(self)
        self.tails.update({here + number: tail for number, tail in other.tails.items()})
        self.packed += other.packed

    def rows(self) -> Array:
        """The rows, to be read and changed in place; nothing can be added while they are in use."""
        return np.frombuffer(self.packed, FOUND_DTYPE)

    def block(self, number: int) -> Block:
        """The record in row *number*."""
        start = number * FOUND_DTYPE.itemsize
        packed = bytes(self.packed[start : start + BLOCK_DTYPE.itemsize])
        return Block.unpack(packed + self.tails.get(number, b""))

    def split(self) -> Iterator[tuple[int, Extent]]:
        """(row, extent) of all extents behind the first."""
        for number in self.tails:
            for extent in self.block(number).extents[1:]:
                yield number, extent


@dataclass(slots=True)
class Scan:
    """What a pass finds. Made by `scan`; its fields may be read when that has returned."""

    devices: Mapping[int, Device]
    warehouse: UUID
    secret: bytes
    roster: Roster
    watch: Watch = unwatched
    whole: Found = field(default_factory=Found)  # verified
    apart: Found = field(default_factory=Found)  # to be verified: in several pieces
    rejected: Counter[Cause] = field(default_factory=Counter)
    headers: int = 0
    generation_end: int = 0  # behind the highest that any sealed header has
    ino_end: int = 0
    unreadable_bytes: int = 0
    models: dict[str, Meant] = field(default_factory=dict)
    done_bytes: int = 0
    total_bytes: int = 0
    _began: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Read all devices; DeviceError if one fails altogether."""
        self.models = {
            model.name: Meant.of(number, model.epoch, model.layout)
            for number, model in enumerate(self.roster.models)
        }
        self.total_bytes = sum(device.data_area[1] for device in self.devices.values())
        share = WINDOWS_BYTES_MAX // (2 * len(self.devices)) // ALIGN * ALIGN
        window = max(WINDOW_BYTES_MIN, min(WINDOW_BYTES, share))
        self._began = time.monotonic()
        lookers = ThreadPoolExecutor(len(self.devices), "twfs-look")
        readers = ThreadPoolExecutor(len(self.devices), "twfs-scan")
        with lookers, readers:
            passes = [
                readers.submit(self._pass, device, window, lookers)
                for device in self.devices.values()
            ]
            for each in passes:
                each.result()

    def _pass(self, device: Device, window: int, lookers: ThreadPoolExecutor) -> None:
        """Read one device from end to end."""
        start, length = device.data_area
        buffers = [aligned_buffer(min(window, length)) for _ in range(2)]
        looking: list[Future[None] | None] = [None, None]
        bad = 0
        for turn, at in enumerate(range(start, start + length, window)):
            before = looking[turn % 2]
            if before is not None:
                before.result()  # it is looked through, so it may be overwritten
            view = buffers[turn % 2][: min(window, start + length - at)]
            bad += _read_or_zero(device, view, at, UNREADABLE_MAX - bad)
            looking[turn % 2] = lookers.submit(self._look, device, view, at)
            self._count(len(view))
        for last in looking:
            if last is not None:
                last.result()
        with self._lock:
            self.unreadable_bytes += bad * ALIGN

    def _count(self, read_bytes: int) -> None:
        with self._lock:
            self.done_bytes += read_bytes
            spent = time.monotonic() - self._began
            left = None
            if spent >= ESTIMATE_SECONDS:
                left = spent * (self.total_bytes - self.done_bytes) / self.done_bytes
            self.watch(Progress("reading", self.done_bytes, self.total_bytes, self.headers, left))

    def _look(self, device: Device, view: memoryview, at: int) -> None:
        """Find the headers in a window that begins at byte *at* of *device*, and verify blocks."""
        first = np.frombuffer(view, "<u8")[::WORDS]
        places = (np.flatnonzero(first == MAGIC_WORD) * ALIGN).tolist()
        inside: list[tuple[int, Header, int]] = []  # place in the window, header, model
        whole, apart, rejected = Found(), Found(), Counter[Cause]()
        generation = ino = 0
        for place in places:
            found = self.judge(view[place : place + ALIGN], device, at + place)
            if isinstance(found, Cause):
                rejected[found] += 1
                continue
            header, model = found
            block = header.block
            generation, ino = max(generation, block.generation), max(ino, block.ino)
            if len(block.extents) == 1 and place + block.extents[0].length <= len(view):
                inside.append((place, header, model))
            else:
                apart.add(header, model)
        for header, model in _newest_first(inside, rejected, view):
            whole.add(header, model)
        with self._lock:
            self.whole.extend(whole)
            self.apart.extend(apart)
            self.rejected += rejected
            self.headers += len(places)
            self.generation_end = max(self.generation_end, generation + 1)
            self.ino_end = max(self.ino_end, ino + 1)

    def judge(self, data: memoryview, device: Device, offset: int) -> tuple[Header, int] | Cause:
        """Return what the 4096 bytes *data* at *offset* of *device* are the header of.

        With the model's place in the roster; or why they are not to be believed.
        """
        sealed = sealed_with(self.secret, data)
        try:
            header = Header.unpack(data)
        except ValueError:
            return Cause.DAMAGED
        if not sealed:
            return Cause.FORGED
        if header.warehouse != self.warehouse or header.device != device.uuid:
            return Cause.FOREIGN
        first = header.block.extents[0]
        if (first.device, first.offset) != (device.index, offset):
            return Cause.MISPLACED
        model = self.models.get(header.model_name)
        if model is None:
            return Cause.NO_MODEL
        return model.complaint(header) or self._misplaced(header.block) or (header, model.number)

    def _misplaced(self, block: Block) -> Cause | None:
        """What is wrong with the extents of *block*."""
        if len(block.extents) > EXTENTS_MAX or block.extents[0].length < 2 * ALIGN:
            return Cause.EXTENTS
        if block.device_bytes != ALIGN + align_up(block.payload_bytes):
            return Cause.EXTENTS
        if any(extent.device not in self.devices for extent in block.extents):
            return Cause.NO_DEVICE
        ends: dict[int, int] = {}
        for extent in sorted(block.extents, key=lambda each: (each.device, each.offset)):
            start, length = self.devices[extent.device].data_area
            low = ends.get(extent.device, int(start))
            ends[extent.device] = extent.offset + extent.length
            if not low <= extent.offset < ends[extent.device] <= start + length:
                return Cause.EXTENTS
        return None

    def verify(self, block: Block) -> bool:
        """Read the payload of *block* from its devices; True if it has its checksum. Any thread."""
        whole = xxhash.xxh3_128()
        buffer = aligned_buffer(min(IO_BYTES_MAX, block.device_bytes))
        skipped, left = ALIGN, int(block.payload_bytes)
        try:
            for extent in block.extents:
                for done in range(0, extent.length, IO_BYTES_MAX):
                    view = buffer[: min(IO_BYTES_MAX, extent.length - done)]
                    self.devices[extent.device].read_into([view], ByteOffset(extent.offset + done))
                    run = view[skipped : skipped + left]
                    whole.update(run)
                    skipped, left = max(0, skipped - len(view)), left - len(run)
        except DeviceError:
            return False
        return left == 0 and whole.digest() == block.checksums.xxh3


def _newest_first(
    inside: list[tuple[int, Header, int]], rejected: Counter[Cause], view: memoryview
) -> Iterator[tuple[Header, int]]:
    """Yield those blocks of a window that verify; one below a newer one that does is rejected.

    So what lies in a payload that verifies is not read as a block again and again.
    """
    starts = np.array([place for place, _, _ in inside], np.int64)
    lengths = np.array([header.block.extents[0].length for _, header, _ in inside], np.int64)
    touching = crowded(starts, starts + lengths)
    taken = Taken()
    for number in sorted(range(len(inside)), key=lambda i: -inside[i][1].block.generation):
        place, header, model = inside[number]
        end = place + header.block.extents[0].length
        if touching[number] and taken.overlaps(place, end):
            rejected[Cause.OVERWRITTEN] += 1
            continue
        payload = view[place + ALIGN : place + ALIGN + header.block.payload_bytes]
        if xxh3_of(payload) != header.block.checksums.xxh3:
            rejected[Cause.PAYLOAD] += 1
            continue
        if touching[number]:
            taken.add(place, end)
        yield header, model


class Taken:
    """Ranges that do not overlap."""

    def __init__(self) -> None:
        self._ends: Any = SortedDict()  # by start

    def overlaps(self, start: int, end: int) -> bool:
        """Tell whether any byte of start to *end* is in a range."""
        place = self._ends.bisect_left(end) - 1  # the last range that begins before the end
        return place >= 0 and bool(self._ends.peekitem(place)[1] > start)

    def add(self, start: int, end: int) -> None:
        """Add a range that overlaps none."""
        self._ends[start] = end


def crowded(starts: Array, ends: Array) -> Array:
    """Tell which of the ranges, sorted by *starts*, overlap another, be it by way of a third."""
    if not len(starts):
        return np.zeros(0, np.bool_)
    reach = np.maximum.accumulate(ends)
    alone = np.ones(len(starts), np.bool_)
    alone[1:] = starts[1:] >= reach[:-1]
    cluster = np.cumsum(alone) - 1
    found: Array = np.bincount(cluster)[cluster] > 1
    return found


def _read_or_zero(device: Device, view: memoryview, at: int, bad_max: int) -> int:
    """Fill *view* from byte *at* on; pieces of 4 KiB that cannot be read are zeros, and counted.

    DeviceError at more than *bad_max* of them.
    """
    try:
        device.read_into([view], ByteOffset(at))
    except DeviceError as error:
        if len(view) == ALIGN:
            if bad_max < 1:
                raise DeviceError(
                    f"{device.path} cannot be read in more than {UNREADABLE_MAX} places "
                    f"({error}): take it off with --without-device {device.index}"
                ) from error
            view[:] = bytes(ALIGN)
            return 1
        step = COARSE_BYTES if len(view) > COARSE_BYTES else ALIGN
        bad = 0
        for done in range(0, len(view), step):
            bad += _read_or_zero(device, view[done : done + step], at + done, bad_max - bad)
        return bad
    return 0

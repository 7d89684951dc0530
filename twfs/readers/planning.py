"""What a wave of reads consists of: jobs cut at the largest I/O, neighbours merged into one.

Does no I/O. Functions without state.
"""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from twfs.checksums import Bytes
from twfs.devices.arena import Piece
from twfs.readers.base import HEADER_BYTES, BlockRead, DeviceSource, Span, may_read, spans_of
from twfs.store import ReadOutcome
from twfs.units import ALIGN, IO_BYTES_MAX, DeviceIndex, align_up

IOVECS_MAX: Final = 1000  # of one preadv; the kernel's own limit is 1024
MERGED_BYTES_MIN: Final = 1 << 20  # below this a read is too short to be worth cutting further


@dataclass(slots=True)
class Job:
    """One block of a wave: where its bytes are read to and how many spans are still to come."""

    block: BlockRead
    at: int  # place among the blocks of the read
    memory: Bytes  # takes bytes `start` and on of header plus padded payload
    start: int
    piece: Piece | None  # None: the memory is the destination itself
    left: int = 0
    failed: bool = False
    then: Callable[[], None] | None = None  # what is done once it is verified, not to deliver it


@dataclass(slots=True)
class Io:
    """One preadv: neighbours on one device, with the headers between them going to scratch."""

    device: int
    offset: int
    byte_count: int
    buffers: list[Bytes]
    parts: list[tuple[Job, Span, Bytes]]


def pieces_of(jobs: Sequence[Job]) -> list[Piece]:
    """Return what *jobs* have of arenas."""
    return [job.piece for job in jobs if job.piece is not None]


def wanted_of(block: BlockRead) -> tuple[int, int, int]:
    """Return what to read of a block: from, up to (header included), and header bytes before."""
    layers = block.layers
    if layers is None:
        return HEADER_BYTES, HEADER_BYTES + block.padded_bytes, 0
    first = layers.first * layers.layer_bytes // ALIGN * ALIGN
    stop = align_up(layers.stop * layers.layer_bytes)
    return HEADER_BYTES + first, HEADER_BYTES + stop, HEADER_BYTES


def plan(
    jobs: Sequence[Job], outcomes: list[ReadOutcome], sources: Mapping[DeviceIndex, DeviceSource],
    *, hung: AbstractSet[DeviceIndex], threads: int, skipped: Bytes,
) -> list[Io]:  # fmt: skip
    """Cut and merge the spans of all *jobs* into I/Os for *threads*, by device and offset.

    Jobs that cannot be read, or lie on a device that is *hung*, get their outcome now. *skipped*
    takes the headers between neighbours.
    """
    parts: list[tuple[int, int, Job, Span, Bytes]] = []
    for job in jobs:
        spans = _spans(job)
        if not spans or not all(may_read(sources, span) for span, _ in spans):
            outcomes[job.at] = ReadOutcome.DEVICE_ERROR
            continue
        if hung and any(span.device in hung for span, _ in spans):
            outcomes[job.at] = ReadOutcome.TIMED_OUT
            continue
        job.left = len(spans)
        parts.extend((span.device, span.offset, job, span, memory) for span, memory in spans)
    parts.sort(key=_place)
    total = sum(part[3].length for part in parts)
    limit = min(max(total // (2 * threads), MERGED_BYTES_MIN), IO_BYTES_MAX)
    ios: list[Io] = []
    last: Io | None = None
    for device, offset, job, span, memory in parts:
        length = span.length
        if last is not None and last.device == device:
            gap = offset - last.offset - last.byte_count
            if (
                (gap == 0 or gap == HEADER_BYTES)  # noqa: PLR1714 - half the time of a set
                and last.byte_count + gap + length <= limit
                and len(last.buffers) < IOVECS_MAX - 1
            ):
                if gap:
                    last.buffers.append(skipped)
                last.buffers.append(memory)
                last.byte_count += gap + length
                last.parts.append((job, span, memory))
                continue
        last = Io(device, offset, length, [memory], [(job, span, memory)])
        ios.append(last)
    return ios


def _place(part: tuple[int, int, Job, Span, Bytes]) -> tuple[int, int]:
    """Sort key: device and offset."""
    return part[:2]


def _spans(job: Job) -> list[tuple[Span, Bytes]]:
    """Return what to read for *job*, cut to the largest I/O, and where to; [] if extents lack."""
    start, stop, header = wanted_of(job.block)
    wanted = [(start, stop, header)]
    if header:
        wanted.insert(0, (0, HEADER_BYTES, 0))
    spans = []
    for first, last, memory_at in wanted:
        covered = 0
        for span in spans_of(job.block, first, last):
            for cut in range(0, span.length, IO_BYTES_MAX):
                length = min(IO_BYTES_MAX, span.length - cut)
                at = memory_at + span.at + cut - first
                spans.append(
                    (
                        Span(span.device, span.offset + cut, length, span.at + cut),
                        job.memory[at : at + length],
                    )
                )
            covered += span.length
        if covered != last - first:
            return []
    return spans

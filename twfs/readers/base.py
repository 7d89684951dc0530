"""What all readers share: the blocks to read, where their bytes go, and the rules of device I/O.

Not a reader itself. Everything here is immutable or pure, except Tally, which locks.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final, Protocol

from twfs.checksums import (
    Bytes,
    address_of,
    flat_bytes,
    flat_tensor,
    loaded_torch,
    on_device,
)
from twfs.errors import InvalidInput, ReaderUnavailable
from twfs.records import Checksums, Extent
from twfs.store import Buffer, ReadOutcome
from twfs.units import ALIGN, ByteCount, DeviceIndex, Generation, PrefixHash, align_up, is_aligned

HEADER_BYTES: Final = ALIGN
ARENA_TIMEOUT_S: Final = 10.0  # for a piece of a reader's own memory; others' reads end before


@dataclass(frozen=True, slots=True)
class DeviceSource:
    """A device as a reader uses it: *fd* is O_RDONLY|O_DIRECT and stays its giver's to close."""

    fd: int
    path: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Target:
    """One contiguous destination, as bytes: *array* in host memory, or else *tensor* on a GPU."""

    address: int
    byte_count: int
    array: Bytes | None
    tensor: Any = None

    @property
    def device(self) -> Any:
        """The torch device, None for host memory."""
        return None if self.tensor is None else self.tensor.device

    def clear(self) -> None:
        """Take away bytes that turned out to be wrong."""
        if self.array is not None:
            self.array.fill(0)
        else:
            self.tensor.zero_()


def target_of(data: Buffer) -> Target:
    """Return *data* as a destination; InvalidInput if it is not contiguous and writable memory."""
    if on_device(data):
        if data.device.type != "cuda":
            raise InvalidInput(f"a tensor on {data.device} is neither in host nor in GPU memory")
        tensor = flat_tensor(data)
        return Target(tensor.data_ptr(), tensor.numel(), None, tensor)
    array = flat_bytes(data, writable=True)
    return Target(address_of(array), array.size, array)


@dataclass(frozen=True, slots=True)
class LayerRange:
    """The layers *first* up to *stop* of a payload of *count* layers of *layer_bytes* each."""

    first: int
    stop: int
    count: int
    layer_bytes: int


@dataclass(frozen=True, slots=True)
class BlockRead:
    """One block to read: who it is, where it lies, what its bytes must sum to, where they go.

    *targets* take the payload (or the run of its *layers*) in their order and have its length.
    """

    prefix_hash: PrefixHash
    group: int
    shard: int
    generation: Generation
    payload_bytes: ByteCount
    checksums: Checksums
    extents: tuple[Extent, ...]
    targets: tuple[Target, ...]
    layers: LayerRange | None = None

    @property
    def padded_bytes(self) -> int:
        """The payload's length on the device."""
        return align_up(self.payload_bytes)

    @property
    def whole(self) -> bool:
        """Tell whether the device may write into the destination itself, and nothing else."""
        if len(self.targets) != 1 or self.layers is not None:
            return False
        target = self.targets[0]
        return is_aligned(target.address | target.byte_count) and (
            target.byte_count == self.payload_bytes
        )


@dataclass(frozen=True, slots=True)
class Span:
    """A contiguous run of one device that holds bytes *at* and on of header plus padded payload."""

    device: int
    offset: int
    length: int
    at: int


def spans_of(block: BlockRead, start: int, stop: int) -> Iterator[Span]:
    """Map bytes *start* up to *stop* of header plus padded payload onto the block's extents.

    Stops short where the extents do: the caller compares lengths.
    """
    at = 0
    for extent in block.extents:
        begin, end = max(start, at), min(stop, at + extent.length)
        if begin < end:
            yield Span(extent.device, extent.offset + begin - at, end - begin, begin)
        at += extent.length


def may_read(sources: Mapping[DeviceIndex, DeviceSource], span: Span) -> bool:
    """Tell whether *span* is an aligned run inside a device of ours.

    The kernel is not trusted with this: a misaligned O_DIRECT read was seen to succeed with wrong
    bytes, some of them outside the buffer.
    """
    source = sources.get(DeviceIndex(span.device))
    return (
        source is not None
        and is_aligned(span.offset | span.length)
        and span.length > 0
        and 0 <= span.offset <= source.size_bytes - span.length
    )


class Tally:
    """What one reader did, counted for tests and operators. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._blocks = 0
        self._payload_bytes = 0
        self._device_bytes = 0
        self._ios = 0
        self._direct = 0
        self._unaligned = 0
        self._ahead = 0
        self._misses: dict[ReadOutcome, int] = {
            outcome: 0 for outcome in ReadOutcome if outcome is not ReadOutcome.HIT
        }

    def count_io(self, byte_count: int) -> None:
        """Count one read of a device."""
        with self._lock:
            self._ios += 1
            self._device_bytes += byte_count

    def count_read(
        self, blocks: Sequence[BlockRead], outcomes: Sequence[ReadOutcome], direct: int, *,
        ahead: int = 0,
    ) -> None:  # fmt: skip
        """Count a finished read.

        *direct* blocks were placed straight into the destination, *ahead* were begun before.
        """
        payload_bytes = sum(
            sum(target.byte_count for target in block.targets)
            for block, outcome in zip(blocks, outcomes, strict=True)
            if outcome is ReadOutcome.HIT
        )
        with self._lock:
            self._payload_bytes += payload_bytes
            self._direct += direct
            self._ahead += ahead
            self._unaligned += len(blocks) - direct
            for outcome in outcomes:
                if outcome is ReadOutcome.HIT:
                    self._blocks += 1
                else:
                    self._misses[outcome] += 1

    def statistics(self) -> dict[str, Any]:
        """Blocks and bytes delivered, device reads, placement, and misses by cause."""
        with self._lock:
            return {
                "blocks": self._blocks,
                "payload_bytes": self._payload_bytes,
                "device_bytes": self._device_bytes,
                "ios": self._ios,
                "direct": self._direct,
                "unaligned": self._unaligned,
                "ahead": self._ahead,
                "misses": {outcome.value: count for outcome, count in self._misses.items()},
            }


class Reader(Protocol):
    """One way from extents to destinations."""

    def read(
        self,
        blocks: Sequence[BlockRead],
        held: Callable[[], bool],
        after: Sequence[Any] = (),
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        """Read *blocks* and verify them; return one outcome per block, in their order.

        Every I/O into a destination has ended when this returns or raises, KeyboardInterrupt
        included. *held* is asked from time to time, and once it says no the rest is LEASE_ENDED.
        *after* are CUDA events that must have happened before a destination is written. At
        *deadline* (time.monotonic) what has not been read is TIMED_OUT; only I/O into the
        reader's own memory is left behind.
        """

    def statistics(self) -> dict[str, Any]:
        """Counters and gauges."""

    def close(self) -> None:
        """Let go of memory and threads."""


class ForkGuard:
    """Remembers the process that may use a reader: threads and CUDA do not survive a fork."""

    __slots__ = ("_pid",)

    def __init__(self) -> None:
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise ReaderUnavailable in a forked child."""
        if os.getpid() != self._pid:
            raise ReaderUnavailable(
                f"readers made by process {self._pid} were used in its forked child {os.getpid()}: "
                "connect anew in the child, or start it with spawn"
            )


def scatter(copies: Sequence[tuple[Sequence[Target], Any]]) -> None:
    """Copy each flat tensor into the targets beside it, all on one GPU, as one batch."""
    torch = loaded_torch()
    to: list[Any] = []
    of: list[Any] = []
    for targets, source in copies:
        parts = source.split([target.byte_count for target in targets])
        if all((target.address | target.byte_count) % 8 == 0 for target in targets):
            # Eight bytes per load instead of one; parts of an aligned source are aligned too.
            to.extend(target.tensor.view(torch.int64) for target in targets)
            of.extend(part.view(torch.int64) for part in parts)
        else:
            to.extend(target.tensor for target in targets)
            of.extend(parts)
    if to:
        torch._foreach_copy_(to, of)

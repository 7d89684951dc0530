"""A Match: blocks held for an engine under a lease, and the reads into its memory.

Here destinations are checked, the lease is asked for after the last I/O, and bad blocks are
reported. Device I/O is the readers'. Thread-safe.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from twfs.checksums import loaded_torch
from twfs.errors import InvalidInput
from twfs.prefix import Names
from twfs.readers.ahead import Ahead
from twfs.readers.base import BlockRead, LayerRange, Target, target_of
from twfs.readers.select import Readers
from twfs.records import BlockKey, Checksums, Extent, payload_runs
from twfs.store import LeaseHolder, Model, Pieces, ReaderName, ReadOutcome, ReadReport, Served
from twfs.units import (
    ALIGN,
    ByteCount,
    ByteOffset,
    DeviceIndex,
    Generation,
    PrefixHash,
    TokenCount,
)

Rows = npt.NDArray[np.void]

TIMEOUT_SECONDS_MAX: Final = 86_400.0
_REPORTED = frozenset({ReadOutcome.BAD_CHECKSUM, ReadOutcome.DEVICE_ERROR})


@dataclass(frozen=True, slots=True)
class LocatedBlock:
    """Where a held block lies, for an engine with a reader of its own.

    *runs* are (device, byte offset, byte length) in payload order and 4 KiB-aligned; the last
    ends with the payload's padding. The bytes count only if their checksums are right and
    `Match.held` says yes after the last read.
    """

    index: int
    prefix_hash: PrefixHash
    generation: Generation
    payload_bytes: ByteCount
    checksums: Checksums
    runs: tuple[tuple[Path, ByteOffset, ByteCount], ...]


class Match:
    """The longest part of a chain that the store holds, from *start* up to *blocks*.

    *blocks* counts from block 0. *located* is sorted by group, shard, index; *extents* follow its
    order. The store's own code makes these; engines get them from match and join.
    """

    def __init__(  # noqa: PLR0917 - what a lease consists of, in the order of its messages
        self,
        holder: LeaseHolder,
        token: bytes,
        model: Model,
        names: Names,
        start: int,
        blocks: int,
        located: Rows,
        extents: Rows,
        readers: Readers,
    ) -> None:
        self.token = token
        self.model = model
        self.names = names
        self.start = start
        self.blocks = blocks
        self._holder = holder
        self._readers = readers
        self._located = located
        self._extents = extents
        self._first_extent = np.cumsum(located["extent_count"], dtype=np.int64)
        self._first_extent -= located["extent_count"]
        self._order = located["group"].astype(np.int64) << 16 | located["shard"]
        self._changed = Condition()
        self._in_flight = 0
        self._closed = False  # no more reads begin
        self._ended = False  # the lease was given back
        self._reads = 0
        self._hits = 0
        self._misses: dict[str, int] = {}
        self._served: dict[str, Served] = {}
        self._ahead: Ahead | None = None

    @property
    def tokens(self) -> TokenCount:
        """Tokens from the beginning of the prompt to the end of the last held block."""
        known = self.names.positions[self.blocks - 1 : self.blocks] if self.blocks else ()
        if known and known[0]:
            return TokenCount(known[0])
        return TokenCount(self.blocks * self.model.layout.block_tokens)

    @property
    def held(self) -> bool:
        """Whether the lease holds now; ask after the last read, for bytes count only then."""
        return not self._closed and self._holder.held(self.token)

    def read_into(
        self,
        destinations: Sequence[Pieces],
        *,
        group: int = 0,
        shard: int = 0,
        first: int | None = None,
        layers: range | None = None,
        reader: str | None = None,
        timeout_s: float | None = None,
    ) -> ReadReport:
        """Read one block into each of *destinations*, from block *first* (default: start) on.

        A destination is a buffer or several in payload order, of the payload's length, or of that
        of *layers*. Bytes of a block that is no HIT in the report must not be used. *reader*
        names one of host, staged, cufile. Without *timeout_s* the device writes straight into the
        destination where it can, and the call ends when all I/O has; blocks on a device that hangs
        already (HUNG_S) are TIMED_OUT at once. With it the bytes come through twfs's own memory and
        a copy, and what is missing after so many seconds is TIMED_OUT and never written.
        InvalidInput on a destination that does not fit, or a timeout that is no number of seconds;
        ReaderUnavailable when *reader* cannot work here.
        """
        deadline = _deadline(timeout_s)
        after = _events(destinations)
        blocks = self._blocks(destinations, group, shard, first, layers)
        begun = self._begin()
        try:
            return self._read(blocks, reader, after, deadline, begun=begun)
        finally:
            self._end()

    def read_async(
        self,
        destinations: Sequence[Pieces],
        *,
        group: int = 0,
        shard: int = 0,
        first: int | None = None,
        layers: range | None = None,
        reader: str | None = None,
        timeout_s: float | None = None,
    ) -> "Future[ReadReport]":
        """As read_into, on another thread; the destinations are kept alive until it is done.

        *timeout_s* counts from now. InvalidInput is raised here, not by the future.
        """
        deadline = _deadline(timeout_s)
        timed = deadline is not None
        after = _events(destinations)
        blocks = self._blocks(destinations, group, shard, first, layers)
        self._readers.name_for(blocks, reader, timed=timed)
        begun = self._begin()
        try:
            future = self._readers.submit(
                lambda: self._read(blocks, reader, after, deadline, begun=begun), timed=timed
            )
        except BaseException:
            self._end()
            raise
        future.add_done_callback(lambda _: self._end())
        return future

    def read_ahead(self, *, group: int = 0, shard: int = 0) -> None:
        """Begin to read the first blocks held, before it is known where to, if no read has begun.

        For host memory: the first read_into, if it begins with the same blocks and has a timeout,
        takes them from twfs's memory. That bounds how many; others are read when they are asked
        for. InvalidInput for a group that does not have all blocks.
        """
        layout = self.model.layout
        if not 0 <= group < len(layout.groups):
            raise InvalidInput(f"this layout has {len(layout.groups)} groups, and no {group}")
        room = self._readers.ahead_bytes // layout.block_bytes(group)
        count = min(self.blocks - self.start, room)
        if count <= 0:
            return
        at = self._rows(group, shard, self.start, count)
        blocks = self._reads_of(group, shard, at, [()] * count, None)
        with self._changed:  # a read that comes now waits, and takes them: none is read twice
            if not (self._reads or self._closed or self._ahead):
                self._ahead = self._readers.read_ahead(blocks)

    def _take_ahead(self) -> Ahead | None:
        """Return what is read ahead, for once."""
        with self._changed:
            ahead, self._ahead = self._ahead, None
            return ahead

    def _begin(self) -> bool:
        """Count a read that release has to wait for; False if release was called before."""
        with self._changed:
            self._in_flight += 1
            self._reads += 1
            return not self._closed

    def _end(self) -> None:
        """Take back one _begin."""
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def _read(
        self,
        blocks: list[BlockRead],
        reader: str | None,
        after: Sequence[Any],
        deadline: float | None,
        *,
        begun: bool,
    ) -> ReadReport:
        """Read, then ask whether the lease held all the time, and report what was bad."""
        if not (blocks and begun and self._holder.held(self.token)):
            name = self._readers.name_for(blocks, reader, timed=deadline is not None)
            outcomes = [ReadOutcome.LEASE_ENDED] * len(blocks)
        else:
            name, outcomes = self._read_held(blocks, reader, after, deadline)
            if not self._holder.held(self.token):
                outcomes = [ReadOutcome.LEASE_ENDED] * len(blocks)
        delivered = 0
        for block, outcome in zip(blocks, outcomes, strict=True):
            if outcome is ReadOutcome.HIT:
                delivered += sum(target.byte_count for target in block.targets)
            elif outcome in _REPORTED:
                key = BlockKey(self.model.id, block.prefix_hash, block.group, block.shard)
                self._holder.report(key, block.generation, outcome)
        with self._changed:
            before = self._served.get(name, Served(name))
            self._served[name] = before.plus(outcomes.count(ReadOutcome.HIT), delivered)
            for outcome in outcomes:
                if outcome is ReadOutcome.HIT:
                    self._hits += 1
                else:
                    self._misses[outcome.value] = self._misses.get(outcome.value, 0) + 1
        return ReadReport(tuple(outcomes), name, ByteCount(delivered))

    def _read_held(
        self, blocks: list[BlockRead], reader: str | None, after: Sequence[Any],
        deadline: float | None,
    ) -> tuple[ReaderName, list[ReadOutcome]]:  # fmt: skip
        """Read all but what was read ahead, which is brought meanwhile."""
        ahead = self._asked_ahead(blocks, deadline)
        rest = blocks if ahead is None else blocks[len(ahead) :]
        led: list[ReadOutcome] = []
        try:
            name, outcomes = self._readers.read(
                rest, lambda: self._holder.held(self.token), reader=reader, after=after,
                deadline=deadline,
            )  # fmt: skip
        finally:
            if ahead is not None:
                led = ahead.end()
        return name, led + outcomes

    def _asked_ahead(self, blocks: list[BlockRead], deadline: float | None) -> Ahead | None:
        """Ask what is read ahead for the first of *blocks*; None if it is not of these."""
        ahead = self._take_ahead()
        if ahead is None:
            return None
        if deadline is None or not ahead.serves(blocks):
            ahead.drop()
            return None
        ahead.ask(blocks, deadline)
        return ahead

    def _rows(self, group: int, shard: int, first: int, count: int) -> slice:
        """Return which located rows are blocks *first* and on; InvalidInput if one is not held."""
        if first < self.start or first + count > self.blocks:
            raise InvalidInput(
                f"blocks {first} to {first + count - 1} were asked for, but this match holds "
                f"blocks {self.start} to {self.blocks - 1}"
            )
        wanted = group << 16 | shard
        begin = int(np.searchsorted(self._order, wanted))
        end = int(np.searchsorted(self._order, wanted, side="right"))
        indices = self._located["index"][begin:end]
        begin += int(np.searchsorted(indices, first))
        rows = slice(begin, begin + count)
        found = self._located["index"][begin : min(begin + count, end)]
        if len(found) != count or (found != np.arange(first, first + count)).any():
            raise InvalidInput(
                f"blocks {first} to {first + count - 1} of group {group}, shard {shard} are not "
                f"all in this match: it has {len(indices)} blocks of that group and shard"
            )
        return rows

    def _blocks(
        self,
        destinations: Sequence[Pieces],
        group: int,
        shard: int,
        first: int | None,
        layers: range | None,
    ) -> list[BlockRead]:
        """Check every destination and say what is to be read into it."""
        begin = self.start if first is None else first
        if not destinations:
            return []
        part = None if layers is None else self._layer_range(group, layers)
        at = self._rows(group, shard, begin, len(destinations))
        wanted = self._located["payload_bytes"][at].tolist()
        if part is not None:
            wanted = [(part.stop - part.first) * part.layer_bytes] * len(wanted)
        targets = [
            _targets(begin + offset, destination, byte_count)
            for offset, (destination, byte_count) in enumerate(
                zip(destinations, wanted, strict=True)
            )
        ]
        return self._reads_of(group, shard, at, targets, part)

    def _reads_of(
        self, group: int, shard: int, at: slice, targets: Sequence[tuple[Target, ...]],
        part: LayerRange | None,
    ) -> list[BlockRead]:  # fmt: skip
        """Return the located rows *at* as reads, each into its *targets*."""
        rows, first_extents = self._located[at], self._first_extent[at].tolist()
        columns = (
            rows["generation"].tolist(), rows["payload_bytes"].tolist(),
            rows["lane_plain"].tolist(), rows["lane_weighted"].tolist(),
            rows["xxh3"].tolist(), rows["prefix_hash"].tolist(), rows["extent_count"].tolist(),
        )  # fmt: skip
        return [
            BlockRead(
                prefix_hash, group, shard, generation, payload_bytes,
                Checksums(xxh3, plain, weighted), self._extents_of(extent, extent_count), into,
                part,
            )
            for into, extent, (
                generation, payload_bytes, plain, weighted, xxh3, prefix_hash, extent_count,
            ) in zip(targets, first_extents, zip(*columns, strict=True), strict=True)
        ]  # fmt: skip

    def _extents_of(self, first: int, count: int) -> tuple[Extent, ...]:
        """The extents *first* and on, as records."""
        return tuple(
            Extent(DeviceIndex(device), ByteOffset(offset), ByteCount(units * ALIGN))
            for offset, units, device, _ in self._extents[first : first + count].tolist()
        )

    def _layer_range(self, group: int, layers: range) -> LayerRange:
        """Return *layers* in bytes; InvalidInput where the layout has no runs of bytes for them."""
        layout = self.model.layout
        count = layout.summed_layers(group) if 0 <= group < len(layout.groups) else 0
        if not count:
            raise InvalidInput(
                f"group {group} cannot be read by layers: a layer is not one run of its bytes"
            )
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= count:
            raise InvalidInput(f"{layers} is no range of the {count} layers of group {group}")
        return LayerRange(layers.start, layers.stop, count, layout.layer_bytes(group))

    def located_blocks(self, group: int = 0, shard: int = 0) -> list[LocatedBlock]:
        """Where the held blocks of *group* and *shard* lie, in chain order."""
        wanted = group << 16 | shard
        blocks = []
        for at in np.flatnonzero(self._order == wanted).tolist():
            row = self._located[at]
            extents = self._extents_of(int(self._first_extent[at]), int(row["extent_count"]))
            runs = [
                (self._path_of(run.device), run.offset, run.length)
                for run in payload_runs(extents, int(row["payload_bytes"]))
            ]
            blocks.append(
                LocatedBlock(
                    int(row["index"]), PrefixHash(row["prefix_hash"].item()),
                    Generation(int(row["generation"])), ByteCount(int(row["payload_bytes"])),
                    Checksums(row["xxh3"].item(), int(row["lane_plain"]),
                              int(row["lane_weighted"])),
                    tuple(runs),
                )
            )  # fmt: skip
        return blocks

    def _path_of(self, device: DeviceIndex) -> Path:
        """Where the daemon has *device*; nowhere if it has just been taken out."""
        source = self._readers.sources.get(device)
        return Path("/dev/null") if source is None else source.path

    def renew(self) -> bool:
        """Ask for a full lease term again; False if it is over or at its age limit."""
        return not self._closed and self._holder.renew(self.token)

    def release(self) -> None:
        """Wait for reads under way and end the lease. Idempotent; later reads are misses."""
        with self._changed:
            self._closed = True
        ahead = self._take_ahead()
        if ahead is not None:
            ahead.drop()
        with self._changed:
            while self._in_flight:
                self._changed.wait()
            if self._ended:
                return
            self._ended = True
        if self.token:
            self._holder.release(
                self.token, [served for served in self._served.values() if served.blocks]
            )

    def statistics(self) -> dict[str, Any]:
        """Reads, hits and misses by cause of this match."""
        with self._changed:
            return {
                "blocks": self.blocks,
                "in_flight": self._in_flight,
                "reads": self._reads,
                "hits": self._hits,
                "misses": dict(self._misses),
            }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _deadline(timeout_s: float | None) -> float | None:
    """Return when *timeout_s* is over (time.monotonic); InvalidInput if it is no such time."""
    if timeout_s is None:
        return None
    if not 0 <= timeout_s <= TIMEOUT_SECONDS_MAX:
        raise InvalidInput(
            f"a read cannot time out after {timeout_s} seconds: give 0 to {TIMEOUT_SECONDS_MAX:.0f}"
        )
    return time.monotonic() + timeout_s


def _targets(index: int, destination: Pieces, wanted: int) -> tuple[Target, ...]:
    """Return block *index*'s destination as targets; InvalidInput unless of *wanted* bytes."""
    pieces = destination if isinstance(destination, (list, tuple)) else (destination,)
    try:
        targets = tuple(map(target_of, pieces))
    except InvalidInput as error:
        raise InvalidInput(f"the destination of block {index}: {error}") from error
    given = sum(target.byte_count for target in targets)
    if given != wanted:
        raise InvalidInput(f"the destination of block {index} has {given} bytes, not {wanted}")
    return targets


def _events(destinations: Sequence[Pieces]) -> tuple[Any, ...]:
    """Record a CUDA event for each GPU of *destinations* on the caller's current stream.

    Neither copies on another stream nor cuFile wait for work that still uses the destination.
    """
    torch = loaded_torch()
    if torch is None or not torch.cuda.is_initialized():
        return ()
    devices = {
        piece.device
        for destination in destinations
        for piece in (destination if isinstance(destination, (list, tuple)) else (destination,))
        if isinstance(piece, torch.Tensor) and piece.device.type == "cuda"
    }
    events = []
    for device in devices:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return tuple(events)

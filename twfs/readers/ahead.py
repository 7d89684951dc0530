"""Blocks that are read before anybody says where to, while an engine still makes room for them.

They lie verified in the reader's own memory until they are delivered or dropped.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Final

from twfs.devices.arena import Piece
from twfs.readers.arenas import Arenas
from twfs.readers.base import BlockRead, DeviceSource, Tally
from twfs.readers.hanging import Hands, TimedWave
from twfs.readers.planning import Io, Job, pieces_of
from twfs.store import ReadOutcome

AHEAD_PARTS: Final = 2  # of an arena that may be read ahead into: reads that are asked for need one


class Room:
    """The part of an arena that may be read ahead into, for all who do."""

    def __init__(self, arenas: Arenas, arena_bytes: int) -> None:
        self._arenas = arenas
        self._lock = Lock()
        self._left_bytes = arena_bytes // AHEAD_PARTS

    def take(self, byte_count: int) -> Piece | None:
        """Return a piece of *byte_count* bytes, or None if there is no room just now."""
        with self._lock:
            if byte_count > self._left_bytes:
                return None
            self._left_bytes -= byte_count
        piece = self._arenas.take(byte_count, 0)
        if piece is None:
            self._count_back(byte_count)
        return piece

    def give_back(self, pieces: Sequence[Piece]) -> None:
        """Take *pieces* back, into which no I/O is under way any more."""
        self._arenas.give_back(pieces)
        self._count_back(sum(piece.byte_count for piece in pieces))

    def _count_back(self, byte_count: int) -> None:
        with self._lock:
            self._left_bytes += byte_count


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader does: *jobs* without targets, by *wave*, which notes their *outcomes*."""

    jobs: list[Job]
    outcomes: list[ReadOutcome]  # TIMED_OUT at first
    wave: TimedWave[Io]


class Ahead:
    """Leading blocks of a match on their way into *room*.

    *deliver* brings verified bytes to the targets of a block. One thread asks for them, once, and
    ends it.
    """

    def __init__(
        self, reading: Reading, room: Room, tally: Tally, deliver: Callable[[BlockRead, Any], None]
    ) -> None:
        self._reading = reading
        self._room = room
        self._tally = tally
        self._deliver = deliver
        self._lock = Lock()
        self._verified: set[int] = set()  # places of blocks that nobody has asked for yet
        self._asked: dict[int, BlockRead] = {}  # to be delivered as soon as they are verified
        self._blocks: list[BlockRead] = []  # that were asked for, with targets
        self._deadline = 0.0
        self._late: set[int] = set()  # verified, and not delivered in time
        self._dropped = False
        for job in reading.jobs:
            job.then = partial(self._then, job)

    def __len__(self) -> int:
        return len(self._reading.jobs)

    def begin(self, hands: Callable[[DeviceSource], Hands]) -> None:
        """Begin to read."""
        self._reading.wave.begin(hands)

    def _then(self, job: Job) -> None:
        """Deliver a block that was verified, or keep it until somebody asks."""
        with self._lock:
            block = self._asked.get(job.at)
            if block is None:
                self._verified.add(job.at)
                return
        self._deliver(block, job.memory[: block.payload_bytes])

    def serves(self, blocks: Sequence[BlockRead]) -> bool:
        """Tell whether *blocks*, with targets in host memory, begin with these."""
        jobs = self._reading.jobs
        return len(blocks) >= len(jobs) > 0 and all(
            _same(block, job.block) and all(target.array is not None for target in block.targets)
            for block, job in zip(blocks, jobs, strict=False)
        )

    def ask(self, blocks: Sequence[BlockRead], deadline: float) -> None:
        """Have these blocks brought to the targets of the first of *blocks*.

        Nothing is written after *deadline* (time.monotonic), nor once `end` has returned.
        """
        jobs = self._reading.jobs
        self._blocks, self._deadline = list(blocks[: len(jobs)]), deadline
        with self._lock:
            verified, self._verified = sorted(self._verified), set()
            self._asked = {job.at: blocks[job.at] for job in jobs if job.at not in verified}
        try:
            for at in verified:
                block = blocks[at]
                if time.monotonic() < deadline:
                    self._deliver(block, jobs[at].memory[: block.payload_bytes])
                else:
                    self._late.add(at)
        except BaseException:  # KeyboardInterrupt too: nothing is written once this has raised
            self._deadline = 0.0
            self.end()
            raise

    def end(self) -> list[ReadOutcome]:
        """Wait for what was asked for; one outcome each, TIMED_OUT for what came too late.

        All is dropped then.
        """
        try:
            self._reading.wave.wait(self._deadline)  # no outcome changes any more
            came = [
                ReadOutcome.TIMED_OUT if at in self._late else outcome
                for at, outcome in enumerate(self._reading.outcomes)
            ]
        finally:
            self.drop()
        self._tally.count_read(self._blocks, came, 0, ahead=len(came))
        return came

    def drop(self) -> None:
        """Begin nothing more, and give the memory back when no I/O writes to it. Idempotent."""
        with self._lock:
            dropped, self._dropped = self._dropped, True
        if not dropped:
            pieces = pieces_of(self._reading.jobs)
            self._reading.wave.when_over(lambda: self._room.give_back(pieces))


def _same(one: BlockRead, other: BlockRead) -> bool:
    """Tell whether two reads are of the same bytes."""
    return (one.prefix_hash, one.group, one.shard, one.generation, one.extents, one.layers) == (
        other.prefix_hash, other.group, other.shard, other.generation, other.extents, other.layers,
    )  # fmt: skip

"""Blocks that are read before anybody says where to, while an engine still makes room for them.

They lie verified in the reader's own memory until they are delivered or dropped. Thread-safe, but
for one who delivers.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Final

from twfs.arena import Piece
from twfs.readers.arenas import Arenas
from twfs.readers.base import BlockRead, Tally
from twfs.readers.hanging import TimedWave
from twfs.readers.planning import Io, Job, pieces_of
from twfs.store import ReadOutcome

AHEAD_PARTS: Final = 2  # of an arena that may be read ahead into: reads that are asked for need one


class Room:
    """The part of an arena that may be read ahead into, for all who do."""

    def __init__(self, arenas: Arenas, arena_bytes: int) -> None:
        self.byte_count = arena_bytes // AHEAD_PARTS
        self._arenas = arenas
        self._lock = Lock()
        self._left_bytes = self.byte_count

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


class Ahead:
    """Leading blocks of a match, on their way into *room*; *deliver* brings one to its targets."""

    def __init__(
        self, jobs: Sequence[Job], outcomes: Sequence[ReadOutcome], wave: TimedWave[Io],
        room: Room, tally: Tally, deliver: Callable[[BlockRead, Any], None],
    ) -> None:  # fmt: skip
        self._jobs = jobs
        self._outcomes = outcomes  # NOT_READ until it is known
        self._wave = wave
        self._room = room
        self._tally = tally
        self._deliver = deliver

    def __len__(self) -> int:
        return len(self._jobs)

    def serves(self, blocks: Sequence[BlockRead]) -> bool:
        """Tell whether *blocks*, with targets in host memory, begin with these."""
        return len(blocks) >= len(self._jobs) > 0 and all(
            _same(block, job.block) and all(target.array is not None for target in block.targets)
            for block, job in zip(blocks, self._jobs, strict=False)
        )

    def deliver(self, blocks: Sequence[BlockRead], deadline: float) -> list[ReadOutcome]:
        """Bring these blocks to the targets of the first of *blocks*; one outcome each.

        What has not come by *deadline* (time.monotonic) is TIMED_OUT. They are dropped then.
        """
        outcomes: list[ReadOutcome] = []
        try:
            for job, block in zip(self._jobs, blocks, strict=False):
                came = lambda at=job.at: self._outcomes[at] is not ReadOutcome.NOT_READ  # noqa: E731
                if self._wave.until(came, deadline):
                    if self._outcomes[job.at] is ReadOutcome.HIT:
                        self._deliver(block, job.memory[: block.payload_bytes])
                    outcomes.append(self._outcomes[job.at])
                else:
                    outcomes.append(ReadOutcome.TIMED_OUT)
        finally:
            self._tally.count_read(blocks[: len(outcomes)], outcomes, 0, ahead=len(outcomes))
            self.drop()
        return outcomes

    def drop(self) -> None:
        """Begin nothing more, and give the memory back when no I/O writes to it. Idempotent."""
        jobs, self._jobs = self._jobs, []
        if jobs:
            self._wave.when_over(lambda: self._room.give_back(pieces_of(jobs)))


def _same(one: BlockRead, other: BlockRead) -> bool:
    """Tell whether two reads are of the same bytes."""
    return (one.prefix_hash, one.group, one.shard, one.generation, one.extents, one.layers) == (
        other.prefix_hash, other.group, other.shard, other.generation, other.extents, other.layers,
    )  # fmt: skip

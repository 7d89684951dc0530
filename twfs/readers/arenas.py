"""The memory a reader reads into: one arena, a larger one for a huge block, and those left behind.

An arena is left when I/O into it outlives its read: another takes its place, and it is unmapped
when the last I/O has ended. Thread-safe.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Final

from twfs.devices.arena import Arena, Piece
from twfs.errors import InvalidInput
from twfs.readers.base import ARENA_TIMEOUT_S
from twfs.units import align_up

PATIENCE_S: Final = 0.5  # of a read with a deadline, when a hung device may hold the whole arena
LEFT_MAX: Final = 4  # at a time; while so many wait for their devices, no more is left


class Arenas:
    """See the module's docstring; *make* makes memory, *byte_count* is the arena's."""

    def __init__(self, make: Callable[[int], Arena], byte_count: int) -> None:
        self._make = make
        self._byte_count = byte_count
        self._lock = Lock()
        self._large = Lock()  # held by the one read that has an arena beyond byte_count
        self._arena: Arena | None = None
        self._left: list[Arena] = []

    def take(
        self, byte_count: int, timeout_s: float, hung: Callable[[], Any] | None = None
    ) -> Piece | None:
        """Return a piece of *byte_count* bytes, at most the arena's; None if there was no room.

        With *hung* the arena is left after PATIENCE_S without room if that tells of a device.
        """
        while True:
            arena = self._current()
            try:
                if hung is not None and timeout_s > PATIENCE_S:
                    piece = arena.take(byte_count, PATIENCE_S)
                    if piece is not None:
                        return piece
                    timeout_s -= PATIENCE_S
                    if hung():
                        self._leave(arena)
                        continue
                return arena.take(byte_count, timeout_s)
            except InvalidInput:
                if arena is self._arena:  # closed for good, and not because it was left
                    raise

    def fits(self, byte_count: int) -> bool:
        """Tell whether a block of *byte_count* bytes is for the arena, not for one of its own."""
        return byte_count <= self._byte_count

    def large(self, byte_count: int, timeout_s: float = ARENA_TIMEOUT_S) -> Arena | None:
        """Make an arena for one huge block, given back by close_large; None if another has one."""
        if not self._large.acquire(timeout=timeout_s):
            return None
        try:
            return self._make(align_up(byte_count))
        except BaseException:
            self._large.release()
            raise

    def close_large(self, arena: Arena) -> None:
        """Give back what large gave."""
        arena.close()
        self._large.release()

    def _current(self) -> Arena:
        """Return the arena, made when first needed."""
        with self._lock:
            if self._arena is None:
                self._arena = self._make(self._byte_count)
            return self._arena

    def leave(self, pieces: Sequence[Piece]) -> None:
        """Go on with another arena than that of *pieces*, into which I/Os are still under way."""
        for arena in {id(piece.arena): piece.arena for piece in pieces}.values():
            if arena is not None:
                self._leave(arena)

    def _leave(self, arena: Arena) -> None:
        """Take no more pieces of *arena*, unless too many are left already."""
        with self._lock:
            if arena is self._arena and len(self._left) < LEFT_MAX:
                self._left.append(arena)
                self._arena = None
        self._sweep()  # its last piece may have come back just before

    def give_back(self, pieces: Sequence[Piece]) -> None:
        """Take *pieces* back, into which no I/O is under way any more."""
        for piece in pieces:
            piece.release()
        if self._left:
            self._sweep()

    def _sweep(self) -> None:
        """Unmap the arenas that were left and have no piece out any more."""
        with self._lock:
            over = [arena for arena in self._left if not arena.pieces]
            self._left = [arena for arena in self._left if arena not in over]
        for arena in over:
            arena.close()

    def statistics(self) -> dict[str, Any]:
        """The arena, and how many were left to I/Os that are still under way."""
        arena = self._arena
        return {
            "arena": None if arena is None else arena.statistics(),
            "arenas_left": len(self._left),
        }

    def close(self) -> None:
        """Let go of all memory; what I/O is still under way into goes when that has ended."""
        with self._lock:
            for arena in [self._arena, *self._left]:
                if arena is not None:
                    arena.close()

"""Files while they are written: their bytes in memory, or in a spool where that is full.

Nothing here is durable, and nothing is seen by others: a draft becomes a file when it is closed.
A lock per draft guards its pieces; it is held while they are written to the devices.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from twfs.devices.payload import aligned_buffer
from twfs.errors import FileTooLarge, NoSpaceForImage, NotSupported
from twfs.metadata.filerows import (
    FILE_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    PIECE_BYTES,
    FileRow,
    blocks_of,
)
from twfs.units import Ino
from twfs.vfs.spool import Spool

MEMORY_BYTES: Final = 512 << 20  # of all drafts; beyond they go to the spool
SMALL_BYTES: Final = 128 << 10  # of memory for a small file, its row included
SMALL_PIECE: Final = 64 << 10  # of its bytes at most
KEPT_BUFFERS: Final = 32  # free ones of each size: fresh memory costs as much as a write
SPOOL_BYTES_MAX: Final = 256 << 30
SPOOL_FREE_MIN: Final = 256 << 20  # left on the metadata's filesystem: a commit must never lack it
SPARSE_BYTES_MAX: Final = 1 << 30  # of zeros that are not written: a file like that is no KV
REWRITE_BYTES_MAX: Final = 1 << 30  # of a file that is changed in part: all of it is stored anew

Load = Callable[[FileRow, int], memoryview]  # the bytes of one piece of a complete file


class Memory:
    """Buffers of two sizes, 4 KiB-aligned, up to a bound. Thread-safe."""

    def __init__(self, byte_count: int = MEMORY_BYTES) -> None:
        self._left = byte_count
        self._bytes_max = byte_count
        self._kept: dict[int, list[memoryview]] = {SMALL_BYTES: [], PAYLOAD_BYTES_MAX: []}
        self._lock = threading.Lock()

    def take(self, size: int, *, anyway: bool = False) -> memoryview | None:
        """A buffer of *size*, any bytes in it; None if the bound is reached, unless *anyway*."""
        with self._lock:
            if self._left < size and not anyway:
                return None
            self._left -= size
            if self._kept[size]:
                return self._kept[size].pop()
        return aligned_buffer(size)

    def give_back(self, buffer: memoryview) -> None:
        """End the use of a buffer."""
        size = len(buffer)
        with self._lock:
            self._left += size
            if len(self._kept[size]) < KEPT_BUFFERS:
                self._kept[size].append(buffer)

    def statistics(self) -> dict[str, int]:
        """Bytes in use, and their bound."""
        return {
            "draft_bytes": self._bytes_max - self._left, "draft_bytes_max": self._bytes_max,
        }  # fmt: skip


class Room:
    """Memory and spool of all drafts."""

    def __init__(self, directory: Path, memory: Memory) -> None:
        self.memory = memory
        self._directory = directory
        self._spool: Spool | None = None
        self._lock = threading.Lock()
        self._regions = 0

    def take_region(self) -> int:
        """A region of the spool; NoSpaceForImage."""
        disk = os.statvfs(self._directory)
        free = disk.f_bavail * disk.f_frsize
        with self._lock:
            held = self._regions * PIECE_BYTES
            if held + PIECE_BYTES > SPOOL_BYTES_MAX or free - PIECE_BYTES < SPOOL_FREE_MIN:
                raise NoSpaceForImage(
                    f"files being written hold {held} bytes of {self._directory}, which has {free} "
                    "free: make room there, or write fewer at a time"
                )
            if self._spool is None:
                self._spool = Spool(self._directory, PIECE_BYTES)
            self._regions += 1
            return self._spool.take()

    def give_region(self, region: int) -> None:
        """Let another piece have *region*."""
        with self._lock:
            assert self._spool is not None
            self._spool.give_back(region)
            self._regions -= 1

    def write(self, region: int, offset: int, data: bytes | memoryview, size: int) -> None:
        """As Spool.write."""
        with self._lock:
            assert self._spool is not None
            self._spool.write(region, offset, data, size)

    def read(self, region: int, offset: int, size: int) -> bytes:
        """As Spool.read."""
        with self._lock:
            assert self._spool is not None
            return self._spool.read(region, offset, size)

    def close(self) -> None:
        """Let go of the spool."""
        with self._lock:
            if self._spool is not None:
                self._spool.close()
                self._spool = None


@dataclass(slots=True)
class Piece:
    """Bytes of one block of a draft: in a buffer or in a region; what follows *used* is zeros."""

    buffer: memoryview | None = None
    region: int | None = None
    used: int = 0


@dataclass(eq=False)
class Draft:
    """One file being written; made by Files. Its name and attributes belong to Files' lock."""

    ino: Ino
    parent: Ino
    name: bytes | None  # None: unlinked
    writer: int  # the process that sees it by name
    mode: int
    uid: int
    gid: int
    retention: int
    room: Room
    load: Load
    base: FileRow | None = None  # whose bytes it has where it was not written
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    mtime_ns: int | None = None  # as set; else the time of its last write
    size: int = 0
    changes: int = 0  # writes, truncations, attributes
    writers: int = 0  # open descriptions that may write
    readers: int = 0
    born_s: float = field(default_factory=time.monotonic)
    written_ns: int = field(default_factory=time.time_ns)
    stored: Any = None  # a put whose blocks are written: Files'
    stored_at: int = -1  # the number of changes that are in it
    finished: bool = False  # published or dropped
    lock: Any = field(default_factory=threading.RLock)
    pieces: dict[int, Piece] = field(default_factory=dict)
    _base_size: int = 0  # bytes of the base that still count

    def __post_init__(self) -> None:
        if self.base is not None:
            self.size = self._base_size = self.base.size

    @property
    def wanted(self) -> bool:
        """Whether there is anything to publish: it is new, or was changed."""
        return self.name is not None and (self.base is None or self.changes > 0)

    def row(self) -> FileRow:
        """The row that it would be published with."""
        mtime = self.written_ns if self.mtime_ns is None else self.mtime_ns
        return FileRow(
            self.ino, self.parent, self.name or b"", self.mode, self.uid, self.gid, self.size,
            blocks_of(self.mode, self.size), 0, mtime, self.written_ns, self.retention,
            dict(self.xattrs),
        )  # fmt: skip

    def touch(self) -> None:
        """Note a change of attributes."""
        self.changes += 1

    # Bytes

    def write_quickly(self, offset: int, data: bytes | memoryview) -> bool:
        """As write, if that waits for nothing; else False, and nothing is done."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            first, last = offset // PIECE_BYTES, (offset + len(data) - 1) // PIECE_BYTES
            quick = all(self._is_quick(index) for index in range(first, last + 1))
            return quick and self._write(offset, data, anyway=False)
        finally:
            self.lock.release()

    def _is_quick(self, index: int) -> bool:
        piece = self.pieces.get(index)
        if piece is None:
            return index * PIECE_BYTES >= self._base_size
        return piece.region is None

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write at any *offset*; FileTooLarge, NoSpaceForImage, NotSupported."""
        with self.lock:
            self._write(offset, data, anyway=True)

    def _write(self, offset: int, data: bytes | memoryview, *, anyway: bool) -> bool:
        """Write; without *anyway* False if memory is full, having written a part: harmless."""
        end = offset + len(data)
        self._check_size(end, offset)
        view, at = memoryview(data), offset
        while at < end:
            index, within = divmod(at, PIECE_BYTES)
            part = min(PIECE_BYTES - within, end - at)
            if not self._write_piece(index, within, view[at - offset :][:part], anyway=anyway):
                return False
            at += part
        self.size = max(self.size, end)
        self.changes += 1
        self.written_ns = time.time_ns()
        self.mtime_ns = None
        return True

    def _check_size(self, end: int, start: int) -> None:
        if end > FILE_BYTES_MAX:
            raise FileTooLarge(f"a file of {end} bytes: files here have at most {FILE_BYTES_MAX}")
        if start - self.size > SPARSE_BYTES_MAX:
            raise NotSupported(
                f"{start - self.size} bytes of zeros that are not written: files here are written "
                "once, from end to end; use a local filesystem for large sparse files"
            )
        if self._base_size > REWRITE_BYTES_MAX:
            raise NotSupported(
                f"a file of {self._base_size} bytes is not changed in part: write it anew"
            )

    def _write_piece(self, index: int, within: int, data: memoryview, *, anyway: bool) -> bool:
        piece = self._piece(index, within + len(data), anyway=anyway)
        if piece is None:
            return False
        if piece.region is not None:
            self.room.write(piece.region, within, data, piece.used)
        else:
            assert piece.buffer is not None
            if within > piece.used:
                piece.buffer[piece.used : within] = bytes(within - piece.used)
            piece.buffer[within : within + len(data)] = data
        piece.used = max(piece.used, within + len(data))
        return True

    def _piece(self, index: int, size: int, *, anyway: bool) -> Piece | None:
        """The piece *index*, with room for *size* bytes; None: no memory, and not *anyway*."""
        piece = self.pieces.get(index)
        if piece is None:
            piece = Piece()
            if index * PIECE_BYTES < self._base_size:
                assert self.base is not None
                old = self.load(self.base, index)[: self._base_size - index * PIECE_BYTES]
                self._grow(piece, max(size, len(old)), anyway=True)
                self._fill(piece, old)
            elif not self._grow(piece, size, anyway=anyway):
                return None
            self.pieces[index] = piece
        elif not self._grow(piece, size, anyway=anyway):
            return None
        return piece

    def _fill(self, piece: Piece, data: memoryview) -> None:
        if piece.region is not None:
            self.room.write(piece.region, 0, data, 0)
        else:
            assert piece.buffer is not None
            piece.buffer[: len(data)] = data
        piece.used = len(data)

    def _grow(self, piece: Piece, size: int, *, anyway: bool) -> bool:
        """Make room for *size* bytes of the file; a row may follow them."""
        wanted = SMALL_BYTES if size <= SMALL_PIECE else PAYLOAD_BYTES_MAX
        if piece.region is not None or (piece.buffer is not None and len(piece.buffer) >= wanted):
            return True
        buffer, old = self.room.memory.take(wanted), piece.buffer
        if buffer is None and not anyway:
            return False
        if buffer is None:
            piece.region = self.room.take_region()
            if old is not None:
                self.room.write(piece.region, 0, old[: piece.used], 0)
        elif old is not None:
            buffer[: piece.used] = old[: piece.used]
        piece.buffer = buffer
        if old is not None:
            self.room.memory.give_back(old)
        return True

    def truncate(self, size: int) -> None:
        """Make it *size* bytes long; new ones are zeros. As write."""
        with self.lock:
            self._check_size(size, size)
            self._base_size = min(self._base_size, size)
            last, within = divmod(size, PIECE_BYTES)
            for index in [
                each for each in self.pieces if each > last or (each == last and not within)
            ]:
                self._release(self.pieces.pop(index))
            if last in self.pieces:
                self.pieces[last].used = min(self.pieces[last].used, within)
            self.size = size
            self.changes += 1
            self.written_ns = time.time_ns()
            self.mtime_ns = None

    def read(self, offset: int, size: int) -> bytes:
        """Return what was written so far; what was not is zeros, or the base's."""
        with self.lock:
            end = min(offset + size, self.size)
            parts, at = [], offset
            while at < end:
                index, within = divmod(at, PIECE_BYTES)
                part = min(PIECE_BYTES - within, end - at)
                parts.append(self._read_piece(index, within, part))
                at += part
            return b"".join(parts)

    def _read_piece(self, index: int, within: int, size: int) -> bytes:
        piece, found = self.pieces.get(index), b""
        if piece is not None and within < piece.used:
            count = min(size, piece.used - within)
            if piece.region is not None:
                found = self.room.read(piece.region, within, count)
            else:
                assert piece.buffer is not None
                found = bytes(piece.buffer[within : within + count])
        elif piece is None and index * PIECE_BYTES + within < self._base_size:
            assert self.base is not None
            most = self._base_size - index * PIECE_BYTES
            found = bytes(self.load(self.base, index)[within : min(within + size, most)])
        return found.ljust(size, b"\0")

    @contextmanager
    def payload(self, index: int, size: int, tail: bytes) -> Iterator[memoryview]:
        """Piece *index* in aligned memory: *size* bytes, and then *tail*. Hold the lock."""
        piece = self.pieces.get(index)
        buffer = None if piece is None else piece.buffer
        mine = buffer is None or len(buffer) < size + len(tail)
        if mine:
            wanted = SMALL_BYTES if size <= SMALL_PIECE else PAYLOAD_BYTES_MAX
            fresh = self.room.memory.take(wanted, anyway=True)
            assert fresh is not None
            fresh[:size] = self._read_piece(index, 0, size)
            buffer = fresh
        elif piece is not None and buffer is not None and piece.used < size:
            buffer[piece.used : size] = bytes(size - piece.used)
        assert buffer is not None
        try:
            buffer[size : size + len(tail)] = tail
            yield buffer
        finally:
            if mine:
                self.room.memory.give_back(buffer)

    def _release(self, piece: Piece) -> None:
        if piece.buffer is not None:
            self.room.memory.give_back(piece.buffer)
        if piece.region is not None:
            self.room.give_region(piece.region)

    def release(self) -> None:
        """Let go of all bytes; idempotent."""
        with self.lock:
            self.finished = True
            pieces, self.pieces = self.pieces, {}
            for piece in pieces.values():
                self._release(piece)


def copied(xattrs: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The attributes of a file, to be changed."""
    return dict(xattrs)

"""Huge-page, 4 KiB-aligned memory for device I/O: private, or shared between daemon and client.

An arena never grows: what does not fit waits until a piece comes back. Not for memory that the
engine owns. Thread-safe.
"""

import ctypes
import fcntl
import mmap
import os
import time
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Any, Final, Self

from twfs.checksums import address_of, flat_bytes, loaded_torch
from twfs.errors import InvalidInput, TooLarge
from twfs.units import ByteCount, align_up

HUGE_BYTES: Final = 2 << 20
HUGETLB: Final = "hugetlb"
TRANSPARENT: Final = "transparent huge"
SMALL: Final = "4 KiB"
MEMFD_NAME: Final = "twfs-arena"
MEMFD_HUGETLB_NAME: Final = "twfs-arena-hugetlb"  # how of_descriptor recognises them
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
HOST_REGISTER_PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for every GPU
_THP: Final = Path("/sys/kernel/mm/transparent_hugepage")


class Piece:
    """A part of an arena, from take until release; a context manager."""

    __slots__ = ("_arena", "byte_count", "offset", "view")

    def __init__(self, arena: "Arena", offset: int, byte_count: int) -> None:
        self._arena: Arena | None = arena
        self.offset = offset
        self.byte_count = byte_count
        self.view = arena.view[offset : offset + byte_count]

    @property
    def arena(self) -> "Arena | None":
        """Whose part it is, None once it was released."""
        return self._arena

    def release(self) -> None:
        """Give the piece back; the second call does nothing."""
        arena, self._arena = self._arena, None
        if arena is not None:
            arena._give_back(self.offset, align_up(self.byte_count))  # noqa: SLF001

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Arena:
    """One mapping, cut first-fit into pieces; make it with private, shared or of_descriptor."""

    def __init__(self, mapping: mmap.mmap, start: int, byte_count: int, pages: str) -> None:
        self._map = mapping
        self.view = memoryview(mapping)[start : start + byte_count]
        self.byte_count = ByteCount(byte_count)
        self.address = address_of(flat_bytes(self.view))
        self.pages = pages
        self.fd: int | None = None
        self._changed = Condition()
        self._free = [(0, byte_count)]  # (offset, byte count), by offset, never adjacent
        self._in_use_bytes = 0
        self._in_use_bytes_most = 0
        self._pieces = 0
        self._taken = 0
        self._waits = 0
        self._timeouts = 0
        self._pinned = False
        self._closed = False

    @classmethod
    def private(cls, byte_count: int) -> "Arena":
        """Map *byte_count* bytes (rounded up to 4 KiB) that only this process sees."""
        size = _checked(byte_count)
        mapping = mmap.mmap(
            -1, size + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # without MAP_PRIVATE it would be shared memory, which gets no huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        pages = TRANSPARENT if _chosen("enabled") in {"always", "madvise"} else SMALL
        return cls(mapping, -address % HUGE_BYTES, size, pages)

    @classmethod
    def shared(cls, byte_count: int, *, hugetlb: bool = False) -> "Arena":
        """Make a sealed memfd of *byte_count* bytes (rounded up) and map it.

        With *hugetlb* it comes from the kernel's pool of huge pages if that has room; `pages`
        tells what it became. TooLarge if the process may not have it.
        """
        size = _checked(byte_count)
        if hugetlb:
            arena = cls._shared_hugetlb(-(-size // HUGE_BYTES) * HUGE_BYTES)
            if arena is not None:
                return arena
        try:
            return cls._of_memfd(MEMFD_NAME, size, 0)
        except OSError as error:
            raise TooLarge(
                f"an arena of {size} bytes cannot be had: {error.strerror}; ask for less, or lift "
                "the limits of the daemon (ulimit -n, -v)"
            ) from error

    @classmethod
    def _shared_hugetlb(cls, size: int) -> "Arena | None":
        """Take *size* bytes from the pool of huge pages, or return None if it lacks the room."""
        try:
            return cls._of_memfd(MEMFD_HUGETLB_NAME, size, os.MFD_HUGETLB)
        except OSError:  # mapping reserves the pages, so that no later touch can fail
            return None

    @classmethod
    def _of_memfd(cls, name: str, size: int, flags: int) -> "Arena":
        """Make, seal and map a memfd."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
            return cls.of_descriptor(fd, size)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def of_descriptor(cls, fd: int, byte_count: int) -> "Arena":
        """Map another process's arena of *byte_count* bytes; *fd* is closed with the arena.

        InvalidInput, with *fd* left to the caller, if it has another size or could be made
        smaller or larger under the mapping.
        """
        size = os.fstat(fd).st_size
        if size != byte_count:
            raise InvalidInput(f"the arena's descriptor has {size} bytes, not {byte_count}")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise InvalidInput("the arena's descriptor is no memfd") from error
        if seals & SEALS != SEALS:
            raise InvalidInput(f"the arena's descriptor has seals {seals:#x}: it could shrink")
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        pages = _shared_pages(fd)
        if pages == TRANSPARENT:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        arena = cls(mapping, 0, size, pages)
        arena.fd = fd
        return arena

    def take(self, byte_count: int, timeout_s: float | None = None) -> Piece | None:
        """Return a 4 KiB-aligned piece of *byte_count* bytes, the first that fits.

        Waits for one up to *timeout_s* seconds (None: for ever), then returns None. TooLarge if
        the whole arena is smaller.
        """
        wanted = align_up(max(byte_count, 1))
        if wanted > self.byte_count:
            raise TooLarge(f"{byte_count} bytes do not fit the arena of {self.byte_count} bytes")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            waited = False
            while (offset := self._cut(wanted)) is None:
                if not waited:
                    waited = True
                    self._waits += 1
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    self._timeouts += 1
                    return None
                self._changed.wait(left_s)
            return Piece(self, offset, byte_count)

    def _cut(self, wanted: int) -> int | None:
        """Take *wanted* bytes off the first free run that has them; None if there is none."""
        if self._closed:
            raise InvalidInput("the arena is closed")
        for index, (offset, length) in enumerate(self._free):
            if length >= wanted:
                if length == wanted:
                    del self._free[index]
                else:
                    self._free[index] = (offset + wanted, length - wanted)
                self._in_use_bytes += wanted
                self._in_use_bytes_most = max(self._in_use_bytes_most, self._in_use_bytes)
                self._pieces += 1
                self._taken += 1
                return offset
        return None

    def _give_back(self, offset: int, length: int) -> None:
        """Return a run to the free ones, joined with its neighbours."""
        with self._changed:
            self._in_use_bytes -= length
            self._pieces -= 1
            at = bisect_left(self._free, (offset, 0))
            if at < len(self._free) and offset + length == self._free[at][0]:
                length += self._free.pop(at)[1]
            if at and sum(self._free[at - 1]) == offset:
                at -= 1
                before = self._free.pop(at)
                offset, length = before[0], before[1] + length
            self._free.insert(at, (offset, length))
            self._changed.notify_all()

    @property
    def pieces(self) -> int:
        """Pieces that are out."""
        return self._pieces

    def pin(self) -> bool:
        """Pin the arena for asynchronous copies to any GPU; False if there is no CUDA to do it."""
        torch = loaded_torch()
        if self._pinned or torch is None or not torch.cuda.is_available():
            return self._pinned
        status = torch.cuda.cudart().cudaHostRegister(
            self.address, int(self.byte_count), HOST_REGISTER_PORTABLE
        )
        self._pinned = int(status) == 0
        return self._pinned

    def statistics(self) -> dict[str, Any]:
        """Counters and gauges; bytes are rounded up to 4 KiB per piece."""
        with self._changed:
            return {
                "byte_count": int(self.byte_count),
                "pages": self.pages,
                "pinned": self._pinned,
                "in_use_bytes": self._in_use_bytes,
                "in_use_bytes_most": self._in_use_bytes_most,
                "pieces": self._pieces,
                "taken": self._taken,
                "waits": self._waits,
                "timeouts": self._timeouts,
            }

    def close(self) -> None:
        """Refuse further pieces and unmap; memory of a piece still out lives until it is dropped.

        Idempotent.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        if self._pinned:
            loaded_torch().cuda.cudart().cudaHostUnregister(self.address)
            self._pinned = False
        with suppress(BufferError):  # a view is still out: the mapping goes with the last of them
            self.view.release()
            self._map.close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _checked(byte_count: int) -> int:
    """Return *byte_count* rounded up to 4 KiB; InvalidInput unless it is positive."""
    if byte_count < 1:
        raise InvalidInput(f"an arena of {byte_count} bytes holds nothing: give at least 4096")
    return align_up(byte_count)


def _chosen(setting: str) -> str:
    """Return the bracketed word of a transparent_hugepage setting, "never" if there is none."""
    try:
        words = (_THP / setting).read_text().split()
    except OSError:
        return "never"
    return next((word.strip("[]") for word in words if word.startswith("[")), "never")


def _shared_pages(fd: int) -> str:
    """Say what memory pages a memfd of ours has."""
    if MEMFD_HUGETLB_NAME in os.readlink(f"/proc/self/fd/{fd}"):  # noqa: PTH115
        return HUGETLB
    advised = _chosen("shmem_enabled") in {"always", "within_size", "advise", "force"}
    return TRANSPARENT if advised else SMALL

"""One open device: claimed, read and written with O_DIRECT, flushed, and its superblock checked.

All calls block and are thread-safe. It knows superblocks, but nothing of blocks or free space.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np

from twfs.devices.formatting import (
    BLKDISCARD,
    DeviceSpec,
    claim,
    format_device,
    inspect,
    read_superblock,
    refusal,
    refuses_writes,
    superblock_at,
    usable_bytes,
)
from twfs.errors import (
    DeviceError,
    InvalidInput,
    ReadOnly,
    TooLarge,
    TruncatedDevice,
    WrongDevice,
)
from twfs.records import DATA_START, FORMAT_VERSION, ROSTER_BYTES, ROSTER_STARTS, Superblock
from twfs.units import (
    ALIGN,
    IO_BYTES_MAX,
    ByteCount,
    ByteOffset,
    DeviceIndex,
    is_aligned,
)

__all__ = ["Device", "DeviceSpec", "DeviceStatistics", "format_device", "identify", "inspect"]

VECTORS_MAX: Final = 1000  # buffers of one preadv; the kernel's IOV_MAX is 1024
KEEP_SIZE: Final = 1  # of fallocate(2), as the next
ZERO_RANGE: Final = 16
FALLOCATE: Final = ctypes.CDLL(None, use_errno=True).fallocate
FALLOCATE.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
REFUSALS: Final = frozenset({errno.EROFS, errno.EPERM, errno.EACCES})  # of a read-only device


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """What went through one Device since it was opened. Counts are calls, not system calls."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    flushes: int = 0
    discards: int = 0
    errors: int = 0
    in_flight: int = 0


class Device:
    """One claimed, open device of a warehouse. Make it with `Device.open`; thread-safe."""

    def __init__(
        self, path: Path, descriptor: int, superblock: Superblock, notes: list[str],
        *, is_block: bool, read_only: bool,
    ) -> None:  # fmt: skip
        """Own *descriptor*, which has been claimed and proved to be *superblock*'s device."""
        self.path = path
        self.superblock = superblock
        self.uuid = superblock.device
        self.index = superblock.index
        self.size_bytes = superblock.size_bytes
        self.is_block = is_block
        self.read_only = read_only
        self.notes = notes
        self._descriptor = descriptor
        self._idle = threading.Condition()  # guards what follows
        self._closed = False
        self._failed_flush = ""
        self._given_up = ""
        self._begun: dict[int, float] = {}  # I/O in flight: by ticket, when it began (monotonic)
        self._tickets = 0
        self._bad_writes = 0  # in a row
        self._refused = ""
        self._counts = DeviceStatistics()

    @classmethod
    def open(
        cls, path: Path, *, warehouse: UUID, device: UUID, index: DeviceIndex,
        read_only: bool = False, either_copy: bool = False,
    ) -> "Device":  # fmt: skip
        """Claim the device at *path*, which must be number *index*, *device*, of *warehouse*.

        One bad superblock copy is said in `notes`; with *either_copy* also if it is another
        device's, for who is going to mend it. WrongDevice, NotAllowed, WarehouseBusy,
        CorruptSuperblock, FormatTooNew or TruncatedDevice if it is not what was asked for.
        """
        descriptor, is_block = claim(path, read_only=read_only)
        try:
            notes: list[str] = []
            read_only = read_only or (is_block and refuses_writes(descriptor))
            superblock = read_superblock(path, descriptor, notes)
            last = superblock_at(descriptor, max(usable_bytes(descriptor) - ALIGN, 0))
            if either_copy and isinstance(last, Superblock) and (
                last.warehouse, last.device, last.index, last.version
            ) == (warehouse, device, index, FORMAT_VERSION):  # fmt: skip
                superblock = last
            found = (superblock.warehouse, superblock.device, superblock.index)
            if found != (warehouse, device, index):
                raise WrongDevice(
                    f"{path} is device {found[2]} ({found[1]}) of warehouse {found[0]}, and not "
                    f"device {index} ({device}) of warehouse {warehouse}: correct the path"
                )
            held = os.lseek(descriptor, 0, os.SEEK_END)
            if held < superblock.size_bytes:
                raise TruncatedDevice(
                    f"{path} has {held} bytes, and its superblock says {superblock.size_bytes}: "
                    "restore the device, or create the warehouse anew"
                )
            last_offset = superblock.size_bytes - ALIGN
            if not notes and superblock_at(descriptor, last_offset) != superblock:
                notes.append(f"last superblock copy, at offset {last_offset}, is corrupt")
            return cls(path, descriptor, superblock, notes, is_block=is_block, read_only=read_only)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def data_area(self) -> tuple[ByteOffset, ByteCount]:
        """Offset and length of what blocks may take: all between the superblocks."""
        start = self.superblock.data_start
        return start, ByteCount(self.size_bytes - ALIGN - start)

    def superblocks(self) -> tuple[Superblock | str, Superblock | str]:
        """Read both copies, first and last; a str says what is wrong with one."""
        with self._using("read") as descriptor:
            return (
                superblock_at(descriptor, 0),
                superblock_at(descriptor, self.size_bytes - ALIGN),
            )

    def mend_superblocks(self) -> list[str]:
        """Write the copy that was found good over one that differs, durable; names of those.

        DeviceError, ReadOnly.
        """
        mended = []
        for which, offset in (("first", 0), ("last", self.size_bytes - ALIGN)):
            with mmap.mmap(-1, ALIGN) as packed, self._using("write") as descriptor:
                if superblock_at(descriptor, offset) == self.superblock:
                    continue
                packed[:] = self.superblock.pack()
                with memoryview(packed) as view:
                    self._transfer(os.pwritev, "write", descriptor, [view], offset)
            self.flush()
            mended.append(which)
        return mended

    def read_into(self, buffers: Sequence[memoryview], offset: ByteOffset) -> None:
        """Fill *buffers*, one after the other, with what is on the device from *offset* on.

        Offset, every length and every address must be multiples of 4 KiB, else InvalidInput.
        DeviceError if not every byte came.
        """
        views, total = self._checked(buffers, offset, 0, self.size_bytes)
        if any(view.readonly for view in views):
            raise InvalidInput("a buffer to read into is read-only")
        with self._using("read") as descriptor:
            self._transfer(os.preadv, "read", descriptor, views, offset)
        self._count(reads=1, read_bytes=total)

    def write_from(self, buffers: Sequence[memoryview], offset: ByteOffset) -> None:
        """Write *buffers*, one after the other, to *offset* on, inside the data area.

        Alignment and errors as with read_into; ReadOnly if it was opened so. Durable only after
        the next flush.
        """
        start, length = self.data_area
        views, total = self._checked(buffers, offset, start, start + length)
        with self._using("write") as descriptor:
            self._transfer(os.pwritev, "write", descriptor, views, offset)
        self._count(writes=1, written_bytes=total)

    def read_roster(self, buffer: memoryview, place: int) -> None:
        """Fill *buffer* (ROSTER_BYTES) with what lies in one of the two places for a roster."""
        self.read_into([buffer[:ROSTER_BYTES]], ROSTER_STARTS[place])

    def write_roster(self, buffer: memoryview, place: int) -> None:
        """Write *buffer* (aligned, at most ROSTER_BYTES) to one of the two places; not flushed."""
        start = ROSTER_STARTS[place]
        views, total = self._checked([buffer], start, start, start + ROSTER_BYTES)
        with self._using("write") as descriptor:
            self._transfer(os.pwritev, "write", descriptor, views, start)
        self._count(writes=1, written_bytes=total)

    def _checked(
        self, buffers: Sequence[memoryview], offset: int, low: int, high: int
    ) -> tuple[list[memoryview], int]:
        """The buffers as bytes, and their length; InvalidInput on any misalignment.

        The kernel does not reject every misaligned address: it has been seen to write beside it.
        """
        if not is_aligned(offset):
            raise InvalidInput(f"offset {offset} is not a multiple of {ALIGN}")
        views = []
        for buffer in buffers:
            if not buffer.c_contiguous or not buffer.nbytes or not is_aligned(buffer.nbytes):
                raise InvalidInput(
                    f"a buffer of {buffer.nbytes} bytes: a contiguous multiple of {ALIGN} is needed"
                )
            view = buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")
            address = int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
            if not is_aligned(address):
                raise InvalidInput(f"a buffer at address {address:#x}: not a multiple of {ALIGN}")
            views.append(view)
        total = sum(view.nbytes for view in views)
        if not views or offset < low or offset + total > high:
            raise InvalidInput(
                f"{total} bytes at offset {offset} of {self.path}: only {low} to {high} may be used"
            )
        return views, total

    def _transfer(
        self, call: Callable[[int, list[memoryview], int], int], verb: str, descriptor: int,
        views: list[memoryview], offset: int,
    ) -> None:  # fmt: skip
        """Read or write all of *views*. Python itself goes on after EINTR."""
        waiting = [
            view[at : at + IO_BYTES_MAX]
            for view in views
            for at in range(0, view.nbytes, IO_BYTES_MAX)
        ]
        waiting.reverse()
        while waiting:
            batch: list[memoryview] = []
            asked = 0
            while waiting and len(batch) < VECTORS_MAX:
                if batch and asked + waiting[-1].nbytes > IO_BYTES_MAX:
                    break
                asked += waiting[-1].nbytes
                batch.append(waiting.pop())
            try:
                done = call(descriptor, batch, offset)
            except OSError as error:
                raise self._failed(verb, offset, asked, str(error.strerror)) from error
            if not done or not is_aligned(done):
                raise self._failed(verb, offset, asked, f"only {done} bytes were done")
            offset += done
            waiting.extend(reversed(_rest(batch, done)))

    def _failed(self, verb: str, offset: int, length: int, why: str) -> DeviceError:
        return DeviceError(f"{verb} of {length} bytes at offset {offset} of {self.path}: {why}")

    @contextmanager
    def _using(self, purpose: str) -> Iterator[int]:
        """Lend the descriptor; close() waits until all are back, so that no number is reused."""
        with self._idle:
            if self._closed or self._given_up:
                raise DeviceError(f"{self.path} {self._given_up or 'has been closed'}")
            if purpose == "write" and self.read_only:
                raise ReadOnly(f"{self.path} was opened for reading only")
            if purpose != "read" and self._failed_flush:
                raise DeviceError(
                    f"{self.path} takes no more writes: {self._failed_flush}; a failed flush is "
                    "final, so check the drive and restart the daemon"
                )
            self._counts = replace(self._counts, in_flight=self._counts.in_flight + 1)
            self._tickets += 1
            ticket = self._tickets
            self._begun[ticket] = time.monotonic()
        try:
            yield self._descriptor
            self._judge_writes(purpose, None)
        except DeviceError as error:
            self._count(errors=1)
            self._judge_writes(purpose, error)
            raise
        finally:
            with self._idle:
                del self._begun[ticket]
            self._count(in_flight=-1)

    def _judge_writes(self, purpose: str, error: DeviceError | None) -> None:
        """Note how a write ended; why_no_writes and bad_writes tell."""
        if purpose != "write":
            return
        with self._idle:
            self._bad_writes = 0 if error is None else self._bad_writes + 1
            cause = None if error is None else error.__cause__
            if isinstance(cause, OSError) and cause.errno in REFUSALS:
                self._refused = f"it refuses writes: {cause.strerror}"

    @property
    def bad_writes(self) -> int:
        """Writes that failed since the last one that did not."""
        return self._bad_writes

    @property
    def why_no_writes(self) -> str:
        """Why it takes no more writes, in words; empty if it does."""
        opened = "it is read-only" if self.read_only else ""
        return self._failed_flush or self._refused or opened

    @property
    def failed_flush(self) -> bool:
        """Whether a flush failed: final for this Device."""
        return bool(self._failed_flush)

    @property
    def in_flight_s(self) -> float:
        """For how many seconds the oldest I/O under way has been."""
        with self._idle:
            return time.monotonic() - min(self._begun.values()) if self._begun else 0.0

    def give_up(self, why: str) -> None:
        """Refuse all calls from now on; what is under way ends when the kernel ends it."""
        with self._idle:
            self._given_up = why

    def idle(self) -> bool:
        """Tell whether no I/O is under way."""
        with self._idle:
            return not self._begun

    def stranger(self) -> str:
        """Why this is not, or no longer, the device that was opened, in words; empty if it is.

        Blocks: one copy of the superblock must be readable, and its own.
        """
        try:
            with self._using("read") as descriptor:
                held = usable_bytes(descriptor)
            if held < self.size_bytes:
                return f"it has {held} bytes and had {self.size_bytes}"
            copies = self.superblocks()
        except (DeviceError, OSError) as error:
            return str(error)
        for copy in copies:
            if isinstance(copy, Superblock):
                own = (copy.warehouse, copy.device) == (self.superblock.warehouse, self.uuid)
                return "" if own else f"it is device {copy.device} of warehouse {copy.warehouse}"
        return f"its superblock cannot be read: {copies[0]}"

    def wipe(self) -> None:
        """Overwrite superblocks and rosters: the device is nobody's then. Blocks; DeviceError."""
        zeros = memoryview(mmap.mmap(-1, DATA_START))
        with self._using("write") as descriptor:
            last = self.size_bytes - ALIGN
            self._transfer(os.pwritev, "write", descriptor, [zeros[:ALIGN]], last)
            self._transfer(os.pwritev, "write", descriptor, [zeros], 0)
        self.flush()

    def _count(self, **more: int) -> None:
        """Add to the counters."""
        with self._idle:
            counts = {name: getattr(self._counts, name) + number for name, number in more.items()}
            self._counts = replace(self._counts, **counts)
            self._idle.notify_all()

    def flush(self) -> None:
        """Make all finished writes durable.

        DeviceError if the drive refuses; the next flush may then succeed without the data being
        there, so this Device writes and flushes no more.
        """
        with self._using("flush") as descriptor:
            try:
                os.fdatasync(descriptor)
            except OSError as error:
                text = f"flush of {self.path} failed: {error.strerror}"
                with self._idle:
                    self._failed_flush = text
                raise DeviceError(text) from error
        self._count(flushes=1)

    def discard(self, offset: ByteOffset, length: ByteCount) -> bool:
        """Tell the drive that a range of the data area holds nothing; True if it took the hint.

        Image files are left alone: their blocks must stay allocated, or a later write could find
        the filesystem full.
        """
        start, area = self.data_area
        if not (is_aligned(offset) and is_aligned(length) and length > 0):
            raise InvalidInput(f"discard of {length} bytes at {offset}: multiples of {ALIGN} only")
        if offset < start or offset + length > start + area:
            raise InvalidInput(f"discard of {length} bytes at {offset} leaves the data area")
        if not self.is_block:
            return False
        with self._using("write") as descriptor:
            try:
                fcntl.ioctl(descriptor, BLKDISCARD, struct.pack("=QQ", offset, length))
            except OSError:
                return False
        self._count(discards=1)
        return True

    def clear(self, offset: ByteOffset, length: ByteCount) -> bool:
        """Let a range of the data area read as zeros, or whatever the drive makes of a discard.

        An image file keeps its blocks allocated. False if that cannot be done: overwrite it then.
        """
        if self.is_block:
            return self.discard(offset, length)
        with self._using("write") as descriptor:
            done: int = FALLOCATE(descriptor, ZERO_RANGE | KEEP_SIZE, offset, length)
        self._count(discards=done == 0)
        return done == 0

    def open_for_reader(self) -> int:
        """Return a fresh read-only O_DIRECT descriptor, for the caller to pass on and close.

        Never a duplicate of the claiming one, which would keep the claim after our death.
        WrongDevice if the path names another device by now; TooLarge without descriptors to spare.
        """
        with self._using("read") as descriptor:
            try:
                fresh = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE}:
                    raise TooLarge(
                        f"no descriptor is left for {self.path}: raise the limit (ulimit -n; "
                        "systemd: LimitNOFILE=), or close clients"
                    ) from error
                raise refusal(self.path, error) from error
            mine, theirs = os.fstat(descriptor), os.fstat(fresh)
            same = (
                mine.st_rdev == theirs.st_rdev
                if self.is_block
                else (mine.st_dev, mine.st_ino) == (theirs.st_dev, theirs.st_ino)
            )
        if not same or stat.S_ISBLK(theirs.st_mode) != self.is_block:
            os.close(fresh)
            raise WrongDevice(f"{self.path} was replaced while it was open: restart the daemon")
        return fresh

    def statistics(self) -> DeviceStatistics:
        """Counters since the device was opened."""
        with self._idle:
            return self._counts

    def close(self) -> None:
        """Wait for I/O under way, then give up the claim; idempotent."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: not self._counts.in_flight)
        os.close(self._descriptor)
        self._descriptor = -1


def identify(path: Path) -> Superblock:
    """Return the superblock of the device at *path*, from either copy; claims nothing.

    WrongDevice, NotAllowed, CorruptSuperblock, FormatTooNew, FormatTooOld.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise refusal(path, error) from error
    try:
        return read_superblock(path, descriptor, [])
    finally:
        os.close(descriptor)


def _rest(batch: list[memoryview], done: int) -> list[memoryview]:
    """What of *batch* is still to do after *done* bytes."""
    rest = []
    for view in batch:
        if done < view.nbytes:
            rest.append(view[done:])
        done = max(done - view.nbytes, 0)
    return rest

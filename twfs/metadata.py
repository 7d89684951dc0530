"""The only module that knows LMDB: typed tables, short reads, and one writer thread.

Reads are synchronous and take about 2 us a record; they may run in an event loop. Writes are jobs:
functions of a WriteView that touch nothing else, so that they can be run again. The writer thread
runs whatever is queued in one transaction (group commit) and answers once that is durable. There
is no device I/O and no waiting inside a transaction.
"""

import errno
import fcntl
import json
import os
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar
from uuid import UUID

import lmdb  # noqa: TID251
import lmdb.verify  # noqa: TID251

from twfs.errors import (
    CorruptMetadata,
    DeviceError,
    FormatTooNew,
    NoSpaceForImage,
    NoSuchWarehouse,
    NotAllowed,
    WarehouseBusy,
    WarehouseClosed,
)
from twfs.records import FORMAT_VERSION, Extent
from twfs.tables import LENGTH, TABLES, UNREADABLE, DeviceRecord, ReadView, WriteView
from twfs.units import (
    ALIGN,
    ByteCount,
    DeviceIndex,
)

T = TypeVar("T")

JOBS_PER_COMMIT_MAX: Final = 256  # bounds how long the first of them waits for the others
MAP_BYTES: Final = 1 << 40  # address space only; the file grows as it is filled
BACKLOG_MAX: Final = 4096  # jobs queued; more would only hide that the disk is too slow
META_LAST_AND_TXN: Final = struct.Struct("<QQ")
META_LAST_OFFSET: Final = 16 + 24 + 2 * 48  # LMDB 0.9: page header, fixed part, two MDB_db


Job = Callable[[WriteView], T]
After = Callable[[T], None]


@dataclass(slots=True)
class _Queued(Generic[T]):
    """A job on its way: what to run, what to do once it is durable, whom to tell."""

    job: Job[T]
    after: After[T] | None
    future: "Future[T]"
    urgent: bool


class Metadata:
    """The LMDB environment of one warehouse, opened by this process alone. Thread-safe."""

    def __init__(self, directory: Path, lock_fd: int, environment: lmdb.Environment) -> None:
        self.directory = directory
        self._lock_fd = lock_fd
        self._environment = environment
        self._tables: dict[str, Any] = {name: environment.open_db(name.encode()) for name in TABLES}
        self._tables["children"] = environment.open_db(b"children", dupsort=True)
        self._queue: queue.SimpleQueue[_Queued[Any] | None] = queue.SimpleQueue()
        self._backlog = threading.BoundedSemaphore(BACKLOG_MAX)
        self._users = threading.Condition()  # guards the next three
        self._stopping = False  # takes no more jobs
        self._closed = False
        self._reading = 0
        self._commits = 0
        self._jobs = 0
        self._writer = threading.Thread(target=self._write, name="twfs-metadata", daemon=True)
        self._writer.start()

    @classmethod
    def create(
        cls, directory: Path, warehouse: UUID, devices: list[DeviceRecord], free: list[Extent]
    ) -> None:
        """Make the metadata of an empty warehouse; *free* is all that its devices can hold."""
        directory.mkdir(parents=True, exist_ok=True)
        metadata = cls._open(directory, creating=True)

        def fill(view: WriteView) -> None:
            view.set_meta("format_version", LENGTH.pack(FORMAT_VERSION))
            view.set_meta("warehouse", warehouse.bytes)
            view.set_meta("devices", _pack_devices(devices))
            for extent in free:
                view.add_free(extent)
            # 0 is no generation, no inode; 1 is the mount's root.
            for name, first in (("generation", 1), ("ino", 1 << 20), ("model", 1)):
                view.set_counter(name, first)

        try:
            metadata.submit(fill).result()
        finally:
            metadata.close()

    @classmethod
    def open(cls, directory: Path) -> "Metadata":
        """Open existing metadata.

        NoSuchWarehouse, WarehouseBusy, CorruptMetadata (also for a truncated file, before LMDB
        could run into SIGBUS), FormatTooNew, NotAllowed under a limit of address space.
        """
        path = directory / "data.mdb"
        if not path.exists():
            raise NoSuchWarehouse(
                f"{directory.parent} holds no warehouse: make one with `twfs create`"
            )
        metadata = cls._open(directory, creating=False)
        try:
            with metadata.read() as view:
                version = int.from_bytes(view.meta("format_version") or b"", "little")
            if version > FORMAT_VERSION:
                raise FormatTooNew(
                    f"{path} has format version {version}, this twfs knows {FORMAT_VERSION}: "
                    "install a newer twfs"
                )
            if version == 0:
                raise CorruptMetadata(f"{path} names no format version: it is not of twfs")
        except BaseException:
            metadata.close()
            raise
        return metadata

    @classmethod
    def _open(cls, directory: Path, *, creating: bool) -> "Metadata":
        """Lock the directory, look at the file, open it."""
        lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise WarehouseBusy(
                    f"{directory.parent} is open in another process: use its daemon's socket, "
                    "or stop it first"
                ) from error
            if not creating:
                _refuse_truncated(directory / "data.mdb")
                _read_ahead(directory / "data.mdb")
            try:
                environment = lmdb.open(
                    str(directory), map_size=MAP_BYTES, max_dbs=len(TABLES) + 1,
                    lib_version=0, readahead=False, mode=0o600,
                )  # fmt: skip
                return cls(directory, lock_fd, environment)
            except lmdb.MemoryError as error:
                raise NotAllowed(
                    f"LMDB could not map {MAP_BYTES >> 30} GiB of address space, of which it uses "
                    "what it needs: lift the limit on it (ulimit -v unlimited; systemd: LimitAS=) "
                    "and limit memory instead (MemoryMax=)"
                ) from error
            except lmdb.Error as error:
                raise CorruptMetadata(f"{directory / 'data.mdb'} cannot be opened: {error}") from (
                    error
                )
        except BaseException:
            os.close(lock_fd)
            raise

    @contextmanager
    def read(self) -> Iterator[ReadView]:
        """A snapshot for a short look; no waiting inside. WarehouseClosed, CorruptMetadata."""
        with self._users:
            if self._closed:
                raise WarehouseClosed(f"{self.directory.parent} has been closed: open it again")
            self._reading += 1
        view: ReadView | None = None
        try:
            view = ReadView(self._environment.begin(), self._tables)
            yield view
        except lmdb.Error as error:
            raise CorruptMetadata(
                f"{self.directory / 'data.mdb'} cannot be read: {error}; see `twfs check`"
            ) from error
        finally:
            if view is not None:
                view.end()
            with self._users:
                self._reading -= 1
                self._users.notify_all()

    def submit(
        self, job: Job[T], after: After[T] | None = None, *, urgent: bool = False
    ) -> "Future[T]":
        """Queue *job* for the next commit; waits while BACKLOG_MAX are queued. WarehouseClosed.

        Once it is durable *after* is called with its result, in the writer thread and in commit
        order, and then the future ends. A job that raises leaves nothing behind and its future
        has the exception. *job* may be run twice. An *urgent* one never waits: it comes from the
        writer thread itself, or from under a lock that the writer thread takes.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # what is queued cannot be called back
        if not urgent:
            self._backlog.acquire()
        with self._users:
            if not self._stopping:
                self._queue.put(_Queued(job, after, future, urgent))
                return future
        if not urgent:
            self._backlog.release()
        raise WarehouseClosed(f"{self.directory.parent} has been closed: open it again")

    def warehouse(self) -> UUID:
        """The UUID of the warehouse that this metadata is of; CorruptMetadata."""
        with self.read() as view:
            found = view.meta("warehouse") or b""
        if len(found) != 16:
            raise CorruptMetadata(f"the warehouse's UUID has {len(found)} bytes instead of 16")
        return UUID(bytes=found)

    def devices(self) -> list[DeviceRecord]:
        """The devices, by index; CorruptMetadata."""
        with self.read() as view:
            data = view.meta("devices") or b""
        try:
            return _unpack_devices(data)
        except UNREADABLE as error:
            raise CorruptMetadata(f"the list of devices is unreadable: {error}") from error

    def _write(self) -> None:
        """The writer thread: commit whatever is queued, until told to stop."""
        stopping = False
        while not stopping:
            batch: list[_Queued[Any]] = []
            first = self._queue.get()
            while True:
                if first is None:
                    stopping = True
                    break
                batch.append(first)
                if len(batch) == JOBS_PER_COMMIT_MAX:
                    break
                try:
                    first = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch and not self._commit(batch) and len(batch) > 1:
                for queued in batch:
                    self._commit([queued])
            for queued in batch:
                if not queued.urgent:
                    self._backlog.release()

    def _commit(self, batch: "list[_Queued[Any]]") -> bool:
        """Run *batch* in one transaction; False if it was undone and must be run one by one."""
        try:
            with self._environment.begin(write=True) as txn:
                view = WriteView(txn, self._tables)
                results = [queued.job(view) for queued in batch]
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the job's waiter
            if len(batch) == 1:
                batch[0].future.set_exception(_translated(error))
            return False
        self._commits += 1
        self._jobs += len(batch)
        for queued, result in zip(batch, results, strict=True):
            try:
                if queued.after is not None:
                    queued.after(result)
                queued.future.set_result(result)
            except BaseException as error:  # noqa: BLE001 - as above
                queued.future.set_exception(error)
        return True

    def statistics(self) -> dict[str, int]:
        """Commits, jobs in them, bytes of the file, slots of readers in use."""
        size = (self.directory / "data.mdb").stat().st_size
        slots = self._environment.readers().count("\n") - 1  # below a heading, or one line of none
        return {
            "commits": self._commits, "jobs": self._jobs, "file_bytes": size,
            "readers": max(0, slots),
        }  # fmt: skip

    def verify(self) -> list[str]:
        """Problems that LMDB's own offline checker finds, in words."""
        return list(lmdb.verify.verify(str(self.directory)))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Commit what is queued, wait for reads under way, then close; idempotent."""
        with self._users:
            if self._stopping:
                return
            self._stopping = True
            self._queue.put(None)
        self._writer.join()
        with self._users:
            self._closed = True
            self._users.wait_for(lambda: not self._reading)
        self._environment.close()
        os.close(self._lock_fd)


def _pack_devices(devices: list[DeviceRecord]) -> bytes:
    return json.dumps(
        [
            {
                "index": device.index,
                "uuid": str(device.uuid),
                "path": device.path,
                "size_bytes": device.size_bytes,
            }
            for device in devices
        ]
    ).encode()


def _unpack_devices(data: bytes) -> list[DeviceRecord]:
    """Undo _pack_devices; one of UNREADABLE if that did not make *data*."""
    parts = json.loads(data)
    if not parts or type(parts) is not list:
        raise ValueError("it names none")
    found = []
    for number, part in enumerate(parts):
        index, uuid, path, size = (part[name] for name in ("index", "uuid", "path", "size_bytes"))
        kinds = [type(value) for value in (index, uuid, path, size)]
        if kinds != [int, str, str, int] or index != number or "\0" in path:
            raise ValueError(f"row {number} is {part!r:.200}")
        found.append(DeviceRecord(DeviceIndex(index), UUID(uuid), path, ByteCount(size)))
    return found


DAMAGE: Final = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.BadTxnError, lmdb.InvalidError)


def _translated(error: BaseException) -> BaseException:
    """LMDB's errors as ours."""
    if isinstance(error, lmdb.MapFullError):
        return NoSpaceForImage(f"the metadata has reached its limit of {MAP_BYTES} bytes")
    if isinstance(error, DAMAGE):
        return CorruptMetadata(f"the metadata is damaged: {error}; see `twfs check`")
    if isinstance(error, lmdb.Error):
        if os.strerror(errno.ENOSPC) in str(error):
            return NoSpaceForImage(f"the filesystem of the metadata is full: {error}")
        return DeviceError(f"the metadata could not be written: {error}")
    return error


def _refuse_truncated(path: Path) -> None:
    """Raise CorruptMetadata if the file is shorter than its meta records say.

    LMDB maps the file, and touching a page that is not there is SIGBUS: the process is gone.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(2 * ALIGN)
    last = 0
    if len(head) == 2 * ALIGN:
        last = max(
            META_LAST_AND_TXN.unpack_from(head, start + META_LAST_OFFSET)[0] for start in (0, ALIGN)
        )
    if size >= 2 * ALIGN and size >= (last + 1) * ALIGN:
        return
    try:
        problems = lmdb.verify.verify(str(path))  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError as error:
        problems = [str(error)]
    if problems:
        raise CorruptMetadata(
            f"{path} has {size} bytes but names {(last + 1) * ALIGN}: it is truncated "
            f"({problems[0]}); restore it from a copy or create the warehouse anew"
        )


# Reads every row, and begins a change of every tree: all that LMDB would touch.
_SCOUT: Final = """
import sys, lmdb
try:
    env = lmdb.open(sys.argv[1], max_dbs=16, map_size=int(sys.argv[2]), lib_version=0)
    tables = [
        env.open_db(name.encode(), dupsort=name == "children", create=False)
        for name in sys.argv[3:]
    ]
    with env.begin(write=True) as txn:
        for table in tables:
            for row in txn.cursor(db=table):
                pass
        for table in tables:
            txn.put(b"0", b"0", db=table)
        txn.abort()
except (lmdb.MemoryError, lmdb.NotFoundError):
    pass  # no damage: whoever opens it will say what it is
except lmdb.Error as error:
    sys.exit(str(error))
"""


def scout(directory: Path) -> None:
    """Let a child process read and begin to change all tables; CorruptMetadata if it dies of it.

    LMDB ends the process (SIGABRT, SIGSEGV, SIGBUS) on some damage to its pages, and its pages
    have no checksums. Costs about 60 ms and 3 us a row. Says nothing where there is no metadata,
    or somebody else has it open: opening it says that better.
    """
    path = directory / "data.mdb"
    try:
        lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not path.exists():
            return
        _refuse_truncated(path)
        command = [sys.executable, "-c", _SCOUT, str(directory), str(MAP_BYTES)]
        done = subprocess.run(
            [*command, *TABLES, "children"], capture_output=True, text=True, check=False
        )
    finally:
        os.close(lock_fd)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CorruptMetadata(
            f"{path} is damaged: a process that read it ended with {done.returncode} ({said}); the "
            "metadata must be made anew from the devices, or restored from a copy as new as they"
        )


def _read_ahead(path: Path) -> None:
    """Ask the kernel to read the file now: matches touch it all over."""
    with suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

"""The only module that knows LMDB: typed tables, short reads, and one writer thread.

Reads are synchronous and take about 2 us a record; they may run in an event loop. Writes are jobs:
functions of a WriteView that touch nothing else, so that they can be run again. The writer thread
runs whatever is queued in one transaction (group commit) and answers once that is durable. There
is no device I/O and no waiting inside a transaction.

With relaxed durability a commit leaves its meta record to the next commit's sync, so a power cut
may undo the last one. What must not happen before a commit is certain is *settled*: it waits for
the next commit, or for a sync of its own as soon as nothing else is queued.
"""

import errno
import fcntl
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar
from uuid import UUID

import lmdb  # noqa: TID251

from twfs.errors import (
    CorruptMetadata,
    DeviceError,
    FormatTooNew,
    FormatTooOld,
    NoSpaceForImage,
    NoSuchWarehouse,
    NotAllowed,
    WarehouseBusy,
    WarehouseClosed,
)
from twfs.metadata.metafile import MAP_BYTES, read_ahead, refuse_truncated, refuse_unverified
from twfs.metadata.tables import LENGTH, TABLES, DeviceRecord, ReadView, WriteView
from twfs.records import FORMAT_VERSION, Extent
from twfs.secret import SECRET_BYTES, SECRET_FILE
from twfs.store import Durability

T = TypeVar("T")

JOBS_PER_COMMIT_MAX: Final = 256  # bounds how long the first of them waits for the others
FIRST_INO: Final = 1 << 20  # of a block; below are the mount's own
BACKLOG_MAX: Final = 4096  # jobs queued; more would only hide that the disk is too slow


Job = Callable[[WriteView], T]
After = Callable[[T], None]


@dataclass(slots=True)
class _Queued(Generic[T]):
    """A job on its way: what to run, what to do once committed and once settled, whom to tell."""

    job: Job[T]
    after: After[T] | None
    settled: After[T] | None
    future: "Future[T]"
    urgent: bool

    def end(self, then: After[T] | None, result: T) -> None:
        """Do *then* and tell the waiter, or tell it why that failed."""
        try:
            if then is not None:
                then(result)
            self.future.set_result(result)
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the job's waiter
            self.future.set_exception(error)


@dataclass(slots=True)
class _Unsettled(Generic[T]):
    """A job whose commit a power cut may still undo, up to transaction *number*."""

    number: int
    queued: _Queued[T]
    result: T


class Metadata:
    """The LMDB environment of one warehouse, opened by this process alone. Thread-safe."""

    def __init__(
        self, directory: Path, lock_fd: int, environment: lmdb.Environment,
        durability: Durability = Durability.STRICT,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.durability = durability
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
        self._syncs = 0
        self._failed = ""  # a sync that failed is final; the writer thread's, as all below
        self._unsettled: deque[_Unsettled[Any]] = deque()
        self._certain = 0  # no power cut can undo the transactions up to this one
        self._writer = threading.Thread(target=self._write, name="twfs-metadata", daemon=True)
        self._writer.start()

    @classmethod
    def create(
        cls, directory: Path, warehouse: UUID, devices: list[DeviceRecord], free: list[Extent],
        secret: bytes,
    ) -> None:  # fmt: skip
        """Make the metadata of an empty warehouse; *free* is all that its devices can hold."""
        directory.mkdir(parents=True, exist_ok=True)
        metadata = cls._open(directory, creating=True)

        def fill(view: WriteView) -> None:
            view.set_meta("format_version", LENGTH.pack(FORMAT_VERSION))
            view.set_meta("warehouse", warehouse.bytes)
            view.set_meta("secret", secret)
            view.set_meta("roster", LENGTH.pack(0))
            view.set_devices(devices)
            view.set_counter("device", max((device.index for device in devices), default=-1) + 1)
            for extent in free:
                view.add_free(extent)
            # 0 is no generation, no inode; 1 is the mount's root.
            for name, first in (("generation", 1), ("ino", FIRST_INO), ("model", 1)):
                view.set_counter(name, first)

        try:
            metadata.submit(fill).result()
        finally:
            metadata.close()

    @classmethod
    def open(
        cls, directory: Path, durability: Durability = Durability.STRICT, *, verified: bool = False
    ) -> "Metadata":
        """Open existing metadata; *verified*, after LMDB's own verifier has read all of the file.

        NoSuchWarehouse, WarehouseBusy, CorruptMetadata (also for a truncated file, before LMDB
        could run into SIGBUS), FormatTooNew, NotAllowed under a limit of address space. A file
        that is damaged and not verified may end the process: verifying takes about as long as
        reading all records.
        """
        path = directory / "data.mdb"
        if not path.exists():
            if (directory.parent / SECRET_FILE).exists():
                raise NoSuchWarehouse(
                    f"{directory.parent} has lost its metadata: run `twfs rebuild`, or make an "
                    "empty warehouse with `twfs create --force`"
                )
            raise NoSuchWarehouse(
                f"{directory.parent} holds no warehouse: make one with `twfs create`"
            )
        metadata = cls._open(directory, creating=False, durability=durability, verified=verified)
        try:
            with metadata.read() as view:
                version = int.from_bytes(view.meta("format_version") or b"", "little")
            if version > FORMAT_VERSION:
                raise FormatTooNew(
                    f"{path} has format version {version}, this twfs knows {FORMAT_VERSION}: "
                    "install a newer twfs"
                )
            if 0 < version < FORMAT_VERSION:
                raise FormatTooOld(
                    f"{path} has format version {version}, this twfs reads {FORMAT_VERSION} only: "
                    "create the warehouse anew"
                )
            if version == 0:
                raise CorruptMetadata(f"{path} names no format version: it is not of twfs")
        except BaseException:
            metadata.close()
            raise
        return metadata

    @classmethod
    def _open(
        cls, directory: Path, *, creating: bool, durability: Durability = Durability.STRICT,
        verified: bool = False,
    ) -> "Metadata":  # fmt: skip
        """Lock the directory, look at the file, open it."""
        lock_fd = lock_directory(directory)
        try:
            if not creating:
                refuse_truncated(directory / "data.mdb")
                if verified:
                    refuse_unverified(directory / "data.mdb")
                read_ahead(directory / "data.mdb")
            try:
                environment = lmdb.open(
                    str(directory), map_size=MAP_BYTES, max_dbs=len(TABLES) + 1,
                    lib_version=0, readahead=False, mode=0o600,
                    metasync=durability is Durability.STRICT,
                )  # fmt: skip
                environment.sync(force=True)  # a relaxed process may have been killed before it did
                return cls(directory, lock_fd, environment, durability)
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
        self, job: Job[T], after: After[T] | None = None, *, settled: After[T] | None = None,
        urgent: bool = False,
    ) -> "Future[T]":  # fmt: skip
        """Queue *job* for the next commit; waits while BACKLOG_MAX are queued. WarehouseClosed.

        Once it is committed *after* is called with its result, in the writer thread and in commit
        order, and then the future ends. With *settled* it ends later: *settled* is called, also in
        order, once no power cut can undo the commit, which is at once unless durability is relaxed.
        A job that raises leaves nothing behind and its future has the exception. *job* may be run
        twice. An *urgent* one never waits: it comes from the writer thread itself, or from under a
        lock that the writer thread takes.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # what is queued cannot be called back
        if not urgent:
            self._backlog.acquire()
        with self._users:
            if not self._stopping:
                self._queue.put(_Queued(job, after, settled, future, urgent))
                return future
        if not urgent:
            self._backlog.release()
        raise WarehouseClosed(f"{self.directory.parent} has been closed: open it again")

    def settle(self) -> None:
        """Return once no power cut can undo what was committed before. WarehouseClosed."""
        if self.durability is Durability.RELAXED:
            self.submit(_nothing, settled=_nothing).result()

    def warehouse(self) -> UUID:
        """The UUID of the warehouse that this metadata is of; CorruptMetadata."""
        with self.read() as view:
            found = view.meta("warehouse") or b""
        if len(found) != 16:
            raise CorruptMetadata(f"the warehouse's UUID has {len(found)} bytes instead of 16")
        return UUID(bytes=found)

    def secret(self) -> bytes:
        """The warehouse's secret; CorruptMetadata if there is none of its length."""
        with self.read() as view:
            secret = view.meta("secret") or b""
        if len(secret) != SECRET_BYTES:
            raise CorruptMetadata(
                f"{self.directory} holds a secret of {len(secret)} bytes: run `twfs rebuild`"
            )
        return secret

    def devices(self) -> list[DeviceRecord]:
        """The devices, by index; CorruptMetadata."""
        with self.read() as view:
            return view.devices()

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
            oldest = self._unsettled[0] if self._unsettled else None
            if batch and not self._commit(batch) and len(batch) > 1:
                for queued in batch:
                    self._commit([queued])
            # A commit that changed nothing made nothing certain: nobody waits for a third one.
            if self._unsettled and (self._queue.empty() or self._unsettled[0] is oldest):
                self._sync()
            for queued in batch:
                if not queued.urgent:
                    self._backlog.release()
        if self.durability is Durability.RELAXED:
            self._sync()

    def _commit(self, batch: "list[_Queued[Any]]") -> bool:
        """Run *batch* in one transaction; False if it was undone and must be run one by one."""
        try:
            results = self._transact(batch)
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the job's waiter
            if len(batch) == 1:
                batch[0].future.set_exception(_translated(error))
            return False
        self._commits += 1
        self._jobs += len(batch)
        number = int(self._environment.info()["last_txnid"])
        strict = self.durability is Durability.STRICT
        self._settle(number if strict else number - 1)
        for queued, result in zip(batch, results, strict=True):
            if queued.settled is None:
                queued.end(queued.after, result)
                continue
            try:
                if queued.after is not None:
                    queued.after(result)
            except BaseException as error:  # noqa: BLE001 - as above
                queued.future.set_exception(error)
                continue
            if number <= self._certain:
                queued.end(queued.settled, result)
            else:
                self._unsettled.append(_Unsettled(number, queued, result))
        return True

    def _transact(self, batch: "list[_Queued[Any]]") -> list[Any]:
        """Commit *batch* in one transaction and return the results of its jobs."""
        if self._failed:
            raise DeviceError(self._failed)
        results = None
        try:
            with self._environment.begin(write=True) as txn:
                view = WriteView(txn, self._tables)
                results = [queued.job(view) for queued in batch]
        except lmdb.Error as error:
            if results is not None:
                self._note_failure(error)
            raise
        return results

    def _note_failure(self, error: lmdb.Error) -> None:
        """Take no more jobs after a sync that failed, if the commit before relied on it.

        The kernel reports a lost write once. That a later sync succeeds would not mean that the
        last meta record is there, and the transaction after it overwrites what the one before
        that record needs.
        """
        harmless = isinstance(error, lmdb.MapFullError) or os.strerror(errno.ENOSPC) in str(error)
        if self.durability is Durability.RELAXED and not harmless:
            self._failed = (
                f"the metadata could not be synced: {error}; it takes no more changes, so check "
                "the drive and restart the daemon"
            )

    def _sync(self) -> None:
        """Make the last commit certain, and settle all jobs; or tell them that it failed."""
        try:
            if self._failed:
                raise DeviceError(self._failed)
            self._force()
        except (lmdb.Error, DeviceError) as error:
            if isinstance(error, lmdb.Error):
                self._note_failure(error)
            while self._unsettled:
                self._unsettled.popleft().queued.future.set_exception(_translated(error))
            return
        self._settle(int(self._environment.info()["last_txnid"]))

    def _force(self) -> None:
        """Sync the file, meta records and all."""
        self._environment.sync(force=True)
        self._syncs += 1

    def _settle(self, number: int) -> None:
        """Settle the jobs of transactions up to *number*: no power cut undoes them any more."""
        self._certain = max(self._certain, number)
        while self._unsettled and self._unsettled[0].number <= self._certain:
            done = self._unsettled.popleft()
            done.queued.end(done.queued.settled, done.result)

    def statistics(self) -> dict[str, int]:
        """Commits, jobs in them, syncs beside them, bytes of the file, slots of readers in use."""
        size = (self.directory / "data.mdb").stat().st_size
        slots = self._environment.readers().count("\n") - 1  # below a heading, or one line of none
        return {
            "commits": self._commits, "jobs": self._jobs, "syncs": self._syncs,
            "file_bytes": size, "readers": max(0, slots),
        }  # fmt: skip

    def close(self) -> None:
        """Commit what is queued and make it certain, wait for reads, then close; idempotent."""
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


def lock_directory(directory: Path) -> int:
    """Claim the metadata in *directory*; returns a descriptor to be closed. WarehouseBusy."""
    lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_fd)
        raise WarehouseBusy(
            f"{directory.parent} is open in another process: use its daemon's socket, "
            "or stop it first"
        ) from error
    return lock_fd


@contextmanager
def peek(directory: Path) -> Iterator[ReadView]:
    """A look at metadata of which nothing is known; the caller has locked its directory.

    CorruptMetadata; and where the file is damaged in the wrong place, the process may die.
    """
    refuse_truncated(directory / "data.mdb")
    try:
        with lmdb.open(
            str(directory), readonly=True, lock=False, max_dbs=len(TABLES) + 1, lib_version=0,
        ) as environment:  # fmt: skip
            tables = {name: environment.open_db(name.encode(), create=False) for name in TABLES}
            tables["children"] = environment.open_db(b"children", dupsort=True, create=False)
            with environment.begin() as txn:
                yield ReadView(txn, tables)
    except lmdb.Error as error:
        raise CorruptMetadata(f"{directory / 'data.mdb'} cannot be read: {error}") from error


def _nothing(_: object) -> None:
    """A job, or what follows one, of which only the end is wanted."""


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

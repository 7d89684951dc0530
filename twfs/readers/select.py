"""Chooses the reader for each read: host, staged or cufile, and counts which one served.

Not a reader itself. Thread-safe; refuses to work in a forked child.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

from twfs.errors import InvalidInput
from twfs.readers.ahead import AHEAD_PARTS, Ahead
from twfs.readers.base import BlockRead, DeviceSource, ForkGuard, Reader
from twfs.readers.cufile import CufileReader
from twfs.readers.hanging import Watch
from twfs.readers.host import HostReader
from twfs.readers.probe import direct_obstacle, probe_direct
from twfs.readers.staged import StagedReader
from twfs.store import ReaderName, ReadOutcome
from twfs.units import DeviceIndex

__all__ = ["DeviceSource", "Readers"]


ARENA_BYTES: Final = 64 << 20  # four of the largest I/Os: enough to keep a drive busy
ASYNC_READS_MAX: Final = 4  # reads under way at once for read_async: each has threads of its own
ASYNC_QUEUED_MAX: Final = 1024  # two long prompts of 480 blocks, submitted block by block

_T = TypeVar("_T")


class Readers:
    """The readers of one warehouse's devices, made when first needed.

    Uses the descriptors in *sources* until close, and never closes them.
    """

    def __init__(
        self,
        sources: Mapping[DeviceIndex, DeviceSource],
        *,
        threads: int = 4,
        arena_bytes: int = ARENA_BYTES,
    ) -> None:
        self._sources = dict(sources)
        self._threads = threads
        self._arena_bytes = arena_bytes
        self._guard = ForkGuard()
        self._watch = Watch()
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._under_way = 0
        self._made: dict[str, Reader] = {}
        self._direct: bool | None = None  # whether cuFile reaches the devices; None: not yet known
        self._why_not_direct = "not asked for yet"
        self._probe: threading.Thread | None = None
        # Apart, so that reads with a deadline do not queue behind such as wait for a device.
        self._executors: dict[bool, ThreadPoolExecutor] = {}
        self._queued = threading.BoundedSemaphore(ASYNC_QUEUED_MAX)
        self._closed = False
        self._retired: list[Callable[[], None]] = []  # to be called when no read is under way

    @property
    def sources(self) -> Mapping[DeviceIndex, DeviceSource]:
        """The devices, by index."""
        return self._sources

    def read(
        self,
        blocks: Sequence[BlockRead],
        held: Callable[[], bool],
        *,
        reader: str | None = None,
        after: Sequence[Any] = (),
        deadline: float | None = None,
    ) -> tuple[ReaderName, list[ReadOutcome]]:
        """Read *blocks* through *reader*, or the best one; return its name and the outcomes.

        See Reader.read. InvalidInput on an unknown name, or for destinations that are not all in
        one memory; ReaderUnavailable if the reader asked for by name cannot work here.
        """
        self._guard.check()
        name = self.name_for(blocks, reader, timed=deadline is not None)
        with self._changed:
            self._check_open()
            self._under_way += 1
        try:
            return name, self._reader(name).read(blocks, held, after, deadline)
        finally:
            with self._changed:
                self._under_way -= 1
                self._retire()
                self._changed.notify_all()

    def read_ahead(self, blocks: Sequence[BlockRead]) -> Ahead:
        """Begin to read *blocks* without targets, for host memory; see HostReader.read_ahead."""
        self._guard.check()
        with self._changed:
            self._check_open()
        reader = self._reader(ReaderName.HOST)
        assert isinstance(reader, HostReader)
        return reader.read_ahead(blocks)

    def follow(
        self, sources: Mapping[DeviceIndex, DeviceSource], retired: Sequence[Callable[[], None]]
    ) -> None:
        """Read from *sources* from now on; *retired* are called once no older read is under way.

        Reads under way go on. They may be misses if their device is not there any more.
        """
        with self._lock:
            changed = dict(sources) != self._sources
            for gone in set(self._sources) - set(sources):
                del self._sources[gone]
            self._sources.update(sources)
            cufile = self._made.pop(ReaderName.CUFILE, None) if changed else None
            if changed:  # whether cuFile reaches them all is to be found out anew
                self._direct, self._probe = None, None
        with self._changed:
            self._retired += retired
            if cufile is not None:  # it opened its files once, by path
                self._retired.append(cufile.close)
            self._retire()

    def _retire(self) -> None:
        """Call what waits for the end of reads, if none is under way. Hold the condition."""
        while self._retired and not self._under_way:
            self._retired.pop()()

    @property
    def ahead_bytes(self) -> int:
        """How much is read ahead at most, of all matches together."""
        return self._arena_bytes // AHEAD_PARTS

    def _check_open(self) -> None:
        """Raise InvalidInput after close."""
        if self._closed:
            raise InvalidInput("the readers are closed: connect anew")

    def name_for(
        self, blocks: Sequence[BlockRead], reader: str | None, *, timed: bool = False
    ) -> ReaderName:
        """Return the name of the reader for *blocks*: *reader* if given.

        What is *timed* is staged as long as kvikio's own threads hang. InvalidInput if *reader*
        cannot do that.
        """
        devices = {target.device for block in blocks for target in block.targets}
        if len(devices) > 1:
            names = ", ".join(sorted("host memory" if d is None else str(d) for d in devices))
            raise InvalidInput(f"one read goes to one memory, not to {names}: read in two calls")
        try:
            wanted = None if reader is None else ReaderName(reader)
        except ValueError as error:
            known = ", ".join(ReaderName)
            raise InvalidInput(f"there is no reader {reader!r}: use {known}") from error
        on_gpu = devices not in (set(), {None})
        partial = any(block.layers is not None for block in blocks)
        if wanted is ReaderName.HOST and on_gpu:
            raise InvalidInput("the host reader cannot write to a GPU: use staged or cufile")
        if wanted is ReaderName.CUFILE and partial:
            raise InvalidInput("layers are verified in host memory: read them with host or staged")
        if wanted is not None:
            return wanted
        if not on_gpu:
            return ReaderName.HOST
        direct = not partial and self._is_direct() and not (timed and self._is_stuck())
        return ReaderName.CUFILE if direct else ReaderName.STAGED

    def _is_stuck(self) -> bool:
        made = self._made.get(ReaderName.CUFILE)
        return isinstance(made, CufileReader) and made.stuck

    def _is_direct(self) -> bool:
        """Tell whether cuFile is known to reach GPU memory directly; ask in the background first.

        The question takes seconds, in a process of its own, so the reads until then are staged.
        """
        with self._lock:
            if self._direct is None and self._probe is None:
                self._why_not_direct = "being probed"
                self._probe = threading.Thread(
                    target=self._find_direct, name="twfs-cufile-probe", daemon=True
                )
                self._probe.start()
            return bool(self._direct)

    def _find_direct(self) -> None:
        """Look for what forbids it, then try every device; the body of the probe's thread."""
        sources = dict(self._sources)
        why_not = direct_obstacle(sources) or next(
            filter(None, map(probe_direct, sources.values())), None
        )
        with self._lock:
            if sources == self._sources:
                self._direct, self._why_not_direct = why_not is None, why_not or ""

    def _reader(self, name: ReaderName) -> Reader:
        """Return the reader *name*, made now if need be."""
        if name is ReaderName.CUFILE and not self._is_direct():
            probe = self._probe
            if probe is not None:
                probe.join()  # asked for by name: worth the wait to know which of its ways it goes
        with self._lock:
            made = self._made.get(name)
            if made is None:
                made = self._made[name] = self._make(name)
            return made

    def _make(self, name: ReaderName) -> Reader:
        """Make the reader *name*."""
        if name is ReaderName.HOST:
            kind = HostReader
        elif name is ReaderName.STAGED:
            kind = StagedReader
        else:
            return CufileReader(
                self._sources, staging_bytes=self._arena_bytes, direct=bool(self._direct),
                watch=self._watch,
            )  # fmt: skip
        return kind(
            self._sources, threads=self._threads, arena_bytes=self._arena_bytes, watch=self._watch
        )

    def submit(self, call: Callable[[], _T], *, timed: bool = False) -> "Future[_T]":
        """Run *call* on a thread for reads; waits while ASYNC_QUEUED_MAX are outstanding."""
        self._guard.check()
        with self._changed:
            self._check_open()
            if timed not in self._executors:
                self._executors[timed] = ThreadPoolExecutor(ASYNC_READS_MAX, "twfs-async")
            executor = self._executors[timed]
        self._queued.acquire()
        try:
            future = executor.submit(call)
        except BaseException:
            self._queued.release()
            raise
        future.add_done_callback(lambda _: self._queued.release())
        return future

    def statistics(self) -> dict[str, Any]:
        """Per reader: blocks, bytes, placement, misses by cause; and why cuFile is not used."""
        with self._lock:
            made = dict(self._made)
            selection = {"direct": bool(self._direct), "why_not_direct": self._why_not_direct}
        return {name: reader.statistics() for name, reader in made.items()} | {
            "selection": selection
        }

    def close(self) -> None:
        """Wait for reads under way and let go of threads and memory. Idempotent."""
        with self._changed:
            executors, self._executors = self._executors, {}
        for executor in executors.values():
            executor.shutdown()  # its reads still find the readers open
        with self._changed:
            self._closed = True
            while self._under_way:
                self._changed.wait()
        with self._lock:
            made, self._made = self._made, {}
        with self._changed:
            self._retire()
        for reader in made.values():
            reader.close()

"""The cufile reader: kvikio, GPUDirect where the machine can do it; with cufilewaves its only user.

Blocks are read headers and all into a bounded staging buffer on the destination's side, verified
there and scattered; without a deadline large aligned destinations take them directly. Its own
compat mode (POSIX and a bounce buffer) is called that, never direct. Thread-safe, one read at a
time per destination memory.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from threading import Lock
from typing import Any, Final

import numpy as np

from twfs.checksums import flat_bytes, loaded_torch
from twfs.devices.arena import Arena
from twfs.errors import ReaderUnavailable
from twfs.readers.base import (
    HEADER_BYTES,
    BlockRead,
    DeviceSource,
    ForkGuard,
    Span,
    Tally,
    may_read,
)
from twfs.readers.cufilewaves import (
    KVIKIO_THREADS,
    DeviceBytes,
    Task,
    Wave,
    address_in,
    open_files,
    place_of,
    spans_for,
)
from twfs.readers.hanging import Hands, TimedWave, Watch
from twfs.readers.landing import Job, deliver_on_device, deliver_on_host
from twfs.readers.probe import missing_library, unlike_path
from twfs.store import ReadOutcome
from twfs.units import ALIGN, IO_BYTES_MAX, DeviceIndex, align_up

DIRECT_BYTES_MIN: Final = 1 << 20  # smaller blocks are cheaper merged, and scattered as a batch
DIRECT_BYTES_MAX: Final = 256 << 20  # of one wave: the lease is looked at between waves
MERGED_BYTES_MIN: Final = 1 << 20


class CufileReader:
    """See the module's docstring.

    *direct* says that probe_direct found every device reachable; without it kvikio's compat mode
    is forced. *allocate* makes flat uint8 tensors of a length on a device. ReaderUnavailable, with
    the reason, if it cannot work here.
    """

    name = "cufile"

    def __init__(
        self,
        sources: Mapping[DeviceIndex, DeviceSource],
        *,
        staging_bytes: int = 64 << 20,
        direct: bool = False,
        allocate: Callable[[int, Any], Any] | None = None,
        watch: Watch | None = None,
    ) -> None:
        why_not = missing_library() or next(filter(None, map(unlike_path, sources.values())), None)
        if why_not is not None:
            raise ReaderUnavailable(f"the cufile reader cannot work here: {why_not}")
        self._sources = sources
        self._half_bytes = align_up(staging_bytes // 2)
        self._direct = direct
        self._allocate = allocate or _torch_empty
        self._guard = ForkGuard()
        self._lock = Lock()
        self._busy: dict[Any, Lock] = {}  # by destination memory; None is the host's
        self._staging: dict[Any, list[Any]] = {}  # two halves each
        self._streams: dict[Any, Any] = {}
        self._tally = Tally()
        self._watch = watch or Watch()
        self._hands: dict[DeviceSource, Hands] = {}
        self._left = 0  # waves whose reads outlive their deadline
        self._closed = False
        try:
            self._files, self._monitor = open_files(sources, direct=direct)
        except (ImportError, RuntimeError, OSError) as error:
            raise ReaderUnavailable(f"the cufile reader cannot work here: {error}") from error

    @property
    def stuck(self) -> bool:
        """Tell whether reads are under way that a deadline left behind: kvikio's threads hang."""
        return self._left > 0

    def read(
        self,
        blocks: Sequence[BlockRead],
        held: Callable[[], bool],
        after: Sequence[Any] = (),
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        """Read and verify *blocks*; see Reader.read. While it is stuck, none with a deadline."""
        self._guard.check()
        missing = ReadOutcome.NOT_READ if deadline is None else ReadOutcome.TIMED_OUT
        outcomes = [missing] * len(blocks)
        if not blocks:
            return outcomes
        for event in after:
            event.synchronize()  # cuFile knows nothing of streams
        device = blocks[0].targets[0].device
        with self._lock:
            busy = self._busy.setdefault(device, Lock())
        direct = 0
        if deadline is None:
            with busy:
                direct = self._read(blocks, device, held, outcomes)
        elif busy.acquire(timeout=max(0.0, deadline - time.monotonic())):
            try:
                self._read_until(deadline, blocks, device, held, outcomes)
            finally:
                busy.release()
        self._tally.count_read(blocks, outcomes, direct)
        return outcomes

    def _read(
        self,
        blocks: Sequence[BlockRead],
        device: Any,
        held: Callable[[], bool],
        outcomes: list[ReadOutcome],
    ) -> int:
        """Read wave after wave, each begun before the one before is verified; count direct ones."""
        waves: list[Wave] = []
        direct = 0
        try:
            for turn, jobs in enumerate(self._waves(blocks, placing=True)):
                if not held():
                    for at in range(jobs[0].at, len(blocks)):
                        outcomes[at] = ReadOutcome.LEASE_ENDED
                    break
                waves.append(Wave(jobs))
                direct += sum(job.staged_at is None for job in jobs)
                self._begin(waves[-1], device, turn % 2, outcomes)
                if len(waves) > 1:
                    self._finish(waves[0], device, outcomes)
                    del waves[0]
            for wave in waves:
                self._finish(wave, device, outcomes)
        finally:
            for wave in waves:
                wave.drain()
        return direct

    def _read_until(
        self,
        deadline: float,
        blocks: Sequence[BlockRead],
        device: Any,
        held: Callable[[], bool],
        outcomes: list[ReadOutcome],
    ) -> None:
        """As _read, into the staging buffer alone, which is left to what is late."""
        under_way: list[tuple[Wave, TimedWave[Task]]] = []
        whole = True
        try:
            for turn, jobs in enumerate(self._waves(blocks, placing=False)):
                if self.stuck or time.monotonic() >= deadline:
                    break
                if not held():
                    for at in range(jobs[0].at, len(blocks)):
                        outcomes[at] = ReadOutcome.LEASE_ENDED
                    break
                wave = Wave(jobs)
                under_way.append((wave, self._timed_wave(wave, device, turn % 2, outcomes)))
                under_way[-1][1].begin(self._hands_of)
                if len(under_way) > 1:
                    whole = self._finish_until(deadline, *under_way[0], device, outcomes)
                    if not whole:
                        break
                    del under_way[0]
            while under_way and whole:
                whole = self._finish_until(deadline, *under_way[0], device, outcomes)
                del under_way[: int(whole)]
        finally:
            for _, timed in under_way:
                self._leave(timed, device)

    def _timed_wave(
        self, wave: Wave, device: Any, half: int, outcomes: list[ReadOutcome]
    ) -> TimedWave[Task]:
        """Return the reads of a wave, not yet begun."""
        self._place(wave, device, half)
        wave.tasks = self._tasks(wave, outcomes)
        of: dict[DeviceSource, list[Task]] = {}
        for task in wave.tasks:
            source = self._sources.get(DeviceIndex(task.span.device))
            if source is not None:
                of.setdefault(source, []).append(task)
        return TimedWave(of, KVIKIO_THREADS, self._read_parts, wave.end)

    def _hands_of(self, source: DeviceSource) -> Hands:
        """Return the threads that wait for what kvikio reads of *source*."""
        with self._lock:
            return self._hands.setdefault(source, Hands(2 * KVIKIO_THREADS, f"twfs-{self.name}"))

    def _read_parts(self, task: Task, _: int) -> list[bool]:
        """Read one task, as kvikio does, by path; tell for each of its parts whether it came."""
        if self._read_whole(task):
            return [True] * len(task.parts)
        parts = [Task(span, memory, [(job, span, memory)]) for job, span, memory in task.parts]
        return [len(parts) > 1 and self._read_whole(part) for part in parts]

    def _read_whole(self, task: Task) -> bool:
        """Read one run of a device, and wait for it."""
        source = self._sources.get(DeviceIndex(task.span.device))
        if source is None:  # it has just been taken out
            return False
        flight = self._watch.begin(source)
        try:
            future, buffer = self._pread(task)
            came = _came(future, task.span.length)
            del buffer  # held until here
            return came
        finally:
            self._watch.end(source, flight)

    def _finish_until(
        self, deadline: float, wave: Wave, timed: TimedWave[Task], device: Any,
        outcomes: list[ReadOutcome],
    ) -> bool:  # fmt: skip
        """Deliver what of a wave is there at *deadline*; tell whether that is all."""
        whole = timed.wait(deadline)
        late = wave.late()
        self._deliver([job for job in wave.jobs if id(job) not in late], wave, device, outcomes)
        return whole

    def _leave(self, timed: TimedWave[Task], device: Any) -> None:
        """Go on with other memory than that of a wave, unless its reads have ended."""
        with self._lock:
            self._left += 1
        if not timed.when_over(self._come_back):
            self._staging.pop(device, None)

    def _come_back(self) -> None:
        """The reads of a wave that was left have ended."""
        with self._lock:
            self._left -= 1
            last = self._closed and not self._left
        if last:
            self._close_files()

    def _waves(self, blocks: Sequence[BlockRead], *, placing: bool) -> Iterator[list[Job]]:
        """Cut *blocks* into waves that fit half of the staging buffer; a huge block goes alone.

        With *placing* such as can be are read into their destinations.
        """
        jobs: list[Job] = []
        used = placed = 0
        for at, block in enumerate(blocks):
            assert block.layers is None  # their sums cannot be computed on a GPU
            direct = placing and block.whole and block.payload_bytes >= DIRECT_BYTES_MIN
            wanted = 0 if direct else HEADER_BYTES + block.padded_bytes
            if jobs and (used + wanted > self._half_bytes or placed >= DIRECT_BYTES_MAX):
                yield jobs
                jobs, used, placed = [], 0, 0
            if direct:
                target = block.targets[0]
                memory = target.array if target.tensor is None else target.tensor
                jobs.append(Job(block, at, memory, None))
                placed += block.payload_bytes
            else:
                jobs.append(Job(block, at, None, used))
                used += wanted
        if jobs:
            yield jobs

    def _begin(self, wave: Wave, device: Any, half: int, outcomes: list[ReadOutcome]) -> None:
        """Start all reads of a wave."""
        self._place(wave, device, half)
        for task in self._tasks(wave, outcomes):
            self._start(wave, task)

    def _place(self, wave: Wave, device: Any, half: int) -> None:
        """Give the staged jobs their memory, in order of their place."""
        staged = [job for job in wave.jobs if job.staged_at is not None]
        staged.sort(key=place_of)
        used = 0
        for job in staged:
            job.staged_at = used
            used += HEADER_BYTES + job.block.padded_bytes
        if staged:
            wave.staging = self._half(device, half, used)[:used]
            for job in staged:
                assert job.staged_at is not None
                end = job.staged_at + HEADER_BYTES + job.block.padded_bytes
                job.memory = wave.staging[job.staged_at : end]

    def _start(self, wave: Wave, task: Task) -> None:
        """Start one read; kvikio keeps neither buffer nor file alive, so `live` does."""
        wave.live.append((*self._pread(task), task))

    def _pread(self, task: Task) -> tuple[Any, Any]:
        """Ask kvikio for one read; return its future and the buffer, to be held until that ends."""
        buffer = task.memory if isinstance(task.memory, np.ndarray) else DeviceBytes(task.memory)
        span = task.span
        self._tally.count_io(span.length)
        file = self._files[DeviceIndex(span.device)]
        future: Any
        try:
            future = file.pread(buffer, span.length, span.offset, span.length)
        except RuntimeError:  # short reads to a GPU are done, and fail, right there
            future = _FailedRead()
        return future, buffer

    def _half(self, device: Any, half: int, byte_count: int) -> Any:
        """Return half the staging buffer of *device* (None: the host), or more for a huge block."""
        if byte_count > self._half_bytes:
            return self._memory(device, byte_count)
        staging = self._staging.setdefault(device, [None, None])
        if staging[half] is None:
            staging[half] = self._memory(device, self._half_bytes)
        return staging[half]

    def _memory(self, device: Any, byte_count: int) -> Any:
        """Make 4 KiB-aligned memory: a flat uint8 tensor, or for the host an array."""
        if device is None:
            return flat_bytes(Arena.private(byte_count).view)
        memory = self._allocate(byte_count + ALIGN, device)
        skip = -memory.data_ptr() % ALIGN
        return memory[skip : skip + byte_count]

    def _tasks(self, wave: Wave, outcomes: list[ReadOutcome]) -> list[Task]:
        """Cut and merge what the jobs read, in order of memory, into reads of up to 16 MiB."""
        parts: list[tuple[Job, Span, Any]] = []
        for job in sorted(wave.jobs, key=place_of):
            spans = spans_for(job)
            if not spans or not all(may_read(self._sources, span) for _, span, _ in spans):
                outcomes[job.at] = ReadOutcome.DEVICE_ERROR
                job.failed = True
                continue
            parts.extend(spans)
        total = sum(span.length for _, span, _ in parts)
        limit = min(max(align_up(total // (2 * KVIKIO_THREADS)), MERGED_BYTES_MIN), IO_BYTES_MAX)
        tasks: list[Task] = []
        for job, span, memory in parts:
            last = tasks[-1] if tasks else None
            if (
                last is not None
                and last.span.device == span.device
                and last.span.offset + last.span.length == span.offset
                and address_in(last.memory) + last.span.length == address_in(memory)
                and job.staged_at is not None
                and last.parts[-1][0].staged_at is not None
                and last.span.length + span.length <= limit
            ):
                length = last.span.length + span.length
                first = last.parts[0][0]
                assert first.staged_at is not None
                begin = first.staged_at + last.span.at
                last.memory = wave.staging[begin : begin + length]
                last.span = Span(span.device, last.span.offset, length, last.span.at)
                last.parts.append((job, span, memory))
            else:
                tasks.append(Task(span, memory, [(job, span, memory)]))
        return tasks

    def _finish(self, wave: Wave, device: Any, outcomes: list[ReadOutcome]) -> None:
        """Wait for a wave's reads, verify its blocks and deliver them."""
        again: list[Task] = []
        while wave.live:
            future, _, task = wave.live[-1]
            if not _came(future, task.span.length):
                if len(task.parts) > 1:
                    again.extend(Task(span, memory, [(job, span, memory)])
                                 for job, span, memory in task.parts)  # fmt: skip
                else:
                    task.parts[0][0].failed = True
            wave.live.pop()
        for task in again:  # one bad sector must not cost its neighbours
            self._start(wave, task)
        while wave.live:
            future, _, task = wave.live[-1]
            if not _came(future, task.span.length):
                task.parts[0][0].failed = True
            wave.live.pop()
        self._deliver(wave.jobs, wave, device, outcomes)

    def _deliver(
        self, jobs: Sequence[Job], wave: Wave, device: Any, outcomes: list[ReadOutcome]
    ) -> None:
        """Verify *jobs* of a wave, which have been read, and bring them to their destinations."""
        if device is None:
            good = deliver_on_host(jobs)
        else:
            stream = self._stream(device)
            with nullcontext() if stream is None else loaded_torch().cuda.stream(stream):
                good = deliver_on_device(jobs, wave.staging)
            if stream is not None:
                stream.synchronize()  # the staging buffer is read into again
        for job, right in zip(jobs, good, strict=True):
            outcomes[job.at] = (
                ReadOutcome.HIT if right
                else ReadOutcome.DEVICE_ERROR if job.failed
                else ReadOutcome.BAD_CHECKSUM
            )  # fmt: skip

    def _stream(self, device: Any) -> Any:
        """Return our own stream on *device*, None where it is no GPU."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = loaded_torch().cuda.Stream(device)
        return self._streams[device]

    def statistics(self) -> dict[str, Any]:
        """What was read, whether directly, and kvikio's own count of bytes by backend.

        kvikio counts for the whole process; its GDS means "through cuFile".
        """
        backends = self._monitor.get().by_backend
        return self._tally.statistics() | {
            "mode": "direct" if self._direct else "compat",
            "waves_left": self._left,
            "bytes_by_backend": {
                name: backends[name]["bytes_transferred"] for name in ("POSIX", "GDS")
            },
        }

    def close(self) -> None:
        """Wait for reads under way and let go of files and memory; not for what was left behind."""
        with contextlib.ExitStack() as stack:
            for busy in list(self._busy.values()):
                stack.enter_context(busy)
            self._staging.clear()
        with self._lock:
            self._closed, left = True, self._left
        if not left:
            self._close_files()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()


class _FailedRead:
    """Stands for a read that failed before it had a future."""

    def get(self) -> int:
        """Fail as the future would have."""
        raise RuntimeError


def _torch_empty(byte_count: int, device: Any) -> Any:
    """Make a flat uint8 tensor."""
    torch = loaded_torch()
    return torch.empty(byte_count, dtype=torch.uint8, device=device)


def _came(future: Any, byte_count: int) -> bool:
    """Wait for a read; tell whether it brought all it was asked for."""
    try:
        return bool(future.get() == byte_count)
    except RuntimeError:  # kvikio has no other error, and no errno
        return False

"""The cufile reader: kvikio, GPUDirect where the machine can do it; the only user of kvikio.

Blocks are read headers and all into a bounded staging buffer on the destination's side, verified
there and scattered; large aligned destinations take them directly. Its own compat mode (POSIX and
a bounce buffer) is called that, never direct. Thread-safe, one read at a time per destination
memory.
"""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np

from twfs.checksums import (
    address_of,
    flat_bytes,
    loaded_torch,
)
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
    spans_of,
)
from twfs.readers.landing import Job, deliver_on_device, deliver_on_host
from twfs.readers.probe import missing_library, unlike_path
from twfs.store import ReadOutcome
from twfs.units import ALIGN, IO_BYTES_MAX, DeviceIndex, align_up

KVIKIO_THREADS: Final = 8  # the default of 1 leaves most of a drive idle
DIRECT_BYTES_MIN: Final = 1 << 20  # smaller blocks are cheaper merged, and scattered as a batch
DIRECT_BYTES_MAX: Final = 256 << 20  # of one wave: the lease is looked at between waves
MERGED_BYTES_MIN: Final = 1 << 20


def _open_files(
    sources: Mapping[DeviceIndex, DeviceSource], *, direct: bool
) -> tuple[dict[DeviceIndex, Any], Any]:
    """Load kvikio, set it up, and return open files and a count of what they read.

    A file keeps the mode that it was opened in. Without *direct* that never touches cuFile, which
    may hang; the process's own setting is put back, for others may use kvikio here too.
    """
    if direct:  # then a fallback inside cuFile is an error, and not a slow read in disguise
        log = Path(tempfile.gettempdir()) / f"cufile-{os.getpid()}.log"
        os.environ.setdefault("CUFILE_LOGFILE_PATH", str(log))
        os.environ.setdefault("CUFILE_ALLOW_COMPAT_MODE", "false")
    kvikio = importlib.import_module("kvikio")
    defaults = importlib.import_module("kvikio.defaults")
    if "KVIKIO_NTHREADS" not in os.environ:
        defaults.set({"num_threads": KVIKIO_THREADS})
    before = defaults.get("compat_mode")
    defaults.set(
        {
            "compat_mode": kvikio.CompatMode.OFF if direct else kvikio.CompatMode.ON,
            "auto_direct_io_read": True,  # it would read through the kernel's memory
        }
    )
    try:
        files = {index: kvikio.CuFile(source.path, "r") for index, source in sources.items()}
        return files, kvikio.SummaryMonitor()
    finally:
        defaults.set({"compat_mode": before})


class DeviceBytes:
    """GPU memory as kvikio takes it: bytes, whatever dtype the tensor has; keeps it alive."""

    __slots__ = ("__cuda_array_interface__", "tensor")

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
            "strides": None,
        }


@dataclass(slots=True)
class Task:
    """One kvikio read, into one run of memory."""

    span: Span
    memory: Any
    parts: list[tuple[Job, Span, Any]]


@dataclass(slots=True)
class Wave:
    """What is read in one go; *live* holds future, buffer and task together until each ended."""

    jobs: list[Job] = field(default_factory=list)
    staging: Any = None  # the used part of its staging buffer
    live: list[tuple[Any, Any, Task]] = field(default_factory=list)

    def drain(self) -> None:
        """Wait until no read is under way any more; KeyboardInterrupt is put off until then."""
        interrupt: KeyboardInterrupt | None = None
        while self.live:
            try:
                with contextlib.suppress(RuntimeError):  # a failed read has ended too
                    self.live[-1][0].get()
                self.live.pop()
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


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
        try:
            self._files, self._monitor = _open_files(sources, direct=direct)
        except (ImportError, RuntimeError, OSError) as error:
            raise ReaderUnavailable(f"the cufile reader cannot work here: {error}") from error

    def read(
        self,
        blocks: Sequence[BlockRead],
        held: Callable[[], bool],
        after: Sequence[Any] = (),
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        """Read and verify *blocks*; see Reader.read. ReaderUnavailable with a deadline."""
        if deadline is not None:
            raise ReaderUnavailable("cufile reads into the GPU itself: it cannot end at a deadline")
        self._guard.check()
        outcomes = [ReadOutcome.NOT_READ] * len(blocks)
        if not blocks:
            return outcomes
        for event in after:
            event.synchronize()  # cuFile knows nothing of streams
        device = blocks[0].targets[0].device
        with self._lock:
            busy = self._busy.setdefault(device, Lock())
        with busy:
            direct = self._read(blocks, device, held, outcomes)
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
            for turn, jobs in enumerate(self._waves(blocks)):
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

    def _waves(self, blocks: Sequence[BlockRead]) -> Iterator[list[Job]]:
        """Cut *blocks* into waves that fit half of the staging buffer; a huge block goes alone."""
        jobs: list[Job] = []
        used = placed = 0
        for at, block in enumerate(blocks):
            assert block.layers is None  # their sums cannot be computed on a GPU
            direct = block.whole and block.payload_bytes >= DIRECT_BYTES_MIN
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
        """Give the staged jobs their memory, in order of their place, and start all reads."""
        staged = [job for job in wave.jobs if job.staged_at is not None]
        staged.sort(key=_place)
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
        for task in self._tasks(wave, outcomes):
            self._start(wave, task)

    def _start(self, wave: Wave, task: Task) -> None:
        """Start one read; kvikio keeps neither buffer nor file alive, so `live` does."""
        buffer = task.memory if isinstance(task.memory, np.ndarray) else DeviceBytes(task.memory)
        span = task.span
        self._tally.count_io(span.length)
        file = self._files[DeviceIndex(span.device)]
        future: Any
        try:
            future = file.pread(buffer, span.length, span.offset, span.length)
        except RuntimeError:  # short reads to a GPU are done, and fail, right there
            future = _FailedRead()
        wave.live.append((future, buffer, task))

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
        for job in sorted(wave.jobs, key=_place):
            spans = _spans(job)
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
                and _address(last.memory) + last.span.length == _address(memory)
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
        if device is None:
            good = deliver_on_host(wave.jobs)
        else:
            stream = self._stream(device)
            with nullcontext() if stream is None else loaded_torch().cuda.stream(stream):
                good = deliver_on_device(wave.jobs, wave.staging)
            if stream is not None:
                stream.synchronize()  # the staging buffer is read into again
        for job, right in zip(wave.jobs, good, strict=True):
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
            "bytes_by_backend": {
                name: backends[name]["bytes_transferred"] for name in ("POSIX", "GDS")
            },
        }

    def close(self) -> None:
        """Wait for reads under way and let go of files and memory."""
        with contextlib.ExitStack() as stack:
            for busy in list(self._busy.values()):
                stack.enter_context(busy)
            for file in self._files.values():
                file.close()
            self._staging.clear()


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


def _place(job: Job) -> tuple[int, int]:
    """Sort key: where a block begins."""
    extents = job.block.extents
    return (extents[0].device, extents[0].offset) if extents else (0, 0)


def _address(memory: Any) -> int:
    """Where an array or a tensor is."""
    if isinstance(memory, np.ndarray):
        return address_of(memory)
    address: int = memory.data_ptr()
    return address


def _spans(job: Job) -> list[tuple[Job, Span, Any]]:
    """Return what to read for *job*, cut to the largest I/O, and where to; [] if extents lack."""
    stop = HEADER_BYTES + job.block.padded_bytes
    start = HEADER_BYTES if job.staged_at is None else 0
    spans: list[tuple[Job, Span, Any]] = []
    covered = 0
    for span in spans_of(job.block, start, stop):
        for cut in range(0, span.length, IO_BYTES_MAX):
            length = min(IO_BYTES_MAX, span.length - cut)
            at = span.at + cut - start
            part = Span(span.device, span.offset + cut, length, span.at + cut)
            spans.append((job, part, job.memory[at : at + length]))
        covered += span.length
    return spans if covered == stop - start else []

"""What the cufile reader asks of kvikio: files, memory that it takes, and waves of reads.

Not a reader itself; see readers/cufile.py.
"""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from twfs.checksums import address_of
from twfs.readers.base import HEADER_BYTES, DeviceSource, Span, spans_of
from twfs.readers.landing import Job
from twfs.units import IO_BYTES_MAX, DeviceIndex

KVIKIO_THREADS: Final = 8  # the default of 1 leaves most of a drive idle


def open_files(
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
    tasks: list[Task] = field(default_factory=list)  # of a timed wave, as are the ended ones
    ended: list[Task] = field(default_factory=list)

    def end(self, task: Task, parts: Sequence[bool]) -> None:
        """Note a task of a timed wave that has ended; *parts* tells which of its parts came."""
        for (job, _, _), came in zip(task.parts, parts, strict=True):
            if not came:  # never back: other threads end other parts of the same job
                job.failed = True
        self.ended.append(task)

    def late(self) -> set[int]:
        """The ids of a timed wave's jobs of which not all has ended."""
        ended = set(map(id, self.ended))
        return {id(job) for task in self.tasks if id(task) not in ended for job, _, _ in task.parts}

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


def place_of(job: Job) -> tuple[int, int]:
    """Sort key: where a block begins."""
    extents = job.block.extents
    return (extents[0].device, extents[0].offset) if extents else (0, 0)


def address_in(memory: Any) -> int:
    """Where an array or a tensor is."""
    if isinstance(memory, np.ndarray):
        return address_of(memory)
    address: int = memory.data_ptr()
    return address


def spans_for(job: Job) -> list[tuple[Job, Span, Any]]:
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

"""Power cuts in process: what the devices and LMDB were given, and what they may hold after a cut.

A Recorder notes every write and flush of the devices, and the same of LMDB, worked out from its
file before and after each commit: the pages of the new tree, a sync, the meta record, a sync, as
far as the environment's flags let it sync. A Replay walks through that log. A cut at any place of
it leaves what was flushed, and of the rest any subset of the sectors.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from twfs.devices.device import Device
from twfs.metadata.environment import Metadata
from twfs.records import HEADER_MAGIC, Block, BlockKey, Header
from twfs.units import ALIGN

SECTOR: Final = 512  # a drive tears nothing smaller
METAS: Final = 2  # the pages of LMDB's file that hold its meta records

# What a transaction left: each block's generation, and whether it is a hole.
Records = dict[BlockKey, tuple[int, bool]]


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """Bytes on their way to a file since here; a cut may leave any of their sectors."""

    file: Path
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Flushed:
    """A flush has ended that began after these writes had ended."""

    file: Path
    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Begun:
    """Transaction *number* is being written."""

    number: int


@dataclass(frozen=True, slots=True)
class Committed:
    """Transaction *number* has been committed, and its jobs may be told."""

    number: int


@dataclass(frozen=True, slots=True)
class Synced:
    """A sync beside the commits has ended."""


@dataclass(frozen=True, slots=True)
class Returned:
    """A put has returned to its caller: these are published."""

    blocks: frozenset[tuple[BlockKey, int]]  # with their generation


@dataclass(frozen=True, slots=True)
class Opened:
    """A model, or a new epoch of one, has been made and has this number."""

    model: int


@dataclass(frozen=True, slots=True)
class Marked:
    """The load says that its *step* is about to begin, or has *ended* for its caller."""

    step: int
    ended: bool


Event = Write | Flushed | Begun | Committed | Synced | Returned | Opened | Marked


class Recorder:
    """Notes all that happens to devices and metadata of this process; see the module."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bases: dict[Path, bytes] = {}  # the files as they were
        self.log: list[Event] = []
        self.records: list[Records] = []  # after each transaction; the first is before them all
        self._lock = threading.Lock()
        self._ended: dict[Path, list[Write]] = {}  # and not flushed
        self._tables: dict[Path, bytes] = {}  # LMDB's files as they are
        self._flush = Device.flush
        self._transact, self._force = Metadata._transact, Metadata._force
        self._install(patch)

    def _install(self, patch: pytest.MonkeyPatch) -> None:
        """Stand between the library and its files."""
        transfer = Device._transfer

        def noted(device: Device, call: Any, verb: str, *where: Any) -> None:
            _, views, offset = where

            def right() -> None:
                transfer(device, call, verb, *where)

            if verb == "write":
                self._note_write(device.path, b"".join(views), offset, right)
            else:
                right()

        def flush(device: Device) -> None:
            self._note_flush(device)

        def transact(metadata: Metadata, batch: Any) -> list[Any]:
            return self._note_commit(metadata, batch)

        def force(metadata: Metadata) -> None:
            self._note_force(metadata)

        patch.setattr(Device, "_transfer", noted)
        patch.setattr(Device, "flush", flush)
        patch.setattr(Metadata, "_transact", transact)
        patch.setattr(Metadata, "_force", force)

    def _begin(self, write: Write) -> Write:
        self.log.append(write)
        return write

    def _note_write(self, file: Path, data: bytes, offset: int, right: Callable[[], None]) -> None:
        with self._lock:
            if file not in self.bases:
                self.bases[file] = file.read_bytes()
            write = self._begin(Write(file, offset, data))
        right()
        with self._lock:
            self._ended.setdefault(file, []).append(write)

    def _note_flush(self, device: Device) -> None:
        with self._lock:
            covered = tuple(self._ended.get(device.path, ()))
        self._flush(device)
        with self._lock:
            self._flushed(device.path, covered)

    def _flushed(self, file: Path, covered: tuple[Write, ...]) -> None:
        self.log.append(Flushed(file, covered))
        self._ended[file] = [each for each in self._ended.get(file, []) if each not in covered]

    def _note_commit(self, metadata: Metadata, batch: Any) -> list[Any]:
        file = metadata.directory / "data.mdb"
        if file not in self.bases:
            self.bases[file] = self._tables[file] = file.read_bytes()
            if not self.records:
                self.records.append(_records_of(metadata))
        results = self._transact(metadata, batch)
        before, after = self._tables[file], file.read_bytes()
        changed = _changed_parts(before, after)
        if changed:
            self._tables[file] = after
            flags = metadata._environment.flags()
            with self._lock:
                self._commit(file, changed, flags, _records_of(metadata))
        return results

    def _commit(
        self, file: Path, changed: list[tuple[int, bytes]], flags: Any, left: Records
    ) -> None:
        """Note one commit as LMDB makes it: it writes in place nothing that it still needs."""
        number = len(self.records)
        self.records.append(left)
        self.log.append(Begun(number))
        ended = self._ended.setdefault(file, [])
        tree = [(at, data) for at, data in changed if at >= METAS * ALIGN]
        metas = [(at, data) for at, data in changed if at < METAS * ALIGN]
        ended += [self._begin(Write(file, at, data)) for at, data in tree]
        if flags["sync"]:
            self._flushed(file, tuple(ended))
        ended = self._ended[file]
        ended += [self._begin(Write(file, at, data)) for at, data in metas]
        if flags["sync"] and flags["metasync"]:
            self._flushed(file, tuple(ended))
        self.log.append(Committed(number))

    def _note_force(self, metadata: Metadata) -> None:
        self._force(metadata)
        file = metadata.directory / "data.mdb"
        with self._lock:
            self._flushed(file, tuple(self._ended.get(file, ())))
            self.log.append(Synced())

    def returned(self, keys: Sequence[BlockKey], since: int) -> None:
        """Note that a put begun after transaction *since* has returned with *keys* published."""
        with self._lock:
            found = set()
            for key in keys:
                lives = [left[key][0] for left in self.records[since:] if key in left]
                assert lives, f"{key} was called published before any commit had it"
                found.add((key, lives[-1]))
            self.log.append(Returned(frozenset(found)))

    def opened(self, model: int) -> None:
        """Note that the caller knows of *model*: its number is never given again."""
        with self._lock:
            self.log.append(Opened(model))

    def mark(self, mark: Marked) -> None:
        """Note how far the load is."""
        with self._lock:
            self.log.append(mark)

    def unflushed_bytes(self) -> int:
        """Bytes on devices that a cut may take now."""
        return sum(
            len(write.data)
            for file, disk in self._now().items()
            if file.name != "data.mdb"
            for write in disk.pending
        )

    def cut(self) -> None:
        """Take from the open devices every write that no flush has followed; begin a new log."""
        with self._lock:
            for file, disk in self._now().items():
                if file.name == "data.mdb":  # LMDB is open, and has it mapped
                    continue
                with file.open("r+b", buffering=0) as opened:
                    for write in disk.pending:
                        stop = write.offset + len(write.data)
                        os.pwrite(opened.fileno(), disk.durable[write.offset : stop], write.offset)
            self.log, self.bases, self._ended = [], {}, {}

    def _now(self) -> "dict[Path, Disk]":
        """The files as the log has left them."""
        disks = {file: Disk(bytearray(base)) for file, base in self.bases.items()}
        for event in self.log:
            if isinstance(event, Write | Flushed):
                disks[event.file].follow(event)
        return disks


def _records_of(metadata: Metadata) -> Records:
    with metadata.read() as view:
        blocks = [(BlockKey.unpack(key), Block.unpack(raw)) for key, raw in view.all_blocks()]
    return {key: (block.generation, block.hole) for key, block in blocks}


def _changed_parts(before: bytes, after: bytes) -> list[tuple[int, bytes]]:
    """The 4 KiB pieces of *after* that are not in *before*: place and bytes."""
    old = np.zeros(len(after), np.uint8)
    old[: len(before)] = np.frombuffer(before, np.uint8)
    new = np.frombuffer(after, np.uint8)
    rows = np.flatnonzero((old != new).reshape(-1, ALIGN).any(axis=1)).tolist()
    rows += [row for row in range(len(before) // ALIGN, len(after) // ALIGN) if row not in rows]
    return [(row * ALIGN, after[row * ALIGN : (row + 1) * ALIGN]) for row in sorted(rows)]


@dataclass(slots=True)
class Disk:
    """One file: what no cut takes, and what it may."""

    durable: bytearray
    pending: list[Write] = field(default_factory=list)

    def follow(self, event: Write | Flushed) -> list[Write]:
        """Go one event further; the writes that are durable by it."""
        if isinstance(event, Write):
            self.pending.append(event)
            return []
        now = [write for write in self.pending if write in event.writes]
        for write in now:
            self.overwrite(write.offset, write.data)
        self.pending = [write for write in self.pending if write not in event.writes]
        return now

    def overwrite(self, offset: int, data: bytes) -> None:
        """Put *data* there; the file grows as it must."""
        self.durable[offset : offset + len(data)] = data


@dataclass(slots=True)
class Image:
    """One state that a cut may leave: what the files hold, and what may be asked of it."""

    tables: bytes
    parts: list[tuple[str, int, bytes]]  # of devices, over what is durable
    allowed: list[Records]  # the records are exactly one of these
    promised: set[tuple[BlockKey, int]]  # published to their callers, in all of *allowed*
    returned: set[tuple[BlockKey, int]]  # published to their callers, removed since or not
    generation: int  # the highest in any header on its way to a device
    model: int  # the highest number of a model or epoch that the caller knows
    text: str  # where the cut was
    marked: Marked | None  # how far the load was
    since: Marked | None  # and how far when the last commit began that no cut takes


class Replay:
    """Walks through a log; at each place *durable* parts of devices go to the caller's files."""

    def __init__(self, recorder: Recorder, *, relaxed: bool) -> None:
        self._log = recorder.log
        self._records = recorder.records
        self._relaxed = relaxed
        self._disks = {file: Disk(bytearray(base)) for file, base in recorder.bases.items()}
        self._begun = self._ended = self._certain = 0
        self._returned: set[tuple[BlockKey, int]] = set()
        self._generation = self._model = 0
        self._marked: Marked | None = None
        self._marked_at: dict[int, Marked | None] = {}  # when each transaction began

    def images(self, chance: random.Random, count: int) -> Iterator[list[Write] | Image]:
        """Yield *count* images at random places, and between them what has become durable."""
        # Each fourth is in the beginning, where models and ranges of numbers are made.
        ends = [len(self._log) // (1 if number % 4 else 10) for number in range(count)]
        cuts = sorted(chance.randrange(end) for end in ends)
        for place, event in enumerate(self._log):
            durable = self._follow(event)
            if durable:
                yield durable
            while cuts and cuts[0] == place:
                del cuts[0]
                yield self._image(chance, f"after event {place} of {len(self._log)}")

    def _follow(self, event: Event) -> list[Write]:
        """Go one event further; the writes to devices that have become durable."""
        match event:
            case Write() | Flushed():
                if isinstance(event, Write):
                    self._generation = max(self._generation, _generation_in(event.data))
                durable = self._disks[event.file].follow(event)
                return [write for write in durable if write.file.name != "data.mdb"]
            case Begun(number):
                self._begun = number
                self._marked_at[number] = self._marked
            case Committed(number):
                self._certain = max(self._certain, number - 1 if self._relaxed else number)
                self._ended = number
            case Synced():
                self._certain = self._ended
            case Returned(blocks):
                self._returned |= blocks
            case Opened(model):
                self._model = max(self._model, model)
            case Marked():
                self._marked = event
        return []

    def _image(self, chance: random.Random, where: str) -> Image:
        """Choose which unflushed sectors are there."""
        pending = [write for disk in self._disks.values() for write in disk.pending]
        how = chance.choice(("none", "all", "first", "some", "torn", "torn"))
        first = chance.randrange(len(pending) + 1)
        tables, parts = b"", []
        for file, disk in self._disks.items():
            if file.name == "data.mdb":
                tables = bytes(disk.durable)
        for number, write in enumerate(pending):
            for offset, data in _survivors(write, how, chance, early=number < first):
                if write.file.name != "data.mdb":
                    parts.append((write.file.name, offset, data))
                    continue
                gap = bytes(max(0, offset - len(tables)))
                tables = tables[:offset] + gap + data + tables[offset + len(data) :]
        tables += bytes(-len(tables) % ALIGN)
        allowed = self._records[self._certain : max(self._begun, self._ended) + 1]
        promised = {
            (key, life)
            for key, life in self._returned
            if all(key in left and left[key][0] == life for left in allowed)
        }
        text = f"{where}, {how} of {len(pending)} writes, {self._ended} commits"
        returned = set(self._returned)
        return Image(
            bytes(tables), parts, allowed, promised, returned, self._generation, self._model, text,
            self._marked, self._marked_at.get(self._certain),
        )  # fmt: skip

    def steps(self) -> int:
        """Steps of the load that have ended, as far as the walk has come."""
        return 0 if self._marked is None else self._marked.step + self._marked.ended

    def published(self) -> int:
        """Blocks that were answered as published, as far as the walk has come."""
        return len(self._returned)

    def durable(self, device: str, offset: int, length: int) -> bytes:
        """What no cut takes any more, somewhere on the device of this file name."""
        for file, disk in self._disks.items():
            if file.name == device:
                return bytes(disk.durable[offset : offset + length])
        raise AssertionError(f"{device} was written after the load, and never in it")


def _survivors(
    write: Write, how: str, chance: random.Random, *, early: bool
) -> Iterator[tuple[int, bytes]]:
    """What of *write* is on the drive after the cut."""
    if how == "all" or (how == "first" and early) or (how == "some" and chance.random() < 0.5):
        yield write.offset, write.data
    if how != "torn":
        return
    sectors = len(write.data) // SECTOR
    bits = chance.getrandbits(sectors)
    start = None
    for sector in range(sectors + 1):
        there = sector < sectors and bool(bits >> sector & 1)
        if there and start is None:
            start = sector * SECTOR
        elif not there and start is not None:
            yield write.offset + start, write.data[start : sector * SECTOR]
            start = None


def _generation_in(data: bytes) -> int:
    """The highest generation in the headers of one write; 0 if it has none."""
    headers = [data[at : at + ALIGN] for at in range(0, len(data), ALIGN)]
    return max(
        (int(Header.unpack(each).block.generation) for each in headers if each[:8] == HEADER_MAGIC),
        default=0,
    )

"""Keeps the access record: notes what is asked in memory, and writes it down in the background.

A note keeps the chain's names as they are, and waits for nothing. The thread that tends the
warehouse chooses which blocks are kept, and appends them to the newest segment. The record has a
bound in bytes: when that is reached the oldest segment goes, if all of it is older than the record
has to be; else one block in two is kept from then on, of what is there already too. Nothing is
flushed: after a power cut the end of the record may be missing, and nobody's KV with it.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from twfs.config import RecordSettings
from twfs.errors import CorruptMetadata
from twfs.layout import Layout
from twfs.policy.accesses import (
    AGAIN_MS,
    LEVEL_MAX,
    PUT_NOW,
    PUT_SOON,
    ROW_DTYPE,
    SAMPLE_DTYPE,
    SEGMENT_SUFFIX,
    TOTAL_DTYPE,
    USED_NOW,
    Chooser,
    Group,
    Kind,
    last_id,
    merged,
    read_segment,
    segments_in,
)
from twfs.units import ALIGN, HASH_BYTES, ModelId, align_up

SEGMENT_PARTS: Final = 8  # segments of a full record: so much of it goes at once
PENDING_ROWS_MAX: Final = 1 << 16  # in memory; more is lost, and counted
PENDING_BYTES_MAX: Final = 64 << 20  # of names: 8,700 requests of agents, and the tending comes by
FLUSH_BYTES: Final = 1 << 20  # are worth a write at once
FLUSH_SECONDS: Final = 10.0  # what a crash may lose otherwise
ENDS_MAX: Final = 1 << 13  # chains used lately: their puts, and touches soon after, are known
FULL_PART: Final = 0.75  # is left by one compaction, or the next would come too soon
ROOMY_PARTS: Final = 4  # a record of less than a fourth of its bound keeps more blocks again
DAY_MS: Final = 86_400_000
START_MAX: Final = (1 << 32) - 1  # of a row


def units_of(layout: Layout) -> int:
    """4 KiB units that one block takes with its headers, all groups and shards; 4 GiB at most."""
    whole = sum(
        layout.shards * (ALIGN + align_up(layout.block_bytes(group)))
        for group in range(len(layout.groups))
    )
    return min(whole // ALIGN, (1 << 32) - 1)


@dataclass
class _Pending:
    """What is noted and not yet written."""

    rows: list[tuple[int, ...]] = field(default_factory=list)  # as in ROW_DTYPE, without samples
    hashes: list[bytes] = field(default_factory=list)
    byte_count: int = 0
    lost: int = 0


KIND_AT, START_AT, STOP_AT = (
    list(ROW_DTYPE.fields or ()).index(each) for each in ("kind", "start", "stop")
)


@dataclass(slots=True)
class _Use:
    """A chain that was used of late, by its last name."""

    row_ms: int  # when the row of its match or touch was noted
    used_ms: int  # when it was used last
    least: bytes  # the name that stands for it in an END; empty if a put began it
    ended: int = 0  # the code of how it ended, as far as told
    put_soon: bool = False  # right after the match


def _is_soon(use: _Use, kind: Kind, now_ms: int) -> bool:
    """Tell whether a put or touch at *now_ms* belongs to the use of its chain before."""
    return kind is Kind.PUT or now_ms - use.used_ms < AGAIN_MS


def _ended(use: _Use, kind: Kind, code: int, now_ms: int) -> int:
    """What a put or touch that says *code* tells of *use*, as in `stop` of an END; 0: nothing."""
    told = 0
    if kind is Kind.PUT and now_ms - use.row_ms < AGAIN_MS:
        use.put_soon = True
    elif kind is Kind.PUT:
        told = PUT_NOW
    elif now_ms - use.used_ms >= AGAIN_MS:
        told, use.used_ms = USED_NOW, now_ms
    if code not in {0, use.ended}:
        if kind is Kind.PUT:
            told = PUT_NOW
        else:
            told, use.ended = USED_NOW, code
    return told | (code or use.ended) | (PUT_SOON if use.put_soon else 0) if told else 0


class Recorder:
    """See the module's docstring. Thread-safe."""

    def __init__(
        self, directory: Path, settings: RecordSettings, clock: Callable[[], int], secret: bytes
    ) -> None:
        self.directory = directory
        self.on = settings.on
        self._keep_ms = settings.days * DAY_MS
        self._bytes_max = settings.bytes
        self._segment_bytes = settings.bytes // SEGMENT_PARTS
        self._clock = clock
        self._mix = np.uint64(xxhash.xxh3_64_intdigest(b"twfs record\0" + secret) | 1)
        self._files = threading.Lock()  # whoever reads or writes segments
        self._lock = threading.Lock()  # guards what is pending, and the ends
        self._pending = _Pending()
        self._ends: dict[bytes, _Use] = {}
        self._sizes: dict[ModelId, tuple[int, int]] = {}
        self._segments: dict[Path, tuple[int, int, int]] = {}  # bytes, level, last_ms; in order
        self._level = 0
        self._eased_ms = 0
        self._written_before = 0
        self._flushed_s = time.monotonic()
        self.failure = ""
        if self.on:
            self._resume()

    @property
    def rate(self) -> float:
        """The part of all blocks whose uses are kept."""
        return 2.0**-self._level

    @property
    def byte_count(self) -> int:
        """Bytes of all segments."""
        return sum(size for size, _, _ in self._segments.values())

    def _resume(self) -> None:
        """Go on with what is there: a torn tail is cut off, a damaged segment begins anew."""
        try:
            for path in segments_in(self.directory):
                groups, end = read_segment(path)
                if not groups:
                    path.unlink()
                    continue
                os.truncate(path, end)
                level = max(group.level for group in groups)
                self._segments[path] = (end, level, max(group.last_ms for group in groups))
                self._level = max(self._level, level)
        except (OSError, CorruptMetadata) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Say why nothing is written; the warehouse goes on without."""
        self.failure = f"{self.directory}: {getattr(error, 'strerror', None) or error}"

    def note(
        self, kind: Kind, model: ModelId, layout: Layout, hashes: bytes, *, tenant: int,
        retention: int, start: int = 0, stop: int = 0, held: bool = True,
    ) -> None:  # fmt: skip
        """Note a use of the chain whose names are *hashes*, 16 bytes each.

        A match asked from block *start* on and found up to *stop*; of others *stop* is the code of
        how the request ended. A put has the blocks from *start* on alone. A put or touch that ends
        as a chain used of late is its END, and says nothing new if it comes soon after. If nothing
        of the chain is *held* it is noted as an END only: a larger store had put it then.
        """
        if not self.on or not hashes:
            return
        sizes = self._sizes.get(model)
        if sizes is None:
            sizes = self._sizes[model] = (units_of(layout), layout.block_tokens)
        count = len(hashes) // HASH_BYTES + (start if kind is Kind.PUT else 0)
        with self._lock:
            now_ms, end = self._clock(), hashes[-HASH_BYTES:]
            if not held and (end not in self._ends or not self._ends[end].least):
                return
            use = self._ends.pop(end, None)
            if kind is Kind.MATCH or use is None or not (use.least or _is_soon(use, kind, now_ms)):
                least = b"" if kind is Kind.PUT else self._least(hashes)
                use = _Use(now_ms, now_ms, least, 0 if kind is Kind.MATCH else stop)
            else:
                kind, stop, hashes = Kind.END, _ended(use, kind, stop, now_ms), use.least
                start = min(max(0, now_ms - use.row_ms), START_MAX)
            self._ends[end] = use
            if len(self._ends) > ENDS_MAX:
                del self._ends[next(iter(self._ends))]
            if kind is not Kind.END or (stop and hashes):
                self._wait((
                    now_ms, model, tenant, kind, retention, start, stop, count, 0, *sizes,
                ), hashes)  # fmt: skip

    def _least(self, hashes: bytes) -> bytes:
        """The one of *hashes* that a thinned record keeps longest."""
        ids = np.frombuffer(hashes, "<u8")[::2] * self._mix
        at = int(ids.argmin()) * HASH_BYTES
        return hashes[at : at + HASH_BYTES]

    def _wait(self, row: tuple[int, ...], hashes: bytes) -> None:
        """Let *row* be pending; a touch that follows the put of the same request is one with it."""
        pending = self._pending
        if row[KIND_AT] == Kind.END and pending.rows and pending.hashes[-1] == hashes:
            before = pending.rows[-1]
            alike = before[1 : KIND_AT + 1] == row[1 : KIND_AT + 1]
            since = row[0] - row[START_AT] == before[0] - before[START_AT]
            if alike and since and row[0] - before[0] < AGAIN_MS:
                told = before[STOP_AT] | row[STOP_AT]
                pending.rows[-1] = (*row[:STOP_AT], told, *row[STOP_AT + 1 :])
                return
        if (
            len(pending.rows) >= PENDING_ROWS_MAX
            or pending.byte_count + len(hashes) > PENDING_BYTES_MAX
        ):
            pending.lost += 1
            return
        pending.rows.append(row)
        pending.hashes.append(hashes)
        pending.byte_count += len(hashes)

    def tend(self, written_bytes: int) -> None:
        """Write down what is pending, if it is worth it or old; *written_bytes* since the open."""
        if not self.on:
            return
        waited_s = time.monotonic() - self._flushed_s
        if self._pending.byte_count >= FLUSH_BYTES or waited_s >= FLUSH_SECONDS:
            self.flush(written_bytes)

    def flush(self, written_bytes: int) -> None:
        """Write down what is pending. It never raises: what fails is told by `failure`."""
        if self.on:
            with self._files:
                self._flush(written_bytes)

    def _flush(self, written_bytes: int) -> None:
        self._flushed_s = time.monotonic()
        with self._lock:
            pending, self._pending = self._pending, _Pending()
        written = max(0, written_bytes - self._written_before)
        if not pending.rows and not written and not pending.lost:
            return
        self._written_before = written_bytes
        try:
            self._append(self._group_of(pending, written))
            self.failure = ""
        except (OSError, CorruptMetadata) as error:
            self._fail(error)

    def erase(self, used: Mapping[ModelId, bytes], of: Chooser) -> int:
        """Take out the rows that used blocks, and rows and sums that *of* chooses; how many rows.

        *used* are the names of these blocks by model, 16 bytes each. What lay in the place of a
        segment that changes is overwritten, and that is flushed. OSError, CorruptMetadata.
        """
        ids = {model: np.frombuffer(each, "<u8")[::2] * self._mix for model, each in used.items()}
        gone = 0
        with self._files:
            with self._lock:
                self._ends.clear()  # what is under way is noted anew when it ends
            if self.on:
                self._flush(self._written_before)
            for path in segments_in(self.directory):
                whole = merged(read_segment(path)[0])
                left = whole.without(ids, of)
                if left.byte_count != whole.byte_count:
                    gone += len(whole.rows) - len(left.rows)
                    _replace_wiped(path, left)
                    if path in self._segments:
                        self._segments[path] = (left.byte_count, left.level, left.last_ms)
        return gone

    def _group_of(self, pending: _Pending, written: int) -> Group:
        """What is pending, as rows and those samples that are kept now."""
        rows = np.array(pending.rows, ROW_DTYPE)
        ids = np.frombuffer(b"".join(pending.hashes), "<u8")[::2] * self._mix
        lengths = np.array([len(each) // HASH_BYTES for each in pending.hashes], np.int64)
        owner = np.repeat(np.arange(len(rows)), lengths)
        kept = np.flatnonzero(ids <= np.uint64(last_id(self._level)))
        owner = owner[kept]
        rows["samples"] = np.bincount(owner, minlength=len(rows))
        samples = np.zeros(len(kept), SAMPLE_DTYPE)
        samples["id"] = ids[kept]
        first = np.cumsum(lengths) - lengths
        begins = np.where(rows["kind"] == Kind.PUT, rows["start"], 0).astype(np.int64)
        samples["index"] = kept - first[owner] + begins[owner]
        now = self._clock()
        earliest = min(int(rows["time_ms"].min()), now) if len(rows) else now
        group = Group(
            self._level, rows, samples, np.zeros(0, TOTAL_DTYPE), earliest, now, written,
            pending.lost,
        )  # fmt: skip
        return group.thinned(self._level)

    def _append(self, group: Group) -> None:
        """Put *group* behind the newest segment, and keep to the bound. OSError."""
        while True:
            self._expire(group.last_ms)
            if self.byte_count + group.byte_count <= self._bytes_max:
                break
            self._compact()
            if self.byte_count + group.byte_count > self._bytes_max * FULL_PART:
                if self._level >= LEVEL_MAX:
                    return  # sums alone are more than may be kept: at no bound that is allowed
                self._level += 1
                self._eased_ms = self._clock()
                self._compact()
                group = group.thinned(self._level)
        self._ease(group.last_ms)
        self.directory.mkdir(0o700, exist_ok=True)
        path = next(reversed(self._segments), None)
        size, level, _ = (0, 0, 0) if path is None else self._segments[path]
        if path is None or size + group.byte_count > self._segment_bytes or level > group.level:
            number = 1 if path is None else int(path.stem) + 1
            path, size = self.directory / f"{number:08}{SEGMENT_SUFFIX}", 0
        data = group.pack()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.pwrite(fd, data, size) != len(data):
                raise OSError(0, "the disk is full")
            os.ftruncate(fd, size + len(data))  # what a write that failed before may have left
        finally:
            os.close(fd)
        self._segments[path] = (size + len(data), max(level, group.level), group.last_ms)

    def _expire(self, now_ms: int) -> None:
        """Drop segments that are older than the record has to be."""
        for path, (_, _, last_ms) in list(self._segments.items()):
            if last_ms + self._keep_ms >= now_ms:
                break
            path.unlink(missing_ok=True)
            del self._segments[path]

    def _compact(self) -> None:
        """Let each segment be one group, with only those blocks that are kept now."""
        for path in list(self._segments):
            groups, _ = read_segment(path)
            whole = merged(groups).thinned(self._level)
            _scratch(path, whole).replace(path)
            self._segments[path] = (whole.byte_count, whole.level, whole.last_ms)
        self._join()

    def _join(self) -> None:
        """Let small neighbours be one segment, so that thinned ones do not become many."""
        paths = list(self._segments)
        for earlier, later in pairwise(paths):
            both = self._segments[earlier][0] + self._segments[later][0]
            if both > self._segment_bytes:
                continue
            whole = merged(read_segment(earlier)[0] + read_segment(later)[0])
            scratch = _scratch(later, whole)
            earlier.unlink()  # first: after a crash rows are missing rather than there twice
            scratch.replace(later)
            del self._segments[earlier]
            self._segments[later] = (whole.byte_count, whole.level, whole.last_ms)

    def _ease(self, now_ms: int) -> None:
        """Keep twice the blocks again, once the record has been small for a good part of it."""
        if not self._eased_ms:
            self._eased_ms = now_ms
        long_ago = now_ms - self._eased_ms > self._keep_ms // ROOMY_PARTS
        if self._level and long_ago and self.byte_count < self._bytes_max // ROOMY_PARTS:
            self._eased_ms = now_ms
            self._level -= 1

    def statistics(self) -> dict[str, Any]:
        """What the record takes and keeps; JSON-ready."""
        return {
            "on": self.on, "bytes": self.byte_count, "bytes_max": self._bytes_max,
            "block_part": self.rate, "failure": self.failure,
        }  # fmt: skip


def _scratch(path: Path, whole: Group) -> Path:
    """A file beside *path* that holds *whole*, to take its place. OSError."""
    scratch = path.with_suffix(".new")
    fd = os.open(
        scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    with os.fdopen(fd, "wb") as file:
        file.write(whole.pack())
    return scratch


def _replace_wiped(path: Path, whole: Group) -> None:
    """Let *whole* take the place of the segment at *path*, whose bytes become zeros. OSError."""
    scratch = _scratch(path, whole)
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    home = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
        os.fsync(home)
        os.pwrite(fd, bytes(os.fstat(fd).st_size), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
        os.close(home)


def remove_record(directory: Path) -> None:
    """Take away the record of a warehouse that is no more."""
    shutil.rmtree(directory, ignore_errors=True)

"""The access record: what was asked of the warehouse, as a sample of blocks small at any load.

A row is one match, put or touch: when, of which model, tenant and class, how many blocks it asked
for and how far it hit. Of its blocks it keeps those alone whose name, mixed with the warehouse's
secret, is below a threshold that is the same for all (SHARDS: Waldspurger et al., FAST '15): of a
block all uses are kept or none, which is what a simulation needs. Neither token ids nor names
are in it. A row without such a block is a part of sums.

How a request that was matched ended is a row with one sample: the least of its chain, so that it is
kept just as long as the row of the match is. With the time between both it says which one that is.

Rows lie in groups, of which each has a checksum, and groups in segments: files that are only ever
appended to. What a crash cut off ends its segment; all before it counts.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from twfs.errors import CorruptMetadata, InvalidInput
from twfs.units import ModelId

RECORD_DIRECTORY: Final = "record"  # in the warehouse's
SEGMENT_SUFFIX: Final = ".accesses"
MAGIC: Final = b"twfsacc1"
HEAD: Final = struct.Struct("<8sIIIIIIQQQ")  # see Group.pack
SUM_BYTES: Final = 16
GROUP_BYTES_MAX: Final = 1 << 30  # as large as a whole record may be
LEVEL_MAX: Final = 40  # one block in 10^12

Array = npt.NDArray[Any]
Chooser = Callable[[Array], npt.NDArray[np.bool_]]  # which rows, or sums, by model, tenant, class


class Kind(IntEnum):
    """What used the blocks of a row."""

    MATCH = 1  # asked for them
    PUT = 2  # brought them, and no match had asked
    TOUCH = 3  # said that it used them, and no match had asked of late
    END = 4  # what a match had asked for was brought, or used again, or said how it ended


AGAIN_MS: Final = 1000  # what comes so long after the last use of its chain is told apart from it
# In `stop` of an END, above the code of hints.Stop:
CODE_MASK: Final = 3
PUT_NOW: Final = 4  # what the match missed was put at its end
USED_NOW: Final = 8  # the chain was touched
PUT_SOON: Final = 16  # what the match missed was put right after it

ROW_DTYPE: Final = np.dtype([
    ("time_ms", "<u8"), ("model", "<u4"), ("tenant", "<u2"), ("kind", "u1"), ("retention", "u1"),
    ("start", "<u4"),  # blocks before it are the asker's own: used, not asked for; END: ms since
    ("stop", "<u4"),  # a match held up to here; of the others how the request ended
    ("count", "<u4"),  # the length of the chain
    ("samples", "<u4"),  # how many of the group's samples are this row's
    ("units", "<u4"),  # of 4 KiB that a block takes, all its groups and shards
    ("tokens", "<u4"),  # of a block
])  # fmt: skip
SAMPLE_DTYPE: Final = np.dtype([("id", "<u8"), ("index", "<u4")])
TOTAL_KEY: Final = ("model", "tenant", "kind", "retention", "units", "tokens")
TOTAL_COUNTS: Final = ("requests", "asked", "held")
TOTAL_DTYPE: Final = np.dtype(
    [(name, ROW_DTYPE[name]) for name in TOTAL_KEY] + [(name, "<u8") for name in TOTAL_COUNTS]
)


def last_id(level: int) -> int:
    """The highest id that is kept at *level*: of all blocks one in 2 ** level."""
    return ((1 << 64) - 1) >> level


@dataclass(frozen=True)
class Group:
    """Rows with their samples, row by row, and the sums of rows that have none."""

    level: int
    rows: Array  # ROW_DTYPE
    samples: Array  # SAMPLE_DTYPE
    totals: Array  # TOTAL_DTYPE
    first_ms: int
    last_ms: int
    written_bytes: int = 0  # to the devices, in that time
    lost: int = 0  # requests that were not noted

    @property
    def byte_count(self) -> int:
        """Bytes when packed."""
        return HEAD.size + self.rows.nbytes + self.samples.nbytes + self.totals.nbytes + SUM_BYTES

    def pack(self) -> bytes:
        """The group as it lies in a segment."""
        parts = [
            HEAD.pack(
                MAGIC, self.byte_count, self.level, len(self.rows), len(self.samples),
                len(self.totals), self.lost, self.first_ms, self.last_ms, self.written_bytes,
            ),
            self.rows.tobytes(), self.samples.tobytes(), self.totals.tobytes(),
        ]  # fmt: skip
        body = b"".join(parts)
        return body + xxhash.xxh3_128_digest(body)

    def thinned(self, level: int) -> "Group":
        """The same at *level*, if that keeps fewer; rows left without a sample become sums."""
        level = max(level, self.level)
        kept = self.samples["id"] <= np.uint64(last_id(level))
        owner = np.repeat(np.arange(len(self.rows)), self.rows["samples"])[kept]
        counts = np.bincount(owner, minlength=len(self.rows))
        rows = self.rows.copy()
        rows["samples"] = counts
        totals = sums_of(self.totals, totals_of(rows[counts == 0]))
        return replace(
            self, level=level, rows=rows[counts > 0], samples=self.samples[kept], totals=totals
        )

    def without(self, used: Mapping[ModelId, Array], of: Chooser) -> "Group":
        """The same without rows that used one of the ids in *used*, by model, or that *of* chooses.

        And without the sums that it chooses.
        """
        gone = of(self.rows)
        owner = np.repeat(np.arange(len(self.rows)), self.rows["samples"])
        for model, ids in used.items():
            mine = self.rows["model"][owner] == model
            gone[owner[mine & np.isin(self.samples["id"], ids)]] = True
        return replace(
            self, rows=self.rows[~gone], samples=self.samples[~gone[owner]],
            totals=self.totals[~of(self.totals)],
        )  # fmt: skip


def totals_of(rows: Array) -> Array:
    """What *rows* add to sums, one each."""
    totals = np.zeros(len(rows), TOTAL_DTYPE)
    for name in TOTAL_KEY:
        totals[name] = rows[name]
    asked = rows["kind"] == Kind.MATCH
    start = rows["start"].astype(np.uint64)
    totals["requests"] = 1
    totals["asked"] = np.where(asked, rows["count"] - start, 0)
    totals["held"] = np.where(asked, np.maximum(rows["stop"], start) - start, 0)
    return totals


def sums_of(*parts: Array) -> Array:
    """All of *parts*, with what is alike in one row."""
    whole = np.concatenate(parts)
    keys, which = np.unique(whole[list(TOTAL_KEY)], return_inverse=True)
    totals = np.zeros(len(keys), TOTAL_DTYPE)
    for name in TOTAL_KEY:
        totals[name] = keys[name]
    for name in TOTAL_COUNTS:
        np.add.at(totals[name], which.reshape(-1), whole[name])
    return totals


def merged(groups: Iterable[Group]) -> Group:
    """All *groups* as one, at the level of the coarsest."""
    known = list(groups)
    level = max((group.level for group in known), default=0)
    thin = [group.thinned(level) for group in known]
    return Group(
        level,
        np.concatenate([np.zeros(0, ROW_DTYPE), *(group.rows for group in thin)]),
        np.concatenate([np.zeros(0, SAMPLE_DTYPE), *(group.samples for group in thin)]),
        sums_of(np.zeros(0, TOTAL_DTYPE), *(group.totals for group in thin)),
        min((group.first_ms for group in known), default=0),
        max((group.last_ms for group in known), default=0),
        sum(group.written_bytes for group in known),
        min(sum(group.lost for group in known), (1 << 32) - 1),
    )


def groups_in(data: bytes) -> Iterator[tuple[Group, int]]:
    """Each whole group of a segment and where it ends; what is torn or damaged ends them."""
    at = 0
    while len(data) - at >= HEAD.size + SUM_BYTES:
        magic, size, level, rows, samples, totals, lost, first_ms, last_ms, written = (
            HEAD.unpack_from(data, at)
        )
        need = (
            HEAD.size + SUM_BYTES + rows * ROW_DTYPE.itemsize + samples * SAMPLE_DTYPE.itemsize
            + totals * TOTAL_DTYPE.itemsize
        )  # fmt: skip
        end = at + size
        if magic != MAGIC or size != need or end > len(data) or level > LEVEL_MAX:
            return
        if xxhash.xxh3_128_digest(data[at : end - SUM_BYTES]) != data[end - SUM_BYTES : end]:
            return
        place = at + HEAD.size
        row = np.frombuffer(data, ROW_DTYPE, rows, place)
        place += row.nbytes
        sample = np.frombuffer(data, SAMPLE_DTYPE, samples, place)
        total = np.frombuffer(data, TOTAL_DTYPE, totals, place + sample.nbytes)
        if int(row["samples"].sum(dtype=np.uint64)) != samples:
            return
        yield Group(level, row, sample, total, first_ms, last_ms, written, lost), end
        at = end


def segments_in(directory: Path) -> list[Path]:
    """The segments of the record in *directory*, oldest first; none if there is no record."""
    if not directory.is_dir():
        return []
    return sorted(
        path for path in directory.iterdir()
        if path.suffix == SEGMENT_SUFFIX and path.stem.isdigit()
    )  # fmt: skip


def read_segment(path: Path) -> tuple[list[Group], int]:
    """The whole groups of one segment, and how many bytes of it they are."""
    if path.stat().st_size > GROUP_BYTES_MAX:
        raise CorruptMetadata(f"{path} is larger than any access record: delete it")
    found, end = [], 0
    for group, stop in groups_in(path.read_bytes()):
        found.append(group)
        end = stop
    return found, end


def read_record(directory: Path) -> Group:
    """All that the record in *directory* holds; InvalidInput if nothing or not to be read."""
    try:
        groups = [group for path in segments_in(directory) for group in read_segment(path)[0]]
    except OSError as error:
        raise InvalidInput(
            f"the access record in {directory} cannot be read: {error.strerror}; run this as the "
            "daemon's user"
        ) from error
    if not groups:
        raise InvalidInput(
            f"there is no access record in {directory}: it begins with the first requests, unless "
            "[record] in twfs.toml has it off"
        )
    return merged(groups)

"""What a faulty disk is told, and what it notes: rules, control messages, and the log of writes.

The disk itself is support.faultdisk, a process; support.faultydisks starts it and speaks to it.
Everything here is pure.
"""

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

SECTOR: Final = 512  # what a disk writes whole or not at all
EVERYWHERE: Final = 1 << 62


class Op(enum.Enum):
    """What the kernel asks of a disk."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"


class Act(enum.Enum):
    """What a disk does instead of what it was asked for."""

    EIO = "eio"
    ENOSPC = "enospc"
    GONE = "gone"  # an error, and from then on for everything, until the rules change
    SHORT = "short"  # read or write the first *amount* bytes and say so
    LOST = "lost"  # say that it was written, or flushed, and do nothing
    TORN = "torn"  # write the first *amount* bytes and say that it was all
    MISDIRECT = "misdirect"  # write it *amount* bytes further on
    FLIP = "flip"  # read it with one bit of the byte at *low* changed
    DELAY = "delay"  # do it after *amount* milliseconds
    HANG = "hang"  # do it once the rules have changed; an error if that takes too long
    STALE = "stale"  # read what was there when the snapshot was taken


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """Do *act* whenever *op* touches the bytes *low* up to *high* of *disk*.

    *skip* leaves the first so many such requests alone, and *times* ends it after so many.
    """

    disk: str
    op: Op
    act: Act
    low: int = 0
    high: int = EVERYWHERE
    amount: int = SECTOR
    skip: int = 0
    times: int = EVERYWHERE


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line to the control socket; what is None is left as it is. The answer is a Reply.

    New *rules*, a *mark* for the log, a *snapshot* of the disk of that name, *logging* or not.
    """

    rules: list[Rule] | None = None
    mark: str | None = None
    snapshot: str | None = None
    logging: bool | None = None


class Reply(msgspec.Struct, frozen=True):
    """How often each of the present rules has acted, and how many requests hang."""

    acted: list[int]
    hanging: int
    logged: int


class Kind(enum.IntEnum):
    """What a record of the log is of."""

    WRITE = 1
    FLUSH = 2
    MARK = 3


HEAD: Final = struct.Struct("<BBQI")  # kind, number of the disk, offset, length of what follows


@dataclass(frozen=True, slots=True)
class Logged:
    """One record: what became of a disk, in the order of all disks together."""

    kind: Kind
    disk: int
    offset: int
    data: bytes


def packed(record: Logged) -> bytes:
    """The record as it is in the log."""
    return HEAD.pack(record.kind, record.disk, record.offset, len(record.data)) + record.data


def read_log(path: Path) -> Iterator[Logged]:
    """The records of a log, in their order; ValueError if it ends in the midst of one."""
    with path.open("rb") as file:
        while head := file.read(HEAD.size):
            kind, disk, offset, length = HEAD.unpack(head)
            data = file.read(length)
            if len(data) != length:
                raise ValueError(f"{path} ends within a record of {length} bytes")
            yield Logged(Kind(kind), disk, offset, data)

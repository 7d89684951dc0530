"""The rows of the mounted files: what each is called, whose it is, which blocks are its bytes.

A file's bytes are blocks like all others, in a chain of own keys. The last of them carries the row
behind the bytes, so that the devices alone say what the metadata says; a row that changes later
goes into a small block of its own at the end of that chain. Everything is little-endian; unpacking
treats every byte as hostile and raises ValueError.
"""

import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from twfs.layout import FILES_NAME, Arrangement, Group, Layout
from twfs.prefix import OwnKey
from twfs.units import ALIGN, Ino, align_up

FILE_ROW: Final = struct.Struct("<QQQqqIIIIIHBB")
FILE_KEY: Final = struct.Struct("<QIIB")
ATTRIBUTE: Final = struct.Struct("<HI")  # lengths of name and value, which follow
TAIL: Final = struct.Struct("<I")  # length of the row before it: the end of a payload

ROOT_INO: Final = Ino(0)  # of the tree; it has no name, and no block until it is changed
PIECE_BYTES: Final = 4 << 20  # of a file in one block: what is read to verify one byte
ROW_BYTES_MAX: Final = 60 << 10
PAYLOAD_BYTES_MAX: Final = PIECE_BYTES + (64 << 10)
ATTRIBUTES_BYTES_MAX: Final = 56 << 10  # names and values of one file's, as on ext4: one block
FILE_BYTES_MAX: Final = 64 << 30  # all of a file is published by one transaction
FILE_NAME_BYTES_MAX: Final = 255
NO_NAMES: Final = frozenset({b"", b".", b".."})

FILES_LAYOUT: Final = Layout(
    FILES_NAME,
    (Group(1, arrangement=Arrangement.ANY_LENGTH, dtype="uint8", layer_bytes=PAYLOAD_BYTES_MAX),),
    16, engine=FILES_NAME,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file or directory. *blocks* hold the bytes of a file; *version* counts changed rows."""

    ino: Ino
    parent: Ino
    name: bytes
    mode: int  # type and permissions, as stat has them
    uid: int
    gid: int
    size: int = 0
    blocks: int = 0
    version: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    retention: int = 1  # of a directory: of the files made in it
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return stat.S_ISDIR(self.mode)

    def pack(self) -> bytes:
        """Return the row: fixed part, name, extended attributes."""
        fixed = FILE_ROW.pack(
            self.ino, self.parent, self.size, self.mtime_ns, self.ctime_ns, self.mode, self.uid,
            self.gid, self.blocks, self.version, len(self.name), self.retention, 0,
        )  # fmt: skip
        attributes = b"".join(
            ATTRIBUTE.pack(len(name), len(value)) + name + value
            for name, value in sorted(self.xattrs.items())
        )
        return fixed + self.name + attributes

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> "FileRow":
        """Make a row of *data*; ValueError says what is wrong."""
        if not FILE_ROW.size <= len(data) <= ROW_BYTES_MAX:
            raise ValueError(f"a file's row has {len(data)} bytes")
        (ino, parent, size, mtime, ctime, mode, uid, gid, blocks, version, name_bytes, retention,
         _) = FILE_ROW.unpack_from(data)  # fmt: skip
        at = FILE_ROW.size + name_bytes
        name = bytes(data[FILE_ROW.size : at])
        if len(name) != name_bytes or name_bytes > FILE_NAME_BYTES_MAX or retention > 3:
            raise ValueError(f"a file's row has a name of {name_bytes} bytes, class {retention}")
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or blocks != blocks_of(mode, size):
            raise ValueError(f"a file's row has mode {mode:o}, {size} bytes in {blocks} blocks")
        xattrs = {}
        while at < len(data):
            if len(data) - at < ATTRIBUTE.size:
                raise ValueError("a file's row ends within an attribute")
            lengths = ATTRIBUTE.unpack_from(data, at)
            start, middle, at = at + ATTRIBUTE.size, 0, at + ATTRIBUTE.size + sum(lengths)
            middle = start + lengths[0]
            if at > len(data):
                raise ValueError("a file's row ends within an attribute")
            xattrs[bytes(data[start:middle])] = bytes(data[middle:at])
        return cls(
            Ino(ino), Ino(parent), name, mode, uid, gid, size, blocks, version, mtime, ctime,
            retention, xattrs,
        )  # fmt: skip


def blocks_of(mode: int, size: int) -> int:
    """How many blocks hold a file of *size* bytes: one for none, where the row is; 0: no file."""
    return 0 if stat.S_ISDIR(mode) else max(1, -(-size // PIECE_BYTES))


def piece_bytes(row: FileRow, index: int) -> int:
    """Bytes of the file in its block *index*."""
    return max(0, min(PIECE_BYTES, row.size - index * PIECE_BYTES))


def device_bytes(row: FileRow) -> int:
    """What a file or directory takes of the devices: headers, bytes, rows, padding.

    Of a file whose row has changed since, as if it had had its present name from the beginning.
    """
    attributes = sum(ATTRIBUTE.size + len(name) + len(value) for name, value in row.xattrs.items())
    tail = FILE_ROW.size + len(row.name) + attributes + TAIL.size
    has_own_block = row.version or (row.is_directory and row.ino != ROOT_INO)
    changed = ALIGN + align_up(tail) if has_own_block else 0
    if row.is_directory:
        return changed
    last = piece_bytes(row, row.blocks - 1)
    return changed + row.blocks * ALIGN + align_up(row.size - last) + align_up(last + tail)


def tail_of(row: FileRow) -> bytes:
    """What follows the bytes of the file in the block that carries *row*."""
    packed = row.pack()
    return packed + TAIL.pack(len(packed))


def row_of(payload: bytes | memoryview) -> FileRow:
    """The row at the end of *payload*; ValueError."""
    if len(payload) < TAIL.size:
        raise ValueError(f"a payload of {len(payload)} bytes carries no row")
    (length,) = TAIL.unpack_from(payload, len(payload) - TAIL.size)
    end = len(payload) - TAIL.size
    if length > end:
        raise ValueError(f"a payload of {len(payload)} bytes carries no row of {length}")
    return FileRow.unpack(payload[end - length : end])


# Own keys: inode, index, version, whether it carries a row.


def content_key(row: FileRow, index: int) -> bytes:
    """The own key of the block with the piece *index* of a file."""
    return FILE_KEY.pack(row.ino, index, 0, index == row.blocks - 1)


def row_key(row: FileRow) -> bytes:
    """The own key of the block that carries *row*."""
    if row.blocks and not row.version:
        return content_key(row, row.blocks - 1)
    return FILE_KEY.pack(row.ino, row.blocks, row.version, 1)


def content_names(row: FileRow) -> list[OwnKey]:
    """The blocks with the bytes of a file, in order; the last carries version 0 of the row."""
    found: list[OwnKey] = []
    for index in range(row.blocks):
        found.append(OwnKey(content_key(row, index), found[-1].key if found else None, index + 1))
    return found


def row_name(row: FileRow) -> OwnKey:
    """The block that carries a row which has changed, or a directory's."""
    above = content_key(row, row.blocks - 1) if row.blocks else None
    return OwnKey(row_key(row), above, row.blocks + 1)


def names_of(row: FileRow) -> list[OwnKey]:
    """All blocks of a file or directory, in chain order."""
    changed = row.version or row.is_directory
    return content_names(row) + ([row_name(row)] if changed else [])


def carries_row(key: bytes) -> bool:
    """Tell whether the block with that own key carries a row."""
    return len(key) == FILE_KEY.size and bool(FILE_KEY.unpack(key)[3])


def needs(row: FileRow, key: bytes) -> bool:
    """Tell whether *row* is not whole without the block with that own key."""
    if len(key) != FILE_KEY.size:
        return False
    ino, index, version, _ = FILE_KEY.unpack(key)
    return ino == row.ino and ((index < row.blocks and not version) or key == row_key(row))

"""What the metadata says of the mounted files, and the transactions that change it.

Functions of a view, and of nothing else. Names lead to inodes, inodes to rows; a row is there only
while all blocks of its file are, so nobody ever sees part of one.
"""

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from twfs.errors import (
    CorruptMetadata,
    FileExists,
    InvalidInput,
    IsADirectory,
    NoSuchFile,
    NotADirectory,
    NotEmpty,
)
from twfs.metadata.filerows import FILE_ROW, ROOT_INO, FileRow, needs
from twfs.metadata.tables import ReadView, WriteView
from twfs.units import Ino

INO_KEY: Final = struct.Struct(">Q")  # big-endian: names of one directory lie together, in order
DEPTH_MAX: Final = 4096  # directories below each other: more than any path has


class RowChanged(Exception):
    """A row is not what a change was made of: look again."""


def get_row(view: ReadView, ino: int) -> FileRow | None:
    """The row of *ino*; CorruptMetadata if it cannot be read."""
    value = view.get_raw("files", INO_KEY.pack(ino))
    if value is None:
        return None
    try:
        return FileRow.unpack(value)
    except ValueError as error:
        raise CorruptMetadata(f"the row of file {ino} is unreadable: {error}") from error


def require_row(view: ReadView, ino: int) -> FileRow:
    """The row of *ino*; NoSuchFile."""
    row = get_row(view, ino)
    if row is None:
        raise NoSuchFile(f"no file has the inode {ino}")
    return row


def require_directory(view: ReadView, ino: int) -> FileRow:
    """The row of the directory *ino*; NoSuchFile, NotADirectory."""
    row = require_row(view, ino)
    if not row.is_directory:
        raise NotADirectory(f"{row.name!r} is no directory")
    return row


def ino_at(view: ReadView, parent: int, name: bytes) -> Ino | None:
    """What *name* leads to in the directory *parent*."""
    value = view.get_raw("paths", INO_KEY.pack(parent) + name)
    return None if value is None else Ino(int.from_bytes(value, "big"))


def row_at(view: ReadView, parent: int, name: bytes) -> FileRow | None:
    """The row that *name* leads to."""
    ino = ino_at(view, parent, name)
    return None if ino is None else get_row(view, ino)


def names_in(view: ReadView, parent: int) -> Iterator[tuple[bytes, Ino]]:
    """All names of the directory *parent*, in order."""
    prefix = INO_KEY.pack(parent)
    for key, value in view.under("paths", prefix):
        yield key[len(prefix) :], Ino(int.from_bytes(value, "big"))


def all_rows(view: ReadView) -> Iterator[FileRow]:
    """Every row, by inode; CorruptMetadata if one cannot be read."""
    for key, value in view.under("files", b""):
        try:
            yield FileRow.unpack(value)
        except ValueError as error:
            raise CorruptMetadata(f"the row of file {key.hex()} is unreadable: {error}") from error


def count_directories(view: ReadView) -> int:
    """How many directories there are: looks at every row, 3 us each."""
    return sum(_is_directory(value) for _, value in view.under("files", b""))


def _is_directory(value: bytes) -> bool:
    return stat.S_ISDIR(FILE_ROW.unpack_from(value)[5])


def _is_empty(view: ReadView, parent: int) -> bool:
    return next(names_in(view, parent), None) is None


def put_row(view: WriteView, row: FileRow) -> None:
    """Add or replace a row, and nothing else."""
    view.put_raw("files", INO_KEY.pack(row.ino), row.pack())


def put_name(view: WriteView, row: FileRow) -> None:
    """Let the name of *row* lead to it."""
    view.put_raw("paths", INO_KEY.pack(row.parent) + row.name, INO_KEY.pack(row.ino))


def _drop_name(view: WriteView, row: FileRow) -> None:
    view.delete_raw("paths", INO_KEY.pack(row.parent) + row.name)


def drop(view: WriteView, row: FileRow) -> None:
    """Take a row out, and its name if that leads to it."""
    view.delete_raw("files", INO_KEY.pack(row.ino))
    if ino_at(view, row.parent, row.name) == row.ino:
        _drop_name(view, row)


def _note_change(view: WriteView, directory: FileRow, now_ns: int) -> None:
    """A name of *directory* has changed: that is its modification."""
    later = max(directory.mtime_ns, now_ns)
    put_row(view, replace(directory, mtime_ns=later, ctime_ns=later))


def _refuse_over(row: FileRow, old: FileRow) -> None:
    """Raise unless *row* may take the place of *old*, whose emptiness is not looked at."""
    if old.is_directory and not row.is_directory:
        raise IsADirectory(f"{old.name!r} is a directory")
    if row.is_directory and not old.is_directory:
        raise NotADirectory(f"{old.name!r} is no directory")


def enter(view: WriteView, row: FileRow, now_ns: int, *, over: bool) -> FileRow | None:
    """Enter a new file or directory; with *over* in the place of a file, whose row is returned.

    NoSuchFile if its directory has gone, FileExists, IsADirectory.
    """
    directory = require_directory(view, row.parent)
    old = row_at(view, row.parent, row.name)
    if old is not None:
        if not over:
            raise FileExists(f"there is a {row.name!r}")
        _refuse_over(row, old)
        drop(view, old)
    put_row(view, row)
    put_name(view, row)
    if old is None:  # a file that was written anew is no change of its directory
        _note_change(view, directory, now_ns)
    return old


def unlink(view: WriteView, parent: int, name: bytes, now_ns: int) -> FileRow:
    """Take a file out; its row. NoSuchFile, IsADirectory."""
    row = row_at(view, parent, name)
    if row is None:
        raise NoSuchFile(f"no {name!r} here")
    if row.is_directory:
        raise IsADirectory(f"{name!r} is a directory")
    drop(view, row)
    _note_change(view, require_directory(view, parent), now_ns)
    return row


def rmdir(view: WriteView, parent: int, name: bytes, now_ns: int) -> FileRow:
    """Take an empty directory out; its row. NoSuchFile, NotADirectory, NotEmpty."""
    row = row_at(view, parent, name)
    if row is None:
        raise NoSuchFile(f"no {name!r} here")
    if not row.is_directory:
        raise NotADirectory(f"{name!r} is no directory")
    if not _is_empty(view, row.ino):
        raise NotEmpty(f"{name!r} is not empty")
    drop(view, row)
    _note_change(view, require_directory(view, parent), now_ns)
    return row


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change of a row came to: the row *before*, and what a rename took the place of."""

    before: FileRow
    over: FileRow | None = None


def change(view: WriteView, before: FileRow, after: FileRow) -> Changed:
    """Replace a row where it is; RowChanged unless it is *before* still, but for its times."""
    now = _same(view, before)
    if after.is_directory and (after.mtime_ns, after.ctime_ns) < (now.mtime_ns, now.ctime_ns):
        keep = after.mtime_ns == before.mtime_ns  # names changed in it meanwhile
        after = replace(after, mtime_ns=now.mtime_ns if keep else after.mtime_ns)
    put_row(view, after)
    return Changed(before)


def _same(view: ReadView, before: FileRow) -> FileRow:
    now = get_row(view, before.ino)
    place = None if now is None else (now.version, now.parent, now.name)
    if now is None or place != (before.version, before.parent, before.name):
        raise RowChanged
    return now


def move(view: WriteView, before: FileRow, after: FileRow, now_ns: int, *, over: bool) -> Changed:
    """Rename *before* to the place of *after*, of the same inode.

    With *over* what has that name gives way: it is in the result. RowChanged, NoSuchFile,
    FileExists, IsADirectory, NotADirectory, NotEmpty; InvalidInput for a directory into itself.
    """
    now = _same(view, before)
    after = replace(after, mtime_ns=now.mtime_ns)  # names may have changed in it meanwhile
    require_directory(view, after.parent)
    old = row_at(view, after.parent, after.name)
    if old is not None:
        if not over:
            raise FileExists(f"there is a {after.name!r}")
        _refuse_over(after, old)
        if old.is_directory and not _is_empty(view, old.ino):
            raise NotEmpty(f"{old.name!r} is not empty")
    if after.is_directory:
        _refuse_below(view, after)
    if old is not None:
        drop(view, old)
    _drop_name(view, before)
    put_row(view, after)
    put_name(view, after)
    for parent in {before.parent, after.parent}:
        _note_change(view, require_directory(view, parent), now_ns)
    return Changed(before, old)


def _refuse_below(view: ReadView, moved: FileRow) -> None:
    """Raise InvalidInput if the directory *moved* would be below itself."""
    at: int = moved.parent
    for _ in range(DEPTH_MAX):
        if at == moved.ino:
            raise InvalidInput(f"{moved.name!r} cannot be moved into itself")
        if at == ROOT_INO:
            return
        at = require_row(view, at).parent
    raise InvalidInput(f"{moved.name!r} would be {DEPTH_MAX} directories deep")


def lose(view: WriteView, key: bytes) -> FileRow | None:
    """The block with that own key is not there any more: nor is the file that needs it.

    Returns its row. A directory stays: its row is written to a device again at the next start.
    """
    ino = int.from_bytes(key[:8], "little")
    row = get_row(view, ino)
    if row is None or row.is_directory or not needs(row, key):
        return None
    drop(view, row)
    return row

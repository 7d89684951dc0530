"""The tree of files: write-once files under any path, for engines that only know directories.

A file that is being written is a *draft*: the process that made it sees it under its name, nobody
else does. When its last writer has closed it, it is published as a whole, in one transaction with
its name; the file that had the name before goes then. What is published never changes: whoever
opens it for writing writes another file that takes its place. No FUSE here.

Methods that may wait say so; all are thread-safe. Names are bytes without `/`.
"""

import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

from twfs.core.state import Core
from twfs.errors import (
    FileExists,
    NoAttribute,
    NoSuchFile,
    TwfsError,
    WarehouseFull,
)
from twfs.metadata import filetables
from twfs.metadata.filerows import ATTRIBUTES_BYTES_MAX, FileRow
from twfs.metadata.filetables import Changed, RowChanged
from twfs.metadata.tables import WriteView
from twfs.store import Retention
from twfs.units import ALIGN, Ino
from twfs.vfs.drafting import PERMISSIONS, Drafting, Place, check_name
from twfs.vfs.fileblocks import RETENTIONS
from twfs.vfs.filerecovery import recover

TRIES: Final = 16  # of a change that others changed under
DIRECTORY_PARTS: Final = 16  # of the space may be directories: they are never evicted
UNOPENED_SECONDS: Final = 60.0  # a draft that was made for an open which never came


class Files(Drafting):
    """See the module's docstring."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self._directories: int | None = None  # how many there are, once that was asked
        recover(core, self.blocks)

    # Names. All of these wait for a commit.

    def mkdir(self, parent: int, name: bytes, *, mode: int, uid: int, gid: int) -> FileRow:
        """Make a directory; FileExists, NoSuchFile, WarehouseFull."""
        check_name(name)
        self.blocks.need_model(*self.root_owner)
        above = self._directory(parent)
        if self.draft_at(parent, name, None) is not None:
            raise FileExists(f"{name!r} is being written")
        self._check_directories()
        kept = above.mode & stat.S_ISGID
        now = self.blocks.now_ns()
        row = FileRow(
            self._new_ino(), Ino(parent), name, stat.S_IFDIR | kept | mode & PERMISSIONS, uid,
            above.gid if kept else gid, mtime_ns=now, ctime_ns=now, retention=above.retention,
        )  # fmt: skip
        with self._core.metadata.read() as view:
            if filetables.ino_at(view, parent, name) is not None:
                raise FileExists(f"there is a {name!r}")
        self.blocks.put_row(row, lambda view: filetables.enter(view, row, now, over=False), _done)
        self._count_directories(1)
        return row

    def _count_directories(self, more: int) -> None:
        with self._lock:
            if self._directories is not None:
                self._directories += more

    def _check_directories(self) -> None:
        """Raise WarehouseFull if directories, which are never evicted, take much of the space."""
        with self._core.metadata.read() as view:
            rows = view.counts()["files"]
        if rows * 2 * ALIGN * DIRECTORY_PARTS < self._core.allocator.total_bytes:
            return  # even if all were directories
        held = self._directories
        if held is None:  # every row is looked at, but once
            with self._core.metadata.read() as view:
                held = self._directories = filetables.count_directories(view)
        if held * 2 * ALIGN * DIRECTORY_PARTS >= self._core.allocator.total_bytes:
            raise WarehouseFull(
                f"{held} directories take 1/{DIRECTORY_PARTS} of the space, which is all they may: "
                "remove some"
            )

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory; NoSuchFile, NotADirectory, NotEmpty."""
        now = self.blocks.now_ns()

        def job(view: WriteView) -> FileRow:
            row = filetables.rmdir(view, parent, name, now)
            leave(row)
            return row

        with self._removing() as leave:
            gone = self._submit(job)
        self._count_directories(-1)
        self.blocks.discard([gone])

    def unlink(self, parent: int, name: bytes, writer: int = 0) -> None:
        """Remove a file: the draft that *writer* sees, or the published one; NoSuchFile."""
        with self._lock:
            draft = self.draft_at(parent, name, writer) if writer else None
            if draft is not None:
                self.disown(draft)
                if draft.base is None:
                    return
        now = self.blocks.now_ns()
        gone = self._submit(lambda view: filetables.unlink(view, parent, name, now))
        self._let_go([gone])

    def _submit(self, job: Callable[[WriteView], FileRow]) -> FileRow:
        return self._core.metadata.submit(job).result()

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, *,
        writer: int = 0, over: bool = True,
    ) -> None:  # fmt: skip
        """Rename a file or directory, in place of what has the new name with *over*.

        NoSuchFile, FileExists, IsADirectory, NotADirectory, NotEmpty, InvalidInput.
        """
        check_name(new_name)
        if self._rename_draft((parent, name), (new_parent, new_name), writer, over=over):
            return
        for _ in range(TRIES):
            before = self.lookup(parent, name)
            if (before.parent, before.name) == (new_parent, new_name):
                return
            now = self.blocks.now_ns()
            after = replace(
                before, parent=Ino(new_parent), name=new_name, version=before.version + 1,
                ctime_ns=now,
            )  # fmt: skip
            with suppress(RowChanged), self._removing() as leave:
                self._put_changed(after, _mover(before, after, now, leave, over=over))
                return
        raise NoSuchFile(f"{name!r} is changed by others all the time")

    def _rename_draft(self, old: Place, new: Place, writer: int, *, over: bool) -> bool:
        with self._lock:
            draft = self.draft_at(*old, writer) if writer else None
            if draft is None or draft.base is not None:
                return False
            with self._core.metadata.read() as view:
                there = filetables.row_at(view, *new)
            if there is not None and (not over or there.is_directory):
                raise FileExists(f"there is a {new[1]!r}")
            self._staying(new[0])
            self._unplace(draft)
            draft.parent, draft.name = Ino(new[0]), new[1]
            draft.touch()
            self._at.setdefault(new, []).append(draft)
            return True

    # Attributes. These wait for a commit, but on drafts.

    def set_attributes(
        self, ino: int, *, mode: int | None = None, uid: int | None = None,
        gid: int | None = None, mtime_ns: int | None = None,
    ) -> FileRow:  # fmt: skip
        """Change what is given; the file as it is then. NoSuchFile."""
        draft = self.draft(ino)
        if draft is not None:
            with self._lock:
                if mode is not None:
                    draft.mode = stat.S_IFMT(draft.mode) | mode & PERMISSIONS
                draft.uid = draft.uid if uid is None else uid
                draft.gid = draft.gid if gid is None else gid
                draft.mtime_ns = draft.mtime_ns if mtime_ns is None else mtime_ns
                draft.touch()
                return draft.row()

        def change(row: FileRow) -> FileRow:
            return replace(
                row,
                mode=row.mode if mode is None else stat.S_IFMT(row.mode) | mode & PERMISSIONS,
                uid=row.uid if uid is None else uid, gid=row.gid if gid is None else gid,
                mtime_ns=row.mtime_ns if mtime_ns is None else mtime_ns,
            )  # fmt: skip

        return self._change(ino, change)

    def set_xattr(self, ino: int, name: bytes, value: bytes, *, must: bool | None = None) -> None:
        """Set an attribute; *must*: it is there (NoAttribute), or False: it is not (FileExists)."""

        def change(xattrs: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
            if must is True and name not in xattrs:
                raise NoAttribute(f"no attribute {name!r}")
            if must is False and name in xattrs:
                raise FileExists(f"there is an attribute {name!r}")
            changed = {**xattrs, name: value}
            if (
                sum(len(key) + len(each) + 6 for key, each in changed.items())
                > ATTRIBUTES_BYTES_MAX
            ):
                raise WarehouseFull(f"attributes of more than {ATTRIBUTES_BYTES_MAX} bytes")
            return changed

        self._change_xattrs(ino, change)

    def remove_xattr(self, ino: int, name: bytes) -> None:
        """Remove an attribute; NoAttribute."""

        def change(xattrs: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
            if name not in xattrs:
                raise NoAttribute(f"no attribute {name!r}")
            return {key: value for key, value in xattrs.items() if key != name}

        self._change_xattrs(ino, change)

    def _change_xattrs(
        self, ino: int, change: Callable[[Mapping[bytes, bytes]], dict[bytes, bytes]]
    ) -> None:
        draft = self.draft(ino)
        if draft is None:
            self._change(ino, lambda row: replace(row, xattrs=change(row.xattrs)))
            return
        with self._lock:
            draft.xattrs = change(draft.xattrs)
            draft.touch()

    def set_retention(self, ino: int, retention: Retention) -> None:
        """Set the class of a file's blocks, or of the files that a directory will have."""
        draft = self.draft(ino)
        if draft is not None:
            draft.retention = retention.rank
            draft.touch()
            return
        row = self._change(ino, lambda row: replace(row, retention=retention.rank))
        if not row.is_directory:
            self.blocks.set_retention(row, retention)

    @staticmethod
    def retention_of(row: FileRow) -> Retention:
        """The class of a file, or of the files that a directory will have."""
        return RETENTIONS[row.retention]

    def _change(self, ino: int, change: Callable[[FileRow], FileRow]) -> FileRow:
        for _ in range(TRIES):
            before = self.row(ino)
            after = change(before)
            if after == before:
                return before
            if ino in self._unlinked:
                self._unlinked[Ino(ino)] = after
                return after
            self.blocks.need_model(*self.root_owner)
            now = self.blocks.now_ns()
            after = replace(after, version=before.version + 1, ctime_ns=now)
            with suppress(RowChanged):
                self._put_changed(after, _changer(before, after))
                return after
        raise NoSuchFile(f"inode {ino} is changed by others all the time")

    def _put_changed(self, after: FileRow, also: Callable[[WriteView], Changed]) -> None:
        def then(changed: Changed) -> None:
            self.blocks.discard_row(changed.before)
            if changed.over is not None:
                self._count_directories(-changed.over.is_directory)
                self._let_go([changed.over])

        self.blocks.put_row(after, also, then)

    # In the background

    def tend(self) -> None:
        """Remove what is left of files that lost a block, and drafts that were never opened."""
        lost = []
        with suppress(IndexError):
            while True:
                lost.append(self._core.gone_files.popleft())
        if lost:
            self._lost += len(lost)
            self.gone.extend(lost)
            self.blocks.discard(lost)
        late = time.monotonic() - UNOPENED_SECONDS
        with self._lock:
            idle = [
                draft for draft in self._drafts.values()
                if not draft.writers and not draft.readers and draft.born_s < late
                and draft.changes == 0 and draft.base is not None
            ]  # fmt: skip
        for draft in idle:
            with suppress(TwfsError):
                self.drop(draft)


def _done(_: object) -> None:
    """Nothing follows."""


def _mover(
    before: FileRow, after: FileRow, now_ns: int, leave: Callable[[FileRow], None], *, over: bool
) -> Callable[[WriteView], Changed]:
    def move(view: WriteView) -> Changed:
        changed = filetables.move(view, before, after, now_ns, over=over)
        if changed.over is not None and changed.over.is_directory:
            leave(changed.over)
        return changed

    return move


def _changer(before: FileRow, after: FileRow) -> Callable[[WriteView], Changed]:
    return lambda view: filetables.change(view, before, after)

"""Files that are being written, and what becomes of them: the part of files.py that makes files.

Methods that may wait say so; all are thread-safe.
"""

import os
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from twfs.core.state import Core
from twfs.errors import (
    FileExists,
    InvalidInput,
    NameTooLong,
    NoSuchFile,
    NotADirectory,
    NotEmpty,
    TooLarge,
)
from twfs.metadata import filetables
from twfs.metadata.filerows import (
    FILE_NAME_BYTES_MAX,
    NO_NAMES,
    ROOT_INO,
    FileRow,
)
from twfs.metadata.tables import ReadView
from twfs.units import Ino
from twfs.vfs.drafts import Draft, Memory, Room
from twfs.vfs.fileblocks import FileBlocks

DRAFTS_MAX: Final = 1 << 16
PERMISSIONS: Final = 0o7777

Place = tuple[int, bytes]


class Drafting:
    """See the module's docstring."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.blocks = FileBlocks(core)
        self._room = Room(core.directory, Memory())
        self._lock = threading.RLock()  # guards all below; never held over I/O or a commit
        self._drafts: dict[Ino, Draft] = {}
        self._at: dict[Place, list[Draft]] = {}
        self._leaving: set[Ino] = set()  # directories that a transaction under way removes
        self._open: Counter[Ino] = Counter()  # open descriptions of published files
        self._unlinked: dict[Ino, FileRow] = {}  # but open: their blocks go with the last close
        self.gone: deque[FileRow] = deque(maxlen=1 << 20)  # evicted or lost: for who shows them
        self._published = self._lost = 0
        self.root_owner = (os.geteuid(), os.getegid())  # until it is changed

    def close(self) -> None:
        """Drop what is being written, and end all threads."""
        with self._lock:
            drafts = list(self._drafts.values())
        for draft in drafts:
            self.drop(draft)
        self.blocks.close()
        self._room.close()

    def statistics(self) -> dict[str, Any]:
        """What is there and what is being written."""
        with self._core.metadata.read() as view:
            rows = view.counts()["files"]
        return {
            "rows": rows, "drafts": len(self._drafts), "open": self._open.total(),
            "unlinked": len(self._unlinked), "published": self._published, "gone": self._lost,
            **self._room.memory.statistics(),
        }  # fmt: skip

    # Looking. Nothing here waits.

    def row(self, ino: int) -> FileRow:
        """The file or directory with that inode, as it is now; NoSuchFile."""
        draft = self.draft(ino)
        if draft is not None:
            return draft.row()
        with self._core.metadata.read() as view:
            row = filetables.get_row(view, ino)
        if row is None:
            row = self._unlinked.get(Ino(ino))
        if row is None and ino == ROOT_INO:
            row = self.blocks.fresh_root(*self.root_owner)
        if row is None:
            raise NoSuchFile(f"no file has the inode {ino}")
        return row

    def rows(self, parent: int, listed: Sequence[tuple[bytes, Ino]]) -> list[FileRow | None]:
        """What the names of a directory, *listed* before, lead to now, in one look; None: nothing.

        A file that was written anew has another inode since, and its name was there all the time.
        """
        with self._core.metadata.read() as view:
            return [_row_listed(view, parent, name, ino) for name, ino in listed]

    @property
    def has_gone(self) -> bool:
        """Whether files have lost blocks, and `tend` has not seen to them."""
        return bool(self._core.gone_files)

    def draft(self, ino: int) -> Draft | None:
        """The draft with that inode."""
        return self._drafts.get(Ino(ino))

    def draft_at(self, parent: int, name: bytes, writer: int | None) -> Draft | None:
        """The draft of that name which *writer* sees; any with None."""
        for draft in self._at.get((parent, name), ()):
            if writer is None or draft.writer == writer:
                return draft
        return None

    def writes_in(self, ino: int) -> bool:
        """Tell whether files are being written in the directory *ino*."""
        return bool(self._at) and any(place[0] == ino for place in list(self._at))

    def lookup(self, parent: int, name: bytes, writer: int = 0) -> FileRow:
        """What *name* leads to in a directory, for the process *writer*; NoSuchFile."""
        draft = self.draft_at(parent, name, writer) if writer else None
        if draft is not None:
            return draft.row()
        with self._core.metadata.read() as view:
            row = filetables.row_at(view, parent, name)
        if row is None:
            raise NoSuchFile(f"no {name!r} here")
        return row

    def names(self, parent: int) -> list[tuple[bytes, Ino]]:
        """All names of a directory and where they lead, in order: a second for a million."""
        with self._core.metadata.read() as view:
            return list(filetables.names_in(view, parent))

    # Writing

    def create(
        self, parent: int, name: bytes, *, mode: int, uid: int, gid: int, writer: int,
        exclusive: bool = False, truncate: bool = True,
    ) -> Draft:  # fmt: skip
        """Begin a file; may wait for a commit, the first time. FileExists, NoSuchFile, TooLarge.

        The draft of this name that *writer* has already is returned, unless *exclusive*.
        """
        check_name(name)
        self.blocks.need_model(*self.root_owner)
        ino = self._new_ino()
        with self._lock:
            directory = self._staying(parent)
            mine = self.draft_at(parent, name, writer)
            if exclusive and self.draft_at(parent, name, None) is not None:
                raise FileExists(f"{name!r} is being written")
            if mine is not None:
                return mine
            with self._core.metadata.read() as view:
                old = filetables.row_at(view, parent, name)
            if old is not None:
                if exclusive or old.is_directory:
                    raise FileExists(f"there is a {name!r}")
                return self._begin_over(old, ino, writer, truncate=truncate)
            if directory.mode & stat.S_ISGID:
                gid = directory.gid
            return self._begin(
                Draft(
                    ino, Ino(parent), name, writer, stat.S_IFREG | mode & PERMISSIONS, uid, gid,
                    directory.retention, self._room, self.blocks.read,
                )
            )  # fmt: skip

    def rewrite(self, row: FileRow, *, writer: int, truncate: bool) -> Draft:
        """Begin a file that takes the place of *row*, with its bytes unless *truncate*."""
        ino = self._new_ino()
        with self._lock:
            mine = self.draft_at(row.parent, row.name, writer)
            return mine or self._begin_over(row, ino, writer, truncate=truncate)

    def _begin_over(self, row: FileRow, ino: Ino, writer: int, *, truncate: bool) -> Draft:
        draft = Draft(
            ino, row.parent, row.name, writer, row.mode, row.uid, row.gid, row.retention,
            self._room, self.blocks.read, None if truncate else row, dict(row.xattrs),
        )  # fmt: skip
        return self._begin(draft)

    def _begin(self, draft: Draft) -> Draft:
        if len(self._drafts) >= DRAFTS_MAX:
            raise TooLarge(f"{DRAFTS_MAX} files are being written: close some first")
        assert draft.name is not None
        self._drafts[draft.ino] = draft
        self._at.setdefault((draft.parent, draft.name), []).append(draft)
        return draft

    def _new_ino(self) -> Ino:
        return self._core.take_numbers(1)[1][0]

    def _directory(self, ino: int) -> FileRow:
        row = self.row(ino)
        if not row.is_directory:
            raise NotADirectory(f"{row.name!r} is no directory")
        return row

    def _staying(self, ino: int) -> FileRow:
        """The directory in which a draft is to be, which it keeps; the lock is held."""
        row = self._directory(ino)
        if row.ino in self._leaving:
            raise NoSuchFile(f"{row.name!r} is being removed")
        return row

    @contextmanager
    def _removing(self) -> Iterator[Callable[[FileRow], None]]:
        """Gives what a transaction that removes a directory calls with its row: NotEmpty.

        Files that are being written are no names of it yet, and would be lost with it. Behind the
        call none is begun in it until this ends, when the transaction is committed or has failed.
        """
        leaving: set[Ino] = set()

        def leave(row: FileRow) -> None:
            with self._lock:
                if self.writes_in(row.ino):
                    raise NotEmpty(f"files are being written in {row.name!r}")
                leaving.add(row.ino)
                self._leaving.add(row.ino)

        try:
            yield leave
        finally:
            with self._lock:
                self._leaving -= leaving

    def open_draft(self, draft: Draft, *, writing: bool) -> None:
        """Count one more open description of *draft*."""
        with self._lock:
            draft.writers += writing
            draft.readers += not writing

    def close_draft(self, draft: Draft, *, writing: bool) -> bool:
        """Count one off; True if that was the last writer, so that it is to be published.

        Drops it if nobody has it open any more and there is nothing to publish.
        """
        with self._lock:
            draft.writers -= writing
            draft.readers -= not writing
            if draft.writers or draft.finished:
                return False
            if writing and draft.wanted:
                return True
            unused = not draft.readers
        if unused:
            self.drop(draft)
        return False

    def disown(self, draft: Draft) -> None:
        """Take the name of *draft* away: it will not be published."""
        with self._lock:
            self._unplace(draft)
            draft.name = None
            draft.touch()

    def drop(self, draft: Draft) -> None:
        """Give a draft up; idempotent. May wait for bytes on their way."""
        self._forget(draft)
        with draft.lock:
            if draft.stored is not None:
                draft.stored[0].abandon()
                draft.stored = None
            draft.release()

    def _forget(self, draft: Draft) -> None:
        with self._lock:
            self._drafts.pop(draft.ino, None)
            self._unplace(draft)

    def _unplace(self, draft: Draft) -> None:
        place = (int(draft.parent), draft.name or b"")
        left = [each for each in self._at.get(place, ()) if each is not draft]
        if left:
            self._at[place] = left
        else:
            self._at.pop(place, None)

    def store(self, draft: Draft) -> None:
        """Write the bytes of *draft* to the devices, if they are not; publishes nothing. Waits.

        WarehouseFull, DeviceError, NoSuchFile.
        """
        with draft.lock:
            if not draft.wanted or draft.finished or draft.stored_at == draft.changes:
                return
            if draft.stored is not None:
                draft.stored[0].abandon()
                draft.stored = None
            row = draft.row()
            draft.stored = (self.blocks.store(draft, row), row)
            draft.stored_at = draft.changes

    def publish(self, draft: Draft) -> None:
        """Make *draft* a file under its name, as a whole; durable when it returns. Waits.

        What store raises, and NoSuchFile if its directory has gone, IsADirectory. Whatever
        happens, there is no draft any more.
        """
        try:
            with draft.lock:
                self.store(draft)
                if draft.stored is None:
                    return
                put, row = draft.stored
                draft.stored = None
            now = self.blocks.now_ns()

            def then(over: FileRow | None) -> None:
                with self._lock:
                    self._forget(draft)
                    self._published += 1
                    self._let_go([] if over is None else [over])

            self.blocks.publish(
                put, row, lambda view: filetables.enter(view, row, now, over=True), then
            )
        finally:
            self.drop(draft)

    def _let_go(self, rows: "list[FileRow]") -> None:
        """Remove the blocks of files whose rows are gone, or see to it at their last close."""
        with self._lock:
            free = [row for row in rows if not self._open[row.ino]]
            self._unlinked.update({row.ino: row for row in rows if self._open[row.ino]})
        self.blocks.discard(free)

    # Published files

    def opened(self, row: FileRow) -> None:
        """Count an open description of a published file: unlinked, its bytes stay as long."""
        with self._lock:
            self._open[row.ino] += 1

    def closed(self, ino: int) -> None:
        """Count one off."""
        with self._lock:
            number = Ino(ino)
            self._open[number] -= 1
            if self._open[number] > 0:
                return
            del self._open[number]
            row = self._unlinked.pop(number, None)
        if row is not None:
            self.blocks.discard([row])


def _row_listed(view: ReadView, parent: int, name: bytes, ino: Ino) -> FileRow | None:
    row = filetables.get_row(view, ino)
    if row is not None and (row.parent, row.name) == (parent, name):
        return row
    return filetables.row_at(view, parent, name)


def check_name(name: bytes) -> None:
    """Raise NameTooLong or InvalidInput unless a file may have that *name*."""
    if len(name) > FILE_NAME_BYTES_MAX:
        raise NameTooLong(f"a name of {len(name)} bytes: it has at most {FILE_NAME_BYTES_MAX}")
    if name in NO_NAMES or b"/" in name or b"\0" in name:
        raise InvalidInput(f"{name!r} cannot name a file")

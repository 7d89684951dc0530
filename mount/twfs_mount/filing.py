"""FUSE requests that look at `/files`, translated into calls on the tree of files.

The rules of looking.py hold here too. Inode numbers of files have a range of their own, so that
every request tells by its number which of the two trees it is for.
"""

# ruff: noqa: ARG002  (the signatures are pyfuse3's)

import errno
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyfuse3  # noqa: TID251
import trio
from pyfuse3 import FUSEError  # noqa: TID251

from twfs.errors import BlockGone, NoSuchFile, NotSupported, TwfsError
from twfs.layout import FILES_NAME
from twfs.metadata.filerows import PIECE_BYTES, ROOT_INO, FileRow, device_bytes, piece_bytes
from twfs.store import BlockInfo, Namespace
from twfs.vfs.describing import PREFIX
from twfs.vfs.drafting import check_name
from twfs.vfs.drafts import Draft
from twfs.vfs.files import Files
from twfs.vfs.importing import Importer
from twfs.vfs.nodes import FILE_INOS
from twfs.vfs.nodes import ROOT_INO as MOUNT_INO
from twfs_mount.looking import AHEAD_MAX, BRIEF_SECONDS, STEADY_SECONDS, Presentation, answered
from twfs_mount.operations import Operations
from twfs_mount.writers import writer_of

log = logging.getLogger(__name__)

FIRST_HANDLE: Final = 1 << 40  # of files; other handles count from 1
ROWS_AT_ONCE: Final = 512  # of a listing, read in one look
GONE_SECONDS: Final = 0.2  # how old the name of a file may be that has gone
USED_IN_LOOP: Final = 64  # blocks whose use is counted at once, in the loop
MOUNT_NAME: Final = FILES_NAME.encode()

Place = tuple[int, bytes]


def is_file(inode: int) -> bool:
    """Tell whether *inode* is of the tree of files."""
    return FILE_INOS <= inode < 2 * FILE_INOS


@dataclass(slots=True, eq=False)
class OpenFile:
    """An open file: a draft, or one that is published."""

    ino: int
    draft: Draft | None
    row: FileRow
    writing: bool = False
    killed: bool = False  # its writer, by a signal, when it was flushed last
    flushed: int = 0  # changes of the draft until then
    infos: dict[int, BlockInfo] = field(default_factory=dict)  # by piece


@dataclass(slots=True, eq=False)
class OpenNames:
    """An open directory; a second read from its beginning lists it anew."""

    ino: int
    names: list[tuple[bytes, Any]]
    begun: bool = False


class FileReading(Operations):
    """See the module's docstring."""

    def __init__(
        self, namespace: Namespace, importer: Importer, presentation: Presentation, files: Files, *,
        payload_bytes: int,
    ) -> None:  # fmt: skip
        super().__init__(namespace, importer, presentation, payload_bytes=payload_bytes)
        self._files = files
        files.root_owner = (presentation.uid, presentation.gid)
        self._filed: dict[int, OpenFile | OpenNames] = {}
        self._last_handle = FIRST_HANDLE
        self._closing: dict[Place, list[trio.Event]] = {}
        self._pieces, self._pieces_now = trio.open_memory_channel[tuple[OpenFile, int]](AHEAD_MAX)

    def statistics(self) -> dict[str, Any]:
        """Figures of the mount."""
        return {**super().statistics(), "open_of_files": len(self._filed)}

    # Names and attributes

    def _row_of(self, inode: int) -> FileRow:
        try:
            return self._files.row(inode & ~FILE_INOS)
        except NoSuchFile as error:
            raise BlockGone(str(error)) from error  # ESTALE: the kernel knew it

    def _told_file(self, row: FileRow, *, used: bool = True) -> pyfuse3.EntryAttributes:
        """What the kernel is told of a file, and for how long; without *used* no time of use."""
        told = pyfuse3.EntryAttributes()
        told.st_ino = pyfuse3.InodeT(FILE_INOS | row.ino)
        told.st_mode = row.mode
        told.st_nlink = 1
        told.st_uid, told.st_gid = row.uid, row.gid
        told.st_size = row.size
        told.st_blocks = device_bytes(row) // 512
        told.st_blksize = 1 << 20
        told.st_mtime_ns, told.st_ctime_ns = row.mtime_ns, row.ctime_ns
        used_ms = self._files.blocks.used_ms(row) if used else 0
        told.st_atime_ns = max(row.mtime_ns, used_ms * 1_000_000)
        told.entry_timeout, told.attr_timeout = self._file_timeouts(row)
        return told

    def _file_timeouts(self, row: FileRow) -> tuple[float, float]:
        """For how many seconds the kernel may believe the name and the attributes of a file."""
        if self._files.draft(row.ino) is not None:
            return 0.0, 0.0
        name = STEADY_SECONDS if row.ino != ROOT_INO else BRIEF_SECONDS
        if self._files.draft_at(row.parent, row.name, None) is not None:
            name = 0.0
        if not row.is_directory:
            return name, STEADY_SECONDS
        return name, 0.0 if self._files.writes_in(row.ino) else BRIEF_SECONDS

    def _writer(self, ctx: pyfuse3.RequestContext) -> int:
        return writer_of(ctx.pid, ctx.uid)

    async def _settled(self, parent: int, name: bytes) -> None:
        """Wait until what was closed under that name is published."""
        while waiting := self._closing.get((parent, name)):
            await waiting[0].wait()

    async def _all_settled(self, parent: int) -> None:
        """Wait until what was closed in that directory by now is published."""
        for place, waiting in list(self._closing.items()):
            if place[0] == parent:
                for event in list(waiting):
                    await event.wait()

    @answered
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Resolve one name."""
        if parent_inode == MOUNT_INO and name == MOUNT_NAME:
            return self._told_file(self._files.row(ROOT_INO))
        if not is_file(parent_inode):
            return await super().lookup(parent_inode, name, ctx)
        parent = parent_inode & ~FILE_INOS
        check_name(name)
        await self._settled(parent, name)
        drafts = self._files.draft_at(parent, name, None)
        writer = 0 if drafts is None else self._writer(ctx)
        return self._told_file(self._files.lookup(parent, name, writer))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel gives lookups back; of files none are counted."""
        await super().forget([each for each in inode_list if not is_file(each[0])])

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Stat."""
        if not is_file(inode):
            return await super().getattr(inode, ctx)
        return self._told_file(self._row_of(inode))

    # Extended attributes

    def _described(self, row: FileRow) -> dict[bytes, bytes]:
        told = {b"class": self._files.retention_of(row).value.encode()}
        if not row.is_directory and self._files.draft(row.ino) is None:
            extents = [
                str(extent)
                for index in range(row.blocks)
                for extent in self._files.blocks.info(row, index).block.extents
            ]
            told[b"extents"] = " ".join(extents).encode()
        return {PREFIX.encode() + name: value for name, value in told.items()}

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """One extended attribute."""
        if not is_file(inode):
            return await super().getxattr(inode, name, ctx)
        if not name.startswith(b"user."):
            raise FUSEError(errno.EOPNOTSUPP)
        row = self._row_of(inode)
        own = name.startswith(PREFIX.encode())
        value = (self._described(row) if own else row.xattrs).get(name)
        if value is None:
            raise FUSEError(errno.ENODATA)
        return value

    @answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """The names of the extended attributes: those that were set. Ours are there unlisted."""
        if not is_file(inode):
            return await super().listxattr(inode, ctx)
        return list(self._row_of(inode).xattrs)

    # Directories

    def _add_handle(self, handle: OpenFile | OpenNames) -> int:
        self._last_handle += 1
        self._filed[self._last_handle] = handle
        return self._last_handle

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Begin a listing."""
        if not is_file(inode):
            return await super().opendir(inode, ctx)
        ino = inode & ~FILE_INOS
        await self._all_settled(ino)
        self._files.row(ino)
        return self._add_handle(OpenNames(ino, await self._blocking(self._files.names, ino)))

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Reply with names and their attributes; a name's number keeps its meaning."""
        handle = self._filed.get(fh)
        if not isinstance(handle, OpenNames):
            await super().readdir(fh, start_id, token)
            return
        if start_id == 0 and handle.begun:  # rewinddir: what is there now
            await self._all_settled(handle.ino)
            handle.names = await self._blocking(self._files.names, handle.ino)
        handle.begun = True
        at = start_id
        while at < len(handle.names):
            part = handle.names[at : at + ROWS_AT_ONCE]
            rows = self._files.rows(handle.ino, part)
            for name, row in zip([name for name, _ in part], rows, strict=True):
                at += 1
                if row is None:
                    continue  # gone, or renamed, since the directory was opened
                told = self._told_file(row, used=False)
                if not pyfuse3.readdir_reply(token, name, told, at):
                    return

    @answered
    async def releasedir(self, fh: int) -> None:
        """End a listing."""
        if self._filed.pop(fh, None) is None:
            await super().releasedir(fh)

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """What was closed in this directory is durable when this returns."""
        handle = self._filed.get(fh)
        if isinstance(handle, OpenNames):
            await self._all_settled(handle.ino)

    # Reading

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file; for writing it is a draft, which the kernel is sent to look up."""
        if not is_file(inode):
            return await super().open(inode, flags, ctx)
        ino = inode & ~FILE_INOS
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if writing or flags & os.O_TRUNC:
            self._check_writable()
        draft = self._files.draft(ino)
        if draft is not None:
            self._files.open_draft(draft, writing=writing)
            handle = OpenFile(ino, draft, draft.row(), writing)
            number = self._add_handle(handle)
            if flags & os.O_TRUNC:
                await self._blocking(draft.truncate, 0)
            return pyfuse3.FileInfo(fh=number, keep_cache=not flags & os.O_TRUNC)
        row = self._row_of(inode)
        if writing or flags & os.O_TRUNC:
            truncate = bool(flags & os.O_TRUNC)
            self._files.rewrite(row, writer=self._writer(ctx), truncate=truncate)
            # Another inode has this name now, for this process: the kernel looks again, once.
            raise FUSEError(errno.ESTALE)
        self._files.opened(row)
        handle = OpenFile(ino, None, row)
        number = self._add_handle(handle)
        if row.blocks <= USED_IN_LOOP:
            self._files.blocks.use(row)
        else:
            await self._blocking(self._files.blocks.use, row)
        return pyfuse3.FileInfo(fh=number, keep_cache=True)

    @answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Bytes of an open file; of a published one only of pieces that were verified whole."""
        handle = self._filed.get(fh)
        if not isinstance(handle, OpenFile):
            return await super().read(fh, off, size)
        if handle.draft is not None and not handle.draft.finished:
            return await self._blocking(handle.draft.read, off, size)
        row = handle.row
        if handle.draft is not None:  # published since: what it was last
            row = handle.row = self._row_of(FILE_INOS | handle.ino)
        end, parts = min(off + size, row.size), []
        while off < end:
            index, within = divmod(off, PIECE_BYTES)
            payload = await self._piece(handle, row, index)
            if not within and index + 1 < row.blocks:
                self._follow_piece(handle, index + 1)
            part = payload[within : min(within + end - off, piece_bytes(row, index))]
            parts.append(part)
            off += len(part)
        # pyfuse3 replies with any buffer, without a copy; its annotation says less.
        return parts[0] if len(parts) == 1 else b"".join(parts)  # type: ignore[return-value]

    async def _piece(self, handle: OpenFile, row: FileRow, index: int) -> memoryview:
        info = handle.infos.get(index)
        if info is None:
            info = handle.infos[index] = self._files.blocks.info(row, index)
        return await self._payloads.payload(info)

    def _follow_piece(self, handle: OpenFile, index: int) -> None:
        """Have the next piece read: who reads a file reads on."""
        try:
            self._pieces.send_nowait((handle, index))
        except trio.WouldBlock:
            return  # enough is being read ahead

    async def _read_pieces(self) -> None:
        async for handle, index in self._pieces_now:
            try:
                await self._piece(handle, handle.row, index)
            except TwfsError as error:
                log.debug("read ahead: %s", error)  # whoever reads it will be told

    # In the background

    async def run_background(self) -> None:
        """As ReadOperations.run_background, for files too."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().run_background)
            nursery.start_soon(self._watch_files)
            for _ in range(AHEAD_MAX):
                nursery.start_soon(self._read_pieces)

    async def _watch_files(self) -> None:
        """Take files from the kernel that have been evicted or lost."""
        while True:
            await trio.sleep(GONE_SECONDS)
            if self._files.has_gone:
                await self._blocking(self._files.tend)
            while self._files.gone:
                row = self._files.gone.popleft()
                pyfuse3.invalidate_entry_async(
                    pyfuse3.InodeT(FILE_INOS | row.parent), row.name, ignore_enoent=True
                )
                try:
                    inode = pyfuse3.InodeT(FILE_INOS | row.ino)
                    await trio.to_thread.run_sync(pyfuse3.invalidate_inode, inode)
                except OSError as error:
                    if error.errno != errno.ENOENT:  # the kernel has forgotten it already
                        log.warning("file %d cannot be invalidated: %s", row.ino, error)


def refuse_unless_regular(mode: int) -> None:
    """Raise NotSupported for devices, pipes and sockets."""
    if not stat.S_ISREG(mode):
        raise NotSupported("only files and directories live here")

"""FUSE requests that change `/files`: writing, names and attributes.

The rules of looking.py hold here too. A file is published when its last writer has closed it: the
kernel sends that request before close() returns, and the handler notes it before its first await,
so whoever asks for the name afterwards waits for the publish and sees the file.
"""

import errno
import functools
import logging
import os
from typing import Final

import pyfuse3  # noqa: TID251
import trio
from pyfuse3 import FUSEError  # noqa: TID251

from twfs.errors import InvalidInput, TwfsError
from twfs.metadata.filerows import FileRow
from twfs.store import Retention
from twfs.vfs.describing import CLASS_NAME, PREFIX
from twfs.vfs.drafts import Draft
from twfs.vfs.nodes import FILE_INOS
from twfs_mount.filing import FileReading, OpenFile, is_file, refuse_unless_regular
from twfs_mount.looking import answered
from twfs_mount.writers import was_killed

log = logging.getLogger(__name__)

PUBLISHERS: Final = 64  # files published at once: as many share one commit
CLOSING_MAX: Final = 256  # closed and not yet published; who closes more waits


class FileOperations(FileReading):
    """See the module's docstring."""

    _publishers: trio.CapacityLimiter | None = None

    def _check_files(self, *inodes: int) -> list[int]:
        self._check_writable()
        if not all(map(is_file, inodes)):
            raise FUSEError(errno.EXDEV)
        return [inode & ~FILE_INOS for inode in inodes]

    # Writing

    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Begin a file, and open it."""
        if not is_file(parent_inode):
            return await super().create(parent_inode, name, mode, flags, ctx)
        draft = await self._begin(parent_inode, name, mode, flags, ctx)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        self._files.open_draft(draft, writing=True)  # who makes it, writes it: even nothing
        handle = OpenFile(draft.ino, draft, draft.row(), writing=True)
        if not writing:
            log.debug("file %d is made by an open for reading", draft.ino)
        return pyfuse3.FileInfo(fh=self._add_handle(handle)), self._told_file(draft.row())

    async def _begin(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> Draft:
        (parent,) = self._check_files(parent_inode)
        await self._settled(parent, name)
        return await self._blocking(
            functools.partial(
                self._files.create, parent, name, mode=mode, uid=ctx.uid, gid=ctx.gid,
                writer=self._writer(ctx), exclusive=bool(flags & os.O_EXCL),
                truncate=bool(flags & os.O_TRUNC),
            )
        )  # fmt: skip

    @answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Make an empty file."""
        if not is_file(parent_inode):
            return await super().mknod(parent_inode, name, mode, rdev, ctx)
        refuse_unless_regular(mode)
        draft = await self._begin(parent_inode, name, mode, os.O_EXCL, ctx)
        await self._blocking(self._files.publish, draft)
        return self._told_file(self._files.row(draft.ino))

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to a draft."""
        handle = self._filed.get(fh)
        if handle is None:
            return await super().write(fh, off, buf)
        if not isinstance(handle, OpenFile) or handle.draft is None:
            raise FUSEError(errno.EBADF)
        if buf and not handle.draft.write_quickly(off, buf):
            await self._blocking(handle.draft.write, off, buf)
        return len(buf)

    @answered
    async def flush(self, fh: int) -> None:
        """A close, not always the last: what was written goes to the devices, or fails here."""
        handle = self._filed.get(fh)
        if handle is None:
            await super().flush(fh)
        elif isinstance(handle, OpenFile) and handle.draft is not None and handle.writing:
            draft = handle.draft
            # It is asked here, where the process waits for the answer: soon it is nowhere.
            handle.killed, handle.flushed = was_killed(draft.writer), draft.changes
            if draft.changes and draft.wanted and not handle.killed:
                while len(self._closing) >= CLOSING_MAX:
                    await next(iter(self._closing.values()))[0].wait()
                await self._blocking(self._files.store, draft, limiter=self._limiter())

    def _limiter(self) -> trio.CapacityLimiter:
        self._publishers = self._publishers or trio.CapacityLimiter(PUBLISHERS)
        return self._publishers

    @answered
    async def release(self, fh: int) -> None:
        """The last close of one open: of the last writer it publishes the file."""
        handle = self._filed.pop(fh, None)
        if not isinstance(handle, OpenFile):
            await super().release(fh)
            return
        draft = handle.draft
        if draft is None:
            self._files.closed(handle.ino)
        elif handle.writing and self._is_torn(handle, draft):
            log.info("%r is dropped: its writer was killed", draft.name)
            if draft.writers == 1:
                self._files.disown(draft)
            self._files.close_draft(draft, writing=True)
        elif self._files.close_draft(draft, writing=handle.writing):
            await self._publish(draft)

    @staticmethod
    def _is_torn(handle: OpenFile, draft: Draft) -> bool:
        """Tell whether a signal ended its writer before that closed it."""
        unflushed = handle.flushed != draft.changes
        return handle.killed or (unflushed and was_killed(draft.writer))

    async def _publish(self, draft: Draft) -> None:
        """Publish; whoever asks for its name meanwhile waits. No await before that is noted."""
        place = (int(draft.parent), draft.name or b"")
        event = trio.Event()
        self._closing.setdefault(place, []).append(event)
        try:
            await self._blocking(self._files.publish, draft, limiter=self._limiter())
        except TwfsError as error:
            log.warning("%r is lost: %s", place[1], error)
        finally:
            self._closing[place].remove(event)
            if not self._closing[place]:
                del self._closing[place]
            event.set()

    # Names

    @answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Make a directory."""
        if not is_file(parent_inode):
            return await super().mkdir(parent_inode, name, mode, ctx)
        (parent,) = self._check_files(parent_inode)
        await self._settled(parent, name)
        make = functools.partial(
            self._files.mkdir, parent, name, mode=mode, uid=ctx.uid, gid=ctx.gid
        )
        return self._told_file(await self._blocking(make, limiter=self._limiter()))

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove an empty directory."""
        if not is_file(parent_inode):
            await super().rmdir(parent_inode, name, ctx)
            return
        (parent,) = self._check_files(parent_inode)
        await self._blocking(self._files.rmdir, parent, name, limiter=self._limiter())

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a file; whoever has it open reads on."""
        if not is_file(parent_inode):
            await super().unlink(parent_inode, name, ctx)
            return
        (parent,) = self._check_files(parent_inode)
        await self._settled(parent, name)
        writer = self._writer(ctx)
        await self._blocking(self._files.unlink, parent, name, writer, limiter=self._limiter())

    @answered
    async def rename(  # noqa: PLR0917  (pyfuse3's)
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: pyfuse3.RequestContext,
    ) -> None:  # fmt: skip
        """Rename a file or directory, in place of what is there."""
        if not is_file(parent_inode_old) and not is_file(parent_inode_new):
            await super().rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx)
            return
        old, new = self._check_files(parent_inode_old, parent_inode_new)
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EINVAL)
        await self._settled(old, name_old)
        await self._settled(new, name_new)
        rename = functools.partial(
            self._files.rename, old, name_old, new, name_new, writer=self._writer(ctx),
            over=not flags & pyfuse3.RENAME_NOREPLACE,
        )  # fmt: skip
        await self._blocking(rename, limiter=self._limiter())

    # Attributes

    @answered
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: int | None, ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        """Change length, mode, owner or times."""
        if not is_file(inode):
            return await super().setattr(inode, attr, fields, fh, ctx)
        (ino,) = self._check_files(inode)
        await self._all_settled(ino)  # of a directory: what was closed in it is older than this
        if fields.update_size:
            await self._set_size(ino, attr.st_size, ctx)
        change = functools.partial(
            self._files.set_attributes, ino,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )  # fmt: skip
        if fields.update_atime:
            self._use(self._files.row(ino))
        quick = self._files.draft(ino) is not None
        row = change() if quick else await self._blocking(change, limiter=self._limiter())
        return self._told_file(row)

    def _use(self, row: FileRow) -> None:
        """A time of use is no attribute: it counts as a use now."""
        if not row.is_directory and self._files.draft(row.ino) is None:
            self._files.blocks.use(row)

    async def _set_size(self, ino: int, size: int, ctx: pyfuse3.RequestContext) -> None:
        draft = self._files.draft(ino)
        if draft is not None:
            await self._blocking(draft.truncate, size)
            return
        row = self._files.row(ino)
        if size == row.size:
            return
        draft = self._files.rewrite(row, writer=self._writer(ctx), truncate=size == 0)
        await self._blocking(draft.truncate, size)
        await self._publish(draft)
        raise FUSEError(errno.ESTALE)  # another inode has this name now: the kernel looks again

    @answered
    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """Set an attribute of a user's, or the retention class."""
        if not is_file(inode):
            await super().setxattr(inode, name, value, ctx)
            return
        (ino,) = self._check_files(inode)
        if not name.startswith(b"user."):
            raise FUSEError(errno.EOPNOTSUPP)
        if name == CLASS_NAME.encode():
            try:
                retention = Retention(value.decode())
            except ValueError as error:
                known = ", ".join(each.value for each in Retention)
                raise InvalidInput(f"{value!r} is no class; known are {known}") from error
            await self._blocking(self._files.set_retention, ino, retention)
        elif name.startswith(PREFIX.encode()):
            raise FUSEError(errno.EPERM)
        else:
            await self._blocking(self._files.set_xattr, ino, name, value)

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove an attribute of a user's."""
        if not is_file(inode):
            await super().removexattr(inode, name, ctx)
            return
        (ino,) = self._check_files(inode)
        if name.startswith(PREFIX.encode()):
            raise FUSEError(errno.EPERM)
        await self._blocking(self._files.remove_xattr, ino, name)

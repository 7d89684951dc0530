"""All FUSE requests: those that change something, on top of those that only look (looking.py).

The rules of looking.py hold here too.
"""

# ruff: noqa: ARG002  (the signatures are pyfuse3's)

import errno
import functools
import stat

import pyfuse3  # noqa: TID251
from pyfuse3 import FUSEError  # noqa: TID251

from twfs.errors import InvalidInput, NoSuchBlock
from twfs.store import Retention
from twfs.units import PrefixHash
from twfs.vfs.chainfile import HASH_PATTERN
from twfs.vfs.describing import CLASS_NAME, PREFIX
from twfs.vfs.importing import Pending, PendingFile
from twfs.vfs.nodes import DETACHED_NAME, BlockFile, ModelDirectory, SessionDirectory
from twfs_mount.handles import OpenPending
from twfs_mount.looking import ReadOperations, answered, text_of


class Operations(ReadOperations):
    """See the module's docstring."""

    # Attributes

    @answered
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: int | None, ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        """Truncate a pending file; owner, mode and times are accepted, and change nothing."""
        self._check_writable()
        node = self._tree.resolve(self._known.node(inode))
        self._tree.check_seen(node, ctx.uid)
        if fields.update_size:
            if not isinstance(node, PendingFile):
                raise FUSEError(errno.EPERM)
            await self._blocking(self._importer.truncate, node, attr.st_size)
        return self._attributes(node)

    @answered
    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """Set the retention class; anything else is accepted only where it changes nothing."""
        self._check_writable()
        node = self._tree.resolve(self._known.node(inode))
        self._tree.check_seen(node, ctx.uid)
        text = name.decode(errors="replace")
        if isinstance(node, Pending | PendingFile):
            return  # `cp -a` brings the attributes of the source along
        if not text.startswith("user."):
            raise FUSEError(errno.EOPNOTSUPP)
        if self._tree.described(node).get(text) == value:
            return
        if text != CLASS_NAME or not isinstance(node, SessionDirectory | BlockFile):
            raise FUSEError(errno.EPERM)
        try:
            retention = Retention(value.decode())
        except ValueError as error:
            known = ", ".join(each.value for each in Retention)
            raise InvalidInput(f"{value!r} is no retention class; known are {known}") from error
        if isinstance(node, SessionDirectory):
            model, head = node.model, node.head
        else:
            model, head = self._tree.model(node.key.model).id, node.key.prefix_hash
        await self._blocking(self._namespace.set_retention, model, head, retention)
        self._tree.changed_class(model)

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Nothing that we describe can be taken away."""
        self._check_writable()
        node = self._known.node(inode)
        described = name.startswith(PREFIX.encode()) and self._tree.described(node)
        raise FUSEError(errno.EPERM if described else errno.ENODATA)

    # Importing

    @answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Open a pending import."""
        self._check_writable()
        parent, text = self._known.node(parent_inode), text_of(name)
        if not isinstance(parent, ModelDirectory):
            raise FUSEError(errno.EPERM)  # a model is made with its layout: `twfs model create`
        if not HASH_PATTERN.match(text):
            raise InvalidInput(f"{text!r} is no prefix hash of 32 hex digits")
        try:
            self._tree.lookup(parent, text, ctx.uid)
        except NoSuchBlock:
            head = PrefixHash(bytes.fromhex(text))
            model = self._tree.model(parent.model)
            open_it = functools.partial(self._importer.open, model, head, uid=ctx.uid)
            pending = await self._blocking(open_it)
            return self._tell(pending)
        raise FUSEError(errno.EEXIST)

    async def _create(self, parent_inode: int, name: bytes, uid: int) -> PendingFile:
        self._check_writable()
        parent = self._known.node(parent_inode)
        self._tree.check_seen(parent, uid)
        if not isinstance(self._tree.resolve(parent), Pending) or not isinstance(parent, Pending):
            raise FUSEError(errno.EPERM)
        return await self._blocking(self._importer.create, parent, text_of(name))

    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Make a file in a pending import, and open it."""
        file = await self._create(parent_inode, name, ctx.uid)
        number = self._handles.add(OpenPending(file))
        return pyfuse3.FileInfo(fh=number, direct_io=True), self._tell(file)

    @answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Make a file in a pending import: `tar --xattrs` does so before it opens it."""
        if not stat.S_ISREG(mode):
            raise FUSEError(errno.EPERM)
        return self._tell(await self._create(parent_inode, name, ctx.uid))

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to a pending file."""
        handle = self._handles.get(fh)
        if not isinstance(handle, OpenPending):
            raise FUSEError(errno.EPERM)
        await self._blocking(self._importer.write, handle.file, off, buf)
        return len(buf)

    @answered
    async def flush(self, fh: int) -> None:
        """A close: of a pending file it may be the one that completes its import."""
        handle = self._handles.get(fh)
        if isinstance(handle, OpenPending):
            await self._blocking(self._importer.settle, handle.file)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Published content is durable; what is pending becomes so when it is published."""

    @answered
    async def release(self, fh: int) -> None:
        """The last close."""
        self._handles.remove(fh)

    @answered
    async def rename(  # noqa: PLR0917  (pyfuse3's)
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: pyfuse3.RequestContext,
    ) -> None:  # fmt: skip
        """Rename inside one pending import, as rsync does."""
        self._check_writable()
        parent = self._tree.resolve(self._known.node(parent_inode_old))
        self._tree.check_seen(parent, ctx.uid)
        if not isinstance(parent, Pending) or parent_inode_old != parent_inode_new:
            raise FUSEError(errno.EPERM)
        if flags & pyfuse3.RENAME_EXCHANGE:
            raise FUSEError(errno.EINVAL)
        new = text_of(name_new)
        if flags & pyfuse3.RENAME_NOREPLACE and new in parent.files:
            raise FUSEError(errno.EEXIST)
        await self._blocking(self._importer.rename, parent, text_of(name_old), new)

    @answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Only blocks live here."""
        raise FUSEError(errno.EPERM)

    @answered
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Which sessions a block is in is said by its name, not by links."""
        raise FUSEError(errno.EPERM)

    # Removing

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Take a name out of one directory; the block stays until its session is removed."""
        self._check_writable()
        parent = self._tree.resolve(self._known.node(parent_inode))
        self._tree.check_seen(parent, ctx.uid)
        if isinstance(parent, Pending):
            await self._blocking(parent.remove, text_of(name))
        elif isinstance(parent, SessionDirectory):
            self._tree.hide(parent, text_of(name))
        else:
            raise FUSEError(errno.EPERM)

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove an emptied session, or give up an import."""
        self._check_writable()
        parent, text = self._known.node(parent_inode), text_of(name)
        if not isinstance(parent, ModelDirectory) or text == DETACHED_NAME:
            raise FUSEError(errno.EPERM)
        node = self._tree.lookup(parent, text, ctx.uid)
        if isinstance(node, Pending):
            if node.files:
                raise FUSEError(errno.ENOTEMPTY)
            await self._blocking(self._importer.drop, node)
        elif isinstance(node, SessionDirectory):
            await self._ready(node)
            self._tree.check_empty(node)
            try:
                await self._blocking(self._namespace.remove, node.model, node.head)
            finally:
                self._tree.show(node)  # gone with its names, or grown and not to be removed

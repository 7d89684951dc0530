"""FUSE requests that only look, translated into calls on the tree.

Nothing is decided here that the tree can decide. One thread: every handler is a trio task of one
event loop. What may wait for a disk or a commit goes through `_blocking`, the only place that hands
requests to threads; see mount/README.md.
"""

# ruff: noqa: ARG002  (the signatures are pyfuse3's)

import errno
import functools
import logging
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar, cast

import pyfuse3  # noqa: TID251
import trio
import trio.lowlevel
from pyfuse3 import FUSEError  # noqa: TID251

from twfs.errors import BadPayload, BlockGone, NoSuchBlock, ReadOnly, TwfsError
from twfs.store import BlockInfo, Namespace
from twfs.vfs.importing import Importer, Pending, PendingFile
from twfs.vfs.nodes import (
    DIRECTORIES,
    FILES,
    Attributes,
    BlockFile,
    Chain,
    ChainText,
    ControlFile,
    Node,
    SessionDirectory,
)
from twfs.vfs.tree import Tree
from twfs_mount.handles import (
    Handles,
    Known,
    OpenBlock,
    OpenDirectory,
    OpenPending,
    OpenText,
    Payloads,
)
from twfs_mount.watching import Watcher

log = logging.getLogger(__name__)

STEADY_SECONDS: Final = 300.0  # names and attributes of what never changes
BRIEF_SECONDS: Final = 1.0  # of what may change, asked for again and again within one `ls`
READER_THREADS: Final = 16  # block reads in flight; a drive wants several
WORKER_THREADS: Final = 8  # everything else that waits: imports, removals, long chains
FOLLOWED_MAX: Final = 64  # directories in which reading ahead remembers the last block
AHEAD_MAX: Final = 2  # blocks read ahead at once, for all readers
SMALLEST_BLOCK_BYTES: Final = 8192  # on the device: header and one unit; for df -i
WRITE_FLAGS: Final = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Presentation:
    """Whose the files are, and what may be done to them."""

    uid: int
    gid: int
    file_mode: int = 0o440
    directory_mode: int = 0o750
    read_only: bool = False


@dataclass(slots=True)
class Failures:
    """Requests that met a bug of ours; one count per process, as pyfuse3 has one mount."""

    count: int = 0


FAILURES: Final = Failures()


def answered(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let *handler* raise nothing but FUSEError: anything else would end the mount.

    Our errors and the system's become their errno; what is left is a bug: logged, and EIO.
    """

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except FUSEError:
            raise
        except TwfsError as error:
            log.debug("%s: %s", handler.__name__, error)
            raise FUSEError(error.errno) from error
        except OSError as error:
            log.warning("%s: %s", handler.__name__, error)
            raise FUSEError(error.errno or errno.EIO) from error
        except Exception as error:
            FAILURES.count += 1
            log.exception("request %s failed", handler.__name__)
            raise FUSEError(errno.EIO) from error

    return wrapper


class ReadOperations(pyfuse3.Operations):
    """See the module's docstring."""

    supports_dot_lookup = False

    def __init__(
        self, namespace: Namespace, importer: Importer, presentation: Presentation, *,
        payload_bytes: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self._namespace = namespace
        self._importer = importer
        self._tree = Tree(namespace, importer, self.statistics)
        self._show = presentation
        self._known = Known()
        self._handles = Handles()
        self._payloads = Payloads(self._read_block, payload_bytes)
        self._reader_threads = trio.CapacityLimiter(READER_THREADS)
        self._worker_threads = trio.CapacityLimiter(WORKER_THREADS)
        self._followed: OrderedDict[int, int] = OrderedDict()
        self._ahead, self._ahead_now = trio.open_memory_channel[BlockFile](AHEAD_MAX)
        self._watcher = Watcher(namespace, self._tree, importer, self._known, self._payloads)

    def statistics(self) -> dict[str, Any]:
        """Figures of the mount, for `.twfs/stats.json`."""
        return {
            **self._known.statistics(),
            **self._payloads.statistics(),
            "open_files": len(self._handles),
            "failed_requests": FAILURES.count,
            **self._watcher.statistics(),
        }

    async def _blocking(
        self, call: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        """Run what may wait for a disk or a commit in a worker thread."""
        limiter = limiter or self._worker_threads
        return await trio.to_thread.run_sync(call, *args, limiter=limiter)

    async def run_background(self) -> None:
        """Read blocks ahead, and keep the kernel's view true; until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watcher.run)
            for _ in range(AHEAD_MAX):
                nursery.start_soon(self._read_ahead)

    # Attributes

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        """What the kernel is told of *node*, and for how long it may believe it."""
        node = self._tree.resolve(node)
        return self._told(node, self._tree.attributes(node))

    def _tell(self, node: Node) -> pyfuse3.EntryAttributes:
        """Answer a lookup with *node*, or with what it has become, and count the lookup."""
        found = self._tree.attributes(node)
        while found.ino != (node := self._tree.resolve(node)).ino:  # published by a thread just now
            found = self._tree.attributes(node)
        self._known.tell(node)
        return self._told(node, found)

    def _told(self, node: Node, found: Attributes) -> pyfuse3.EntryAttributes:
        show = self._show
        told = pyfuse3.EntryAttributes()
        told.st_ino = pyfuse3.InodeT(found.ino)
        if isinstance(node, DIRECTORIES):
            told.st_mode = stat.S_IFDIR | show.directory_mode
        elif isinstance(node, PendingFile):
            told.st_mode = stat.S_IFREG | show.file_mode | stat.S_IWUSR
        else:
            told.st_mode = stat.S_IFREG | show.file_mode
        told.entry_timeout, told.attr_timeout = timeouts(node)
        told.st_nlink = found.links
        told.st_uid, told.st_gid = show.uid, show.gid
        if found.owner is not None:  # the kernel guards by these what it keeps for all users
            told.st_uid = found.owner
            told.st_mode &= ~(stat.S_IRWXG | stat.S_IRWXO)
            told.entry_timeout = min(told.entry_timeout, timeout_of_owned(node))
        told.st_size = found.size
        told.st_blocks = found.device_bytes // 512
        told.st_blksize = 1 << 20  # what cp and cat read at a time: one request
        told.st_mtime_ns = told.st_ctime_ns = found.modified_ms * 1_000_000
        told.st_atime_ns = found.used_ms * 1_000_000
        return told

    async def _ready(self, node: Node) -> Chain | None:
        """Read the chain behind *node* in a thread if it is long and not kept.

        Returns the chain if it had to be read, so that nobody reads it again for a change since.
        """
        node = self._tree.resolve(node)
        session = node.session if isinstance(node, ChainText) else node
        if not isinstance(session, SessionDirectory):
            return None
        if self._tree.kept_chain(session) is not None or not self._tree.is_long(session):
            return None
        model = self._tree.model(session.model)
        chain = await self._blocking(self._tree.read_chain, model, session.head)
        return self._tree.keep(session, chain)

    @answered
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Resolve one name."""
        parent = self._known.node(parent_inode)
        text = text_of(name)
        if isinstance(parent, SessionDirectory) and not self._tree.kept_chain(parent, fresh=False):
            await self._ready(parent)
        node = self._tree.lookup(parent, text, ctx.uid)
        if isinstance(node, ChainText):
            await self._ready(node)
        return self._tell(node)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel gives lookups back."""
        for ino, lookups in inode_list:
            self._known.forget(ino, lookups)

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Stat."""
        node = self._known.node(inode)
        if isinstance(node, ChainText):
            await self._ready(node)
        return self._attributes(node)

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """`df`: the devices in units of 4 KiB; files are blocks."""
        space = self._namespace.space()
        blocks = sum(info.blocks for info in self._tree.models().values())
        told = pyfuse3.StatvfsData()
        told.f_bsize = told.f_frsize = 4096
        told.f_blocks = space.total_bytes // 4096
        told.f_bfree = told.f_bavail = space.free_bytes // 4096
        told.f_ffree = told.f_favail = space.free_bytes // SMALLEST_BLOCK_BYTES
        told.f_files = blocks + told.f_ffree
        told.f_namemax = 255
        return told

    def _check_writable(self) -> None:
        if self._show.read_only:
            raise ReadOnly("the mount is read-only")

    # Extended attributes

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """One extended attribute."""
        text = name.decode(errors="replace")
        if not text.startswith("user."):
            # `ls -l` asks for security.selinux, and with colours for more, of every file, until it
            # hears this once; ENODATA would cost a request per file.
            raise FUSEError(errno.EOPNOTSUPP)
        node = self._known.node(inode)
        self._tree.check_seen(node, ctx.uid)
        value = self._tree.described(node).get(text)
        if value is None:
            raise FUSEError(errno.ENODATA)
        return value

    @answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """The names of the extended attributes."""
        node = self._known.node(inode)
        self._tree.check_seen(node, ctx.uid)
        return [name.encode() for name in self._tree.described(node)]

    # Directories

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Begin a listing."""
        node = self._known.node(inode)
        chain = await self._ready(node)
        rows = self._tree.rows(node, chain, uid=ctx.uid)
        return self._handles.add(OpenDirectory(node, rows, ctx.uid))

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Reply with names and their attributes, until the kernel's buffer is full."""
        handle = self._handles.get(fh)
        if not isinstance(handle, OpenDirectory):
            raise FUSEError(errno.EBADF)
        if start_id == 0 and handle.begun:  # rewinddir: what is there now
            chain = await self._ready(handle.node)
            handle.rows = self._tree.rows(handle.node, chain, uid=handle.uid)
        handle.begun = True
        for following, row in handle.rows.since(start_id):
            told = self._told(row.node, row.attributes)
            if not pyfuse3.readdir_reply(token, row.name.encode(), told, following):
                return
            self._known.tell(row.node)

    @answered
    async def releasedir(self, fh: int) -> None:
        """End a listing."""
        self._handles.remove(fh)

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Everything listed is durable already."""

    # Reading

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a block, a text or a pending file."""
        node = self._tree.resolve(self._known.node(inode))
        self._tree.check_seen(node, ctx.uid)
        if isinstance(node, PendingFile):
            if flags & WRITE_FLAGS:
                self._check_writable()
            return pyfuse3.FileInfo(fh=self._handles.add(OpenPending(node)), direct_io=True)
        if flags & WRITE_FLAGS:
            self._check_writable()
            raise FUSEError(errno.EPERM)
        if isinstance(node, BlockFile):
            changes = self._namespace.changes()
            handle = OpenBlock(node, self._tree.block(node), changes)
            self._known.opened(node)
            return pyfuse3.FileInfo(fh=self._handles.add(handle), keep_cache=True)
        if isinstance(node, ChainText | ControlFile):
            await self._ready(node)
            handle_of_text = OpenText(self._tree.content(node))
            return pyfuse3.FileInfo(fh=self._handles.add(handle_of_text), direct_io=True)
        raise FUSEError(errno.EISDIR)

    @answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Bytes of an open file; of a block only once the whole of it was verified."""
        handle = self._handles.get(fh)
        if isinstance(handle, OpenText):
            return handle.text[off : off + size]
        if isinstance(handle, OpenPending):
            return await self._blocking(handle.file.pending.read, handle.file, off, size)
        if not isinstance(handle, OpenBlock):
            raise FUSEError(errno.EBADF)
        self._refresh(handle)
        if off == 0:
            self._follow(handle.file)
        try:
            payload = await self._payloads.payload(handle.info)
        except BlockGone:
            self._refresh(handle, anyway=True)  # moved, or gone: then this raises
            payload = await self._payloads.payload(handle.info)
        # pyfuse3 replies with any buffer, without a copy; its annotation says less.
        return cast("bytes", payload[off : off + size])

    def _refresh(self, handle: OpenBlock, *, anyway: bool = False) -> None:
        """Look whether the block is the one that was opened; BlockGone (ESTALE) if not.

        BadPayload (EIO) if it is, but its bytes were found damaged.
        """
        changes = self._namespace.changes()
        if anyway or handle.checked_at != changes:
            handle.info = self._tree.block(handle.file)
            handle.checked_at = changes
        if handle.info.block.hole:
            raise BadPayload(f"the bytes of {handle.file.key.prefix_hash.hex()} were lost")

    async def _read_block(self, info: BlockInfo) -> memoryview:
        read = self._namespace.read_block
        return await self._blocking(read, info, limiter=self._reader_threads)

    def _follow(self, file: BlockFile) -> None:
        """Have the next block read if this one followed the last in its directory."""
        if file.session is None:
            return
        last = self._followed.get(file.session.ino)
        self._followed[file.session.ino] = file.place
        self._followed.move_to_end(file.session.ino)
        if len(self._followed) > FOLLOWED_MAX:
            self._followed.popitem(last=False)
        following = self._tree.next_block(file) if last == file.place - 1 else None
        if following is not None and not self._payloads.has(following.ino):
            try:
                self._ahead.send_nowait(following)
            except trio.WouldBlock:
                return  # enough is being read ahead

    async def _read_ahead(self) -> None:
        async for file in self._ahead_now:
            try:
                await self._payloads.payload(self._tree.block(file))
            except TwfsError as error:
                log.debug("read ahead: %s", error)  # whoever reads it will be told


def timeouts(node: Node) -> tuple[float, float]:
    """For how many seconds the kernel may believe the name and the attributes of *node*."""
    if isinstance(node, BlockFile):
        return (STEADY_SECONDS if node.session is not None else BRIEF_SECONDS), STEADY_SECONDS
    if isinstance(node, SessionDirectory | ChainText):
        return STEADY_SECONDS, BRIEF_SECONDS
    if isinstance(node, ControlFile | Pending | PendingFile) or node == FILES:
        return 0.0, 0.0
    return BRIEF_SECONDS, BRIEF_SECONDS


def timeout_of_owned(node: Node) -> float:
    """For how many seconds the kernel may believe a name that it must not tell other users."""
    return BRIEF_SECONDS if isinstance(node, SessionDirectory) else STEADY_SECONDS


def text_of(name: bytes) -> str:
    """A name as text; NoSuchBlock for one that cannot be ours."""
    try:
        return name.decode("ascii")
    except UnicodeDecodeError as error:
        raise NoSuchBlock("no name here has such bytes") from error

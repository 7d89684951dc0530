"""Disks that fail on command: one FUSE file each, to be put under a loop device.

`python -m support.faultdisk MOUNTPOINT CONTROL LOG NAME=IMAGE ...` serves all images in one
process, so that its log has one order over all disks. It prints "ready" once the control socket
listens, and unmounts on SIGTERM. What can be asked of it is in support.faultrules. A log named
"-" is none.

There are no discards: pyfuse3 has no fallocate, so the kernel is told that the disk cannot.
"""

# ruff: noqa: ARG002  (the signatures are pyfuse3's)

import errno
import os
import signal
import stat
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import pyfuse3  # noqa: TID251
import trio
from pyfuse3 import FUSEError  # noqa: TID251

from support.faultrules import Act, Kind, Logged, Op, Reply, Request, Rule, packed

FIRST_INODE: Final = pyfuse3.ROOT_INODE + 1
CACHED_S: Final = 300.0  # names and sizes never change
REQUESTS_MAX: Final = 1000  # hanging ones must not keep the others out
HANG_S_MAX: Final = 40.0  # then it is an error: whoever waits cannot even be killed
LOG_BUFFER_BYTES: Final = 1 << 20
FILES: Final = stat.S_IFREG | 0o600


class Disk:
    """One image and what its rules did."""

    def __init__(self, number: int, name: str, image: Path) -> None:
        self.number = number
        self.name = name
        self.image = image
        self.descriptor = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size
        self.gone = False
        self.snapshot: Path | None = None

    def take_snapshot(self) -> None:
        """Keep a copy of the image as it is now."""
        self.snapshot = self.image.with_suffix(".snapshot")
        with self.snapshot.open("wb") as file:
            os.sendfile(file.fileno(), self.descriptor, 0, self.size)


class Rules:
    """The present rules, and how often each was met and has acted."""

    def __init__(self, rules: list[Rule]) -> None:
        self.rules = rules
        self.met = [0] * len(rules)
        self.acted = [0] * len(rules)
        self.replaced = trio.Event()

    def for_request(self, disk: str, op: Op, offset: int, length: int) -> Rule | None:
        """The first rule that acts on this request."""
        for number, rule in enumerate(self.rules):
            if (rule.disk, rule.op) != (disk, op):
                continue
            if op is not Op.FLUSH and not (offset < rule.high and rule.low < offset + length):
                continue
            self.met[number] += 1
            if rule.skip < self.met[number] <= rule.skip + rule.times:
                self.acted[number] += 1
                return rule
        return None


class FaultDisks(pyfuse3.Operations):
    """The directory of disks: FUSE requests and control requests, in one thread."""

    def __init__(self, disks: list[Disk], log: BinaryIO | None) -> None:
        super().__init__()
        self.disks = disks
        self.rules = Rules([])
        self.hanging = 0
        self.logged = 0
        self.logging = True
        self._log = log

    def _note(self, kind: Kind, disk: int, offset: int, data: bytes) -> None:
        """Log what has happened, before anybody is told."""
        self.logged += 1
        if self._log is not None and self.logging:
            self._log.write(packed(Logged(kind, disk, offset, data)))

    def control(self, request: Request) -> Reply:
        """Do what *request* asks."""
        if request.rules is not None:
            before, self.rules = self.rules, Rules(request.rules)
            before.replaced.set()
            for disk in self.disks:
                disk.gone = False
        if request.mark is not None:
            self._note(Kind.MARK, 0, 0, request.mark.encode())
        if request.snapshot is not None:
            next(disk for disk in self.disks if disk.name == request.snapshot).take_snapshot()
        if self._log is not None:
            self._log.flush()
        if request.logging is not None:
            self.logging = request.logging
        return Reply(self.rules.acted, self.hanging, self.logged)

    async def _meet(self, disk: Disk, op: Op, offset: int, length: int) -> Rule | None:
        """Wait as long as the rules say; FUSEError if they say so. What else is to be done."""
        while True:
            if disk.gone:
                raise FUSEError(errno.EIO)
            rules = self.rules
            rule = rules.for_request(disk.name, op, offset, length)
            if rule is None or rule.act not in {Act.HANG, Act.DELAY, *ERRORS}:
                return rule
            if rule.act in ERRORS:
                disk.gone = rule.act is Act.GONE
                raise FUSEError(ERRORS[rule.act])
            if rule.act is Act.DELAY:
                await trio.sleep(rule.amount / 1000)
                return None
            self.hanging += 1
            try:
                with trio.move_on_after(HANG_S_MAX) as scope:
                    await rules.replaced.wait()
            finally:
                self.hanging -= 1
            if scope.cancelled_caught:
                raise FUSEError(errno.EIO)

    # FUSE

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.st_nlink = 1
        attributes.st_blksize = 4096
        attributes.attr_timeout = attributes.entry_timeout = CACHED_S
        attributes.st_mode = stat.S_IFDIR | 0o700
        if inode != pyfuse3.ROOT_INODE:
            attributes.st_mode = FILES
            attributes.st_size = self.disks[inode - FIRST_INODE].size
            attributes.st_blocks = attributes.st_size // 512
        return attributes

    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """Size and mode, which never change."""
        return self._attributes(inode)

    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: int | None, ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        """Accepted and ignored."""
        return self._attributes(inode)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """A disk by its name."""
        for disk in self.disks:
            if disk.name.encode() == name:
                return self._attributes(FIRST_INODE + disk.number)
        raise FUSEError(errno.ENOENT)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """A disk, past the page cache: every request of the loop device comes here."""
        return pyfuse3.FileInfo(fh=inode - FIRST_INODE, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read, as far as the rules let it."""
        disk = self.disks[fh]
        rule = await self._meet(disk, Op.READ, off, size)
        if rule is None:
            return os.pread(disk.descriptor, size, off)
        if rule.act is Act.SHORT:
            return os.pread(disk.descriptor, min(size, rule.amount), off)
        if rule.act is Act.STALE:
            assert disk.snapshot is not None, "a stale disk without a snapshot"
            with disk.snapshot.open("rb") as file:
                return os.pread(file.fileno(), size, off)
        assert rule.act is Act.FLIP, rule
        data = bytearray(os.pread(disk.descriptor, size, off))
        if 0 <= rule.low - off < len(data):
            data[rule.low - off] ^= 1
        return bytes(data)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write, as far as the rules let it; the log has what became of the image."""
        disk = self.disks[fh]
        rule = await self._meet(disk, Op.WRITE, off, len(buf))
        done, data, offset = len(buf), buf, off
        if rule is not None:
            match rule.act:
                case Act.LOST:
                    return done
                case Act.TORN:
                    data = buf[: rule.amount]
                case Act.SHORT:
                    data = buf[: rule.amount]
                    done = len(data)
                case Act.MISDIRECT:
                    offset = (off + rule.amount) % (disk.size - len(buf) + 1)
                case _:
                    raise AssertionError(rule)
        os.pwrite(disk.descriptor, data, offset)
        self._note(Kind.WRITE, disk.number, offset, data)
        return done

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Flush: all writes that were answered before are durable, says the log."""
        disk = self.disks[fh]
        rule = await self._meet(disk, Op.FLUSH, 0, 0)
        if rule is None:
            self._note(Kind.FLUSH, disk.number, 0, b"")

    async def flush(self, fh: int) -> None:
        """A close, which is no flush of a disk."""

    async def release(self, fh: int) -> None:
        """Nothing to do."""


ERRORS: Final = {Act.EIO: errno.EIO, Act.ENOSPC: errno.ENOSPC, Act.GONE: errno.EIO}


async def answer(disks: FaultDisks, stream: trio.SocketStream) -> None:
    """Serve one control connection: a line of JSON each way."""
    pending = b""
    async with stream:
        async for data in stream:
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                reply = disks.control(msgspec.json.decode(line, type=Request))
                await stream.send_all(msgspec.json.encode(reply) + b"\n")


async def serve(disks: FaultDisks, control: Path) -> None:
    """Serve FUSE and the control socket until SIGTERM or the end of the mount."""
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(control))
    listening.listen()
    async with trio.open_nursery() as nursery:

        async def fuse() -> None:
            await pyfuse3.main(max_tasks=REQUESTS_MAX)
            nursery.cancel_scope.cancel()

        async def accept(stream: trio.SocketStream) -> None:
            await answer(disks, stream)

        nursery.start_soon(fuse)
        nursery.start_soon(trio.serve_listeners, accept, [trio.SocketListener(listening)])
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            await anext(aiter(signals))
        nursery.cancel_scope.cancel()


def main(mountpoint: str, control: str, log: str, *named: str) -> None:
    """Mount, serve, unmount."""
    pairs = [one.partition("=") for one in named]
    disks = [Disk(number, name, Path(image)) for number, (name, _, image) in enumerate(pairs)]
    options = {*pyfuse3.default_options, "fsname=faultdisk"}
    with ExitStack() as stack:
        noting = None
        if log != "-":
            noting = stack.enter_context(Path(log).open("wb", buffering=LOG_BUFFER_BYTES))
        served = FaultDisks(disks, noting)
        pyfuse3.init(served, mountpoint, options)
        stack.callback(pyfuse3.close)
        trio.run(serve, served, Path(control))


if __name__ == "__main__":
    main(*sys.argv[1:])

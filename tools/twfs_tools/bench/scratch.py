"""A warehouse for one benchmark: made, served by a daemon process, removed whatever happens.

One thread; clients are made per thread or process.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Final

import numpy as np

from twfs.client import Client, connect
from twfs.devices.arena import Arena
from twfs.devices.device import DeviceSpec
from twfs.errors import DeviceError, InvalidInput, NoSpaceForImage
from twfs.layout import Arrangement, Group, Layout
from twfs.prefix import Names
from twfs.store import Durability, Model, PutOutcome, PutResult
from twfs.units import ALIGN, ByteCount, align_up
from twfs.warehouse import Warehouse
from twfs_tools.output import size, working
from twfs_tools.process import daemon_command, start_daemon, stop, unmount
from twfs_tools.target import find_mount

FILLED_BYTES: Final = 16 << 20  # of random bytes made at once
SLACK_BYTES: Final = 256 << 20  # superblocks, the low-water mark that is kept free, rounding
CLIENT_TIMEOUT_S: Final = 30.0  # a benchmark waits: a miss by timeout would be no measurement
TOKEN_LIMIT: Final = 128_000  # a vocabulary


class Scratch:
    """A warehouse in a temporary directory, and its daemon; not thread-safe."""

    def __init__(self, root: Path, device: Path) -> None:
        self.root = root
        self.device = device
        self.directory = root / "warehouse"
        self.socket = self.directory / "socket"
        self.mountpoint = root / "mount"
        self.daemon: Popen[bytes] | None = None

    def start(self, *, mount: bool = False, durability: Durability = Durability.STRICT) -> None:
        """Start the daemon; returns once it is ready."""
        self.mountpoint.mkdir(exist_ok=True)
        command = daemon_command(
            self.directory, self.mountpoint if mount else None, durability=durability
        )
        self.daemon = start_daemon(command, self.root / "daemon.log")

    def stop(self) -> None:
        """Unmount, and end the daemon."""
        if find_mount(self.mountpoint) is not None:
            unmount(self.mountpoint, lazy=True)
        if self.daemon is not None:
            stop(self.daemon)
            self.daemon = None

    def connect(self) -> Client:
        """Return a client that waits for as long as a benchmark does."""
        return connect(
            self.socket, connect_timeout_s=CLIENT_TIMEOUT_S, match_timeout_s=CLIENT_TIMEOUT_S
        )

    def open_in_process(self) -> Warehouse:
        """Open the warehouse here, without a daemon."""
        return Warehouse.open(self.directory)


@contextmanager
def scratch(directory: Path, data_bytes: int, *, device: Path | None = None) -> Iterator[Scratch]:
    """Make a warehouse with room for *data_bytes* under *directory*, or on *device*."""
    if not directory.is_dir():
        raise InvalidInput(
            f"{directory} is not a directory: give --directory on the disk to measure"
        )
    wanted = align_up(data_bytes + SLACK_BYTES)
    free = shutil.disk_usage(directory).free
    if device is None and wanted > free:
        raise NoSpaceForImage(
            f"this needs {size(wanted)} of scratch in {directory}, which has {size(free)} free: "
            "use another --directory, less --bytes or --quick"
        )
    root = Path(tempfile.mkdtemp(prefix="twfs-bench-", dir=directory))
    made = Scratch(root, device or root / "device0.img")
    try:
        with working("creating a scratch warehouse"):
            spec = DeviceSpec(made.device, ByteCount(wanted) if device is None else None)
            Warehouse.create(made.directory, [spec])
        yield made
    finally:
        made.stop()
        if device is not None and made.directory.exists():
            _wipe(device)
        shutil.rmtree(root)


def _wipe(device: Path) -> None:
    """Overwrite both superblocks, so that the device is as empty as it was found."""
    descriptor = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        for offset in (0, end - ALIGN):
            os.pwrite(descriptor, bytes(ALIGN), offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def opaque_layout(block_bytes: int, block_tokens: int = 256) -> Layout:
    """Return a layout whose blocks have *block_bytes* of payload."""
    group = Group(layers=1, arrangement=Arrangement.OPAQUE, layer_bytes=block_bytes, dtype="uint8")
    return Layout(f"bench-{block_bytes}", (group,), block_tokens)


def random_names(model: Model, blocks: int, seed: int | None = None, shared: int = 0) -> Names:
    """Return the names of a session of *blocks* blocks; equal seeds give equal sessions.

    The first *shared* blocks are the same for every seed.
    """
    step = model.layout.block_tokens
    common = np.random.default_rng(0).integers(0, TOKEN_LIMIT, shared * step, np.uint32)
    own = np.random.default_rng(secrets.randbits(63) if seed is None else seed)
    tokens = own.integers(0, TOKEN_LIMIT, (blocks - shared) * step, np.uint32)
    return model.chain().extend(np.concatenate([common, tokens])).names()


def random_payloads(blocks: int, block_bytes: int) -> list[memoryview]:
    """Return *blocks* incompressible payloads in huge pages, as an engine's and fio's are."""
    data = Arena.private(blocks * block_bytes).view
    whole = np.frombuffer(data, np.uint8)
    random = np.random.default_rng()
    for at in range(0, len(whole), FILLED_BYTES):
        part = whole[at : at + FILLED_BYTES]
        part[:] = np.frombuffer(random.bytes(len(part)), np.uint8)
    return [data[at * block_bytes : (at + 1) * block_bytes] for at in range(blocks)]


def require_stored(result: PutResult) -> None:
    """Raise DeviceError unless every block of a put was published or there."""
    if result.held != len(result.outcomes):
        worst = next(each for each in result.outcomes if each is not PutOutcome.PUBLISHED)
        raise DeviceError(
            f"only {result.held} of {len(result.outcomes)} blocks could be stored ({worst.value})"
        )


def forget(directory: Path) -> None:
    """Drop the metadata of the warehouse in *directory* from the page cache."""
    os.sync()
    for path in (directory / "meta").rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drop_page_cache() -> None:
    """Make the kernel forget what it read through the mount, where that is allowed."""
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")


def contiguous_run(client: Client, model: Model, head: Names) -> tuple[int, int, int]:
    """Return (offset, extent bytes, extents) of a session that lies in one run of equal extents."""
    infos = client.chain_of(model.id, head.hash_at(len(head) - 1))
    extents = [extent for info in infos for extent in info.block.extents]
    first = extents[0]
    for index, extent in enumerate(extents):
        if (extent.offset, extent.length) != (first.offset + index * first.length, first.length):
            raise DeviceError(
                f"the session is not one run of the device: extent {index} is {extent}"
            )
    return first.offset, first.length, len(extents)

"""The daemon's life: open the warehouse, serve socket and mount in one event loop, stop cleanly.

A stop by signal or unmount finishes what is under way. A crash leaves the mount behind as "not
connected", never as an empty directory that looks like lost data; the next start detaches it.
"""

import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import pyfuse3  # noqa: TID251
import sdnotify
import trio

from twfs.config import load
from twfs.core import modes
from twfs.daemon.server import serve
from twfs.errors import MountRefused, NotAllowed, TwfsError
from twfs.store import Durability
from twfs.vfs.importing import Importer
from twfs.warehouse import LEASE_MS, Warehouse
from twfs_mount import mountpoint as places
from twfs_mount.dropin import FileOperations
from twfs_mount.handles import PAYLOAD_BYTES
from twfs_mount.looking import Presentation

log = logging.getLogger(__name__)

ARENA_BYTES: Final = 4 << 30  # of all clients: 16 of one user, 32 in all; used memory counts only
STOP_SECONDS: Final = 60.0  # requests under way have so long to end after a signal
GC_THRESHOLD: Final = 50_000  # allocations between collections of the youngest
TASKS_MAX: Final = 64  # requests handled at once; more wait in the kernel


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How the mount looks; the owner is whoever runs the daemon unless told otherwise."""

    read_only: bool = False
    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    file_mode: int = 0o440
    directory_mode: int = 0o750

    def presentation(self, group: int | None = None) -> Presentation:
        """Fill in who runs this; the files are of *group* unless the options say another."""
        group = os.getegid() if group is None else group
        return Presentation(
            os.geteuid() if self.uid is None else self.uid,
            group if self.gid is None else self.gid,
            self.file_mode, self.directory_mode, self.read_only,
        )  # fmt: skip

    def for_fuse(self, directory: Path) -> set[str]:
        """What libfuse and the kernel are told; the warehouse's directory is the source in `df`."""
        source = str(directory).replace("\\", "\\\\").replace(",", "\\,")
        told = {f"fsname={source}", "subtype=twfs", "default_permissions"}
        told |= {"nosuid", "nodev", "noexec"}
        told |= {"ro"} if self.read_only else set()
        return told | ({"allow_other"} if self.allow_other else set())


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """One daemon: which warehouse, where it is mounted and where it listens."""

    directory: Path
    mountpoint: str | None = None  # also `/dev/fd/N`, already mounted by mount.fuse3
    socket: Path | None = None  # default DIRECTORY/socket
    socket_mode: int = 0o660
    group: int | None = None  # of socket and mount; default that of `twfs create --group`
    options: MountOptions = field(default_factory=MountOptions)
    arena_bytes: int = ARENA_BYTES
    payload_bytes: int = PAYLOAD_BYTES
    lease_ms: int = LEASE_MS
    durability: Durability = Durability.STRICT
    degraded: bool = True  # serve without devices that are missing or damaged
    config: Path | None = None  # the settings; default DIRECTORY/twfs.toml if it is there


class Daemon:
    """See the module's docstring; used once."""

    def __init__(self, config: DaemonConfig, on_ready: Callable[[], None]) -> None:
        self._config = config
        self._on_ready = on_ready
        self._notifier = sdnotify.SystemdNotifier()
        self._ready = False
        self._stopping = False

    async def run(self) -> None:
        """Serve until a signal or an unmount. TwfsError if it cannot begin."""
        config = self._config
        stop_signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        with trio.open_signal_receiver(*stop_signals) as signals:
            warehouse = await trio.to_thread.run_sync(
                lambda: Warehouse.open(
                    config.directory,
                    lease_ms=config.lease_ms,
                    durability=config.durability,
                    degraded=config.degraded,
                    wary=True,
                    config=None if config.config is None else load(config.config),
                )
            )
            try:
                for note in warehouse.notes:
                    log.warning("%s", note)
                await self._run_open(warehouse, signals)
            finally:
                await self._close(warehouse)

    async def _close(self, warehouse: Warehouse) -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(warehouse.close)

    async def _run_open(self, warehouse: Warehouse, signals: AsyncIterator[int]) -> None:
        config = self._config
        if config.mountpoint is None:
            await self._serve(warehouse, signals)
            return
        importer = Importer(warehouse, warehouse.directory, tenants=warehouse.tenants)
        operations = FileOperations(
            warehouse,
            importer,
            config.options.presentation(self._group()),
            warehouse.files,
            payload_bytes=config.payload_bytes,
        )
        fuse_init(operations, config.mountpoint, config.options.for_fuse(warehouse.directory))
        clean = False
        try:
            await self._serve(warehouse, signals, operations)
            clean = True
        except TwfsError:
            clean = not self._ready  # it could not begin: nobody has seen this mount
            raise
        finally:
            pyfuse3.close(unmount=clean)
            importer.close()

    async def _serve(
        self, warehouse: Warehouse, signals: AsyncIterator[int],
        operations: FileOperations | None = None,
    ) -> None:  # fmt: skip
        config = self._config
        socket = config.socket or warehouse.directory / "socket"
        where = f"listening on {socket}"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._await_signal, signals, nursery.cancel_scope, operations)
                await nursery.start(self._serve_socket, warehouse, socket)
                if operations is not None and config.mountpoint is not None:
                    nursery.start_soon(operations.run_background)
                    nursery.start_soon(self._run_mount, nursery.cancel_scope)
                    await self._await_mount(config.mountpoint)
                    where += f", mounted on {config.mountpoint}"
                log.info("warehouse %s: %s", warehouse.directory, where)
                self._ready = True
                self._notifier.notify(f"READY=1\nSTATUS={where}")
                self._on_ready()
        except BaseExceptionGroup as group:
            raise sole_cause(group) from group

    async def _serve_socket(
        self, warehouse: Warehouse, socket: Path, task_status: "trio.TaskStatus[None]"
    ) -> None:
        config = self._config
        await serve(
            warehouse, socket, arena_bytes=config.arena_bytes, mode=config.socket_mode,
            group=self._group(), task_status=task_status,
        )  # fmt: skip

    def _group(self) -> int | None:
        """Who uses the warehouse beside its owner."""
        config = self._config
        return modes.group_of(config.directory) if config.group is None else config.group

    async def _await_mount(self, mountpoint: str) -> None:
        """Return once the mount answers; only then the kernel takes a read-ahead."""
        if not places.is_descriptor(mountpoint):
            await trio.to_thread.run_sync(os.statvfs, mountpoint, abandon_on_cancel=True)
            places.set_read_ahead(mountpoint)

    async def _run_mount(self, scope: trio.CancelScope) -> None:
        """Answer requests until unmounted or terminated; then the daemon ends."""
        await pyfuse3.main(max_tasks=TASKS_MAX)
        if not self._stopping:
            log.info("unmounted: the daemon ends")
        scope.cancel()

    async def _await_signal(
        self, signals: AsyncIterator[int], scope: trio.CancelScope,
        operations: FileOperations | None,
    ) -> None:  # fmt: skip
        async for number in signals:
            if number == signal.SIGHUP:
                continue  # a closed terminal is no reason to end
            log.info("%s: the daemon ends", signal.Signals(number).name)
            self._stopping = True
            self._notifier.notify("STOPPING=1")
            if operations is not None and self._ready:
                pyfuse3.terminate()  # requests under way are answered first; then main returns
                await trio.sleep(STOP_SECONDS)
            scope.cancel()
            return


def fuse_init(operations: FileOperations, mountpoint: str, options: set[str]) -> None:
    """Mount; MountRefused or NotAllowed if the kernel will not. libfuse prints its own reason."""
    if places.is_descriptor(mountpoint):
        options = set()  # it is mounted, with the options that mount.fuse3 was given
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:
        kind = MountRefused if os.geteuid() == 0 else NotAllowed
        raise kind(f"cannot mount on {mountpoint}: {error}; see the line above") from error


def sole_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one error in *group* that is for the operator, or the group if there is none."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
        found = found.exceptions[0]
    return found


def run(config: DaemonConfig, on_ready: Callable[[], None] = lambda: None) -> None:
    """Run a daemon in this process, in its main thread, until it is told to end.

    *on_ready* is called once socket and mount answer. TwfsError if it cannot begin.
    """
    if config.mountpoint is not None:
        config = replace(config, mountpoint=places.prepare(config.mountpoint))
    # A listing makes hundreds of thousands of small values that live on; with the usual threshold
    # the collector would walk them all again and again, which doubled the time of `ls -l`.
    gc.set_threshold(GC_THRESHOLD, 20, 100)
    trio.run(Daemon(config, on_ready).run)

"""From what a person names to an open store: the daemon if one answers, else the warehouse itself.

Opening the warehouse itself is exclusive, so a tool never works beside a daemon. One thread.
"""

import os
import socket as sockets
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Protocol, cast

import typer

from twfs.errors import InvalidInput, NoDaemon, NoSuchModel, NoSuchWarehouse
from twfs.store import ModelInfo, Namespace, Store
from twfs.units import HASH_BYTES, PrefixHash

WarehouseArgument = Annotated[
    Path,
    typer.Argument(
        metavar="WAREHOUSE",
        help="The warehouse's directory, its mount point, or a daemon's socket.",
    ),
]
SocketOption = Annotated[
    Path | None,
    typer.Option("--socket", help="The daemon's socket, where it is not WAREHOUSE/socket."),
]
TenantOption = Annotated[
    str | None, typer.Option("--tenant", help="The tenant, as `twfs tenant list` shows it.")
]
ADMIN_TIMEOUT_S: Final = 5.0  # a person waits longer than an engine for a busy daemon


class Target(Store, Namespace, Protocol):
    """What a tool works with: a Client or a Warehouse."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo that is ours."""

    mountpoint: Path
    source: str
    kind: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a warehouse is: *directory* is not known when only a socket was named."""

    directory: Path | None
    socket: Path


def find_mount(path: Path) -> Mount | None:
    """Return the topmost twfs mount whose mount point is *path*; never touches what is mounted."""
    wanted = os.path.realpath(path.parent) + "/" + path.name if path.name else str(path)
    wanted = os.path.normpath(wanted)
    found = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        kind, source = tail.split(" ")[:2]
        name = _unescape(head.split(" ")[4])
        if name == wanted:
            ours = kind in {"fuse", "fuse.twfs"} and (kind == "fuse.twfs" or "twfs" in source)
            found = Mount(Path(name), _unescape(source), kind) if ours else None
    return found


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes."""
    for escape, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(escape, plain)
    return field


def locate(warehouse: Path, socket: Path | None = None) -> Place:
    """Find out what *warehouse* names; NoSuchWarehouse if it names nothing."""
    warehouse = warehouse.absolute()
    mount = find_mount(warehouse)
    if mount is not None:
        if not mount.source.startswith("/"):
            raise InvalidInput(
                f"the mount on {warehouse} does not say whose it is: name the directory"
            )
        warehouse = Path(mount.source)
    try:
        mode = warehouse.stat().st_mode
    except OSError as error:
        raise NoSuchWarehouse(f"{warehouse}: {error.strerror}") from error
    if stat.S_ISSOCK(mode):
        return Place(None, warehouse)
    if not stat.S_ISDIR(mode):
        raise NoSuchWarehouse(
            f"{warehouse} is neither a warehouse's directory nor its mount point nor a socket"
        )
    return Place(warehouse, socket.absolute() if socket else warehouse / "socket")


def daemon_pid(socket: Path) -> int | None:
    """Return the process that listens on *socket*, None if nobody does."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(ADMIN_TIMEOUT_S)
        try:
            probe.connect(str(socket))
        except OSError:
            return None
        size = struct.calcsize("3i")
        pid, _, _ = struct.unpack(
            "3i", probe.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, size)
        )
        return int(pid)


@contextmanager
def opened(warehouse: Path, socket: Path | None = None) -> Iterator[Target]:
    """Open what *warehouse* names and close it behind the block.

    NoDaemon if *socket* was named and nobody answers there; WarehouseBusy if another process has
    the warehouse open without answering on its socket; else the errors of Warehouse.open.
    """
    place = locate(warehouse, socket)
    if daemon_pid(place.socket) is not None:
        from twfs.client import connect  # noqa: PLC0415 - the tools that need neither start faster

        client = connect(  # without an arena: engines may have all the memory for uploads
            place.socket, arena_bytes=0, connect_timeout_s=ADMIN_TIMEOUT_S,
            match_timeout_s=ADMIN_TIMEOUT_S,
        )  # fmt: skip
        try:
            yield cast(Target, client)
        finally:
            client.close()
        return
    if place.directory is None or socket is not None:
        raise NoDaemon(f"nobody answers on {place.socket}: start the daemon with `twfs serve`")
    from twfs.warehouse import Warehouse  # noqa: PLC0415

    store = Warehouse.open(place.directory, wary=True)
    try:
        yield cast(Target, store)
    finally:
        store.close()


def model_named(store: Namespace, name: str) -> ModelInfo:
    """Return the model *name* as listed; NoSuchModel names those that are there."""
    models = store.models()
    for info in models:
        if info.name == name:
            return info
    there = ", ".join(info.name for info in models) or "none"
    raise NoSuchModel(f"no model {name!r}; there are: {there}")


def parse_hash(text: str) -> PrefixHash:
    """Return the prefix hash that 32 hex digits mean; InvalidInput."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != HASH_BYTES or len(text) != 2 * HASH_BYTES:
        raise InvalidInput(f"{text!r} is not a prefix hash: that is {2 * HASH_BYTES} hex digits")
    return PrefixHash(value)

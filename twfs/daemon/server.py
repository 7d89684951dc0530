"""The daemon's socket: listens, bounds the number of clients, stops cleanly.

One trio task per client, in connection.py. Who may open the socket is a matter of its mode and
group, what they may do then is permitting.py's. Runs in one event loop; only serve is public.
"""

import logging
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from twfs.core.modes import gid_of
from twfs.daemon.connection import Connection
from twfs.daemon.shared import Shared, peer_of
from twfs.errors import InvalidInput, NotAllowed, TooLarge, WarehouseBusy
from twfs.protocol.codec import encode, failure_of

if TYPE_CHECKING:
    from twfs.warehouse import Warehouse

log = logging.getLogger(__name__)

BACKLOG: Final = 1024  # a full backlog would make connecting clients wait
PATH_BYTES_MAX: Final = 107  # of sockaddr_un
ACCEPT_PAUSE_S: Final = 0.1  # after an accept that failed for want of descriptors


async def serve(
    warehouse: "Warehouse",
    socket_path: Path,
    *,
    arena_bytes: int = 4 << 30,
    mode: int = 0o660,
    group: str | int | None = None,
    task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve *warehouse* on a Unix socket until cancelled; then stop cleanly.

    All arenas of clients together take up to *arena_bytes*, those of one user half of that. The
    socket gets *mode* and *group*.
    WarehouseBusy if a daemon answers on *socket_path*; a dead one's socket is replaced.
    InvalidInput or NotAllowed if the socket cannot be made there.
    """
    listener, made = _listen(socket_path, mode, group)
    warehouse.scrubber.resume()
    shared = Shared(warehouse, arena_bytes)
    warehouse.resume()
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await _accept(listener, shared, nursery)
    finally:
        listener.close()
        _remove(socket_path, made)


async def _accept(listener: trio.socket.SocketType, shared: Shared, nursery: trio.Nursery) -> None:
    """Take the next client, or tell it that there are too many."""
    try:
        sock, _ = await listener.accept()
    except OSError as problem:
        log.warning("a client could not be accepted: %s", problem)
        await trio.sleep(ACCEPT_PAUSE_S)
        return
    try:
        _, uid = peer_of(sock)
        shared.enter(uid)
    except OSError as problem:
        log.warning("a client left before it was known: %s", problem)
        sock.close()
        return
    except TooLarge as error:
        shared.errors["TooLarge"] += 1
        with socket.socket(fileno=sock.detach()) as refused, suppress(OSError):
            refused.setblocking(False)  # noqa: FBT003 - the library's own signature
            refused.send(encode(failure_of(0, error)))
        return
    nursery.start_soon(Connection(shared, sock).run)


def _listen(
    path: Path, mode: int, group: str | int | None
) -> tuple[trio.socket.SocketType, os.stat_result]:
    """Return a listening socket at *path* and the stat of its file."""
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise InvalidInput(f"{path} is too long for a socket: at most {PATH_BYTES_MAX} bytes")
    gid = None if group is None else gid_of(str(group))
    _clear(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        path.chmod(mode)  # nobody can connect before listen
        if gid is not None:
            os.chown(path, -1, gid)
        made = path.lstat()
        sock.listen(BACKLOG)
    except OSError as error:
        _abort(sock, path)
        raise NotAllowed(f"no socket can be made at {path}: {error.strerror}") from error
    return trio.socket.from_stdlib_socket(sock), made


def _abort(sock: socket.socket, path: Path) -> None:
    """Take back a socket that could not be set up."""
    sock.close()
    with suppress(OSError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()


def _clear(path: Path) -> None:
    """Remove the socket file of a dead daemon; WarehouseBusy if it lives."""
    try:
        kind = path.lstat().st_mode
    except OSError:
        return  # bind says better what is wrong with the path
    if not stat.S_ISSOCK(kind):
        raise InvalidInput(f"{path} exists and is no socket: remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # noqa: FBT003 - the library's own signature
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:  # its backlog is full, or we may not connect: somebody is there
            raise WarehouseBusy(f"a daemon seems to answer on {path}: {error.strerror}") from error
    raise WarehouseBusy(f"a daemon answers on {path}: stop it first")


def _remove(path: Path, made: os.stat_result) -> None:
    """Remove the socket file unless another daemon has put its own there."""
    with suppress(OSError):
        if os.path.samestat(made, path.lstat()):
            path.unlink()

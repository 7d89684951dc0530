"""Starting a daemon in the background, knowing when it is ready, and ending it by its id.

Readiness is the daemon's own READY=1 (the protocol of systemd's sd_notify), so that nobody polls
and nobody guesses. One thread.
"""

import os
import select
import signal
import socket as sockets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from twfs.errors import MountRefused, NoDaemon, NoSuchWarehouse, TwfsError
from twfs.store import Durability

READY_TIMEOUT_S: Final = 300.0  # a large LMDB file is read ahead at start
STOP_TIMEOUT_S: Final = 60.0
NOTE_BYTES_MAX: Final = 4096  # sd_notify datagrams are shorter
SLICE_S: Final = 0.05  # how soon the end of a daemon that fails at start is seen
LOG_TAIL_BYTES: Final = 65_536


def daemon_command(
    directory: Path,
    mountpoint: Path | None = None,
    *,
    options: str = "",
    socket: Path | None = None,
    arena_bytes: int | None = None,
    durability: Durability = Durability.STRICT,
    degraded: bool = True,
    group: str | None = None,
    config: Path | None = None,
) -> list[str]:
    """Return the command line of the daemon; without *mountpoint* it serves its socket alone."""
    command = [sys.executable, "-m", "twfs_mount.main", str(directory)]
    command += [str(mountpoint)] if mountpoint is not None else ["--no-mount"]
    if options:
        command += ["-o", options]
    if group is not None:
        command += ["--group", group]
    if socket is not None:
        command += ["--socket", str(socket)]
    if arena_bytes is not None:
        command += ["--arena-bytes", str(arena_bytes)]
    if durability is not Durability.STRICT:
        command += ["--durability", durability]
    if config is not None:
        command += ["--config", str(config)]
    if not degraded:
        command += ["--no-degraded"]
    return command


def start_daemon(
    command: Sequence[str], log: Path, *, timeout_s: float = READY_TIMEOUT_S
) -> subprocess.Popen[bytes]:
    """Start *command* in a session of its own, its output in *log*; return once it is ready.

    If it ends before that, the error is the daemon's own, by its exit code and its last line.
    """
    if not log.parent.is_dir():
        raise NoSuchWarehouse(f"{log.parent} is not a directory: create a warehouse there first")
    with (
        tempfile.TemporaryDirectory(prefix="twfs-") as scratch,
        sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM) as notes,
        log.open("ab") as output,
    ):
        notes.bind(f"{scratch}/notify")
        notes.settimeout(SLICE_S)
        began = output.tell()
        daemon = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "NOTIFY_SOCKET": f"{scratch}/notify"},
        )
        try:
            _await_ready(daemon, notes, log, began, timeout_s)
        except BaseException:
            stop(daemon)
            raise
    return daemon


def _await_ready(
    daemon: subprocess.Popen[bytes], notes: sockets.socket, log: Path, began: int, timeout_s: float
) -> None:
    """Return when the daemon said READY=1; raise its error when it ended instead."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if b"READY=1" in notes.recv(NOTE_BYTES_MAX).split(b"\n"):
                return
        except TimeoutError:
            if daemon.poll() is not None:
                raise _error_of(daemon.returncode, log, began) from None
    raise NoDaemon(f"the daemon was not ready within {timeout_s:.0f} s and was ended; see {log}")


def _error_of(code: int, log: Path, began: int) -> TwfsError:
    """Return the daemon's error again, from its exit *code* and the last line it wrote."""
    with log.open("rb") as file:
        file.seek(max(began, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    text = lines[-1].strip() if lines else f"it ended with {code} and wrote nothing"
    for name in ("twfsd: ", "twfs: "):
        text = text.removeprefix(name)
    for kind in TwfsError.__subclasses__():
        if kind.exit_code == code != TwfsError.exit_code:
            return kind(text)
    return NoDaemon(f"the daemon ended with {code}: {text} (see {log})")


def stop(daemon: subprocess.Popen[bytes], *, timeout_s: float = STOP_TIMEOUT_S) -> None:
    """End a daemon that this process started: SIGTERM, and SIGKILL after *timeout_s*."""
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout_s)
        except subprocess.TimeoutExpired:
            daemon.kill()
    daemon.wait()


def await_end(pid: int, *, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Wait until the process *pid*, which need not be a child, has ended; False if it has not."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        readable, _, _ = select.select([handle], [], [], timeout_s)
        return bool(readable)
    finally:
        os.close(handle)


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount *mountpoint*; MountRefused says why it cannot be."""
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), str(mountpoint)]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), str(mountpoint)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise MountRefused(f"{command[0]} is not installed: install fuse3") from error
    if done.returncode:
        cause = done.stderr.strip() or f"{command[0]} ended with {done.returncode}"
        raise MountRefused(f"cannot unmount {mountpoint}: {cause} (twfs unmount --lazy goes on)")

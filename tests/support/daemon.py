"""A real daemon in a process of its own, for tests that kill, stop and restart it.

`python -m support.daemon DIRECTORY SOCKET LEASE_MS ARENA_BYTES` is that process: it opens the
warehouse, serves it, prints "serving" once it listens, and stops cleanly on SIGTERM.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio

from twfs.client import Client, connect
from twfs.daemon.server import serve
from twfs.devices.formatting import DeviceSpec
from twfs.units import ByteCount
from twfs.warehouse import Warehouse

REPOSITORY: Final = Path(__file__).parents[2]
PATIENT_S: Final = 20.0  # tests never assert on time: a busy machine must not make misses


class Daemon:
    """One warehouse and the process that serves it; start is called by running_daemon."""

    def __init__(
        self, directory: Path, *, lease_ms: int, arena_bytes: int,
        wrapper: Sequence[str] = (), environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.wrapper = wrapper
        self.environment = environment or {}
        self.directory = directory
        self.socket = directory / "socket"
        self.lease_ms = lease_ms
        self.arena_bytes = arena_bytes
        self.process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start the process and wait until it listens."""
        arguments = [str(self.directory), str(self.socket), str(self.lease_ms)]
        paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
        self.process = subprocess.Popen(
            [
                *self.wrapper, sys.executable, "-m", "support.daemon", *arguments,
                str(self.arena_bytes),
            ],
            env={**os.environ, "PYTHONPATH": paths, **self.environment},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "serving\n"

    def kill(self) -> None:
        """End the process as a crash would, and wait for its end."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ask the process to end, and return its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(how)
        code = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return code

    def restart(self) -> None:
        """Kill and start again."""
        self.kill()
        self.start()

    def descriptors(self) -> list[str]:
        """What the process has open, sockets without their numbers."""
        found = []
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                found.append(str(link.readlink()).partition(":[")[0])
            except FileNotFoundError:
                continue
        return sorted(found)

    def client(self, *, arena_bytes: int = 8 << 20) -> Client:
        """Connect, with time enough for a busy machine."""
        return connect(
            self.socket, arena_bytes=arena_bytes, connect_timeout_s=PATIENT_S,
            match_timeout_s=PATIENT_S,
        )  # fmt: skip


@contextmanager
def running_daemon(
    directory: Path,
    *,
    device_bytes: int = 64 << 20,
    lease_ms: int = 60_000,
    arena_bytes: int = 256 << 20,
    wrapper: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Daemon]:
    """Make a warehouse with one image in *directory* and serve it; clean stop and check at the end.

    *wrapper* is a command that becomes the daemon (prlimit ...), *environment* goes to it. The
    warehouse must hold all invariants then, unless the daemon is down.
    """
    if not (directory / "meta" / "data.mdb").exists():
        spec = DeviceSpec(directory / "device0.img", ByteCount(device_bytes))
        Warehouse.create(directory, [spec])
    daemon = Daemon(
        directory, lease_ms=lease_ms, arena_bytes=arena_bytes, wrapper=wrapper,
        environment=environment,
    )  # fmt: skip
    daemon.start()
    try:
        yield daemon
    except BaseException:
        daemon.kill()
        raise
    assert daemon.stop() == 0
    with Warehouse.open(directory) as warehouse:
        assert warehouse.check(data=True).findings == ()


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Be *uid* to the kernel, as far as opening files and sockets goes."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def client_of(daemon: Daemon, uid: int, *, arena_bytes: int = 4 << 20) -> Client:
    """Connect as *uid*."""
    with as_user(uid):
        return connect(
            daemon.socket, arena_bytes=arena_bytes, connect_timeout_s=PATIENT_S,
            match_timeout_s=PATIENT_S,
        )  # fmt: skip


async def _main(directory: Path, socket: Path, lease_ms: int, arena_bytes: int) -> None:
    with Warehouse.open(directory, lease_ms=lease_ms) as warehouse:
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                await nursery.start(lambda task_status: serve(
                    warehouse, socket, arena_bytes=arena_bytes, task_status=task_status
                ))  # fmt: skip
                sys.stdout.write("serving\n")
                sys.stdout.flush()
                await anext(aiter(signals))
                nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_main, Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

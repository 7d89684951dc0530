"""A real daemon with a real mount that always comes down, and is checked when it has."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from support.warehouses import chain_of, make_warehouse, payload_of, payloads_of
from twfs.client import Client, connect
from twfs.layout import Layout
from twfs.prefix import Names
from twfs.store import Model, Retention
from twfs.warehouse import Warehouse
from twfs_tools.process import daemon_command, start_daemon, unmount
from twfs_tools.target import find_mount

MOUNTED_BYTES: Final = 64 << 20
STOP_S: Final = 60.0
PATIENT_S: Final = 60.0  # a busy machine must not make misses


class Mount:
    """A mounted warehouse; made by `mounted`."""

    def __init__(
        self, directory: Path, path: Path, process: subprocess.Popen[bytes], log: Path
    ) -> None:
        self.directory = directory
        self.path = path
        self.process = process
        self.log = log

    def client(self) -> Client:
        """Connect to the daemon's socket, as an engine does."""
        return connect(
            self.directory / "socket", arena_bytes=8 << 20, connect_timeout_s=PATIENT_S,
            match_timeout_s=PATIENT_S,
        )  # fmt: skip

    def start(self) -> None:
        """Start the daemon again, where it has been killed and its dead mount is still there."""
        self.process = start_daemon(daemon_command(self.directory, self.path), self.log)

    def kill(self) -> None:
        """End the daemon as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End the daemon as systemd does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def statistics(self) -> dict[str, Any]:
        """What `.twfs/stats.json` says."""
        figures: dict[str, Any] = json.loads((self.path / ".twfs/stats.json").read_text())
        return figures

    def session(self, model: str, names: Names, index: int | None = None) -> Path:
        """The directory of the chain *names*, or of its part up to block *index*."""
        last = len(names) - 1 if index is None else index
        return self.path / model / names.hash_at(last).hex()


@contextmanager
def mounted(
    directory: Path, path: Path, options: str = "", *, check: bool = True
) -> Iterator[Mount]:
    """Mount the warehouse in *directory*, made if it is not there, on *path*.

    Behind the test the daemon must end cleanly, leave no mount, and a warehouse without finding.
    """
    if not (directory / "meta").exists():
        make_warehouse(directory, (MOUNTED_BYTES,))
    path.mkdir(exist_ok=True)
    log = directory / "daemon.log"
    mount = Mount(
        directory, path, start_daemon(daemon_command(directory, path, options=options), log), log
    )
    try:
        yield mount
        if mount.process.poll() is None:
            assert mount.stop() == 0, log.read_text()
            assert find_mount(path) is None
        assert "Traceback" not in log.read_text(), log.read_text()
    except BaseException:
        sys.stderr.write(log.read_text())
        raise
    finally:
        if mount.process.poll() is None:
            mount.kill()
        if find_mount(path) is not None:
            unmount(path, lazy=True)
    if check:
        with Warehouse.open(directory) as warehouse:
            assert warehouse.check(data=True).findings == ()


def store(
    mount: Mount, model: str, layout: Layout, blocks: int, seed: int = 0, *,
    fork: int | None = None, retention: Retention = Retention.STANDARD,
) -> tuple[Model, Names]:  # fmt: skip
    """Store one session through the socket, all groups and shards, as engines do."""
    with mount.client() as client:
        opened = client.open_model(model, layout)
        names = chain_of(opened, blocks, seed, fork=fork)
        for group in range(len(layout.groups)):
            for shard in range(layout.shards):
                result = client.put(
                    opened, names, payloads_of(layout, names, group, shard), group=group,
                    shard=shard, retention=retention,
                )  # fmt: skip
                assert result.held == len(names)
    return opened, names


def expected(layout: Layout, names: Names, index: int, group: int = 0, shard: int = 0) -> bytes:
    """The bytes that a block's file must hold."""
    return payload_of(layout, names.hash_at(index), group, shard).tobytes()


def shell(*command: object, cwd: Path | None = None) -> str:
    """Run a command as a person would; it must succeed. Returns what it printed."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd,
        env={**os.environ, "LC_ALL": "C"}, timeout=STOP_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def refusal(*command: object, cwd: Path | None = None) -> str:
    """Run a command that must fail; returns what it said."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd,
        env={**os.environ, "LC_ALL": "C"}, timeout=STOP_S,
    )  # fmt: skip
    assert done.returncode != 0, f"{command} succeeded"
    return done.stderr


def names_in(directory: Path) -> list[str]:
    """The names that `ls` shows."""
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def refused(number: int) -> Iterator[None]:
    """What is done in this context must fail with the system's error *number*."""
    try:
        yield
    except OSError as error:
        if error.errno != number:
            raise
        return
    raise AssertionError(f"it did not fail with {errno.errorcode[number]}")


def until(claim: Callable[[], bool], what: str) -> None:
    """Wait until *claim* holds; fail if it never does."""
    deadline = time.monotonic() + PATIENT_S
    while not claim():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)

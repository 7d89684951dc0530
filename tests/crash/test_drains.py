"""Devices come and go under engines and a mount that read: no miss, no wrong byte; kills included.

A drain that is killed at any moment loses no block and leaves no damage, and goes on when asked.
`TWFS_DRAIN_KILLS=2000 ./run test tests/crash/test_drains.py` is the long run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from support.cli import twfs
from support.crashing import Survivor
from support.loops import loop_device, needs_loops
from support.mounting import Mount, mounted, store, until
from support.warehouses import DEVICE_BYTES, MHA, chain_of, make_warehouse, put, read_all
from twfs.client import Client
from twfs.devices.formatting import DeviceSpec
from twfs.errors import DeviceNotEmpty
from twfs.prefix import Names
from twfs.store import Model
from twfs.units import ByteCount
from twfs.warehouse import Warehouse

REPOSITORY = Path(__file__).parents[2]
BLOCKS = 30
SEEDS = (1, 2)
KILLS = int(os.environ.get("TWFS_DRAIN_KILLS", "8"))
SYSCALLS = "pwrite64,pwritev,pwritev2,fdatasync,fsync,msync"
STRACE = shutil.which("strace")


def helper(*arguments: object) -> "subprocess.Popen[str]":
    """Start a process of support.draining."""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    paths += os.pathsep + os.pathsep.join(str(REPOSITORY / name) for name in ("mount", "tools"))
    return subprocess.Popen(
        [sys.executable, "-m", "support.draining", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@contextmanager
def engines(mount: Mount, count: int) -> Iterator[list[dict[str, int]]]:
    """Let processes read during this context; what they found is in the list behind it."""
    found: list[dict[str, int]] = []
    socket = mount.directory / "socket"
    processes = [helper("read", socket, BLOCKS, *SEEDS) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "reading\n"
        yield found
    finally:
        for process in processes:
            out, _ = process.communicate("\n")
            if process.returncode == 0:
                found.append(json.loads(out))


@contextmanager
def mount_reader(mount: Mount, names: Names, model: Model) -> Iterator[list[str]]:
    """Read the files of a session during this context; complaints are in the list."""
    complaints: list[str] = []
    stop = threading.Event()
    directory = mount.session(model.name, names)

    def work() -> None:
        paths = sorted(directory.glob("*.kv"))
        wanted = {path: path.read_bytes() for path in paths}
        while not stop.is_set():
            for path in paths:
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
                    try:
                        got = os.pread(fd, 1 << 20, 0)
                    finally:
                        os.close(fd)
                    if got != wanted[path]:
                        complaints.append(f"{path}: other bytes")
                except OSError as error:
                    complaints.append(f"{path}: {error}")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield complaints
    finally:
        stop.set()
        thread.join()


def row_of(client: Client, index: int) -> dict[str, Any]:
    """The row of one device."""
    rows: list[dict[str, Any]] = client.operate("device-list")
    return next(row for row in rows if row["index"] == index)


def emptied(client: Client, index: int) -> None:
    """Drain a device and remove it, once the leases of its last readers have ended."""
    client.operate("device-drain", device=index, rate_bytes_s=4 << 20)
    until(lambda: bool(row_of(client, index)["drain"]["done"]), "the drain ends")

    def removed() -> bool:
        try:
            client.operate("device-remove", device=index)
        except DeviceNotEmpty:
            return False
        return True

    until(removed, "the last leases end")


@needs_loops
@pytest.mark.fuse
@pytest.mark.slow
def test_engines_and_mount_read_on_while_devices_come_and_go(scratch: Path) -> None:
    directory = scratch / "w"
    with loop_device(scratch / "one", DEVICE_BYTES) as one, loop_device(
        scratch / "two", DEVICE_BYTES
    ) as two:  # fmt: skip
        specs = [DeviceSpec(scratch / "a.img", ByteCount(DEVICE_BYTES)), DeviceSpec(one)]
        Warehouse.create(directory, specs)
        with mounted(directory, scratch / "mnt") as mount:
            store(mount, "m", MHA, BLOCKS, SEEDS[0])
            model, names = store(mount, "m", MHA, BLOCKS, SEEDS[1])
            with (
                mount.client() as client,
                engines(mount, 2) as found,
                mount_reader(mount, names, model) as complaints,
            ):
                assert client.operate("device-add", path=str(two))["index"] == 2
                emptied(client, 0)
                assert row_of(client, 2)["blocks"] > 0
                again = str(scratch / "a.img")  # nobody's now
                assert client.operate("device-add", path=again)["index"] == 3
                emptied(client, 1)
                listed = twfs("device", "list", directory, "--json")
                rows = json.loads(listed.stdout)["devices"]
                assert [row["index"] for row in rows] == [2, 3]
                assert [row["state"] for row in rows] == ["online", "online"]
                subprocess.run(["wipefs", "--noheadings", one], check=True)
            assert complaints == []
            assert len(found) == 2
            for each in found:
                assert (each["misses"], each["wrong"]) == (0, 0)
                assert each["reads"] > 0
                assert each["devices"] >= 3


@pytest.mark.slow
def test_a_drain_killed_at_random_moments_loses_nothing_and_goes_on(scratch: Path) -> None:
    survivor = prepared(scratch)
    chance = random.Random(4)
    drains = 0
    for _ in range(KILLS):
        process = helper("drain", scratch)
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 3)):
            drains += bool(process.stdout.readline())
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=chance.random() * 0.3)  # into the midst of it
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        survivor.verify()
    assert drains >= KILLS


def prepared(scratch: Path) -> Survivor:
    """A warehouse of two devices with chains that must outlive everything."""
    make_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES))
    survivor = Survivor(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        for seed in SEEDS:
            assert put(warehouse, model, chain_of(model, BLOCKS, seed)).held == BLOCKS
            survivor.note([("put", seed, -1, BLOCKS)])
        assert read_all(warehouse, model, chain_of(model, BLOCKS, 1)) == BLOCKS
    return survivor


@pytest.mark.skipif(STRACE is None, reason="needs strace")
@pytest.mark.slow
def test_a_drain_killed_at_every_nth_write_or_flush_loses_nothing(scratch: Path) -> None:
    survivor = prepared(scratch)
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", REPOSITORY / "mount",
                                      REPOSITORY / "tools")))  # fmt: skip
    for number in (3, 5, 8, 13, 21):
        done = subprocess.run(
            [
                str(STRACE), "-f", "-qq", "-o", "/dev/null", "-e", f"trace={SYSCALLS}",
                "-e", f"inject={SYSCALLS}:signal=SIGKILL:when={number}",
                sys.executable, "-m", "support.draining", "drain", str(scratch),
            ],
            env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, check=False,
        )  # fmt: skip
        assert done.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}, done
        survivor.verify()

"""Guaranteed: at every limit the store says so, loses nothing, and goes on once there is room.

Devices, LMDB's map, the filesystem of the metadata, descriptors, address space; two daemons,
another PID namespace, clocks that jump, another boot, readers that were stopped past their lease.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.daemon import PATIENT_S, REPOSITORY, Daemon, running_daemon
from support.warehouses import (
    BIG,
    DEVICE_BYTES,
    MHA,
    chain_of,
    make_warehouse,
    open_warehouse,
    payload_of,
    payloads_of,
    put,
    read_all,
)
from twfs.client import Client, connect
from twfs.devices.formatting import DeviceSpec
from twfs.errors import (
    NoDaemon,
    NoSpaceForImage,
    TooLarge,
    WarehouseBusy,
    WarehouseFull,
)
from twfs.layout import Layout
from twfs.metadata import environment
from twfs.store import Model, PutOutcome, ReadOutcome
from twfs.units import ByteCount
from twfs.warehouse import Warehouse

FAKETIME: Final = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
TINY: Final = DEVICE_BYTES
HIT: Final = (ReadOutcome.HIT,)
LEASE_MS: Final = 1000  # enough to begin a read with, and short enough to wait for its end


def stored(client: Client, name: str, layout: Layout, blocks: int, seed: int = 0) -> Model:
    """Put a chain through the daemon, whole."""
    model = client.open_model(name, layout)
    names = chain_of(model, blocks, seed)
    assert client.put(model, names, payloads_of(layout, names)).held == blocks
    return model


def assert_reads(client: Client, model: Model, blocks: int, seed: int = 0) -> None:
    """Every block of the chain is there, with its bytes."""
    names = chain_of(model, blocks, seed)
    with client.match(model, names) as match:
        assert match.blocks == blocks
        into = [bytearray(model.layout.block_bytes()) for _ in range(blocks)]
        assert match.read_into(into).outcomes == HIT * blocks
        for index, got in enumerate(into):
            assert bytes(got) == payload_of(model.layout, names.hash_at(index)).tobytes()


# Room


def test_a_device_full_of_leased_blocks_refuses_puts_and_serves_reads(scratch: Path) -> None:
    """Each client may lease half: with three there is nothing left to evict."""
    with running_daemon(scratch / "w", device_bytes=TINY) as daemon, ExitStack() as stack:
        clients = [stack.enter_context(daemon.client()) for _ in range(3)]
        matches = []
        model = clients[0].open_model("m", BIG)
        sizes = [14, 13, 2]  # of 512 KiB and a header each: there is room for 29
        for seed, (client, blocks) in enumerate(zip(clients, sizes, strict=True)):
            stored(client, "m", BIG, blocks, seed)
            matches.append(client.match(model, chain_of(model, blocks, seed)))
            assert matches[-1].blocks == blocks
        names = chain_of(model, 3, 9)
        with pytest.raises(WarehouseFull):
            clients[0].put(model, names, payloads_of(BIG, names))
        for client, match, blocks in zip(clients, matches, sizes, strict=True):
            assert client.evict(ByteCount(1 << 30)) == 0
            into = [bytearray(BIG.block_bytes()) for _ in range(blocks)]
            assert match.read_into(into).outcomes == HIT * blocks
        matches[0].release()
        assert clients[0].put(model, names, payloads_of(BIG, names)).held == 3
        for match in matches:
            match.release()
        assert_reads(clients[1], model, 13, 1)


def test_a_full_map_refuses_puts_and_a_larger_one_takes_them(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_warehouse(scratch)
    with monkeypatch.context() as patch:
        patch.setattr(environment, "MAP_BYTES", 192 << 10)
        with open_warehouse(scratch) as warehouse:
            model = warehouse.open_model("m", MHA)
            stored_chains = fill_until_refused(warehouse, model)
            for seed in stored_chains:
                assert read_all(warehouse, model, chain_of(model, 8, seed)) == 8
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        for seed in stored_chains:
            assert read_all(warehouse, model, chain_of(model, 8, seed)) == 8
        assert put(warehouse, model, chain_of(model, 8, 999)).held == 8


def fill_until_refused(warehouse: Warehouse, model: Model) -> list[int]:
    """Put chains of 8 until there is no room for metadata; the seeds of those that are there."""
    seeds: list[int] = []
    for seed in range(1, 400):
        try:
            outcomes = put(warehouse, model, chain_of(model, 8, seed)).outcomes
        except NoSpaceForImage:
            break
        assert set(outcomes) == {PutOutcome.PUBLISHED}
        seeds.append(seed)
    else:
        raise AssertionError("it was never full")
    assert seeds
    return seeds


@contextmanager
def small_filesystem(path: Path, byte_count: int) -> Iterator[Path]:
    """A tmpfs of that size on *path*."""
    path.mkdir()
    options = f"size={byte_count}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.root
def test_a_full_filesystem_of_the_metadata_refuses_puts_until_there_is_room(scratch: Path) -> None:
    with small_filesystem(scratch / "small", 8 << 20) as directory:
        Warehouse.create(directory, [DeviceSpec(scratch / "device.img", ByteCount(TINY))])
        with open_warehouse(directory) as warehouse:
            model = warehouse.open_model("m", MHA)
            assert put(warehouse, model, chain_of(model, 8)).held == 8
            filler = directory / "filler"
            left = os.statvfs(directory).f_bavail * 4096
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, left - (64 << 10))
            seeds = fill_until_refused(warehouse, model)
            for seed in seeds:
                assert read_all(warehouse, model, chain_of(model, 8, seed)) == 8
            filler.unlink()
            assert put(warehouse, model, chain_of(model, 8, 999)).held == 8
            assert read_all(warehouse, model, chain_of(model, 8, 999)) == 8


# Resources of the process


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_clients_without_a_descriptor_for_them_are_refused_and_then_served(
    scratch: Path, spare: int
) -> None:
    """What lacks: one for the connection, for the arena, for the device."""
    with running_daemon(scratch / "w") as daemon, daemon.client() as first:
        model = stored(first, "m", MHA, 4)
        limit(daemon, f"--nofile={len(daemon.descriptors()) + spare}:4096")
        with pytest.raises(TooLarge if spare else NoDaemon):
            connect(daemon.socket, arena_bytes=1 << 20, connect_timeout_s=1.0)
        assert_reads(first, model, 4)
        limit(daemon, "--nofile=4096:4096")
        with daemon.client() as second:
            assert_reads(second, model, 4)


def limit(daemon: Daemon, option: str) -> None:
    """Change a limit of the running daemon."""
    subprocess.run(["prlimit", "--pid", str(daemon.pid), option], check=True)


def test_an_arena_beyond_what_the_daemon_may_take_is_refused_by_a_sentence(scratch: Path) -> None:
    with running_daemon(scratch / "w", arena_bytes=1 << 50) as daemon, daemon.client() as good:
        with pytest.raises(TooLarge, match="cannot be had"):
            daemon.client(arena_bytes=1 << 49)
        stored(good, "m", MHA, 4)


def opened(directory: Path, *wrapper: str) -> subprocess.CompletedProcess[str]:
    """Run `twfs check` on *directory*, which opens it; under *wrapper*."""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "mount", REPOSITORY / "tools")))
    return subprocess.run(
        [*wrapper, sys.executable, "-m", "twfs_tools.cli", "check", str(directory)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


def test_a_limit_of_address_space_is_named_and_not_called_corruption(scratch: Path) -> None:
    make_warehouse(scratch / "w")
    done = opened(scratch / "w", "prlimit", f"--as={64 << 30}")
    assert done.returncode == 23, done.stderr
    assert "address space" in done.stderr
    assert "Traceback" not in done.stderr
    assert opened(scratch / "w").returncode == 0


# Who else has it open


@pytest.mark.root
def test_another_pid_namespace_is_refused_by_the_lock_and_opens_it_afterwards(
    scratch: Path,
) -> None:
    """LMDB's own lock would not hold there; the flock on the directory does."""
    other = ("unshare", "--pid", "--fork", "--mount-proc")
    code = f"""
from pathlib import Path
from twfs.errors import WarehouseBusy
from twfs.warehouse import Warehouse
try:
    with Warehouse.open(Path({str(scratch / "w")!r})) as warehouse:
        print("opened", len(warehouse.check(data=True).findings))
except WarehouseBusy as error:
    print("refused")
"""
    command = [*other, sys.executable, "-c", code]

    def tried() -> str:
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    with running_daemon(scratch / "w") as daemon, daemon.client() as client:
        model = stored(client, "m", MHA, 4)
        assert tried() == "refused"
        with pytest.raises(WarehouseBusy):
            Warehouse.open(scratch / "w")
        assert_reads(client, model, 4)
    assert tried() == "opened 0"


# Time


@pytest.mark.skipif(not Path(FAKETIME).exists(), reason="needs faketime")
def test_clocks_that_jump_end_no_lease_and_take_no_heat_back(scratch: Path) -> None:
    """Wall time goes a year ahead, then two back; leases count in time since boot."""
    scratch.mkdir(exist_ok=True)
    clock = scratch / "clock"
    clock.write_text("+0")
    environment = {
        "LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    with running_daemon(scratch / "w", environment=environment) as daemon:
        with daemon.client() as client:
            model = stored(client, "m", MHA, 4)
            names = chain_of(model, 4)
            uses = [client.sessions(model.id)[0].last_use_ms]
            with client.match(model, names) as match:
                for jump in ("+365d", "-365d", "+0"):
                    clock.write_text(jump)
                    assert match.held
                    into = [bytearray(MHA.block_bytes()) for _ in range(4)]
                    assert match.read_into(into).outcomes == HIT * 4
                    client.match(model, names).release()  # stamps
                    uses.append(client.sessions(model.id)[0].last_use_ms)
                    assert client.evict(ByteCount(1 << 30)) == 0  # leased still
            assert uses == sorted(uses)
            assert uses[1] - uses[0] > 364 * 86_400_000, "the clock never jumped"
            clock.write_text("-365d")
            assert_reads(client, stored(client, "m", MHA, 4, 3), 4, 3)
            assert client.check(data=True).findings == ()
        daemon.restart()
        with daemon.client() as client:
            assert client.sessions(model.id)[0].last_use_ms >= min(uses)
            assert_reads(client, model, 4)


@pytest.mark.root
def test_after_a_reboot_all_that_was_published_is_there(scratch: Path) -> None:
    """Another boot id, bind-mounted in a mount namespace of its own, after a kill."""
    scratch.mkdir(exist_ok=True)
    fake = scratch / "boot_id"
    fake.write_text("00000000-1111-4222-8333-444444444444\n")
    real = "/proc/sys/kernel/random/boot_id"
    script = f'mount --bind {fake} {real} && exec "$@"'
    wrapper = ("unshare", "--mount", "sh", "-c", script, "sh")
    with running_daemon(scratch / "w") as daemon:
        with daemon.client() as client:
            model = stored(client, "m", MHA, 6)
            held = client.match(model, chain_of(model, 6))
            client.remove(model.id, chain_of(model, 6).hash_at(5))  # into limbo: it is leased
            stored(client, "m", MHA, 4, 1)
            daemon.kill()
            assert not held.held
        daemon.wrapper = wrapper
        daemon.start()
        with daemon.client() as client:
            assert_reads(client, model, 4, 1)
            assert client.space().limbo_bytes == 0
            assert client.match(model, chain_of(model, 6)).blocks == 0
            assert client.check(data=True).findings == ()
    with Warehouse.open(scratch / "w") as warehouse, warehouse._core.metadata.read() as view:
        assert view.meta("boot_id") == Path(real).read_bytes().strip()


STOPPED_READER: Final = """
import os, signal, sys
from support.warehouses import BIG, chain_of, payload_of
from twfs.client import connect
client = connect(sys.argv[1], connect_timeout_s=20, match_timeout_s=20)
model = client.open_model("m", BIG)
names = chain_of(model, 5)
while True:
    match = client.match(model, names)
    if match.held:
        break
assert match.blocks == 5
real, left = os.preadv, [int(sys.argv[2])]
def preadv(*arguments):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(*arguments)
os.preadv = preadv
if not left[0]:
    os.kill(os.getpid(), signal.SIGSTOP)
into = [bytearray(BIG.block_bytes()) for _ in range(5)]
report = match.read_into(into)
print(*(outcome.name for outcome in report.outcomes))
again = client.match(model, names)
print(again.blocks)
"""


@pytest.mark.parametrize("reads", [0, 1, 3], ids=["before", "in the first", "in the third"])
def test_a_reader_stopped_past_its_lease_sees_a_miss(scratch: Path, reads: int) -> None:
    """Its blocks are evicted meanwhile, and others' bytes lie where it reads."""
    with (
        running_daemon(scratch / "w", device_bytes=TINY, lease_ms=LEASE_MS) as daemon,
        daemon.client() as client,
    ):
        model = stored(client, "m", BIG, 5)
        reader = subprocess.Popen(
            [sys.executable, "-c", STOPPED_READER, str(daemon.socket), str(reads)],
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
        )  # fmt: skip
        try:
            _, status = os.waitpid(reader.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            while client.evict(ByteCount(1 << 30)) == 0:
                assert reader.poll() is None
            for seed in (1, 2):  # 28 of the 29 places
                stored(client, "m", BIG, 14, seed)
        finally:
            reader.send_signal(signal.SIGCONT)
        out, _ = reader.communicate(timeout=PATIENT_S)
        outcomes, blocks = out.splitlines()
        assert set(outcomes.split()) == {ReadOutcome.LEASE_ENDED.name}, out
        assert blocks == "0"
        daemon.lease_ms = 60_000  # a busy machine may need longer than the reader had
        daemon.restart()
        with daemon.client() as fresh:
            assert_reads(fresh, model, 14, 2)

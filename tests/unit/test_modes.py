"""The engines of one group can use a warehouse, and nobody else; daemon and engines need no root.

Real users to the kernel: a child process gives up root before it opens anything.
"""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.daemon import REPOSITORY, running_daemon
from support.warehouses import DEVICE_BYTES, MHA, chain_of, payloads_of
from twfs.client import connect
from twfs.core.modes import gid_of, group_of
from twfs.devices.formatting import DeviceSpec
from twfs.errors import InvalidInput, NotAllowed
from twfs.units import ByteCount
from twfs.warehouse import Warehouse

ENGINE, STRANGER, GROUP = 61_001, 61_002, 61_010
SERVE = """
import os, sys
from pathlib import Path
import trio, twfs_mount.daemon, twfs.client, twfs.warehouse
from twfs_mount.main import main
from twfs.devices.formatting import DeviceSpec
from twfs.units import ByteCount
os.setgroups([]); os.setgid({gid}); os.setuid({uid})
directory = Path(sys.argv[1])
twfs.warehouse.Warehouse.create(
    directory, [DeviceSpec(directory / "device0.img", ByteCount({size}))], group="{gid}")
print("made", flush=True)
sys.exit(main([str(directory), "--no-mount", "--foreground"]))
"""


@contextmanager
def as_user(uid: int, gids: list[int]) -> Iterator[None]:
    """Be *uid* with only the groups *gids*, as far as opening files goes."""
    before = os.getgroups()
    os.setgroups(gids)
    os.setegid(gids[0] if gids else uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def make(directory: Path, group: str | None) -> None:
    spec = DeviceSpec(directory / "device0.img", ByteCount(64 << 20))
    Warehouse.create(directory, [spec], group=group)


def mode_of(path: Path) -> tuple[str, int]:
    found = path.stat()
    return oct(stat.S_IMODE(found.st_mode)), found.st_gid


@pytest.mark.root
def test_files_have_the_modes_that_they_are_promised(scratch: Path) -> None:
    make(scratch / "own", None)
    make(scratch / "shared", str(GROUP))
    for name, group in (("own", None), ("shared", GROUP)):
        home = scratch / name
        with Warehouse.open(home) as warehouse:
            warehouse.open_model("m", MHA)
        assert mode_of(home) == (("0o700", 0) if group is None else ("0o750", GROUP))
        image = mode_of(home / "device0.img")
        assert image == (("0o600", 0) if group is None else ("0o640", GROUP))
        assert mode_of(home / "meta") == ("0o700", 0)
        for private in ("meta/data.mdb", "meta/lock", "meta/lock.mdb", "heat", "secret"):
            assert mode_of(home / private) == ("0o600", 0), private
        assert group_of(home) == group


def test_a_group_that_is_not_there_is_refused_before_anything_is_made(scratch: Path) -> None:
    with pytest.raises(InvalidInput, match="no-such-group"):
        make(scratch / "w", "no-such-group")
    assert not (scratch / "w").exists()
    assert (gid_of("root"), gid_of("17")) == (0, 17)


@pytest.mark.root
def test_engines_of_the_group_are_served_and_strangers_are_not(scratch: Path) -> None:
    scratch.chmod(0o711)
    make(scratch / "w", str(GROUP))
    with running_daemon(scratch / "w") as daemon:
        os.chown(daemon.socket, 0, GROUP)  # the daemon of these tests is told no group
        with as_user(ENGINE, [GROUP]):
            client = daemon.client(arena_bytes=1 << 20)
            (scratch / "w" / "device0.img").open("rb").close()  # as cuFile does
            for private in ("meta", "secret", "heat"):
                with pytest.raises(PermissionError):
                    os.open(scratch / "w" / private, os.O_RDONLY)
        with client:
            model = client.open_model("m", MHA)
            names = chain_of(model, 3)
            assert client.put(model, names, payloads_of(MHA, names)).held == 3
            with client.match(model, names) as match:
                into = [bytearray(MHA.block_bytes()) for _ in range(3)]
                assert match.read_into(into).blocks == 3
                assert into == [payload.tobytes() for payload in payloads_of(MHA, names)]
        with as_user(STRANGER, []):
            with pytest.raises(NotAllowed, match="join the group"):
                connect(daemon.socket)
            with pytest.raises(PermissionError):
                os.open(scratch / "w" / "device0.img", os.O_RDONLY)


@pytest.mark.root
def test_the_daemon_runs_without_any_privilege(scratch: Path) -> None:
    scratch.chmod(0o711)
    home = scratch / "w"
    home.mkdir()
    os.chown(home, STRANGER, GROUP)
    paths = os.pathsep.join(str(REPOSITORY / name) for name in (".", "mount", "tools", "tests"))
    code = SERVE.format(uid=STRANGER, gid=GROUP, size=DEVICE_BYTES)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": paths},
    ) as daemon:  # fmt: skip
        try:
            assert daemon.stdout is not None
            assert daemon.stderr is not None
            assert daemon.stdout.readline() == "made\n", daemon.stderr.read()
            for line in daemon.stderr:
                if "listening on" in line:
                    break
            assert mode_of(home / "socket") == ("0o660", GROUP)
            status = Path(f"/proc/{daemon.pid}/status").read_text()
            assert f"Uid:\t{STRANGER}\t{STRANGER}\t{STRANGER}" in status
            assert "CapEff:\t0000000000000000" in status
            with as_user(ENGINE, [GROUP]):
                client = connect(home / "socket", arena_bytes=1 << 20)
            with client:
                model = client.open_model("m", MHA)
                names = chain_of(model, 3)
                assert client.put(model, names, payloads_of(MHA, names)).held == 3
                with pytest.raises(NotAllowed):
                    client.operate("tenant-list")
            with as_user(STRANGER, [GROUP]):
                own = connect(home / "socket", arena_bytes=0)
            with own:  # the daemon's own user operates it
                assert own.operate("tenant-list") == []
        finally:
            daemon.terminate()
            daemon.wait()  # it says so, to a pipe that must still be there
    assert daemon.returncode == 0
    with Warehouse.open(home) as warehouse:
        assert warehouse.lookup(warehouse.open_model("m"), names) == 3
        assert warehouse.check(data=True).findings == ()


@pytest.mark.root
def test_an_image_that_is_added_is_the_groups_too(scratch: Path) -> None:
    make(scratch / "w", str(GROUP))
    with Warehouse.open(scratch / "w") as warehouse:
        path = scratch / "w" / "b.img"
        warehouse.operate("device-add", path=str(path), size_bytes=DEVICE_BYTES)
        assert mode_of(path) == ("0o640", GROUP)

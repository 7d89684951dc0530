"""A rebuild that is killed at any write, flush or rename leaves the old metadata or the new.

And it can be run again. `TWFS_REBUILD_KILLS=all pytest tests/crash/test_rebuild_kills.py` kills at
every one of these system calls; otherwise at some.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.rebuilding import State, assert_back, fill, state_of
from support.warehouses import DEVICE_BYTES, MHA, chain_of, open_warehouse, put, read_all
from twfs.errors import CorruptMetadata, NoSuchWarehouse
from twfs.rebuild import rebuild
from twfs.warehouse import Warehouse

REPOSITORY = Path(__file__).parents[2]
SYSCALLS = (
    "write,pwrite64,pwritev,pwritev2,fdatasync,fsync,msync,rename,renameat,renameat2,link,linkat,"
    "mkdir,mkdirat,unlink,unlinkat,rmdir,ftruncate,fallocate"
)
STRACE = shutil.which("strace")
SOME = 9


def traced(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Rebuild the warehouse in *directory* below strace."""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    return subprocess.run(
        [
            str(STRACE), "-f", "-qq", "-e", f"trace={SYSCALLS}", *options, sys.executable, "-m",
            "support.rebuilding", str(directory),
        ],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def may_trace() -> bool:
    """Tell whether strace is there and may trace here."""
    if STRACE is None:
        return False
    command = [STRACE, "-f", "-qq", "-o", "/dev/null", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def opens(directory: Path) -> bool:
    """Tell whether the metadata is there, and as new as the devices."""
    try:
        Warehouse.open(directory).close()
    except (NoSuchWarehouse, CorruptMetadata):
        return False
    return True


def made(directory: Path) -> tuple[State, bool]:
    """A warehouse, what it holds, and whether all that it ever held."""
    with open_warehouse(directory, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        exactly = fill(warehouse, random.Random(4), 15)
        return state_of(warehouse), exactly


@pytest.mark.skipif(not may_trace(), reason="needs strace, and the right to trace")
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("old", ["lost", "outdated"])
def test_a_rebuild_killed_at_any_change_leaves_the_old_or_the_new_and_runs_again(
    scratch: Path, old: str
) -> None:
    home = scratch / "w"
    with open_warehouse(home, (DEVICE_BYTES, DEVICE_BYTES)):
        pass
    shutil.copytree(home / "meta", scratch / "outdated")
    before, exactly = made(home)
    image = scratch / "image"
    shutil.rmtree(home / "meta")
    if old == "outdated":
        shutil.copytree(scratch / "outdated", home / "meta")
    shutil.copytree(home, image)
    log = scratch / "log"
    assert traced(home, "-o", str(log)).returncode == 0
    calls = len(re.findall(r"^\d+ +\w+\(", log.read_text(), re.MULTILINE))
    assert calls > 2 * SOME
    numbers = range(1, calls + 1)
    if os.environ.get("TWFS_REBUILD_KILLS") != "all":
        last = range(calls - 3, calls + 1)  # where it takes its place
        numbers = sorted({*random.Random(7).sample(numbers, SOME - 4), *last})  # type: ignore[assignment]
    killed = 0
    for number in numbers:
        shutil.rmtree(home)
        shutil.copytree(image, home)
        script = f"inject={SYSCALLS}:signal=SIGKILL:when={number}"
        done = traced(home, "-o", "/dev/null", "-e", script)
        killed += done.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}
        fresh = (home / "meta" / "data.mdb").exists() and opens(home)
        if not fresh:
            rebuild(home)
        with open_warehouse(home) as warehouse:
            after = state_of(warehouse)
            assert_back(before, after, exactly=exactly)
            model = warehouse.open_model("kept", MHA)
            put(warehouse, model, names := chain_of(model, 3))
            assert read_all(warehouse, model, names) == 3
        rebuild(home, force=True)
        assert not (home / "meta.new").exists()
        assert len(list(home.glob("meta.old-*"))) <= 2
        with open_warehouse(home):
            pass
    assert killed >= len(numbers) // 2

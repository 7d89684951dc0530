"""A rebuild that is killed at any write, flush or rename leaves the old metadata or the new.

And it can be run again. `TWFS_REBUILD_KILLS=all pytest tests/crash/test_rebuild_kills.py` kills at
the n-th of each of these system calls, for every n that any thread reaches; otherwise at some.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from support.rebuilding import State, assert_back, fill, state_of
from support.tracing import STRACE, needs_strace
from support.warehouses import DEVICE_BYTES, MHA, chain_of, open_warehouse, put, read_all
from twfs.errors import CorruptMetadata, NoSuchWarehouse
from twfs.recovery.rebuild import rebuild
from twfs.warehouse import Warehouse

REPOSITORY = Path(__file__).parents[2]
SYSCALLS = (
    "write,pwrite64,pwritev,pwritev2,fdatasync,fsync,msync,rename,renameat,renameat2,link,linkat,"
    "mkdir,mkdirat,unlink,unlinkat,rmdir,ftruncate,fallocate"
)
SOME = 3


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


def points(log: str) -> list[tuple[str, int]]:
    """System calls to be killed at: name and number, as strace counts them, per thread."""
    calls = Counter(re.findall(r"^(\d+) +(\w+)\(", log, re.MULTILINE))
    highest: dict[str, int] = {}
    for (_, call), count in calls.items():
        highest[call] = max(count, highest.get(call, 0))
    every = [(call, n) for call, count in sorted(highest.items()) for n in range(1, count + 1)]
    if os.environ.get("TWFS_REBUILD_KILLS") == "all":
        return every
    taking_place = [(call, n) for call, n in every if call in {"rename", "link", "linkat"}]
    return sorted({*random.Random(7).sample(every, SOME), *taking_place})


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


@needs_strace
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
    content = (image / "meta" / "data.mdb").read_bytes() if old == "outdated" else b""
    log = scratch / "log"
    assert traced(home, "-o", str(log)).returncode == 0
    for call, number in points(log.read_text()):
        shutil.rmtree(home)
        shutil.copytree(image, home)
        script = f"inject={call}:signal=SIGKILL:when={number}"
        done = traced(home, "-o", "/dev/null", "-e", script)
        assert done.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}, (call, number)
        present = home / "meta" / "data.mdb"
        untouched = old == "outdated" and present.read_bytes() == content
        if not opens(home):
            assert untouched or old == "lost", (call, number)
            rebuild(home)
        with open_warehouse(home) as warehouse:
            assert_back(before, state_of(warehouse), exactly=exactly)
            model = warehouse.open_model("kept", MHA)
            put(warehouse, model, names := chain_of(model, 3))
            assert read_all(warehouse, model, names) == 3
        assert len(list(home.glob("meta.old-*"))) <= 2
    rebuild(home, force=True)
    assert not (home / "meta.new").exists()
    with open_warehouse(home):
        pass

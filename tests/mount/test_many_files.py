"""One directory of a hundred thousand files, listed through a real mount while names change."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.filing import make_empty_files
from support.mounting import Mount, mounted
from support.warehouses import make_warehouse
from twfs.warehouse import Warehouse

pytestmark = [pytest.mark.fuse, pytest.mark.root]

NAMES = 100_000
THIRD = NAMES // 3
AT_ONCE = 10_000  # of one transaction
DEVICE_BYTES = 1 << 30  # an empty file takes 8 KiB
LISTING_BYTES_MAX = 64 << 20  # that the daemon grows by: 30 MiB for the names of one listing
LISTINGS = 4


@pytest.fixture
def many(scratch: Path) -> Iterator[tuple[Mount, Path]]:
    """A mount, and a directory in it with NAMES files."""
    make_warehouse(scratch / "warehouse", (DEVICE_BYTES,))
    with Warehouse.open(scratch / "warehouse") as warehouse:
        row = warehouse.files.mkdir(0, b"many", mode=0o755, uid=0, gid=0)
        for start in range(0, NAMES, AT_ONCE):
            names = [b"%06d" % number for number in range(start, start + AT_ONCE)]
            make_empty_files(warehouse.files, row.ino, names)
    with mounted(scratch / "warehouse", scratch / "mnt", check=False) as mount:
        yield mount, mount.path / "files/many"


def listed(path: Path) -> list[str]:
    with os.scandir(path) as rows:
        return [row.name for row in rows]


def held_bytes(mount: Mount) -> int:
    """The most memory that the daemon has had."""
    lines = Path(f"/proc/{mount.process.pid}/status").read_text().splitlines()
    (line,) = [each for each in lines if each.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


@contextmanager
def coming_and_going(path: Path) -> Iterator[set[str]]:
    """Files are made, removed, renamed and written anew until the block ends: their names."""
    touched: set[str] = set()
    ending = threading.Event()

    def change() -> None:
        for turn in range(THIRD):
            if ending.is_set():
                return
            first = turn * 2671 % THIRD * 3  # each but once, and all over the directory
            old, anew, gone = (f"{first + each:06d}" for each in range(3))
            touched.update({f"new-{turn}", f"{old}-renamed", old, gone})
            (path / f"new-{turn}").touch()
            (path / old).rename(path / f"{old}-renamed")
            (path / anew).write_bytes(b"written anew")  # the name is there all the time
            (path / gone).unlink()

    changing = threading.Thread(target=change)
    changing.start()
    try:
        yield touched
    finally:
        ending.set()
        changing.join()


def test_a_listing_of_many_names_has_each_once(many: tuple[Mount, Path]) -> None:
    mount, path = many
    before = held_bytes(mount)
    names = [f"{number:06d}" for number in range(NAMES)]
    assert listed(path) == names
    once = held_bytes(mount)
    assert once - before < LISTING_BYTES_MAX
    with coming_and_going(path) as touched:
        rounds = [listed(path) for _ in range(LISTINGS)]
    assert touched
    for found in rounds:
        assert len(set(found)) == len(found)
        assert set(names) - touched <= set(found) <= set(names) | touched
    assert held_bytes(mount) - once < LISTING_BYTES_MAX  # not so much again for each
    assert mount.statistics()["mount"]["open_of_files"] == 0

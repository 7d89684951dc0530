"""The daemon is killed while files are written: after it each is whole or absent, and nothing else.

Several writers make, rename, replace and unlink files of known bytes in a mount whose daemon is
killed at any moment. Then every name must lead to the bytes that some close has given it, what was
renamed or fsynced through its directory must be there, and the checker must find nothing.
"""

import os
import random
import threading
from pathlib import Path
from typing import Final

import pytest

from support.mounting import Mount, mounted

ROUNDS: Final = 3
WRITERS: Final = 4
WORK_S: Final = 1.5  # of writing before the kill
SIZES: Final = (0, 100, 4096, 70_000, 1 << 20, (4 << 20) + 1)


def content(seed: int) -> bytes:
    """Bytes that tell their seed, and of which every part tells it."""
    size = SIZES[seed % len(SIZES)]
    return (b"%010d" % seed * (size // 10 + 1))[:size]


class Writer(threading.Thread):
    """Writes in a directory of its own until the daemon is gone; *sure* is what must be there."""

    def __init__(self, root: Path, number: int, first: int) -> None:
        super().__init__()
        self.root = root / f"w{number}"
        self.sure: dict[str, int] = {}  # name: seed, and -1: nothing
        self.maybe: dict[str, set[int]] = {}  # what is under way, or may be undone
        self.seed = first
        self.random = random.Random(first)

    def run(self) -> None:
        try:
            while True:
                self.step()
        except OSError:
            return  # the daemon is gone

    def step(self) -> None:
        name = f"f{self.random.randrange(6)}"
        self.maybe.setdefault(name, {self.sure.get(name, -1)})
        if self.random.random() < 0.2 and self.sure.get(name, -1) >= 0:
            self.maybe[name].add(-1)
            (self.root / name).unlink()
            self.sure[name] = -1
        else:
            self.seed += 1
            self.maybe[name].add(self.seed)
            temporary = self.root / f"{name}.tmp"
            with temporary.open("wb", buffering=0) as file:
                data = content(self.seed)
                for at in range(0, len(data), 1 << 20):
                    file.write(data[at : at + (1 << 20)])
            temporary.rename(self.root / name)
            self.sure[name] = self.seed
        self.maybe[name] = {self.sure[name]}


def assert_true(mount: Mount, writers: list[Writer]) -> None:
    """Fail unless each name has the bytes that its writer has given it."""
    for writer in writers:
        for path in writer.root.iterdir():
            data = path.read_bytes()
            if path.suffix == ".tmp":  # closed, and not yet renamed
                seed = int(data[:10] or 0)
                assert not data or data == content(seed), path
                continue
            assert any(
                seed >= 0 and data == content(seed)
                for seed in writer.maybe.get(path.name, {writer.sure.get(path.name, -1)})
            ), path
        for name, seeds in writer.maybe.items():
            if -1 not in seeds:
                assert (writer.root / name).exists(), name


@pytest.mark.fuse
@pytest.mark.root
def test_a_killed_daemon_leaves_files_whole_or_absent(scratch: Path, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(3), "big")
    for turn in range(ROUNDS):
        with mounted(scratch, tmp_path / "mnt") as mount:
            root = mount.path / f"files/round{turn}"
            root.mkdir()
            writers = [Writer(root, n, seed + n * 100_000) for n in range(WRITERS)]
            for writer in writers:
                writer.root.mkdir()
            for writer in writers:
                writer.start()
            killer = threading.Timer(WORK_S + random.Random(seed + turn).random(), mount.kill)
            killer.start()
            for thread in (*writers, killer):
                thread.join()
        with mounted(scratch, tmp_path / "mnt") as mount:
            for writer in writers:
                writer.root = mount.path / f"files/round{turn}" / writer.root.name
            assert_true(mount, writers)

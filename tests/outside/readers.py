"""Readers that do everything a reader may, on a mount whose blocks come and go.

`python -m outside.readers MOUNT SECONDS SEED` is one: it lists, stats, opens, reads at any offset,
hints, takes attributes, and closes, at random, in the model `m` of the mount, like fsx and
fsstress do with files of their own. Every byte must be the one that its block has by its name; a
name or a block that is gone is ENOENT or ESTALE, and nothing else may happen. Maps are left out: a
mapped block that goes is SIGBUS, by the kernel's own rules. Prints its counts.
"""

import errno
import mmap
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from support.warehouses import MHA, payload_of

GONE: Final = frozenset({errno.ENOENT, errno.ESTALE})
OPEN_MAX: Final = 16


class Reader:
    """One reader: see the module's docstring."""

    def __init__(self, model: Path, seed: int) -> None:
        self.model = model
        self.chance = random.Random(seed)
        self.files: list[tuple[int, bytes, int]] = []  # descriptor, payload, inode
        self.counts: Counter[str] = Counter()
        self.steps: tuple[Callable[[], None], ...] = (
            self.list, self.open, self.open, self.pread, self.pread, self.pread, self.attribute,
            self.restat, self.close, self.hint,
        )  # fmt: skip

    def step(self) -> None:
        """Do one thing."""
        step = self.chance.choice(self.steps)
        try:
            step()
            self.counts[step.__name__] += 1
        except OSError as error:
            if error.errno not in GONE:
                raise
            self.counts["gone"] += 1

    def session(self) -> Path:
        """A session of now, or of a moment ago."""
        names = [name for name in os.listdir(self.model) if name != "detached"]  # noqa: PTH208
        if not names:
            raise FileNotFoundError(errno.ENOENT, "no session")
        return self.model / self.chance.choice(names)

    def list(self) -> None:
        """As `ls -l`."""
        for row in os.scandir(self.session()):
            if row.name.endswith(".kv"):
                assert row.stat().st_size == MHA.block_bytes()

    def open(self) -> None:
        """Open a block; its payload is known by its hash."""
        if len(self.files) >= OPEN_MAX:
            self.close()
        session = self.session()
        path = session / self.chance.choice(sorted(os.listdir(session)))  # noqa: PTH208
        if path.suffix == ".json":
            assert session.name in path.read_text()
            return
        descriptor = os.open(path, os.O_RDONLY | self.chance.choice((0, os.O_DIRECT)))
        try:
            name = bytes.fromhex(os.getxattr(descriptor, "user.twfs.hash").decode())
        except OSError:
            os.close(descriptor)
            raise
        payload = payload_of(MHA, name).tobytes()
        self.files.append((descriptor, payload, os.fstat(descriptor).st_ino))

    def chosen(self) -> tuple[int, bytes, int]:
        """An open file."""
        if not self.files:
            raise FileNotFoundError(errno.ENOENT, "none is open")
        return self.chance.choice(self.files)

    def pread(self) -> None:
        """Read a part; behind the end there is nothing."""
        descriptor, payload, _ = self.chosen()
        at = self.chance.choice((0, 0, self.chance.randrange(len(payload) + 100)))
        size = self.chance.choice((1, 511, 512, 4096, len(payload), 1 << 20))
        with mmap.mmap(-1, size) as buffer:
            count = os.preadv(descriptor, [buffer], at)
            assert buffer[:count] == payload[at : at + size], "wrong bytes"
            self.counts["bytes"] += count

    def attribute(self) -> None:
        """Take all extended attributes."""
        descriptor, _, _ = self.chosen()
        names = os.listxattr(descriptor)
        assert all(os.getxattr(descriptor, name) for name in names)

    def restat(self) -> None:
        """An open file keeps its inode."""
        descriptor, payload, ino = self.chosen()
        seen = os.fstat(descriptor)
        assert (seen.st_ino, seen.st_size) == (ino, len(payload))

    def hint(self) -> None:
        """Tell the kernel to read ahead, or to forget."""
        descriptor, _, _ = self.chosen()
        advice = self.chance.choice((os.POSIX_FADV_DONTNEED, os.POSIX_FADV_SEQUENTIAL))
        os.posix_fadvise(descriptor, 0, 0, advice)

    def close(self) -> None:
        """Close one."""
        if self.files:
            os.close(self.files.pop(self.chance.randrange(len(self.files)))[0])


def main(mount: str, seconds: str, seed: str) -> None:
    """Read until the time is over."""
    reader = Reader(Path(mount) / "m", int(seed))
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        reader.step()
    sys.stdout.write(" ".join(f"{name}={count}" for name, count in sorted(reader.counts.items())))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Random operations on /files and on a plain directory: the same results, names and bytes.

The oracle is a tmpfs. What twfs says otherwise on purpose (docs/files.md) is not asked for.
"""

import errno
import os
import random
import stat
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest

from support.mounting import mounted

STEPS: Final = 1200
NAMES: Final = ("a", "b", "c")
MASK: Final = 0o7777
SAME: Final = {errno.ENOTEMPTY: errno.EEXIST}  # POSIX allows both for a directory that is not empty


class Actor:
    """Does each step below *root*; results are comparable."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open: dict[int, int] = {}

    def act(self, step: tuple[Any, ...]) -> Any:
        try:
            return getattr(self, step[0])(*step[1:])
        except OSError as error:
            return ("error", errno.errorcode[SAME.get(error.errno or 0, error.errno or 0)])

    def path(self, path: str) -> str:
        return str(self.root / path)

    def write(self, path: str, data: bytes, mode: str) -> None:
        with open(self.path(path), mode, buffering=0) as file:
            file.write(data)

    def patch(self, path: str, at: int, data: bytes) -> None:
        fd = os.open(self.path(path), os.O_RDWR)
        try:
            os.pwrite(fd, data, at)
        finally:
            os.close(fd)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.path(path), size)

    def mkdir(self, path: str, mode: int) -> None:
        Path(self.path(path)).mkdir(mode)

    def rmdir(self, path: str) -> None:
        Path(self.path(path)).rmdir()

    def unlink(self, path: str) -> None:
        Path(self.path(path)).unlink()

    def rename(self, old: str, new: str) -> None:
        Path(self.path(old)).rename(self.path(new))

    def chmod(self, path: str, mode: int) -> None:
        Path(self.path(path)).chmod(mode)

    def utime(self, path: str, when: int) -> None:
        os.utime(self.path(path), ns=(when, when))

    def xattr(self, path: str, name: str, value: bytes) -> list[str]:
        os.setxattr(self.path(path), name, value)
        return sorted(os.listxattr(self.path(path)))

    def keep(self, number: int, path: str) -> None:
        fd = os.open(self.path(path), os.O_RDONLY)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EISDIR, "a directory")
        if number in self.open:
            os.close(self.open[number])
        self.open[number] = fd

    def reread(self, number: int, size: int) -> Any:
        return os.pread(self.open[number], size, 0) if number in self.open else None

    def read(self, path: str) -> bytes:
        with open(self.path(path), "rb") as file:
            return file.read()

    def listed(self, path: str) -> list[str]:
        return sorted(found.name for found in Path(self.path(path)).iterdir())

    def tree(self) -> dict[str, Any]:
        """Everything below the root, a directory once it was listed: its times are right then."""
        found: dict[str, Any] = {}
        for above, _, names in os.walk(self.root):
            for path in (Path(above), *(Path(above, name) for name in names)):
                status = path.stat()
                found[str(path.relative_to(self.root))] = (
                    oct(status.st_mode),
                    "" if path == Path(above) else sha256(path.read_bytes()).hexdigest(),
                    status.st_mtime_ns if status.st_mtime_ns < 10**12 else 0,
                    {key: os.getxattr(path, key) for key in sorted(os.listxattr(path))},
                )  # fmt: skip
        del found["."]
        return found


def next_step(rng: random.Random) -> tuple[Any, ...]:
    """One step; most hit something, since names are few."""
    path, other = ("/".join(rng.choices(NAMES, k=rng.choice((1, 1, 2, 3)))) for _ in range(2))
    data = rng.randbytes(rng.choice((0, 1, 100, 5000, 70_000)))
    return rng.choice(
        (
            ("write", path, data, "wb"), ("write", path, data, "wb"), ("write", path, data, "xb"),
            ("write", path, data, "ab"), ("patch", path, rng.randrange(80_000), data[:3000]),
            ("truncate", path, rng.randrange(90_000)), ("mkdir", path, 0o700 + rng.randrange(64)),
            ("mkdir", path, 0o755), ("rmdir", path), ("unlink", path), ("rename", path, other),
            ("rename", path, other), ("chmod", path, 0o600 + rng.randrange(128)),
            ("utime", path, rng.randrange(1, 10**12)), ("read", path), ("listed", path),
            ("xattr", path, f"user.{rng.choice(NAMES)}", data[:200]),
            ("keep", rng.randrange(3), path), ("reread", rng.randrange(3), 100_000),
        )
    )  # fmt: skip


@pytest.mark.fuse
@pytest.mark.root
def test_files_are_as_on_a_local_filesystem(scratch: Path, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    rng = random.Random(seed)
    plain = Path(f"/dev/shm/twfs-oracle-{os.getpid()}")
    plain.mkdir()
    try:
        oracle = Actor(plain)
        with mounted(scratch, tmp_path / "mnt") as mount:
            ours = Actor(mount.path / "files")
            for number in range(STEPS):
                step = next_step(rng)
                wanted, found = oracle.act(step), ours.act(step)
                if step[0] == "reread" and wanted != found:
                    continue  # a local file is changed in place under its readers, ours is not
                assert found == wanted, (seed, number, step)
                if number % 200 == 199:
                    assert ours.tree() == oracle.tree(), (seed, number)
            for fd in ours.open.values():
                os.close(fd)
            before = oracle.tree()
        with mounted(scratch, tmp_path / "mnt") as mount:
            assert Actor(mount.path / "files").tree() == before
    finally:
        for fd in oracle.open.values():
            os.close(fd)
        import shutil

        shutil.rmtree(plain)

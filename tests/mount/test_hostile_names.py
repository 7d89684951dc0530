"""Guaranteed: no name, attribute or size that a program gives the mount does worse than an errno.

Names with every byte that a path may have, near the names that are there; attributes near ours; in
every kind of directory and through every call that takes them. No request meets a bug, nothing is
stored or lost, and one thing has one name.
"""

# ruff: noqa: PTH102, PTH104, PTH208, PTH211  (names of bytes that are no text: pathlib takes none)

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fuzz.mutating import TEXTS, mutated_text
from support.mounting import Mount, mounted, names_in, store
from support.warehouses import MHA

pytestmark = [pytest.mark.fuse]
NAMES = 150
EXPECTED = frozenset({
    0, errno.ENOENT, errno.EINVAL, errno.EPERM, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.EISDIR, errno.ENOTEMPTY, errno.ENODATA, errno.EOPNOTSUPP, errno.EXDEV, errno.ERANGE,
    errno.E2BIG, errno.ENOSPC, errno.EBUSY, errno.ESTALE, errno.EACCES, errno.ELOOP,
})  # fmt: skip


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    folder = tmp_path_factory.mktemp("names")
    (folder / "w").mkdir()
    with mounted(folder / "w", folder / "mount") as running:
        yield running


def hostile_names(good: list[str]) -> Iterator[bytes]:
    """Names near *good* ones, and worse; without NUL and slash, which no call lets through."""
    chance = random.Random(3)
    spoilt = [mutated_text(chance, chance.choice(good).encode()) for _ in range(NAMES)]
    texts = [text.encode(errors="replace") for text in TEXTS]
    for name in [*texts, *spoilt, b"\xff\xfe", b"x" * 255]:
        kept = name.replace(b"\0", b"").replace(b"/", b"")[:260]
        if kept not in {b"", b".", b".."}:
            yield kept


def attempts(folder: bytes, name: bytes) -> list[Callable[[], object]]:
    """Every call that takes a name."""
    path = folder + b"/" + name

    def write() -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            for offset in (0, 1 << 40, (1 << 63) - 4096):
                with suppress(OSError):
                    os.pwrite(descriptor, b"x" * 10, offset)
                with suppress(OSError):
                    os.ftruncate(descriptor, offset)
        finally:
            os.close(descriptor)

    return [
        lambda: os.stat(path), lambda: os.listdir(path), lambda: os.mkdir(path), write,
        lambda: os.open(path, os.O_WRONLY), lambda: os.getxattr(path, b"user.twfs.hash"),
        lambda: os.setxattr(folder, b"user." + name, name),
        lambda: os.setxattr(folder, b"user.twfs.class", name),
        lambda: os.getxattr(folder, b"user.twfs." + name),
        lambda: os.removexattr(folder, b"user." + name), lambda: os.rename(path, path + b"x"),
        lambda: os.link(path, path + b"y"), lambda: os.symlink(name, path + b"z"),
        lambda: os.mkfifo(path + b"p"), lambda: os.truncate(path, 5),
        lambda: os.utime(path), lambda: os.rename(folder + b"/chain.json", path),
    ]  # fmt: skip


def refusal_of(attempt: Callable[[], object]) -> int:
    """The errno that *attempt* ends with, 0 if it succeeds."""
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    return 0


def test_hostile_names_and_attributes_are_refused_and_harm_nothing(mount: Mount) -> None:
    _, names = store(mount, "m", MHA, 3)
    session = mount.session("m", names)
    pending = mount.path / "m" / ("ab" * 16)
    pending.mkdir()
    before = {path: names_in(path) for path in (mount.path, session)}
    good = ["m", "detached", "00000.kv", "chain.json", ".twfs", session.name, pending.name]
    for folder in (mount.path, mount.path / "m", session, mount.path / ".twfs", pending):
        there = {os.fsencode(name) for name in names_in(folder)}
        for name in hostile_names(good):
            if name in there:
                continue  # a good one
            for attempt in attempts(os.fsencode(folder), name):
                assert refusal_of(attempt) in EXPECTED, (folder, name)
    assert mount.statistics()["mount"]["failed_requests"] == 0
    for folder, wanted in before.items():
        assert names_in(folder) == wanted
    for path in (session / "00000.kv", session / "chain.json"):
        assert path.read_bytes()
    assert all("chain.json" in name or ".kv" in name for name in names_in(pending))


@pytest.mark.parametrize("suffix", ["\n", " ", "\u0660", "\x7f"])
def test_a_name_has_no_second_spelling(mount: Mount, suffix: str) -> None:
    _, names = store(mount, "m", MHA, 3)
    session = mount.session("m", names)
    for path in (session, session / "00000.kv", session / "chain.json"):
        assert path.exists()
        assert not path.with_name(path.name + suffix).exists()
        assert not path.with_name(path.name.upper() + suffix).exists()
    with pytest.raises(OSError, match=r"Invalid|No such"):
        Path(f"{mount.path}/m/{'cd' * 16}{suffix}").mkdir()

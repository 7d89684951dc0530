"""`rm -r` removes a session and nothing that another one uses; everything else is refused."""

import errno
import os
from pathlib import Path

import pytest

from support.mounting import Mount, expected, names_in, refusal, refused, shell, store, until
from support.warehouses import MHA, SHARDED

pytestmark = pytest.mark.fuse


def used_bytes(mount: Mount) -> int:
    found = os.statvfs(mount.path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def test_rm_r_removes_a_session_and_gives_its_space_back(mount: Mount) -> None:
    _, one = store(mount, "tiny", MHA, 3)
    before = used_bytes(mount)
    _, two = store(mount, "tiny", MHA, 5, seed=9, fork=2)
    shell("rm", "-r", mount.session("tiny", two))
    assert not mount.session("tiny", two).exists()
    assert used_bytes(mount) == before
    for index in range(3):
        path = mount.session("tiny", one) / f"{index:05d}.kv"
        assert path.read_bytes() == expected(MHA, one, index)
        assert path.stat().st_nlink == 1


def test_rm_r_of_shards_removes_them_all(mount: Mount) -> None:
    _, names = store(mount, "cut", SHARDED, 3)
    shell("rm", "-rf", mount.session("cut", names))
    assert used_bytes(mount) == 0


def test_unlink_takes_a_name_out_of_one_directory_only(mount: Mount) -> None:
    _, one = store(mount, "tiny", MHA, 2)
    _, two = store(mount, "tiny", MHA, 3, seed=9, fork=1)
    first, second = mount.session("tiny", one), mount.session("tiny", two)
    (first / "00000.kv").unlink()
    assert not (first / "00000.kv").exists()
    assert names_in(first) == ["00001.kv", "chain.json"]
    assert (second / "00000.kv").read_bytes() == expected(MHA, two, 0)


def test_rmdir_of_a_session_with_names_is_refused(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 2)
    session = mount.session("tiny", names)
    (session / "chain.json").unlink()
    with refused(errno.ENOTEMPTY):
        session.rmdir()
    assert (session / "00000.kv").exists()


def test_prefix_that_is_no_head_cannot_be_removed(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 3)
    inner = mount.session("tiny", names, 1)
    assert "not empty" in refusal("rm", "-r", inner)
    assert names_in(inner) == ["00000.kv", "00001.kv", "chain.json"]
    assert len(names_in(mount.session("tiny", names))) == 4


def test_open_file_of_a_removed_session_is_stale(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 1)
    session = mount.session("tiny", names)
    with (session / "00000.kv").open("rb") as file:
        shell("rm", "-r", session)
        with refused(errno.ESTALE):
            os.preadv(file.fileno(), [bytearray(10)], 0)


def test_removed_session_can_be_stored_again(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 2)
    shell("rm", "-r", mount.session("tiny", names))
    store(mount, "tiny", MHA, 2)
    until(lambda: mount.session("tiny", names).exists(), "the session is back")
    assert len(names_in(mount.session("tiny", names))) == 3


@pytest.mark.parametrize(
    "command",
    [
        "mv {s}/00000.kv {s}/00009.kv", "mv {s} {m}/tiny/other", "ln {s}/00000.kv {s}/1.kv",
        "ln -s x {s}/link", "echo x > {s}/00000.kv", "echo x > {s}/new.kv",
        "truncate -s0 {s}/00000.kv",
        "mkdir {m}/model", "mkdir {s}/inner", "rmdir {m}/tiny/detached", "rmdir {m}/tiny",
        "rm {m}/.twfs/metrics", "mkfifo {s}/pipe", "touch {m}/file",
    ],
)  # fmt: skip
def test_what_is_published_cannot_be_changed(mount: Mount, command: str) -> None:
    _, names = store(mount, "tiny", MHA, 1)
    session = mount.session("tiny", names)
    said = refusal("sh", "-c", command.format(s=session, m=mount.path))
    assert "not permitted" in said, said
    assert (session / "00000.kv").read_bytes() == expected(MHA, names, 0)


def test_mode_owner_and_times_are_accepted_and_change_nothing(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 1)
    path: Path = mount.session("tiny", names) / "00000.kv"
    before = path.stat()
    path.chmod(0o777)
    os.chown(path, 5, 5)
    os.utime(path, (1, 1))
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (
        before.st_mode, before.st_uid, before.st_mtime_ns,
    )  # fmt: skip

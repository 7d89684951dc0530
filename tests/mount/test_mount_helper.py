"""mount(8), fstab and `twfs unmount` work with the warehouse as with any other filesystem."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cli import (
    ENVIRONMENT,
    assert_refused,
    document,
    layout_file,
    made_warehouse,
    tree_of,
    twfs,
)
from twfs.errors import InvalidInput, MountRefused
from twfs_tools import mount_helper
from twfs_tools.process import await_end, unmount
from twfs_tools.target import daemon_pid, find_mount

HELPER = "twfs_tools.mount_helper"


@pytest.fixture
def warehouse(tmp_path: Path) -> Path:
    """A warehouse with one model."""
    made = made_warehouse(tmp_path / "tw")
    layout = layout_file(tmp_path / "layout.json")
    assert twfs("model", "create", made, "tiny", "--layout", layout).returncode == 0
    return made


@pytest.fixture
def mountpoint(tmp_path: Path, warehouse: Path) -> Iterator[Path]:
    """An empty directory; whatever gets mounted there is gone behind the test, its daemon too."""
    made = tmp_path / "mount point"  # with a space: mountinfo escapes it
    made.mkdir()
    yield made
    pid = daemon_pid(warehouse / "socket")
    if find_mount(made) is not None:
        unmount(made, lazy=True)
    if pid is not None:
        assert await_end(pid), f"daemon {pid} outlived its mount"


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("", ""),
        ("defaults", ""),
        ("rw,noauto,_netdev,x-systemd.automount,nofail,user,comment=x", ""),
        ("ro", "ro"),
        ("rw,ro,socket=/run/a b.sock", "ro,socket=/run/a b.sock"),
        ("allow_other,group=twfs,rw", "allow_other,group=twfs"),
        ("noatime,group,nosuid", ""),
    ],
)  # fmt: skip
def test_options_of_fstab_are_sorted_from_ours(given: str, taken: str) -> None:
    assert mount_helper.daemon_options(given) == taken


@pytest.mark.parametrize("given", ["nonesuch", "size=1G", "socket=", "ro,defualts"])
def test_an_unknown_option_is_refused_unless_sloppy(given: str) -> None:
    with pytest.raises(InvalidInput, match="not known"):
        mount_helper.daemon_options(given)
    assert "nonesuch" not in mount_helper.daemon_options(given, sloppy=True)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["only-one"],
        ["a", "b", "c"],
        ["a", "b", "-Z"],
        ["a", "b", "-o"],
        ["a", "b", "-o", "nonesuch"],
        ["a", "b", "-o", "ro,remount"],
        ["a", "b", "-N", "/proc/1/ns/mnt"],
    ],
)
def test_a_wrong_call_ends_with_1(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert mount_helper.main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mount.twfs: ")


def test_a_fake_mount_does_nothing(tmp_path: Path) -> None:
    assert mount_helper.main([str(tmp_path / "no"), str(tmp_path / "no"), "-f", "-n", "-s"]) == 0


@pytest.mark.fuse
def test_mount_comes_back_mounted_and_unmount_waits_for_the_end(
    warehouse: Path, mountpoint: Path
) -> None:
    done = twfs(warehouse, mountpoint, "-o", "rw,noauto", "-v", module=HELPER)
    assert done.returncode == 0, done.stderr
    assert os.listdir(mountpoint / "tiny") is not None  # noqa: PTH208 - the very call that ls makes
    pid = daemon_pid(warehouse / "socket")
    assert pid is not None
    assert document("status", mountpoint)["daemon_pid"] == pid
    ended = document("unmount", mountpoint)
    assert ended["pid"] == pid
    assert await_end(pid, timeout_s=0), "it was to be waited for"
    assert find_mount(mountpoint) is None
    assert document("check", warehouse)["ok"]


@pytest.mark.fuse
def test_a_read_only_mount_refuses_changes(warehouse: Path, mountpoint: Path) -> None:
    assert twfs(warehouse, mountpoint, "-o", "ro", module=HELPER).returncode == 0
    with pytest.raises(OSError, match="Read-only"):
        (mountpoint / "tiny" / ("ab" * 16)).mkdir()


@pytest.mark.fuse
def test_twfs_mount_in_the_background_says_who_serves(warehouse: Path, mountpoint: Path) -> None:
    made = document("mount", warehouse, mountpoint)
    assert made["pid"] == daemon_pid(warehouse / "socket")
    assert Path(made["log"]).exists()
    assert find_mount(mountpoint) is not None


@pytest.mark.fuse
def test_a_second_mount_of_one_warehouse_is_refused(
    warehouse: Path, mountpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    assert twfs(warehouse, mountpoint, module=HELPER).returncode == 0
    assert_refused(twfs(warehouse, other, module=HELPER), 32, name="mount.twfs")
    assert_refused(twfs("mount", warehouse, other), 6)
    assert find_mount(other) is None
    assert (mountpoint / "tiny").is_dir()


@pytest.mark.fuse
@pytest.mark.parametrize("place", ["missing", "file", "full", "mounted"])
def test_a_place_that_cannot_be_mounted_on_is_refused(
    place: str, warehouse: Path, mountpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    if place == "file":
        target.write_bytes(b"mine")
    elif place in {"full", "mounted"}:
        target.mkdir()
    if place == "full":
        (target / "mine").write_bytes(b"mine")
    if place == "mounted":
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(target)], check=True)
        (target / "mine").write_bytes(b"mine")
    try:
        before = tree_of(target)
        assert str(target) in assert_refused(twfs("mount", warehouse, target), 24)
        assert_refused(twfs(warehouse, target, module=HELPER), 32, name="mount.twfs")
        assert tree_of(target) == before
        assert daemon_pid(warehouse / "socket") is None
    finally:
        if place == "mounted":
            subprocess.run(["umount", str(target)], check=True)


@pytest.mark.fuse
def test_no_warehouse_there_is_refused(tmp_path: Path, mountpoint: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(twfs(empty, mountpoint, module=HELPER), 32, name="mount.twfs")
    assert_refused(twfs("mount", empty, mountpoint), 4)
    assert_refused(twfs("mount", tmp_path / "none", mountpoint), 4)


@pytest.mark.fuse
def test_a_busy_mount_point_stays_unless_lazy(warehouse: Path, mountpoint: Path) -> None:
    assert twfs(warehouse, mountpoint, module=HELPER).returncode == 0
    with subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True); input()"], cwd=mountpoint, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT,
    ) as inside:  # fmt: skip
        assert inside.stdout is not None
        assert inside.stdin is not None
        inside.stdout.readline()
        assert "busy" in assert_refused(twfs("unmount", mountpoint), MountRefused.exit_code)
        assert find_mount(mountpoint) is not None
        assert document("unmount", mountpoint, "--lazy")["lazy"]
        assert find_mount(mountpoint) is None
        inside.stdin.close()


@pytest.mark.fuse
def test_fstab_and_mount_8_find_the_helper(warehouse: Path, mountpoint: Path) -> None:
    helper = Path("/sbin/mount.twfs")
    if helper.exists() or helper.is_symlink():
        pytest.skip("this machine has a mount.twfs of its own")
    helper.write_text(
        f"#!/bin/sh\nPYTHONPATH='{ENVIRONMENT['PYTHONPATH']}' "
        f'exec {sys.executable} -m {HELPER} "$@"\n'
    )
    try:
        helper.chmod(0o755)
        command = ["mount", "-t", "twfs", str(warehouse), str(mountpoint), "-o", "noauto,ro"]
        subprocess.run(command, check=True)
        assert find_mount(mountpoint) is not None
    finally:
        helper.unlink()

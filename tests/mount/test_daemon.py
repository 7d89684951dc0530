"""The mount's life: it refuses what it cannot do in a sentence, heals, ends cleanly."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import ENVIRONMENT
from support.mounting import (
    Mount,
    expected,
    mounted,
    names_in,
    refusal,
    refused,
    shell,
    store,
    until,
)
from support.warehouses import MHA, make_warehouse
from twfs.errors import InvalidInput, MountRefused, NoSuchWarehouse, WarehouseBusy
from twfs_mount.mountpoint import prepare
from twfs_tools.process import daemon_command, start_daemon, unmount
from twfs_tools.target import daemon_pid, find_mount

pytestmark = pytest.mark.fuse

NOBODY = 65534


def twfsd(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "twfs_mount.main", *map(str, arguments)],
        capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=60,
    )  # fmt: skip


def test_killed_daemon_leaves_a_dead_mount_and_the_next_start_heals_it(scratch: Path) -> None:
    directory, path = scratch / "warehouse", scratch / "mnt"
    with mounted(directory, path) as mount:
        _, names = store(mount, "tiny", MHA, 2)
        mount.kill()
        with refused(errno.ENOTCONN):
            names_in(path)
        again = Mount(
            directory, path, start_daemon(daemon_command(directory, path), mount.log), mount.log
        )
        assert (again.session("tiny", names) / "00001.kv").read_bytes() == expected(MHA, names, 1)
        assert again.stop() == 0
        assert find_mount(path) is None


def test_a_dead_mount_is_healed_while_the_kernel_still_knows_its_attributes(
    scratch: Path, tmp_path: Path
) -> None:
    with mounted(scratch / "warehouse", tmp_path / "mnt") as mount:
        before = mount.path.stat()
        mount.kill()
        assert mount.path.stat() == before  # for a second
        assert prepare(str(mount.path)) == str(mount.path)
        assert find_mount(mount.path) is None


def test_unmount_ends_the_daemon(mount: Mount) -> None:
    unmount(mount.path)
    assert mount.process.wait(60) == 0


def test_second_daemon_is_refused(mount: Mount, scratch: Path) -> None:
    other = scratch / "other"
    other.mkdir()
    done = twfsd(mount.directory, other)
    assert done.returncode == WarehouseBusy.exit_code
    assert find_mount(other) is None
    done = twfsd(mount.directory, mount.path)
    assert done.returncode == MountRefused.exit_code
    assert "something is mounted" in done.stderr


@pytest.mark.parametrize(
    ("target", "words"),
    [("absent", "does not exist"), ("file", "not a directory"), ("full", "holds 1 names")],
)
def test_unfit_mount_point_is_refused(scratch: Path, target: str, words: str) -> None:
    make_warehouse(scratch / "warehouse")
    (scratch / "file").touch()
    (scratch / "full" / "x").mkdir(parents=True)
    done = twfsd(scratch / "warehouse", scratch / target)
    assert done.returncode == MountRefused.exit_code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["{absent}", "{mnt}"], NoSuchWarehouse.exit_code),
        (["{warehouse}", "{mnt}", "-o", "nonsense"], InvalidInput.exit_code),
        (["{warehouse}", "{mnt}", "-o", "uid=x"], InvalidInput.exit_code),
        (["{warehouse}", "{mnt}", "-o", "group=no-such-group"], InvalidInput.exit_code),
        (["{warehouse}", "{mnt}", "--no-mount"], InvalidInput.exit_code),
        (["{warehouse}", "{mnt}", "--arena-bytes", "0"], InvalidInput.exit_code),
    ],
)
def test_unfit_arguments_are_refused_in_a_sentence(
    scratch: Path, arguments: list[str], code: int
) -> None:
    make_warehouse(scratch / "warehouse")
    (scratch / "mnt").mkdir()
    places = {name: scratch / name for name in ("absent", "warehouse", "mnt")}
    done = twfsd(*(argument.format(**places) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert find_mount(scratch / "mnt") is None


def test_read_only_mount_changes_nothing(scratch: Path) -> None:
    with mounted(scratch / "warehouse", scratch / "mnt", "ro") as mount:
        _, names = store(mount, "tiny", MHA, 1)
        session = mount.session("tiny", names)
        for command in (
            f"rm {session}/00000.kv", f"mkdir {mount.path}/tiny/{'12' * 16}",
            f"chmod 777 {session}", f"echo x > {session}/00000.kv",
            f"setfattr -n user.twfs.class -v pinned {session}",
        ):  # fmt: skip
            assert "Read-only" in refusal("sh", "-c", command)
        assert (session / "00000.kv").read_bytes() == expected(MHA, names, 0)


def test_owner_and_modes_can_be_chosen(scratch: Path) -> None:
    options = f"uid={NOBODY},gid=5,file_mode=0444,dir_mode=0755,allow_other"
    with mounted(scratch / "warehouse", scratch / "mnt", options) as mount:
        _, names = store(mount, "tiny", MHA, 1)
        found = (mount.session("tiny", names) / "00000.kv").stat()
        assert (found.st_uid, found.st_gid, oct(found.st_mode)) == (NOBODY, 5, "0o100444")
        scratch.chmod(0o755)
        read = ["cat", str(mount.session("tiny", names) / "00000.kv")]
        done = subprocess.run(read, capture_output=True, check=True, user=NOBODY, group=NOBODY)
        assert done.stdout == expected(MHA, names, 0)


def test_mount_has_safe_options(mount: Mount) -> None:
    options = shell("findmnt", "-no", "OPTIONS", mount.path)
    assert all(word in options for word in ("nosuid", "nodev", "noexec", "default_permissions"))
    assert shell("findmnt", "-no", "FSTYPE,SOURCE", mount.path).split() == [
        "fuse.twfs", str(mount.directory),
    ]  # fmt: skip


def test_kernel_reads_ahead_in_whole_requests(mount: Mount) -> None:
    device = mount.path.stat().st_dev
    bdi = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert bdi.read_text() == "1024\n"


def test_hangup_is_no_reason_to_end(mount: Mount) -> None:
    mount.process.send_signal(signal.SIGHUP)
    store(mount, "tiny", MHA, 1)
    assert mount.process.poll() is None


def test_imported_session_is_there_after_a_restart(scratch: Path) -> None:
    directory, path = scratch / "warehouse", scratch / "mnt"
    with mounted(directory, path) as mount:
        _, names = store(mount, "tiny", MHA, 200)
        session = mount.session("tiny", names)
        shell("cp", "-r", session, scratch)
        shell("rm", "-r", session)
        shell("cp", "-r", scratch / session.name, path / "tiny")
        assert mount.stop() == 0
    with mounted(directory, path) as mount:
        assert len(names_in(mount.session("tiny", names))) == 201


def test_import_that_a_crash_cut_short_leaves_nothing(scratch: Path) -> None:
    directory, path = scratch / "warehouse", scratch / "mnt"
    with mounted(directory, path) as mount:
        _, names = store(mount, "tiny", MHA, 2)
        pending = path / "tiny" / ("12" * 16)
        pending.mkdir()
        (pending / "00000.kv").write_bytes(bytes(2048))
        before = sorted(found.name for found in directory.iterdir())
        mount.kill()
    assert not any(name.startswith("import-") for name in before)
    with mounted(directory, path) as mount:
        assert names_in(path / "tiny") == sorted(["detached", mount.session("tiny", names).name])


def user_for_the_daemon() -> str | None:
    """A user without any right, if the interpreter is one that such a user may run."""
    probe = [sys.executable, "-c", ""]
    try:
        done = subprocess.run(probe, check=False, capture_output=True, user=NOBODY, group=NOBODY)
    except OSError:
        return None  # the interpreter lies in somebody's home
    return "nobody" if done.returncode == 0 else None


def test_daemon_without_privileges_is_mounted_by_mount_fuse3(scratch: Path) -> None:
    directory, path = scratch / "warehouse", scratch / "mnt"
    make_warehouse(directory)
    path.mkdir()
    scratch.chmod(0o755)
    user = user_for_the_daemon()
    log, program = scratch / "log", scratch / "twfsd"
    log.touch(0o666)
    if user is not None:
        for made in (directory, log, *directory.rglob("*")):
            os.chown(made, NOBODY, NOBODY)
    program.write_text(
        f"#!/bin/sh\nPYTHONPATH={ENVIRONMENT['PYTHONPATH']} "
        f'exec {sys.executable} -m twfs_mount.main "$@" 2>>{log}\n'
    )
    program.chmod(0o755)
    options = "drop_privileges,allow_other,default_permissions,nosuid,nodev,noexec"
    done = subprocess.run(
        ["mount.fuse3", f"{program}#{directory}", path, "-o",
         options if user is None else f"setuid={user},{options}"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    try:
        assert done.returncode == 0, done.stderr + log.read_text()
        status = pid_status(directory)
        assert user is None or f"Uid:\t{NOBODY}" in status
        assert "CapEff:\t0000000000000000" in status
        assert ".twfs" in names_in(path)
        assert shutil.disk_usage(path).total > 0
    finally:
        shell("umount", path)
    until(lambda: not (directory / "socket").exists(), "the daemon ends with its mount")


def pid_status(directory: Path) -> str:
    """What the kernel says of the process that has the warehouse's socket."""
    pid = daemon_pid(directory / "socket")
    assert pid is not None
    return Path(f"/proc/{pid}/status").read_text()

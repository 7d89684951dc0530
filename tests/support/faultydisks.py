"""Faulty disks for tests: real block devices whose faults a test commands, always taken down.

Needs root, /dev/fuse and loop devices. `faulty_disks` starts support.faultdisk and puts a loop
device on each of its files. Whatever happens to the test, rules are lifted first (so that nothing
hangs), then mounts, loop devices and the process come down.
"""

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec
import pytest

from support.faultrules import Reply, Request, Rule
from support.loops import loop_device, loops_reason

TESTS: Final = Path(__file__).parents[1]
ANSWER_S: Final = 60.0  # of the control socket, on a busy machine
STOP_S: Final = 30.0
LIBC: Final = ctypes.CDLL(None, use_errno=True)
MS_NOATIME: Final = 1024
MNT_DETACH: Final = 2
EXT4_OPTIONS: Final = ("-q", "-F", "-b", "4096", "-m", "0", "-J", "size=4", "-E", "nodiscard")


def faults_reason() -> str | None:
    """Say why faulty disks cannot be used here; None if they can."""
    if not Path("/dev/fuse").exists():
        return "/dev/fuse is missing"
    return loops_reason()


needs_faults = pytest.mark.skipif(faults_reason() is not None, reason=str(faults_reason()))


class Control:
    """One connection to the control socket of a faulty disk's process. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_S)
        self._socket.connect(str(path))
        self._replies = self._socket.makefile("rb")

    def ask(self, request: Request) -> Reply:
        """Send *request* and wait until it is done; EOFError if the process has died."""
        self._socket.sendall(msgspec.json.encode(request) + b"\n")
        line = self._replies.readline()
        if not line:
            raise EOFError("the faulty disk's process has ended")
        return msgspec.json.decode(line, type=Reply)

    def mark(self, text: str) -> None:
        """Put *text* into the log, behind all that was answered before."""
        self.ask(Request(mark=text))

    def close(self) -> None:
        """End the connection."""
        self._replies.close()
        self._socket.close()


class FaultyDisks:
    """The disks of one process; made by faulty_disks."""

    def __init__(self, directory: Path, images: Mapping[str, Path], *, logging: bool) -> None:
        self.images = dict(images)
        self.log = directory / "log"
        self.socket = directory / "control"
        self.loops: dict[str, Path] = {}
        self._mountpoint = directory / "disks"
        self._mountpoint.mkdir()
        named = [f"{name}={image}" for name, image in self.images.items()]
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "support.faultdisk", str(self._mountpoint),
                str(self.socket), str(self.log) if logging else "-", *named,
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n", "the faulty disk did not start"
            self.control = Control(self.socket)
        except BaseException:
            self.stop()
            raise

    def file(self, name: str) -> Path:
        """The FUSE file of a disk."""
        return self._mountpoint / name

    def set_rules(self, *rules: Rule) -> None:
        """From now on these rules hold and no others; what hung goes on."""
        self.control.ask(Request(rules=list(rules)))

    def acted(self) -> list[int]:
        """How often each of the present rules has acted."""
        return self.control.ask(Request()).acted

    def hanging(self) -> int:
        """How many requests hang now."""
        return self.control.ask(Request()).hanging

    def take_snapshot(self, name: str) -> None:
        """Keep a copy of a disk as it is now, for Act.STALE and for put_back."""
        self.control.ask(Request(snapshot=name))

    def put_back(self, name: str) -> None:
        """Make a disk what it was when the snapshot was taken; nobody may have it open."""
        image = self.images[name]
        image.write_bytes(image.with_suffix(".snapshot").read_bytes())

    def lift(self) -> None:
        """Lift all rules, if the process still lives."""
        if self._process.poll() is None:
            self.set_rules()

    def kill(self) -> None:
        """Let the disks die with their process."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End the process and its mount; what still waits for it gets errors."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        if os.path.ismount(self._mountpoint):
            subprocess.run(["umount", "--lazy", str(self._mountpoint)], check=True)
        if hasattr(self, "control"):
            self.control.close()


@contextmanager
def faulty_disks(
    directory: Path, sizes: Mapping[str, int], *, logging: bool = False
) -> Iterator[FaultyDisks]:
    """Disks of these sizes in bytes, zeroed, each under a loop device (`loops`), in *directory*."""
    directory.mkdir()
    images = {}
    for name, size in sizes.items():
        images[name] = directory / f"{name}.img"
        with images[name].open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    with ExitStack() as stack:
        disks = FaultyDisks(directory, images, logging=logging)
        stack.callback(disks.stop)
        for name in images:
            disks.loops[name] = stack.enter_context(loop_device(disks.file(name)))
        stack.callback(disks.lift)
        yield disks


def mount_ext4(device: Path, directory: Path) -> None:
    """Mount *device* as the kernel finds it, its journal recovered; OSError if it will not.

    The system call itself: a command costs twice the time of the rest.
    """
    _call("mount", str(device), str(directory), "ext4", MS_NOATIME, "nodiscard")


def unmount(directory: Path) -> None:
    """Unmount *directory*; OSError if it is in use, but then it is at least detached."""
    try:
        _call("umount2", str(directory), 0)
    except OSError:
        _call("umount2", str(directory), MNT_DETACH)
        raise


def _call(name: str, *arguments: str | int) -> None:
    """Call *name* of the C library; OSError."""
    raw = [each.encode() if isinstance(each, str) else ctypes.c_ulong(each) for each in arguments]
    if getattr(LIBC, name)(*raw):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(arguments[0]))


@contextmanager
def ext4_on(device: Path, directory: Path) -> Iterator[Path]:
    """Make an ext4 with a small journal on *device*, and mount it on *directory*."""
    subprocess.run(["mkfs.ext4", *EXT4_OPTIONS, str(device)], check=True)
    directory.mkdir(exist_ok=True)
    mount_ext4(device, directory)
    try:
        yield directory
    finally:
        unmount(directory)

"""The place that is mounted on: is it fit, is a dead mount in the way, what does the kernel say.

Called at start and stop, never from a request. Calls block.
"""

import errno
import logging
import os
import re
import stat
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final

from twfs.errors import MountRefused, NotAllowed

log = logging.getLogger(__name__)

FUSE_DEVICE: Final = "/dev/fuse"
DESCRIPTOR_PREFIX: Final = "/dev/fd/"
MOUNTINFO: Final = "/proc/self/mountinfo"
READ_AHEAD_KB: Final = 1024  # one request of 1 MiB; the kernel's 128 KiB would make eight of it
UNMOUNT_SECONDS: Final = 10.0


def is_descriptor(mountpoint: str) -> bool:
    """Tell whether mount.fuse3 mounted already and hands over the open device."""
    return mountpoint.startswith(DESCRIPTOR_PREFIX)


def mounts() -> dict[str, str]:
    """Return `major:minor` of what is mounted, by mount point; the topmost of each."""
    found = {}
    for line in Path(MOUNTINFO).read_bytes().splitlines():
        fields = line.split(b" ")
        path = re.sub(rb"\\([0-7]{3})", lambda digits: bytes([int(digits[1], 8)]), fields[4])
        found[os.fsdecode(path)] = fields[2].decode()
    return found


def prepare(mountpoint: str) -> str:
    """Make *mountpoint* ready to be mounted on: detach what a killed daemon left there.

    Returns its path without symbolic links, to be used from here on: once it is mounted, resolving
    it would wait for the daemon itself.

    MountRefused or NotAllowed says in one sentence why it cannot be mounted on.
    """
    if is_descriptor(mountpoint):
        return mountpoint
    if not Path(FUSE_DEVICE).exists():
        raise MountRefused(f"{FUSE_DEVICE} is missing: load the fuse module, or use --no-mount")
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise NotAllowed(f"{FUSE_DEVICE} cannot be opened: run as root, or through mount.fuse3")
    try:
        found = os.stat(mountpoint)
        os.statvfs(mountpoint)  # stat of a dead mount the kernel may answer, for a second
    except FileNotFoundError as error:
        raise MountRefused(f"{mountpoint} does not exist: create the directory first") from error
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise MountRefused(f"{mountpoint} cannot be used: {error.strerror}") from error
        log.warning("%s is a dead mount: its daemon was killed; unmounting it", mountpoint)
        detach(mountpoint)
        found = os.stat(mountpoint)
    if not stat.S_ISDIR(found.st_mode):
        raise MountRefused(f"{mountpoint} is not a directory")
    mountpoint = os.path.realpath(mountpoint)
    if mountpoint in mounts():
        raise MountRefused(f"something is mounted on {mountpoint}: unmount it first")
    held = sum(1 for _ in Path(mountpoint).iterdir())
    if held:
        raise MountRefused(f"{mountpoint} holds {held} names: mount on an empty directory")
    return mountpoint


def detach(mountpoint: str) -> None:
    """Unmount lazily; MountRefused if that fails."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    try:
        done = subprocess.run(
            [*command, mountpoint],
            capture_output=True, text=True, check=False, timeout=UNMOUNT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountRefused(f"the dead mount on {mountpoint} stays: {error}") from error
    if done.returncode:
        raise MountRefused(f"the dead mount on {mountpoint} stays: {done.stderr.strip()}")


def set_read_ahead(mountpoint: str) -> None:
    """Let the kernel read ahead in requests of 1 MiB, if we may; slower otherwise, not wrong."""
    # Only the parent is resolved: a stat of the mount would wait for this very thread to answer it.
    parent, name = os.path.split(mountpoint)
    device = mounts().get(os.path.join(os.path.realpath(parent), name))
    if device is not None:
        with suppress(OSError):
            Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(f"{READ_AHEAD_KB}\n")

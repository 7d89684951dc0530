"""Loop devices for tests: a real block device over a file, always detached again.

Needs root. Direct I/O is on, so that writes reach the file without a second page cache.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def loops_reason() -> str | None:
    """Say why loop devices cannot be used here; None if they can."""
    if os.geteuid() != 0:
        return "loop devices need root"
    if shutil.which("losetup") is None or not Path("/dev/loop-control").exists():
        return "losetup or /dev/loop-control is missing"
    return None


# For tests that take a loop device: says in the report why they did not run.
needs_loops = pytest.mark.skipif(loops_reason() is not None, reason=str(loops_reason()))


@contextmanager
def loop_device(backing: Path, byte_count: int | None = None) -> Iterator[Path]:
    """Attach *backing* (made with *byte_count* bytes if given) as a loop device; yields that."""
    if byte_count is not None:
        with backing.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, byte_count)
    attached = subprocess.run(
        ["losetup", "--find", "--show", "--direct-io=on", str(backing)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    device = Path(attached.stdout.strip())
    # One that somebody made read-only stays so over detaching.
    subprocess.run(["blockdev", "--setrw", str(device)], check=True)
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)

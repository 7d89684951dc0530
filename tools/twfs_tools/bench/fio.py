"""fio as the rival: the same bytes, the same offsets, the same bytes in flight, huge pages.

One thread; one fio process at a time.
"""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from twfs.errors import DeviceError, InvalidInput

IN_FLIGHT_BYTES: Final = 64 << 20  # four threads with 16 MiB each, as the host reader has
DEPTH_MAX: Final = 256
# glibc's malloc asks for huge pages itself: measured to more than double fio on virtio.
HUGE_PAGES: Final = "glibc.malloc.hugetlb=1"


@dataclass(frozen=True, slots=True)
class Run:
    """A sequential run over *path*: *count* requests of *request_bytes* from *offset* on."""

    path: Path
    offset: int
    request_bytes: int
    count: int
    write: bool = False

    @property
    def depth(self) -> int:
        """Requests in flight, so that as many bytes are in flight as the host reader has."""
        return min(max(2, IN_FLIGHT_BYTES // self.request_bytes), DEPTH_MAX, self.count)


@cache
def engine() -> str:
    """Return io_uring, or libaio where the kernel forbids that; InvalidInput without fio."""
    if shutil.which("fio") is None:
        raise InvalidInput("fio is not installed, and the comparison needs it: apt install fio")
    try:
        disabled = Path("/proc/sys/kernel/io_uring_disabled").read_text().strip()
    except OSError:
        disabled = "0"
    return "io_uring" if disabled == "0" or (disabled == "1" and os.geteuid() == 0) else "libaio"


def seconds(run: Run) -> float:
    """Run fio once and return the seconds that its I/O took, its end-of-session fsync included.

    DeviceError with fio's words if it failed.
    """
    command = [
        "fio", "--name=bench", f"--filename={run.path}", "--direct=1",
        f"--ioengine={engine()}", f"--iodepth={run.depth}", f"--bs={run.request_bytes}",
        f"--offset={run.offset}", f"--size={run.request_bytes * run.count}",
        f"--rw={'write' if run.write else 'read'}", "--output-format=json",
        *(["--end_fsync=1", "--overwrite=0"] if run.write else ["--readonly"]),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GLIBC_TUNABLES": HUGE_PAGES},
    )
    try:
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    except (ValueError, LookupError) as error:
        said = " ".join((done.stderr or done.stdout).split())[:500]
        raise DeviceError(f"fio ended with {done.returncode}: {said}") from error
    side = job["write" if run.write else "read"]
    if job["error"] or side["io_bytes"] != run.request_bytes * run.count:
        raise DeviceError(
            f"fio moved {side['io_bytes']} of {run.request_bytes * run.count} bytes, "
            f"error {job['error']}"
        )
    return max(float(side["runtime"]), 1.0) / 1000

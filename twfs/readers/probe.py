"""Finds out whether cuFile can work here, and reach GPU memory directly, without being hung by it.

Not a reader. Nothing here loads kvikio or starts cuFile in this process. Thread-safe.
"""

import ctypes
import importlib.util
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from twfs.readers.base import DeviceSource
from twfs.units import DeviceIndex

PROBE_TIMEOUT_S: Final = 30.0  # importing torch and starting CUDA takes up to ten
_MODULES: Final = Path("/proc/modules")
_PROBE: Final = """
import sys, torch, kvikio
memory = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
class View:
    __cuda_array_interface__ = dict(
        shape=(1 << 16,), typestr="|u1", data=(memory.data_ptr(), False), version=3, strides=None)
with kvikio.CuFile(sys.argv[1], "r") as file:
    assert file.pread(View(), 1 << 16, 0, 1 << 16).get() == 1 << 16
"""


def direct_obstacle(sources: Mapping[DeviceIndex, DeviceSource]) -> str | None:
    """Say why cuFile cannot reach GPU memory directly here, None if it may be tried."""
    missing = missing_library()
    if missing is not None:
        return missing
    if not _MODULES.exists():
        return f"there is no {_MODULES}, without which cuFile never returns from its start"
    for source in sources.values():
        unlike = unlike_path(source)
        if unlike is not None:
            return unlike
        status = os.stat(source.path)
        number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
        device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
        if "/nvme" not in str(device):
            return f"{source.path} is not on an NVMe drive"
    return None


def missing_library() -> str | None:
    """Say which library is missing, None if none is."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "libcuda.so.1 cannot be loaded: install the NVIDIA driver"
    if importlib.util.find_spec("kvikio") is None:
        return "kvikio is not installed: pip install kvikio-cu13"
    return None


def unlike_path(source: DeviceSource) -> str | None:
    """Say why kvikio cannot open *source* by its path and get that device, None if it can."""
    try:
        named = os.stat(source.path)
    except OSError as error:
        return f"{source.path} cannot be seen from here: {error.strerror}"
    given = os.fstat(source.fd)
    same_device = stat.S_ISBLK(given.st_mode) and named.st_rdev == given.st_rdev
    if not same_device and (named.st_dev, named.st_ino) != (given.st_dev, given.st_ino):
        return f"{source.path} is another device here than the daemon's"
    if not os.access(source.path, os.R_OK):
        return f"{source.path} may not be read by this user: add it to the group twfs"
    return None


def probe_direct(source: DeviceSource) -> str | None:
    """Read from *source* straight into GPU memory in a process of its own.

    Returns None if that worked with every fallback forbidden, else why it did not. cuFile can
    hang at its start, so the process is killed after PROBE_TIMEOUT_S.
    """
    environment = os.environ | {
        "KVIKIO_COMPAT_MODE": "OFF",
        "CUFILE_ALLOW_COMPAT_MODE": "false",
    }
    with tempfile.TemporaryDirectory(prefix="twfs-probe-") as folder:  # cuFile leaves a log there
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROBE, str(source.path.absolute())],
                env=environment, cwd=folder, timeout=PROBE_TIMEOUT_S, capture_output=True,
                text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"cuFile did not start within {PROBE_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"cuFile cannot read {source.path} directly: {last}"

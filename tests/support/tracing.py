"""strace kills a process at its n-th system call: where it is, and whether it may be used."""

import shutil
import subprocess
from typing import Final

import pytest

STRACE: Final = shutil.which("strace")


def may_trace() -> bool:
    """Tell whether strace is there and may trace here."""
    if STRACE is None:
        return False
    command = [STRACE, "-f", "-qq", "-o", "/dev/null", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_strace = pytest.mark.skipif(not may_trace(), reason="needs strace, and the right to trace")

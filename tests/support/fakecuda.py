"""Builds the stand-in for libcuda.so.1 and runs Python code under it, in a process of its own.

With it the real kvikio reads into host memory, and into "GPU memory", on any machine.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fakecuda.c")
ROOT = SOURCE.parents[2]


def build(folder: Path) -> Path:
    """Compile the library into *folder* and return that; skips the test without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for libcuda.so.1 with")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-w", "-pthread",
         "-o", str(folder / "libcuda.so.1"), str(SOURCE)],
        check=True,
    )  # fmt: skip
    return folder


def run_under(folder: Path, code: str, *arguments: str, timeout_s: float = 100) -> str:
    """Run *code* with the library in *folder*; return what it prints, fail with what it says."""
    paths = [str(ROOT), str(ROOT / "tests")]
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONFAULTHANDLER": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, timeout=timeout_s,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout

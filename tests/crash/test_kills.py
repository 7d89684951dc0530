"""Daemon, client and create killed at their n-th system call: nothing is lost, held or half made.

The others have tests of their own beside this one; kills.py does it to all, and for long.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.tracing import needs_strace

PROGRAM = Path(__file__).with_name("kills.py")
MOMENTS = ("--every-syscall", "60", "--step", "19")  # 1, 20, 39 and 58
PATIENT_S = 280.0


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["daemon", "client", "creator"])
def test_a_process_killed_at_the_nth_call_leaves_nothing_lost_held_or_half(
    scratch: Path, victim: str
) -> None:
    done = subprocess.run(
        [
            sys.executable, str(PROGRAM), "--kills", "0", *MOMENTS, "--victim", victim,
            "--directory", str(scratch),
        ],
        stdout=subprocess.PIPE, text=True, check=False, timeout=PATIENT_S,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["kills"] == {f"{victim} at a system call": 4}
    assert report["chains"] > 0 or victim == "creator"  # some had been reported when they died
    assert done.returncode == 0

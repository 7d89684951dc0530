"""Many engines share a warehouse while clients and the daemon are killed: no wrong byte, no hang.

The same program runs for hours before a release; stress.py says how. That it sees wrong bytes is
shown by a run in which some are stored.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("stress.py")
PATIENT_S = 280.0


def stress(directory: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the program; its exit code and its report."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--clients", "4", "--directory", str(directory), *arguments],
        stdout=subprocess.PIPE, text=True, check=False, timeout=PATIENT_S,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_kills_under_load_never_make_a_wrong_byte_or_a_stuck_process(scratch: Path) -> None:
    code, report = stress(
        scratch, "--seconds", "12", "--kill-client-every", "1", "--kill-daemon-every", "4",
        "--device-mib", "20",
    )  # fmt: skip
    assert report["problems"] == []
    assert report["ok"]
    assert code == 0
    assert report["client_kills"] >= 5
    assert report["daemon_kills"] >= 1
    assert report["counts"]["hits verified"] > 0
    assert report["counts"]["put.published"] > 0
    assert report["daemon"]["evicted_blocks"] > 0
    assert report["misses"]["no daemon"] > 0


def test_a_wrong_block_in_the_store_fails_the_run(scratch: Path) -> None:
    code, report = stress(
        scratch, "--seconds", "4", "--wrong-every", "2",
        "--kill-client-every", "0", "--kill-daemon-every", "0",
    )  # fmt: skip
    assert "wrong bytes" in report["problem_kinds"]
    assert set(report["problem_kinds"]) == {"wrong bytes"}
    assert not report["ok"]
    assert code == 1

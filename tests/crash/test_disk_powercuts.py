"""After a power cut of real block devices all that was published is there, and nothing else.

Devices and the ext4 of the metadata lie on disks that log their writes; the log is replayed into
crash images. disk_powercuts.py says how, and is the long run. Writers that are broken on purpose
are caught: named seeds below show that these tests can fail.
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.faultydisks import needs_faults
from twfs.warehouse import Warehouse

pytestmark = [pytest.mark.root, pytest.mark.fuse, needs_faults]

PROGRAM = Path(__file__).with_name("disk_powercuts.py")
PATIENT_S = 280.0


def powercuts(directory: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the program; its exit code and its report."""
    done = subprocess.run(
        [
            sys.executable, str(PROGRAM), "--directory", str(directory), "--processes", "1",
            *arguments,
        ],
        stdout=subprocess.PIPE, text=True, check=False, timeout=PATIENT_S,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_a_power_cut_loses_nothing_published_and_shows_nothing_unpublished(scratch: Path) -> None:
    code, report = powercuts(scratch, "--images", "150", "--seed", "20")
    assert report["complaints"] == []
    assert code == 0
    assert report["images"] == 150  # of 60, one in fifty times none had a torn write
    assert report["unflushed_writes"] > report["lost_writes"] > 0  # there was something to lose
    assert report["torn_writes"] > 0
    assert list(scratch.iterdir()) == []


@pytest.mark.skipif(
    "durability" not in inspect.signature(Warehouse.open).parameters,
    reason="this warehouse has one durability, strict",
)
def test_relaxed_a_power_cut_loses_at_most_what_was_done_last(scratch: Path) -> None:
    code, report = powercuts(
        scratch, "--images", "24", "--seed", "21", "--turns", "20", "--durability", "relaxed"
    )
    assert report["complaints"] == []
    assert code == 0


@pytest.mark.parametrize(
    ("broken", "seed"), [("no-flush", "1"), ("late-flush", "2"), ("no-sync", "1")]
)
def test_a_broken_writer_is_caught(scratch: Path, broken: str, seed: str) -> None:
    images = {"no-flush": "6", "late-flush": "40", "no-sync": "6"}[broken]  # how hard it is
    code, report = powercuts(
        scratch, "--images", images, "--turns", "20", "--seed", seed, "--broken", broken
    )
    assert report["bad_seeds"] == [int(seed)]
    assert report["bad_images"] > 0
    assert code == 0

"""After a cut at any place nothing published is lost, nothing else is seen, no byte is wrong.

In strict; in relaxed the last commit may be gone, and nothing else. powercuts.py says what is tried
and how; it runs for hours before a release. Writers that are broken on purpose are caught, each
with the seed given here.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.brokenwriters import BROKEN, BROKEN_FILES, RELAXED_ONLY
from support.cutting import run
from twfs.store import Durability

PROGRAM = Path(__file__).with_name("powercuts.py")
IMAGES = 120
IMAGES_MAX = 2400  # of a broken writer; it is over with the round that has the first bad one
SEEDS = dict.fromkeys(BROKEN, 1)


def test_strict_loses_nothing_that_was_published() -> None:
    report = run(IMAGES, 1, "strict")
    assert (report.images, report.bad, report.first) == (IMAGES, 0, [])
    assert report.last_commit_lost == 0
    assert report.published > 50


def test_relaxed_loses_the_last_commit_at_most() -> None:
    report = run(IMAGES, 2, "relaxed")
    assert (report.images, report.bad, report.first) == (IMAGES, 0, [])
    assert report.last_commit_lost > 0  # or the cuts were none
    assert report.published > 50


@pytest.mark.parametrize("durability", Durability)
def test_changes_of_files_happen_whole_or_not_at_all(durability: Durability) -> None:
    report = run(IMAGES, 1, durability, files=True)
    assert (report.images, report.bad, report.first) == (IMAGES, 0, [])
    assert report.steps > 50


@pytest.mark.parametrize("name", sorted(BROKEN_FILES))
def test_a_broken_writer_of_files_is_caught(name: str) -> None:
    report = run(IMAGES_MAX, 1, "strict", name, files=True)
    assert report.bad > 0
    assert report.first


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_writer_is_caught(name: str) -> None:
    durability = Durability.RELAXED if name in RELAXED_ONLY else Durability.STRICT
    report = run(IMAGES_MAX, SEEDS[name], durability, name)
    assert report.bad > 0
    assert report.first


def test_the_program_prints_one_document_and_fails_with_a_bad_image() -> None:
    arguments = ["--images", "30", "--broken", "no_flush"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["images"] == 30
    assert report["bad"] > 0

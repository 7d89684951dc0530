"""Every benchmark runs, compares what it says it compares, and leaves nothing behind."""

from contextlib import suppress
from pathlib import Path

import pytest

from support.cli import document, twfs

pytestmark = pytest.mark.slow


@pytest.fixture
def directory(scratch: Path) -> Path:
    """Scratch that must be empty again behind every benchmark; short, for a socket lies in it."""
    made = scratch / "bench"
    made.mkdir()
    return made


def assert_nothing_left(directory: Path) -> None:
    """Assert that scratch, mounts and daemons of a benchmark in *directory* are gone."""
    assert list(directory.iterdir()) == []
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            assert str(directory) not in (process / "cmdline").read_text()


def test_reading_is_compared_with_fio_and_the_mount(directory: Path) -> None:
    report = document("bench", "read", "--quick", "--directory", directory)
    assert report["environment"]["kernel"]
    for result in report["results"]:
        assert result["host_GB_s"] > 0
        seconds = result["rounds"]
        assert result["ratio_to_fio"] == pytest.approx(seconds["fio"][0] / seconds["host"][0])
    assert_nothing_left(directory)


def test_writing_is_compared_with_fio_and_counted_by_clients(directory: Path) -> None:
    report = document("bench", "write", "--quick", "--directory", directory)
    whole = [each for each in report["results"] if "put_GB_s" in each]
    assert all(each["ratio_to_fio"] > 0 for each in whole)
    assert [each["clients"] for each in report["results"] if "clients" in each] == [1, 4]
    assert_nothing_left(directory)


def test_both_durabilities_are_compared_in_commits_and_puts(directory: Path) -> None:
    report = document("bench", "commit", "--quick", "--directory", directory)
    commits, *puts = report["results"]
    assert commits["ratio"] == pytest.approx(commits["relaxed_per_s"] / commits["strict_per_s"])
    assert [each["clients"] for each in puts] == [1, 4]
    assert all(each["strict_p50_ms"] > 0 and each["relaxed_p50_ms"] > 0 for each in puts)
    assert_nothing_left(directory)


def test_scrubbing_is_compared_with_none(directory: Path) -> None:
    report = document("bench", "scrub", "--quick", "--directory", directory)
    [result] = report["results"]
    assert set(result["rounds"]) == {"off", "default", "unlimited"}
    assert result["read_GB_s_off"] > 0
    assert result["scrub_GB_s_default"] > 0
    assert_nothing_left(directory)


def test_checking_and_rebuilding_are_compared_with_dd_and_fio(directory: Path) -> None:
    report = document("bench", "check", "--quick", "--directory", directory)
    rows = {(each["of"], each["block_bytes"]): each for each in report["results"]}
    assert set(rows) == {
        (of, block_bytes)
        for of in ("check", "check --data", "rebuild", "dd", "fio")
        for block_bytes in (4096, 2 << 20)
    }
    for (of, block_bytes), row in rows.items():
        assert row["blocks"] == {4096: 64, 2 << 20: 4}[block_bytes]
        if of not in ("dd", "fio"):
            dd = rows["dd", block_bytes]["seconds"]
            assert row["times_dd"] == pytest.approx(row["seconds"] / dd)
            assert row["memory_MiB"] > 1
    assert_nothing_left(directory)


def test_matching_is_timed_in_every_state(directory: Path) -> None:
    report = document("bench", "match", "--quick", "--busy", "--cold", "--directory", directory)
    timed = [(each["state"], each["block_tokens"]) for each in report["results"] if "state" in each]
    assert timed == [(state, step) for state in ("warm", "busy", "cold") for step in (256, 16)]
    assert any(each.get("daemon_rss_bytes", 0) > 0 for each in report["results"])
    assert_nothing_left(directory)


@pytest.mark.fuse
def test_the_mount_is_listed_and_read(directory: Path) -> None:
    report = document("bench", "mount", "--quick", "--directory", directory)
    listed = [each for each in report["results"] if "command" in each]
    assert {(each["directory"], each["time"]) for each in listed} == {
        ("many", "first"), ("many", "second"), ("long", "first"), ("long", "second"),
    }  # fmt: skip
    assert [each["readers"] for each in report["results"] if "readers" in each] == [1, 4]
    assert_nothing_left(directory)


def test_people_get_tables(directory: Path) -> None:
    done = twfs("bench", "match", "--quick", "--directory", directory)
    assert done.returncode == 0, done.stderr
    assert "match_ms_p99" in done.stdout

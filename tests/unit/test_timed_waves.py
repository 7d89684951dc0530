"""TimedWave and its Hands alone: what is under way at once, and what never begins after the end."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from twfs.readers.base import DeviceSource
from twfs.readers.hanging import FINISHERS, Hands, TimedWave

PATIENT_S = 60.0


@pytest.fixture
def source(tmp_path: Path) -> Iterator[DeviceSource]:
    path = tmp_path / "device"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDONLY)
    yield DeviceSource(fd, path, 4096)
    os.close(fd)


def begun(
    source: DeviceSource, ios: int, read: Callable[[int, int], Any],
    finish: Callable[[int, Any], None], *, threads: int = 1,
) -> TimedWave[int]:  # fmt: skip
    """A wave of so many I/Os that is under way."""
    wave = TimedWave({source: range(ios)}, threads, read, finish)
    hands = Hands(8, "test")
    wave.begin(lambda _: hands)
    return wave


def in_time() -> float:
    return time.monotonic() + PATIENT_S


def test_the_next_io_begins_before_what_was_read_is_finished(source: DeviceSource) -> None:
    second = threading.Event()
    waited = []

    def read(io: int, _fd: int) -> int:
        if io == 1:
            second.set()
        return io

    def finish(io: int, came: int) -> None:
        assert io == came
        waited.append(second.wait(PATIENT_S))

    assert begun(source, 2, read, finish).wait(in_time())
    assert waited == [True, True]


def test_no_more_ios_are_under_way_than_threads_that_read(source: DeviceSource) -> None:
    lock, under_way, most, finished = threading.Lock(), 0, 0, []

    def read(_io: int, _fd: int) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.002)
        with lock:
            under_way -= 1

    wave = begun(source, 40, read, lambda io, _: finished.append(io), threads=2)
    assert wave.wait(in_time())
    assert most == 2
    assert sorted(finished) == list(range(40))


def test_who_waits_to_begin_an_io_goes_with_the_wave(source: DeviceSource) -> None:
    go_on, finished, over = threading.Event(), [], threading.Event()
    asked = []

    def read(io: int, fd: int) -> None:
        asked.append((io, fd))
        assert go_on.wait(PATIENT_S)

    wave = begun(source, 1 + FINISHERS, read, lambda io, _: finished.append(io))
    while not asked:
        time.sleep(0.001)
    assert not wave.wait(time.monotonic())
    assert not wave.when_over(over.set)
    go_on.set()
    assert over.wait(PATIENT_S)
    ((io, fd),) = asked
    assert (io, finished) == (0, [])
    while Path(f"/proc/self/fd/{fd}").exists():  # the last of its threads closes it
        time.sleep(0.001)


def test_what_a_read_or_an_end_raises_comes_out_of_wait(source: DeviceSource) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such thing")

    for read, finish in ((fail, lambda *_: None), (lambda *_: None, fail)):
        with pytest.raises(ValueError, match="no such thing"):
            begun(source, 3, read, finish, threads=2).wait(in_time())

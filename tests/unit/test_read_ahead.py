"""Guaranteed: what is read ahead is delivered right or is a miss, and its memory always comes back.

Real devices, read by the host reader; blocks are asked for before, while and after they come.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.blockfile import BlockFile, Holder, random_payload
from support.mounting import until
from twfs.datapath.match import Match
from twfs.errors import InvalidInput
from twfs.layout import Arrangement, Group, Layout
from twfs.readers.select import Readers
from twfs.store import ReadOutcome

HIT = ReadOutcome.HIT
BLOCK_BYTES = 14_240  # no multiple of 4 KiB, so that padding matters
BLOCKS = 12
ROOM = 6  # blocks that may be read ahead
ARENA_BYTES = 2 * ROOM * 16_384
PATIENT_S = 60.0
PAYLOADS = [random_payload(BLOCK_BYTES, seed) for seed in range(BLOCKS)]


@contextmanager
def reading(path: Path) -> Iterator[tuple[BlockFile, Readers]]:
    group = Group(4, arrangement=Arrangement.LAYER_OPAQUE, layer_bytes=BLOCK_BYTES // 4)
    file = BlockFile([path], Layout("m", (group,), 16))
    for payload in PAYLOADS:
        file.write(payload)
    readers = file.readers(arena_bytes=ARENA_BYTES)
    yield file, readers
    readers.close()
    file.close()


def memory(count: int = BLOCKS) -> list[Any]:
    return [np.full(BLOCK_BYTES, 0xA5, np.uint8) for _ in range(count)]


def right(into: list[Any], first: int = 0) -> bool:
    return [each.tobytes() for each in into] == PAYLOADS[first : first + len(into)]


def statistics(readers: Readers) -> dict[str, Any]:
    found: dict[str, Any] = readers.statistics()["host"]
    return found


def idle(readers: Readers) -> bool:
    found = statistics(readers)
    pieces = found["arena"]["pieces"] if found["arena"] else 0
    return not pieces and not found["arenas_left"] and not found["under_way"]


def come(readers: Readers) -> bool:
    """Whether all that may be read ahead was read, and waits to be asked for."""
    found = statistics(readers)
    return bool(found["ios"]) and not found["under_way"] and found["arena"]["pieces"] == ROOM


class Slow:
    """Holds every read of a device up until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.asked = threading.Event()
        read = os.preadv

        def preadv(fd: int, buffers: Any, offset: int) -> int:
            self.asked.set()
            assert self.go.wait(PATIENT_S)
            return read(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("wait", [False, True], ids=["asked at once", "asked when it has come"])
@pytest.mark.parametrize("count", [ROOM, BLOCKS])
def test_what_is_read_ahead_reaches_whoever_asks_for_it(
    scratch: Path, count: int, *, wait: bool
) -> None:
    with reading(scratch / "device.img") as (file, readers):
        match = file.match(readers)
        match.read_ahead()
        if wait:
            until(lambda: come(readers), "it has come")
        into = memory(count)
        report = match.read_into(into, timeout_s=PATIENT_S)
        assert report.outcomes == (HIT,) * count
        assert report.payload_bytes == count * BLOCK_BYTES
        assert right(into)
        assert statistics(readers)["ahead"] == ROOM
        assert statistics(readers)["blocks"] == count
        again = memory()
        assert match.read_into(again, timeout_s=PATIENT_S).blocks == BLOCKS
        assert right(again)
        assert statistics(readers)["ahead"] == ROOM  # once
        match.release()
        until(lambda: idle(readers), "its memory is back")


def test_pieces_of_a_destination_get_their_bytes(scratch: Path) -> None:
    with reading(scratch / "device.img") as (file, readers):
        match = file.match(readers)
        match.read_ahead()
        into = [[bytearray(5), bytearray(BLOCK_BYTES - 5)] for _ in range(BLOCKS)]
        assert match.read_into(into, timeout_s=PATIENT_S).blocks == BLOCKS
        assert [bytes(a + b) for a, b in into] == PAYLOADS


def others(match: Match, into: list[Any]) -> None:
    assert match.read_into(into[1:], first=1, timeout_s=PATIENT_S).blocks == BLOCKS - 1
    assert right(into[1:], 1)


def fewer(match: Match, into: list[Any]) -> None:
    assert match.read_into(into[:2], timeout_s=PATIENT_S).blocks == 2
    assert right(into[:2])


def without_timeout(match: Match, into: list[Any]) -> None:
    assert match.read_into(into).blocks == BLOCKS
    assert right(into)


def layers(match: Match, into: list[Any]) -> None:
    part = [each[: BLOCK_BYTES // 2] for each in into]
    assert match.read_into(part, layers=range(2), timeout_s=PATIENT_S).blocks == BLOCKS
    assert [each.tobytes() for each in part] == [p[: BLOCK_BYTES // 2] for p in PAYLOADS]


@pytest.mark.parametrize("ask", [others, fewer, without_timeout, layers])
def test_what_asks_for_other_blocks_is_read_anew(scratch: Path, ask: Any) -> None:
    with reading(scratch / "device.img") as (file, readers):
        match = file.match(readers)
        match.read_ahead()
        ask(match, memory())
        assert statistics(readers)["ahead"] == 0
        until(lambda: idle(readers), "its memory is back")


@pytest.mark.parametrize("wait", [False, True], ids=["asked at once", "asked when it has come"])
def test_a_bad_block_is_a_miss_and_reported_and_writes_nothing(
    scratch: Path, *, wait: bool
) -> None:
    with reading(scratch / "device.img") as (file, readers):
        holder = Holder()
        match = file.match(readers, holder)
        file.flip(file.blocks[3][2], 77)
        match.read_ahead()
        if wait:
            until(lambda: come(readers), "it has come")
        into = memory()
        outcomes = match.read_into(into, timeout_s=PATIENT_S).outcomes
        assert outcomes.count(HIT) == BLOCKS - 1
        assert outcomes[3] is ReadOutcome.BAD_CHECKSUM
        assert [report[2] for report in holder.reports] == [ReadOutcome.BAD_CHECKSUM]
        assert (into[3] == 0xA5).all()
        assert right(into[:3])
        assert right(into[4:], 4)


def test_nothing_is_written_after_the_deadline(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reading(scratch / "device.img") as (file, readers):
        match = file.match(readers)
        slow = Slow(monkeypatch)
        match.read_ahead()
        assert slow.asked.wait(PATIENT_S)
        into = memory()
        outcomes = match.read_into(into, timeout_s=0.05).outcomes
        assert outcomes == (ReadOutcome.TIMED_OUT,) * BLOCKS
        match.release()  # waits for no device
        slow.go.set()
        until(lambda: idle(readers), "all has ended")
        assert all((each == 0xA5).all() for each in into)
        again = file.match(readers)
        assert again.read_into(into, timeout_s=PATIENT_S).blocks == BLOCKS
        assert right(into)


def test_what_has_come_is_no_hit_once_the_deadline_is_over(scratch: Path) -> None:
    with reading(scratch / "device.img") as (file, readers):
        match = file.match(readers)
        match.read_ahead()
        until(lambda: come(readers), "it has come")
        into = memory(ROOM)
        outcomes = match.read_into(into, timeout_s=0).outcomes
        assert outcomes == (ReadOutcome.TIMED_OUT,) * ROOM
        assert all((each == 0xA5).all() for each in into)
        until(lambda: idle(readers), "its memory is back")


def test_what_nobody_asks_for_is_dropped_with_its_match(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reading(scratch / "device.img") as (file, readers):
        slow = Slow(monkeypatch)
        match = file.match(readers)
        match.read_ahead()
        assert slow.asked.wait(PATIENT_S)
        match.release()
        assert statistics(readers)["under_way"]  # it waits for no device
        slow.go.set()
        until(lambda: idle(readers), "its memory is back")
        match.read_ahead()  # of a lease that is over
        assert idle(readers)


def test_a_copy_that_is_interrupted_leaves_no_memory_behind(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with reading(scratch / "device.img") as (file, readers):
        match = file.match(readers)
        match.read_ahead()
        until(lambda: come(readers), "it has come")
        into = memory()
        with monkeypatch.context() as patched:
            patched.setattr("twfs.readers.host.copy_bytes", interrupted)
            with pytest.raises(KeyboardInterrupt):
                match.read_into(into, timeout_s=PATIENT_S)
        assert all((each == 0xA5).all() for each in into)
        until(lambda: idle(readers), "its memory is back")
        assert match.read_into(into, timeout_s=PATIENT_S).blocks == BLOCKS
        assert right(into)


def test_a_read_ahead_that_cannot_begin_leaves_no_memory_behind(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with reading(scratch / "device.img") as (file, readers):
        match = file.match(readers)
        with monkeypatch.context() as patched:
            patched.setattr("twfs.readers.hanging.Hands.submit", full)
            with pytest.raises(RuntimeError, match="new thread"):
                match.read_ahead()
        assert idle(readers)
        into = memory()
        assert match.read_into(into, timeout_s=PATIENT_S).blocks == BLOCKS
        assert right(into)


def test_a_lease_that_ends_makes_it_a_miss(scratch: Path) -> None:
    with reading(scratch / "device.img") as (file, readers):
        holder = Holder()
        match = file.match(readers, holder)
        match.read_ahead()
        until(lambda: come(readers), "it has come")
        holder.questions = 1  # the next is yes, all after it no
        outcomes = match.read_into(memory(), timeout_s=PATIENT_S).outcomes
        assert outcomes == (ReadOutcome.LEASE_ENDED,) * BLOCKS


def test_all_matches_together_have_their_bound(scratch: Path) -> None:
    with reading(scratch / "device.img") as (file, readers):
        matches = [file.match(readers) for _ in range(3)]
        for match in matches:
            match.read_ahead()
            match.read_ahead()  # no second time
        until(lambda: come(readers), "it has come")
        for match in matches:
            into = memory()
            assert match.read_into(into, timeout_s=PATIENT_S).blocks == BLOCKS
            assert right(into)
            match.read_ahead()  # a read has begun before
        assert statistics(readers)["ahead"] == ROOM
        until(lambda: idle(readers), "its memory is back")


def test_what_is_not_held_cannot_be_read_ahead(scratch: Path) -> None:
    with reading(scratch / "device.img") as (file, readers):
        match = file.match(readers)
        with pytest.raises(InvalidInput, match="has 1 groups"):
            match.read_ahead(group=1)
        with pytest.raises(InvalidInput, match="not all in this match"):
            match.read_ahead(shard=1)

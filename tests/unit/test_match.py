"""Guarantees of a Match: bytes count only under the lease, and no destination is taken on trust.

Also that reads on other threads keep their destinations, and that release waits for them.
"""

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.blockfile import TOKEN, BlockFile, Holder, hash_of, random_payload
from twfs.errors import InvalidInput
from twfs.layout import Arrangement, Group, GroupKind, Layout
from twfs.readers.host import HostReader
from twfs.readers.select import Readers
from twfs.store import ReadOutcome
from twfs.units import ALIGN

HIT, ENDED = ReadOutcome.HIT, ReadOutcome.LEASE_ENDED
BLOCK_BYTES = 4 * 5000
LAYOUT = Layout(
    "m",
    (
        Group(4, arrangement=Arrangement.LAYER_OPAQUE, layer_bytes=5000),
        Group(
            1, kind=GroupKind.WINDOW, window_tokens=32, arrangement=Arrangement.OPAQUE,
            layer_bytes=300,
        ),
    ),
    16,
    shards=2,
)  # fmt: skip


def payload_of(index: int, group: int = 0, shard: int = 0) -> bytes:
    return random_payload(300 if group else BLOCK_BYTES, 100 * index + 10 * group + shard)


@pytest.fixture
def file(scratch: Path) -> Iterator[BlockFile]:
    file = BlockFile([scratch / "device0.img"], LAYOUT)
    for index in range(6):
        for group in range(2):
            for shard in range(2):
                file.write(payload_of(index, group, shard), group=group, shard=shard)
    yield file
    file.close()


@pytest.fixture
def readers(file: BlockFile) -> Iterator[Readers]:
    readers = file.readers()
    yield readers
    readers.close()


def test_each_group_shard_and_block_has_its_own_bytes(file: BlockFile, readers: Readers) -> None:
    match = file.match(readers)
    assert (match.blocks, match.tokens, match.token) == (6, 96, TOKEN)
    for group in range(2):
        for shard in range(2):
            for first in range(6):
                into = [bytearray(len(payload_of(0, group))) for _ in range(6 - first)]
                report = match.read_into(into, group=group, shard=shard, first=first)
                assert report.blocks == 6 - first
                assert [bytes(d) for d in into] == [
                    payload_of(index, group, shard) for index in range(first, 6)
                ]


def test_a_match_from_a_later_start_counts_all_blocks_and_reads_the_rest(
    file: BlockFile, readers: Readers
) -> None:
    match = file.match(readers, start=4)
    assert (match.start, match.blocks, match.tokens) == (4, 6, 96)
    into = [bytearray(BLOCK_BYTES) for _ in range(2)]
    assert match.read_into(into, shard=1).blocks == 2
    assert bytes(into[0]) == payload_of(4, shard=1)
    with pytest.raises(InvalidInput, match=r"blocks 3 to 3 .* holds blocks 4 to 5"):
        match.read_into([bytearray(BLOCK_BYTES)], first=3)
    with pytest.raises(InvalidInput, match="blocks 4 to 6 "):
        match.read_into([bytearray(BLOCK_BYTES)] * 3)


def test_a_group_that_lacks_early_blocks_is_read_where_it_has_them(
    file: BlockFile, readers: Readers
) -> None:
    match = file.match(readers)
    keep = (match._located["group"] == 0) | (match._located["index"] >= 4)
    extents = np.repeat(keep, match._located["extent_count"])
    match = type(match)(
        Holder(), TOKEN, match.model, match.names, 0, 6, match._located[keep],
        match._extents[extents], readers,
    )  # fmt: skip
    into = bytearray(300)
    assert match.read_into([into], group=1, shard=1, first=5).blocks == 1
    assert bytes(into) == payload_of(5, 1, 1)
    with pytest.raises(InvalidInput, match=r"blocks 3 to 4 of group 1, shard 0 .* has 2 blocks"):
        match.read_into([bytearray(300)] * 2, group=1, first=3)
    with pytest.raises(InvalidInput, match="group 5"):
        match.read_into([bytearray(300)], group=5)


@pytest.mark.parametrize(
    ("destination", "text"),
    [
        (bytearray(BLOCK_BYTES - 1), "destination of block 3 has 19999 bytes, not 20000"),
        ([bytearray(BLOCK_BYTES), bytearray(1)], "block 3 has 20001 bytes, not 20000"),
        ([], "block 3 has 0 bytes"),
        (bytes(BLOCK_BYTES), "block 3: a read-only buffer"),
        (np.zeros((2, BLOCK_BYTES), np.uint8)[:, ::2], "block 3: an array of strides"),
        (torch.zeros(2, BLOCK_BYTES // 2, dtype=torch.uint8).t(), "block 3: a tensor of strides"),
        ("a string", "block 3: str is no buffer"),
        (torch.zeros(BLOCK_BYTES, device="meta"), "block 3: a tensor on meta"),
        (None, "block 3: NoneType is no buffer"),
    ],
)
def test_a_destination_that_does_not_fit_is_refused_before_any_read(
    file: BlockFile, readers: Readers, destination: Any, text: str
) -> None:
    match = file.match(readers)
    good = bytearray(BLOCK_BYTES)
    for read in (match.read_into, match.read_async):
        with pytest.raises(InvalidInput, match=text):
            read([good, destination], first=2)
    assert not any(good)
    assert "host" not in readers.statistics()


def test_layers_that_are_not_there_or_not_runs_of_bytes_are_refused(
    file: BlockFile, readers: Readers
) -> None:
    match = file.match(readers)
    for layers in (range(5), range(2, 2), range(0, 4, 2), range(3, 1)):
        with pytest.raises(InvalidInput, match="no range of the 4 layers of group 0"):
            match.read_into([bytearray(5000)], layers=layers)
    with pytest.raises(InvalidInput, match="group 1 cannot be read by layers"):
        match.read_into([bytearray(300)], layers=range(1), group=1)
    with pytest.raises(InvalidInput, match="has 4999 bytes, not 5000"):
        match.read_into([bytearray(4999)], layers=range(1, 2))


def test_bytes_do_not_count_if_the_lease_ended_during_the_read(
    file: BlockFile, readers: Readers
) -> None:
    # The lease is asked for before the read, before each wave, and after the last I/O.
    for questions in range(3):
        match = file.match(readers, Holder(questions))
        report = match.read_into([bytearray(BLOCK_BYTES)] * 6)
        assert report.outcomes == (ENDED,) * 6
        assert (report.blocks, report.payload_bytes) == (0, 0)
    assert file.match(readers, Holder(3)).read_into([bytearray(BLOCK_BYTES)]).blocks == 1


def test_a_bad_block_is_not_reported_once_the_lease_is_over(
    file: BlockFile, readers: Readers
) -> None:
    file.flip(file.blocks[0][2], 7)
    holder = Holder(2)
    assert file.match(readers, holder).read_into([bytearray(BLOCK_BYTES)]).outcomes == (ENDED,)
    assert holder.reports == []


def test_after_release_reads_are_misses_and_the_lease_is_ended_once(
    file: BlockFile, readers: Readers
) -> None:
    holder = Holder()
    with file.match(readers, holder) as match:
        assert match.held
        assert match.renew()
    match.release()
    assert holder.released == 1
    assert not match.held
    assert not match.renew()
    into = bytearray(BLOCK_BYTES)
    assert match.read_into([into]).outcomes == (ENDED,)
    assert match.read_async([into]).result().outcomes == (ENDED,)
    assert not any(into)


def test_a_match_of_no_blocks_reads_nothing_and_ends_no_lease(readers: Readers) -> None:
    file, holder = BlockFile([], LAYOUT), Holder()
    match = file.match(readers, holder)
    match.token = b""
    assert (match.blocks, match.tokens) == (0, 0)
    report = match.read_into([])
    assert (report.outcomes, report.blocks, report.payload_bytes) == ((), 0, 0)
    with pytest.raises(InvalidInput):
        match.read_into([bytearray(BLOCK_BYTES)])
    match.release()
    assert holder.released == 0


def test_reads_on_other_threads_bring_the_same_bytes(file: BlockFile, readers: Readers) -> None:
    match = file.match(readers)
    into = [[bytearray(5000) for _ in range(6)] for _ in range(4)]
    futures = [match.read_async(into[layer], layers=range(layer, layer + 1)) for layer in range(4)]
    assert [future.result().blocks for future in futures] == [6] * 4
    for index in range(6):
        assert b"".join(bytes(into[layer][index]) for layer in range(4)) == payload_of(index)
    assert match.statistics()["hits"] == 24
    assert match.statistics()["in_flight"] == 0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Two events: a device read has begun; it may go on."""
    begun, go_on = threading.Event(), threading.Event()
    real = HostReader._preadv

    def preadv(self: HostReader, *arguments: Any) -> bool:
        begun.set()
        assert go_on.wait(60)
        return real(self, *arguments)

    monkeypatch.setattr(HostReader, "_preadv", preadv)
    return begun, go_on


def test_release_waits_for_reads_under_way_and_they_still_count(
    file: BlockFile, readers: Readers, gate: tuple[threading.Event, threading.Event]
) -> None:
    begun, go_on = gate
    holder = Holder()
    match = file.match(readers, holder)
    into = bytearray(BLOCK_BYTES)
    future = match.read_async([into])
    assert begun.wait(60)
    releasing = threading.Thread(target=match.release)
    releasing.start()
    while match.held:  # until release has shut the door
        pass
    assert match.read_into([bytearray(BLOCK_BYTES)]).outcomes == (ENDED,)
    assert holder.released == 0
    go_on.set()
    releasing.join()
    assert future.result().outcomes == (HIT,)
    assert bytes(into) == payload_of(0)
    assert holder.released == 1


def test_a_destination_lives_until_its_read_has_ended(
    file: BlockFile, readers: Readers, gate: tuple[threading.Event, threading.Event]
) -> None:
    begun, go_on = gate
    match = file.match(readers)
    into = np.zeros(BLOCK_BYTES, np.uint8)
    alive = weakref.ref(into)
    future = match.read_async([into])
    assert begun.wait(60)
    del into
    gc.collect()
    assert alive() is not None
    go_on.set()
    assert future.result().blocks == 1


def test_a_queued_read_that_is_cancelled_does_not_hold_up_release(
    file: BlockFile, readers: Readers, gate: tuple[threading.Event, threading.Event]
) -> None:
    begun, go_on = gate
    match = file.match(readers)
    futures = [match.read_async([bytearray(BLOCK_BYTES)]) for _ in range(12)]
    assert begun.wait(60)
    cancelled = [future.cancel() for future in futures]
    assert any(cancelled)
    go_on.set()
    match.release()
    for future, gone in zip(futures, cancelled, strict=True):
        assert gone or future.result().blocks == 1


def test_located_blocks_say_where_the_payloads_lie(file: BlockFile, readers: Readers) -> None:
    group_block = file.write(payload_of(6), cuts=[(0, ALIGN), (0, 2 * ALIGN), (0, 3 * ALIGN)])
    file.write(payload_of(6, 1), group=1)
    match = file.match(readers)
    found = match.located_blocks(0, 0)
    assert [block.index for block in found] == list(range(7))
    assert found[6].generation == group_block.generation
    assert len(found[6].runs) == 2
    with file.paths[0].open("rb") as device:
        for block in found:
            data = b""
            for path, offset, length in block.runs:
                assert path == file.paths[0]
                assert offset % ALIGN == length % ALIGN == 0
                device.seek(offset)
                data += device.read(length)
            assert data[: block.payload_bytes] == payload_of(block.index)
            assert len(data) - block.payload_bytes < ALIGN
            assert block.prefix_hash == hash_of(block.index)
    assert match.located_blocks(3, 0) == []


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf"), 1e9])
def test_a_timeout_that_is_no_time_is_refused(
    file: BlockFile, readers: Readers, timeout_s: float
) -> None:
    match = file.match(readers)
    for read in (match.read_into, match.read_async):
        with pytest.raises(InvalidInput, match="cannot time out after"):
            read([bytearray(BLOCK_BYTES)], timeout_s=timeout_s)
    assert match.statistics()["in_flight"] == 0

"""Guarantees that what a reader calls a hit is byte for byte what was written, wherever it goes.

Wrong bytes never stay in a destination, no I/O outlives a call, and each reader counts what it
did. For cufile see test_cufile.py.
"""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import fakecuda
from support.blockfile import BlockFile, Holder, random_payload
from support.loops import loop_device, needs_loops
from twfs.checksums import flat_bytes
from twfs.devices.arena import Arena
from twfs.errors import InvalidInput, ReaderUnavailable
from twfs.layout import Arrangement, Group, Layout
from twfs.readers import host
from twfs.readers.base import Target
from twfs.readers.staged import StagedReader
from twfs.store import ReadOutcome
from twfs.units import ALIGN

HIT = ReadOutcome.HIT
TOKENS = 16


def layout_of(byte_count: int, layers: int = 4) -> Layout:
    group = Group(layers, arrangement=Arrangement.LAYER_OPAQUE, layer_bytes=byte_count // layers)
    return Layout("m", (group,), TOKENS)


@pytest.fixture(params=["file", pytest.param("loop", marks=[needs_loops, pytest.mark.root])])
def device(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Path]:
    if request.param == "file":
        yield scratch / "device0.img"
        return
    with loop_device(scratch / "backing.img", 64 << 20) as path:
        yield path


@contextlib.contextmanager
def blocks_on(paths: list[Path], payload_bytes: int) -> Iterator[BlockFile]:
    file = BlockFile(paths, layout_of(payload_bytes))
    yield file
    file.close()


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("payload_bytes", [14_240, 65_536, 1 << 20])
def test_every_way_to_place_a_block_brings_its_bytes(
    device: Path, payload_bytes: int, count: int
) -> None:
    if payload_bytes * count > 48 << 20:
        count = 20
    payloads = [random_payload(payload_bytes, seed) for seed in range(count)]
    with blocks_on([device], payload_bytes) as file:
        for payload in payloads:
            file.write(payload)
        readers = file.readers(arena_bytes=4 << 20)
        match = file.match(readers)
        aligned = flat_bytes(Arena.private(count * (payload_bytes + ALIGN)).view)
        step = -(-payload_bytes // ALIGN) * ALIGN
        thirds = [payload_bytes // 3 - 5, 4, payload_bytes - payload_bytes // 3 + 1]
        ways: dict[str, list[Any]] = {
            "aligned": [aligned[i * step : i * step + payload_bytes] for i in range(count)],
            "unaligned": [np.zeros(payload_bytes + 1, np.uint8)[1:] for _ in range(count)],
            "bfloat16": [torch.zeros(payload_bytes // 2, dtype=torch.bfloat16) for _ in payloads],
            "float8": [torch.zeros(payload_bytes).to(torch.float8_e4m3fn) for _ in payloads],
            "pieces": [[bytearray(n) for n in thirds] for _ in range(count)],
        }
        for way, destinations in ways.items():
            report = match.read_into(destinations)
            assert report.outcomes == (HIT,) * count, way
            assert (report.blocks, report.reader) == (count, "host")
            assert report.payload_bytes == count * payload_bytes
            for destination, payload in zip(destinations, payloads, strict=True):
                pieces = destination if isinstance(destination, list) else [destination]
                assert b"".join(flat_bytes(p).tobytes() for p in pieces) == payload, way
        statistics = readers.statistics()["host"]
        straight = count if payload_bytes % ALIGN == 0 else 0
        assert statistics["direct"] >= straight
        assert statistics["direct"] + statistics["unaligned"] == len(ways) * count
        assert statistics["arena"]["pieces"] == 0
        readers.close()


def test_a_direct_read_writes_nothing_outside_its_destination(device: Path) -> None:
    with blocks_on([device], 16_384) as file:
        payload = random_payload(16_384, 1)
        file.write(payload)
        readers = file.readers()
        memory = flat_bytes(Arena.private(16_384 + 2 * ALIGN).view)
        memory[:] = 0xAB
        report = file.match(readers).read_into([memory[ALIGN:-ALIGN]])
        assert report.blocks == 1
        assert readers.statistics()["host"]["direct"] == 1
        assert memory[ALIGN:-ALIGN].tobytes() == payload
        assert (memory[:ALIGN] == 0xAB).all()
        assert (memory[-ALIGN:] == 0xAB).all()
        readers.close()


def test_neighbours_come_in_one_read_and_headers_go_nowhere(device: Path) -> None:
    with blocks_on([device], 8192) as file:
        payloads = [random_payload(8192, seed) for seed in range(64)]
        for payload in payloads:
            file.write(payload)
        readers = file.readers()
        memory = flat_bytes(Arena.private(64 * 8192).view)
        report = file.match(readers).read_into([memory[i * 8192 :][:8192] for i in range(64)])
        assert report.blocks == 64
        assert memory.tobytes() == b"".join(payloads)
        assert readers.statistics()["host"]["ios"] == 1
        readers.close()


def test_blocks_of_several_extents_on_several_devices_are_put_together(scratch: Path) -> None:
    payload_bytes = 5 * ALIGN + 100
    with blocks_on([scratch / "a.img", scratch / "b.img"], payload_bytes) as file:
        payloads = [random_payload(payload_bytes, seed) for seed in range(6)]
        cuts = [
            [(0, ALIGN), (1, 6 * ALIGN)],
            [(1, 2 * ALIGN), (0, 3 * ALIGN), (1, 2 * ALIGN)],
            [(0, ALIGN), (0, ALIGN), (0, 5 * ALIGN)],
        ]
        for number, payload in enumerate(payloads):
            file.write(payload, cuts=cuts[number % 3])
        readers = file.readers()
        destinations = [bytearray(payload_bytes) for _ in payloads]
        assert file.match(readers).read_into(destinations).blocks == 6
        assert [bytes(d) for d in destinations] == payloads
        readers.close()


def test_a_block_larger_than_arena_and_one_io_is_read_whole(scratch: Path) -> None:
    payload_bytes = (20 << 20) + 12
    with blocks_on([scratch / "a.img"], payload_bytes) as file:
        payload = random_payload(payload_bytes, 5)
        file.write(payload)
        readers = file.readers(arena_bytes=1 << 20)
        for name in ("host", "staged"):
            into = np.zeros(payload_bytes, np.uint8)
            assert file.match(readers).read_into([into], reader=name).blocks == 1
            assert into.tobytes() == payload
        assert readers.statistics()["host"]["ios"] == 2
        readers.close()


@pytest.mark.parametrize("reader", ["host", "staged"])
def test_a_flipped_bit_is_a_miss_and_the_bytes_do_not_stay(scratch: Path, reader: str) -> None:
    with blocks_on([scratch / "a.img"], 65_536) as file:
        payloads = [random_payload(65_536, seed) for seed in range(4)]
        blocks = [file.write(payload) for payload in payloads]
        file.flip(blocks[2], 40_000)
        readers, holder = file.readers(), Holder()
        match = file.match(readers, holder)
        memory = flat_bytes(Arena.private(4 * 65_536).view)
        aligned = [memory[i * 65_536 :][:65_536] for i in range(4)]
        for destinations in (aligned, [bytearray(65_536) for _ in range(4)]):
            report = match.read_into(destinations, reader=reader)
            assert report.outcomes == (HIT, HIT, ReadOutcome.BAD_CHECKSUM, HIT)
            assert (report.blocks, report.payload_bytes) == (2, 3 * 65_536)
            assert bytes(destinations[2]) == bytes(65_536)
            assert bytes(destinations[3]) == payloads[3]
        key, generation, outcome = holder.reports[0]
        assert (key.model, key.prefix_hash, generation) == (7, match.names.hash_at(2), 1002)
        assert outcome is ReadOutcome.BAD_CHECKSUM
        assert readers.statistics()[reader]["misses"]["bad checksum"] == 2
        readers.close()


def test_a_device_that_ends_early_costs_only_what_lies_behind_its_end(scratch: Path) -> None:
    with blocks_on([scratch / "a.img"], 65_536) as file:
        payloads = [random_payload(65_536, seed) for seed in range(8)]
        blocks = [file.write(payload) for payload in payloads]
        readers, holder = file.readers(), Holder()
        file.truncate(0, blocks[5].extents[0].offset + 3 * ALIGN)
        memory = flat_bytes(Arena.private(8 * 65_536).view)
        memory[:] = 0xAB
        report = file.match(readers, holder).read_into(
            [memory[i << 16 :][:65_536] for i in range(8)]
        )
        assert report.outcomes == (HIT,) * 5 + (ReadOutcome.DEVICE_ERROR,) * 3
        assert memory[: 5 << 16].tobytes() == b"".join(payloads[:5])
        assert not memory[5 << 16 :].any()
        assert [outcome for _, _, outcome in holder.reports] == [ReadOutcome.DEVICE_ERROR] * 3
        readers.close()


def test_an_extent_outside_the_device_or_on_none_is_never_read(scratch: Path) -> None:
    with blocks_on([scratch / "a.img"], 8192) as file:
        file.write(random_payload(8192, 1))
        readers = file.readers()
        for field, value in (("offset", 64 << 20), ("offset", 4097), ("device", 3), ("units", 1)):
            match = file.match(readers)
            match._extents = match._extents.copy()
            match._extents[field] = value
            report = match.read_into([bytearray(8192)])
            assert report.outcomes == (ReadOutcome.DEVICE_ERROR,)
        assert readers.statistics()["host"]["ios"] == 0
        readers.close()


@pytest.mark.parametrize("layer_bytes", [4096, 5000, 100])
def test_any_range_of_layers_is_read_alone_and_verified(scratch: Path, layer_bytes: int) -> None:
    with blocks_on([scratch / "a.img"], 4 * layer_bytes) as file:
        payloads = [random_payload(4 * layer_bytes, seed) for seed in range(5)]
        for payload in payloads:
            file.write(payload)
        readers = file.readers()
        match = file.match(readers)
        for first in range(4):
            for stop in range(first + 1, 5):
                into = [bytearray((stop - first) * layer_bytes) for _ in payloads]
                assert match.read_into(into, layers=range(first, stop)).blocks == 5
                for got, payload in zip(into, payloads, strict=True):
                    assert bytes(got) == payload[first * layer_bytes : stop * layer_bytes]
        readers.close()


def test_layers_of_a_block_in_several_extents_are_found(scratch: Path) -> None:
    with blocks_on([scratch / "a.img", scratch / "b.img"], 4 * 5000) as file:
        payload = random_payload(4 * 5000, 1)
        file.write(payload, cuts=[(0, 2 * ALIGN), (1, ALIGN), (0, 3 * ALIGN)])
        readers = file.readers()
        into = bytearray(10_000)
        assert file.match(readers).read_into([into], layers=range(1, 3)).blocks == 1
        assert bytes(into) == payload[5000:15_000]
        readers.close()


def test_damage_in_one_layer_is_a_miss_for_that_layer_only(scratch: Path) -> None:
    with blocks_on([scratch / "a.img"], 4 * 8192) as file:
        block = file.write(random_payload(4 * 8192, 1))
        file.flip(block, 2 * 8192 + 5)
        readers = file.readers()
        match = file.match(readers)
        into = [bytearray(8192)]
        assert match.read_into(into, layers=range(1, 2)).blocks == 1
        into = [bytearray(8192)]
        report = match.read_into(into, layers=range(2, 3))
        assert report.outcomes == (ReadOutcome.BAD_CHECKSUM,)
        assert not any(into[0])
        readers.close()


def test_layers_under_another_header_are_a_miss(scratch: Path) -> None:
    with blocks_on([scratch / "a.img"], 4 * 8192) as file:
        file.write(random_payload(4 * 8192, 1))
        block = file.write(random_payload(4 * 8192, 2))
        readers = file.readers()
        match = file.match(readers)
        match._located = match._located.copy()
        match._located["generation"][1] += 1  # as if the extent had lived another life since
        report = match.read_into([bytearray(8192)] * 2, layers=range(1))
        assert report.outcomes == (HIT, ReadOutcome.BAD_CHECKSUM)
        os.pwrite(file._fds[0], b"\0", block.extents[0].offset)
        report = file.match(readers).read_into([bytearray(8192)] * 2, layers=range(1))
        assert report.outcomes == (HIT, ReadOutcome.BAD_CHECKSUM)
        readers.close()


def test_many_threads_share_readers_and_their_small_arena(scratch: Path) -> None:
    with blocks_on([scratch / "a.img"], 70_000) as file:
        payloads = [random_payload(70_000, seed) for seed in range(30)]
        for payload in payloads:
            file.write(payload)
        readers = file.readers(arena_bytes=256 << 10)
        match = file.match(readers)
        wrong: list[int] = []

        def work(turn: int) -> None:
            for _ in range(5):
                into = [bytearray(70_000) for _ in payloads]
                if match.read_into(into).blocks != 30 or [bytes(d) for d in into] != payloads:
                    wrong.append(turn)

        threads = [threading.Thread(target=work, args=(turn,)) for turn in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        statistics = readers.statistics()["host"]
        assert statistics["blocks"] == 6 * 5 * 30
        assert statistics["arena"]["pieces"] == 0
        readers.close()


def test_an_interrupt_waits_for_the_reads_and_leaves_nothing_taken(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with blocks_on([scratch / "a.img"], 1 << 20) as file:
        for seed in range(24):
            file.write(random_payload(1 << 20, seed))
        readers = file.readers()
        match = file.match(readers)
        real, main = os.preadv, threading.get_ident()
        under_way, most_after = set[int](), []
        helper_reads, go_on = threading.Event(), threading.Event()

        def preadv(fd: int, buffers: object, offset: int) -> int:
            under_way.add(threading.get_ident())
            if threading.get_ident() == main:
                helper_reads.wait(60)
                signal.raise_signal(signal.SIGINT)
            else:
                helper_reads.set()
                go_on.wait(60)
            try:
                return real(fd, buffers, offset)  # type: ignore[arg-type]
            finally:
                under_way.discard(threading.get_ident())

        monkeypatch.setattr(os, "preadv", preadv)
        end = host.Wave.end

        def ending(wave: host.Wave, *, stop: bool) -> None:
            most_after.append(stop)
            go_on.set()
            end(wave, stop=stop)

        monkeypatch.setattr(host.Wave, "end", ending)
        into = [bytearray(1 << 20) for _ in range(24)]
        with pytest.raises(KeyboardInterrupt):
            match.read_into(into)
        assert under_way - {main} == set()
        assert most_after == [True]
        monkeypatch.undo()
        statistics = readers.statistics()["host"]
        assert statistics["arena"]["pieces"] == 0
        assert statistics["ios"] < 24
        assert match.read_into(into).blocks == 24
        readers.close()


def test_a_forked_child_is_refused_and_the_parent_goes_on(scratch: Path) -> None:
    with blocks_on([scratch / "a.img"], 8192) as file:
        file.write(random_payload(8192, 1))
        readers = file.readers()
        match = file.match(readers)
        assert match.read_into([bytearray(8192)]).blocks == 1
        child = os.fork()
        if child == 0:
            try:
                match.read_into([bytearray(8192)])
            except ReaderUnavailable:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert match.read_into([bytearray(8192)]).blocks == 1
        readers.close()


class OrderedAtOnce:
    """A stream of the CPU: what is given to it has been done when it returns."""

    waits = 0

    def synchronize(self) -> None:
        self.waits += 1


@pytest.mark.parametrize("payload_bytes", [14_240, 65_536, (16 << 20) + 24])
def test_staged_copies_reach_tensors_in_one_piece_and_in_several(
    scratch: Path, payload_bytes: int
) -> None:
    with blocks_on([scratch / "a.img"], payload_bytes) as file:
        payloads = [random_payload(payload_bytes, seed) for seed in range(2)]
        for payload in payloads:
            file.write(payload)
        file.flip(file.blocks[1][2], 5)
        reads = file.match(file.readers())._blocks([bytearray(payload_bytes)] * 2, 0, 0, None, None)
        reader = StagedReader(file.sources, arena_bytes=1 << 20)
        # No GPU here: tensors of the CPU stand for its memory, and copies to them are synchronous.
        stream = reader._streams[torch.device("cpu")] = OrderedAtOnce()
        half = payload_bytes // 2
        for lengths in ([payload_bytes], [half, payload_bytes - half], [8, 5, payload_bytes - 13]):
            into = [[torch.zeros(n, dtype=torch.uint8) for n in lengths] for _ in reads]
            blocks = [
                dataclasses.replace(
                    read, targets=tuple(Target(t.data_ptr(), t.numel(), None, t) for t in tensors)
                )
                for read, tensors in zip(reads, into, strict=True)
            ]
            outcomes = reader.read(blocks, lambda: True)
            assert outcomes == [HIT, ReadOutcome.BAD_CHECKSUM]
            assert b"".join(t.numpy().tobytes() for t in into[0]) == payloads[0]
            assert not any(t.any() for t in into[1])
        assert stream.waits >= 3
        reader.close()


def test_readers_are_chosen_by_name_and_unknown_or_closed_ones_refused(scratch: Path) -> None:
    with blocks_on([scratch / "a.img"], 8192) as file:
        file.write(random_payload(8192, 1))
        readers = file.readers()
        match = file.match(readers)
        assert match.read_into([bytearray(8192)], reader="staged").reader == "staged"
        assert readers.statistics()["staged"]["blocks"] == 1
        with pytest.raises(InvalidInput, match="no reader 'fast'"):
            match.read_into([bytearray(8192)], reader="fast")
        with pytest.raises(InvalidInput, match="layers are verified in host memory"):
            match.read_into([bytearray(2048)], layers=range(1), reader="cufile")
        readers.close()
        readers.close()
        with pytest.raises(InvalidInput, match="closed"):
            match.read_into([bytearray(8192)])


@pytest.mark.skipif(
    Path("/usr/lib/x86_64-linux-gnu/libcuda.so.1").exists(), reason="this machine has libcuda.so.1"
)
def test_without_libcuda_the_cufile_reader_says_so(scratch: Path) -> None:
    with blocks_on([scratch / "a.img"], 8192) as file:
        file.write(random_payload(8192, 1))
        readers = file.readers()
        with pytest.raises(ReaderUnavailable, match=r"libcuda\.so\.1"):
            file.match(readers).read_into([bytearray(8192)], reader="cufile")
        readers.close()


def test_twfs_reads_without_importing_torch_or_kvikio(scratch: Path) -> None:
    code = (
        "import sys, numpy\n"
        "from pathlib import Path\n"
        "from support.blockfile import BlockFile, random_payload\n"
        "from twfs.layout import Arrangement, Group, Layout\n"
        "group = Group(1, arrangement=Arrangement.OPAQUE, layer_bytes=8192)\n"
        "file = BlockFile([Path(sys.argv[1])], Layout('m', (group,), 16))\n"
        "file.write(random_payload(8192, 1))\n"
        "into = bytearray(8192)\n"
        "assert file.match(file.readers()).read_into([into]).blocks == 1\n"
        "assert bytes(into) == random_payload(8192, 1)\n"
        "assert not {'torch', 'kvikio'} & set(sys.modules)\n"
    )
    fakecuda.run_under(scratch, code, str(scratch / "a.img"))


@pytest.mark.parametrize("reader", ["host", "staged"])
@pytest.mark.parametrize("payload_bytes", [14_240, 65_536, 6 << 20])
def test_a_read_with_a_deadline_brings_every_byte_through_the_arena(
    device: Path, payload_bytes: int, reader: str
) -> None:
    count = min(40, (40 << 20) // payload_bytes)
    payloads = [random_payload(payload_bytes, seed) for seed in range(count)]
    with blocks_on([device], payload_bytes) as file:
        blocks = [file.write(payload) for payload in payloads]
        readers = file.readers(arena_bytes=1 << 20)  # many waves, or an arena for each block
        match = file.match(readers)
        into = [np.zeros(payload_bytes, np.uint8) for _ in payloads]
        options: dict[str, Any] = {"reader": reader, "timeout_s": 60.0}
        assert match.read_into(into, **options).outcomes == (HIT,) * count
        assert [each.tobytes() for each in into] == payloads
        assert match.read_async(into, **options).result(60).blocks == count
        file.flip(blocks[1], 77)
        assert match.read_into(into, **options).outcomes[1] is ReadOutcome.BAD_CHECKSUM
        assert match.read_into(into, reader=reader, timeout_s=0).outcomes == (
            (ReadOutcome.TIMED_OUT,) * count
        )
        statistics = readers.statistics()[reader]
        assert statistics["direct"] == statistics["arenas_left"] == 0
        assert statistics["arena"] is None or statistics["arena"]["pieces"] == 0
        assert statistics["under_way"] == {}
        readers.close()

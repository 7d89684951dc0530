"""The cufile reader over the real kvikio, in a process that has a stand-in for libcuda.so.1.

`python -m support.cufiles FOLDER CASE BYTES` tries one case with blocks of so many bytes, and ends
with an assertion that failed, or prints how many blocks were read: `host` into host memory, `gpu`
into what the stand-in takes for a GPU's, `hang` the same on a device that hangs.
"""

import ctypes
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.blockfile import BlockFile, random_payload
from support.faultrules import Act, Op, Rule
from support.faultydisks import faulty_disks
from support.mounting import until
from twfs.checksums import flat_bytes
from twfs.datapath.match import Match
from twfs.devices.arena import Arena
from twfs.layout import Arrangement, Group, Layout
from twfs.readers.base import BlockRead, Target
from twfs.readers.cufile import CufileReader
from twfs.readers.select import Readers
from twfs.store import ReaderName, ReadOutcome
from twfs.units import ALIGN, align_up

CUDA = ctypes.CDLL("libcuda.so.1")
CUDA.fake_register.argtypes = (ctypes.c_uint64, ctypes.c_size_t)
HIT, BAD, ERROR = ReadOutcome.HIT, ReadOutcome.BAD_CHECKSUM, ReadOutcome.DEVICE_ERROR
TIMED_OUT = ReadOutcome.TIMED_OUT
DEVICE_BYTES = 128 << 20
LONG_S = 60.0  # a deadline that none of these reads meets

Tensors = list[Any]


def on_gpu(byte_count: int, _: Any = None) -> Any:
    """A tensor that the stand-in takes for GPU memory, 4 KiB-aligned."""
    tensor = torch.full((byte_count + ALIGN,), 0xAB, dtype=torch.uint8)
    tensor = tensor[-tensor.data_ptr() % ALIGN :][:byte_count]
    CUDA.fake_register(tensor.data_ptr(), byte_count)
    return tensor


class Written:
    """Blocks of *payload_bytes* on two devices; each fifth is on both."""

    def __init__(self, paths: list[Path], payload_bytes: int) -> None:
        group = Group(1, arrangement=Arrangement.OPAQUE, layer_bytes=payload_bytes)
        self.file = BlockFile(paths, Layout("m", (group,), 16), DEVICE_BYTES)
        self.payload_bytes, self.padded_bytes = payload_bytes, align_up(payload_bytes)
        self.count = 24 if payload_bytes < 1 << 20 else 6
        self.payloads = [random_payload(payload_bytes, seed) for seed in range(self.count)]
        half = ALIGN * (1 + payload_bytes // (2 * ALIGN))
        cuts = [(1, half), (0, ALIGN + self.padded_bytes - half)]
        self.blocks = [
            self.file.write(payload, device=i % 2) if i % 5 else self.file.write(payload, cuts=cuts)
            for i, payload in enumerate(self.payloads)
        ]
        self.readers = self.file.readers(arena_bytes=1 << 20)
        self.match = self.file.match(self.readers)

    def damage(self) -> None:
        """A bit of the second block is flipped, and device 0 ends within the last but one."""
        self.file.flip(self.blocks[1], self.payload_bytes - 1)
        self.file.truncate(0, self.blocks[-2].extents[0].offset + 2 * ALIGN)

    def whole(self, outcomes: list[ReadOutcome]) -> bool:
        """Whether of the damaged ones these, and all others before the end of device 0, are so."""
        end = self.blocks[-2].extents[0].offset
        others = [o for i, o in enumerate(outcomes) if self.blocks[i].extents[-1].offset < end]
        others.remove(BAD)
        return outcomes[1] is BAD and outcomes[-2] is ERROR and set(others) == {HIT}

    def into_gpu(self, destinations: list[Tensors]) -> list[BlockRead]:
        """The reads of all blocks, into destinations that are taken for GPU memory."""
        return [
            BlockRead(
                read.prefix_hash, read.group, read.shard, read.generation, read.payload_bytes,
                read.checksums, read.extents,
                tuple(Target(t.data_ptr(), t.numel(), None, t) for t in tensors),
            )
            for read, tensors in zip(reads_of(self.match, destinations), destinations, strict=True)
        ]  # fmt: skip

    def gpu_ways(self) -> dict[str, list[Tensors]]:
        """A destination for each block, in several shapes."""
        pool, size = on_gpu(self.count * self.padded_bytes), self.payload_bytes
        third = size // 3
        every = range(self.count)
        return {
            "aligned": [[pool[i * self.padded_bytes :][:size]] for i in every],
            "unaligned": [[on_gpu(size + 8)[8:]] for _ in every],
            "odd pieces": [[on_gpu(third), on_gpu(5), on_gpu(size - third - 5)] for _ in every],
            "even pieces": [[on_gpu(ALIGN), on_gpu(size - ALIGN)] for _ in every],
        }


def reads_of(match: Match, destinations: list[Tensors]) -> list[BlockRead]:
    """The reads of a match, into host memory of the same size."""
    sizes = [sum(tensor.numel() for tensor in tensors) for tensors in destinations]
    return match._blocks([np.zeros(size, np.uint8) for size in sizes], 0, 0, None, None)


def bytes_of(tensors: Tensors) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def clear(destinations: list[Tensors]) -> None:
    for tensors in destinations:
        for tensor in tensors:
            tensor.zero_()


def deadlines() -> Iterator[float | None]:
    """None, and one that is far away."""
    yield None
    yield time.monotonic() + LONG_S


def try_host(folder: Path, payload_bytes: int) -> int:
    """Through a match, into host memory."""
    written = Written([folder / "a.img", folder / "b.img"], payload_bytes)
    count, payloads = written.count, written.payloads
    memory = flat_bytes(Arena.private(count * written.padded_bytes).view)
    options: list[dict[str, Any]] = [{}, {"timeout_s": LONG_S}]
    aligned = [memory[i * written.padded_bytes :][:payload_bytes] for i in range(count)]
    for into in (
        aligned,
        [bytearray(payload_bytes) for _ in range(count)],
        [[bytearray(7), bytearray(payload_bytes - 7)] for _ in range(count)],
    ):
        for more in options:
            report = written.match.read_into(into, reader="cufile", **more)
            assert report.outcomes == (HIT,) * count, report.outcomes
            assert report.reader == "cufile"
            for got, payload in zip(into, payloads, strict=True):
                assert b"".join(map(bytes, got if isinstance(got, list) else [got])) == payload
    written.damage()
    memory[:] = 0
    for into in (aligned, [bytearray(payload_bytes) for _ in range(count)]):
        for more in options:
            outcomes = written.match.read_into(into, reader="cufile", **more).outcomes
            assert written.whole(list(outcomes)), outcomes
            assert not any(bytes(into[1]))
            assert not any(bytes(into[-2]))
            assert bytes(into[2]) == payloads[2]
    report = written.match.read_into(aligned, reader="cufile", timeout_s=0)
    assert report.outcomes == (TIMED_OUT,) * count
    statistics = written.readers.statistics()["cufile"]
    assert statistics["mode"] == "compat"
    assert statistics["bytes_by_backend"]["GDS"] == 0
    assert statistics["bytes_by_backend"]["POSIX"] > 0
    assert statistics["misses"]["bad checksum"] == 4
    assert statistics["waves_left"] == 0
    return int(statistics["blocks"])


def try_gpu(folder: Path, payload_bytes: int) -> int:
    """Into what is taken for a GPU's memory."""
    written = Written([folder / "a.img", folder / "b.img"], payload_bytes)
    reader = CufileReader(written.file.sources, staging_bytes=256 << 10, allocate=on_gpu)
    ways = written.gpu_ways()
    for way, into in ways.items():
        for deadline in deadlines():
            clear(into)
            outcomes = reader.read(written.into_gpu(into), lambda: True, (), deadline)
            assert outcomes == [HIT] * written.count, (way, outcomes)
            for got, payload in zip(into, written.payloads, strict=True):
                assert bytes_of(got) == payload, way
    assert CUDA.fake_copied_bytes() >= 8 * written.count * payload_bytes
    direct = reader.statistics()["direct"]
    assert (direct > 0) == (payload_bytes % ALIGN == 0 and payload_bytes >= 1 << 20)
    written.damage()
    for way, into in ways.items():
        for deadline in deadlines():
            clear(into)
            outcomes = reader.read(written.into_gpu(into), lambda: True, (), deadline)
            assert written.whole(outcomes), (way, outcomes)
            assert not any(tensor.any() for tensor in into[1] + into[-2]), way
            assert bytes_of(into[2]) == written.payloads[2], way
    reads = written.into_gpu(ways["unaligned"])
    for deadline in deadlines():
        outcomes = reader.read(reads, iter([True, False]).__next__, (), deadline)
        assert (outcomes[0], outcomes[-1]) == (HIT, ReadOutcome.LEASE_ENDED), outcomes
    assert reader.read(reads, lambda: True, (), time.monotonic()) == [TIMED_OUT] * written.count
    statistics = reader.statistics()
    assert statistics["mode"] == "compat"
    assert statistics["waves_left"] == 0
    reader.close()
    return int(statistics["blocks"])


def try_hang(folder: Path, payload_bytes: int) -> int:
    """What hangs at the deadline is left behind, and the engine's memory stays as it is."""
    hang = Rule(disk="a", op=Op.READ, act=Act.HANG, low=1 << 20)
    with faulty_disks(folder / "disks", dict.fromkeys("ab", DEVICE_BYTES)) as disks:
        written = Written([disks.loops["a"], disks.loops["b"]], payload_bytes)
        readers = Readers(written.file.sources)
        reader = CufileReader(written.file.sources, staging_bytes=4 << 20, allocate=on_gpu)
        readers._made[ReaderName.CUFILE], readers._direct = reader, True
        into = written.gpu_ways()["even pieces"]
        reads = written.into_gpu(into)

        def chosen() -> str:
            return readers.name_for(reads, None, timed=True)

        def read(timeout_s: float) -> list[ReadOutcome]:
            clear(into)
            return reader.read(reads, lambda: True, (), time.monotonic() + timeout_s)

        assert read(LONG_S) == [HIT] * written.count
        assert chosen() == "cufile"
        disks.set_rules(hang)
        outcomes = read(1.0)
        assert set(outcomes) <= {HIT, TIMED_OUT}
        assert outcomes[0] is TIMED_OUT
        assert reader.statistics()["waves_left"] > 0
        assert not reader._staging  # which late bytes still go into
        # As long as they hang, others go another way, and who insists need not wait.
        assert chosen() == "staged"
        assert readers.name_for(reads, None) == "cufile"
        assert read(LONG_S) == [TIMED_OUT] * written.count
        assert disks.hanging() > 0
        disks.set_rules()
        until(lambda: not reader.stuck, "what was left behind comes")
        assert not any(tensor.any() for tensors in into for tensor in tensors)
        assert read(LONG_S) == [HIT] * written.count
        assert [bytes_of(tensors) for tensors in into] == written.payloads
        assert chosen() == "cufile"
        # Nor does the end wait for it.
        disks.set_rules(hang)
        assert read(1.0)[0] is TIMED_OUT
        reader.close()
        assert disks.hanging() > 0
        assert not any(file.closed for file in reader._files.values())
        disks.set_rules()
        until(lambda: all(file.closed for file in reader._files.values()), "the files are closed")
        written.file.close()
        return int(reader.statistics()["blocks"])


def main() -> None:
    """Try one case."""
    folder, case, payload_bytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    read = {"host": try_host, "gpu": try_gpu, "hang": try_hang}[case](folder, payload_bytes)
    sys.stdout.write(f"read {read}\n")


if __name__ == "__main__":
    main()

"""Guarantees that blocks reach GPU memory byte for byte through staged and through kvikio.

Needs a CUDA device; which of cuFile's ways served is printed, never assumed.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from support.blockfile import BlockFile, random_payload
from twfs.checksums import lanes_of, lanes_on_device
from twfs.errors import ReaderUnavailable
from twfs.layout import Arrangement, Group, Layout
from twfs.readers.select import Readers
from twfs.store import ReadOutcome

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
HIT = ReadOutcome.HIT
SIZES = [14_240, 65_536, 1 << 20, 3_000_001]
COUNT = 12


@pytest.fixture(params=SIZES)
def file(request: pytest.FixtureRequest, scratch: Path) -> Iterator[BlockFile]:
    group = Group(1, arrangement=Arrangement.LAYER_OPAQUE, layer_bytes=request.param)
    file = BlockFile([scratch / "device0.img"], Layout("m", (group,), 16), 128 << 20)
    for seed in range(COUNT):
        file.write(random_payload(request.param, seed))
    yield file
    file.close()


@pytest.fixture
def readers(file: BlockFile) -> Iterator[Readers]:
    readers = file.readers(arena_bytes=8 << 20)
    yield readers
    readers.close()


def bytes_of(tensors: list[torch.Tensor]) -> bytes:
    return b"".join(tensor.view(torch.uint8).cpu().numpy().tobytes() for tensor in tensors)


def ways(byte_count: int) -> dict[str, list[list[torch.Tensor]]]:
    """One destination per block, in several shapes."""

    def make(*lengths: int) -> list[torch.Tensor]:
        return [torch.zeros(n, dtype=torch.uint8, device="cuda") for n in lengths]

    padded = -(-byte_count // 4096) * 4096
    pool = torch.zeros(COUNT * padded + 4096, dtype=torch.uint8, device="cuda")
    pool = pool[-pool.data_ptr() % 4096 :]
    third = byte_count // 3
    found = {
        "aligned": [[pool[i * padded :][:byte_count]] for i in range(COUNT)],
        "unaligned": [[make(byte_count + 8)[0][8:]] for _ in range(COUNT)],
        "odd pieces": [make(third, 5, byte_count - third - 5) for _ in range(COUNT)],
    }
    if byte_count % 64 == 0:
        found["bfloat16"] = [
            [tensor.view(torch.bfloat16) for tensor in make(*[byte_count // 32] * 32)]
            for _ in range(COUNT)
        ]
        found["float8"] = [
            [tensor.view(torch.float8_e4m3fn) for tensor in make(byte_count)] for _ in range(COUNT)
        ]
    return found


def length_of(file: BlockFile) -> int:
    return int(file.blocks[0][2].payload_bytes)


@pytest.mark.parametrize("timeout_s", [None, 60.0])
@pytest.mark.parametrize("reader", [None, "staged", "cufile"])
def test_blocks_reach_gpu_memory_in_every_shape(
    file: BlockFile, readers: Readers, reader: str | None, timeout_s: float | None
) -> None:
    match = file.match(readers)
    for way, into in ways(length_of(file)).items():
        try:
            report = match.read_into(into, reader=reader, timeout_s=timeout_s)
        except ReaderUnavailable as error:
            pytest.skip(str(error))
        assert report.outcomes == (HIT,) * COUNT, way
        for seed, tensors in enumerate(into):
            assert bytes_of(tensors) == random_payload(length_of(file), seed), way
    print(readers.statistics())  # noqa: T201 - which way cuFile went is part of the result


@pytest.mark.parametrize("timeout_s", [None, 60.0])
@pytest.mark.parametrize("reader", ["staged", "cufile"])
def test_a_flipped_bit_is_found_and_its_bytes_do_not_reach_the_gpu(
    file: BlockFile, readers: Readers, reader: str, timeout_s: float | None
) -> None:
    file.flip(file.blocks[4][2], length_of(file) - 1)
    match = file.match(readers)
    for way, into in ways(length_of(file)).items():
        try:
            outcomes = match.read_into(into, reader=reader, timeout_s=timeout_s).outcomes
        except ReaderUnavailable as error:
            pytest.skip(str(error))
        assert outcomes[4] is ReadOutcome.BAD_CHECKSUM, way
        assert not any(bytes_of(into[4])), way
        assert bytes_of(into[5]) == random_payload(length_of(file), 5), way


def test_a_read_waits_for_kernels_that_still_use_the_destination(
    file: BlockFile, readers: Readers
) -> None:
    into = [torch.zeros(length_of(file), dtype=torch.uint8, device="cuda") for _ in range(COUNT)]
    busy = torch.ones(4096, 4096, device="cuda")
    for _ in range(50):
        busy = busy @ busy / 4096
    for tensor in into:
        tensor.fill_(7)
    match = file.match(readers)
    assert match.read_into(into, reader="staged").blocks == COUNT
    for seed, tensor in enumerate(into):
        assert bytes_of([tensor]) == random_payload(length_of(file), seed)


def test_one_read_cannot_go_to_two_memories(file: BlockFile, readers: Readers) -> None:
    match = file.match(readers)
    gpu = torch.zeros(length_of(file), dtype=torch.uint8, device="cuda")
    with pytest.raises(Exception, match="one read goes to one memory"):
        match.read_into([gpu, bytearray(length_of(file))])


@pytest.mark.parametrize("byte_count", [1, 4096, 70_001, 40 << 20])
def test_lane_sums_on_the_gpu_equal_those_on_the_host(byte_count: int) -> None:
    data = np.random.default_rng(1).integers(0, 256, byte_count, dtype=np.uint8)
    tensor = torch.from_numpy(data).cuda()
    assert lanes_of(tensor) == lanes_of(data)
    assert lanes_on_device(tensor[1:]) == lanes_of(data[1:])

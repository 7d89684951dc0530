"""Guarantees that both payload checksums are what FORMAT.md says, for every kind of buffer.

The fast lane sums are held against a plain loop over the lanes, on torch's path for GPUs too.
"""

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from twfs.checksums import (
    checksums_of,
    flat_bytes,
    host_sums_of,
    lanes_of,
    lanes_of_rows,
    lanes_on_device,
    layer_sums_of,
    row_lanes_on_device,
    xxh3_of,
)
from twfs.errors import InvalidInput


def lanes_by_loop(data: bytes) -> tuple[int, int]:
    padded = data + bytes(-len(data) % 4)
    plain = weighted = 0
    for index in range(len(padded) // 4):
        lane = int.from_bytes(padded[4 * index : 4 * index + 4], "little")
        plain += lane
        weighted += (index + 1) * lane
    return plain % 2**64, weighted % 2**64


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


@given(st.binary(max_size=9000))
def test_lanes_of_any_bytes_equal_a_plain_loop(data: bytes) -> None:
    assert lanes_of(data) == lanes_by_loop(data)
    assert lanes_on_device(tensor_of(data)) == lanes_by_loop(data)


@pytest.mark.parametrize("byte_count", [0, 1, 3, 4, 4095, 4096, 4097, 262_144, 262_151, 400_000])
@pytest.mark.parametrize("fill", [None, 0x80, 0xFF])
def test_lanes_of_every_length_and_of_set_sign_bits_equal_a_plain_loop(
    byte_count: int, fill: int | None
) -> None:
    random = np.random.default_rng(byte_count).bytes(byte_count)
    data = random if fill is None else bytes([fill]) * byte_count
    assert lanes_of(data) == lanes_by_loop(data)
    assert lanes_on_device(tensor_of(data)) == lanes_by_loop(data)


def test_lane_sums_wrap_at_64_bits() -> None:
    data = np.full((64 << 20) // 4, 0xFFFFFFFF, np.uint32)
    lanes = data.size
    weights = lanes * (lanes + 1) // 2
    assert weights * 0xFFFFFFFF > 2**64
    expected = (lanes * 0xFFFFFFFF % 2**64, weights * 0xFFFFFFFF % 2**64)
    assert lanes_of(data) == expected
    assert lanes_on_device(torch.from_numpy(data.view(np.uint8))) == expected


@given(st.binary(min_size=8, max_size=600), st.data())
def test_any_flipped_bit_and_any_two_swapped_lanes_change_the_lane_sums(
    data: bytes, draw: st.DataObject
) -> None:
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    assert lanes_of(bytes(flipped)) != lanes_of(data)
    lanes = np.frombuffer(data[: len(data) // 4 * 4], "<u4").copy()
    one = draw.draw(st.integers(0, lanes.size - 1))
    other = draw.draw(st.integers(0, lanes.size - 1))
    swapped = lanes.copy()
    swapped[one], swapped[other] = lanes[other], lanes[one]
    assert (lanes_of(swapped) == lanes_of(lanes)) == (lanes[one] == lanes[other])


def test_a_stuck_sign_bit_in_every_lane_is_seen() -> None:
    data = np.random.default_rng(3).integers(0, 2**32, 16384, dtype=np.uint32)
    assert lanes_of(data | np.uint32(1 << 31)) != lanes_of(data)
    assert lanes_of(data & np.uint32(0x7FFFFFFF)) != lanes_of(data)


def test_unaligned_memory_has_the_same_lane_sums() -> None:
    data = np.random.default_rng(4).integers(0, 256, 70_001, dtype=np.uint8)
    for skip in (1, 3, 5):
        part = data[skip:]
        assert lanes_of(part) == lanes_by_loop(part.tobytes())
        assert lanes_on_device(torch.from_numpy(part)) == lanes_by_loop(part.tobytes())


def test_row_sums_give_the_lane_sums_of_each_payload_among_them() -> None:
    data = np.random.default_rng(5).integers(0, 256, 40 * 4096, dtype=np.uint8)
    rows = row_lanes_on_device(torch.from_numpy(data)).numpy().view(np.uint64)
    first, count = np.array([0, 3, 10, 39], np.uint64), np.array([2, 7, 29, 1], np.uint64)
    plain, weighted = lanes_of_rows(rows, first, count)
    for i in range(4):
        begin, end = int(first[i]) * 4096, int(first[i] + count[i]) * 4096
        assert (int(plain[i]), int(weighted[i])) == lanes_of(data[begin:end])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float32]
)
def test_tensors_of_every_dtype_sum_as_their_bytes(dtype: torch.dtype) -> None:
    data = tensor_of(np.random.default_rng(6).bytes(4096))
    tensor = data.view(dtype).reshape(2, -1)
    assert checksums_of(tensor) == checksums_of(data.numpy().tobytes())


def test_xxh3_is_the_128_bit_digest_of_the_bytes() -> None:
    data = np.arange(1000, dtype=np.int32)
    assert xxh3_of(data) == xxhash.xxh3_128_digest(data.tobytes())
    assert xxh3_of(data.data) == xxh3_of(data.tobytes())
    assert len(xxh3_of(b"")) == 16


def test_layer_sums_are_one_per_equal_run() -> None:
    payload = np.random.default_rng(7).bytes(3 * 5000)
    assert layer_sums_of(payload, 3) == tuple(
        xxhash.xxh3_64_intdigest(payload[i : i + 5000]) for i in (0, 5000, 10000)
    )
    assert layer_sums_of(payload, 0) == ()
    with pytest.raises(InvalidInput, match="15000 bytes cannot be cut into 7"):
        layer_sums_of(payload, 7)


def test_what_is_not_contiguous_memory_is_refused() -> None:
    for data in (np.zeros((4, 4))[:, 1], torch.zeros(4, 4).t(), memoryview(bytes(9))[::2], 5):
        with pytest.raises(InvalidInput):
            lanes_of(data)
    with pytest.raises(InvalidInput, match="read-only"):
        flat_bytes(b"bytes are read-only", writable=True)


@pytest.mark.parametrize(("byte_count", "layers"), [(8 << 20, 32), (4096, 1), (4097, 0), (1000, 8)])
def test_host_sums_are_those_taken_one_by_one(byte_count: int, layers: int) -> None:
    data = np.random.default_rng(byte_count).integers(0, 256, byte_count, np.uint8)
    assert host_sums_of(data, layers) == (xxh3_of(data), layer_sums_of(data, layers))

"""A block is handed out only if header and payload are what its record says."""

import os
from pathlib import Path

import pytest

from support.warehouses import (
    BIG,
    HYBRID,
    MHA,
    MLA,
    block_at,
    chain_of,
    flip_device,
    flip_payload,
    make_warehouse,
    open_warehouse,
    payload_of,
    put,
    put_whole,
    read_all,
)
from twfs.devices.payload import aligned_buffer, header_complaint, read_payload
from twfs.errors import BadPayload, DeviceError
from twfs.layout import Layout
from twfs.units import ALIGN, EXTENTS_MAX, ByteCount
from twfs.warehouse import Warehouse


@pytest.mark.parametrize("layout", [MHA, MLA, BIG])
def test_header_and_payload_are_what_was_put(scratch: Path, layout: Layout) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", layout)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 2)
        header, payload = read_payload(warehouse.devices, key, block)
        assert bytes(payload) == payload_of(layout, names.hash_at(2)).tobytes()
        assert header.model_name == "m"
        assert header.fingerprint == layout.fingerprint
        assert len(header.layer_sums) == layout.groups[0].layers
        assert header_complaint(header, key, block) is None


def test_blocks_cut_into_several_extents_are_whole(scratch: Path) -> None:
    """Free space in crumbs: blocks are cut, and every reader puts them together."""
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", BIG), warehouse._core
        crumb = ByteCount(96 << 10)
        with core.lock:
            held = sorted(
                core.allocator.reserve([crumb] * 400), key=lambda extents: extents[0].offset
            )
            for extents in held[::2]:
                core.allocator.release(extents)
        names = chain_of(model, 6)
        put(warehouse, model, names)
        for index in range(6):
            key, block = block_at(warehouse, model, names, index)
            assert 3 <= len(block.extents) <= EXTENTS_MAX
            _, payload = read_payload(warehouse.devices, key, block)
            assert bytes(payload) == payload_of(BIG, names.hash_at(index)).tobytes()
        assert read_all(warehouse, model, names) == 6
        with core.lock:
            for extents in held[1::2]:
                core.allocator.release(extents)
    with open_warehouse(scratch) as warehouse:
        assert read_all(warehouse, warehouse.open_model("m"), names) == 6


@pytest.mark.parametrize("byte", [0, 700, ALIGN - 1])
def test_a_changed_header_is_bad(scratch: Path, byte: int) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 1)
        put(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 0)
        flip_device(warehouse, block, byte)
        with pytest.raises(BadPayload, match=key.prefix_hash.hex()):
            read_payload(warehouse.devices, key, block)


@pytest.mark.parametrize("byte", [0, 1000, MHA.block_bytes() - 1])
def test_a_changed_payload_is_bad_but_its_padding_does_not_matter(scratch: Path, byte: int) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 1)
        put(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 0)
        flip_payload(warehouse, block, MHA.block_bytes())
        read_payload(warehouse.devices, key, block)
        flip_payload(warehouse, block, byte)
        with pytest.raises(BadPayload, match="checksums"):
            read_payload(warehouse.devices, key, block)


def test_another_blocks_bytes_in_its_place_are_bad(scratch: Path) -> None:
    """A misdirected write: whole, with right sums, but not this block."""
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", HYBRID)
        names = chain_of(model, 2)
        put_whole(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 0, group=1)
        _, other = block_at(warehouse, model, names, 1, group=1)
        path = warehouse.devices[0].path
        image = path.read_bytes()
        taken = image[other.extents[0].offset : other.extents[0].offset + other.device_bytes]
        descriptor = os.open(path, os.O_WRONLY)
        os.pwrite(descriptor, taken, block.extents[0].offset)
        os.close(descriptor)
        with pytest.raises(BadPayload, match=r"names|prefix hash"):
            read_payload(warehouse.devices, key, block)


def test_a_device_that_ended_is_a_device_error(scratch: Path) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 1)
        put(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 0)
        with pytest.raises(DeviceError, match="gone"):
            read_payload({}, key, block)
        os.truncate(warehouse.devices[0].path, 1 << 20)
        with pytest.raises(DeviceError):
            read_payload(warehouse.devices, key, block)


def test_buffers_are_aligned_and_zero() -> None:
    import numpy as np

    for byte_count in (ALIGN, 3 << 20):
        view = np.frombuffer(aligned_buffer(byte_count), np.uint8)
        assert view.nbytes == byte_count
        assert view.ctypes.data % ALIGN == 0
        assert not view.any()

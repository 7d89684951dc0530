"""What is evicted or removed with erasing leaves no header, and no rebuild brings it back.

Its extents are handed out only when the headers are overwritten and flushed.
"""

import threading
from pathlib import Path

import pytest

from support.rebuilding import assert_back, state_of
from support.warehouses import (
    DEVICE_BYTES,
    HYBRID,
    MHA,
    block_at,
    chain_of,
    flip_payload,
    open_warehouse,
    put,
    put_whole,
    read_all,
    settle,
)
from twfs.core.state import Core
from twfs.devices.device import Device
from twfs.devices.limbo import Freed
from twfs.errors import DeviceError, InvalidInput, NoSuchBlock, NoSuchModel
from twfs.recovery.rebuild import rebuild
from twfs.units import ALIGN, ByteOffset
from twfs.warehouse import Warehouse

BLOCK = 8192


def headers_of(warehouse: Warehouse) -> dict[bytes, tuple[Device, ByteOffset]]:
    """Where the header of each block is."""
    return {
        bytes(name[1]): (warehouse.devices[block.extents[0].device], block.extents[0].offset)
        for name, block in state_of(warehouse).blocks.items()
    }


def first_bytes(place: tuple[Device, ByteOffset]) -> bytes:
    with place[0].path.open("rb") as file:
        file.seek(place[1])
        return file.read(ALIGN)


def test_what_was_evicted_with_erasing_does_not_come_back(scratch: Path) -> None:
    with open_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 10)
        put(warehouse, model, names)
        places = headers_of(warehouse)
        done = warehouse.operate("evict_erasing", wanted_bytes=4 * BLOCK)
        assert done == {"freed_bytes": 4 * BLOCK, "waiting_blocks": 0}
        for index in range(10):
            zeros = first_bytes(places[bytes(names.hash_at(index))]) == bytes(ALIGN)
            assert zeros == (index >= 6)
        assert warehouse.statistics()["counters"]["erased_blocks"] == 4
        before = state_of(warehouse)
    assert rebuild(scratch, force=True).accepted == 6
    with open_warehouse(scratch) as warehouse:
        assert_back(before, state_of(warehouse), exactly=True)


def test_a_session_removed_with_erasing_does_not_come_back_and_what_it_shared_does(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("h", HYBRID)
        stays, goes = chain_of(model, 6), chain_of(model, 8, 3, fork=4)
        put_whole(warehouse, model, stays)
        put_whole(warehouse, model, goes)
        head = goes.hash_at(7).hex()
        assert warehouse.operate("remove_erasing", model="h", head=head)["freed_bytes"] > 0
        before = state_of(warehouse)
    rebuild(scratch, force=True)
    with open_warehouse(scratch) as warehouse:
        assert_back(before, state_of(warehouse), exactly=True)


def test_extents_are_handed_out_only_after_their_headers_are_overwritten_and_flushed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    began, gate = threading.Event(), threading.Event()
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        put(warehouse, model, chain_of(model, 5))
        write, flush, free = Device.write_from, Device.flush, int(core.allocator.free_bytes)

        def writing(device, buffers, offset):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
            steps.append("write")
            with core.metadata.read() as view:  # the removal is durable by now
                assert sum(run.length for run in view.runs("free")) == free + 2 * BLOCK
            began.set()
            gate.wait()
            write(device, buffers, offset)

        def flushing(device: Device) -> None:
            steps.append("flush")
            assert core.allocator.free_bytes == free
            flush(device)

        monkeypatch.setattr(Device, "write_from", writing)
        monkeypatch.setattr(Device, "flush", flushing)
        thread = threading.Thread(
            target=lambda: warehouse.operate("evict_erasing", wanted_bytes=2 * BLOCK)
        )
        thread.start()
        began.wait()
        assert core.allocator.free_bytes == free
        assert thread.is_alive()
        gate.set()
        thread.join()
        assert steps == ["write", "write", "flush"]
        assert core.allocator.free_bytes == free + 2 * BLOCK


def test_what_a_lease_reads_is_erased_when_the_lease_ends(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        places = headers_of(warehouse)
        with warehouse.match(model, names):
            head = names.hash_at(2).hex()
            done = warehouse.operate("remove_erasing", model="m", head=head)
            assert done["waiting_blocks"] == 3
            assert all(first_bytes(place) != bytes(ALIGN) for place in places.values())
        settle(warehouse)
        warehouse._core.wiper.wait()
        assert all(first_bytes(place) == bytes(ALIGN) for place in places.values())
        assert warehouse._core.to_erase == set()
    assert rebuild(scratch, force=True).accepted == 0
    with open_warehouse(scratch):
        pass


def test_a_header_that_cannot_be_overwritten_is_an_error_and_its_extent_is_free_all_the_same(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 2))

        def failing(*_: object) -> None:
            raise DeviceError("EIO")

        with monkeypatch.context() as patch:
            patch.setattr(Device, "write_from", failing)
            with pytest.raises(DeviceError, match="EIO"):
                warehouse.operate("evict_erasing", wanted_bytes=2 * BLOCK)
        assert warehouse.space().free_bytes == warehouse.space().total_bytes
        assert warehouse.operate("evict_erasing", wanted_bytes=1)["freed_bytes"] == 0


def test_a_hole_has_nothing_to_erase_and_an_ordinary_eviction_leaves_headers(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 2)
        flip_payload(warehouse, block)
        assert warehouse.report_block(key, block.generation)
        warehouse.operate("evict_erasing", wanted_bytes=1)
        places = headers_of(warehouse)
        assert set(places) <= {bytes(names.hash_at(index)) for index in range(2)}
        warehouse.evict(1 << 30)  # type: ignore[arg-type]
        assert any(first_bytes(place) != bytes(ALIGN) for place in places.values())


def test_arguments_are_checked(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, names := chain_of(model, 2))
        for error, verb, arguments in (
            (InvalidInput, "evict_erasing", {"wanted_bytes": -1}),
            (InvalidInput, "remove_erasing", {"model": "m", "head": "zz"}),
            (NoSuchModel, "remove_erasing", {"model": "n", "head": "00" * 16}),
            (NoSuchBlock, "remove_erasing", {"model": "m", "head": "00" * 16}),
        ):
            with pytest.raises(error):
                warehouse.operate(verb, **arguments)
        assert read_all(warehouse, model, names) == 2


def test_a_closing_warehouse_lets_go_without_erasing(scratch: Path) -> None:
    """Whoever asked for it has not been told that it was done."""
    with open_warehouse(scratch) as warehouse:
        core: Core = warehouse._core
        free = core.allocator.reserve([2 * ALIGN])[0]  # type: ignore[list-item]
        core.wiper.close()
        core.wiper.hand_out(Freed(list(free), list(free)))
        assert core.allocator.free_bytes == core.allocator.total_bytes

"""A rebuild brings back every block that was published and not overwritten, and no other bytes.

It believes nothing but what this warehouse wrote where it lies.
Random warehouses lose their metadata in several ways. `TWFS_REBUILD_SEEDS=500 pytest
tests/unit/test_rebuild.py -k random` tries many.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.rebuilding import assert_back, fill, state_of
from support.warehouses import (
    BIG,
    DEVICE_BYTES,
    MHA,
    Payload,
    block_at,
    chain_of,
    flip_payload,
    make_warehouse,
    open_warehouse,
    own_names,
    payloads_of,
    put,
    read_all,
    settle,
    upload_all,
)
from twfs.devices.device import Device
from twfs.devices.roster import newest_roster, write_roster
from twfs.errors import (
    CorruptMetadata,
    CorruptSuperblock,
    DeviceError,
    InvalidInput,
    NoSuchWarehouse,
    WarehouseBusy,
    WarehouseExists,
    WrongDevice,
)
from twfs.prefix import Names
from twfs.records import DATA_START, BlockKey, Extent, Header
from twfs.recovery import scanning
from twfs.recovery.rebuild import Report, rebuild
from twfs.recovery.scanning import Cause, Progress
from twfs.store import Model, PutOutcome
from twfs.units import ALIGN, ByteCount, ByteOffset, DeviceIndex, Generation
from twfs.warehouse import Warehouse

SEEDS = int(os.environ.get("TWFS_REBUILD_SEEDS", "5"))
TWO = (DEVICE_BYTES, DEVICE_BYTES)


def lose(directory: Path) -> None:
    shutil.rmtree(directory / "meta")


def lose_heat_too(directory: Path) -> None:
    lose(directory)
    (directory / "heat").unlink()


def truncate(directory: Path) -> None:
    path = directory / "meta" / "data.mdb"
    os.truncate(path, path.stat().st_size // 2)


def scribble(directory: Path) -> None:
    """Garbage in the middle of every page but the first two: LMDB may crash on it."""
    path = directory / "meta" / "data.mdb"
    data = bytearray(path.read_bytes())
    for start in range(2 * ALIGN, len(data), ALIGN):
        data[start + 8 : start + 64] = b"\xff" * 56
    path.write_bytes(data)


def empty(directory: Path) -> None:
    (directory / "meta" / "data.mdb").write_bytes(b"")


WAYS: tuple[Callable[[Path], None], ...] = (lose, lose_heat_too, truncate, scribble, empty)


def rejected(report: Report, cause: Cause) -> int:
    return report.rejected.get(cause.value, 0)


def lost_and_rebuilt(directory: Path, way: Callable[[Path], None] = lose) -> Report:
    way(directory)
    return rebuild(directory)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_warehouses_come_back_and_go_on(
    scratch: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    if seed % 2:  # so that many blocks are cut by the end of a window
        monkeypatch.setattr(scanning, "WINDOW_BYTES", 20 * ALIGN)
        monkeypatch.setattr(scanning, "WINDOW_BYTES_MIN", 20 * ALIGN)
    with open_warehouse(scratch, (DEVICE_BYTES,) * chance.randrange(1, 4)) as warehouse:
        exactly = fill(warehouse, chance, 40)
        before = state_of(warehouse)
    report = lost_and_rebuilt(scratch, WAYS[seed % len(WAYS)])
    assert report.headers == report.accepted + sum(report.rejected.values())
    with open_warehouse(scratch) as warehouse:
        after = state_of(warehouse)
        assert_back(before, after, exactly=exactly)
        assert report.accepted == len(after.blocks)
        assert report.detached == sum(block.detached for block in after.blocks.values())
        fill(warehouse, chance, 10)
        fresh = [b for n, b in state_of(warehouse).blocks.items() if n not in after.blocks]
        assert all(b.generation >= before.generation and b.ino >= before.ino for b in fresh)
    rebuild(scratch, force=True)  # of a warehouse that is fine it makes one that is fine
    with open_warehouse(scratch):
        pass


def test_what_was_evicted_under_pressure_is_overwritten_and_what_is_live_comes_back(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        big, small = warehouse.open_model("big", BIG), warehouse.open_model("small", MHA)
        for seed in range(12):  # never a whole number of the one in the place of the other
            put(warehouse, big, chain_of(big, 7 + seed % 3, seed))
            put(warehouse, small, chain_of(small, 31 + seed, seed))
        settle(warehouse)
        assert warehouse.statistics()["counters"]["evicted_blocks"] > 30
        before = state_of(warehouse)
    report = lost_and_rebuilt(scratch)
    with open_warehouse(scratch) as warehouse:
        assert_back(before, state_of(warehouse), exactly=False)
    assert report.headers == report.accepted + sum(report.rejected.values())


@contextmanager
def fragmented(warehouse: Warehouse) -> Iterator[None]:
    """Meanwhile free space is in runs of 96 KiB, so that a large block takes several."""
    core = warehouse._core
    with core.lock:
        taken = [
            Extent(device.index, ByteOffset(at), ByteCount(160 << 10))
            for device in core.devices.values()
            for at in range(DATA_START, device.size_bytes - (256 << 10), 256 << 10)
        ]
        core.allocator.take(taken)
    yield
    with core.lock:
        core.allocator.release(taken)


def put_split(warehouse: Warehouse) -> tuple[Model, Names]:
    """A chain of four blocks in several extents each, some of them on two devices."""
    big = warehouse.open_model("big", BIG)
    names = chain_of(big, 4)
    with fragmented(warehouse):
        assert put(warehouse, big, names).held == 4
    blocks = [block_at(warehouse, big, names, index)[1] for index in range(4)]
    assert max(len(block.extents) for block in blocks) > 3
    assert any(len({extent.device for extent in block.extents}) == 2 for block in blocks)
    return big, names


def reported(warehouse: Warehouse, model: Model, names: Names, index: int) -> tuple[BlockKey, int]:
    """What a reader reports of a block."""
    key, block = block_at(warehouse, model, names, index)
    return key, block.generation


def test_blocks_in_several_extents_over_two_devices_come_back(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        big, names = put_split(warehouse)
        before = state_of(warehouse)
        # One of them is damaged behind its first extent.
        block = block_at(warehouse, big, names, 3)[1]
        flip_payload(warehouse, replace(block, extents=block.extents[-1:]), -ALIGN)
        warehouse.report_block(*reported(warehouse, big, names, 3))
    report = lost_and_rebuilt(scratch)
    del before.blocks[("big", bytes(names.hash_at(3)), 0, 0)]
    with open_warehouse(scratch) as warehouse:
        assert_back(before, state_of(warehouse), exactly=False)
        assert read_all(warehouse, warehouse.open_model("big"), names) == 3
    assert rejected(report, Cause.PAYLOAD) >= 1


def test_a_damaged_block_is_dropped_and_counted_and_its_children_are_detached(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names)
        flip_payload(warehouse, block_at(warehouse, model, names, 2)[1])
        assert warehouse.report_block(*reported(warehouse, model, names, 2))  # a hole
    report = lost_and_rebuilt(scratch)
    assert (report.accepted, report.detached, rejected(report, Cause.PAYLOAD)) == (5, 3, 1)
    with open_warehouse(scratch) as warehouse:
        assert read_all(warehouse, warehouse.open_model("m"), names) == 2
        model = warehouse.open_model("m")
        assert len(warehouse.detached(model.id)) == 3
        assert put(warehouse, model, names).held == 6
        assert read_all(warehouse, model, names) == 6


def put_bytes(warehouse: Warehouse, model: Model, seed: int, payload: Payload) -> None:
    """Put one block of these bytes."""
    assert warehouse.put(model, chain_of(model, 1, seed), [payload]).held == 1


def image_of(warehouse: Warehouse, start: int, length: int) -> bytes:
    with warehouse.devices[0].path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def test_a_forged_header_in_kv_bytes_is_not_believed(scratch: Path) -> None:
    """Neither with the block around it, nor when that is lost: it is not sealed."""
    with open_warehouse(scratch) as warehouse:
        model, small = warehouse.open_model("big", BIG), warehouse.open_model("small", MHA)
        put(warehouse, small, chain_of(small, 1))  # lies first
        _, real = block_at(warehouse, small, chain_of(small, 1), 0)
        assert real.extents[0].offset == DATA_START
        payload = payloads_of(BIG, chain_of(model, 1, 1))[0].copy()
        place = 4 * ALIGN  # of the forgery in the payload
        inner = chain_of(small, 1, 77)
        extent = replace(real.extents[0], offset=ByteOffset(DATA_START + 3 * ALIGN + place))
        forged = Header(
            warehouse.uuid, warehouse.devices[0].uuid, MHA.fingerprint, "small", 0, 0, 0,
            inner.hash_at(0),
            replace(real, extents=(extent,), generation=Generation(real.generation + 5)),
        )  # fmt: skip
        body = image_of(warehouse, DATA_START + ALIGN, ALIGN)
        packed = forged.pack(b"not the secret of the warehouse!") + body
        payload[place : place + 2 * ALIGN] = np.frombuffer(packed, np.uint8)
        put_bytes(warehouse, model, 1, payload)
        _, around = block_at(warehouse, model, chain_of(model, 1, 1), 0)
        assert around.extents[0].offset == DATA_START + 2 * ALIGN
        warehouse._closing.set()
    report = lost_and_rebuilt(scratch)
    assert (report.accepted, rejected(report, Cause.FORGED)) == (2, 1)
    with (scratch / "device0.img").open("r+b") as file:  # the block around it is lost now
        file.seek(DATA_START + 2 * ALIGN)
        file.write(bytes(ALIGN))
    report = lost_and_rebuilt(scratch)
    assert (report.accepted, rejected(report, Cause.FORGED)) == (1, 1)


def test_a_genuine_header_that_was_copied_elsewhere_is_not_believed(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, small = warehouse.open_model("big", BIG), warehouse.open_model("small", MHA)
        put(warehouse, small, chain_of(small, 1))
        copied = image_of(warehouse, DATA_START, 2 * ALIGN)
        payload = payloads_of(BIG, chain_of(model, 1, 1))[0].copy()
        payload[: 2 * ALIGN] = np.frombuffer(copied, np.uint8)
        put_bytes(warehouse, model, 1, payload)
        before = {name: block.extents for name, block in state_of(warehouse).blocks.items()}
    report = lost_and_rebuilt(scratch)
    assert (report.accepted, rejected(report, Cause.MISPLACED)) == (2, 1)
    with Warehouse.open(scratch) as warehouse:
        after = {name: block.extents for name, block in state_of(warehouse).blocks.items()}
        assert after == before


@pytest.mark.parametrize("cut", [False, True])
def test_a_genuine_header_replayed_at_its_old_place_in_a_newer_payload_is_not_believed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    if cut:  # the block around it is verified after the pass, what lies in it before
        monkeypatch.setattr(scanning, "WINDOW_BYTES", 8 * ALIGN)
        monkeypatch.setattr(scanning, "WINDOW_BYTES_MIN", 8 * ALIGN)
    with open_warehouse(scratch) as warehouse:
        small, model = warehouse.open_model("small", MHA), warehouse.open_model("big", BIG)
        names = chain_of(small, 4)
        put(warehouse, small, names)
        old = image_of(warehouse, DATA_START + 2 * ALIGN, 6 * ALIGN)  # blocks 1 to 3
        warehouse.remove(small.id, names.hash_at(3))
        settle(warehouse)
        payload = payloads_of(BIG, chain_of(model, 1, 1))[0].copy()
        payload[ALIGN : 7 * ALIGN] = np.frombuffer(old, np.uint8)
        put_bytes(warehouse, model, 1, payload)
        _, around = block_at(warehouse, model, chain_of(model, 1, 1), 0)
        assert around.extents[0].offset == DATA_START
    report = lost_and_rebuilt(scratch)
    assert (report.accepted, rejected(report, Cause.OVERWRITTEN)) == (1, 3)
    with Warehouse.open(scratch) as warehouse:
        assert [model for model, *_ in state_of(warehouse).blocks] == ["big"]


@pytest.mark.parametrize("newer_lies_first", [False, True])
def test_of_two_lives_of_one_block_the_newer_comes_back(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, newer_lies_first: bool
) -> None:
    monkeypatch.setattr(scanning, "WINDOW_BYTES", 20 * ALIGN)  # each life in one of its own
    monkeypatch.setattr(scanning, "WINDOW_BYTES_MIN", 20 * ALIGN)
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        device = warehouse._core.allocator._devices[DeviceIndex(0)]
        before = state_of(warehouse)
        for first in (not newer_lies_first, newer_lies_first):
            if not first:  # so that it comes to lie behind
                device.cut(DATA_START, 1 << 20)
            put(warehouse, model, names)
            if not first:
                device.add(DATA_START, 1 << 20)
            before = state_of(warehouse)
            if first != newer_lies_first:
                warehouse.remove(model.id, names.hash_at(2))
                settle(warehouse)
    report = lost_and_rebuilt(scratch)
    assert (report.accepted, rejected(report, Cause.OLDER)) == (3, 3)
    with open_warehouse(scratch) as warehouse:
        assert_back(before, state_of(warehouse), exactly=True)


def test_a_written_block_that_was_not_published_may_come_back_whole(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        upload_all(warehouse, model, names).abandon()
        generation = state_of(warehouse).generation
    assert lost_and_rebuilt(scratch).accepted == 3
    with open_warehouse(scratch) as warehouse:
        assert read_all(warehouse, warehouse.open_model("m"), names) == 3
        assert state_of(warehouse).generation >= generation


def test_blocks_of_an_epoch_that_is_over_never_come_back(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 5))
        model = warehouse.new_epoch(model)
        names = chain_of(model, 3)
        put(warehouse, model, names)
    report = lost_and_rebuilt(scratch)
    assert report.accepted == 3
    assert rejected(report, Cause.OLD_EPOCH) >= 2  # where they are not overwritten
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m")
        assert model.epoch == 1
        assert read_all(warehouse, model, names) == 3


def test_an_old_roster_neither_revives_an_old_epoch_nor_gives_numbers_twice(
    scratch: Path,
) -> None:
    """As when only a device that is lost had the newest: headers say that there was a later one."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 5))
        core = warehouse._core
        old = replace(core.roster, generation_end=3, ino_end=1 << 20)
        model = warehouse.new_epoch(model)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        before = state_of(warehouse)
    with Warehouse.open(scratch) as warehouse:
        core = warehouse._core
        for sequence in (old.sequence, old.sequence + 1):
            stale = replace(old, sequence=sequence)
            write_roster(core.devices.values(), stale, core.secret, core.uuid)
        found = newest_roster(core.devices.values(), core.secret, core.uuid)
        assert found is not None
        assert found.models[0].epoch == 0
    report = lost_and_rebuilt(scratch)
    assert len([note for note in report.notes if "is old" in note]) == 3
    before.generation = max(block.generation for block in before.blocks.values()) + 1
    before.ino = max(block.ino for block in before.blocks.values()) + 1
    with open_warehouse(scratch) as warehouse:
        assert_back(before, state_of(warehouse), exactly=True)


def test_metadata_older_than_the_devices_is_refused_and_the_rebuild_gives_the_newest(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 3))
    shutil.copytree(scratch / "meta", scratch / "copy")
    with open_warehouse(scratch) as warehouse:
        other = warehouse.open_model("n", MHA)
        put(warehouse, other, chain_of(other, 4))
        put(warehouse, model, chain_of(model, 7, 2))
        before = state_of(warehouse)
    shutil.rmtree(scratch / "meta")
    (scratch / "copy").rename(scratch / "meta")
    with pytest.raises(CorruptMetadata, match="twfs rebuild"):
        Warehouse.open(scratch)
    report = rebuild(scratch)
    with open_warehouse(scratch) as warehouse:
        assert_back(before, state_of(warehouse), exactly=True)
    assert report.old is not None
    assert (Path(report.old) / "data.mdb").exists()
    assert not (scratch / "meta.new").exists()


def test_without_a_device_what_lies_on_the_others_comes_back(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        put_split(warehouse)
        small = warehouse.open_model("small", MHA)
        put(warehouse, small, chain_of(small, 30))
        before = state_of(warehouse)
    (scratch / "device1.img").rename(scratch / "away")
    with pytest.raises(WrongDevice):
        rebuild(scratch)
    report = rebuild(scratch, without=[1])
    assert rejected(report, Cause.NO_DEVICE) > 0
    here = {
        name: block for name, block in before.blocks.items()
        if {extent.device for extent in block.extents} == {0}
    }  # fmt: skip
    with open_warehouse(scratch) as warehouse:
        assert list(warehouse.devices) == [0]
        after = state_of(warehouse)
        assert here.keys() <= after.blocks.keys()
        for name, block in here.items():
            assert replace(after.blocks[name], detached=block.detached) == block


def test_a_device_that_is_missing_among_numbers_is_asked_for(scratch: Path) -> None:
    make_warehouse(scratch, (DEVICE_BYTES,) * 3)
    Warehouse.open(scratch).close()
    lose(scratch)
    (scratch / "device1.img").rename(scratch / "sub")
    with pytest.raises(WrongDevice, match="--without-device 1"):
        rebuild(scratch, [scratch / "device0.img", scratch / "device2.img"])
    report = rebuild(scratch, [scratch / f for f in ("device0.img", "device2.img", "sub")])
    assert sorted(report.devices) == [0, 1, 2]
    with open_warehouse(scratch):
        pass


def test_refusals_say_what_to_do(scratch: Path) -> None:
    home, other = scratch / "w", scratch / "other"
    with open_warehouse(home) as warehouse:
        put(warehouse, model := warehouse.open_model("m", MHA), chain_of(model, 2))
        with pytest.raises(WarehouseBusy):
            rebuild(home, force=True)
    with pytest.raises(WarehouseExists, match="--force"):
        rebuild(home)
    with pytest.raises(NoSuchWarehouse):
        rebuild(scratch / "nowhere")
    with open_warehouse(other):
        pass
    with pytest.raises(WrongDevice, match="2 warehouses"):
        rebuild(home, [other / "device0.img"], force=True)
    with pytest.raises(InvalidInput):
        rebuild(home, [home / "device0.img"], without=[0], force=True)
    lose(home)
    with pytest.raises(NoSuchWarehouse, match="twfs rebuild"):
        Warehouse.open(home)
    secret = (home / "secret").read_bytes()
    (home / "secret").write_bytes((other / "secret").read_bytes())
    with pytest.raises(CorruptMetadata, match="secret"):
        rebuild(home)
    (home / "secret").unlink()
    with pytest.raises(InvalidInput, match="copy of the secret"):
        rebuild(home)
    with pytest.raises(NoSuchWarehouse):
        rebuild(scratch)
    with pytest.raises(CorruptSuperblock):
        rebuild(home, [home / "heat"])
    (home / "secret").write_bytes(secret)
    assert not (home / "meta").exists()
    assert rebuild(home).accepted == 2
    with open_warehouse(home):
        pass


def test_the_secret_comes_from_the_old_metadata_where_its_file_is_lost(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 2))
    (scratch / "secret").unlink()
    assert rebuild(scratch, force=True).accepted == 2
    with open_warehouse(scratch):
        assert (scratch / "secret").exists()


def test_bytes_that_cannot_be_read_cost_their_blocks_only(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 20)
        put(warehouse, model, names)
        bad = block_at(warehouse, model, names, 10)[1].extents[0].offset + ALIGN
    read = Device.read_into

    def failing(device: Device, buffers: Sequence[memoryview], offset: ByteOffset) -> None:
        if offset <= bad < offset + sum(map(len, buffers)):
            raise DeviceError("EIO")
        read(device, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(Device, "read_into", failing)
        report = lost_and_rebuilt(scratch)
    assert (report.accepted, report.unreadable_bytes) == (19, ALIGN)
    assert rejected(report, Cause.PAYLOAD) == 1
    with open_warehouse(scratch) as warehouse:
        assert read_all(warehouse, warehouse.open_model("m"), names) == 10


def test_a_device_that_fails_altogether_ends_the_rebuild_and_nothing_has_changed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        put(warehouse, model := warehouse.open_model("m", MHA), chain_of(model, 2))
    shutil.move(scratch / "meta", scratch / "away")
    read = Device.read_into

    def failing(device: Device, buffers: Sequence[memoryview], offset: ByteOffset) -> None:
        if offset >= DATA_START:
            raise DeviceError("EIO")
        read(device, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(Device, "read_into", failing)
        patch.setattr(scanning, "UNREADABLE_MAX", 50)
        with pytest.raises(DeviceError, match="--without-device 0"):
            rebuild(scratch)
    shutil.move(scratch / "away", scratch / "meta")
    with open_warehouse(scratch) as warehouse:
        assert len(state_of(warehouse).blocks) == 2


def test_a_retired_extent_stays_retired(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 2)
        flip_payload(warehouse, block)
        assert warehouse.report_block(key, block.generation)
        limbo = warehouse.space().free_bytes
    rebuild(scratch, force=True)
    with open_warehouse(scratch) as warehouse:
        with warehouse._core.metadata.read() as view:
            assert list(view.runs("limbo")) == list(block.extents)
        assert warehouse.space().free_bytes == limbo


def test_a_parent_that_was_refused_costs_no_published_child(scratch: Path) -> None:
    """Its header lies on the device too, and says another end than fits."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        child = own_names(model, ("child", "parent", 32))
        put(warehouse, model, child)
        refused = put(warehouse, model, own_names(model, ("parent", None, 48)))
        assert refused.outcomes == (PutOutcome.FAILED,)
    assert lost_and_rebuilt(scratch).accepted == 2
    with open_warehouse(scratch) as warehouse:
        assert ("m", bytes(child.hash_at(0)), 0, 0) in state_of(warehouse).blocks


def test_progress_ends_with_everything_and_has_an_estimate(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "ESTIMATE_SECONDS", 0.0)
    with open_warehouse(scratch) as warehouse:
        put(warehouse, model := warehouse.open_model("m", MHA), chain_of(model, 9))
    lose(scratch)
    seen: list[Progress] = []
    rebuild(scratch, watch=seen.append)
    reading = [each for each in seen if each.phase == "reading"]
    assert reading[-1].done == reading[-1].total == DEVICE_BYTES - DATA_START - ALIGN
    assert reading[0].seconds_left is not None
    assert seen[-1].phase == "writing"
    assert seen[-1].done == 9
    with open_warehouse(scratch):
        pass

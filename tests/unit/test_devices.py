"""Devices of an open warehouse: what is wrong with one costs its blocks and nothing else.

A device that is missing, empty, read-only, failing or hanging; adding, draining and removing one
while blocks are read. No byte is wrong, no block is lost that a device still has.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.daemon import running_daemon
from support.loops import loop_device, needs_loops
from support.mounting import until
from support.warehouses import (
    DEVICE_BYTES,
    MHA,
    assert_memory_agrees,
    block_at,
    chain_of,
    flip_payload,
    make_warehouse,
    open_warehouse,
    payloads_of,
    put,
    read_all,
    records_of,
    settle,
    upload_all,
)
from twfs.admin import moving
from twfs.devices import standing
from twfs.devices.formatting import DeviceSpec, inspect
from twfs.errors import (
    DeviceError,
    DeviceInUse,
    DeviceNotEmpty,
    InvalidInput,
    NoSuchDevice,
    ReadOnly,
    TwfsError,
    WarehouseFull,
    WrongDevice,
)
from twfs.prefix import Names
from twfs.store import Model, PutOutcome, ReadOutcome
from twfs.units import ALIGN, ByteCount, DeviceIndex
from twfs.warehouse import Warehouse

TWO = (DEVICE_BYTES, DEVICE_BYTES)


def filled(warehouse: Warehouse, blocks: int = 12) -> tuple[Model, Names]:
    """Put a chain; with two devices, its blocks lie on both by turns."""
    model = warehouse.open_model("m", MHA)
    names = chain_of(model, blocks)
    assert put(warehouse, model, names).held == blocks
    return model, names


def state_of(warehouse: Warehouse, index: int) -> str:
    """How a device stands, as an operator sees it."""
    rows = {row["index"]: row for row in warehouse.operate("device-list")}
    return str(rows[index]["state"])


def on_device(warehouse: Warehouse, index: int) -> int:
    """Blocks with an extent on a device."""
    return sum(1 for _ in moving.blocks_on(warehouse._core, DeviceIndex(index)))


def drained(warehouse: Warehouse, index: int) -> None:
    """Drain a device to its end."""
    warehouse.operate("device-drain", device=index)

    def done() -> bool:
        rows = {row["index"]: row for row in warehouse.operate("device-list")}
        return bool(rows[index]["drain"]["done"])

    until(done, "the drain ends")
    settle(warehouse)


def add_image(warehouse: Warehouse, path: Path) -> int:
    """Add an image file; its number."""
    row = warehouse.operate("device-add", path=str(path), size_bytes=DEVICE_BYTES)
    return int(row["index"])


def test_an_added_device_takes_blocks_and_is_there_after_a_restart(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        before = warehouse.space().free_bytes
        assert add_image(warehouse, scratch / "more.img") == 1
        assert warehouse.space().free_bytes == 2 * before
        model, names = filled(warehouse)
        assert on_device(warehouse, 0) == on_device(warehouse, 1) == 6
        assert read_all(warehouse, model, names) == 12
    with open_warehouse(scratch) as warehouse:
        assert read_all(warehouse, model, names) == 12
        assert state_of(warehouse, 1) == "online"


def test_what_cannot_be_added_is_refused_and_changes_nothing(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        (scratch / "precious").write_bytes(b"data" * 10_000_000)
        with pytest.raises(DeviceInUse):
            warehouse.operate("device-add", path=str(scratch / "precious"))
        with pytest.raises(TwfsError, match="in use"):
            warehouse.operate("device-add", path=str(scratch / "device0.img"), force=True)
        with pytest.raises(InvalidInput, match="absolute"):
            warehouse.operate("device-add", path="here.img", size_bytes=DEVICE_BYTES)
        with pytest.raises(InvalidInput):
            warehouse.operate("device-add", path=str(scratch / "small"), size_bytes=ALIGN)
        assert not (scratch / "small").exists()
        assert len(warehouse.operate("device-list")) == 1


def test_a_drain_moves_every_block_and_leases_keep_the_old_place(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
        info = warehouse.block_info(block_at(warehouse, model, names, 1)[0])
        before = warehouse.match(model, names)
        drained(warehouse, 1)
        assert on_device(warehouse, 1) == 0
        assert read_all(warehouse, model, names) == 12
        into = [bytearray(model.layout.block_bytes()) for _ in range(12)]
        assert before.read_into(into).blocks == 12  # where the blocks were
        assert warehouse.read_block(info).nbytes == len(into[1])  # as the mount reads it
        with pytest.raises(DeviceNotEmpty, match="leases may still read"):
            warehouse.operate("device-remove", device=1)
        after = warehouse.match(model, names)  # a hot block is always under some lease
        before.release()
        settle(warehouse)
        warehouse.operate("device-remove", device=1)
        assert after.read_into(into).blocks == 12
        after.release()
        assert warehouse.space().limbo_bytes == 0


def test_only_an_empty_device_is_removed_and_it_is_nobodys_then(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
        with pytest.raises(DeviceNotEmpty, match=r"holds 6 blocks \(\d+ bytes\)"):
            warehouse.operate("device-remove", device=1)
        assert state_of(warehouse, 1) == "online"
        with pytest.raises(NoSuchDevice, match="there are 0, 1"):
            warehouse.operate("device-remove", device=7)
        drained(warehouse, 1)
        assert warehouse.operate("device-remove", device=1)["not_wiped"] == ""
        assert inspect(scratch / "device1.img") is None
        with pytest.raises(InvalidInput, match="only one"):
            warehouse.operate("device-remove", device=0)
        with pytest.raises(InvalidInput, match="last one"):
            warehouse.operate("device-drain", device=0)
        assert add_image(warehouse, scratch / "third.img") == 2  # a number is given once
        assert read_all(warehouse, model, names) == 12
    with open_warehouse(scratch) as warehouse:
        assert read_all(warehouse, model, names) == 12
        assert sorted(warehouse.devices) == [0, 2]


def test_a_drain_is_durable_and_can_be_taken_back(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "BATCH_BLOCKS_MAX", 1)
    make_warehouse(scratch, TWO)
    with Warehouse.open(scratch) as warehouse:
        filled(warehouse)
        warehouse.operate("device-drain", device=1, rate_bytes_s=1)
        until(lambda: on_device(warehouse, 1) == 5, "one block has moved")
    with open_warehouse(scratch) as warehouse:
        assert on_device(warehouse, 1) == 5
        assert state_of(warehouse, 1) == "draining"
        free = warehouse.space().free_bytes
        model = warehouse.open_model("m")
        put(warehouse, model, chain_of(model, 10, 5))
        assert warehouse.space().free_bytes == free - 10 * 2 * ALIGN  # all on the other
        warehouse.resume()
        until(lambda: on_device(warehouse, 1) == 0, "the drain goes on")
        drained(warehouse, 1)
        assert warehouse.operate("device-online", device=1)["state"] == "online"
        put(warehouse, model, chain_of(model, 10, 6))
        assert on_device(warehouse, 1) == 5


def test_a_block_that_does_not_verify_is_a_hole_after_the_drain(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
        flip_payload(warehouse, block_at(warehouse, model, names, 5)[1])
        drained(warehouse, 1)
        assert warehouse.lookup(model, names) == 5
        assert put(warehouse, model, names).held == 12
        warehouse.operate("device-remove", device=1)  # what was retired there goes with it
        assert read_all(warehouse, model, names) == 12


def test_a_missing_device_costs_its_blocks_until_it_is_back(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
    (scratch / "device1.img").rename(scratch / "away")
    with pytest.raises(WrongDevice, match=r"device1\.img"):
        Warehouse.open(scratch, degraded=False)
    with open_warehouse(scratch) as warehouse:
        assert "device1.img" in warehouse.notes[0]
        assert state_of(warehouse, 1) == "offline"
        assert read_all(warehouse, model, names) == 1  # block 1 is on device 1
        assert "device 1, which is offline" in warehouse.explain(model.id, names).cause
        assert warehouse.space().free_bytes < DEVICE_BYTES
    (scratch / "away").rename(scratch / "device1.img")
    with open_warehouse(scratch) as warehouse:
        assert read_all(warehouse, model, names) == 12


def test_blocks_of_an_offline_device_are_stored_anew_and_free_there(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
    (scratch / "device1.img").rename(scratch / "away")
    with open_warehouse(scratch) as warehouse:
        result = put(warehouse, model, names)
        assert result.outcomes.count(PutOutcome.PUBLISHED) == 6
        assert read_all(warehouse, model, names) == 12
        (scratch / "away").rename(scratch / "device1.img")
        assert warehouse.operate("device-online", device=1)["blocks"] == 0
        assert read_all(warehouse, model, names) == 12
        assert put(warehouse, model, chain_of(model, 8, 3)).held == 8
        assert on_device(warehouse, 1) == 4


def test_no_wrong_device_stops_the_warehouse_but_all_of_them_do(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
    image = (scratch / "device1.img").read_bytes()
    os.truncate(scratch / "device1.img", DEVICE_BYTES // 2)
    for damaged in (None, bytes(DEVICE_BYTES)):
        if damaged is not None:
            (scratch / "device1.img").write_bytes(damaged)
        with open_warehouse(scratch) as warehouse:
            assert state_of(warehouse, 1) == "offline"
            assert read_all(warehouse, model, names) == 1
            with pytest.raises(TwfsError):
                warehouse.operate("device-online", device=1)
    (scratch / "device1.img").write_bytes(image)
    with open_warehouse(scratch) as warehouse:
        assert read_all(warehouse, model, names) == 12
    for name in ("device0.img", "device1.img"):
        (scratch / name).write_bytes(bytes(DEVICE_BYTES))
    with pytest.raises(TwfsError, match="superblock"):
        Warehouse.open(scratch)


def test_a_device_that_comes_back_empty_makes_misses_and_no_holes(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
        path = scratch / "device1.img"
        image = path.read_bytes()
        with path.open("r+b") as file:
            file.write(bytes(DEVICE_BYTES))
        key, block = block_at(warehouse, model, names, 1)
        assert not warehouse.report_block(key, block.generation)
        assert state_of(warehouse, 1) == "offline"
        assert read_all(warehouse, model, names) == 1
        with pytest.raises(DeviceError):
            warehouse.read_block(warehouse.block_info(key))
        with path.open("r+b") as file:
            file.write(image)
        warehouse.operate("device-online", device=1)
        assert read_all(warehouse, model, names) == 12
        assert warehouse.statistics()["counters"]["holes"] == 0


def test_a_stale_copy_of_a_device_gives_misses_and_never_its_old_bytes(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, _ = filled(warehouse)
        stale = (scratch / "device1.img").read_bytes()
        warehouse.evict(ByteCount(1 << 30))
        assert put(warehouse, model, chain_of(model, 12, 9)).held == 12
    (scratch / "device1.img").write_bytes(stale)
    warehouse = Warehouse.open(scratch)
    try:
        other = chain_of(model, 12, 9)
        for index in range(12):
            key, block = block_at(warehouse, model, other, index)
            lost = warehouse.report_block(key, block.generation)
            assert lost == (block.extents[0].device == 1)
        assert warehouse.lookup(model, other) == 0 or warehouse.lookup(model, other) == 1
        assert put(warehouse, model, other).held == 12
        assert read_all(warehouse, model, other) == 12
        assert warehouse.check(data=True).findings == ()
    finally:
        warehouse.close()


@contextmanager
def failing(warehouse: Warehouse, index: int, verb: str, number: int = 5) -> Iterator[None]:
    """Let every *verb* (a function of os) on a device fail with the system's error *number*."""
    device = warehouse.devices[index]
    real = getattr(os, verb)

    def bad(descriptor: int, *arguments: object) -> object:
        if descriptor == device._descriptor:
            raise OSError(number, os.strerror(number))
        return real(descriptor, *arguments)

    patch = pytest.MonkeyPatch()
    patch.setattr(os, verb, bad)
    try:
        yield
    finally:
        patch.undo()


@pytest.mark.parametrize(("verb", "number", "puts"), [
    ("fdatasync", 5, 1), ("pwritev", 30, 1), ("pwritev", 1, 1), ("pwritev", 5, 3),
])  # fmt: skip
def test_a_device_that_takes_no_writes_is_read_only_and_the_others_go_on(
    scratch: Path, verb: str, number: int, puts: int
) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
        with failing(warehouse, 1, verb, number):
            for turn in range(puts):
                assert state_of(warehouse, 1) == "online"
                result = put(warehouse, model, chain_of(model, 2, 20 + turn))
                assert PutOutcome.FAILED in result.outcomes
            assert state_of(warehouse, 1) == "read-only"
            assert put(warehouse, model, chain_of(model, 8, 30)).held == 8
        assert read_all(warehouse, model, names) == 12
        assert warehouse.space().free_bytes < DEVICE_BYTES
        if verb == "fdatasync":
            with pytest.raises(ReadOnly, match="final"):
                warehouse.operate("device-online", device=1)
        else:
            assert warehouse.operate("device-online", device=1)["state"] == "online"


def test_a_single_failed_write_costs_that_put_alone(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
        with failing(warehouse, 1, "pwritev"):
            assert put(warehouse, model, chain_of(model, 2, 20)).held < 2
        assert state_of(warehouse, 1) == "online"
        assert put(warehouse, model, chain_of(model, 8, 30)).held == 8
        assert read_all(warehouse, model, names) == 12


def test_a_put_that_no_device_takes_is_refused_and_evicts_nothing(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
        with failing(warehouse, 1, "fdatasync"), failing(warehouse, 0, "fdatasync"):
            put(warehouse, model, chain_of(model, 2, 20))
        with pytest.raises(WarehouseFull, match="no device takes blocks"):
            put(warehouse, model, chain_of(model, 8, 30))
        assert read_all(warehouse, model, names) == 12


def test_a_device_that_hangs_holds_up_nobody_and_nothing_is_stuck_after_it(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "HANG_SECONDS", 0.3)
    gate, real = threading.Event(), os.pwritev
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
        descriptor = warehouse.devices[1]._descriptor

        def slow(fd: int, *arguments: object) -> int:
            if fd == descriptor:
                gate.wait()
            return real(fd, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "pwritev", slow)
        results = [put(warehouse, model, chain_of(model, 4, 20 + n)) for n in range(6)]
        assert results[0].held < 4
        assert state_of(warehouse, 1) == "offline"
        assert all(result.held == 4 for result in results[1:])  # on the other device
        assert read_all(warehouse, model, names) == 1
        assert warehouse._core.reserved_bytes == 0
        monkeypatch.setattr("twfs.admin.members.IDLE_SECONDS_MAX", 0.1)
        with pytest.raises(DeviceError, match="under way"):
            warehouse.operate("device-online", device=1)
        core = warehouse._core
        held_back = core.allocator.free_bytes_of(DeviceIndex(1))
        gate.set()
        until(lambda: core.allocator.free_bytes_of(DeviceIndex(1)) > held_back, "space comes back")
        assert warehouse.operate("device-online", device=1)["state"] == "online"
        assert read_all(warehouse, model, names) == 12


def test_the_blocks_of_a_dead_device_can_be_given_up(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
    (scratch / "device1.img").unlink()
    with open_warehouse(scratch) as warehouse:
        with pytest.raises(DeviceError, match="--lost"):
            warehouse.operate("device-drain", device=1)
        with pytest.raises(DeviceNotEmpty, match="6 blocks"):
            warehouse.operate("device-remove", device=1)
        warehouse.operate("device-drain", device=1, lost=True)
        assert "offline" in warehouse.operate("device-remove", device=1)["not_wiped"]
        assert put(warehouse, model, names).held == 12
        assert read_all(warehouse, model, names) == 12
    with open_warehouse(scratch) as warehouse:
        assert warehouse.notes == []
        assert read_all(warehouse, model, names) == 12


def test_a_put_under_way_ends_on_the_device_that_is_drained_meanwhile(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        begun = upload_all(warehouse, model, names)
        warehouse.operate("device-drain", device=1)
        with pytest.raises(DeviceNotEmpty):
            warehouse.operate("device-remove", device=1)
        assert begun.publish().held == 6
        drained(warehouse, 1)
        assert read_all(warehouse, model, names) == 6
        warehouse.operate("device-remove", device=1)


def test_a_move_is_published_only_after_a_flush_of_its_new_place(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
        core = warehouse._core
        pairs = list(moving.blocks_on(core, DeviceIndex(1)))
        with core.lock:
            core.allocator.allot_on([DeviceIndex(0)])
        with failing(warehouse, 0, "fdatasync"):
            assert moving.move(core, pairs) == moving.Moved()
        assert list(moving.blocks_on(core, DeviceIndex(1))) == pairs
        assert read_all(warehouse, model, names) == 12


def test_a_place_that_was_left_is_not_written_while_a_lease_of_before_may_read_it(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model, names = filled(warehouse)
        core = warehouse._core
        before = warehouse.match(model, names)
        assert moving.move(core, list(moving.blocks_on(core, DeviceIndex(0)))).blocks == 12
        settle(warehouse)
        after = warehouse.match(model, names)
        for turn in range(12):  # each goes to the smallest place that is free
            put(warehouse, model, chain_of(model, 1, 50 + turn))
        into = [bytearray(model.layout.block_bytes()) for _ in range(12)]
        assert before.read_into(into).blocks == 12
        assert warehouse.space().limbo_bytes == 12 * 2 * ALIGN
        before.release()
        settle(warehouse)
        assert warehouse.space().limbo_bytes == 0
        assert after.read_into(into).blocks == 12
        after.release()


def test_a_block_that_changes_during_its_move_stays_as_it_is(scratch: Path) -> None:
    with open_warehouse(scratch, TWO) as warehouse:
        model, names = filled(warehouse)
        core = warehouse._core
        pairs = list(moving.blocks_on(core, DeviceIndex(1)))
        warehouse.operate("device-drain", device=1, rate_bytes_s=1 << 30)
        drained(warehouse, 1)
        assert moving.move(core, pairs) == moving.Moved()  # all of another generation by now
        assert_memory_agrees(core)
        generations = [block.generation for block in records_of(core).values()]
        assert len(set(generations)) == len(generations)
        assert read_all(warehouse, model, names) == 12


def test_clients_of_a_daemon_whose_device_is_cut_off_hit_up_to_there_and_again_later(
    scratch: Path,
) -> None:
    make_warehouse(scratch, TWO)
    with running_daemon(scratch) as daemon, daemon.client() as client:
        model = client.open_model("m", MHA)
        names = chain_of(model, 12)
        assert client.put(model, names, payloads_of(MHA, names)).held == 12
        path = scratch / "device1.img"
        image = path.read_bytes()
        os.truncate(path, 0)
        into = [bytearray(MHA.block_bytes()) for _ in range(12)]
        with client.match(model, names) as match:
            report = match.read_into(into)
        wanted = (ReadOutcome.HIT, ReadOutcome.DEVICE_ERROR) * 6
        assert report.outcomes == wanted
        until(lambda: client.lookup(model, names) == 1, "the report puts it offline")
        assert client.operate("device-list")[1]["state"] == "offline"
        late = daemon.client()  # it gets no descriptor of that device
        with late, late.match(model, names) as match:
            assert match.blocks == 1
        other = chain_of(model, 8, 4)
        assert client.put(model, other, payloads_of(MHA, other)).held == 8
        path.write_bytes(image)
        assert client.operate("device-online", device=1)["state"] == "online"
        assert client.statistics()["counters"]["holes"] == 0
        with daemon.client() as fresh, fresh.match(model, names) as match:
            assert match.read_into(into).blocks == 12
        with client.match(model, names) as match:
            assert match.read_into(into).blocks == 12
        assert [bytes(each) for each in into] == [e.tobytes() for e in payloads_of(MHA, names)]


def test_a_device_without_descriptor_makes_misses_and_no_dead_client(scratch: Path) -> None:
    """The daemon still has the image open; its name is gone, so nobody else can open it."""
    make_warehouse(scratch, TWO)
    with running_daemon(scratch) as daemon:
        with daemon.client() as first:
            model = first.open_model("m", MHA)
            names = chain_of(model, 12)
            assert first.put(model, names, payloads_of(MHA, names)).held == 12
        (scratch / "device1.img").rename(scratch / "away")
        with daemon.client() as client, client.match(model, names) as match:
            into = [bytearray(MHA.block_bytes()) for _ in range(12)]
            assert match.read_into(into).outcomes == (
                (ReadOutcome.HIT, ReadOutcome.DEVICE_ERROR) * 6
            )
            (scratch / "away").rename(scratch / "device1.img")

            def all_hit() -> bool:
                with client.match(model, names) as again:
                    return again.read_into(into).blocks == 12

            until(all_hit, "the client asks for the devices again")
            assert client.statistics()["client"]["reconnects"] == 0
            assert client.statistics()["counters"]["holes"] == 0


@needs_loops
@pytest.mark.root
def test_a_read_only_block_device_serves_reads_and_gets_nothing(scratch: Path) -> None:
    with loop_device(scratch / "backing", DEVICE_BYTES) as loop:
        specs = [DeviceSpec(scratch / "a.img", ByteCount(DEVICE_BYTES)), DeviceSpec(loop)]
        Warehouse.create(scratch / "w", specs, force=True)
        with open_warehouse(scratch / "w") as warehouse:
            model, names = filled(warehouse)
        os.system(f"blockdev --setro {loop}")
        with open_warehouse(scratch / "w") as warehouse:
            assert state_of(warehouse, 1) == "read-only"
            assert "read-only" in warehouse.notes[0]
            assert read_all(warehouse, model, names) == 12
            assert put(warehouse, model, chain_of(model, 6, 4)).held == 6
            assert on_device(warehouse, 1) == 6
            os.system(f"blockdev --setrw {loop}")
            assert warehouse.operate("device-online", device=1)["state"] == "online"

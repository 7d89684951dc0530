"""The scrubber finds every block that has gone bad, and takes nothing for bad that is not.

A bad block is a hole afterwards and its place is never used again; a pass that was interrupted
goes on behind its position and skips nothing; a device that fails as a whole loses no block.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.daemon import running_daemon
from support.warehouses import (
    DEVICE_BYTES,
    LAYOUTS,
    MHA,
    assert_sound,
    block_at,
    chain_of,
    flip_device,
    flip_payload,
    make_warehouse,
    open_warehouse,
    put,
    put_whole,
    read_all,
    records_of,
    settle,
)
from twfs.checking import scrubbing
from twfs.checking.scrubbing import State, load_state
from twfs.client import Client
from twfs.devices.device import Device
from twfs.devices.payload import read_whole
from twfs.errors import DeviceError, InvalidInput
from twfs.prefix import Names
from twfs.records import Block, BlockKey, Header
from twfs.store import Model, PutOutcome, ReadOutcome
from twfs.units import ALIGN, ByteCount
from twfs.warehouse import Warehouse

BLOCK = 8192  # bytes on the device of one block of MHA
PACED = 1 << 40  # a rate, so that one block follows the other, but no wait


def scrubbed(warehouse: Warehouse, rate: int = 0) -> dict[str, Any]:
    """Run one whole pass to its end; the status."""
    warehouse.scrubber.start(rate, whole=True)
    return ended(warehouse)


def ended(warehouse: Warehouse) -> dict[str, Any]:
    """Wait for the end of the pass; the status."""
    thread = warehouse.scrubber._thread
    assert thread is not None
    thread.join()
    status = warehouse.scrubber.status()
    assert (status["state"], status["trouble"]) == ("idle", "")
    return status


def stored(warehouse: Warehouse, blocks: int = 6) -> tuple[Model, Names]:
    """A model with one chain."""
    model = warehouse.open_model("m", MHA)
    names = chain_of(model, blocks)
    assert put(warehouse, model, names).held == blocks
    return model, names


def write(warehouse: Warehouse, block: Block, data: bytes, at: int = 0) -> None:
    """Write *data* over a block on its device."""
    extent = block.extents[0]
    with warehouse.devices[extent.device].path.open("r+b", buffering=0) as file:
        file.seek(extent.offset + at)
        file.write(data)


def raw(warehouse: Warehouse, block: Block) -> bytes:
    """What lies where a block is."""
    extent = block.extents[0]
    with warehouse.devices[extent.device].path.open("rb", buffering=0) as file:
        file.seek(extent.offset)
        return file.read(extent.length)


def forge(warehouse: Warehouse, key: BlockKey, block: Block) -> None:
    """Write a header that says all the right things, made without the warehouse's secret."""
    device = warehouse.devices[block.extents[0].device]
    header = Header.unpack(raw(warehouse, block)[:ALIGN])
    assert header.device == device.uuid
    assert header.prefix_hash == key.prefix_hash
    write(warehouse, block, header.pack(bytes(32)))


DAMAGE: dict[str, Callable[[Warehouse, BlockKey, Block], None]] = {
    "first bit of the payload": lambda w, _, b: flip_payload(w, b),
    "last byte of the payload": lambda w, _, b: flip_payload(w, b, b.payload_bytes - 1),
    "header": lambda w, _, b: flip_device(w, b, 100),
    "header overwritten": lambda w, _, b: write(w, b, bytes(ALIGN)),
    "header of another warehouse": forge,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_has_gone_bad_is_a_hole_and_the_next_put_fills_it(scratch: Path, damage: str) -> None:
    with open_warehouse(scratch) as warehouse:
        model, names = stored(warehouse)
        key, block = block_at(warehouse, model, names, 2)
        DAMAGE[damage](warehouse, key, block)
        status = scrubbed(warehouse)
        assert (status["blocks"], status["bad_blocks"], len(status["findings"])) == (6, 1, 1)
        assert key.prefix_hash.hex() in status["findings"][0]
        assert block_at(warehouse, model, names, 2)[1].hole
        assert warehouse.statistics()["counters"]["holes"] == 1
        assert warehouse.lookup(model, names) == 2
        assert_sound(warehouse)
        assert put(warehouse, model, names).outcomes[2] is PutOutcome.PUBLISHED
        assert read_all(warehouse, model, names) == 6
        assert scrubbed(warehouse)["bad_blocks"] == 0
        warehouse.remove(model.id, names.hash_at(5))
        assert warehouse.space().limbo_bytes == BLOCK  # retired: never used again
        assert block.extents[0] not in list(warehouse._core.allocator.runs())


def test_blocks_that_lie_in_each_others_places_are_both_found(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, names = stored(warehouse)
        one, other = (block_at(warehouse, model, names, i)[1] for i in (1, 4))
        first, second = raw(warehouse, one), raw(warehouse, other)
        write(warehouse, one, second)
        write(warehouse, other, first)
        assert scrubbed(warehouse)["bad_blocks"] == 2
        assert [block_at(warehouse, model, names, i)[1].hole for i in range(6)] == [
            False, True, False, False, True, False,
        ]  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("rate", [0, PACED, None])
def test_nothing_is_found_in_a_sound_warehouse(scratch: Path, kind: str, rate: int | None) -> None:
    with open_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        model = warehouse.open_model("m", LAYOUTS[kind])
        put_whole(warehouse, model, chain_of(model, 5))
        records = records_of(warehouse._core)
        warehouse.scrubber.start(rate)
        status = ended(warehouse)
        assert status["blocks"] == len(records)
        assert status["read_bytes"] == sum(block.device_bytes for block in records.values())
        assert (status["bad_blocks"], status["skipped_blocks"]) == (0, 0)
        assert status["last"]["number"] == 1
        assert warehouse.statistics()["counters"]["holes"] == 0


class Interrupted:
    """Stops a pass after so many reads, and notes which blocks were read."""

    def __init__(self, patch: pytest.MonkeyPatch, reads: int) -> None:
        self.keys: list[bytes] = []
        self.reached, self.gate = threading.Event(), threading.Event()
        real = read_whole

        def counted(devices: Any, key: BlockKey, block: Block, **options: Any) -> memoryview:
            self.keys.append(key.pack())
            if len(self.keys) == reads:
                self.reached.set()
                self.gate.wait()
            return real(devices, key, block, **options)

        patch.setattr(scrubbing, "read_whole", counted)

    def stop(self, warehouse: Warehouse) -> None:
        """Let the pass end before its next read, as the end of a daemon does."""
        self.reached.wait()
        warehouse.scrubber._end.set()
        self.gate.set()
        warehouse.scrubber.close()


@pytest.mark.parametrize("reads", [1, 4, 5, 9, 22, 30])
def test_a_restart_goes_on_behind_the_position_and_skips_nothing(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    monkeypatch.setattr(scrubbing, "BATCH_BLOCKS", 4)
    with open_warehouse(scratch) as warehouse:
        model, names = stored(warehouse, 30)
        with monkeypatch.context() as patch:
            first = Interrupted(patch, reads)
            warehouse.scrubber.start(PACED)
            first.stop(warehouse)
    with open_warehouse(scratch) as warehouse:
        kept = warehouse.scrubber._state
        assert kept.running
        position = bytes.fromhex(kept.position)
        everything = sorted(key.pack() for key in records_of(warehouse._core))
        before = [key for key in everything if key <= position]
        assert kept.blocks == len(before) == (reads - 1) // 4 * 4
        assert set(before) <= set(first.keys)
        bad = {everything[len(before)]} | set(before[:1])  # one on either side of the position
        for key in bad:
            flip_payload(warehouse, records_of(warehouse._core)[BlockKey.unpack(key)])
        with monkeypatch.context() as patch:
            second = Interrupted(patch, 1 << 30)
            warehouse.scrubber.resume()
            status = ended(warehouse)
        assert sorted(set(second.keys)) == everything[len(before) :]
        assert (status["pass"], status["blocks"], status["bad_blocks"]) == (1, 30, 1)
        assert scrubbed(warehouse)["bad_blocks"] == len(bad) - 1
        assert warehouse.lookup(model, names) < 30


def test_what_is_put_or_removed_during_a_pass_hides_nothing(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrubbing, "BATCH_BLOCKS", 2)
    with open_warehouse(scratch) as warehouse:
        model, _ = stored(warehouse, 20)
        old = set(records_of(warehouse._core))
        gate = Interrupted(monkeypatch, 9)
        warehouse.scrubber.start(PACED)
        gate.reached.wait()
        for seed in range(1, 8):
            put(warehouse, model, chain_of(model, 5, seed))
        warehouse.remove(model.id, chain_of(model, 5, 3).hash_at(4))
        gate.gate.set()
        ended(warehouse)
        assert {key.pack() for key in old} <= set(gate.keys)


def test_a_block_that_was_put_elsewhere_while_its_old_place_was_read_is_sound(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        model, names = stored(warehouse, 20)
        old = {block.extents for block in records_of(warehouse._core).values()}
        gate = Interrupted(monkeypatch, 1)  # the whole batch has been taken then
        warehouse.scrubber.start(PACED)
        gate.reached.wait()
        warehouse.remove(model.id, names.hash_at(19))
        other = chain_of(model, 20, 1)
        put(warehouse, model, other)
        put(warehouse, model, names)
        keys = [block_at(warehouse, model, other, i)[1].extents for i in range(20)]
        assert set(keys) == old  # other bytes than the scrubber expects lie there now
        gate.gate.set()
        status = ended(warehouse)
        assert (status["bad_blocks"], status["failing_devices"]) == (0, [])
        assert read_all(warehouse, model, names) == read_all(warehouse, model, other) == 20


def test_stop_ends_a_pass_and_start_goes_on_with_it(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrubbing, "BATCH_BLOCKS", 2)
    with open_warehouse(scratch) as warehouse:
        stored(warehouse, 20)
        gate = Interrupted(monkeypatch, 7)
        assert warehouse.operate("scrub-start", rate_bytes_s=PACED)["state"] == "running"
        gate.reached.wait()
        warehouse.scrubber._end.set()
        gate.gate.set()
        stopped = warehouse.operate("scrub-stop")
        assert (stopped["state"], stopped["blocks"]) == ("unfinished", 6)
        assert not warehouse.scrubber._state.running  # so a restart does not go on either
        warehouse.operate("scrub-start", rate_bytes_s=0)
        status = ended(warehouse)
        assert (status["pass"], status["blocks"], len(set(gate.keys))) == (1, 20, 20)
        assert warehouse.operate("scrub-stop")["state"] == "idle"


def test_a_pass_that_runs_takes_another_rate_and_a_whole_one_begins_anew(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        stored(warehouse, 20)
        warehouse.scrubber.start(1)  # a byte a second: it ends because of what follows
        assert warehouse.scrubber.start(1)["pass"] == 1
        warehouse.scrubber.start(0, whole=True)
        assert ended(warehouse)["pass"] == 2
        warehouse.scrubber.start(1)
        warehouse.scrubber.start(0)
        status = ended(warehouse)
        assert (status["pass"], status["blocks"]) == (3, 20)


@pytest.mark.parametrize("arguments", [{"rate_bytes_s": -1}, {"rate_bytes_s": 1 << 50}, {"x": 1}])
def test_arguments_that_make_no_sense_are_refused(scratch: Path, arguments: dict[str, Any]) -> None:
    with open_warehouse(scratch) as warehouse, pytest.raises(InvalidInput):
        warehouse.operate("scrub-start", **arguments)


def test_a_lease_on_a_bad_block_is_a_miss_and_its_place_is_retired(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, names = stored(warehouse)
        _, block = block_at(warehouse, model, names, 3)
        with warehouse.match(model, names) as match:
            flip_payload(warehouse, block)
            assert scrubbed(warehouse)["bad_blocks"] == 1
            into = [bytearray(model.layout.block_bytes(0)) for _ in range(6)]
            report = match.read_into(into)
            assert report.blocks == 3
            assert report.outcomes[3] is not ReadOutcome.HIT
            assert not any(into[3])
            assert put(warehouse, model, names).outcomes[3] is PutOutcome.PUBLISHED
        settle(warehouse)
        assert read_all(warehouse, model, names) == 6
        assert warehouse.space().limbo_bytes == BLOCK
        assert all(
            run.offset + run.length <= block.extents[0].offset
            or run.offset >= block.extents[0].offset + BLOCK
            for run in warehouse._core.allocator.runs()
        )


@contextmanager
def reads_failing(
    patch: pytest.MonkeyPatch, fails: Callable[[Device, int], bool]
) -> Iterator[None]:
    """Let reads of devices fail where *fails* says so of a device and an offset."""
    real = Device.read_into

    def read_into(device: Device, buffers: Any, offset: Any) -> None:
        if fails(device, int(offset)):
            raise DeviceError(f"read at {offset} of {device.path}: Input/output error")
        real(device, buffers, offset)

    with patch.context() as inner:
        inner.setattr(Device, "read_into", read_into)
        yield


def test_one_place_that_cannot_be_read_is_a_hole(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        model, names = stored(warehouse)
        _, block = block_at(warehouse, model, names, 4)
        at = int(block.extents[0].offset)
        with reads_failing(monkeypatch, lambda _, offset: offset == at):
            status = scrubbed(warehouse)
        assert (status["bad_blocks"], status["failing_devices"]) == (1, [])
        assert warehouse.lookup(model, names) == 4


def test_a_read_that_fails_once_loses_nothing(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        model, names = stored(warehouse)
        failed: list[int] = []

        def fails(_: Device, offset: int) -> bool:
            failed.append(offset)
            return failed.count(offset) == 1

        with reads_failing(monkeypatch, fails):
            status = scrubbed(warehouse, PACED)
        assert (status["blocks"], status["bad_blocks"], status["skipped_blocks"]) == (6, 0, 0)
        assert read_all(warehouse, model, names) == 6


@pytest.mark.parametrize("rate", [0, PACED])
@pytest.mark.parametrize("blocks", [3, 40])
def test_a_device_that_fails_everywhere_loses_no_block(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, rate: int
) -> None:
    with open_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        model, names = stored(warehouse, 2 * blocks)
        _, block = block_at(warehouse, model, names, 0)
        assert block.extents[0].device == 0
        flip_payload(warehouse, block)
        with reads_failing(monkeypatch, lambda device, _: device.index == 1):
            status = scrubbed(warehouse, rate)
        assert status["failing_devices"] == [1]
        assert status["last"]["failing_devices"] == [1]
        assert (status["blocks"], status["bad_blocks"]) == (blocks, 1)  # the other one's
        assert status["skipped_blocks"] == blocks
        assert put(warehouse, model, names).held == 2 * blocks
        assert read_all(warehouse, model, names) == 2 * blocks
        assert scrubbed(warehouse)["failing_devices"] == []


def test_a_device_that_came_back_empty_loses_no_block(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, names = stored(warehouse, 20)
        path = warehouse.devices[0].path
        whole = path.read_bytes()
        with path.open("r+b") as file:
            file.write(bytes(len(whole)))
        status = scrubbed(warehouse)
        assert (status["failing_devices"], status["bad_blocks"]) == ([0], 0)
        with path.open("r+b") as file:
            file.write(whole)
            os.fsync(file.fileno())
        assert read_all(warehouse, model, names) == 20


def test_changes_beside_a_pass_are_never_taken_for_damage(scratch: Path) -> None:
    """Small devices: places are used again within milliseconds, while they are being read."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        over = threading.Event()
        passes: list[dict[str, Any]] = []

        def scrub() -> None:
            while not over.is_set():
                passes.append(scrubbed(warehouse, PACED if len(passes) % 2 else 0))

        thread = threading.Thread(target=scrub)
        thread.start()
        chance = random.Random(3)
        try:
            for turn in range(60):
                names = chain_of(model, chance.randrange(1, 80), chance.randrange(60))
                put(warehouse, model, names)
                if turn % 5 == 4:
                    heads = warehouse.heads(model.id)
                    warehouse.remove(model.id, chance.choice(heads))
                if turn % 7 == 6:
                    warehouse.evict(ByteCount(chance.randrange(1, 200) * BLOCK))
        finally:
            over.set()
            thread.join()
        assert len(passes) > 1
        assert sum(status["bad_blocks"] for status in passes) == 0
        assert not any(status["failing_devices"] for status in passes)
        assert warehouse.statistics()["counters"]["holes"] == 0


@pytest.mark.parametrize(
    "packed",
    [b"", b"\xff", b"[]", b'{"position": "zz"}', b'{"position": "00"}', b'{"blocks": "x"}'],
)
def test_a_state_that_makes_no_sense_is_a_fresh_one(packed: bytes) -> None:
    assert load_state(packed) == State()


def until(client: Client, met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask for the status until *met* says so of it."""
    while True:
        status: dict[str, Any] = client.operate("scrub-status")
        if met(status):
            return status


def test_a_killed_daemon_goes_on_with_its_pass_by_itself(scratch: Path) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 800))
    slow = 16 << 20  # 2,000 blocks a second: each batch of 512 takes a while
    with running_daemon(scratch) as daemon:
        with daemon.client() as client:
            client.operate("scrub-start", rate_bytes_s=slow)
            until(client, lambda status: status["blocks"] > 0)
            stopped = client.operate("scrub-stop")  # makes the position durable
            assert stopped["state"] == "unfinished"
            client.operate("scrub-start", rate_bytes_s=1)
            daemon.kill()
        with Warehouse.open(scratch) as warehouse:
            state = warehouse.scrubber._state
            assert state.running
            assert state.blocks == stopped["blocks"] >= 512
            records = records_of(warehouse._core)
            keys = sorted(records, key=BlockKey.pack)
            behind = [key for key in keys if key.pack().hex() > state.position]
            assert 0 < len(behind) == len(keys) - state.blocks
            flip_payload(warehouse, records[behind[0]])
            flip_payload(warehouse, records[keys[0]])  # was looked at: the next pass finds it
        daemon.start()
        with daemon.client() as client:
            until(client, lambda status: status["state"] == "running")
            client.operate("scrub-start", rate_bytes_s=0)
            status = until(client, lambda status: status["state"] == "idle")
            assert (status["pass"], status["blocks"], status["bad_blocks"]) == (1, 800, 1)
            client.operate("scrub-start", rate_bytes_s=0)
            status = until(client, lambda status: status["state"] == "idle")
            assert (status["pass"], status["blocks"], status["bad_blocks"]) == (2, 799, 1)
            assert client.statistics()["scrub"]["last"]["bad_blocks"] == 1

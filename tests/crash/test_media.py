"""Whatever a device does to bytes, a hit is never a wrong byte: it is a miss, counted, and mended.

Real block devices over a disk that fails on command. What is damaged is found by the reader or the
checker, becomes a hole and is put again; what is not damaged keeps being served; a device's error
at write or flush is a failed put and never a published block.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.faultrules import Act, Op, Rule
from support.faultydisks import (
    FaultyDisks,
    ext4_on,
    faulty_disks,
    mount_ext4,
    needs_faults,
    unmount,
)
from support.mediafaults import (
    DISKS,
    HIT,
    Media,
    devices_of,
    everywhere,
    invariants,
    judged,
    outcomes,
)
from support.warehouses import DEVICE_BYTES, MHA, chain_of, payload_of, put, read_all
from twfs.devices.formatting import DeviceSpec
from twfs.errors import CorruptSuperblock, TwfsError
from twfs.store import PutOutcome, ReadOutcome
from twfs.units import ALIGN, ByteCount
from twfs.warehouse import Warehouse

pytestmark = [pytest.mark.root, pytest.mark.fuse, needs_faults]

BAD, ERROR = ReadOutcome.BAD_CHECKSUM, ReadOutcome.DEVICE_ERROR
PUBLISHED, FAILED = PutOutcome.PUBLISHED, PutOutcome.FAILED
BLOCKS = 6
META_BYTES = 24 << 20
MHA_LAYER_BYTES = MHA.layer_bytes(0)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisks]:
    sizes = dict.fromkeys(DISKS, DEVICE_BYTES)
    with faulty_disks(tmp_path_factory.mktemp("media") / "faulty", sizes) as made:
        yield made


@pytest.fixture(name="on")
def _on(disks: FaultyDisks, scratch: Path) -> Iterator[Media]:
    yield Media.made(disks, scratch / "warehouse")
    disks.set_rules()


@pytest.mark.parametrize("byte", [0, 1000, 2047])
def test_a_flipped_bit_in_a_payload_is_a_miss_and_then_a_hole_that_is_filled(
    on: Media, byte: int
) -> None:
    with on.opened() as (warehouse, model):
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        bad = on.extent(warehouse, model, names, 2)
        where = DISKS[bad.device]
        at = bad.offset + ALIGN + byte
        on.disks.set_rules(Rule(disk=where, op=Op.READ, act=Act.FLIP, low=at, high=at + 1))
        assert outcomes(warehouse, model, names) == [HIT, HIT, BAD, HIT, HIT, HIT]
        judged(warehouse)
        assert warehouse.statistics()["counters"]["holes"] == 1
        assert warehouse.lookup(model, names) == 2
        assert invariants(warehouse) == []  # the hole has no bytes that could be wrong
        assert put(warehouse, model, names).outcomes[2] is PUBLISHED
        assert on.extent(warehouse, model, names, 2) != bad  # which is not used again
        assert read_all(warehouse, model, names) == BLOCKS
        assert invariants(warehouse) == []


def test_a_flipped_bit_in_a_header_is_found_by_the_checker_and_by_reads_that_need_it(
    on: Media,
) -> None:
    with on.opened() as (warehouse, model):
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        bad = on.extent(warehouse, model, names, 1)
        at = bad.offset + 300
        on.disks.set_rules(
            Rule(disk=DISKS[bad.device], op=Op.READ, act=Act.FLIP, low=at, high=at + 1)
        )
        assert outcomes(warehouse, model, names) == [HIT] * BLOCKS  # payloads prove themselves
        assert invariants(warehouse) == [5, 12]
        layer = [np.zeros(MHA_LAYER_BYTES, np.uint8) for _ in range(BLOCKS)]
        with warehouse.match(model, names) as match:
            read = match.read_into(layer, layers=range(1)).outcomes
        assert read == (HIT, BAD, HIT, HIT, HIT, HIT)
        judged(warehouse)
        assert warehouse.lookup(model, names) == 1
        assert invariants(warehouse) == []


def test_a_flipped_bit_in_a_layer_is_a_miss_for_who_reads_that_layer_alone(on: Media) -> None:
    with on.opened() as (warehouse, model):
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        bad = on.extent(warehouse, model, names, 1)
        at = bad.offset + ALIGN + MHA_LAYER_BYTES
        on.disks.set_rules(
            Rule(disk=DISKS[bad.device], op=Op.READ, act=Act.FLIP, low=at, high=at + 1)
        )
        with warehouse.match(model, names) as match:
            for layer, wanted in ((0, HIT), (1, BAD)):
                into = [np.zeros(MHA_LAYER_BYTES, np.uint8) for _ in range(BLOCKS)]
                read = match.read_into(into, layers=range(layer, layer + 1)).outcomes
                assert read == (HIT, wanted, HIT, HIT, HIT, HIT)
                for index in (0, 2, 3, 4, 5):
                    start = layer * MHA_LAYER_BYTES
                    right = payload_of(MHA, names.hash_at(index))[start : start + MHA_LAYER_BYTES]
                    assert np.array_equal(into[index], right)
        judged(warehouse)
        assert warehouse.lookup(model, names) == 1
        assert invariants(warehouse) == []


@pytest.mark.parametrize("offset", [0, DEVICE_BYTES - ALIGN], ids=["first", "last"])
def test_one_flipped_superblock_copy_is_noted_and_found_and_harms_nothing(
    on: Media, offset: int
) -> None:
    with on.opened() as (warehouse, model):
        put(warehouse, model, chain_of(model, BLOCKS))
    at = offset + 60
    on.disks.set_rules(Rule(disk=DISKS[1], op=Op.READ, act=Act.FLIP, low=at, high=at + 1))
    with on.opened() as (warehouse, model):
        assert len(warehouse.notes) == 1
        assert invariants(warehouse) == [1]
        assert read_all(warehouse, model, chain_of(model, BLOCKS)) == BLOCKS
        assert put(warehouse, model, chain_of(model, BLOCKS, 1)).held == BLOCKS
        on.disks.set_rules()
        assert invariants(warehouse) == []


def test_a_device_whose_superblock_copies_are_both_flipped_is_offline_until_they_are_not(
    on: Media,
) -> None:
    with on.opened() as (warehouse, model):
        put(warehouse, model, chain_of(model, BLOCKS))
    on.disks.set_rules(
        *(
            Rule(disk=DISKS[0], op=Op.READ, act=Act.FLIP, low=at, high=at + 1)
            for at in (60, DEVICE_BYTES - ALIGN + 60)
        )
    )
    with pytest.raises(CorruptSuperblock, match="no whole superblock"):
        Warehouse.open(on.directory, degraded=False)
    with on.opened() as (warehouse, model):
        assert any("no whole superblock" in note for note in warehouse.notes)
        assert set(outcomes(warehouse, model, chain_of(model, BLOCKS))) <= {HIT}
        assert warehouse.lookup(model, chain_of(model, BLOCKS)) < BLOCKS
    on.disks.set_rules()
    with on.opened() as (warehouse, model):
        assert read_all(warehouse, model, chain_of(model, BLOCKS)) == BLOCKS
        assert invariants(warehouse) == []


@pytest.mark.parametrize(
    "act", [Act.LOST, Act.TORN, Act.MISDIRECT], ids=["lost", "torn", "misdirected"]
)
def test_a_write_that_a_device_lied_about_is_a_miss_wherever_it_went(on: Media, act: Act) -> None:
    with on.opened() as (warehouse, model):
        before, names = chain_of(model, BLOCKS, 1), chain_of(model, BLOCKS, 2)
        put(warehouse, model, before)
        # The next write follows right behind: so it comes to lie upon what is there.
        amount = {Act.MISDIRECT: -3 * 2 * ALIGN, Act.TORN: ALIGN + 512}.get(act, 0)
        on.disks.set_rules(everywhere(Op.WRITE, act, times=1, amount=amount))
        assert put(warehouse, model, names).held == BLOCKS  # the device said so
        assert on.disks.acted() == [1]
        on.disks.set_rules()
        found = invariants(warehouse)
        assert set(found) == {5, 12}  # one write has several blocks: a torn one lacks the last
        got = [*outcomes(warehouse, model, before), *outcomes(warehouse, model, names)]
        assert set(got) == {HIT, BAD}
        assert got.count(BAD) == found.count(12)
        if act is Act.MISDIRECT:
            assert BAD in got[:BLOCKS]  # what it hit is found too
        judged(warehouse)
        assert warehouse.statistics()["counters"]["holes"] == got.count(BAD)
        assert invariants(warehouse) == []
        for chain in (before, names):
            put(warehouse, model, chain)
            assert read_all(warehouse, model, chain) == BLOCKS
        assert invariants(warehouse) == []


@pytest.mark.parametrize("act", [Act.EIO, Act.ENOSPC], ids=["eio", "enospc"])
def test_a_write_that_fails_publishes_nothing_of_it(on: Media, act: Act) -> None:
    with on.opened() as (warehouse, model):
        before, names = chain_of(model, BLOCKS, 1), chain_of(model, BLOCKS, 2)
        put(warehouse, model, before)
        free = warehouse.space().free_bytes
        on.disks.set_rules(everywhere(Op.WRITE, act), everywhere(Op.WRITE, act, DISKS[1]))
        assert set(put(warehouse, model, names).outcomes) == {FAILED}
        assert warehouse.statistics()["counters"]["failed_blocks"] == BLOCKS
        assert warehouse.lookup(model, names) == 0
        assert read_all(warehouse, model, before) == BLOCKS
        on.disks.set_rules()
        assert warehouse.space().free_bytes == free
        assert put(warehouse, model, names).held == BLOCKS
        assert read_all(warehouse, model, names) == BLOCKS
        assert invariants(warehouse) == []


def test_a_short_write_is_written_whole_or_not_published(on: Media) -> None:
    with on.opened() as (warehouse, model):
        names = chain_of(model, BLOCKS)
        on.disks.set_rules(everywhere(Op.WRITE, Act.SHORT, amount=ALIGN, times=1))
        result = put(warehouse, model, names)
        assert on.disks.acted() == [1]
        assert set(result.outcomes) <= {PUBLISHED, FAILED}
        assert outcomes(warehouse, model, names) == [HIT] * result.held
        assert invariants(warehouse) == []


def test_two_blocks_that_changed_places_are_both_misses(on: Media) -> None:
    with on.opened() as (warehouse, model):
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        one, other = (on.image(on.extent(warehouse, model, names, i)) for i in (1, 4))
        kept = one.copy()
        one[:], other[:] = other, kept
        assert invariants(warehouse) == [5, 5, 12, 12]
        assert outcomes(warehouse, model, names) == [HIT, BAD, HIT, HIT, BAD, HIT]
        judged(warehouse)
        assert warehouse.lookup(model, names) == 1
        assert put(warehouse, model, names).held == BLOCKS
        assert read_all(warehouse, model, names) == BLOCKS
        assert invariants(warehouse) == []


def test_a_stale_copy_of_a_device_that_is_put_back_serves_nothing_of_the_past(on: Media) -> None:
    with on.opened() as (warehouse, model):
        old, new = chain_of(model, BLOCKS, 1), chain_of(model, BLOCKS, 2)
        put(warehouse, model, old)
        places = {on.extent(warehouse, model, old, index) for index in range(BLOCKS)}
        on.disks.take_snapshot(DISKS[0])
        warehouse.remove(model.id, old.hash_at(BLOCKS - 1))
        put(warehouse, model, new)
        assert places & {on.extent(warehouse, model, new, index) for index in range(BLOCKS)}
        on_first = [device == 0 for device in devices_of(warehouse, model, new)]
    on.disks.put_back(DISKS[0])
    with on.opened() as (warehouse, model):
        assert invariants(warehouse) == [5] * sum(on_first) + [12] * sum(on_first)
        assert warehouse.lookup(model, old) == 0
        assert outcomes(warehouse, model, new) == [BAD if first else HIT for first in on_first]
        judged(warehouse)
        assert invariants(warehouse) == []
        assert put(warehouse, model, new).held == BLOCKS
        assert read_all(warehouse, model, new) == BLOCKS
        assert invariants(warehouse) == []


def test_a_device_that_answers_with_what_was_there_before_is_a_miss(on: Media) -> None:
    with on.opened() as (warehouse, model):
        names = chain_of(model, BLOCKS)
        on.disks.take_snapshot(DISKS[0])
        put(warehouse, model, names)
        on.disks.set_rules(everywhere(Op.READ, Act.STALE))
        on_first = [device == 0 for device in devices_of(warehouse, model, names)]
        assert outcomes(warehouse, model, names) == [BAD if first else HIT for first in on_first]
        judged(warehouse)
        assert invariants(warehouse) == []


def test_an_error_at_read_costs_its_block_and_none_of_its_neighbours(on: Media) -> None:
    with on.opened() as (warehouse, model):
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        bad = on.extent(warehouse, model, names, 3)
        on.disks.set_rules(on.rule(bad, Op.READ, Act.EIO))
        assert outcomes(warehouse, model, names) == [HIT, HIT, HIT, ERROR, HIT, HIT]
        judged(warehouse)
        assert warehouse.statistics()["counters"]["holes"] == 1
        assert sum(device["errors"] for device in warehouse.statistics()["devices"]) > 0
        assert warehouse.lookup(model, names) == 3
        assert put(warehouse, model, names).held == BLOCKS  # elsewhere: the place is retired
        assert read_all(warehouse, model, names) == BLOCKS
        assert invariants(warehouse) == []


@pytest.mark.parametrize("amount", [0, 512, ALIGN], ids=["nothing", "a sector", "4 KiB"])
def test_a_short_read_is_read_on_or_a_miss(on: Media, amount: int) -> None:
    with on.opened() as (warehouse, model):
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        on_first = [device == 0 for device in devices_of(warehouse, model, names)]
        on.disks.set_rules(everywhere(Op.READ, Act.SHORT, amount=amount))
        got = outcomes(warehouse, model, names)
        assert all(each is HIT for each, first in zip(got, on_first, strict=True) if not first)
        assert set(got) <= {HIT, ERROR}
        on.disks.set_rules()
        judged(warehouse)
        put(warehouse, model, names)
        assert read_all(warehouse, model, names) == BLOCKS
        assert invariants(warehouse) == []


def test_a_flush_that_failed_once_is_final_for_what_it_was_for(on: Media) -> None:
    with on.opened() as (warehouse, model):
        before, names = chain_of(model, BLOCKS, 1), chain_of(model, BLOCKS, 2)
        put(warehouse, model, before)
        on.disks.set_rules(everywhere(Op.FLUSH, Act.EIO, times=1))
        result = put(warehouse, model, names)
        assert on.disks.acted() == [1]
        assert FAILED in result.outcomes
        held = result.held
        on.disks.set_rules()  # the drive says yes again: that does not make the data durable
        for seed in (2, 3):
            chain = chain_of(model, BLOCKS, seed)
            again = put(warehouse, model, chain)
            assert again.held == BLOCKS  # on the other device: this one takes nothing more
            assert warehouse.lookup(model, chain) == BLOCKS
            if seed > 2:  # of the first, what the failed flush was not for is where it was put
                assert set(devices_of(warehouse, model, chain)) == {1}
        assert read_all(warehouse, model, before) == BLOCKS
        assert invariants(warehouse) == []
    with on.opened() as (warehouse, model):
        assert warehouse.lookup(model, names) >= held
        assert read_all(warehouse, model, before) == BLOCKS
        assert put(warehouse, model, names).held == BLOCKS
        assert read_all(warehouse, model, names) == BLOCKS
        assert invariants(warehouse) == []


def test_a_device_that_is_gone_makes_its_blocks_misses_and_the_others_are_served(
    on: Media,
) -> None:
    with on.opened() as (warehouse, model):
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        on_first = [device == 0 for device in devices_of(warehouse, model, names)]
        assert len(set(on_first)) == 2
        on.disks.set_rules(everywhere(Op.READ, Act.GONE))
        got = outcomes(warehouse, model, names)
        assert got == [ERROR if first else HIT for first in on_first]
        assert set(put(warehouse, model, chain_of(model, BLOCKS, 2)).outcomes) <= {
            PUBLISHED, FAILED,
        }  # fmt: skip
        judged(warehouse)
        assert outcomes(warehouse, model, names) == [HIT] * warehouse.lookup(model, names)


@pytest.mark.parametrize("act", [Act.EIO, Act.ENOSPC], ids=["eio", "enospc"])
@pytest.mark.parametrize("op", [Op.WRITE, Op.FLUSH], ids=["write", "flush"])
def test_metadata_whose_disk_fails_takes_no_puts_and_serves_what_it_has(
    scratch: Path, op: Op, act: Act
) -> None:
    with faulty_disks(scratch / "faulty", {"meta": META_BYTES}) as disks:
        loop = disks.loops["meta"]
        with ext4_on(loop, scratch / "fs") as filesystem:
            home = filesystem / "warehouse"
            spec = DeviceSpec(scratch / "device0.img", ByteCount(DEVICE_BYTES))
            Warehouse.create(home, [spec])
            with Warehouse.open(home) as warehouse:
                model = warehouse.open_model("m", MHA)
                before, names = chain_of(model, BLOCKS, 1), chain_of(model, BLOCKS, 2)
                put(warehouse, model, before)
                disks.set_rules(Rule(disk="meta", op=op, act=act))
                for _ in range(2):
                    with pytest.raises(TwfsError, match="metadata"):
                        put(warehouse, model, names)
                    assert warehouse.lookup(model, names) == 0
                    assert read_all(warehouse, model, before) == BLOCKS
        disks.set_rules()
        mount_ext4(loop, scratch / "fs")
        try:
            with Warehouse.open(home) as warehouse:
                model = warehouse.open_model("m")
                assert warehouse.lookup(model, names) in {0, BLOCKS}
                assert read_all(warehouse, model, before) == BLOCKS
                assert put(warehouse, model, names).held == BLOCKS
                assert read_all(warehouse, model, names) == BLOCKS
                assert invariants(warehouse) == []
        finally:
            unmount(scratch / "fs")

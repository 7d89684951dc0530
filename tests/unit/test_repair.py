"""What no daemon opens is still checked and repaired; what a repair may not touch stays as it is.

Also the command: it refuses beside a daemon, says what it did in a line each, and ends with 0 only
where nothing is left to mend. A damaged data.mdb is one sentence that names `twfs rebuild`.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from support.breaking import fill
from support.cli import assert_refused, document, running_daemon, tree_of, twfs
from support.warehouses import (
    BIG,
    MHA,
    block_at,
    chain_of,
    flip_payload,
    make_warehouse,
    open_warehouse,
    put,
    read_all,
)
from twfs.checking import invariants
from twfs.checking.subject import offline
from twfs.core.opening import META_DIRECTORY
from twfs.devices.payload import read_payload
from twfs.errors import CorruptMetadata, TwfsError
from twfs.metadata.environment import Metadata
from twfs.metadata.tables import LEASED, MODEL_KEY, PLACE_KEY, RETIRED, WriteView
from twfs.prefix import Names
from twfs.records import BlockKey, Extent, Header
from twfs.recovery import repair
from twfs.units import ALIGN, ByteCount, ByteOffset, DeviceIndex, Slot
from twfs.warehouse import Warehouse


def filled(directory: Path) -> tuple[Names, list[BlockKey]]:
    """A closed warehouse with a chain of six among other things; its names and keys."""
    make_warehouse(directory)
    with open_warehouse(directory) as warehouse:
        fill(warehouse)
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
    return names, [BlockKey(model.id, names.hash_at(index)) for index in range(6)]


def change(directory: Path, job: object) -> None:
    """Change the tables of a closed warehouse."""
    metadata = Metadata.open(directory / META_DIRECTORY)
    metadata.submit(job).result()  # type: ignore[arg-type]
    metadata.close()


def assert_whole(directory: Path, names: Names, blocks: int) -> None:
    """Fail unless the leading *blocks* of the chain are there, right, and the rest can be put."""
    with open_warehouse(directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        assert read_all(warehouse, model, names) == blocks
        assert put(warehouse, model, names).held == len(names)
        assert read_all(warehouse, model, names) == len(names)


def far_slot(view: WriteView) -> None:
    key, _ = next(iter(view.all_blocks()))
    block = view.block(BlockKey.unpack(key))
    assert block is not None
    view.put_block(BlockKey.unpack(key), replace(block, slot=Slot(0xFFFFFFFF)))


def short_record(view: WriteView) -> None:
    view.put_raw("blocks", b"\xff" * 23, b"short")


def free_outside(view: WriteView) -> None:
    view.put_raw("free", PLACE_KEY.pack(0, 1 << 41), (4096).to_bytes(8, "little"))


def free_twice(view: WriteView) -> None:
    run = next(iter(view.runs("free")))
    view.put_raw("free", PLACE_KEY.pack(0, run.offset + ALIGN), (4096).to_bytes(8, "little"))


def no_model(view: WriteView) -> None:
    for number in (1, 2):
        view.put_raw("models", MODEL_KEY.pack(number), b"{")


@pytest.mark.parametrize(
    ("job", "invariant"),
    [(far_slot, 7), (short_record, 2), (free_outside, 3), (free_twice, 3), (no_model, 2)],
)
def test_what_no_daemon_opens_is_checked_and_mended(
    scratch: Path, job: object, invariant: int
) -> None:
    names, _ = filled(scratch)
    change(scratch, job)
    with pytest.raises(TwfsError):
        Warehouse.open(scratch).close()
    before = tree_of(scratch)
    with offline(scratch) as subject:
        assert invariant in {each.invariant for each in invariants.run(subject, data=True).findings}
    assert tree_of(scratch) == before
    assert repair.run(scratch).left == ()
    assert repair.run(scratch).done == ()
    assert_whole(scratch, names, 6)


def test_models_whose_records_are_lost_come_back_from_roster_and_headers(scratch: Path) -> None:
    names, _ = filled(scratch)

    def job(view: WriteView) -> None:
        for table in ("models", "names"):
            for key, _ in list(view.raw(table)):
                view.delete_raw(table, key)

    change(scratch, job)
    report = repair.run(scratch)
    assert report.left == ()
    assert report.blocks == report.blocks_before
    assert_whole(scratch, names, 6)


def test_an_epoch_that_only_the_roster_knows_is_not_forgotten(scratch: Path) -> None:
    filled(scratch)
    with Warehouse.open(scratch) as warehouse:
        fresh = warehouse.new_epoch(warehouse.open_model("m"))
    change(scratch, lambda view: view.delete_raw("models", MODEL_KEY.pack(fresh.id)))
    assert repair.run(scratch).left == ()
    with open_warehouse(scratch) as warehouse:
        assert warehouse.open_model("m").epoch == fresh.epoch == 1


def test_a_lost_payload_inside_a_chain_is_a_hole_and_its_place_retired(scratch: Path) -> None:
    names, keys = filled(scratch)
    with Warehouse.open(scratch) as warehouse:
        _, block = block_at(warehouse, warehouse.open_model("m"), names, 1)
        flip_payload(warehouse, block, 7)
    assert repair.run(scratch).done == ()  # payloads are read only when asked for
    report = repair.run(scratch, data=True)
    assert (report.left, report.holes) == ((), 1)
    with offline(scratch) as subject, subject.metadata.read() as view:
        assert list(view.runs("limbo")) == list(block.extents)
        assert list(view.leased_limbo()) == []
        hole = view.block(keys[1])
        assert hole is not None
        assert hole.generation > block.generation
        assert view.block(keys[2]) is not None
    assert_whole(scratch, names, 1)
    assert repair.run(scratch, data=True).done == ()


def test_a_lost_block_without_child_is_dropped(scratch: Path) -> None:
    names, _ = filled(scratch)
    with Warehouse.open(scratch) as warehouse:
        flip_payload(warehouse, block_at(warehouse, warehouse.open_model("m"), names, 5)[1])
    report = repair.run(scratch, data=True)
    assert (report.left, report.holes, report.blocks) == ((), 0, report.blocks_before - 1)
    assert_whole(scratch, names, 5)


def test_limbo_of_leases_is_freed_and_what_is_retired_stays(scratch: Path) -> None:
    names, _ = filled(scratch)
    runs = [
        Extent(DeviceIndex(0), ByteOffset((1 << 20) + (at << 20)), ByteCount(ALIGN))
        for at in (8, 9)
    ]

    def job(view: WriteView) -> None:
        for run in runs:
            view.take_free(run)
            view.add_limbo(run, RETIRED if run is runs[1] else LEASED)

    change(scratch, job)
    assert repair.run(scratch).left == ()
    with offline(scratch) as subject, subject.metadata.read() as view:
        assert list(view.runs("limbo")) == runs[1:]
    assert_whole(scratch, names, 6)


@pytest.mark.parametrize("first", [True, False])
def test_of_two_blocks_in_one_place_the_proved_one_stays(scratch: Path, first: bool) -> None:
    """A record that says to lie where another block is; and that other one is free's, as well."""
    names, keys = filled(scratch)
    mover, stays = (keys[5], keys[4]) if first else (keys[4], keys[5])

    def job(view: WriteView) -> None:
        moved, other = view.block(mover), view.block(stays)
        assert moved is not None
        assert other is not None
        view.put_block(mover, replace(moved, extents=other.extents))
        view.put_raw("free", PLACE_KEY.pack(0, other.extents[0].offset), bytes([0, 16] + [0] * 6))

    change(scratch, job)
    assert repair.run(scratch).left == ()
    assert_whole(scratch, names, 5 if first else 4)


def test_of_two_sealed_blocks_that_overlap_the_one_whose_payload_is_there_stays(
    scratch: Path,
) -> None:
    """A later block was written into an earlier one's payload, whose header is still whole."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("big", BIG)
        names = chain_of(model, 2)
        put(warehouse, model, names)
    with Warehouse.open(scratch) as warehouse:
        core, device = warehouse._core, warehouse.devices[0]
        (_, first), (key, block) = (block_at(warehouse, model, names, at) for at in (0, 1))
        _, payload = read_payload(warehouse.devices, key, block)
        place = replace(block.extents[0], offset=ByteOffset(first.extents[0].offset + (64 << 10)))
        moved = replace(block, extents=(place,))
        header = Header(
            core.uuid, device.uuid, BIG.fingerprint, "big", 0, 0, 0, key.prefix_hash, moved
        )
        with device.path.open("r+b", buffering=0) as file:
            file.seek(place.offset)
            file.write(header.pack(core.secret) + bytes(payload))
        core.metadata.submit(lambda view: view.put_block(key, moved)).result()
    report = repair.run(scratch)
    assert (report.left, report.blocks, report.holes) == ((), 2, 1)
    with open_warehouse(scratch) as warehouse:
        assert block_at(warehouse, model, names, 0)[1].hole
        assert put(warehouse, model, names).held == 2
        assert read_all(warehouse, model, names) == 2


def test_a_hole_gets_another_number_where_a_block_has_its(scratch: Path) -> None:
    names, keys = filled(scratch)
    with Warehouse.open(scratch) as warehouse:
        flip_payload(warehouse, block_at(warehouse, warehouse.open_model("m"), names, 1)[1])
    repair.run(scratch, data=True)

    def job(view: WriteView) -> None:
        hole, block = view.block(keys[1]), view.block(keys[0])
        assert hole is not None
        assert block is not None
        view.put_block(keys[1], replace(hole, generation=block.generation, ino=block.ino))

    change(scratch, job)
    assert repair.run(scratch, data=True).left == ()
    assert_whole(scratch, names, 1)


def test_a_lost_secret_comes_back_from_its_file(scratch: Path) -> None:
    names, _ = filled(scratch)
    change(scratch, lambda view: view.set_meta("secret", b"x"))
    with offline(scratch) as subject:
        assert {each.invariant for each in invariants.run(subject).findings} == {2}
    assert repair.run(scratch).left == ()
    assert_whole(scratch, names, 6)


def test_without_its_device_nothing_is_repaired(scratch: Path) -> None:
    filled(scratch)
    (scratch / "device0.img").rename(scratch / "away.img")
    before = tree_of(scratch)
    with pytest.raises(TwfsError):
        repair.run(scratch)
    assert tree_of(scratch) == before


def test_a_damaged_data_file_is_one_sentence_that_names_rebuild(scratch: Path) -> None:
    """Or it is of no consequence: then all is as it was."""
    names, _ = filled(scratch)
    path = scratch / META_DIRECTORY / "data.mdb"
    sound = path.read_bytes()
    refused = 0
    for at in (0, 20, *range(2 * ALIGN, len(sound), ALIGN)):
        damaged = bytearray(sound)
        damaged[at : at + 512] = bytes(byte ^ 0x5A for byte in damaged[at : at + 512])
        path.write_bytes(damaged)
        said = refusal(scratch)
        if said is not None:
            refused += 1
            assert "rebuild" in said
            assert path.read_bytes() == damaged
    assert refused > 4
    path.write_bytes(sound)
    assert_whole(scratch, names, 6)


def refusal(directory: Path) -> str | None:
    """What a check says that refuses; a repair must say the same."""
    try:
        with offline(directory) as subject:
            assert invariants.run(subject).findings == ()
    except CorruptMetadata as error:
        with pytest.raises(CorruptMetadata):
            repair.run(directory)
        return str(error)
    return None


def test_a_truncated_data_file_names_rebuild(scratch: Path) -> None:
    filled(scratch)
    os.truncate(scratch / META_DIRECTORY / "data.mdb", 12288)
    for option in ([], ["--repair"]):
        assert "rebuild" in assert_refused(twfs("check", scratch, *option), 11)


def test_the_command_mends_and_says_so(scratch: Path) -> None:
    names, _ = filled(scratch)
    change(scratch, short_record)
    change(scratch, lambda view: view.set_counter("generation", 1))
    found = twfs("check", scratch)
    assert found.returncode == 3
    assert "invariant 2: " in found.stdout
    done = twfs("check", scratch, "--repair", "--data")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mended: ") >= 2
    again = document("check", scratch, "--repair")
    assert again["ok"]
    assert again["report"]["done"] == []
    assert document("check", scratch, "--data")["ok"]
    assert_whole(scratch, names, 6)


def test_a_repair_beside_a_daemon_is_refused(scratch: Path) -> None:
    filled(scratch)
    with running_daemon(scratch):
        assert "stop" in assert_refused(twfs("check", scratch, "--repair"), 6)
        assert json.loads(twfs("check", scratch, "--json").stdout)["ok"]


def test_what_is_left_ends_with_3(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known that a repair leaves; were there something, it would be said."""
    from twfs.store import Finding
    from twfs_tools import cli

    filled(scratch)
    report = repair.run(scratch)
    bad = replace(report, left=(Finding(3, "7 bytes"),))
    monkeypatch.setattr(repair, "run", lambda *_, **__: bad)
    assert cli.run(["check", str(scratch), "--repair"]) == 3

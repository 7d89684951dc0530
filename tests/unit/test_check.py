"""Every invariant of FORMAT.md, broken alone, is found by the checker, and nothing else is.

The warehouse is broken by hand, through its tables or on its device, and the checker changes
nothing: of the same state it says the same when it is asked again, and offline. Then a repair
mends it: nothing is found, what was not broken is there with its bytes, and puts work.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.filing import make_file, tree_of
from support.warehouses import (
    DEVICE_BYTES,
    HYBRID,
    LAYOUTS,
    MHA,
    SHARDED,
    block_at,
    chain_of,
    commits_held,
    flip_device,
    flip_payload,
    make_warehouse,
    open_warehouse,
    own_names,
    payload_of,
    put,
    put_whole,
    read_all,
    records_of,
    tokens_of,
)
from twfs.checking import invariants
from twfs.checking.snapshot import take_snapshot
from twfs.checking.subject import Live, offline
from twfs.checksums import checksums_of
from twfs.devices.payload import read_payload
from twfs.devices.roster import write_roster
from twfs.errors import CorruptMetadata
from twfs.metadata.filerows import FileRow
from twfs.metadata.filetables import INO_KEY, put_row
from twfs.metadata.sessions import Covered, Session, SessionKey, enter, every
from twfs.metadata.tables import MODEL_KEY, PLACE_KEY, WriteView
from twfs.prefix import Names
from twfs.records import (
    DATA_START,
    FLAG_HOLE,
    ROSTER_BYTES,
    ROSTER_STARTS,
    Block,
    BlockKey,
    Extent,
    Header,
    Superblock,
)
from twfs.recovery import repair
from twfs.store import Model, Retention
from twfs.units import (
    ALIGN,
    ByteCount,
    ByteOffset,
    DeviceIndex,
    Digest,
    Generation,
    Ino,
    ModelId,
    PrefixHash,
    Slot,
    TokenCount,
)
from twfs.warehouse import Warehouse


class Broken:
    """A warehouse with a chain of four blocks and a branch, to be broken."""

    def __init__(self, warehouse: Warehouse) -> None:
        self.warehouse = warehouse
        self.model: Model = warehouse.open_model("m", MHA)
        self.names: Names = chain_of(self.model, 4)
        put(warehouse, self.model, self.names)
        put(warehouse, self.model, chain_of(self.model, 3, 1, fork=2))

    def at(self, index: int) -> tuple[BlockKey, Block]:
        return block_at(self.warehouse, self.model, self.names, index)

    def change(self, job: Callable[[WriteView], object]) -> None:
        """Change the tables."""
        self.warehouse._core.metadata.submit(job).result()

    def rewrite(self, index: int, *, header: bool = True, **fields: object) -> None:
        """Change fields of a record, and with *header* of its header too."""
        key, block = self.at(index)
        block = replace(block, **fields)  # type: ignore[arg-type]
        self.change(lambda view: view.put_block(key, block))
        if header and block.extents:
            self.write_header(key, block)

    def write_header(self, key: BlockKey, block: Block) -> None:
        """Write the header that belongs to a record."""
        device = self.warehouse.devices[0]
        packed = Header(
            self.warehouse.uuid, device.uuid, MHA.fingerprint, "m", 0, key.group, key.shard,
            key.prefix_hash, block,
        ).pack(self.warehouse._core.secret)  # fmt: skip
        self.write(block.extents[0].offset, packed)

    def write(self, offset: int, data: bytes) -> None:
        """Write to the device."""
        descriptor = os.open(self.warehouse.devices[0].path, os.O_WRONLY)
        os.pwrite(descriptor, data, offset)
        os.close(descriptor)


@pytest.fixture
def broken(scratch: Path) -> Broken:
    """A sound warehouse; it is closed when its directory goes."""
    make_warehouse(scratch)
    return Broken(Warehouse.open(scratch))


def found(broken: Broken, *, lost: Sequence[int] = ()) -> set[int]:
    """Invariants that the checker finds broken; then the warehouse is closed, and mended.

    Only the blocks of the chain numbered *lost* may be gone after that.
    """
    with broken.warehouse as warehouse:
        report = warehouse.check(data=True)
        again = warehouse.check(data=True)
        assert sorted(report.findings, key=str) == sorted(again.findings, key=str)
        assert all(finding.text for finding in report.findings)
    with offline(warehouse.directory) as subject:
        away = invariants.run(subject, data=True)
    assert sorted(away.findings, key=str) == sorted(report.findings, key=str)
    assert_mended(warehouse.directory, broken.names, set(lost))
    return {finding.invariant for finding in report.findings}


def assert_mended(directory: Path, names: Names, lost: set[int]) -> None:
    """Repair, and fail unless all is well then, and only *lost* of *names* may be gone."""
    mended = repair.run(directory, data=True)
    assert mended.left == ()
    assert_sound_with(directory, names, lost)
    assert repair.run(directory, data=True).done == ()


def assert_sound_with(directory: Path, names: Names, lost: set[int]) -> None:
    """Fail unless nothing is wrong, all blocks but *lost* have their bytes, and puts work."""
    with open_warehouse(directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        with warehouse._core.metadata.read() as view:
            for index in range(len(names)):
                key = BlockKey(model.id, names.hash_at(index), 0, 0)
                block = view.block(key)
                if block is not None and not block.hole:
                    _, payload = read_payload(warehouse.devices, key, block, lanes=True)
                    assert bytes(payload) == payload_of(MHA, key.prefix_hash).tobytes()
                else:
                    assert index in lost
        for again in (names, chain_of(model, 6, 99)):
            assert put(warehouse, model, again).held == len(again)
            assert read_all(warehouse, model, again) == len(again)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_nothing_is_found_where_nothing_is_broken(scratch: Path, kind: str) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", LAYOUTS[kind])
        put_whole(warehouse, model, chain_of(model, 5))
        put(warehouse, model, chain_of(model, 9, 3).slice(6, 9), group=LAYOUTS[kind].spine)
        put(warehouse, model, own_names(model, ("a", None, 0), ("c", "b", 7)),
            group=LAYOUTS[kind].spine)  # fmt: skip
        report = warehouse.check(data=True)
        assert report.findings == ()
        assert report.blocks == report.payloads == len(list(blocks_of(warehouse)))
        assert warehouse.check().payloads == 0


def blocks_of(warehouse: Warehouse) -> list[bytes]:
    with warehouse._core.metadata.read() as view:
        return [key for key, _ in view.all_blocks()]


@pytest.mark.parametrize("offset", [0, -ALIGN])
def test_i1_a_superblock_copy_that_is_broken(broken: Broken, offset: int) -> None:
    size = broken.warehouse.devices[0].size_bytes
    broken.write(offset % size + 1, b"\xff")  # in the magic: a byte that is not 255 before
    assert found(broken) == {1}


def test_i1_a_superblock_copy_of_another_device(broken: Broken) -> None:
    device = broken.warehouse.devices[0]
    other = replace(device.superblock, index=DeviceIndex(5))
    broken.write(0, Superblock.pack(other))
    assert found(broken) == {1}


def test_i2_a_record_that_cannot_be_read(broken: Broken) -> None:
    broken.change(lambda view: view._put("blocks", b"\xff" * 23, b"short"))
    broken.change(lambda view: view._put("limbo", bytes(9), bytes(16)))
    broken.change(lambda view: view._put("heads", b"\xff", b""))
    assert found(broken) == {2}


def test_i3_space_that_belongs_to_nothing(broken: Broken) -> None:
    _, block = broken.at(0)
    run = Extent(DeviceIndex(0), ByteOffset((1 << 20) + (1 << 23)), ByteCount(ALIGN))
    broken.change(lambda view: view.take_free(run))
    assert block.extents[0].offset < run.offset
    assert found(broken) == {3}


def test_i3_space_that_belongs_to_two(broken: Broken) -> None:
    """A free run over a block, one that touches no other run."""
    extent = broken.at(1)[1].extents[0]
    broken.change(
        lambda view: view._put(
            "free", PLACE_KEY.pack(0, extent.offset), int(ALIGN).to_bytes(8, "little")
        )
    )
    assert found(broken) == {3}


def test_i4_a_block_that_is_longer_than_its_payload(broken: Broken) -> None:
    """The last one of all takes the next free unit too."""
    with broken.warehouse._core.metadata.read() as view:
        free = next(iter(view.runs("free")))
    names = chain_of(broken.model, 3, 1, fork=2)
    key, block = block_at(broken.warehouse, broken.model, names, 2)
    extent = block.extents[0]
    assert extent.offset + extent.length == free.offset
    longer = replace(block, extents=(replace(extent, length=ByteCount(extent.length + ALIGN)),))

    def job(view: WriteView) -> None:
        view.take_free(Extent(free.device, free.offset, ByteCount(ALIGN)))
        view.put_block(key, longer)

    broken.change(job)
    broken.write_header(key, longer)
    assert found(broken) == {4}


def test_i5_a_header_that_is_damaged(broken: Broken) -> None:
    """The payload cannot be proved without it, so that is found as well."""
    flip_device(broken.warehouse, broken.at(1)[1], 100)
    assert found(broken, lost=[1]) == {5, 12}


@pytest.mark.parametrize("what", ["warehouse", "device", "fingerprint", "model_name", "epoch"])
def test_i5_a_header_of_something_else(broken: Broken, what: str) -> None:
    key, block = broken.at(1)
    warehouse, device = broken.warehouse, broken.warehouse.devices[0]
    header = Header(
        warehouse.uuid, device.uuid, MHA.fingerprint, "m", 0, 0, 0, key.prefix_hash, block
    )
    other = {
        "warehouse": device.uuid, "device": warehouse.uuid, "fingerprint": bytes(32),
        "model_name": "n", "epoch": 3,
    }  # fmt: skip
    changed = replace(header, **{what: other[what]})  # type: ignore[arg-type]
    broken.write(block.extents[0].offset, changed.pack(warehouse._core.secret))
    assert found(broken, lost=[1]) == {5}


@pytest.mark.parametrize("field", ["generation", "ino"])
def test_i6_a_number_that_two_blocks_have(broken: Broken, field: str) -> None:
    broken.rewrite(1, **{field: getattr(broken.at(2)[1], field)})
    assert found(broken, lost=[1, 2]) == {6}


@pytest.mark.parametrize(("field", "of"), [("generation", Generation), ("ino", Ino)])
def test_i6_a_number_that_was_never_given(
    broken: Broken, field: str, of: Callable[[int], object]
) -> None:
    number: Any = of(1 << 40)
    broken.rewrite(1, **{field: number})
    assert found(broken) == {6}


def test_i7_a_slot_that_two_blocks_have(broken: Broken) -> None:
    broken.rewrite(1, slot=Slot(broken.at(2)[1].slot))
    assert found(broken) == {7}


def test_i8_a_child_that_is_not_noted(broken: Broken) -> None:
    """A child of a block that has another one: the heads are true either way."""
    key, block = broken.at(2)
    broken.change(lambda view: view.drop_child(key.at(block.parent), key.prefix_hash))
    assert found(broken) == {8}


def test_i8_a_child_that_is_none(broken: Broken) -> None:
    key, _ = broken.at(0)
    broken.change(lambda view: view.add_child(key, PrefixHash(b"?" * 16)))
    assert found(broken) == {8}


def test_i9_a_head_that_is_not_noted(broken: Broken) -> None:
    broken.change(lambda view: view.drop_head(broken.model.id, broken.names.hash_at(3)))
    assert found(broken) == {9}


def test_i9_a_head_that_is_none(broken: Broken) -> None:
    broken.change(lambda view: view.add_head(broken.model.id, broken.names.hash_at(1)))
    assert found(broken) == {9}


def test_i10_a_block_of_no_model(broken: Broken) -> None:
    key, block = own_block(broken)
    broken.change(lambda view: view.put_block(replace(key, model=ModelId(77)), block))
    assert found(broken) == {10}


@pytest.mark.parametrize("place", [{"group": 3}, {"shard": 2}])
def test_i10_a_group_or_shard_that_the_layout_has_not(
    broken: Broken, place: dict[str, int]
) -> None:
    key, block = own_block(broken)
    moved = replace(key, **place)  # type: ignore[arg-type]
    broken.change(lambda view: view.put_block(moved, block))
    broken.write_header(moved, block)
    assert found(broken) == {10}


def test_i10_a_payload_of_another_length(broken: Broken) -> None:
    _, block = broken.at(1)
    shorter = MHA.block_bytes() - 8
    path = broken.warehouse.devices[0].path
    with path.open("rb") as file:
        file.seek(block.extents[0].offset + ALIGN)
        payload = file.read(shorter)
    broken.rewrite(1, payload_bytes=ByteCount(shorter), checksums=checksums_of(payload))
    assert found(broken, lost=[1]) == {10}


def own_block(broken: Broken) -> tuple[BlockKey, Block]:
    """Take a first block with an own key out of the tables; its space stays its own."""
    names = own_names(broken.model, ("alone", None, 0))
    put(broken.warehouse, broken.model, names)
    key, block = block_at(broken.warehouse, broken.model, names, 0)

    def job(view: WriteView) -> None:
        view.delete_block(key)
        view.drop_head(key.model, key.prefix_hash)

    broken.change(job)
    return key, block


def test_i11_a_block_that_does_not_end_behind_its_parent(broken: Broken) -> None:
    broken.rewrite(2, position=TokenCount(32))
    assert found(broken, lost=[2]) == {11}


def test_i12_a_payload_that_has_changed(broken: Broken) -> None:
    flip_payload(broken.warehouse, broken.at(1)[1], 1000)
    assert broken.warehouse.check().findings == ()  # it takes the reading of payloads
    assert found(broken, lost=[1]) == {12}


def test_i13_a_hole_with_extents(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """No record can say so: it would not be read. The checker is asked about one that could."""
    subject = Live.of(broken.warehouse._core)
    with subject.metadata.read() as view:
        taken = take_snapshot(view)
    assert list(invariants.holes_are_empty(subject, taken)) == []
    rows = taken.rows.copy()
    rows["flags"][1] |= FLAG_HOLE
    rows["extent_count"][2] = 0
    taken = replace(taken, rows=rows)
    assert len(list(invariants.holes_are_empty(subject, taken))) == 2
    assert found(broken) == set()


def test_i14_a_class_that_is_none(broken: Broken) -> None:
    broken.rewrite(1, retention=4)
    assert found(broken) == {14}


def test_i15_free_runs_that_touch(broken: Broken) -> None:
    def job(view: WriteView) -> None:
        run = next(iter(view.runs("free")))
        view._put_run(run.device, run.offset, ALIGN)
        view._put_run(run.device, run.offset + ALIGN, run.length - ALIGN)

    broken.change(job)
    assert found(broken) == {15}


@pytest.mark.parametrize("index", [1, 2])
def test_i16_a_detached_block_whose_parent_is_there(broken: Broken, index: int) -> None:
    broken.rewrite(index, detached=True)
    assert found(broken) == {16}


def test_i16_a_block_without_its_parent(broken: Broken) -> None:
    names = chain_of(broken.model, 9, 5).slice(7, 9)
    put(broken.warehouse, broken.model, names)
    for index in (0, 1):
        key, block = block_at(broken.warehouse, broken.model, names, index)
        attached = replace(block, detached=False)

        def job(view: WriteView, key: BlockKey = key, attached: Block = attached) -> None:
            view.put_block(key, attached)

        broken.change(job)
    broken.change(lambda view: view.add_head(broken.model.id, names.hash_at(1)))
    assert found(broken) == {16}


def test_i16_a_detached_block_of_a_group_without_chains(scratch: Path) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", HYBRID)
        names = chain_of(model, 2)
        put_whole(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 1, group=2)
        flagged = replace(block, detached=True)
        warehouse._core.metadata.submit(lambda view: view.put_block(key, flagged)).result()
        assert {finding.invariant for finding in warehouse.check(data=True).findings} == {16}


def test_i6_a_model_number_that_was_never_given(broken: Broken) -> None:
    broken.change(lambda view: view.set_counter("model", broken.model.id))
    assert found(broken) == {6}


def test_i7_a_slot_that_cannot_be(broken: Broken) -> None:
    broken.rewrite(1, slot=Slot(1 << 31))
    assert found(broken) == {7}


def test_i4_a_block_outside_the_device(broken: Broken) -> None:
    """Its place is free, and it says to be where nothing is."""
    key, block = own_block(broken)
    away = replace(block.extents[0], offset=ByteOffset(1 << 40))

    def job(view: WriteView) -> None:
        view.put_block(key, replace(block, extents=(away,)))
        view.add_head(key.model, key.prefix_hash)
        view.add_free(block.extents[0])

    broken.change(job)
    assert found(broken) == {4}


def test_i11_a_chain_that_is_a_ring(broken: Broken) -> None:
    names = own_names(broken.model, ("a", None, 0), ("b", "a", 0))
    put(broken.warehouse, broken.model, names)
    (first, block), (second, _) = (
        block_at(broken.warehouse, broken.model, names, index) for index in (0, 1)
    )

    def job(view: WriteView) -> None:
        view.put_block(first, replace(block, parent=second.prefix_hash))
        view.add_child(second, first.prefix_hash)
        view.drop_head(second.model, second.prefix_hash)

    broken.change(job)
    assert found(broken) == {11}


def test_i16_a_first_block_that_is_detached(broken: Broken) -> None:
    key, block = own_block(broken)  # no head, as a detached one
    broken.change(lambda view: view.put_block(key, replace(block, detached=True)))
    assert found(broken) == {16}


def test_i22_a_roster_that_is_lost(broken: Broken) -> None:
    for start in ROSTER_STARTS:
        broken.write(start, bytes(ROSTER_BYTES))
    assert found(broken) == {22}


@pytest.mark.parametrize("what", ["absent", "older", "behind", "ahead"])
def test_i22_a_roster_that_says_something_else(broken: Broken, what: str) -> None:
    core = broken.warehouse._core
    broken.warehouse.new_epoch(broken.model)
    broken.change(as_empty)
    (model,) = core.roster.models
    said = {
        "absent": replace(core.roster, models=()),
        "older": replace(core.roster, models=(replace(model, epoch=0),)),
        "behind": replace(core.roster, sequence=core.roster.sequence - 1),
        "ahead": replace(core.roster, sequence=core.roster.sequence + 2),
    }[what]
    for start in ROSTER_STARTS:
        broken.write(start, bytes(ROSTER_BYTES))
    write_roster(core.devices.values(), said, core.secret, core.uuid)
    if what != "ahead":
        assert found(broken, lost=range(4)) == {22}
        return
    assert {each.invariant for each in broken.warehouse.check().findings} == {22}
    broken.warehouse.close()
    with pytest.raises(CorruptMetadata, match="rebuild"):
        repair.run(broken.warehouse.directory)


def test_i22_a_name_that_leads_to_an_older_epoch(broken: Broken) -> None:
    broken.change(lambda view: view.put_raw("names", b"m", MODEL_KEY.pack(9)))
    assert found(broken) == {22}


def test_i22_is_no_finding_while_a_model_is_being_made(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roster is written, and the commit waits: the checker waits for both."""
    warehouse = broken.warehouse
    with ThreadPoolExecutor(2) as pool:
        with commits_held(warehouse):
            made = pool.submit(warehouse.new_epoch, broken.model)
            while warehouse._core.metadata._queue.empty():
                assert not made.done()
            report = pool.submit(warehouse.check)
        made.result()
        assert report.result().findings == ()
    assert found(broken, lost=range(4)) == set()


def with_files(broken: Broken) -> Ino:
    """Make a directory and a file in it, whose inode is returned."""
    files = broken.warehouse.files
    below = files.mkdir(0, b"d", mode=0o755, uid=0, gid=0)
    return make_file(files, below.ino, b"f", b"bytes")


@pytest.mark.parametrize(
    "change",
    [
        lambda view, row: view.delete_raw("paths", INO_KEY.pack(row.parent) + row.name),
        lambda view, row: view.delete_raw("files", INO_KEY.pack(row.ino)),
        lambda view, row: view.delete_raw("files", INO_KEY.pack(row.parent)),
        lambda view, row: view.put_raw("files", INO_KEY.pack(row.ino), b"no row"),
        lambda view, row: put_row(view, replace(row, name=b"other")),
        lambda view, row: put_row(view, replace(row, ino=Ino(row.ino + 1))),
        lambda view, row: put_row(view, replace(row, size=5 << 20, blocks=2)),
        lambda view, row: view.put_raw("paths", INO_KEY.pack(row.ino) + b"x", INO_KEY.pack(9)),
    ],
    ids=["name", "row", "directory", "unreadable", "renamed", "renumbered", "longer", "nothing"],
)
def test_i27_files_that_are_not_whole(
    broken: Broken, change: Callable[[WriteView, FileRow], None]
) -> None:
    row = broken.warehouse.files.row(with_files(broken))
    broken.change(lambda view: change(view, row))
    with broken.warehouse as warehouse:
        assert {each.invariant for each in warehouse.check(data=True).findings} == {27}
    assert repair.run(broken.warehouse.directory).left == ()
    with Warehouse.open(broken.warehouse.directory) as warehouse:
        assert tree_of(warehouse.files) == {b"/d": None, b"/d/f": b"bytes"}
        assert warehouse.check(data=True).findings == ()


def as_empty(view: WriteView) -> None:
    """Take all blocks out, and let children, heads and free runs be those of none."""
    for table in ("blocks", "children", "heads", "free"):
        for key, value in list(view.raw(table)):
            view.delete_raw(table, key, value if table == "children" else b"")
    view.add_free(Extent(DeviceIndex(0), DATA_START, ByteCount(DEVICE_BYTES - DATA_START - ALIGN)))


def test_every_invariant_has_a_test_here() -> None:
    text = Path(__file__).read_text()
    for number in invariants.INVARIANTS:
        assert f"def test_i{number}_" in text


def test_blocks_that_change_during_the_check_are_no_findings(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evicted after the snapshot, and their places written over by others."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        put_whole(warehouse, model, chain_of(model, 20))
        real = take_snapshot

        def then_change(view: object) -> object:
            taken = real(view)  # type: ignore[arg-type]
            warehouse.evict(ByteCount(1 << 30))
            put_whole(warehouse, model, chain_of(model, 20, 7))
            return taken

        with monkeypatch.context() as patch:
            patch.setattr(invariants, "take_snapshot", then_change)
            assert warehouse.check(data=True).findings == ()


def test_findings_are_bounded(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "FINDINGS_MAX", 3)

    def job(view: WriteView) -> None:
        for number in range(10):
            view.add_head(ModelId(1), PrefixHash(bytes([number]) * 16))

    broken.change(job)
    with broken.warehouse as warehouse:
        assert len(warehouse.check().findings) == 3


def test_digest_of_a_record_is_compared_with_its_header(broken: Broken) -> None:
    broken.rewrite(1, header=False, digest=Digest(bytes(32)))
    assert found(broken, lost=[1]) == {5, 12}


SESSION = SessionKey.of(ModelId(1), 0, "agent-7")


def with_session(broken: Broken) -> Session:
    """Let a session end at the last block of the chain; what is known of it."""
    last = broken.names.hash_at(3)
    session = Session(last, Retention.DURABLE.rank)
    broken.change(lambda view: enter(view, SESSION, session))
    broken.warehouse._core.cover(Covered(marks=[(int(broken.at(3)[1].slot), 3)]))
    return session


@pytest.mark.parametrize("what", ["nowhere", "class", "tenant", "end missing", "end of nobody"])
def test_i23_a_session_that_ends_nowhere(broken: Broken, what: str) -> None:
    session = with_session(broken)
    end = SESSION.end_at(session.head)

    def spoil(view: WriteView) -> None:
        if what == "nowhere":
            gone = PrefixHash(bytes(16))
            view.delete_raw("ends", end)
            view.put_raw("sessions", SESSION.pack(), replace(session, head=gone).pack())
            view.put_raw("ends", SESSION.end_at(gone), b"")
        elif what == "class":
            view.put_raw("sessions", SESSION.pack(), replace(session, retention=4).pack())
        elif what == "tenant":
            other = SessionKey.without_id(SESSION.model, 9, session.head)
            enter(view, other, replace(session, retention=Retention.STANDARD.rank))
        elif what == "end missing":
            view.delete_raw("ends", end)
        else:
            view.put_raw("ends", replace(SESSION, id=b"nobody").end_at(session.head), b"")

    broken.change(spoil)
    if what in {"nowhere", "class"}:  # and the arrays in memory follow the record that was
        rank = {"nowhere": Retention.STANDARD.rank, "class": Retention.PINNED.rank}[what]
        broken.warehouse._core.cover(Covered(marks=[(int(broken.at(3)[1].slot), rank + 1)]))
    assert found(broken) == {23}


def test_i24_a_class_in_memory_that_no_session_says(broken: Broken) -> None:
    """It is in no table: what is opened next has the class that the sessions say."""
    with_session(broken)
    with broken.warehouse as warehouse:
        assert warehouse.check().findings == ()
        warehouse._core.slots.retention[broken.at(1)[1].slot] = Retention.EPHEMERAL.rank
        assert {each.invariant for each in warehouse.check().findings} == {24}
    assert_mended(warehouse.directory, broken.names, set())


def with_members(broken: Broken) -> tuple[int, int]:
    """Let acme be in a share group, for which it pays, and other in none; the two's numbers."""
    made = [
        broken.warehouse.operate("tenant-add", name=name, owner=0, uids=[], share=share)["id"]
        for name, share in (("acme", "public"), ("other", None))
    ]
    acme = broken.warehouse.open_model("m", tenant="acme")
    names = acme.chain(public_tokens=64).extend(tokens_of(4)).names()
    put(broken.warehouse, acme, names)
    return made[0], made[1]


@pytest.mark.parametrize("what", ["an outsider", "nobody there", "of a plain block"])
def test_i25_a_payer_that_is_no_member(broken: Broken, what: str) -> None:
    acme, other = with_members(broken)
    payer = {"an outsider": other, "nobody there": 999, "of a plain block": acme}[what]
    public = [key for key, block in records_of(broken.warehouse._core).items() if block.payer]
    key = broken.at(1)[0] if what == "of a plain block" else public[2]
    with broken.warehouse as warehouse:
        assert len(public) == 4
        with warehouse._core.metadata.read() as view:
            block = view.block(key)
        assert block is not None
        broken.change(lambda view: view.put_block(key, replace(block, payer=payer)))
        warehouse._core.slots.charge_to(block.slot, payer)  # or memory would be another than tables
        assert {each.invariant for each in warehouse.check().findings} == {25}
    with offline(warehouse.directory) as subject:
        assert {each.invariant for each in invariants.run(subject).findings} == {25}
    assert_mended(warehouse.directory, broken.names, set())


@pytest.mark.parametrize("what", ["a sum", "a cell", "a block", "a reservation"])
def test_i26_a_charge_that_no_block_says(broken: Broken, what: str) -> None:
    """It is in no table: what is opened next has the charges that the blocks say."""
    acme, other = with_members(broken)
    with broken.warehouse as warehouse:
        core = warehouse._core
        assert warehouse.check().findings == ()
        if what == "a sum":
            core.charges.held[acme] -= 4096
        elif what == "a cell":
            next(iter(core.charges.cells.values())).held_bytes += 8192
        elif what == "a block":
            core.slots.charge_to(broken.at(2)[1].slot, other)
        else:
            core.reserved_bytes += 8192
        assert {each.invariant for each in warehouse.check().findings} == {26}
    assert_mended(warehouse.directory, broken.names, set())


def test_a_repair_keeps_the_sessions_whose_blocks_it_keeps(broken: Broken) -> None:
    session = with_session(broken)
    with broken.warehouse as warehouse:
        broken.change(lambda view: view.delete_raw("heads", next(view.raw("heads"))[0]))
        assert 9 in {each.invariant for each in warehouse.check().findings}
    assert_mended(warehouse.directory, broken.names, set())
    with offline(warehouse.directory) as subject, subject.metadata.read() as view:
        assert dict(every(view)) == {SESSION: replace(session, kept=True)}

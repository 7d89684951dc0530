"""The tree of files in the library: what is seen when, what survives, what goes as a whole."""

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from support.filing import WRITER, content, make_file, tree_of
from support.warehouses import flip_payload, make_warehouse, open_warehouse, settle
from twfs.daemon.permitting import Permitted
from twfs.errors import (
    BadPayload,
    BlockGone,
    FileExists,
    FileTooLarge,
    InvalidInput,
    IsADirectory,
    NameTooLong,
    NoAttribute,
    NoSuchFile,
    NoSuchModel,
    NotADirectory,
    NotEmpty,
    NotSupported,
    PromiseRefused,
    TwfsError,
    WarehouseFull,
)
from twfs.layout import FILES_NAME
from twfs.metadata import filetables
from twfs.metadata.filerows import FILE_BYTES_MAX, PIECE_BYTES, FileRow, names_of, row_of, tail_of
from twfs.protocol.messages import InfoOfBlock, ListHeads
from twfs.records import BlockKey
from twfs.recovery.rebuild import rebuild
from twfs.store import Retention
from twfs.units import ByteCount, Ino
from twfs.vfs.drafts import SPARSE_BYTES_MAX, Draft, Memory
from twfs.vfs.files import Files
from twfs.warehouse import Warehouse

OTHER = WRITER + 1
SIZES = (0, 1, 4095, 4096, 65536, 65537, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1,
         2 * PIECE_BYTES + 12345)  # fmt: skip


def bytes_of(size: int, seed: int = 1) -> bytes:
    return bytes([seed]) + os.urandom(size - 1) if size else b""


def begin(files: Files, name: bytes, data: bytes = b"", *, writer: int = WRITER) -> Draft:
    draft = files.create(0, name, mode=0o640, uid=0, gid=0, writer=writer)
    files.open_draft(draft, writing=True)
    if data:
        draft.write(0, data)
    return draft


def finish(files: Files, draft: Draft) -> None:
    assert files.close_draft(draft, writing=True)
    files.publish(draft)


def read(files: Files, name: bytes) -> bytes:
    return content(files, files.lookup(0, name))


def is_clean(warehouse: Warehouse) -> bool:
    settle(warehouse)
    return warehouse.check(data=True).findings == ()


@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_any_length_come_back_after_restart_and_rebuild(scratch: Path, size: int) -> None:
    data = bytes_of(size)
    with open_warehouse(scratch, (64 << 20,)) as warehouse:
        ino = make_file(warehouse.files, 0, b"f", data, mode=0o640, uid=7)
        row = warehouse.files.lookup(0, b"f")
        assert (row.ino, row.size, row.mode, row.uid) == (ino, size, stat.S_IFREG | 0o640, 7)
        assert read(warehouse.files, b"f") == data
        assert is_clean(warehouse)
    with Warehouse.open(scratch) as warehouse:
        assert warehouse.files.lookup(0, b"f") == row
        assert read(warehouse.files, b"f") == data
    rebuild(scratch, force=True)
    with Warehouse.open(scratch) as warehouse:
        assert warehouse.files.lookup(0, b"f") == row
        assert read(warehouse.files, b"f") == data
        assert is_clean(warehouse)


def test_a_draft_is_seen_by_its_writer_alone_until_it_is_published(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        draft = begin(files, b"f", b"abc")
        assert files.lookup(0, b"f", WRITER).size == 3
        with pytest.raises(NoSuchFile):
            files.lookup(0, b"f", OTHER)
        assert files.names(0) == []
        files.store(draft)
        with pytest.raises(NoSuchFile):
            files.lookup(0, b"f", OTHER)
        finish(files, draft)
        assert files.lookup(0, b"f", OTHER).size == 3
        again = begin(files, b"f", b"changed", writer=OTHER)
        assert read(files, b"f") == b"abc"
        assert files.lookup(0, b"f", OTHER).size == 7
        finish(files, again)
        assert read(files, b"f") == b"changed"
        assert is_clean(warehouse)


def test_what_was_not_closed_is_gone_after_a_restart(scratch: Path) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        draft = begin(warehouse.files, b"f", b"x" * 70_000)
        warehouse.files.store(draft)  # on the devices, and not published
    with Warehouse.open(scratch) as warehouse:
        assert warehouse.files.names(0) == []
        assert live_keys(warehouse) == []
        assert is_clean(warehouse)


def test_writes_at_any_place_and_truncation(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        draft, model = begin(files, b"f"), bytearray()
        places = [(5, 10), (PIECE_BYTES - 3, 9), (0, 3), (2 * PIECE_BYTES + 5, 100), (70_000, 50)]
        for seed, (at, size) in enumerate(places):
            data = bytes_of(size, seed)
            draft.write(at, data)
            model.extend(bytes(max(0, at + size - len(model))))
            model[at : at + size] = data
            assert draft.read(0, 1 << 30) == model
        for size in (2 * PIECE_BYTES + 50, PIECE_BYTES + 1, 70_010, 80_000, 3, 0, 5):
            draft.truncate(size)
            del model[size:]
            model.extend(bytes(size - len(model)))
            assert draft.read(0, 1 << 30) == model, size
        draft.write(10, b"end")
        model.extend(bytes(5) + b"end")
        finish(files, draft)
        assert read(files, b"f") == model


def test_changes_in_part_keep_the_rest(scratch: Path) -> None:
    data = bytes_of(PIECE_BYTES + 1000)
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        old = files.row(make_file(files, 0, b"f", data))
        draft = files.rewrite(old, writer=WRITER, truncate=False)
        files.open_draft(draft, writing=True)
        assert draft.read(0, 1 << 30) == data
        draft.write(len(data), b"more")
        draft.write(3, b"---")
        assert read(files, b"f") == data
        finish(files, draft)
        assert read(files, b"f") == data[:3] + b"---" + data[6:] + b"more"
        draft = files.rewrite(files.lookup(0, b"f"), writer=WRITER, truncate=False)
        files.open_draft(draft, writing=True)
        assert not files.close_draft(draft, writing=True)  # nothing was written
        assert is_clean(warehouse)
        assert files.statistics()["drafts"] == 0


def test_memory_that_is_full_sends_bytes_to_the_spool(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        files._room.memory = Memory(1 << 20)
        data = [bytes_of(PIECE_BYTES + 5000, seed) for seed in range(3)]
        drafts = [begin(files, b"f%d" % number, each) for number, each in enumerate(data)]
        assert not drafts[0].write_quickly(0, b"x")
        assert drafts[2].read(7, 100) == data[2][7:107]
        for draft in drafts:
            finish(files, draft)
        for number, each in enumerate(data):
            assert read(files, b"f%d" % number) == each
        assert files._room._regions == 0
        assert files.statistics()["draft_bytes"] == 0


def test_bounds_of_files(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        draft = begin(warehouse.files, b"f")
        with pytest.raises(FileTooLarge):
            draft.write(FILE_BYTES_MAX, b"x")
        for change in (draft.truncate, lambda size: draft.write(size, b"x")):
            with pytest.raises(NotSupported):
                change(SPARSE_BYTES_MAX + 1)
        draft.truncate(int(warehouse.space().total_bytes) + 1)
        with pytest.raises(WarehouseFull):
            warehouse.files.store(draft)
        assert is_clean(warehouse)


def test_names_and_directories(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        one = files.mkdir(0, b"one", mode=0o750, uid=3, gid=4)
        two = files.mkdir(one.ino, b"two", mode=0o700, uid=3, gid=4)
        make_file(files, two.ino, b"f", b"1")
        make_file(files, 0, b"g", b"2")
        files.rename(two.ino, b"f", 0, b"h")
        files.rename(0, b"h", 0, b"g")
        files.rename(one.ino, b"two", 0, b"deux")
        assert tree_of(files) == {b"/one": None, b"/deux": None, b"/g": b"1"}
        assert (files.lookup(0, b"one").uid, files.lookup(0, b"one").gid) == (3, 4)
        before = tree_of(files)
        assert is_clean(warehouse)
    rebuild(scratch, force=True)
    with Warehouse.open(scratch) as warehouse:
        assert tree_of(warehouse.files) == before
        assert is_clean(warehouse)


REFUSED: tuple[tuple[Callable[[Files], object], type[TwfsError], int], ...] = (
    (lambda f: f.mkdir(0, b"d", mode=0, uid=0, gid=0), FileExists, errno.EEXIST),
    (lambda f: f.mkdir(0, b"f", mode=0, uid=0, gid=0), FileExists, errno.EEXIST),
    (lambda f: f.mkdir(9, b"x", mode=0, uid=0, gid=0), NoSuchFile, errno.ENOENT),
    (lambda f: f.mkdir(0, b"x" * 256, mode=0, uid=0, gid=0), NameTooLong, errno.ENAMETOOLONG),
    (lambda f: f.mkdir(0, b"..", mode=0, uid=0, gid=0), InvalidInput, errno.EINVAL),
    (lambda f: f.rmdir(0, b"f"), NotADirectory, errno.ENOTDIR),
    (lambda f: f.rmdir(0, b"d"), NotEmpty, errno.ENOTEMPTY),
    (lambda f: f.rmdir(0, b"x"), NoSuchFile, errno.ENOENT),
    (lambda f: f.unlink(0, b"d"), IsADirectory, errno.EISDIR),
    (lambda f: f.unlink(0, b"x"), NoSuchFile, errno.ENOENT),
    (lambda f: f.rename(0, b"x", 0, b"y"), NoSuchFile, errno.ENOENT),
    (lambda f: f.rename(0, b"f", 0, b"d"), IsADirectory, errno.EISDIR),
    (lambda f: f.rename(0, b"d", 0, b"f"), NotADirectory, errno.ENOTDIR),
    (lambda f: f.rename(0, b"e", 0, b"d"), NotEmpty, errno.ENOTEMPTY),
    (lambda f: f.rename(0, b"f", 0, b"e", over=False), FileExists, errno.EEXIST),
    (lambda f: f.rename(0, b"f", 99, b"f"), NoSuchFile, errno.ENOENT),
    (lambda f: f.rename(0, b"d", f.lookup(0, b"d").ino, b"x"), InvalidInput, errno.EINVAL),
    (lambda f: f.remove_xattr(f.lookup(0, b"f").ino, b"user.x"), NoAttribute, errno.ENODATA),
    (lambda f: f.set_xattr(0, b"user.x", bytes(60_000)), WarehouseFull, errno.ENOSPC),
)


def test_refusals(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        below = files.mkdir(0, b"d", mode=0o755, uid=0, gid=0)
        files.mkdir(0, b"e", mode=0o755, uid=0, gid=0)
        make_file(files, 0, b"f", b"1")
        make_file(files, below.ino, b"g", b"2")
        before = tree_of(files)
        for act, error, number in REFUSED:
            with pytest.raises(error) as caught:
                act(files)
            assert caught.value.errno == number
            assert tree_of(files) == before
        assert is_clean(warehouse)


def removals(files: Files) -> list[Callable[[], object]]:
    """What takes the empty directory /d away."""
    return [lambda: files.rmdir(0, b"d"), lambda: files.rename(0, b"e", 0, b"d")]


@pytest.mark.parametrize("number", range(2), ids=["rmdir", "rename"])
def test_a_directory_in_which_a_file_is_written_is_not_empty(scratch: Path, number: int) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        below = files.mkdir(0, b"d", mode=0o755, uid=0, gid=0)
        files.mkdir(0, b"e", mode=0o755, uid=0, gid=0)
        draft = files.create(below.ino, b"f", mode=0o640, uid=0, gid=0, writer=WRITER)
        files.open_draft(draft, writing=True)
        draft.write(0, b"kept")
        remove = removals(files)[number]
        with pytest.raises(NotEmpty, match="being written in b'd'"):
            remove()
        assert files.close_draft(draft, writing=True)
        files.publish(draft)
        with pytest.raises(NotEmpty):
            remove()
        assert tree_of(files) == {b"/d": None, b"/d/f": b"kept", b"/e": None}
        files.unlink(below.ino, b"f")
        nameless = files.create(below.ino, b"g", mode=0o640, uid=0, gid=0, writer=WRITER)
        files.unlink(below.ino, b"g", WRITER)  # and still open: that keeps no directory
        remove()
        assert b"/d/f" not in tree_of(files)
        files.drop(nameless)
        assert is_clean(warehouse)


@pytest.mark.parametrize("number", range(2), ids=["rmdir", "rename"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_file_is_begun_in_a_directory_that_is_being_removed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, fails: bool
) -> None:
    """It would be written, and closed, for nothing."""
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        below = files.mkdir(0, b"d", mode=0o755, uid=0, gid=0)
        files.mkdir(0, b"e", mode=0o755, uid=0, gid=0)
        moved = begin(files, b"f", b"kept")
        refusals: list[Exception] = []

        def enter() -> None:
            for act in (
                lambda: files.create(below.ino, b"x", mode=0o640, uid=0, gid=0, writer=OTHER),
                lambda: files.rename(0, b"f", below.ino, b"f", writer=WRITER),
            ):
                with pytest.raises(NoSuchFile, match="being removed") as caught:
                    act()
                refusals.append(caught.value)

        removing = files._removing

        @contextmanager
        def watched() -> Iterator[Callable[[FileRow], None]]:
            with removing() as leave:

                def then(row: FileRow) -> None:
                    leave(row)
                    enter()
                    if fails:
                        raise OSError(errno.EIO, "the commit fails")

                yield then

        monkeypatch.setattr(files, "_removing", watched)
        with pytest.raises(OSError, match="the commit") if fails else nullcontext():
            removals(files)[number]()
        assert len(refusals) >= 2
        files.rename(0, b"f", 0, b"g", writer=WRITER)
        files.publish(moved)
        assert files.lookup(0, b"g").size == 4
        if fails:
            make_file(files, below.ino, b"x", b"1")
        assert is_clean(warehouse)


def test_attributes_survive_and_leave_no_old_row_behind(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        ino = make_file(files, 0, b"f", bytes_of(5000))
        for number in range(5):
            files.set_attributes(ino, mode=0o600 + number, uid=number, mtime_ns=number * 10**9)
            files.set_xattr(ino, b"user.k%d" % number, b"v" * number)
        files.remove_xattr(ino, b"user.k0")
        files.set_attributes(0, mode=0o711, uid=5)
        files.set_retention(ino, Retention.DURABLE)
        row = files.row(ino)
        assert sorted(row.xattrs) == [b"user.k%d" % number for number in range(1, 5)]
        settle(warehouse)
        assert len(live_keys(warehouse)) == 3  # of the file two blocks, of the root one
        assert is_clean(warehouse)
    rebuild(scratch, force=True)
    with Warehouse.open(scratch) as warehouse:
        assert warehouse.files.lookup(0, b"f") == row
        assert warehouse.files.row(0).mode & 0o777 == 0o711
        assert is_clean(warehouse)


def live_keys(warehouse: Warehouse) -> list[bytes]:
    """Own keys of all blocks of files."""
    core = warehouse._core
    with core.metadata.read() as view:
        model = view.model_id(FILES_NAME)
        assert model is not None
        packed = [key for key, _ in view.all_blocks() if BlockKey.unpack(key).model == model]
        return [block.key for key in packed if (block := view.block(BlockKey.unpack(key)))]


def test_an_unlinked_file_is_read_on_and_goes_with_the_last_close(scratch: Path) -> None:
    data = bytes_of(10_000)
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        row = files.row(make_file(files, 0, b"f", data))
        files.opened(row)
        files.opened(row)
        files.unlink(0, b"f")
        settle(warehouse)
        assert content(files, row) == data
        assert files.row(row.ino) == row
        files.closed(row.ino)
        settle(warehouse)
        assert content(files, row) == data
        files.closed(row.ino)
        settle(warehouse)
        with pytest.raises(BlockGone):
            content(files, row)
        assert live_keys(warehouse) == []
    assert rebuild(scratch, force=True).accepted == 0  # its header was overwritten


def test_unlinked_and_replaced_files_do_not_come_back_with_a_rebuild(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        for name in (b"gone", b"old", b"tmp"):
            make_file(files, 0, name, bytes_of(9000))
        files.unlink(0, b"gone")
        make_file(files, 0, b"old", b"new")
        files.rename(0, b"tmp", 0, b"final")
        settle(warehouse)
        before = tree_of(files)
    rebuild(scratch, force=True)
    with Warehouse.open(scratch) as warehouse:
        assert tree_of(warehouse.files) == before
        assert sorted(before) == [b"/final", b"/old"]


def test_eviction_takes_files_as_a_whole(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        below = files.mkdir(0, b"d", mode=0o755, uid=0, gid=0)
        data = {b"/d/f%02d" % number: bytes_of(PIECE_BYTES + number, number) for number in range(5)}
        for path, each in data.items():
            make_file(files, below.ino, path[3:], each)
        for _ in range(6):
            warehouse.evict(ByteCount(1))
            files.tend()
            settle(warehouse)
            left = tree_of(files)
            assert left.pop(b"/d") is None
            assert left.items() <= data.items()
            assert is_clean(warehouse)
        assert len(tree_of(files)) < 6
        assert files.gone


def test_a_file_that_loses_a_block_is_gone_and_its_blocks_too(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        row = files.row(make_file(files, 0, b"f", bytes_of(3 * PIECE_BYTES)))
        make_file(files, 0, b"g", b"stays")
        flip_payload(warehouse, files.blocks.info(row, 1).block)
        with pytest.raises(BadPayload):
            warehouse.read_block(files.blocks.info(row, 1))
        assert [name for name, _ in files.names(0)] == [b"g"]
        files.tend()
        settle(warehouse)
        assert [gone.name for gone in files.gone] == [b"f"]
        assert is_clean(warehouse)
        assert len(live_keys(warehouse)) == 1


def test_a_directory_whose_block_is_lost_stays_and_is_stored_again(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files, core = warehouse.files, warehouse._core
        below = files.mkdir(0, b"d", mode=0o755, uid=0, gid=0)
        make_file(files, below.ino, b"f", b"1")
        key = BlockKey(core.current[FILES_NAME], files.blocks.names(names_of(below)).hash_at(0))
        with core.metadata.read() as view:
            block = view.block(key)
        assert block is not None
        flip_payload(warehouse, block)
        warehouse.report_block(key, block.generation)
        assert tree_of(files) == {b"/d": None, b"/d/f": b"1"}
    with Warehouse.open(scratch) as warehouse:
        assert is_clean(warehouse)
    rebuild(scratch, force=True)
    with Warehouse.open(scratch) as warehouse:
        assert tree_of(warehouse.files) == {b"/d": None, b"/d/f": b"1"}


def test_a_lost_directory_leaves_its_files_under_another_name(scratch: Path) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        files, core = warehouse.files, warehouse._core
        below = files.mkdir(0, b"d", mode=0o755, uid=0, gid=0)
        make_file(files, below.ino, b"f", b"1")
        names = files.blocks.names(names_of(below))
        with core.metadata.read() as view:
            block = view.block(BlockKey(core.current[FILES_NAME], names.hash_at(0)))
        assert block is not None
        flip_payload(warehouse, block)
    rebuild(scratch, force=True)
    with Warehouse.open(scratch) as warehouse:
        lost = b"/lost-%d" % below.ino
        assert tree_of(warehouse.files) == {lost: None, lost + b"/f": b"1"}
        assert is_clean(warehouse)


def test_blocks_without_a_row_are_removed_at_the_next_start(scratch: Path) -> None:
    """What a crash leaves between the end of a row and the removal of its blocks."""
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        row = files.row(make_file(files, 0, b"f", bytes_of(PIECE_BYTES + 1)))
        files.set_attributes(row.ino, mode=0o600)
        make_file(files, 0, b"g", b"1")
        warehouse._core.metadata.submit(lambda view: filetables.unlink(view, 0, b"f", 0)).result()
    with Warehouse.open(scratch) as warehouse:
        settle(warehouse)
        assert tree_of(warehouse.files) == {b"/g": b"1"}
        assert len(live_keys(warehouse)) == 1
        assert is_clean(warehouse)
    rebuild(scratch, force=True)
    with Warehouse.open(scratch) as warehouse:
        assert tree_of(warehouse.files) == {b"/g": b"1"}


def test_many_writers_share_commits_and_names_have_one_winner(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files, barrier = warehouse.files, threading.Barrier(8)
        before = warehouse.statistics()["metadata"]["commits"]

        def work(number: int) -> None:
            barrier.wait()
            for turn in range(8):
                make_file_of(files, b"own-%d-%d" % (number, turn), WRITER + number)
                make_file_of(files, b"same", WRITER + number)

        def make_file_of(files: Files, name: bytes, writer: int) -> None:
            draft = begin(files, name, b"%d" % writer, writer=writer)
            finish(files, draft)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert len(files.names(0)) == 65
        assert read(files, b"same") in {b"%d" % (WRITER + number) for number in range(8)}
        settle(warehouse)
        assert len(live_keys(warehouse)) == 65
        assert warehouse.statistics()["metadata"]["jobs"] > (
            warehouse.statistics()["metadata"]["commits"] - before
        )
        assert is_clean(warehouse)


def test_renames_and_changes_of_one_file_at_once(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        ino = make_file(files, 0, b"n0", b"1")

        def rename(number: int) -> None:
            for turn in range(5):
                try:
                    files.rename(0, files.row(ino).name, 0, b"n%d-%d" % (number, turn))
                except NoSuchFile:
                    continue

        def change(number: int) -> None:
            for turn in range(5):
                files.set_xattr(ino, b"user.%d" % number, b"%d" % turn)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda n: rename(n) if n % 2 else change(n), range(6)))
        row = files.row(ino)
        assert files.names(0) == [(row.name, ino)]
        assert row.xattrs == {b"user.%d" % number: b"4" for number in (0, 2, 4)}
        assert is_clean(warehouse)


def test_the_model_of_files_is_nobody_elses(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        make_file(warehouse.files, 0, b"f", b"1")
        with pytest.raises(InvalidInput, match="tree of files"):
            warehouse.open_model(FILES_NAME)
        assert warehouse.models() == []


def test_rows_are_read_with_suspicion() -> None:
    row = FileRow(
        Ino(5), Ino(0), b"name", stat.S_IFREG | 0o644, 1, 2, 5000, 1, 3, 4, 5, 2,
        {b"user.a": b"b", b"user.c": b""},
    )  # fmt: skip
    assert FileRow.unpack(row.pack()) == row
    assert row_of(b"content" + tail_of(row)) == row
    packed = row.pack()
    wholes = {len(packed) - 12, len(packed) - 12 - 13}  # where an attribute ends
    for end in range(len(packed)):
        if end not in wholes:
            with pytest.raises(ValueError, match="row"):
                FileRow.unpack(packed[:end])
    for wrong in (replace(row, blocks=2), replace(row, mode=0o120777), replace(row, retention=4)):
        with pytest.raises(ValueError, match="row"):
            FileRow.unpack(wrong.pack())
    for payload in (b"", b"abc", b"\xff" * 8):
        with pytest.raises(ValueError, match=r"carries no row|row has"):
            row_of(payload)


def test_a_client_cannot_name_the_model_of_files(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        row = warehouse.files.row(make_file(warehouse.files, 0, b"f", b"1"))
        number = warehouse._core.current[FILES_NAME]
        key = warehouse.files.blocks.info(row, 0).key.pack()
        for uid in (0, 12345):
            for request in (ListHeads(1, number), InfoOfBlock(1, key)):
                with pytest.raises(NoSuchModel):
                    Permitted(warehouse, uid).permit(request)


def test_a_listing_finds_under_a_name_what_it_leads_to_now(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        for name in (b"anew", b"gone", b"moved"):
            make_file(files, 0, name, b"old")
        listed = files.names(0)
        anew = make_file(files, 0, b"anew", b"new")
        files.unlink(0, b"gone")
        files.rename(0, b"moved", 0, b"there")
        found = files.rows(0, listed)
        assert [None if row is None else row.ino for row in found] == [anew, None, None]


def make_directories(files: Files, wanted: int) -> int:
    """Make up to *wanted* directories; how many there was room for."""
    for made in range(wanted):
        try:
            files.mkdir(0, b"%d" % files._new_ino(), mode=0o755, uid=0, gid=0)
        except WarehouseFull as error:
            if "directories take 1/16 of the space" not in str(error):
                raise
            return made
    return wanted


def test_directories_may_take_their_part_of_the_space_and_no_more(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files, total = warehouse.files, warehouse.space().total_bytes
        made = make_directories(files, 1000)
        assert (made - 1) * 8192 * 16 < total <= (made + 2) * 8192 * 16  # the root is one
        names = [name for name, _ in files.names(0)]
        files.rmdir(0, names.pop())
        assert make_directories(files, 2) == 1
        files.rename(0, names[0], 0, names[1])  # takes the place of that one
        assert make_directories(files, 2) == 1
    with open_warehouse(scratch) as warehouse:
        assert make_directories(warehouse.files, 1) == 0


def test_directories_need_none_of_what_may_be_pinned(scratch: Path) -> None:
    make_warehouse(scratch)
    (scratch / "twfs.toml").write_text("[retention.pinned]\nshare = 0.000001\n")
    with open_warehouse(scratch) as warehouse:
        files = warehouse.files
        row = files.mkdir(0, b"d", mode=0o755, uid=0, gid=0)
        files.set_attributes(row.ino, mode=0o700)
        files.rename(0, b"d", 0, b"e")
        make_file(files, row.ino, b"f", b"kept as others")
        files.set_retention(row.ino, Retention.PINNED)  # of the files that are made in it
        with pytest.raises(PromiseRefused, match="cannot be pinned") as caught:
            make_file(files, row.ino, b"g", b"kept for good")
        assert caught.value.errno == errno.ENOSPC
        assert tree_of(files) == {b"/e": None, b"/e/f": b"kept as others"}

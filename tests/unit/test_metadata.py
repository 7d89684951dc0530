"""The tables survive closing and killing, jobs are whole or nothing, and damage is an error.

Never a dead process: LMDB maps its file, and one that is shorter than it says means SIGBUS.
"""

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import lmdb  # noqa: TID251
import pytest

from twfs.errors import (
    CorruptMetadata,
    DeviceError,
    FormatTooNew,
    NoSuchWarehouse,
    WarehouseBusy,
    WarehouseClosed,
)
from twfs.metadata.environment import BACKLOG_MAX, JOBS_PER_COMMIT_MAX, Metadata
from twfs.metadata.metafile import refuse_unverified
from twfs.metadata.tables import LENGTH, RETIRED, DeviceRecord, WriteView
from twfs.records import FORMAT_VERSION, BlockKey, Extent
from twfs.store import Durability
from twfs.units import ByteCount, ByteOffset, DeviceIndex, ModelId, PrefixHash

ALL = Extent(DeviceIndex(0), ByteOffset(1 << 20), ByteCount(64 << 12))
DEVICES = [DeviceRecord(DeviceIndex(0), uuid.UUID(int=5), "device0.img", ByteCount(16 << 20))]
REPOSITORY = Path(__file__).parents[2]


def extent(unit: int, units: int, device: int = 0) -> Extent:
    return Extent(DeviceIndex(device), ByteOffset((1 << 20) + (unit << 12)), ByteCount(units << 12))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of a fresh environment."""
    Metadata.create(tmp_path / "meta", uuid.UUID(int=7), DEVICES, [ALL], bytes(32))
    return tmp_path / "meta"


@pytest.fixture
def metadata(directory: Path) -> Iterator[Metadata]:
    """A fresh environment, open."""
    opened = Metadata.open(directory)
    yield opened
    opened.close()


def counter(metadata: Metadata, name: str) -> int:
    with metadata.read() as view:
        return view.counter(name)


def test_a_fresh_environment_says_who_it_is(metadata: Metadata) -> None:
    assert metadata.warehouse() == uuid.UUID(int=7)
    assert metadata.devices() == DEVICES
    with metadata.read() as view:
        assert list(view.runs("free")) == [ALL]
        assert view.models() == []
        assert view.counter("generation") > 0
        assert view.counts()["free"] == 1


def test_committed_jobs_are_there_after_reopening(directory: Path) -> None:
    first = Metadata.open(directory)
    first.submit(lambda view: view.set_counter("a", 41)).result()
    first.close()
    first.close()
    second = Metadata.open(directory)
    assert counter(second, "a") == 41
    second.close()


def test_a_job_that_raises_changes_nothing_and_fails_nobody_else(metadata: Metadata) -> None:
    gate = threading.Event()
    first = metadata.submit(lambda _: gate.wait())  # what follows is one batch

    def bad(view: WriteView) -> None:
        view.set_counter("bad", 1)
        raise KeyError("of the job")

    before = metadata.submit(lambda view: view.set_counter("before", 1))
    failing = metadata.submit(bad)
    after = metadata.submit(lambda view: view.set_counter("after", view.counter("before") + 1))
    gate.set()
    first.result()
    before.result()
    after.result()
    with pytest.raises(KeyError, match="of the job"):
        failing.result()
    assert (counter(metadata, "bad"), counter(metadata, "after")) == (0, 2)


def test_after_runs_in_commit_order_once_the_job_can_be_read(metadata: Metadata) -> None:
    seen: list[tuple[int, int]] = []

    def queue_one(number: int) -> "Future[int]":
        def job(view: WriteView) -> int:
            view.set_counter("n", number)
            return number

        return metadata.submit(job, lambda result: seen.append((result, counter(metadata, "n"))))

    futures = [queue_one(number) for number in range(600)]
    assert [future.result() for future in futures] == list(range(600))
    assert [result for result, _ in seen] == list(range(600))
    assert all(visible >= result for result, visible in seen)
    statistics = metadata.statistics()
    assert statistics["commits"] < statistics["jobs"] == 600
    assert statistics["jobs"] <= statistics["commits"] * JOBS_PER_COMMIT_MAX


@pytest.fixture
def relaxed(directory: Path) -> Iterator[Metadata]:
    metadata = Metadata.open(directory, Durability.RELAXED)
    yield metadata
    metadata.close()


def set_a(view: WriteView) -> None:
    """Change something: a transaction without a change is no commit."""
    view.set_counter("a", view.counter("a") + 1)


def test_strict_settles_with_the_commit(metadata: Metadata) -> None:
    seen: list[str] = []
    metadata.submit(
        set_a, lambda _: seen.append("after"), settled=lambda _: seen.append("settled")
    ).result()
    metadata.settle()
    assert seen == ["after", "settled"]
    assert metadata.statistics()["syncs"] == 0


@pytest.mark.parametrize("changes", [True, False])
def test_relaxed_settles_with_a_later_commit_that_changes_something(
    relaxed: Metadata, monkeypatch: pytest.MonkeyPatch, *, changes: bool
) -> None:
    # Each in a commit of its own:
    monkeypatch.setattr("twfs.metadata.environment.JOBS_PER_COMMIT_MAX", 1)
    seen: list[str] = []
    first, gate = threading.Event(), threading.Event()

    def follow(view: WriteView) -> None:
        first.set()
        gate.wait()
        if changes:
            set_a(view)

    held = threading.Event()
    relaxed.submit(lambda _: held.wait())
    freed = relaxed.submit(
        set_a, lambda _: seen.append("after"), settled=lambda _: seen.append("settled")
    )
    following = relaxed.submit(follow, lambda _: seen.append("following"))
    last_gate = threading.Event()
    last = relaxed.submit(lambda _: last_gate.wait())
    held.set()
    first.wait()
    assert seen == ["after"]  # committed, and a power cut may still undo it
    assert not freed.done()
    gate.set()
    following.result()
    freed.result()  # although another job waits: nothing must wait for a third commit
    assert seen == ["after", *(["settled", "following"] if changes else ["following", "settled"])]
    assert relaxed.statistics()["syncs"] == (not changes)
    last_gate.set()
    last.result()


def test_relaxed_settles_at_once_when_nothing_else_is_queued(relaxed: Metadata) -> None:
    seen: list[int] = []
    relaxed.submit(set_a, settled=lambda _: seen.append(relaxed.statistics()["syncs"])).result()
    assert seen == [1]
    relaxed.submit(set_a).result()
    assert relaxed.statistics()["syncs"] == 1  # nobody asked
    relaxed.settle()
    assert relaxed.statistics()["syncs"] == 2


def test_a_failed_sync_is_final_where_the_commit_before_relied_on_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = Metadata.open(directory, Durability.RELAXED)

    def fail(_: Metadata) -> None:
        raise lmdb.Error("mdb_env_sync: Input/output error")

    monkeypatch.setattr(Metadata, "_force", fail)
    settled: list[None] = []
    failing = metadata.submit(set_a, settled=settled.append)
    with pytest.raises(DeviceError, match="Input/output"):
        failing.result()
    monkeypatch.undo()
    with pytest.raises(DeviceError, match="restart the daemon"):
        metadata.submit(set_a).result()
    with pytest.raises(DeviceError):
        metadata.settle()
    assert settled == []
    with metadata.read() as view:  # reads go on
        assert view.counter("a") == 1
    metadata.close()
    again = Metadata.open(directory)
    assert again.submit(lambda view: view.counter("a")).result() == 1
    again.close()


def test_closing_relaxed_metadata_makes_all_of_it_certain(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[int] = []
    right = Metadata._force

    def force(metadata: Metadata) -> None:
        forced.append(metadata.statistics()["jobs"])
        right(metadata)

    monkeypatch.setattr(Metadata, "_force", force)
    metadata = Metadata.open(directory, Durability.RELAXED)
    metadata.submit(set_a).result()
    assert forced == []
    metadata.close()
    assert forced == [1]


def test_what_is_queued_cannot_be_cancelled(metadata: Metadata) -> None:
    """A cancelled future would end the writer thread, and every put with it."""
    gate = threading.Event()
    first = metadata.submit(lambda _: gate.wait())
    second = metadata.submit(lambda view: view.set_counter("a", 1))
    assert not first.cancel()
    assert not second.cancel()
    gate.set()
    second.result()
    assert metadata.submit(lambda view: view.counter("a")).result() == 1


def test_an_after_that_raises_tells_its_waiter_only(metadata: Metadata) -> None:
    def after(_: None) -> None:
        raise LookupError("of the after")

    failing = metadata.submit(lambda view: view.set_counter("a", 1), after)
    with pytest.raises(LookupError):
        failing.result()
    assert metadata.submit(lambda view: view.counter("a")).result() == 1


def test_urgent_jobs_pass_a_full_backlog_also_from_the_writer_thread(metadata: Metadata) -> None:
    """Who holds the warehouse's lock, or is the writer thread, would wait for itself for ever."""
    gate = threading.Event()
    first = metadata.submit(lambda _: gate.wait())
    futures = [metadata.submit(lambda _: None) for _ in range(BACKLOG_MAX - 1)]
    waiting = threading.Thread(target=lambda: metadata.submit(lambda _: None).result())
    waiting.start()
    chained: list[Future[None]] = []
    urgent = metadata.submit(
        lambda _: None,
        lambda _: chained.append(metadata.submit(lambda _: None, urgent=True)),
        urgent=True,
    )
    gate.set()
    first.result()
    for future in (*futures, urgent):
        future.result()
    chained[0].result()
    waiting.join()


def test_close_commits_what_is_queued_and_refuses_what_comes_later(directory: Path) -> None:
    metadata = Metadata.open(directory)
    gate = threading.Event()
    refused: list[bool] = []

    def late(_: None) -> None:
        try:
            metadata.submit(lambda view: view.set_counter("late", 1), urgent=True)
        except WarehouseClosed:
            refused.append(True)

    metadata.submit(lambda _: gate.wait())
    queued = metadata.submit(lambda view: view.set_counter("a", 1), late)
    closer = threading.Thread(target=metadata.close)
    closer.start()
    while not metadata._stopping:
        closer.join(timeout=0.001)
    gate.set()
    closer.join()
    queued.result()
    assert refused == [True]
    with pytest.raises(WarehouseClosed):
        metadata.submit(lambda _: None)
    with pytest.raises(WarehouseClosed), metadata.read():
        pass
    again = Metadata.open(directory)
    assert counter(again, "a") == 1
    assert counter(again, "late") == 0
    again.close()


def test_close_waits_for_reads_under_way(directory: Path) -> None:
    metadata = Metadata.open(directory)
    with metadata.read() as view:
        closer = threading.Thread(target=metadata.close)
        closer.start()
        metadata._writer.join()  # close has got as far as waiting for us
        assert view.counter("model") == 1
    closer.join()


def test_errors_that_are_kept_with_their_frames_keep_no_reader_slot(metadata: Metadata) -> None:
    """LMDB has a slot for each transaction object; a traceback keeps those of its frames alive."""
    kept: list[BaseException] = []

    def look() -> None:
        with metadata.read() as view:
            assert view.counter("model") == 1
            raise KeyError("nothing there")

    for _ in range(2000):
        try:
            look()
        except KeyError as error:
            kept.append(error)
    assert metadata.statistics()["readers"] <= 1  # one is kept for the next
    with metadata.read() as view:
        assert view.counter("model") == 1


def test_only_one_process_or_object_opens_it(metadata: Metadata) -> None:
    with pytest.raises(WarehouseBusy, match="daemon's socket"):
        Metadata.open(metadata.directory)


def test_no_directory_is_no_warehouse(tmp_path: Path) -> None:
    with pytest.raises(NoSuchWarehouse, match="twfs create"):
        Metadata.open(tmp_path / "meta")


def test_a_newer_format_is_refused_and_left_alone(directory: Path) -> None:
    metadata = Metadata.open(directory)
    newer = LENGTH.pack(FORMAT_VERSION + 1)
    metadata.submit(lambda view: view.set_meta("format_version", newer)).result()
    metadata.close()
    before = (directory / "data.mdb").read_bytes()
    with pytest.raises(FormatTooNew, match=f"version {FORMAT_VERSION + 1}"):
        Metadata.open(directory)
    assert (directory / "data.mdb").read_bytes() == before


def test_an_environment_of_something_else_is_no_warehouse(directory: Path) -> None:
    metadata = Metadata.open(directory)
    metadata.submit(lambda view: view.set_meta("format_version", LENGTH.pack(0))).result()
    metadata.close()
    with pytest.raises(CorruptMetadata, match="not of twfs"):
        Metadata.open(directory)


def fill(directory: Path) -> None:
    """Make the file a few hundred kilobytes long."""
    metadata = Metadata.open(directory)

    def job(view: WriteView) -> None:
        for number in range(5000):
            view.set_meta(f"filler {number}", os.urandom(64))

    metadata.submit(job).result()
    metadata.close()


@pytest.mark.parametrize("keep", ["nothing", "100", "8192", "third", "all but a byte"])
def test_a_truncated_file_is_an_error_and_never_sigbus(directory: Path, keep: str) -> None:
    fill(directory)
    path = directory / "data.mdb"
    size = path.stat().st_size
    sizes = {"nothing": 0, "third": size // 3 // 4096 * 4096, "all but a byte": size - 1}
    os.truncate(path, sizes[keep] if keep in sizes else int(keep))
    code = f"""
from pathlib import Path
from twfs.metadata.environment import Metadata
from twfs.errors import CorruptMetadata
try:
    metadata = Metadata.open(Path({str(directory)!r}))
    with metadata.read() as view:
        view.counts(), list(view.all_blocks()), list(view.runs("free")), view.models()
        for number in range(5000):
            view.meta(f"filler {{number}}")
    metadata.close()
except CorruptMetadata as error:
    print("CorruptMetadata:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if keep != "all but a byte":  # the last page may be a free one, and then nothing is lost
        assert "CorruptMetadata: " in done.stdout
        assert "restore it" in done.stdout


def test_garbage_is_an_error(directory: Path) -> None:
    fill(directory)
    with (directory / "data.mdb").open("r+b") as file:
        file.write(os.urandom(8192))
    with pytest.raises(CorruptMetadata):
        Metadata.open(directory)


def test_unreadable_records_are_errors_with_their_names(metadata: Metadata) -> None:
    def job(view: WriteView) -> None:
        view._put("models", b"\0\0\0\1", b"{not json")
        view._put("blocks", BlockKey(ModelId(1), PrefixHash(bytes(16))).pack(), b"short")
        view.set_meta("devices", b"[]x")

    metadata.submit(job).result()
    with metadata.read() as view:
        with pytest.raises(CorruptMetadata, match="model's record"):
            view.models()
        with pytest.raises(CorruptMetadata, match="5 bytes"):
            view.block(BlockKey(ModelId(1), PrefixHash(bytes(16))))
    with pytest.raises(CorruptMetadata, match="list of devices"):
        metadata.devices()


def test_free_runs_are_cut_and_merged(metadata: Metadata) -> None:
    def runs() -> list[Extent]:
        with metadata.read() as view:
            return list(view.runs("free"))

    def change(take: list[Extent], add: list[Extent]) -> None:
        def job(view: WriteView) -> None:
            for each in take:
                view.take_free(each)
            for each in add:
                view.add_free(each)

        metadata.submit(job).result()

    change([extent(0, 4), extent(10, 2), extent(63, 1)], [])
    assert runs() == [extent(4, 6), extent(12, 51)]
    change([], [extent(10, 1)])
    assert runs() == [extent(4, 7), extent(12, 51)]
    change([], [extent(11, 1), extent(0, 4), extent(63, 1), extent(0, 3, device=1)])
    assert runs() == [ALL, extent(0, 3, device=1)]
    with pytest.raises(AssertionError):
        change([], [extent(1, 1)])  # free already
    with pytest.raises(AssertionError):
        change([extent(62, 5)], [])  # not free as far
    assert runs() == [ALL, extent(0, 3, device=1)]


def test_limbo_tells_retired_extents_from_leased_ones(metadata: Metadata) -> None:
    def job(view: WriteView) -> None:
        view.add_limbo(extent(0, 2))
        view.add_limbo(extent(4, 2), RETIRED)

    metadata.submit(job).result()
    with metadata.read() as view:
        assert list(view.runs("limbo")) == [extent(0, 2), extent(4, 2)]
        assert list(view.leased_limbo()) == [extent(0, 2)]


def test_heads_are_listed_in_order_from_behind_any_hash(metadata: Metadata) -> None:
    hashes = [PrefixHash(bytes([number]) * 16) for number in (1, 3, 5, 255)]

    def job(view: WriteView) -> list[bool]:
        added = [view.add_head(ModelId(2), each) for each in hashes]
        view.add_head(ModelId(3), hashes[0])
        view.add_head(ModelId(1), hashes[3])
        return [*added, view.add_head(ModelId(2), hashes[0])]

    assert metadata.submit(job).result() == [True] * 4 + [False]
    with metadata.read() as view:
        assert view.heads(ModelId(2), None, 10) == hashes
        assert view.heads(ModelId(2), hashes[1], 10) == hashes[2:]
        assert view.heads(ModelId(2), PrefixHash(b"\2" * 16), 2) == hashes[1:3]
        assert view.heads(ModelId(2), hashes[3], 10) == []
        assert view.heads(ModelId(9), None, 10) == []


def test_lmdbs_own_checker_finds_nothing(metadata: Metadata) -> None:
    metadata.submit(lambda view: view.set_counter("a", 1)).result()
    refuse_unverified(metadata.directory / "data.mdb")

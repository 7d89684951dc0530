"""The facade: what was put comes back, over reopening too, from several threads, until close."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.warehouses import (
    DEVICE_BYTES,
    LAYOUTS,
    MHA,
    block_at,
    chain_of,
    flip_payload,
    make_warehouse,
    open_warehouse,
    own_names,
    payloads_of,
    put,
    put_whole,
    read_all,
)
from twfs.errors import (
    InvalidInput,
    LayoutMismatch,
    NoSuchModel,
    StaleEpoch,
    WarehouseBusy,
    WarehouseClosed,
)
from twfs.layout import Group, Layout
from twfs.store import PutOutcome, ReadOutcome, Retention
from twfs.units import ByteCount, ModelId
from twfs.warehouse import Warehouse


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_was_put_comes_back_also_after_reopening(scratch: Path, kind: str) -> None:
    with open_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        model = warehouse.open_model("m", LAYOUTS[kind])
        names = chain_of(model, 12)
        put_whole(warehouse, model, names)
        put_whole(warehouse, model, chain_of(model, 9, 7, fork=5))
        assert read_all(warehouse, model, names) == 12
        sessions = warehouse.sessions(model.id)
        links = [info.links for info in warehouse.chain_of(model.id, names.hash_at(11))]
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m")
        assert read_all(warehouse, model, names) == 12
        assert read_all(warehouse, model, chain_of(model, 9, 7, fork=5)) == 9
        assert read_all(warehouse, model, names, start=4) == 12
        again = [info.links for info in warehouse.chain_of(model.id, names.hash_at(11))]
        assert again == links
        for before, after in zip(sessions, warehouse.sessions(model.id), strict=True):
            assert (before.own_bytes, before.shared_bytes) == (after.own_bytes, after.shared_bytes)


def test_two_threads_that_put_one_session_store_it_once(scratch: Path) -> None:
    with open_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 60)
        results = []
        start = threading.Barrier(4)

        def work() -> None:
            start.wait()
            results.append(put(warehouse, model, names))

        in_threads([work] * 4)
        assert [result.held for result in results] == [60] * 4
        published = [r.outcomes.count(PutOutcome.PUBLISHED) for r in results]
        assert sum(published) == 60
        assert warehouse.models()[0].blocks == 60
        assert read_all(warehouse, model, names) == 60


def test_threads_that_put_branches_read_and_evict_leave_no_finding(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)

        def writer(seed: int) -> Callable[[], None]:
            def work() -> None:
                for turn in range(1, 9):
                    assert put(warehouse, model, chain_of(model, 3 * turn, seed, fork=3)).held

            return work

        def reader() -> None:
            for seed in range(40):
                read_all(warehouse, model, chain_of(model, 24, 1 + seed % 4, fork=3))

        def evictor() -> None:
            for _ in range(20):
                warehouse.evict(ByteCount(20_000))

        put(warehouse, model, chain_of(model, 3))
        in_threads([writer(1), writer(2), writer(3), writer(1), reader, evictor])


def in_threads(works: list[Callable[[], None]]) -> None:
    """Run all of *works* at once; what one raises fails the test."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


def test_close_waits_for_puts_under_way_and_refuses_later_ones(scratch: Path) -> None:
    make_warehouse(scratch)
    warehouse = Warehouse.open(scratch)
    model = warehouse.open_model("m", MHA)
    kept: list[int] = []
    begun = threading.Event()
    refused: list[BaseException] = []

    def work() -> None:
        for seed in range(1000):
            try:
                put(warehouse, model, chain_of(model, 4, seed))
            except WarehouseClosed as error:
                refused.append(error)
                return
            kept.append(seed)
            begun.set()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    begun.wait()
    warehouse.close()
    for thread in threads:
        thread.join()
    assert len(refused) == 2
    with open_warehouse(scratch) as warehouse:
        for seed in kept:
            assert read_all(warehouse, model, chain_of(model, 4, seed)) == 4


def test_close_makes_matches_misses_and_is_idempotent(scratch: Path) -> None:
    make_warehouse(scratch)
    warehouse = Warehouse.open(scratch)
    model = warehouse.open_model("m", MHA)
    names = chain_of(model, 4)
    put(warehouse, model, names)
    match = warehouse.match(model, names)
    assert match.held
    warehouse.close()
    warehouse.close()
    assert not match.held
    into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(4)]
    assert match.read_into(into).outcomes == (ReadOutcome.LEASE_ENDED,) * 4
    assert not any(array.any() for array in into)
    match.release()
    assert warehouse.match(model, names).blocks == 0
    assert warehouse.lookup(model, names) == 0
    warehouse.touch(model, names)
    for refused in (
        lambda: warehouse.put(model, names, payloads_of(MHA, names)),
        lambda: warehouse.evict(ByteCount(1)),
        warehouse.check,
        warehouse.space,
        lambda: warehouse.open_model("other", MHA),
        lambda: warehouse.remove(model.id, names.hash_at(3)),
    ):
        with pytest.raises(WarehouseClosed):
            refused()


def test_reads_in_flight_at_close_are_right_or_misses(scratch: Path) -> None:
    make_warehouse(scratch)
    warehouse = Warehouse.open(scratch)
    model = warehouse.open_model("m", MHA)
    names = chain_of(model, 64)
    put(warehouse, model, names)
    wanted = payloads_of(MHA, names)
    match = warehouse.match(model, names)
    begun, over = threading.Event(), threading.Event()
    seen: list[ReadOutcome] = []

    def work() -> None:
        while not over.is_set():
            into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(64)]
            report = match.read_into(into)
            begun.set()
            for outcome, got, right in zip(report.outcomes, into, wanted, strict=True):
                seen.append(outcome)
                assert outcome is not ReadOutcome.HIT or np.array_equal(got, right)
            if ReadOutcome.LEASE_ENDED in report.outcomes:
                over.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    warehouse.close()
    thread.join()
    assert over.is_set()
    assert set(seen) <= {ReadOutcome.HIT, ReadOutcome.LEASE_ENDED}


def test_a_second_opener_is_refused_and_harms_nothing(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 2))
        with pytest.raises(WarehouseBusy, match="open in another process"):
            Warehouse.open(scratch)
        assert read_all(warehouse, model, chain_of(model, 2)) == 2


def test_a_model_keeps_the_layout_it_was_made_with(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        with pytest.raises(NoSuchModel):
            warehouse.open_model("m")
        model = warehouse.open_model("m", MHA)
        assert warehouse.open_model("m").id == model.id == warehouse.open_model("m", MHA).id
        other = Layout("test/mha", (Group(layers=2, kv_heads=2, head_size=16),), 16)
        with pytest.raises(LayoutMismatch, match="head_size"):
            warehouse.open_model("m", other)
        with pytest.raises(InvalidInput):
            warehouse.open_model("../m", MHA)


def test_a_new_epoch_hides_all_blocks_and_frees_their_space(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 4)
        put(warehouse, model, names)
        held = warehouse.match(model, names)
        fresh = warehouse.new_epoch(model)
        assert (fresh.epoch, fresh.layout) == (model.epoch + 1, model.layout)
        assert warehouse.lookup(model, names) == 0
        assert warehouse.match(model, names).blocks == 0
        with pytest.raises(StaleEpoch):
            put(warehouse, model, names)
        into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(4)]
        assert held.read_into(into).blocks == 4  # the lease keeps them
        held.release()
        put(warehouse, fresh, chain_of(fresh, 2))
        from twfs.eviction import evicting

        evicting.sweep_epochs(warehouse._core)
        assert [info.blocks for info in warehouse.models()] == [2]
        with pytest.raises(StaleEpoch):  # not NoSuchModel, though its record is gone
            put(warehouse, model, names)
        with pytest.raises(StaleEpoch):
            warehouse.remove(model.id, names.hash_at(3))
        with pytest.raises(NoSuchModel):
            warehouse.remove(ModelId(999), names.hash_at(3))
        assert warehouse.sessions(model.id) == []
        assert warehouse.lookup(model, names) == 0
        assert "epoch" in warehouse.explain(model.id, names).cause


def test_old_epochs_are_swept_in_the_background_after_reopening(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 30))
        fresh = warehouse.new_epoch(model)
        put(warehouse, fresh, chain_of(fresh, 3))
    with open_warehouse(scratch) as warehouse:
        again = warehouse.open_model("m")
        assert (again.id, again.epoch) == (fresh.id, 1)
        assert warehouse.lookup(again, chain_of(again, 3)) == 3
        with pytest.raises(StaleEpoch):
            warehouse.new_epoch(model)


def test_a_reported_block_is_read_again_before_it_is_given_up(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 1)
        assert not warehouse.report_block(key, block.generation)
        assert not warehouse.report_block(key, block.generation + 1)
        assert read_all(warehouse, model, names) == 3
        flip_payload(warehouse, block)
        assert not warehouse.report_block(key, block.generation + 1)
        assert warehouse.report_block(key, block.generation)
        assert not warehouse.report_block(key, block.generation)
        assert read_all(warehouse, model, names) == 1
        assert "hole" in warehouse.explain(model.id, names).cause
        assert put(warehouse, model, names).outcomes[1] is PutOutcome.PUBLISHED
        assert read_all(warehouse, model, names) == 3


def test_a_bad_block_found_by_a_reader_becomes_a_hole_by_itself(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        flip_payload(warehouse, block_at(warehouse, model, names, 1)[1], 77)
        with warehouse.match(model, names) as match:
            into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(3)]
            report = match.read_into(into)
        assert report.blocks == 1
        assert report.outcomes[1] is ReadOutcome.BAD_CHECKSUM
        warehouse._puts.shutdown()  # waits for the report
        assert warehouse.statistics()["counters"]["holes"] == 1
        assert warehouse.lookup(model, names) == 1


def test_join_shares_a_lease_and_its_names_suffice_to_read(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 5)
        put(warehouse, model, names)
        first = warehouse.match(model, names, start=2)
        second = warehouse.join(first.token)
        assert (second.start, second.blocks) == (2, 5)
        into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(3)]
        assert second.read_into(into).blocks == 3
        assert all(map(np.array_equal, into, payloads_of(MHA, names)[2:]))
        second.release()


def test_statistics_name_every_part(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        figures = warehouse.statistics()
        assert {"counters", "slots", "leases", "allocator", "space", "devices"} <= set(figures)
        assert figures["slots"]["slots_live"] == 0
        assert warehouse.models() == []
        model = warehouse.open_model("m", MHA)
        assert warehouse.models()[0].blocks == 0
        before = warehouse.changes()
        put(warehouse, model, own_names(model, ("a", None, 0)), retention=Retention.DURABLE)
        assert warehouse.changes() > before


def test_background_work_goes_on_after_it_has_failed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    turns: list[int] = []
    again = threading.Event()

    def keep_house(_: Warehouse, turn: int) -> None:
        turns.append(turn)
        if turn == 1:
            raise AssertionError("a fault of our own")
        again.set()

    monkeypatch.setattr("twfs.warehouse.TEND_SECONDS", 0.01)
    monkeypatch.setattr(Warehouse, "_keep_house", keep_house)
    with open_warehouse(scratch):
        assert again.wait(20)
    assert turns[:2] == [1, 2]
    assert "a fault of our own" in caplog.text

"""A put publishes what is durable and nothing else, and whatever goes wrong leaves no leak.

`open_warehouse` proves the second half: reservations, slots and free runs are compared at the end.
"""

from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.warehouses import (
    BIG,
    DEVICE_BYTES,
    MHA,
    MLA,
    assert_sound,
    block_at,
    chain_of,
    commits_held,
    open_warehouse,
    own_names,
    payloads_of,
    put,
    read_all,
    settle,
    upload_all,
    waiting_for_commit,
    write_all,
)
from twfs.checksums import checksums_of
from twfs.datapath.putting import PUT_BLOCKS_MAX, Put
from twfs.devices import device as device_module
from twfs.devices.payload import aligned_buffer
from twfs.errors import (
    DeviceError,
    InvalidInput,
    StaleEpoch,
    TooLarge,
    TwfsError,
    WarehouseFull,
)
from twfs.prefix import Names
from twfs.store import ArenaBlock, Model, PutOutcome, Retention
from twfs.units import ByteCount, ModelId
from twfs.warehouse import Warehouse


def begin(warehouse: Warehouse, model: Model, names: Names, **options: Any) -> Put:
    where = {"group": 0, "shard": 0} | options
    return warehouse.begin_put(model.id, names, retention=Retention.STANDARD, owner=0, **where)


def test_only_what_is_lacking_is_written(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 5)
        first = put(warehouse, model, names.head(3))
        assert first.written_bytes == 3 * 8192
        second = put(warehouse, model, names)
        assert second.outcomes == (*[PutOutcome.PRESENT] * 3, *[PutOutcome.PUBLISHED] * 2)
        assert second.written_bytes == 2 * 8192
        assert put(warehouse, model, names).written_bytes == 0
        assert put(warehouse, model, names.head(0)).outcomes == ()


def test_nothing_is_seen_before_publish_and_all_of_it_after(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        begun = upload_all(warehouse, model, names)
        assert warehouse.lookup(model, names) == 0
        assert warehouse.models()[0].blocks == 0
        assert warehouse.space().reserved_bytes == 3 * 8192
        assert begun.publish().held == 3
        assert warehouse.space().reserved_bytes == 0
        assert read_all(warehouse, model, names) == 3


def test_an_abandoned_put_leaves_nothing_and_takes_no_more(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        begun = upload_all(warehouse, model, names)
        begun.abandon()
        begun.abandon()
        with pytest.raises(InvalidInput, match="abandoned"):
            write_all(begun, model, names, begun.lacking)
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def test_bytes_after_publish_are_refused(scratch: Path) -> None:
    """Their extents hold published blocks, or belong to somebody else by then."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 2)
        begun = upload_all(warehouse, model, names)
        begun.publish()
        with pytest.raises(InvalidInput, match="published"):
            write_all(begun, model, chain_of(model, 2, 7), [0, 1])
        begun.abandon()
        assert read_all(warehouse, model, names) == 2


def test_blocks_never_written_and_all_below_them_fail(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 5)
        begun = begin(warehouse, model, names)
        write_all(begun, model, names, [0, 1, 3, 4])
        result = begun.publish()
        assert result.outcomes == (*[PutOutcome.PUBLISHED] * 2, *[PutOutcome.FAILED] * 3)
        assert (result.held, warehouse.lookup(model, names)) == (2, 2)
        assert put(warehouse, model, names).held == 5


def test_bytes_without_their_checksum_fail(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 2)
        begun = begin(warehouse, model, names)
        write_all(begun, model, names, [0])
        arena = aligned_buffer(4096)
        sums = checksums_of(b"something else")
        wrong = ArenaBlock(1, 0, MHA.block_bytes(), sums.xxh3, sums.lane_plain, sums.lane_weighted)
        begun.write_blocks(arena, [wrong])
        assert begun.publish().outcomes == (PutOutcome.PUBLISHED, PutOutcome.FAILED)
        assert warehouse.statistics()["counters"]["failed_blocks"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"index": 7},
        {"payload_bytes": ByteCount(4096)},
        {"arena_offset": 100},
        {"arena_offset": -4096},
        {"arena_offset": 4096},
    ],
)
def test_windows_that_do_not_fit_are_refused(scratch: Path, change: dict[str, Any]) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        begun = begin(warehouse, model, chain_of(model, 2))
        right = ArenaBlock(0, 0, MHA.block_bytes(), bytes(16), 0, 0)
        with pytest.raises(InvalidInput, match="arena offset"):
            begun.write_blocks(aligned_buffer(4096), [replace(right, **change)])
        begun.abandon()


def test_what_a_put_found_stays_until_it_ends(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 4)
        put(warehouse, model, names.head(3))
        begun = begin(warehouse, model, names)
        below = begin(warehouse, model, names.slice(3, 4))  # holds the parent that it needs
        assert warehouse.evict(ByteCount(1 << 20)) == 0
        begun.abandon()
        assert warehouse.evict(ByteCount(1 << 20)) == 0
        below.abandon()
        assert warehouse.evict(ByteCount(1 << 20)) == 3 * 8192


def test_a_parent_that_is_condemned_lives_on_with_a_child_published_in_time(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 3)
        put(warehouse, model, names.head(2))
        child = upload_all(warehouse, model, names.slice(2, 3))
        with core.lock:
            core.unpin(child._pinned, child._pin)  # as if it had not been seen
        evict = partial(warehouse.evict, ByteCount(1 << 20))
        with waiting_for_commit(warehouse, child.publish, evict):
            assert warehouse.lookup(model, names) == 0  # both are condemned
            with core.lock:
                child._pin = core.pin(child._pinned)
        assert read_all(warehouse, model, names) == 3


def test_a_child_published_after_its_parents_eviction_is_detached(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 3)
        put(warehouse, model, names.head(2))
        child = upload_all(warehouse, model, names.slice(2, 3))
        with core.lock:
            core.unpin(child._pinned, child._pin)
        warehouse.evict(ByteCount(1 << 20))
        with core.lock:
            child._pin = core.pin(child._pinned)
        assert child.publish().held == 1
        assert [key.prefix_hash for key in warehouse.detached(model.id)] == [names.hash_at(2)]
        assert put(warehouse, model, names).outcomes == (
            PutOutcome.PUBLISHED, PutOutcome.PUBLISHED, PutOutcome.PRESENT,
        )  # fmt: skip
        assert read_all(warehouse, model, names) == 3


def test_a_condemned_block_is_lacking_and_is_stored_anew(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 4)
        put(warehouse, model, names)
        with waiting_for_commit(warehouse, partial(warehouse.evict, ByteCount(2 * 8192))):
            lacking = Put(
                core, core.models[model.id], names, group=0, shard=0, retention=Retention.STANDARD
            )
            with core.lock:
                assert lacking.compare() == [2, 3]
                core.unpin(lacking._pinned, lacking._pin)
        assert put(warehouse, model, names).held == 4


def test_a_put_makes_room_but_never_of_its_own_chain(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", BIG)
        room = warehouse.space().total_bytes // (BIG.block_bytes() + 4096)
        old = chain_of(model, 10, 5)
        put(warehouse, model, old)
        names = chain_of(model, room + 3)
        result = put(warehouse, model, names)
        assert result.held == room
        assert set(result.outcomes[room:]) == {PutOutcome.NO_ROOM}
        assert warehouse.lookup(model, old) == 0
        with pytest.raises(WarehouseFull):  # all that is there is its own
            put(warehouse, model, names)
        assert read_all(warehouse, model, names.head(room // 2)) == room // 2


def test_nothing_to_evict_is_warehouse_full_and_leaves_all_as_it_was(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", BIG), warehouse._core
        with core.lock:
            held = core.allocator.reserve([core.allocator.largest_run()])
        names = chain_of(model, 3)
        with pytest.raises(WarehouseFull, match="nothing may be evicted"):
            put(warehouse, model, names)
        with core.lock:
            core.allocator.release(held[0])
        assert put(warehouse, model, names).held == 3


def test_an_interrupted_publish_is_whole_or_nothing(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is interrupted, the transaction is not: the put must not be forfeited under it."""
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        put(warehouse, model, chain_of(model, 1, 9))  # the first one waits for its numbers
        names = chain_of(model, 3)
        real = core.metadata.submit

        def interrupted(*args: Any, **kwargs: Any) -> "Future[Any]":
            future = real(*args, **kwargs)
            if args[0].__qualname__.startswith("Put.publish"):
                future.result = raising  # type: ignore[method-assign]
            return future

        def raising(timeout: float | None = None) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(core.metadata, "submit", interrupted)
        with commits_held(warehouse):
            with pytest.raises(KeyboardInterrupt):
                put(warehouse, model, names)
            assert warehouse.space().reserved_bytes == 3 * 8192  # not forfeited
        settle(warehouse)
        assert read_all(warehouse, model, names) == 3


def test_a_transaction_that_fails_forfeits_the_put(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twfs.metadata import ledger

    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)

        def full(*_: object, **__: object) -> None:
            raise DeviceError("the metadata could not be written")

        with monkeypatch.context() as patch:
            patch.setattr(ledger, "publish", full)
            with pytest.raises(DeviceError):
                put(warehouse, model, names)
        assert warehouse.space().reserved_bytes == 0
        assert_sound(warehouse)
        assert put(warehouse, model, names).held == 3


@pytest.mark.parametrize("when", ["numbers", "slots", "evict"])
def test_a_failure_while_reserving_leaks_nothing(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    from twfs.datapath import reserving

    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", BIG), warehouse._core
        put(warehouse, model, chain_of(model, 2))

        def failing(*_: object, **__: object) -> None:
            raise DeviceError("at the worst moment")

        with monkeypatch.context() as patch:
            if when == "numbers":
                patch.setattr(type(core), "take_numbers", failing)
            elif when == "slots":
                patch.setattr(core.slots, "allot", failing)
            else:
                patch.setattr(reserving, "submit_eviction", failing)
            with pytest.raises(DeviceError):
                put(warehouse, model, chain_of(model, 40))
        assert warehouse.space().reserved_bytes == 0
        assert put(warehouse, model, chain_of(model, 5)).held == 5


def test_a_device_that_fails_writes_costs_its_blocks_only(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = own_names(model, *[(f"key {n}", None, 0) for n in range(40)])
        real = device_module.Device.write_from

        def write(device: device_module.Device, *args: Any) -> None:
            if device.index == 1:
                raise DeviceError("write: Input/output error")
            real(device, *args)

        with monkeypatch.context() as patch:
            patch.setattr(device_module.Device, "write_from", write)
            outcomes = put(warehouse, model, names).outcomes
        assert 0 < outcomes.count(PutOutcome.FAILED) < 40
        assert outcomes.count(PutOutcome.PUBLISHED) + outcomes.count(PutOutcome.FAILED) == 40
        for index, outcome in enumerate(outcomes):
            held = read_all(warehouse, model, names.slice(index, index + 1))
            assert held == (outcome is PutOutcome.PUBLISHED)


def test_a_failed_flush_publishes_nothing_that_it_was_for(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = own_names(model, *[(f"key {n}", None, 0) for n in range(40)])

        def failing() -> None:
            raise DeviceError("flush failed: Input/output error")

        monkeypatch.setattr(core.devices[1], "flush", failing)
        begun = upload_all(warehouse, model, names)
        places = {i: block.extents[0].device for i, block in begun._reserved.items()}
        outcomes = begun.publish().outcomes
        assert set(places.values()) == {0, 1}
        for index, outcome in enumerate(outcomes):
            wanted = PutOutcome.PUBLISHED if places[index] == 0 else PutOutcome.FAILED
            assert outcome is wanted


def test_requests_that_cannot_be_are_refused_before_anything_is_reserved(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 2)
        twice = Names(names.hashes[:16] * 2, names.digests, names.parents, names.positions)
        bad: list[tuple[Names, dict[str, int]]] = [
            (twice, {}),
            (names, {"group": 1}),
            (names, {"shard": -1}),
            (replace(names, digests=names.digests[:-1]), {}),
            (replace(names, hashes=names.hashes[:-1]), {}),
            (replace(names, parents=b""), {}),
            (replace(names, keys=(b"a",)), {}),
            (replace(names, keys=(b"a", b"b" * 65)), {}),
            (replace(names, positions=(16, -1)), {}),
            (replace(names, positions=(16, 1 << 32)), {}),
        ]
        for wrong, where in bad:
            with pytest.raises(InvalidInput):
                begin(warehouse, model, wrong, **where)
        count = PUT_BLOCKS_MAX + 1
        many = Names(bytes(16 * count), bytes(32 * count), bytes(16 * count), (0,) * count)
        with pytest.raises(TooLarge):
            begin(warehouse, model, many)
        with pytest.raises(TwfsError):
            begin(warehouse, replace(model, id=ModelId(77)), names)
        with pytest.raises(InvalidInput, match="block_bytes"):
            warehouse.put(model, names, [np.zeros(5, np.uint8)] * 2)
        with pytest.raises(InvalidInput, match="1 payloads for 2 names"):
            warehouse.put(model, names, payloads_of(MHA, names)[:1])
        assert warehouse.statistics()["slots"]["slots_pending"] == 0


def test_retention_of_a_filled_hole_is_the_higher_of_both(scratch: Path) -> None:
    from twfs.eviction import evicting

    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MLA)
        names = chain_of(model, 1)
        put(warehouse, model, names, retention=Retention.DURABLE)
        key, block = block_at(warehouse, model, names, 0)
        assert block.retention == Retention.DURABLE.rank
        evicting.spoil(warehouse._core, key, block.generation)
        put(warehouse, model, names, retention=Retention.EPHEMERAL)
        assert block_at(warehouse, model, names, 0)[1].retention == Retention.DURABLE.rank


def test_a_put_of_an_epoch_that_ended_is_stale(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        begun = upload_all(warehouse, model, chain_of(model, 2))
        warehouse.new_epoch(model)
        with pytest.raises(StaleEpoch):
            begun.publish()
        assert warehouse.space().reserved_bytes == 0

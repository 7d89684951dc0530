"""A match ends at the first block that is absent, lost, another's or dying, in any group or shard.

What it found is held, stamped and right.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from support.warehouses import (
    HYBRID,
    LAYOUTS,
    MHA,
    SHARDED,
    block_at,
    chain_of,
    open_warehouse,
    own_names,
    put,
    put_whole,
    read_all,
    settle,
    waiting_for_commit,
)
from twfs.core.state import Core
from twfs.datapath.matching import BATCH, needed_from
from twfs.errors import InvalidInput, LeaseEnded
from twfs.eviction import evicting
from twfs.metadata.ledger import Removed
from twfs.store import Model
from twfs.units import ByteCount, ModelId
from twfs.warehouse import Warehouse


def stamps(warehouse: Warehouse, model: Model, blocks: int, **where: int) -> list[int]:
    names = chain_of(model, blocks)
    slots = [block_at(warehouse, model, names, i, **where)[1].slot for i in range(blocks)]
    return [int(stamp) for stamp in warehouse._core.slots.stamp[slots]]


def forget(warehouse: Warehouse) -> None:
    """Make every stamp one millisecond of 1970, so that a use shows."""
    core = warehouse._core
    with core.lock:
        core.slots.stamp[: len(core.slots)] = 1


def test_a_long_chain_is_matched_whole_over_several_batches(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, BATCH + 3)
        put(warehouse, model, names)
        assert warehouse.lookup(model, names) == BATCH + 3
        assert warehouse.lookup(model, chain_of(model, BATCH + 9)) == BATCH + 3
        assert warehouse.lookup(model, names, start=BATCH + 1) == BATCH + 3
        assert warehouse.lookup(model, names.head(BATCH)) == BATCH


def test_nothing_held_is_an_empty_match(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        with warehouse.match(model, names) as match:
            assert (match.blocks, match.tokens, match.token) == (0, 0, b"")
            assert match.read_into([]).blocks == 0
        put(warehouse, model, names.head(2))
        with warehouse.match(model, names, start=2) as match:
            assert match.blocks == 2
            assert not match.held
        with warehouse.match(model, names.head(0)) as match:
            assert match.blocks == 0


@pytest.mark.parametrize("start", [-1, 4])
@pytest.mark.parametrize("layout", ["mha", "hybrid"])
def test_a_start_outside_the_names_is_refused(scratch: Path, start: int, layout: str) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", LAYOUTS[layout])
        names = chain_of(model, 3)
        put_whole(warehouse, model, names)
        with pytest.raises(InvalidInput):
            warehouse.match(model, names, start=start)
        with pytest.raises(InvalidInput):
            warehouse.lookup(model, names, start=start)


def test_another_digest_or_own_key_ends_a_match(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 4)
        put(warehouse, model, names)
        forged = replace(names, digests=names.digests[:64] + bytes(32) + names.digests[96:])
        assert warehouse.lookup(model, forged) == 2
        assert "digest" in warehouse.explain(model.id, forged).cause
        keyed = replace(names, keys=(b"k",) * 4)
        assert warehouse.lookup(model, keyed) == 0
        own = own_names(model, ("a", None, 0), ("b", "a", 0))
        put(warehouse, model, own)
        assert warehouse.lookup(model, own) == 2
        assert warehouse.lookup(model, replace(own, keys=())) == 0
        assert warehouse.lookup(model, replace(own, keys=(b"a", b"c"))) == 1
        assert warehouse.lookup(model, replace(own, keys=(b"xa", b"b"))) == 0
        assert warehouse.statistics()["counters"]["digest_mismatches"] > 0


def test_the_shortest_shard_ends_a_match(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 5)
        put(warehouse, model, names, shard=0)
        assert read_all(warehouse, model, names) == 0
        put(warehouse, model, names.head(3), shard=1)
        assert read_all(warehouse, model, names) == 3
        assert read_all(warehouse, model, names, start=1) == 3


def test_window_and_state_groups_need_only_the_boundary(scratch: Path) -> None:
    """A window of 32 tokens is two blocks of 16; a state is the one block at the boundary."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", HYBRID)
        names = chain_of(model, 8)
        put(warehouse, model, names, group=1)
        assert read_all(warehouse, model, names) == 0
        put(warehouse, model, names.slice(4, 8), group=0)
        assert read_all(warehouse, model, names) == 0
        put(warehouse, model, names.slice(5, 6), group=2)
        assert read_all(warehouse, model, names) == 6
        assert read_all(warehouse, model, names.head(5)) == 0
        assert "window or state" in warehouse.explain(model.id, names.head(5)).cause
        put(warehouse, model, names.slice(4, 5), group=2)
        assert read_all(warehouse, model, names.head(5)) == 0  # the window lacks block 3
        assert read_all(warehouse, model, names, start=4) == 6
        assert read_all(warehouse, model, names.head(5), start=4) == 5  # 3 is the asker's
        put(warehouse, model, names.slice(7, 8), group=2)
        assert read_all(warehouse, model, names) == 8


def test_needed_from_counts_whole_blocks_of_a_window() -> None:
    assert [needed_from(HYBRID, 0, stop) for stop in (1, 2, 3, 8)] == [0, 0, 1, 6]
    assert [needed_from(HYBRID, 2, stop) for stop in (1, 8)] == [0, 7]
    assert needed_from(HYBRID, 1, 8) == 0


def test_blocks_that_are_dying_are_misses(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 4)
        put(warehouse, model, names)
        with waiting_for_commit(warehouse, partial(warehouse.evict, ByteCount(2 * 8192))):
            assert warehouse.lookup(model, names) == 2
            assert "being evicted" in warehouse.explain(model.id, names).cause
        assert warehouse.lookup(model, names) == 2


def test_explain_says_what_is_wrong(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        assert "never put" in warehouse.explain(model.id, names).cause
        put(warehouse, model, names)
        explained = warehouse.explain(model.id, names)
        assert (explained.hit_blocks, explained.hit_tokens, explained.first_miss) == (3, 48, None)
        key, block = block_at(warehouse, model, names, 1)
        evicting.spoil(warehouse._core, key, block.generation)
        explained = warehouse.explain(model.id, names)
        assert (explained.hit_blocks, explained.first_miss) == (1, names.hash_at(1))
        assert "hole" in explained.cause


def test_a_use_counts_for_all_ancestors_of_every_shard(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 4)
        put_whole(warehouse, model, names)
        forget(warehouse)
        assert warehouse.lookup(model, names) == 4
        for shard in (0, 1):
            assert stamps(warehouse, model, 4, shard=shard) == [1] * 4
        warehouse.match(model, names.head(3), start=2).release()
        for shard in (0, 1):
            found = stamps(warehouse, model, 4, shard=shard)
            assert min(found[:3]) > 1
            assert found[3] == 1
        forget(warehouse)
        warehouse.touch(model, chain_of(model, 2))
        assert [stamp > 1 for stamp in stamps(warehouse, model, 4, shard=1)] == [
            True, True, False, False,
        ]  # fmt: skip
        warehouse.touch(replace(model, id=ModelId(9)), names)


def test_a_leased_block_is_neither_evicted_nor_its_space_used(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 4)
        put(warehouse, model, names)
        match = warehouse.match(model, names.head(3))
        assert warehouse.evict(ByteCount(1 << 20)) == 8192
        warehouse.remove(model.id, names.hash_at(2))
        assert warehouse.lookup(model, names) == 0
        assert warehouse.space().limbo_bytes == 3 * 8192
        for seed in range(1, 9):
            put(warehouse, model, chain_of(model, 9, seed))
        into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(3)]
        assert match.read_into(into).blocks == 3
        match.release()
        settle(warehouse)
        assert warehouse.space().limbo_bytes == 0


def test_limbo_ends_with_the_last_of_two_leases_whenever_that_is(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        first, second = warehouse.match(model, names), warehouse.match(model, names.head(1))
        remove = partial(warehouse.remove, model.id, names.hash_at(2))
        with waiting_for_commit(warehouse, remove):
            pass
        assert warehouse.space().limbo_bytes == 3 * 8192
        first.release()
        settle(warehouse)
        assert warehouse.space().limbo_bytes == 8192
        second.release()
        settle(warehouse)
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def test_a_lease_that_ends_before_the_removal_is_durable_leaves_no_limbo(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        match = warehouse.match(model, names)
        with waiting_for_commit(warehouse, partial(warehouse.remove, model.id, names.hash_at(2))):
            match.release()  # before its job has looked
        settle(warehouse)
        assert warehouse.space().free_bytes == warehouse.space().total_bytes
        put(warehouse, model, names)
        match = warehouse.match(model, names)
        leave = Core.leave

        def late(core: Core, removed: Removed, *, evicted: bool) -> None:
            match.release()  # after its job has looked, before memory follows
            leave(core, removed, evicted=evicted)

        monkeypatch.setattr(Core, "leave", late)
        warehouse.remove(model.id, names.hash_at(2))
        settle(warehouse)
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def test_limbo_of_a_warehouse_that_is_closed_is_freed_at_the_next_start(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        warehouse.match(model, names)
        warehouse.remove(model.id, names.hash_at(2))
        settle(warehouse)
        assert warehouse.space().limbo_bytes == 3 * 8192
    with open_warehouse(scratch) as warehouse:
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def test_ending_thousands_of_leases_over_limbo_never_waits_for_itself(scratch: Path) -> None:
    """More extents than the writer's queue is long: their end must be few transactions."""
    with open_warehouse(scratch, (64 << 20,)) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 5000)
        put(warehouse, model, names)
        match = warehouse.match(model, names.head(3500))
        assert match.blocks == 3500
        warehouse.remove(model.id, names.hash_at(4999))
        match.release()
        settle(warehouse)
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def test_leases_end_with_their_owner_and_with_time(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        owner = warehouse.add_owner(5)
        located = warehouse.match_located(model.id, names, 0, owner)
        assert located is not None
        assert warehouse.evict(ByteCount(1 << 20)) == 0
        warehouse.end_owner(owner)
        with pytest.raises(LeaseEnded):
            warehouse.join(located.token)
        assert warehouse.evict(ByteCount(8192)) == 8192
    with open_warehouse(scratch, lease_ms=50) as warehouse:
        match = warehouse.match(model, names)
        while match.held:
            pass
        assert not match.renew()
        assert warehouse.evict(ByteCount(1 << 20)) == 2 * 8192
        match.release()


def test_a_match_ends_where_its_owner_may_lease_no_more(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 400)
        put_whole(warehouse, model, names)
        each = sum(block_at(warehouse, model, names, 0, shard=s)[1].device_bytes for s in (0, 1))
        owner = warehouse.add_owner(5)
        limit = warehouse._core.leases._owners[owner].bytes_max
        warehouse._core.leases._owners[owner].bytes_max = ByteCount(100 * each + 5)
        assert limit > 100 * each + 5
        first = warehouse.match_located(model.id, names, 0, owner)
        assert first is not None
        assert first.blocks == 100
        assert len(first.located) == 200
        assert warehouse.match_located(model.id, names, 100, owner) is None
        warehouse.release_lease(first.token, owner)
        second = warehouse.match_located(model.id, names, 390, owner)
        assert second is not None
        assert second.blocks == 400
        assert warehouse.lookup(model, names) == 400
        warehouse.end_owner(owner)

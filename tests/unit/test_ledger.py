"""The transactions keep the tables true to each other: heads, children, holes, limbo, free runs.

Each test ends with the checker and with links, children and free runs counted by brute force.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from support.warehouses import (
    HYBRID,
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
    upload_all,
)
from twfs.errors import StaleEpoch
from twfs.eviction import evicting
from twfs.metadata import ledger
from twfs.prefix import Names
from twfs.records import Extent
from twfs.store import Model, PutOutcome
from twfs.units import ByteCount, ByteOffset, DeviceIndex
from twfs.warehouse import Warehouse


def spoil(warehouse: Warehouse, model: Model, names: Names, index: int) -> None:
    """Make a hole of one block."""
    key, block = block_at(warehouse, model, names, index)
    assert evicting.spoil(warehouse._core, key, block.generation)


def links(warehouse: Warehouse, model: Model, names: Names) -> list[int]:
    """Heads over each block of a chain, as a stat would show them."""
    last = names.hash_at(len(names) - 1)
    return [info.links for info in warehouse.chain_of(model.id, last)]


def test_a_head_moves_along_as_its_chain_grows(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        for blocks in (1, 2, 5, 6):
            names = chain_of(model, blocks)
            put(warehouse, model, names)
            assert warehouse.heads(model.id) == [names.hash_at(blocks - 1)]
            assert links(warehouse, model, names) == [1] * blocks


def test_branches_add_links_up_to_where_they_part(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        trunk = chain_of(model, 6)
        put(warehouse, model, trunk)
        for seed in (1, 2, 3):
            put(warehouse, model, chain_of(model, 8, seed, fork=4))
        put(warehouse, model, chain_of(model, 3, 4, fork=1))
        assert links(warehouse, model, trunk) == [5, 4, 4, 4, 1, 1]
        assert len(warehouse.heads(model.id)) == 5


def test_a_filled_hole_that_was_a_head_gives_its_place_to_the_new_tail(scratch: Path) -> None:
    """The middle of a batch needs no settling, but a filled hole at its start does."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 2))
        spoil(warehouse, model, chain_of(model, 2), 1)
        longer = chain_of(model, 5)
        outcomes = put(warehouse, model, longer).outcomes
        assert outcomes == (PutOutcome.PRESENT, *[PutOutcome.PUBLISHED] * 4)
        assert warehouse.heads(model.id) == [longer.hash_at(4)]
        assert read_all(warehouse, model, longer) == 5


def test_a_filled_hole_keeps_slot_and_children_and_its_header_has_the_new_inode(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 4)
        put(warehouse, model, names)
        _, before = block_at(warehouse, model, names, 1)
        spoil(warehouse, model, names, 1)
        assert warehouse.lookup(model, names) == 1
        _, hole = block_at(warehouse, model, names, 1)
        assert (hole.hole, hole.extents, hole.slot) == (True, (), before.slot)
        retired = warehouse.space().limbo_bytes
        assert retired == before.device_bytes
        put(warehouse, model, names)
        _, filled = block_at(warehouse, model, names, 1)
        assert filled.slot == before.slot
        assert filled.generation > before.generation
        assert filled.ino > before.ino
        assert read_all(warehouse, model, names) == 4
        assert links(warehouse, model, names) == [1, 1, 1, 1]
    with open_warehouse(scratch) as warehouse:  # lost bytes stay out of use for good
        assert warehouse.space().limbo_bytes == retired


def test_detached_blocks_join_when_their_parent_comes_in_any_order(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        branch = chain_of(model, 8, 5, fork=5)
        for piece in (names.slice(4, 6), branch.slice(5, 8), names.slice(1, 2), names.slice(2, 4)):
            put(warehouse, model, piece)
            assert warehouse.heads(model.id) == []
        assert len(warehouse.detached(model.id)) == 8
        assert warehouse.lookup(model, names) == 0
        put(warehouse, model, names.head(1))
        assert warehouse.detached(model.id) == []
        assert set(warehouse.heads(model.id)) == {names.hash_at(5), branch.hash_at(7)}
        assert links(warehouse, model, names) == [2, 2, 2, 2, 2, 1]
        assert read_all(warehouse, model, names) == 6
        assert read_all(warehouse, model, branch) == 8


def test_one_put_in_reverse_order_is_a_whole_chain(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 5)
        order = [4, 2, 3, 0, 1]
        mixed = Names(
            b"".join(names.hash_at(i) for i in order),
            b"".join(names.digests[32 * i : 32 * i + 32] for i in order),
            b"".join(names.parents[16 * i : 16 * i + 16] for i in order),
            tuple(names.positions[i] for i in order),
        )
        put(warehouse, model, mixed)
        assert warehouse.heads(model.id) == [names.hash_at(4)]
        assert warehouse.detached(model.id) == []
        assert read_all(warehouse, model, names) == 5


def test_a_block_is_a_head_only_once_all_shards_are_there(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 4)
        put(warehouse, model, names, shard=1)
        assert warehouse.heads(model.id) == []
        put(warehouse, model, names.head(2), shard=0)
        assert warehouse.heads(model.id) == [names.hash_at(1)]
        assert read_all(warehouse, model, names) == 2
        put(warehouse, model, names.slice(3, 4), shard=0)  # detached: 2 lacks shard 0
        assert warehouse.heads(model.id) == [names.hash_at(1)]
        put(warehouse, model, names.slice(2, 3), shard=0)
        assert warehouse.heads(model.id) == [names.hash_at(3)]
        assert read_all(warehouse, model, names) == 4


def test_detached_shards_join_each_in_its_turn(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 5)
        for shard in (1, 0):
            put(warehouse, model, names.slice(2, 5), shard=shard)
        put(warehouse, model, names.head(2), shard=1)
        assert warehouse.heads(model.id) == []
        put(warehouse, model, names.head(2), shard=0)
        assert warehouse.heads(model.id) == [names.hash_at(4)]
        assert links(warehouse, model, names) == [1] * 10
        assert warehouse.detached(model.id) == []


def test_blocks_of_window_and_state_groups_are_never_detached(scratch: Path) -> None:
    """They are stored at boundaries only: nothing is missing before them."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", HYBRID)
        names = chain_of(model, 6)
        put(warehouse, model, names, group=1)
        put(warehouse, model, names.slice(5, 6), group=2)
        put(warehouse, model, names.slice(4, 6), group=0)
        assert warehouse.detached(model.id) == []
        assert warehouse.heads(model.id) == [names.hash_at(5)]
        assert read_all(warehouse, model, names) == 6


def test_own_keys_hang_below_their_parents_wherever_they_end(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = own_names(model, ("a", None, 0), ("b", "a", 0), ("c", "b", 0))
        assert put(warehouse, model, names.slice(1, 3)).held == 2
        assert len(warehouse.detached(model.id)) == 2
        put(warehouse, model, names.head(1))
        assert warehouse.heads(model.id) == [names.hash_at(2)]
        assert read_all(warehouse, model, names) == 3


@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_ring_of_own_keys_is_refused(scratch: Path, known: int) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        ring = own_names(model, ("a", "c", 0), ("b", "a", 0), ("c", "b", 0))
        put(warehouse, model, ring.head(known))
        outcomes = put(warehouse, model, ring.slice(known, 3)).outcomes
        assert outcomes[-1] is PutOutcome.FAILED
        alone = own_names(model, ("x", "x", 0))
        assert put(warehouse, model, alone).outcomes == (PutOutcome.FAILED,)
        assert warehouse.heads(model.id) == []
        assert warehouse.space().reserved_bytes == 0


def test_positions_that_do_not_grow_are_refused_from_either_side(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, own_names(model, ("a", None, 100)))
        below = own_names(model, ("b", "a", 100))
        assert put(warehouse, model, below).outcomes == (PutOutcome.FAILED,)
        put(warehouse, model, own_names(model, ("y", "x", 50)))  # x is not there yet
        middle = own_names(model, ("x", "a", 200))
        assert put(warehouse, model, middle).outcomes == (PutOutcome.FAILED,)
        start = own_names(model, ("x", None, 60))
        assert put(warehouse, model, start).outcomes == (PutOutcome.FAILED,)
        assert put(warehouse, model, own_names(model, ("x", None, 40))).held == 1


def test_names_that_lie_about_a_first_block_hang_nothing(scratch: Path) -> None:
    """A first block that names a parent below itself is no ring: not now, not after reopening."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        honest = chain_of(model, 4)
        parents = [honest.hash_at(i) for i in (1, 0, 1, 2)]  # block 0 says that 1 is before it
        lying = replace(honest, parents=b"".join(parents))
        put(warehouse, model, lying.head(2))
        put(warehouse, model, lying.slice(3, 4))
        assert put(warehouse, model, lying.slice(2, 3)).held == 1
        assert links(warehouse, model, honest) == [1] * 4
        selfish = chain_of(model, 1, 9)
        selfish = replace(selfish, parents=selfish.hashes)
        assert put(warehouse, model, selfish).outcomes == (PutOutcome.FAILED,)
    with open_warehouse(scratch) as warehouse:
        assert links(warehouse, model, honest) == [1] * 4
        assert warehouse.remove(model.id, honest.hash_at(3)) > 0


def test_a_name_with_another_digest_is_refused_and_so_is_what_follows(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 4)
        put(warehouse, model, names.head(2))
        forged = replace(names, digests=names.digests[:32] + bytes(96))
        result = put(warehouse, model, forged)
        assert result.outcomes == (PutOutcome.PRESENT, *[PutOutcome.COLLISION] * 3)
        assert warehouse.lookup(model, forged) == 1
        assert put(warehouse, model, names).held == 4
        assert warehouse.statistics()["counters"]["collisions"] == 3


def test_an_epoch_that_ends_during_a_put_takes_nothing_any_more(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        core = warehouse._core
        late = upload_all(warehouse, model, chain_of(model, 2))
        warehouse.new_epoch(model)
        evicting.sweep_epochs(core)
        assert model.id not in core.models
        with pytest.raises(StaleEpoch):
            late.publish()
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def test_merged_joins_what_touches_on_one_device_only() -> None:
    def extent(device: int, offset: int, length: int) -> Extent:
        return Extent(DeviceIndex(device), ByteOffset(offset), ByteCount(length))

    found = ledger.merged(
        [extent(0, 8192, 4096), extent(1, 12288, 4096), extent(0, 0, 4096), extent(0, 4096, 4096)]
    )
    assert found == [extent(0, 0, 12288), extent(1, 12288, 4096)]


def test_removing_a_session_keeps_what_others_use(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        trunk, branch = chain_of(model, 6), chain_of(model, 7, 3, fork=4)
        put(warehouse, model, trunk)
        put(warehouse, model, branch)
        freed = warehouse.remove(model.id, branch.hash_at(6))
        assert freed == 3 * 8192
        assert read_all(warehouse, model, trunk) == 6
        assert links(warehouse, model, trunk) == [1] * 6
        assert warehouse.remove(model.id, trunk.hash_at(5)) == 6 * 8192
        settle(warehouse)
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def test_removing_a_session_takes_its_incomplete_tail_along(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 5)
        put(warehouse, model, names, shard=0)
        put(warehouse, model, names.head(3), shard=1)
        put(warehouse, model, chain_of(model, 4, 8, fork=2), shard=1)  # incomplete branch
        assert warehouse.heads(model.id) == [names.hash_at(2)]
        warehouse.remove(model.id, names.hash_at(2))
        assert warehouse.models()[0].blocks == 0


def test_removing_a_hybrid_session_takes_all_its_groups(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", HYBRID)
        names = chain_of(model, 5)
        put_whole(warehouse, model, names)
        warehouse.remove(model.id, names.hash_at(4))
        assert warehouse.models()[0].blocks == 0


def test_a_head_that_loses_a_window_block_is_still_a_head(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", HYBRID)
        names = chain_of(model, 3)
        put_whole(warehouse, model, names)
        warehouse.evict(ByteCount(1))  # the window group was put first, its tail goes first
        assert [
            (info.key.group, info.index) for info in warehouse.chain_of(model.id, names.hash_at(2))
        ] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (1, 2), (2, 2)]
        assert warehouse.heads(model.id) == [names.hash_at(2)]
        warehouse.evict(ByteCount(3 * 8192))  # up to its standing block
        assert warehouse.heads(model.id) == [names.hash_at(1)]

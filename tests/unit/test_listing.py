"""What is listed is what is stored: bytes add up, pieces are complete, reads are proved."""

from functools import partial
from pathlib import Path

import pytest

from support.warehouses import (
    DEVICE_BYTES,
    HYBRID,
    LAYOUTS,
    MHA,
    chain_of,
    flip_payload,
    open_warehouse,
    payload_of,
    put,
    put_whole,
    settle,
    waiting_for_commit,
)
from twfs.errors import BadPayload, BlockGone, InvalidInput, NoSuchBlock, NoSuchModel
from twfs.records import BlockKey
from twfs.store import Retention, iterate_heads, iterate_sessions
from twfs.units import ByteCount, ModelId, PrefixHash


@pytest.mark.parametrize("kind", LAYOUTS)
def test_bytes_of_sessions_add_up_to_what_blocks_take(scratch: Path, kind: str) -> None:
    """As du does it: own bytes of every head, and what is shared once."""
    with open_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        model = warehouse.open_model("m", LAYOUTS[kind])
        chains = [chain_of(model, 9), chain_of(model, 7, 1, fork=4), chain_of(model, 8, 2, fork=4)]
        for names in chains:
            put_whole(warehouse, model, names)
        sessions = {s.head: s for s in warehouse.sessions(model.id)}
        assert set(sessions) == {names.hash_at(len(names) - 1) for names in chains}
        taken = {
            info.key: (info.block.device_bytes, info.links)
            for head in sessions
            for info in warehouse.chain_of(model.id, head)
        }
        own = sum(session.own_bytes for session in sessions.values())
        shared = sum(size for size, links in taken.values() if links > 1)
        assert own == sum(size for size, links in taken.values() if links == 1)
        assert own + shared == warehouse.models()[0].device_bytes
        for names in chains:
            session = sessions[names.hash_at(len(names) - 1)]
            infos = warehouse.chain_of(model.id, session.head)
            assert session.shared_bytes == shared
            assert session.payload_bytes == sum(info.block.payload_bytes for info in infos)
            assert (session.blocks, session.tokens) == (len(names), 16 * len(names))
        space = warehouse.space()
        assert space.total_bytes - space.free_bytes == own + shared == space.evictable_bytes


def test_heads_and_sessions_come_in_pieces(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        for seed in range(25):
            put(warehouse, model, chain_of(model, 2, seed))
        heads = warehouse.heads(model.id)
        assert len(heads) == 25
        assert heads == sorted(heads)
        pieces = [warehouse.heads(model.id, limit=10)]
        while piece := warehouse.heads(model.id, after=pieces[-1][-1], limit=10):
            pieces.append(piece)
        assert [len(piece) for piece in pieces] == [10, 10, 5]
        assert [head for piece in pieces for head in piece] == heads
        assert heads == list(iterate_heads(warehouse, model.id))
        assert [s.head for s in iterate_sessions(warehouse, model.id)] == heads
        for limit in (0, -1, 10_001):
            with pytest.raises(InvalidInput):
                warehouse.heads(model.id, limit=limit)


def test_sessions_that_are_dying_do_not_end_a_listing(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        for seed in range(6):
            put(warehouse, model, chain_of(model, 1, seed))
        first = warehouse.heads(model.id)[:3]
        removals = [partial(warehouse.remove, model.id, head) for head in first]
        with waiting_for_commit(warehouse, *removals):
            assert len(warehouse.sessions(model.id, limit=2)) == 1  # after a piece of none
            assert warehouse.sessions(model.id, limit=3) == warehouse.sessions(model.id)
        assert len(warehouse.sessions(model.id)) == 3


def test_a_chain_is_listed_by_index_group_and_shard(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", HYBRID)
        names = chain_of(model, 3)
        put_whole(warehouse, model, names)
        infos = warehouse.chain_of(model.id, names.hash_at(2))
        assert [(i.index, i.key.group) for i in infos] == [
            (n, g) for n in range(3) for g in (0, 1, 2)
        ]
        assert len(warehouse.chain_of(model.id, names.hash_at(1))) == 6
        for info in infos:
            again = warehouse.block_info(info.key)
            assert (again.key, again.block, again.index) == (info.key, info.block, info.index)
            wanted = payload_of(HYBRID, info.key.prefix_hash, info.key.group)
            assert bytes(warehouse.read_block(info)) == wanted.tobytes()


def test_what_is_not_there_is_said_to_be_so(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        nothing = PrefixHash(bytes(16))
        for ask in (
            partial(warehouse.chain_of, model.id, nothing),
            partial(warehouse.block_info, BlockKey(model.id, nothing)),
            partial(warehouse.chain_of, ModelId(99), nothing),
        ):
            with pytest.raises((NoSuchBlock, NoSuchModel)):
                ask()
        with pytest.raises(NoSuchModel):
            warehouse.set_retention(ModelId(99), nothing, Retention.PINNED)
        assert warehouse.heads(ModelId(99)) == []
        assert warehouse.sessions(ModelId(99)) == []


def test_detached_blocks_are_listed_apart(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, other = warehouse.open_model("m", MHA), warehouse.open_model("n", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names.head(2))
        put(warehouse, model, names.slice(4, 6))
        assert {key.prefix_hash for key in warehouse.detached(model.id)} == {
            names.hash_at(4), names.hash_at(5),
        }  # fmt: skip
        assert warehouse.detached(other.id) == []
        info = warehouse.block_info(BlockKey(model.id, names.hash_at(5)))
        assert (info.index, info.links) == (0, 1)
        wanted = payload_of(MHA, names.hash_at(5)).tobytes()
        assert bytes(warehouse.read_block(info)) == wanted


def test_an_old_life_of_a_block_is_gone(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 2)
        put(warehouse, model, names)
        info = warehouse.block_info(BlockKey(model.id, names.hash_at(1)))
        evict = partial(warehouse.evict, ByteCount(1))
        with waiting_for_commit(warehouse, evict), pytest.raises(BlockGone):
            warehouse.read_block(info)
        with pytest.raises(BlockGone):
            warehouse.read_block(info)
        put(warehouse, model, names)
        with pytest.raises(BlockGone):
            warehouse.read_block(info)
        again = warehouse.block_info(info.key)
        assert again.block.generation > info.block.generation
        assert again.block.ino > info.block.ino
        assert len(warehouse.read_block(again)) == MHA.block_bytes()


def test_a_block_that_reads_badly_is_never_handed_out(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 2)
        put(warehouse, model, names)
        info = warehouse.block_info(BlockKey(model.id, names.hash_at(1)))
        flip_payload(warehouse, info.block)
        with pytest.raises(BadPayload):
            warehouse.read_block(info)
        with pytest.raises(BlockGone):  # it is a hole by then
            warehouse.read_block(info)
        assert warehouse.lookup(model, names) == 1


def test_a_block_has_the_highest_class_of_the_sessions_over_it(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        trunk, branch = chain_of(model, 4), chain_of(model, 4, 1, fork=2)
        put(warehouse, model, trunk)
        put(warehouse, model, branch)

        def classes() -> list[int]:
            chain = warehouse.chain_of(model.id, trunk.hash_at(3))
            return [info.block.retention for info in chain]

        warehouse.set_retention(model.id, trunk.hash_at(3), Retention.PINNED)
        assert classes() == [3, 3, 3, 3]
        warehouse.set_retention(model.id, trunk.hash_at(3), Retention.EPHEMERAL)
        assert classes() == [1, 1, 0, 0]
        sessions = {s.head: s.retention for s in warehouse.sessions(model.id)}
        assert sessions[trunk.hash_at(3)] is Retention.EPHEMERAL
        assert sessions[branch.hash_at(3)] is Retention.STANDARD


def test_space_tells_reserved_limbo_and_free_apart(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        match = warehouse.match(model, names.head(1))
        space = warehouse.space()
        assert space.evictable_bytes == 2 * 8192
        warehouse.remove(model.id, names.hash_at(2))
        settle(warehouse)
        space = warehouse.space()
        assert (space.limbo_bytes, space.evictable_bytes, space.reserved_bytes) == (8192, 0, 0)
        assert space.total_bytes - space.free_bytes == 8192
        match.release()

"""A session moves as its chain grows and shrinks, and a block has the highest class over it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from support.warehouses import (
    HYBRID,
    MHA,
    SHARDED,
    assert_sound,
    block_at,
    chain_of,
    open_warehouse,
    put,
    put_whole,
    read_all,
    waiting_for_commit,
)
from twfs import Hint, Retention, Stop
from twfs.errors import InvalidInput, NoSuchBlock, StaleEpoch
from twfs.eviction.retaining import flush
from twfs.metadata import sessions
from twfs.metadata.sessions import SessionKey
from twfs.prefix import Names
from twfs.store import Model
from twfs.units import ByteCount, ModelId, PrefixHash
from twfs.warehouse import Warehouse

BLOCK = 8192  # bytes on the device of one block of the small layouts
E, S, D, P = (retention.rank for retention in Retention)


def classes(warehouse: Warehouse, model: Model, names: Names) -> list[int]:
    """The class of every block of a chain."""
    slots = [block_at(warehouse, model, names, index)[1].slot for index in range(len(names))]
    return [int(rank) for rank in warehouse._core.slots.retention[slots]]


def known(warehouse: Warehouse) -> dict[str, tuple[PrefixHash, int]]:
    """Where each session with an id ends, and its class."""
    with warehouse._core.metadata.read() as view:
        return {
            key.id.decode(): (session.head, session.retention)
            for key, session in sessions.every(view)
            if key.named
        }


def without_id(warehouse: Warehouse) -> dict[PrefixHash, int]:
    """The classes of the sessions without id that have a record, by their head."""
    with warehouse._core.metadata.read() as view:
        return {
            session.head: session.retention
            for key, session in sessions.every(view)
            if not key.named
        }


def test_a_session_ends_where_its_chain_does(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 9)
        for blocks in (3, 5, 9):
            put(warehouse, model, names.head(blocks), hint=Hint("a", Retention.DURABLE))
            assert known(warehouse) == {"a": (names.hash_at(blocks - 1), D)}
            assert classes(warehouse, model, names.head(blocks)) == [D] * blocks
        (info,) = warehouse.sessions(model.id)
        assert (info.ids, info.retention) == (("a",), Retention.DURABLE)
    with open_warehouse(scratch) as warehouse:
        assert known(warehouse) == {"a": (names.hash_at(8), D)}
        assert classes(warehouse, model, names) == [D] * 9


def test_a_put_of_what_is_there_moves_its_session_and_never_back(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names)
        put(warehouse, model, names.head(4), hint=Hint("a"))
        put(warehouse, model, names.head(2), hint=Hint("a"))
        assert known(warehouse) == {"a": (names.hash_at(3), S)}
        put(warehouse, model, names.slice(4, 6), hint=Hint("a"))
        assert known(warehouse) == {"a": (names.hash_at(5), S)}


def test_a_block_has_the_highest_class_and_loses_it_with_its_session(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        trunk = chain_of(model, 6)
        branches = {"e": E, "s": S, "d": D, "p": P}
        made = {}
        for seed, (name, rank) in enumerate(branches.items(), 1):
            made[name] = chain_of(model, 6, seed, fork=seed)
            put(warehouse, model, made[name], hint=Hint(name, list(Retention)[rank]))
        assert classes(warehouse, model, trunk.head(4)) == [P, P, P, P]
        for name, rank in branches.items():
            own = 6 - (1 + list(branches).index(name))
            assert classes(warehouse, model, made[name])[-own:] == [rank] * own
        assert warehouse.forget(model, "p") == 3 * BLOCK
        assert warehouse.forget(model, "d") == 4 * BLOCK
        assert known(warehouse).keys() == {"e", "s"}
        assert classes(warehouse, model, trunk.head(2)) == [S, S]
        assert classes(warehouse, model, made["e"]) == [S, E, E, E, E, E]
        assert warehouse.forget(model, "s") == 5 * BLOCK
        assert classes(warehouse, model, made["e"]) == [E] * 6


def test_the_class_of_a_session_is_that_of_its_first_put_until_it_is_changed(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names.head(2), retention=Retention.DURABLE, hint=Hint("a"))
        put(warehouse, model, names.head(3), retention=Retention.EPHEMERAL, hint=Hint("a"))
        assert classes(warehouse, model, names.head(3)) == [D] * 3
        put(warehouse, model, names.head(4), hint=Hint("a", Retention.EPHEMERAL))
        assert classes(warehouse, model, names.head(4)) == [E] * 4
        warehouse.retain(model.id, "a", Retention.PINNED)
        put(warehouse, model, names, hint=Hint("a"))
        assert classes(warehouse, model, names) == [P] * 6
        assert block_at(warehouse, model, names, 5)[1].retention == P, "as at publish"


def test_without_id_the_head_is_the_session(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names.head(2), retention=Retention.DURABLE)
        assert without_id(warehouse) == {names.hash_at(1): D}
        put(warehouse, model, names.head(4))  # it goes on, and is no less
        assert without_id(warehouse) == {names.hash_at(3): D}
        warehouse.set_retention(model.id, names.hash_at(3), Retention.EPHEMERAL)
        put(warehouse, model, names.head(5), retention=Retention.EPHEMERAL)
        assert without_id(warehouse) == {names.hash_at(4): E}
        put(warehouse, model, names.head(6))  # a request that asks for more
        assert without_id(warehouse) == {}
        assert classes(warehouse, model, names) == [S] * 6


def test_a_fork_leaves_the_session_without_id_where_it_is(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names, fork = chain_of(model, 6), chain_of(model, 6, 1, fork=3)
        put(warehouse, model, names, retention=Retention.DURABLE)
        put(warehouse, model, fork)
        assert without_id(warehouse) == {names.hash_at(5): D}
        assert classes(warehouse, model, fork) == [D, D, D, S, S, S]


def test_a_class_set_inside_a_chain_is_that_of_the_chain_so_far(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names)
        warehouse.set_retention(model.id, names.hash_at(3), Retention.PINNED)
        assert classes(warehouse, model, names) == [P] * 4 + [S] * 2
        warehouse.evict(ByteCount(1 << 30))
        assert read_all(warehouse, model, names) == 4
        warehouse.set_retention(model.id, names.hash_at(3), Retention.STANDARD)
        warehouse.evict(ByteCount(1 << 30))
        assert read_all(warehouse, model, names) == 0
        assert without_id(warehouse) == {}


def test_what_an_ephemeral_session_turns_away_from_stays_ephemeral(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        before, after = chain_of(model, 6), chain_of(model, 6, 1, fork=2)
        put(warehouse, model, before, hint=Hint("a", Retention.EPHEMERAL))
        put(warehouse, model, after, hint=Hint("a"))
        assert known(warehouse) == {"a": (after.hash_at(5), E)}
        assert classes(warehouse, model, before) == [E] * 6


def test_eviction_takes_a_session_up_its_chain_until_others_go_on_from_there(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        trunk = chain_of(model, 2)
        hints = {"a": Retention.STANDARD, "b": Retention.DURABLE, "c": Retention.DURABLE}
        for seed, (name, retention) in enumerate(hints.items(), 1):
            put(warehouse, model, chain_of(model, 5, seed, fork=2), hint=Hint(name, retention))
        here = len(core.slots)
        core.slots.stamp[:here] = core.slots.stamp[:here].max() - 1000
        chain = chain_of(model, 5, 3, fork=2)
        warehouse.touch(model, chain)
        warehouse.evict(ByteCount(2 * BLOCK))
        assert known(warehouse)["a"][0] == chain_of(model, 5, 1, fork=2).hash_at(2)
        warehouse.evict(ByteCount(BLOCK))
        assert known(warehouse).keys() == {"b", "c"}, "a has no blocks of its own left"
        warehouse.evict(ByteCount(3 * BLOCK))
        assert known(warehouse)["b"] == (trunk.hash_at(1), D)
        assert_sound(warehouse)
        warehouse.evict(ByteCount(1 << 30))
        assert known(warehouse) == {}


def test_removal_ends_the_sessions_and_spares_what_another_ends_at(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names.head(3), hint=Hint("a"))
        put(warehouse, model, names, hint=Hint("b"))
        assert warehouse.remove(model.id, names.hash_at(5)) == 3 * BLOCK
        assert known(warehouse) == {"a": (names.hash_at(2), S)}
        assert warehouse.forget(model, "nobody") == 0
        with pytest.raises(InvalidInput):
            warehouse.forget(model, "")
        assert warehouse.forget(model, "a") == 3 * BLOCK
        assert known(warehouse) == {}


def test_forgetting_a_session_spares_those_that_end_there_too(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 4)
        put(warehouse, model, names, hint=Hint("a", Retention.DURABLE))
        put(warehouse, model, names, hint=Hint("b", Retention.EPHEMERAL))
        assert warehouse.forget(model, "a") == 0
        assert classes(warehouse, model, names) == [E] * 4
        stale = warehouse.open_model("m")
        warehouse.new_epoch(model)
        with pytest.raises(StaleEpoch):
            warehouse.forget(stale, "b")


@pytest.mark.parametrize("kind", ["sharded", "hybrid"])
def test_all_groups_and_shards_of_a_prefix_hash_have_one_class(scratch: Path, kind: str) -> None:
    layout = {"sharded": SHARDED, "hybrid": HYBRID}[kind]
    pairs = [(g, s) for g in range(len(layout.groups)) for s in range(layout.shards)]
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", layout)
        names = chain_of(model, 4)
        put_whole(warehouse, model, names)

        def seen() -> set[int]:
            slots = [
                block_at(warehouse, model, names, index, group=group, shard=shard)[1].slot
                for group, shard in pairs
                for index in range(4)
            ]
            return {int(rank) for rank in warehouse._core.slots.retention[slots]}

        assert seen() == {S}
        warehouse.set_retention(model.id, names.hash_at(3), Retention.PINNED)
        assert seen() == {P}
    with open_warehouse(scratch) as warehouse:
        assert seen() == {P}
        assert warehouse.evict(ByteCount(1 << 30)) == 0
        warehouse.set_retention(model.id, names.hash_at(3), Retention.EPHEMERAL)
        assert seen() == {E}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_ranks_that_put_their_shards_in_any_order_make_one_session(
    scratch: Path, order: Sequence[int]
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 5)
        for blocks in (3, 5):
            for shard in order:
                part = names.head(blocks)
                put(warehouse, model, part, shard=shard, hint=Hint("a", Retention.DURABLE))
        assert known(warehouse) == {"a": (names.hash_at(4), D)}
        for shard in (0, 1):
            slots = [block_at(warehouse, model, names, i, shard=shard)[1].slot for i in range(5)]
            assert list(warehouse._core.slots.retention[slots]) == [D] * 5


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_shards_that_one_transaction_publishes_have_one_class_and_true_charges(
    scratch: Path, order: Sequence[int]
) -> None:
    """The tables have both when memory has but one: the slot of the other holds what was before."""
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", SHARDED), warehouse._core
        old, names = chain_of(model, 4, seed=1), chain_of(model, 4)
        for shard in (0, 1):
            put(warehouse, model, old, shard=shard)
        assert warehouse.evict(ByteCount(1 << 30)) == 8 * BLOCK  # their slots are used again
        works = [
            partial(put, warehouse, model, names, shard=shard, hint=Hint("a", Retention.DURABLE))
            for shard in order
        ]
        with waiting_for_commit(warehouse, *works):
            pass
        for shard in (0, 1):
            slots = [block_at(warehouse, model, names, i, shard=shard)[1].slot for i in range(4)]
            assert list(core.slots.retention[slots]) == [D] * 4
        assert_sound(warehouse)


def test_a_tail_that_comes_first_gives_its_class_to_what_comes_before_it(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names.slice(3, 6), hint=Hint("a", Retention.DURABLE))
        assert known(warehouse) == {"a": (names.hash_at(5), D)}
        put(warehouse, model, names.head(3))
        assert classes(warehouse, model, names) == [D] * 6
    with open_warehouse(scratch) as warehouse:
        assert classes(warehouse, model, names) == [D] * 6


def test_a_touch_moves_its_session_with_one_commit_for_many(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 6)
        put(warehouse, model, names)
        before = core.metadata.statistics()["jobs"]
        with core.lock:  # nobody takes what is asked meanwhile
            for number in range(100):
                warehouse.touch(model, names.head(3), Hint(f"s{number}", stop=Stop.TOOL_USE))
            warehouse.touch(model, names.head(5), Hint("s0", Retention.DURABLE))
            assert core.metadata.statistics()["jobs"] == before
        flush(core)
        assert known(warehouse)["s0"] == (names.hash_at(4), D)
        assert known(warehouse)["s99"] == (names.hash_at(2), S)
        assert len(known(warehouse)) == 100
        assert core.metadata.statistics()["jobs"] - before < 20
        assert classes(warehouse, model, names) == [D] * 5 + [S]


def test_a_touch_says_how_the_request_ended_and_a_match_that_the_session_is_back(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model, slots = warehouse.open_model("m", MHA), warehouse._core.slots
        names = chain_of(model, 3)
        put(warehouse, model, names)
        at = [block_at(warehouse, model, names, index)[1].slot for index in range(3)]
        warehouse.touch(model, names, Hint(stop=Stop.END_TURN, return_ms=5000))
        assert list(slots.stop[at]) == [Stop.END_TURN.code] * 3
        assert (slots.back_ms[at] == slots.stamp[at] + 5000).all()
        warehouse.match(model, names).release()
        assert not slots.stop[at].any()
        assert not slots.back_ms[at].any()


def test_sessions_of_tenants_are_apart(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        warehouse.operate("tenant-add", name="acme", owner=0, uids=[])
        mine, theirs = warehouse.open_model("m", MHA), warehouse.open_model("m", tenant="acme")
        put(warehouse, mine, chain_of(mine, 3), hint=Hint("a"))
        put(warehouse, theirs, chain_of(theirs, 2), hint=Hint("a", Retention.DURABLE))
        warehouse.retain(mine.id, "a", Retention.EPHEMERAL)
        assert classes(warehouse, mine, chain_of(mine, 3)) == [E] * 3
        assert classes(warehouse, theirs, chain_of(theirs, 2)) == [D] * 2
        assert warehouse.forget(theirs, "a") == 2 * BLOCK
        with pytest.raises(NoSuchBlock):
            warehouse.retain(theirs.id, "a", Retention.DURABLE, tenant=theirs.tenant)
        assert warehouse.forget(mine, "a") == 3 * BLOCK


def test_too_many_sessions_end_those_that_were_not_used_longest(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("twfs.metadata.sessions", "twfs.eviction.retaining"):
        monkeypatch.setattr(f"{module}.SESSIONS_MAX", 16)
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 4)
        put(warehouse, model, names, hint=Hint("pinned", Retention.PINNED))
        with core.lock:
            for number in range(40):
                warehouse.touch(model, names.head(1), Hint(f"s{number:02}"))
            asked = dict(core.asked)
        flush(core)
        assert 0 < core.counters.refused_sessions <= len(asked)
        assert len(known(warehouse)) < 16
        assert "pinned" in known(warehouse)
        put(warehouse, model, chain_of(model, 3, 5), hint=Hint("new"))
        assert "new" in known(warehouse)


def test_a_new_epoch_ends_all_sessions_of_the_old(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 3), hint=Hint("a", Retention.PINNED))
        warehouse.new_epoch(model)
        while known(warehouse):
            warehouse._closing.wait(0.01)
        assert warehouse._core.metadata.statistics()["readers"] >= 0


def test_keys_of_sessions_come_back_from_their_bytes() -> None:
    for key in (
        SessionKey.of(ModelId(7), 3, "é-1"),
        SessionKey.without_id(ModelId(7), 0, PrefixHash(bytes(range(16)))),
    ):
        assert SessionKey.unpack(key.pack()) == key
    for data in (b"", bytes(6), bytes(6) + b"\0short"):
        with pytest.raises(ValueError, match="key"):
            SessionKey.unpack(data)

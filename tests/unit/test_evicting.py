"""Eviction takes tails, the least recently used first, and what no match reaches before those."""

from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from support.warehouses import (
    HYBRID,
    MHA,
    SHARDED,
    assert_sound,
    block_at,
    chain_of,
    flip_payload,
    open_warehouse,
    own_names,
    put,
    put_whole,
    read_all,
    settle,
    waiting_for_commit,
)
from twfs.core.state import Core
from twfs.errors import DeviceError, NoSuchBlock, NotEmpty
from twfs.eviction import choosing, evicting
from twfs.eviction.ranking import NEVER, ranks
from twfs.hints import Stop
from twfs.index import slots as states
from twfs.index.slots import IntArray, Slots
from twfs.metadata import ledger
from twfs.metadata.environment import BACKLOG_MAX
from twfs.policy.scoring import Scores
from twfs.store import PutOutcome
from twfs.units import ByteCount, Millis, PrefixHash

BLOCK = 8192  # bytes on the device of one block of the small layouts


def test_uses_and_publishes_are_stamped_by_the_clock_that_is_given(scratch: Path) -> None:
    days = iter(range(1, 100))
    with open_warehouse(scratch, clock=lambda: Millis(next(days) * 86_400_000)) as warehouse:
        model, stamp = warehouse.open_model("m", MHA), warehouse._core.slots.stamp
        older, newer = chain_of(model, 2), chain_of(model, 2, seed=1)
        seen = []
        for names in (older, newer):
            put(warehouse, model, names)
            _, block = block_at(warehouse, model, names, 0)
            seen += [int(block.published_ms), int(stamp[block.slot])]
        warehouse.touch(model, older)
        _, block = block_at(warehouse, model, older, 0)
        seen.append(int(stamp[block.slot]))
        days_seen = [ms / 86_400_000 for ms in seen]
        assert days_seen == sorted(set(days_seen)), "each moment asks the clock"
        assert all(day in range(1, 100) for day in days_seen), "and no other clock"
        warehouse.evict(ByteCount(2 * BLOCK))
        assert [warehouse.lookup(model, names) for names in (older, newer)] == [2, 0]


def test_a_chain_loses_its_tail_and_never_its_middle(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 10)
        put(warehouse, model, names)
        for left in range(9, -1, -1):
            assert warehouse.evict(ByteCount(1)) == BLOCK
            assert read_all(warehouse, model, names) == left
            assert_sound(warehouse)


def test_the_least_recently_used_session_goes_first(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        sessions = [chain_of(model, 6, seed, fork=2) for seed in (1, 2, 3)]
        for names in sessions:
            put(warehouse, model, names)
        for age, names in enumerate((sessions[1], sessions[2], sessions[0])):
            slots = [block_at(warehouse, model, names, i)[1].slot for i in range(6)]
            core.slots.stamp[slots] = 1000 + age
        warehouse.evict(ByteCount(4 * BLOCK))
        assert [warehouse.lookup(model, names) for names in sessions] == [6, 2, 6]
        warehouse.evict(ByteCount(5 * BLOCK))
        assert [warehouse.lookup(model, names) for names in sessions] == [5, 2, 2]
        assert warehouse.evict(ByteCount(1 << 30)) == 5 * BLOCK
        assert warehouse.evict(ByteCount(1 << 30)) == 0
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


class Given:
    """A policy whose scores are given, by slot."""

    name = "given"

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def scores(self, slots: Slots, which: IntArray, now_ms: int) -> Scores:  # noqa: ARG002
        return self._scores[which]

    def score(self, slots: Slots, slot: int, now_ms: int) -> float:  # noqa: ARG002
        return float(self._scores[slot])

    def of_new(self, position: int, stop: Stop | None, return_ms: int | None) -> float:  # noqa: ARG002
        return 0.0


def slow_order(core: Core, scores: Scores) -> list[int]:
    """All blocks in the order in which they are to go, by looking at every one each time."""
    slots, now = core.slots, 0
    rank = ranks(core, now)
    left = {int(slot) for slot in np.flatnonzero(slots.state[: len(slots)] == states.LIVE)}
    order: list[int] = []
    while True:
        parents = {int(slots.parent[slot]) for slot in left}
        free = [
            (int(rank[slot]), float(scores[slot]), -int(slots.position[slot]), slot)
            for slot in left
            if slot not in parents and not slots.leases[slot] and rank[slot] != NEVER
        ]
        if not free:
            return order
        order.append(min(free)[3])
        left.discard(order[-1])


@pytest.mark.parametrize("sorted_at_once", [1, 7, choosing.SORTED_AT_ONCE])
def test_the_order_is_that_of_a_slow_reference(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, sorted_at_once: int
) -> None:
    monkeypatch.setattr(choosing, "SORTED_AT_ONCE", sorted_at_once)
    random = np.random.default_rng(sorted_at_once)
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        chains = [chain_of(model, 6, seed, fork=int(random.integers(1, 6))) for seed in range(12)]
        for names in chains:
            put(warehouse, model, names)
        put(warehouse, model, chain_of(model, 5, 99).slice(3, 5))  # detached
        block = block_at(warehouse, model, chains[3], 5)[1]
        core.slots.leases[block.slot] += 1
        scores = random.integers(0, 9, len(core.slots)).astype(np.float64)
        core.policy = Given(scores)
        wanted = slow_order(core, scores)
        assert len(wanted) > 30
        with core.lock:
            for count in (1, 3, 11, 1000):
                found = choosing.choose_victims(core, count * BLOCK)
                for slot in found:  # as if all removals had failed
                    core.slots.state[slot] = states.LIVE
                assert found == wanted[:count]
        core.slots.leases[block.slot] -= 1


def test_what_may_never_go_stays_and_all_above_it(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names)
        kept = block_at(warehouse, model, names, 3)[1].slot

        def but_one(core: Core, now_ms: int) -> "npt.NDArray[np.uint8]":
            found = ranks(core, now_ms)
            found[kept] = NEVER
            return found

        monkeypatch.setattr(choosing, "ranks", but_one)
        assert warehouse.evict(ByteCount(1 << 30)) == 2 * BLOCK
        assert read_all(warehouse, model, names) == 4


def test_detached_blocks_and_those_below_a_hole_go_first(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        whole, holed, torn = (chain_of(model, 5, seed) for seed in (1, 2, 3))
        put(warehouse, model, whole)
        put(warehouse, model, holed)
        put(warehouse, model, torn.slice(3, 5))
        key, block = block_at(warehouse, model, holed, 2)
        evicting.spoil(warehouse._core, key, block.generation)
        warehouse.touch(model, holed)
        assert warehouse.evict(ByteCount(4 * BLOCK)) == 4 * BLOCK
        assert warehouse.detached(model.id) == []
        assert warehouse.models()[0].blocks == 5 + 3
        assert warehouse.lookup(model, whole) == 5


def test_shards_of_one_block_go_and_the_rest_follows(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 6)
        put_whole(warehouse, model, names)
        for _ in range(12):
            assert warehouse.evict(ByteCount(1)) > 0
            assert_sound(warehouse)
            held = read_all(warehouse, model, names)
            assert warehouse.heads(model.id) == ([names.hash_at(held - 1)] if held else [])
        assert warehouse.models()[0].blocks == 0


def test_victims_of_two_models_by_turns_are_few_transactions(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        models = [warehouse.open_model(name, MHA) for name in ("a", "b")]
        for turn in range(40):
            put(warehouse, models[turn % 2], chain_of(models[turn % 2], 1, turn))
        assert BACKLOG_MAX > 2  # as many jobs under the lock would wait for themselves
        futures = evicting.submit_eviction(warehouse._core, 40 * BLOCK)
        assert len(futures) == 2
        assert evicting.freed_bytes(futures) == 40 * BLOCK


def test_a_removal_that_fails_lets_its_blocks_live(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)

        def failing(*_: Any, **__: Any) -> None:
            raise DeviceError("the metadata could not be written")

        with monkeypatch.context() as patch:
            patch.setattr(ledger, "remove", failing)
            with pytest.raises(DeviceError):
                warehouse.evict(ByteCount(BLOCK))
        assert read_all(warehouse, model, names) == 3
        assert warehouse.evict(ByteCount(BLOCK)) == BLOCK


def test_only_heads_can_be_removed(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        with pytest.raises(NotEmpty):
            warehouse.remove(model.id, names.hash_at(1))
        with pytest.raises(NoSuchBlock):
            warehouse.remove(model.id, PrefixHash(bytes(16)))
        assert warehouse.remove(model.id, names.hash_at(2)) == 3 * BLOCK
        with pytest.raises(NoSuchBlock):
            warehouse.remove(model.id, names.hash_at(2))


def test_removing_twice_at_once_removes_once(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 3)
        put_whole(warehouse, model, names)
        refused: list[str] = []
        remove = partial(warehouse.remove, model.id, names.hash_at(2))
        with waiting_for_commit(warehouse, remove):
            try:
                remove()
            except NoSuchBlock as error:
                refused.append(str(error))
            assert evicting.submit_eviction(warehouse._core, 1 << 30) == []
        assert len(refused) == 1
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def test_a_session_that_grows_while_it_is_removed_keeps_what_it_grew_from(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 4)
        put(warehouse, model, names.head(2))
        grow = partial(put, warehouse, model, names)
        remove = partial(warehouse.remove, model.id, names.hash_at(1))
        with waiting_for_commit(warehouse, grow, remove):
            pass
        assert read_all(warehouse, model, names) == 4
        assert warehouse.heads(model.id) == [names.hash_at(3)]


def test_removing_leaves_other_sessions_alone_even_when_they_are_incomplete(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", HYBRID)
        trunk, branch = chain_of(model, 5), chain_of(model, 6, 1, fork=3)
        put_whole(warehouse, model, trunk)
        put(warehouse, model, branch, group=1)
        warehouse.remove(model.id, trunk.hash_at(4))
        assert warehouse.heads(model.id) == [branch.hash_at(5)]
        assert [i.key.group for i in warehouse.chain_of(model.id, branch.hash_at(5))] == [
            0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 1, 1,
        ]  # fmt: skip


def test_removing_a_block_takes_all_that_goes_on_from_it_and_nothing_else(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", HYBRID)
        trunk, branch = chain_of(model, 6), chain_of(model, 7, 1, fork=4)
        aside = chain_of(model, 5, 2, fork=2)
        for names in (trunk, branch, aside):
            put_whole(warehouse, model, names)
        with warehouse.match(model, trunk) as match:
            assert match.blocks == 6
            freed = warehouse.remove(model.id, trunk.hash_at(3), below=True)
        assert freed > 0
        assert sorted(warehouse.heads(model.id)) == sorted([trunk.hash_at(2), aside.hash_at(4)])
        assert read_all(warehouse, model, aside) == 5
        assert [warehouse.lookup(model, names) for names in (trunk, branch)] == [3, 3]
        with pytest.raises(NoSuchBlock):
            warehouse.remove(model.id, trunk.hash_at(3), below=True)
        warehouse.remove(model.id, trunk.hash_at(0), below=True)
        assert (warehouse.heads(model.id), warehouse.detached(model.id)) == ([], [])


def test_the_low_water_mark_is_kept_free_in_the_background(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        for seed in range(45):
            put(warehouse, model, chain_of(model, 50, seed))
        settle(warehouse)
        assert core.allocator.free_bytes >= evicting.low_water_bytes(core)
        assert core.evicting == 0
        assert warehouse.statistics()["counters"]["evicted_blocks"] > 0


def test_a_lost_block_is_a_hole_and_its_children_stay(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 4)
        put(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 2)
        assert not evicting.spoil(core, key, block.generation + 1)
        flip_payload(warehouse, block)
        assert evicting.judge(core, key, block.generation)
        assert not evicting.judge(core, key, block.generation)
        assert warehouse.lookup(model, names) == 2
        assert warehouse.models()[0].blocks == 4
        assert warehouse.heads(model.id) == [names.hash_at(3)]
        assert_sound(warehouse)
        warehouse.remove(model.id, names.hash_at(3))
        assert warehouse.space().limbo_bytes == BLOCK  # never used again
        assert warehouse.space().free_bytes == warehouse.space().total_bytes - BLOCK


def test_a_hole_filled_while_it_is_made_has_its_true_size(scratch: Path) -> None:
    """Memory follows each commit in order: the hole first, then what fills it."""
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 2)
        put(warehouse, model, names)
        key, block = block_at(warehouse, model, names, 1)
        futures: list[Future[Any]] = []
        real = core.metadata.submit

        def then_fill(*args: Any, **options: Any) -> "Future[Any]":
            core.metadata.submit = real  # type: ignore[method-assign]
            future = real(*args, **options)
            future.result()
            assert put(warehouse, model, names).outcomes[1] is PutOutcome.PUBLISHED
            return future

        core.metadata.submit = then_fill  # type: ignore[method-assign]
        assert evicting.spoil(core, key, block.generation)
        assert futures == []
        assert read_all(warehouse, model, names) == 2


def test_a_leased_hole_can_be_filled_and_removed(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 2)
        put(warehouse, model, names)
        match = warehouse.match(model, names)
        key, block = block_at(warehouse, model, names, 1)
        evicting.spoil(core, key, block.generation)
        put(warehouse, model, names)
        warehouse.remove(model.id, names.hash_at(1))
        assert warehouse.space().limbo_bytes == 3 * BLOCK
        match.release()
        settle(warehouse)
        assert warehouse.space().limbo_bytes == BLOCK


def test_old_epochs_are_swept_but_for_what_is_leased(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        leased, loose = chain_of(model, 4), chain_of(model, 7, 3, fork=2)
        put(warehouse, model, leased)
        put(warehouse, model, loose)
        match = warehouse.match(model, leased.head(3))
        warehouse.new_epoch(model)
        assert evicting.sweep_epochs(core) <= 6 * BLOCK
        assert model.id in core.models
        assert warehouse.space().limbo_bytes == 0
        assert core.slots.statistics()["slots_live"] == 3
        match.release()
        evicting.sweep_epochs(core)
        assert model.id not in core.models
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def test_own_keys_without_positions_are_evicted_too(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, own_names(model, ("a", None, 0), ("b", "a", 0), ("c", "zz", 0)))
        assert warehouse.evict(ByteCount(1)) == BLOCK
        assert warehouse.detached(model.id) == []
        assert warehouse.evict(ByteCount(1 << 20)) == 2 * BLOCK

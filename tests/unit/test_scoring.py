"""The policies: recency, and the chance of reuse for the time held; what they are told of uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from support.warehouses import BIG, MHA, block_at, chain_of, open_warehouse, put, read_all
from twfs.config import Config, EvictionSettings
from twfs.hints import Hint, Stop
from twfs.index.slots import LIVE, Slots
from twfs.index.uses import SessionUses
from twfs.policy.scoring import LRU, PASSED_PART, Reuse, index_of, policy_of
from twfs.store import Model, PutOutcome
from twfs.units import ByteCount, Millis
from twfs.warehouse import Warehouse

NOW = 2_000_000_000_000


class Time:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now_ms = NOW

    def __call__(self) -> Millis:
        return Millis(self.now_ms)


@contextmanager
def opened(scratch: Path, policy: str = "reuse") -> Iterator[tuple[Warehouse, Model, Time]]:
    clock = Time()
    config = Config(eviction=EvictionSettings(policy=policy))  # type: ignore[arg-type]
    with open_warehouse(scratch, clock=clock, config=config) as warehouse:
        yield warehouse, warehouse.open_model("m", MHA), clock


@pytest.fixture
def slots(tmp_path: Path) -> Iterator[Slots]:
    made = Slots(tmp_path / "heat")
    random = np.random.default_rng(5)
    count = 4000
    made.allot(count)
    ages = np.exp(random.uniform(0, 28, count))
    made.stamp[:count] = np.maximum(0, NOW - ages.astype(np.int64))
    made.state[:count] = LIVE
    made.stop[:count] = random.integers(0, 4, count)
    made.position[:count] = random.integers(16, 200_000, count)
    made.back_ms[:count] = np.where(
        random.random(count) < 0.1, NOW + random.integers(-60_000, 600_000, count), 0
    )
    for _ in range(20):
        made.uses.heard(made.uses.new(), NOW - int(random.integers(0, 10**7)))
    made.session[:count] = random.integers(0, 21, count)
    yield made
    made.close()


@pytest.mark.parametrize("policy", [LRU, Reuse(), Reuse(100_000)], ids=["lru", "reuse", "cost"])
def test_one_score_is_that_of_many(slots: Slots, policy: Reuse) -> None:
    which = np.arange(len(slots))
    many = policy.scores(slots, which, NOW)
    assert many.dtype == np.float64
    assert np.isfinite(many).all()
    assert [policy.score(slots, slot, NOW) for slot in which.tolist()] == many.tolist()


def test_without_hints_reuse_is_recency(slots: Slots) -> None:
    which = np.arange(len(slots))
    slots.stop[:], slots.back_ms[:], slots.session[:] = 0, 0, 0
    slots.stamp[: len(slots)] = NOW - 1 - np.random.default_rng(1).permutation(len(slots)) * 977
    order = np.argsort(Reuse().scores(slots, which, NOW))
    assert (order == np.argsort(LRU.scores(slots, which, NOW))).all()
    assert Reuse().of_new(16, None, None) >= Reuse().scores(slots, which, NOW).max()


def test_the_index_is_the_best_return_of_holding_on() -> None:
    steady = index_of((0.01, 0.01, 0.01), (0, 10, 100))
    assert steady[:2] == pytest.approx([0.01, 0.01])
    rising = index_of((1e-6, 0.5, 1e-6), (0, 10, 20))
    assert 1 / 13 < rising[0] < 1 / 11, "ten seconds are held for what comes soon after"
    assert rising[1] == pytest.approx(0.5)


def test_a_tool_call_keeps_more_than_an_ended_turn() -> None:
    policy = Reuse()
    for age in (1000, 20_000, 60_000, 200_000):
        values = [policy._one(0 if stop is None else stop.code, age) for stop in (None, *Stop)]
        unknown, tool, end, other = values
        assert tool > end
        assert other == unknown > end
    assert policy._one(Stop.TOOL_USE.code, 7000) > policy.of_new(16, Stop.TOOL_USE, None)
    assert policy.of_new(16, Stop.TOOL_USE, None) > policy.of_new(16, Stop.END_TURN, None)


def test_the_deeper_costs_more_where_attention_is_counted() -> None:
    plain, cost = Reuse(), Reuse(1000)
    assert cost.of_new(1000, None, None) == 2 * plain.of_new(1000, None, None)


@pytest.mark.parametrize("named", [True, False])
def test_what_its_own_session_passed_over_goes_first(scratch: Path, *, named: bool) -> None:
    with opened(scratch) as (warehouse, model, clock):
        hint = Hint("s" if named else "", stop=Stop.TOOL_USE)
        old, new = chain_of(model, 9, 1, fork=4), chain_of(model, 9, 2, fork=4)
        other = chain_of(model, 5, 3)
        put(warehouse, model, other, hint=Hint("another", stop=Stop.TOOL_USE))
        for names in (old, new):
            clock.now_ms += 60_000
            with warehouse.match(model, names) as match:
                put(warehouse, model, names.slice(match.blocks, 9), hint=hint)
            warehouse.touch(model, names, hint)
        warehouse.evict(ByteCount(5 * 8192))
        assert [warehouse.lookup(model, names) for names in (old, new, other)] == [4, 9, 5]
        assert read_all(warehouse, model, new) == 9


def test_sessions_that_share_a_prompt_do_not_pass_each_other_over(scratch: Path) -> None:
    with opened(scratch) as (warehouse, model, clock):
        chains = [chain_of(model, 9, seed, fork=4) for seed in range(1, 5)]
        for number, names in enumerate(chains):
            clock.now_ms += 1000
            put(warehouse, model, names, hint=Hint(f"session {number}"))
            warehouse.touch(model, names, Hint(f"session {number}", stop=Stop.TOOL_USE))
        slots = warehouse._core.slots
        tails = [int(block_at(warehouse, model, names, 8)[1].slot) for names in chains]
        values = Reuse().scores(slots, np.array(tails), clock.now_ms)
        assert values.max() / values.min() < 1 / PASSED_PART / 8


def test_a_helper_with_another_prompt_is_a_session_of_its_own(scratch: Path) -> None:
    with opened(scratch) as (warehouse, model, clock):
        main, helper = chain_of(model, 5, 1), chain_of(model, 5, 2)
        for names in (main, helper):
            clock.now_ms += 5000
            put(warehouse, model, names, hint=Hint("s"))
            warehouse.touch(model, names, Hint("s", stop=Stop.TOOL_USE))
        numbers = {
            int(warehouse._core.slots.session[block_at(warehouse, model, names, 4)[1].slot])
            for names in (main, helper)
        }
        assert len(numbers) == 2


def test_who_says_when_it_is_back_is_kept_until_then(scratch: Path) -> None:
    with opened(scratch) as (warehouse, model, clock):
        soon, late = chain_of(model, 3, 1), chain_of(model, 3, 2)
        for names, back in ((soon, 60_000), (late, None)):
            put(warehouse, model, names)
            warehouse.touch(model, names, Hint(stop=Stop.END_TURN, return_ms=back))
        clock.now_ms += 30_000
        warehouse.touch(model, late, Hint(stop=Stop.END_TURN))
        warehouse.evict(ByteCount(3 * 8192))
        assert (warehouse.lookup(model, soon), warehouse.lookup(model, late)) == (3, 0)


@pytest.mark.parametrize("policy", ["reuse", "lru"])
def test_a_newcomer_takes_the_place_of_nothing_that_is_worth_more(
    scratch: Path, policy: str
) -> None:
    clock = Time()
    config = Config(eviction=EvictionSettings(policy=policy))  # type: ignore[arg-type]
    with open_warehouse(scratch, clock=clock, config=config) as warehouse:
        model = warehouse.open_model("m", BIG)
        blocks = warehouse.space().free_bytes // (BIG.block_bytes() + 4096)
        held = chain_of(model, blocks, 1)
        put(warehouse, model, held, hint=Hint("busy"))
        warehouse.touch(model, held, Hint("busy", stop=Stop.TOOL_USE))
        clock.now_ms += 6000  # it will be back at any moment
        offered = chain_of(model, 8, 2)
        result = put(warehouse, model, offered, hint=Hint("new", stop=Stop.END_TURN))
        counters = warehouse.statistics()["counters"]
        if policy == "lru":
            assert result.held == 8
            assert counters["worthless_blocks"] == 0
        else:
            kept_out = result.outcomes.count(PutOutcome.NOT_ADMITTED)
            assert kept_out >= 7, "but what room is free anyhow"
            assert counters["worthless_blocks"] == kept_out
            clock.now_ms += 600_000
            assert put(warehouse, model, offered, hint=Hint("new")).held == 8


def test_numbers_of_sessions_are_given_anew_after_the_last() -> None:
    uses = SessionUses(numbers_max=4)
    first = [uses.number_of((name,)) for name in "abc"]
    assert first == [1, 2, 3]
    uses.heard(1, 77)
    assert uses.number_of(("a",)) == 1
    assert uses.number_of(("d",)) == 1, "the oldest is taken"
    assert uses.latest_ms[1] == 0
    assert uses.number_of(("a",)) == 2
    uses.heard(0, 99)
    assert uses.latest_ms[0] == 0, "no session is never heard of"


def test_policies_have_the_names_of_the_configuration() -> None:
    assert [policy_of(name).name for name in ("lru", "reuse")] == ["lru", "reuse"]

"""A lease holds its blocks until the last of its owners has left or its deadline has passed."""

import numpy as np
import pytest

from twfs.errors import LeaseEnded, TooLarge
from twfs.index import leases as module
from twfs.index.leases import AGE_TERMS_MAX, LEASES_PER_OWNER_MAX, Leases, Located
from twfs.records import EXTENT_DTYPE, LOCATED_DTYPE
from twfs.units import ByteCount, ModelId


class Clock:
    """CLOCK_BOOTTIME in the hands of a test."""

    now = 1_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that leases look at."""
    clock = Clock()
    monkeypatch.setattr(module, "boottime_ms", clock)
    return clock


def grant(leases: Leases, owner: int, slots: list[int], lease_bytes: int = 10) -> bytes:
    leases.room(owner, lease_bytes)
    located = Located(
        Leases.new_token(), ModelId(1), 0, len(slots), np.zeros(0, LOCATED_DTYPE),
        np.zeros(0, EXTENT_DTYPE), leases.term_ms,
    )  # fmt: skip
    leases.grant(located, np.array(slots), ByteCount(lease_bytes), owner)
    return located.token


def slots_of(ended: list[module.Ended]) -> list[list[int]]:
    return sorted(each.slots.tolist() for each in ended)


def test_release_ends_a_lease_once(clock: Clock) -> None:
    leases = Leases(1000, ByteCount(100))
    owner = leases.add_owner(0)
    token = grant(leases, owner, [1, 2])
    assert leases.held(token, owner)
    ended = leases.release(token, owner)
    assert ended is not None
    assert ended.slots.tolist() == [1, 2]
    assert leases.release(token, owner) is None
    assert not leases.held(token, owner)
    assert leases.statistics()["leased_bytes"] == 0
    assert leases.expire() == []


def test_a_joined_lease_outlives_the_one_that_matched(clock: Clock) -> None:
    leases = Leases(1000, ByteCount(100))
    scheduler, rank = leases.add_owner(7), leases.add_owner(7)
    token = grant(leases, scheduler, [1])
    leases.join(token, rank)
    leases.join(token, rank)
    assert leases.end_owner(scheduler) == []
    assert leases.held(token, rank)
    assert slots_of(leases.end_owner(rank)) == [[1]]
    assert leases.end_owner(rank) == []


def test_an_owner_holds_a_lease_until_it_has_released_it_as_often_as_taken(clock: Clock) -> None:
    leases = Leases(1000, ByteCount(100))
    owner = leases.add_owner(0)
    token = grant(leases, owner, [1])
    leases.join(token, owner)
    assert leases.statistics()["leased_bytes"] == 10
    assert leases.release(token, owner) is None
    assert leases.held(token, owner)
    assert leases.release(token, owner) is not None
    assert not leases.held(token, owner)
    assert leases.room_bytes(owner) == 100
    token = grant(leases, owner, [2])
    leases.join(token, owner)
    clock.now += 1000
    assert slots_of(leases.expire()) == [[2]]
    assert leases.room_bytes(owner) == 100


def test_only_the_same_user_joins_and_only_in_time(clock: Clock) -> None:
    leases = Leases(1000, ByteCount(100))
    owner, stranger, friend = leases.add_owner(1), leases.add_owner(2), leases.add_owner(1)
    token = grant(leases, owner, [1])
    with pytest.raises(LeaseEnded):
        leases.join(token, stranger)
    with pytest.raises(LeaseEnded):
        leases.join(Leases.new_token(), friend)
    clock.now += 1000
    with pytest.raises(LeaseEnded):
        leases.join(token, friend)
    assert leases.release(token, stranger) is None
    assert leases.renew(token, stranger) is None


def test_deadlines_end_leases_in_any_order(clock: Clock) -> None:
    leases = Leases(1000, ByteCount(100))
    owner = leases.add_owner(0)
    first = grant(leases, owner, [1])
    clock.now += 500
    second = grant(leases, owner, [2])
    assert leases.renew(first, owner) == 1000
    clock.now += 999
    assert leases.held(second, owner)
    assert leases.expire() == []
    clock.now += 1
    assert not leases.held(second, owner)  # before expire looked, too
    assert slots_of(leases.expire()) == [[1], [2]]
    assert leases.statistics()["leases_expired"] == 2
    assert leases.renew(first, owner) is None


def test_renewing_ends_at_the_age_limit(clock: Clock) -> None:
    leases = Leases(1000, ByteCount(100))
    owner = leases.add_owner(0)
    token = grant(leases, owner, [1])
    limit = clock.now + AGE_TERMS_MAX * 1000
    while clock.now < limit - 900:
        clock.now += 900
        assert leases.renew(token, owner) == min(1000, limit - clock.now)
    clock.now = limit
    assert leases.renew(token, owner) is None
    assert slots_of(leases.expire()) == [[1]]


def test_an_owner_is_bounded_in_bytes_and_leases(clock: Clock) -> None:
    leases = Leases(1000, ByteCount(100))
    owner, other = leases.add_owner(0), leases.add_owner(0)
    token = grant(leases, owner, [1], 90)
    with pytest.raises(TooLarge, match="release some"):
        leases.room(owner, 11)
    grant(leases, owner, [2], 10)
    taken = grant(leases, other, [3], 20)
    with pytest.raises(TooLarge):
        leases.join(token, other)
    leases.release(taken, other)
    leases.join(token, other)
    many = Leases(1000, ByteCount(100))
    owner = many.add_owner(0)
    for _ in range(LEASES_PER_OWNER_MAX):
        grant(many, owner, [], 0)
    with pytest.raises(TooLarge):
        many.room(owner, 1)

"""Guaranteed: vLLM's scheduler offers all blocks, each once in a minute, and few in one step."""

import random
from collections import Counter, deque
from itertools import pairwise
from typing import Any

import pytest

from twfs.engines import vllm_offers
from twfs.engines.transfers import Run, run_of, runs_of, stretches
from twfs.engines.vllm_offers import (
    FORGOTTEN_AT_ONCE,
    KNOWN_SECONDS,
    OFFERED_AT_ONCE,
    Known,
    Offers,
    OpenStore,
    Owner,
)
from twfs.engines.vllm_requests import Request, places_of

ME: Owner = (None, 0)


def chain_of(name: str, count: int) -> list[Any]:
    """Keys; each proves those before it, so chains of one name are the same as far as they go."""
    return [f"{name}{place}" for place in range(count)]


def forked(chain: list[Any], at: int, name: str) -> list[Any]:
    """A chain that leaves another."""
    return chain[:at] + chain_of(name, len(chain) - at)


def places(runs: list[tuple[int, Any]]) -> list[int]:
    return [place for first, keys in runs for place in range(first, first + len(keys))]


@pytest.mark.parametrize("block_tokens", [1024, 64])
def test_what_is_known_is_what_was_offered_in_the_last_minute(block_tokens: int) -> None:
    """Against a table of all keys: exactly if each block ends at a fork, else never too much."""
    numbers = random.Random(block_tokens)
    known, table = Known(block_tokens), dict[tuple[Owner, str], float]()
    chains, now_s = [chain_of("a", 60)], 0.0
    seen = Counter[str]()
    for number in range(3000):
        now_s += numbers.expovariate(0.5)
        chain = numbers.choice(chains[-8:])
        if numbers.random() < 0.1:
            chains.append(forked(chain, numbers.randrange(1, 60), f"{number} "))
        owner: Owner = numbers.choice([ME, ("acme", 3)])
        first = numbers.choice([0, numbers.randrange(60)])
        keys = chain[first : numbers.randint(first + 1, 60)]
        found = known.lacking(owner, first, keys, now_s)
        lacking = [
            first + at
            for at, key in enumerate(keys)
            if now_s - table.get((owner, key), -KNOWN_SECONDS) >= KNOWN_SECONDS
        ]
        assert all(run == chain[place : place + len(run)] for place, run in found)
        assert all(one[0] + len(one[1]) < other[0] for one, other in pairwise(found))
        assert set(places(found)) >= set(lacking)
        if block_tokens == 1024:
            assert places(found) == lacking
        seen[f"runs {min(len(found), 2)}"] += 1
        for place, run in found:
            known.note(owner, place, run, now_s)
        offered = [key for _, run in found for key in run]
        held = numbers.choice([len(offered), numbers.randint(0, len(offered))])
        if held < len(offered):
            known.lost(owner, offered, held)
            seen["lost"] += 1
        for at, (place, key) in enumerate(zip(places(found), offered, strict=True)):
            if at < held:
                table[owner, key] = now_s
            elif place in lacking:  # or another chain's store, which has not failed, goes for it
                table[owner, key] = -KNOWN_SECONDS
        known.forget(now_s)
    assert min(seen.values()) > 100, seen


def test_a_chain_that_leaves_a_known_one_is_offered_from_the_last_fork_on() -> None:
    known, chain = Known(64), chain_of("a", 100)
    known.note(ME, 0, chain, 0.0)
    assert places(known.lacking(ME, 0, forked(chain, 50, "b"), 1.0)) == list(range(48, 100))
    assert known.lacking(ME, 0, chain, 1.0) == []
    assert known.lacking(ME, 0, chain[:64], 1.0) == []
    assert places(known.lacking(ME, 0, chain[:40], 1.0)) == list(range(32, 40))
    assert places(known.lacking(("acme", 0), 0, chain, 1.0)) == list(range(100))


def test_a_chain_that_goes_on_from_the_end_of_a_known_one_is_offered_from_there() -> None:
    known, chain = Known(64), chain_of("a", 100)
    known.note(ME, 0, chain[:37], 0.0)
    known.note(ME, 50, chain[50:60], 0.0)  # behind a fork, at 47, that nobody has offered
    assert places(known.lacking(ME, 0, chain, 1.0)) == list(range(37, 100))
    assert places(known.lacking(ME, 40, chain[40:], 1.0)) == list(range(40, 100))
    assert places(known.lacking(ME, 49, chain[49:], 1.0)) == [49, *range(60, 100)]
    known.note(ME, 37, chain[37:50], 0.0)
    assert places(known.lacking(ME, 0, chain, 1.0)) == list(range(60, 100))


def test_what_is_over_is_let_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    known, acme = Known(64), ("acme", 0)
    for number in range(FORGOTTEN_AT_ONCE):
        known.note(ME, 0, chain_of(f"{number} ", 32), float(number % 2))  # two ends each
    known.note(acme, 0, chain_of("a", 32), 0.0)
    known.forget(KNOWN_SECONDS - 1)
    assert len(known._ends[ME]) == 2 * FORGOTTEN_AT_ONCE
    known.forget(2 * KNOWN_SECONDS)
    assert acme not in known._ends
    known.forget(2 * KNOWN_SECONDS)
    assert len(known._ends[ME]) == known._count == FORGOTTEN_AT_ONCE
    known.forget(2 * KNOWN_SECONDS)
    known.forget(2 * KNOWN_SECONDS)
    assert (known._ends, known._owners, known._count) == ({}, deque(), 0)
    # What was offered anew meanwhile stays, and of too many the oldest go before their time.
    known.note(ME, 0, chain_of("a", 32), 0.0)
    known.note(ME, 0, chain_of("a", 32), 50.0)
    known.forget(KNOWN_SECONDS)
    assert known.lacking(ME, 0, chain_of("a", 32), 70.0) == []
    monkeypatch.setattr(vllm_offers, "KNOWN_MAX", 5)
    for number in range(4):
        known.note(ME, 0, chain_of(f"b{number} ", 32), 70.0)
    known.forget(70.0)
    assert list(known._ends[ME]) == ["b1 31", "b2 15", "b2 31", "b3 15", "b3 31"]
    known.clear()
    assert known.lacking(ME, 0, chain_of("a", 32), 70.0) == [(0, chain_of("a", 32))]


def test_room_is_taken_until_it_was_copied() -> None:
    offers, keys = Offers(10, 16), chain_of("a", 30)
    assert offers.choose("r", ME, 0, keys[:4], (0, 0)) == [(0, keys[:4])]
    assert offers.choose("r", ME, 4, keys[4:], (0, 0)) == [(4, keys[4:10])]
    assert offers.choose("s", ME, 10, keys[10:], (10, 20)) == []
    offers.copied("r", set(keys[4:10]))
    assert offers.choose("s", ME, 10, keys[10:], (10, 20)) == [(20, keys[20:26])]
    # What the engine held itself takes none.
    mine = chain_of("b", 30)
    assert offers.choose("t", ME, 0, mine, (25, 0)) == [(0, mine[:25])]
    offers.copied("t", mine[:25])
    offers.copied("s", keys[20:26])
    assert offers.choose("t", ME, 25, mine[25:], (25, 0)) == [(25, mine[25:])]
    # What was not stored after all is offered again, once it takes no room.
    offers.copied("t", mine[25:])
    offers.ended(OpenStore(ME, mine[25:], 0, 3))
    assert offers.choose("t", ME, 0, mine, (25, 0)) == [(28, mine[28:])]
    offers.clear()
    assert offers.choose("r", ME, 0, keys, (0, 0)) == [(0, keys[:10])]


def test_an_arena_of_less_than_an_offer_is_used_while_a_request_goes_on() -> None:
    offers, chain = Offers(10, 16), chain_of("a", 25)
    assert [offers.bound(0, stop) for stop in (9, 10, 25)] == [0, 10, 10]
    offers.choose("r", ME, 0, chain[:10], (0, 0))
    assert offers.bound(10, 25) == 10
    offers.copied("r", chain[:10])
    assert offers.bound(10, 25) == 20


def test_what_finds_no_room_waits_for_it() -> None:
    offers, chain = Offers(10, 256), chain_of("a", 25)
    offered, steps = 0, list[int]()
    while offered < 25:
        offers.begin_step()
        stop = offers.bound(offered, 25)
        if stop > offered:
            assert offers.choose("r", ME, offered, chain[offered:stop], (0, 0)) == [
                (offered, chain[offered:stop])
            ]
        steps.append(stop - offered)
        if steps[-1] == 0:  # the workers have read what they were to store
            offers.copied("r", chain[:offered])
        offered = stop
    assert steps == [10, 0, 10, 0, 5]


def test_all_is_offered_in_the_end_and_few_keys_in_one_step() -> None:
    """Requests of thousands of blocks; one of them ends before all of its are offered."""
    offers = Offers(1 << 20, 16)
    chains = {name: chain_of(name, 5000) for name in "abc"}
    started, offered = dict.fromkeys(chains, 0), Counter[Any]()
    steps = 0
    while any(started[name] < 4992 for name in chains):  # the last 8 are less than 256 tokens
        offers.begin_step()
        steps += 1
        took = 0
        for name, chain in chains.items():
            ends, at = name == "b" and steps == 3, started[name]
            stop = 5000 if ends else offers.bound(at, 5000)
            started[name] = stop
            if stop == at:
                continue
            for _, run in offers.choose(name, ME, at, chain[at:stop], (4000, 0)):
                offered.update(run)
                took += 0 if ends else len(run)
        assert took <= OFFERED_AT_ONCE
    assert started == {"a": 4992, "b": 5000, "c": 4992}
    assert offered == Counter(
        key for name, chain in chains.items() for key in chain[: started[name]]
    )
    assert steps == 2 * -(-4992 // OFFERED_AT_ONCE)


def test_a_step_takes_few_offers_however_small_and_none_of_an_answers_first_tokens() -> None:
    offers, chains = Offers(1 << 20, 16), [chain_of(f"{number} ", 16) for number in range(40)]
    started, steps = [0] * 40, list[int]()
    while sum(started) < 40 * 16:
        offers.begin_step()
        steps.append(0)
        for number, chain in enumerate(chains):
            if offers.bound(0, 15) == 0 and offers.bound(started[number], 16) > started[number]:
                offers.choose(f"{number}", ME, 0, chain, (0, 0))
                started[number] = 16
                steps[-1] += 1
    assert steps == [7, 7, 7, 7, 7, 5]
    # What is known takes of that as well: it is looked at.
    offers.begin_step()
    asked = 0
    while offers.bound(0, 16) == 16:
        assert offers.choose(f"{asked}", ME, 0, chains[asked], (0, 0)) == []
        asked += 1
    assert asked == 8


def test_keys_of_a_request_are_its_whole_blocks_as_they_are_now() -> None:
    hashes = [b"%d" % i for i in range(11)]
    each, fourth = Request(hashes), Request(hashes, 4)
    assert each.keys() is hashes
    assert fourth.keys() == [b"3", b"7"]
    hashes.append(b"11")
    assert fourth.keys() == [b"3", b"7", b"11"]
    hashes[6:] = [b"x%d" % i for i in range(6, 9)]  # the user of a session goes on otherwise
    assert fourth.keys() == [b"3", b"x7"]
    del hashes[2:]
    assert fourth.keys() == []


def test_places_and_runs_of_keys() -> None:
    ends = {"a": 16, "b": 32, "c": 48, "f": 96}
    assert places_of(["a", "b", "c"], ends.__getitem__, 16) == range(3)
    assert places_of(["a", "c", "f"], ends.__getitem__, 16) == [0, 2, 5]
    assert places_of([], ends.__getitem__, 16) == ()
    assert stretches(range(5, 9)) == [(0, 4)]
    assert stretches([1, 2, 4, 8, 9]) == [(0, 2), (2, 3), (3, 5)]
    assert stretches([]) == []
    chain = [b"%d" % i for i in range(10)]
    assert run_of(chain, 0, 2) == Run((b"0", b"1"), None, 0)
    assert runs_of(chain, [0, 3, 4]) == (Run((b"0",), None, 0), Run((b"3", b"4"), b"2", 3))
    assert runs_of(chain, []) == ()

"""The exact LRU and Belady's optimum are what one gets by looking at every block, one by one."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.traces import agents, needs_traces, request, write_agents, write_session
from twfs_tools.replay import bounds
from twfs_tools.replay.streams import Stream, make_stream
from twfs_tools.replay.traces import Request, Session, read_traces


def stream_of(prompts: list[list[int]]) -> Stream:
    """A stream of these prompts, one id a block, in this order."""
    requests = tuple(
        Request(float(at), "", "m", tuple(ids), len(ids), 0, "", None)
        for at, ids in enumerate(prompts)
    )
    session = Session("a", "", 1, requests, {"": None}, absolute=True)  # type: ignore[dict-item]
    return make_stream([session], window_s=0, seed=0, block_tokens=1)


def brute_lru(stream: Stream, capacity: int) -> tuple[list[int], int]:
    """LRU, tail first, block by block: a list with the most recently used in front."""
    order: list[int] = []
    hits, written = [], 0
    for chain in stream.chains():
        blocks = chain.tolist()
        run = list(itertools.takewhile(set(order).__contains__, blocks))
        hits.append(len(run))
        kept = blocks[:capacity]
        written += len(set(kept) - set(run))
        order = (kept + [block for block in order if block not in blocks])[:capacity]
    return hits, written


def brute_optimum(stream: Stream, capacity: int) -> list[int]:
    """Belady with bypass, block by block; ties go to the deeper."""
    chains = [chain.tolist() for chain in stream.chains()]

    def rank(block: int, now: int) -> tuple[float, int]:
        later = (at for at in range(now + 1, len(chains)) if block in chains[at])
        return next(later, float("inf")), int(stream.depth[block])

    held: set[int] = set()
    hits = []
    for number, chain in enumerate(chains):
        hits.append(len(list(itertools.takewhile(held.__contains__, chain))))
        wanted = sorted(held | set(chain), key=lambda block: rank(block, number))
        held = {block for block in wanted[:capacity] if rank(block, number)[0] != float("inf")}
    return hits


def best_of_all(stream: Stream, capacity: int) -> int:
    """The most hits that any choice of what to keep could give: tried out, all of them."""
    states = {frozenset[int](): 0}
    for chain in stream.chains():
        blocks = chain.tolist()
        reached: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            run = len(list(itertools.takewhile(held.__contains__, blocks)))
            pool = sorted(held | set(blocks))
            size = min(capacity, len(pool))
            for kept in itertools.combinations(pool, size):
                key = frozenset(kept)
                reached[key] = max(reached.get(key, 0), hits + run)
        states = reached
    return max(states.values())


# Prompts that fork at every depth: each goes on from a part of one before, or begins alike.
prompts = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8), st.lists(st.integers(0, 2), max_size=5)),
    min_size=1, max_size=25,
)  # fmt: skip


def grown(steps: list[tuple[int, int, list[int]]]) -> list[list[int]]:
    made: list[list[int]] = [[]]
    for base, kept, more in steps:
        made.append(made[base % len(made)][:kept] + more)
    return made


@given(prompts, st.integers(1, 12))
def test_lru_hits_and_writes_what_a_list_of_blocks_does(
    steps: list[tuple[int, int, list[int]]], capacity: int
) -> None:
    stream = stream_of(grown(steps))
    [fast] = bounds.lru(stream, [capacity])
    hits, written = brute_lru(stream, capacity)
    assert (fast.blocks.tolist(), fast.written_blocks) == (hits, written)


@given(prompts, st.integers(1, 12))
def test_the_optimum_hits_what_belady_block_by_block_does(
    steps: list[tuple[int, int, list[int]]], capacity: int
) -> None:
    stream = stream_of(grown(steps))
    assert bounds.optimum(stream, capacity).blocks.tolist() == brute_optimum(stream, capacity)


@settings(max_examples=40)
@given(prompts.map(lambda steps: steps[:6]), st.integers(1, 4))
def test_no_choice_whatever_hits_more_than_the_optimum(
    steps: list[tuple[int, int, list[int]]], capacity: int
) -> None:
    stream = stream_of([prompt[:6] for prompt in grown(steps)])
    assert bounds.optimum(stream, capacity).blocks.sum() == best_of_all(stream, capacity)


def test_bounds_are_in_their_order_and_meet_at_the_footprint(tmp_path: Path) -> None:
    write_agents(tmp_path, sessions=12, turns=20)
    stream = make_stream(read_traces([tmp_path]), window_s=600, seed=3)
    ceiling = bounds.ceiling(stream)
    capacities = [1, 5, 20, 100, stream.unique_blocks]
    least = [each.blocks.sum() for each in bounds.lru(stream, capacities)]
    most = [bounds.optimum(stream, capacity).blocks.sum() for capacity in capacities]
    assert least == sorted(least)
    assert most == sorted(most)
    assert all(a <= b <= ceiling.sum() for a, b in zip(least, most, strict=True))
    assert least[-1] == most[-1] == ceiling.sum()
    whole = bounds.lru(stream, [stream.unique_blocks])[0]
    assert whole.written_blocks == stream.unique_blocks
    assert (whole.blocks == ceiling).all()


def test_the_optimum_writes_only_what_it_keeps(tmp_path: Path) -> None:
    write_session(tmp_path, "a", [request(at, [1, 2, 10 + at]) for at in range(5)])
    stream = make_stream(read_traces([tmp_path]), window_s=0, seed=0, block_tokens=64)
    assert bounds.optimum(stream, 10).written_blocks == 2
    assert bounds.optimum(stream, 1).written_blocks == 1
    assert bounds.lru(stream, [10])[0].written_blocks == 7


@needs_traces
def test_the_public_sessions_agree_with_an_independent_simulator() -> None:
    stream = make_stream(read_traces([agents()]), window_s=3600, seed=1, block_tokens=256)
    parts = (0.01, 0.05, 0.10, 0.25, 0.50, 1.0)
    capacities = [round(part * stream.unique_blocks) for part in parts]
    percent = 100 * 256 / stream.prompt_tokens.sum()
    lru = [each.blocks.sum() * percent for each in bounds.lru(stream, capacities)]
    uses = bounds.next_uses(stream)
    optimum = [bounds.optimum(stream, each, uses).blocks.sum() * percent for each in capacities]
    assert lru == pytest.approx([11, 61, 85, 93.0, 94.2, 94.4], abs=1)
    assert optimum == pytest.approx([33, 79, 90, 94.3, 94.4, 94.4], abs=1)
    assert np.all(np.array(lru) <= np.array(optimum))

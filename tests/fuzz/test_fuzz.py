"""Guaranteed: no bytes from outside bring an exception but ours, a hang, or memory by their say.

Superblocks, headers, LMDB rows, requests, replies, frames, chain.json, layouts, names, sizes and
options: the doors of fuzz/targets.py. Every input that ever broke one is in fuzz/corpus and tried
again; then Hypothesis spoils inputs that are good. For a long search, guided by coverage:
`python tests/fuzz/run.py TARGET --seconds 3600`.
"""

import random
import struct
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.run import CORPUS, stored
from fuzz.sample import sample_warehouse
from fuzz.targets import TARGETS, FuzzTarget

SLOW = frozenset({"warehouse"})  # each input opens and checks a warehouse
MEMORY_BYTES_MAX = 48 << 20  # arrays of an opened warehouse, and a decoded input many times over


@pytest.fixture(autouse=True)
def _unchanged_sample() -> Iterator[None]:
    """What is only looked at must not change."""
    with sample_warehouse()._core.metadata.read() as view:
        before = view.counts()
    yield
    with sample_warehouse()._core.metadata.read() as view:
        assert view.counts() == before
    assert sample_warehouse().check(data=True).findings == ()


def fed(target: FuzzTarget, data: bytes) -> None:
    """Feed *data*; the memory that it takes has a bound, whatever it claims."""
    tracemalloc.start()
    try:
        target.feed(data)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < MEMORY_BYTES_MAX, f"{len(data)} bytes took {most} bytes of memory"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_what_broke_a_parser_once_breaks_none_now(name: str) -> None:
    kept = stored(name)
    assert kept, f"{CORPUS / name} is empty: python tests/fuzz/run.py {name} --blind --store"
    for data in kept:
        fed(TARGETS[name], data)


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - SLOW))
def test_spoilt_inputs_bring_our_errors_and_nothing_else(name: str) -> None:
    target = TARGETS[name]
    inputs = [*target.seeds(), *stored(name)]

    @settings(max_examples=150)
    @given(st.sampled_from(inputs), st.integers(0, 1 << 32), st.integers(1, 3))
    def spoil(data: bytes, seed: int, times: int) -> None:
        chance = random.Random(seed)
        for _ in range(times):
            data = target.mutate(chance, data)
        target.feed(data)

    spoil()


def test_a_warehouse_of_spoilt_rows_opens_and_is_checked_or_is_refused() -> None:
    target = TARGETS["warehouse"]
    inputs = [*target.seeds(), *stored("warehouse")]

    @settings(max_examples=40)
    @given(st.sampled_from(inputs), st.integers(0, 1 << 32))
    def spoil(data: bytes, seed: int) -> None:
        target.feed(target.mutate(random.Random(seed), data))

    spoil()


def test_the_fuzzer_sees_a_parser_that_raises_something_else() -> None:
    """Seen to fail: a parser without its checks is broken within a few inputs."""

    def careless(data: bytes) -> None:
        count = struct.unpack_from("<H", data, 12)[0]
        struct.unpack_from(f"<{count}Q", data, 16)

    target, chance = TARGETS["header"], random.Random(1)

    def search() -> None:
        for _ in range(1000):
            careless(target.mutate(chance, target.seeds()[0]))

    with pytest.raises(struct.error):
        search()

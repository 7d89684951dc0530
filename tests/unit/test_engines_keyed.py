"""Blocks under an engine's own keys: found by key, in chains as far as their order was seen."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from support.daemon import PATIENT_S, Daemon, running_daemon
from twfs.engines.keyed import STORED, KeyedStore, Places, Revisions, Space
from twfs.errors import InvalidInput, WeightsChanged
from twfs.layout import Arrangement, Group, Layout
from twfs.store import iterate_sessions
from twfs.units import ByteCount

BLOCK_BYTES: Final = 8192
TOKENS: Final = 64


def layout_of(rank: int = 0) -> Layout:
    group = Group(1, arrangement=Arrangement.OPAQUE, layer_bytes=ByteCount(BLOCK_BYTES))
    return Layout("vendor/m", (group,), TOKENS, engine="keyed", overrides={"rank": str(rank)})


def keys_of(count: int, seed: int = 0) -> list[bytes]:
    return [bytes([seed, index]) * 16 for index in range(count)]


def payloads_of(keys: list[bytes]) -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    return [np.resize(np.frombuffer(key, np.uint8), BLOCK_BYTES) for key in keys]


@pytest.fixture
def daemon(scratch: Path) -> Iterator[Daemon]:
    with running_daemon(scratch / "warehouse") as running:
        yield running


@pytest.fixture
def store(daemon: Daemon) -> Iterator[KeyedStore]:
    made = KeyedStore("keyed", str(daemon.socket), arena_bytes=8 << 20, patience_s=PATIENT_S)
    yield made
    made.close()


@pytest.fixture
def space(store: KeyedStore) -> Space:
    return store.space(layout_of())


def put(store: KeyedStore, space: Space, keys: list[bytes]) -> None:
    store.places.learn(keys, TOKENS)
    assert STORED.issuperset(space.put(keys, payloads_of(keys)))


def read(space: Space, keys: list[bytes]) -> list[int]:
    """Read, and check what is said to be right."""
    into = [np.zeros(BLOCK_BYTES, np.uint8) for _ in keys]
    right = space.read(keys, into, PATIENT_S)
    for place, (found, payload) in enumerate(zip(into, payloads_of(keys), strict=True)):
        assert np.array_equal(found, payload if place in right else 0 * payload)
    return right


def leases(daemon: Daemon) -> int:
    with daemon.client() as client:
        count: int = client.statistics()["leases"]["leases"]
        return count


def test_keys_are_found_one_by_one_and_over_gaps(store: KeyedStore, space: Space) -> None:
    keys = keys_of(6)
    put(store, space, keys)
    space.remove(keys[5:])
    assert space.lookup(keys) == 5
    asked = [keys[0], keys[1], *keys_of(1, 9), keys[3], *keys_of(1, 8), keys[4]]
    assert space.lock(asked) == [0, 1, 3, 5]
    assert read(space, asked) == [0, 1, 3, 5]
    assert read(space, [keys[4], keys[2]]) == [0, 1]  # not locked before
    space.unlock(asked)


def test_a_lease_ends_with_the_last_of_its_locks(
    daemon: Daemon, store: KeyedStore, space: Space
) -> None:
    keys = keys_of(4)
    put(store, space, keys)
    assert space.lock(keys) == space.lock(keys) == [0, 1, 2, 3]
    assert leases(daemon) == 2
    space.unlock(keys)
    space.unlock(keys[:3])
    assert leases(daemon) == 1
    space.unlock(keys)
    space.unlock(keys)  # more often than locked
    assert leases(daemon) == 0
    assert read(space, keys) == [0, 1, 2, 3]
    assert leases(daemon) == 0


def test_spaces_do_not_see_each_other(store: KeyedStore, space: Space) -> None:
    put(store, space, keys_of(2))
    others = [store.space(layout_of(1)), store.space(layout_of(), salt="alice")]
    assert [other.lookup(keys_of(2)) for other in others] == [0, 0]
    assert store.space(layout_of()) is space
    put(store, others[1], keys_of(2))
    put(store, others[1], keys_of(3))
    found = {(key, salt) for info in store.models() for key, salt, _ in store.blocks(info)}
    assert found == {(key, "") for key in keys_of(2)} | {(key, "alice") for key in keys_of(3)}


def test_an_order_that_was_seen_is_a_chain_and_any_other_block_a_beginning(
    daemon: Daemon, store: KeyedStore, space: Space
) -> None:
    keys, rest = keys_of(3), keys_of(2, 1)
    put(store, space, keys)
    store.places.learn(rest, TOKENS, keys)
    assert STORED.issuperset(space.put(rest, payloads_of(rest)))
    loose = keys_of(1, 7)
    assert STORED.issuperset(space.put(loose, payloads_of(loose)))
    with daemon.client() as client:
        (info,) = client.models()
        sessions = sorted((each.blocks, each.tokens) for each in iterate_sessions(client, info.id))
    assert sessions == [(1, TOKENS), (5, 5 * TOKENS)]
    assert space.lookup(loose) == 1


def test_places_keep_what_was_shown_and_guess_the_rest() -> None:
    places = Places()
    a, b, c, d = keys_of(4)
    places.follow([c, d], 10)
    assert (places.of(d).parent, places.of(d).end_position) == (c, 0)
    places.learn([a, b], 10)
    places.follow([b, c, d], 10)
    assert (places.of(c).parent, places.of(c).end_position) == (b, 30)
    assert places.of(d).parent == c
    places.learn([d], 10, [a, b, c])
    assert places.of(d).end_position == 40


def test_a_dead_daemon_is_misses_and_failures(daemon: Daemon, store: KeyedStore) -> None:
    space = store.space(layout_of())
    put(store, space, keys_of(2))
    daemon.kill()
    assert space.lookup(keys_of(2)) == 0
    assert space.lock(keys_of(2)) == []
    assert read(space, keys_of(2)) == []
    assert space.held(keys_of(2)) == -1
    assert space.match(keys_of(2)) is None
    assert STORED.isdisjoint(space.put(keys_of(2), payloads_of(keys_of(2))))
    space.remove(keys_of(2))
    space.touch(keys_of(2))
    assert any(store.statistics().values())
    daemon.start()
    while space.lookup(keys_of(2)) != 2:
        pass


def test_a_new_epoch_hides_all_until_it_is_stored_again(
    daemon: Daemon, store: KeyedStore, space: Space
) -> None:
    put(store, space, keys_of(2))
    assert space.renew()
    assert space.lookup(keys_of(2)) == 0
    put(store, space, keys_of(2))
    assert space.lookup(keys_of(2)) == 2


def test_nonsense_is_not_stored_and_does_not_raise(space: Space) -> None:
    key = keys_of(1)
    assert STORED.isdisjoint(space.put(key, [np.zeros(5, np.uint8)]))
    assert STORED.isdisjoint(space.put([b"x" * 99], payloads_of(key)))
    assert space.lookup([b""]) == 0
    assert space.lock([b"x" * 99]) == []


def test_weights_are_told_by_their_files_or_by_what_is_given(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    name = str(tmp_path)
    gone = str(tmp_path / "gone")
    revisions = Revisions({"hub/m": "commit", "elsewhere": name, "not/there": gone})
    assert revisions.of("elsewhere") == revisions.of(name) == Revisions({}).last(name)
    assert revisions.of("hub/m") == "commit"
    for nothing_tells in ("hub/other", "not/there"):  # a path is no revision
        with pytest.raises(InvalidInput, match="which weights"):
            revisions.of(nothing_tells)


def test_weights_that_change_are_told_no_more_until_a_restart(tmp_path: Path) -> None:
    weights = tmp_path / "model.bin"
    weights.write_bytes(b"weights")
    name = str(tmp_path)
    revisions = Revisions({"elsewhere": name})
    first = revisions.of(name)
    (tmp_path / "README").write_bytes(b"no weights")
    assert revisions.of(name) == first
    weights.unlink()
    with pytest.raises(InvalidInput, match="no weights"):
        revisions.of(name)
    weights.write_bytes(b"other weights")
    for model in (name, "elsewhere"):
        with pytest.raises(WeightsChanged, match="restarted"):
            revisions.of(model)
    assert revisions.last(name) == first  # for what was found before
    weights.write_bytes(b"weights")  # an engine may have been started in between
    with pytest.raises(WeightsChanged):
        revisions.of(name)
    assert Revisions({}).of(name) == first


def test_weights_of_the_same_size_and_time_are_told_apart(tmp_path: Path) -> None:
    weights = tmp_path / "model.bin"
    weights.write_bytes(b"weights")
    os.utime(weights, (0, 0))
    revisions = Revisions({})
    revisions.of(str(tmp_path))
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, (0, 0))
    with pytest.raises(WeightsChanged):
        revisions.of(str(tmp_path))


def test_weights_whose_directory_goes_are_not_told_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.mkdir()
    (path / "model.bin").write_bytes(b"weights")
    revisions = Revisions({"hub/m": str(path)})
    revisions.of("hub/m")
    path.rename(tmp_path / "old")
    with pytest.raises(FileNotFoundError):
        revisions.of("hub/m")

"""Guaranteed: over the socket a Store answers as it does in-process, and a dead daemon is a miss.

A real daemon process serves; leases, errors and listings arrive as what they are over there.
"""

import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import trio

from support.daemon import PATIENT_S, Daemon, running_daemon
from twfs.client import Client, connect
from twfs.daemon.server import PATH_BYTES_MAX, serve
from twfs.datapath.match import Match
from twfs.devices.arena import HUGETLB, SMALL, TRANSPARENT
from twfs.devices.formatting import DeviceSpec
from twfs.errors import (
    InvalidInput,
    LayoutMismatch,
    LeaseEnded,
    NoDaemon,
    NoSuchBlock,
    NoSuchModel,
    NotAllowed,
    ProtocolError,
    StaleEpoch,
    TooLarge,
    WarehouseBusy,
    WarehouseFull,
)
from twfs.layout import Arrangement, Group, Layout
from twfs.prefix import Names, OwnKey, names_of_keys
from twfs.protocol.link import RemotePut
from twfs.records import BlockKey
from twfs.store import (
    Model,
    PutOutcome,
    ReadOutcome,
    Retention,
    iterate_heads,
    iterate_sessions,
)
from twfs.units import ByteCount, Millis, PrefixHash
from twfs.warehouse import Warehouse

Payload = npt.NDArray[np.uint8]
LAYOUT = Layout("m", (Group(2, 2, 8),), 16)
WIDE = Layout("m", (Group(1, arrangement=Arrangement.OPAQUE, layer_bytes=2_500_000),), 16)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon") / "w") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as connected:
        yield connected


@pytest.fixture
def model(client: Client, request: pytest.FixtureRequest) -> Model:
    name = "".join(c for c in request.node.name if c.isalnum())[:100]
    return client.open_model(name, LAYOUT)


def payloads_of(model: Model, count: int, seed: int = 0) -> list[Payload]:
    random_bytes = np.random.default_rng(seed)
    size = model.layout.block_bytes()
    return [random_bytes.integers(0, 256, size, dtype=np.uint8) for _ in range(count)]


def names_of(model: Model, count: int, first: int = 0) -> Names:
    return model.chain().extend(list(range(first, first + 16 * count))).names()


def read_all(match: Match, count: int) -> list[Payload]:
    size = match.model.layout.block_bytes()
    destinations = [np.zeros(size, np.uint8) for _ in range(count)]
    report = match.read_into(destinations)
    assert report.outcomes == (ReadOutcome.HIT,) * count
    return destinations


def same(one: list[Payload], other: list[Payload]) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


def test_what_one_client_puts_another_reads_byte_for_byte(
    daemon: Daemon, client: Client, model: Model
) -> None:
    names, payloads = names_of(model, 300), payloads_of(model, 300)
    assert client.put(model, names, payloads).outcomes == (PutOutcome.PUBLISHED,) * 300
    with daemon.client(arena_bytes=0) as other:
        opened = other.open_model(model.name)
        assert opened == model
        assert other.lookup(opened, names) == 300
        with other.match(opened, names) as match:
            assert match.blocks == 300
            assert same(read_all(match, 300), payloads)


def test_a_second_put_of_the_same_names_copies_nothing(client: Client, model: Model) -> None:
    names, payloads = names_of(model, 5), payloads_of(model, 5)
    client.put(model, names.head(3), payloads[:3])
    result = client.put(model, names, payloads)
    assert result.outcomes == (PutOutcome.PRESENT,) * 3 + (PutOutcome.PUBLISHED,) * 2
    assert client.put(model, names, payloads).written_bytes == 0
    assert client.put(model, names.head(0), []).outcomes == ()


def test_own_keys_match_from_a_start_position(client: Client, model: Model) -> None:
    keys = [OwnKey(bytes([i]) * 32, None, 16 * (i + 1)) for i in range(6)]
    names, payloads = names_of_keys(model.root(), keys), payloads_of(model, 6)
    client.put(model, names, payloads)
    with client.match(model, names, start=2) as match:
        assert (match.start, match.blocks, match.tokens) == (2, 6, 96)
        assert same(read_all(match, 4), payloads[2:])
    assert client.match(model, names, start=6).blocks == 6
    with pytest.raises(InvalidInput):
        client.match(model, names, start=-1)


def test_a_lease_that_another_client_joined_outlives_its_first_holder(
    daemon: Daemon, client: Client, model: Model
) -> None:
    names, payloads = names_of(model, 4), payloads_of(model, 4)
    client.put(model, names, payloads)
    first = daemon.client()
    match = first.match(first.open_model(model.name), names)
    with daemon.client() as second:
        joined = second.join(match.token)
        first.close()
        assert not match.held
        while second.statistics()["server"]["clients"] > 2:  # this one, and the fixture's
            time.sleep(0.005)
        assert joined.held
        assert (joined.model, joined.names.hashes) == (model, names.hashes)
        assert same(read_all(joined, 4), payloads)
        assert joined.renew()
        joined.release()
        assert not joined.held
        with pytest.raises(LeaseEnded):
            second.join(match.token)


def test_matches_of_one_client_on_one_lease_end_with_the_last(client: Client, model: Model) -> None:
    names = names_of(model, 2)
    client.put(model, names, payloads_of(model, 2))
    match = client.match(model, names)
    again = client.join(match.token)
    match.release()
    assert again.held
    again.release()
    assert client.statistics()["client"]["leases"] == 0
    assert not client.held(match.token)


def test_a_lease_is_over_at_its_deadline(scratch: Path) -> None:
    with running_daemon(scratch / "w", lease_ms=50) as daemon, daemon.client() as client:
        model = client.open_model("m", LAYOUT)
        names = names_of(model, 1)
        client.put(model, names, payloads_of(model, 1))
        match = client.match(model, names)
        while match.held:
            time.sleep(0.005)
        report = match.read_into([np.zeros(model.layout.block_bytes(), np.uint8)])
        assert report.outcomes == (ReadOutcome.LEASE_ENDED,)
        assert not match.renew()
        while not client.match(model, names).held:  # a busy machine may take longer than it lasts
            time.sleep(0.005)


def test_errors_of_the_daemon_arrive_as_their_class(client: Client, model: Model) -> None:
    with pytest.raises(LayoutMismatch, match="block_tokens"):
        client.open_model(model.name, Layout("m", (Group(2, 2, 8),), 32))
    with pytest.raises(NoSuchModel):
        client.open_model("nothing-of-that-name")
    with pytest.raises(InvalidInput):
        client.open_model("../etc", LAYOUT)
    with pytest.raises(NoSuchBlock):
        client.chain_of(model.id, PrefixHash(b"x" * 16))
    with pytest.raises(LeaseEnded):
        client.join(b"no token")


def test_callers_mistakes_in_a_put_are_raised_before_anything_is_sent(
    daemon: Daemon, client: Client, model: Model
) -> None:
    names, payloads = names_of(model, 2), payloads_of(model, 2)
    for bad in (payloads[:1], [payloads[0], payloads[1][:-1]]):
        with pytest.raises(InvalidInput):
            client.put(model, names, bad)
    with pytest.raises(InvalidInput):
        client.put(model, names, payloads, group=1)
    with pytest.raises(InvalidInput):
        client.put(model, names, payloads, shard=1)
    with daemon.client(arena_bytes=0) as reader, pytest.raises(InvalidInput, match="arena_bytes"):
        reader.put(model, names, payloads)
    with daemon.client(arena_bytes=4096) as small:
        wide = small.open_model("a-wide-one", WIDE)
        with pytest.raises(TooLarge, match="arena_bytes"):
            small.put(wide, names_of(wide, 1), payloads_of(wide, 1))
        assert small.space().reserved_bytes == 0


def test_a_new_epoch_makes_the_old_one_a_miss_and_its_puts_refused(
    client: Client, model: Model
) -> None:
    names, payloads = names_of(model, 2), payloads_of(model, 2)
    client.put(model, names, payloads)
    newer = client.new_epoch(model)
    assert newer.epoch == model.epoch + 1
    assert client.match(model, names).blocks == 0
    assert client.lookup(model, names) == 0
    client.touch(model, names)
    with pytest.raises(StaleEpoch):
        client.put(model, names, payloads)
    assert client.put(newer, names_of(newer, 2), payloads).held == 2


def test_a_put_that_a_new_epoch_overtakes_is_refused_once_and_breaks_no_rule(
    client: Client, model: Model
) -> None:
    before = client.statistics()["server"]["errors"]
    link = client._connector.link()
    port = RemotePut(
        link, client._executor(), model.id, names_of(model, 1),
        group=0, shard=0, retention=Retention.STANDARD,
    )  # fmt: skip
    client.new_epoch(model)
    with pytest.raises(StaleEpoch):
        port.publish()
    port.abandon()
    after = client.statistics()["server"]["errors"]
    assert {name: after[name] - before.get(name, 0) for name in after if after[name]} == {
        **dict.fromkeys(before, 0), "StaleEpoch": 1,
    }  # fmt: skip
    assert client.space().reserved_bytes == 0


def test_a_full_warehouse_is_said_so(scratch: Path) -> None:
    with (
        running_daemon(scratch / "w", device_bytes=16 << 20) as daemon,
        daemon.client() as client,
    ):
        model = client.open_model("m", WIDE)
        names, payloads = names_of(model, 9), payloads_of(model, 9)
        result = client.put(model, names, payloads)
        assert result.held == 6
        assert set(result.outcomes[6:]) == {PutOutcome.NO_ROOM}
        with daemon.client() as other:  # one client alone may not lease it all
            first = client.match(model, names.head(3))
            second = other.match(model, names.head(6), start=3)
            assert (first.blocks, second.blocks) == (3, 6)
            with pytest.raises(WarehouseFull):
                client.put(model, names_of(model, 1, 999), payloads[:1])


def test_tools_see_over_the_socket_what_the_warehouse_sees(scratch: Path) -> None:
    with running_daemon(scratch / "w") as daemon:
        with daemon.client() as client:
            for name in ("b", "a"):
                model = client.open_model(name, LAYOUT)
                for first in (0, 500):
                    names = names_of(model, 7, first)
                    client.put(model, names, payloads_of(model, 7, first))
                client.put(model, names_of(model, 3, 900).slice(1, 3), payloads_of(model, 2))
            wide = client.open_model("wide", WIDE)
            client.put(wide, names_of(wide, 2), payloads_of(wide, 2))
            seen = _names(client), *_all_of(client)
            daemon.stop()
        with Warehouse.open(daemon.directory) as warehouse:
            for ours, theirs in zip(seen, (_names(warehouse), *_all_of(warehouse)), strict=True):
                assert ours == theirs
        daemon.start()


def _names(store: Client | Warehouse) -> list[object]:
    return [info.name for info in store.models()]


def _all_of(store: Client | Warehouse) -> tuple[list[object], ...]:
    """All that a store lists; uses are left out, for to read is to use."""
    found: list[object] = []
    payloads: list[object] = []
    for info in store.models():
        heads = list(iterate_heads(store, info.id))
        found += [
            info,
            store.heads(info.id, limit=1),
            heads,
            sorted(map(BlockKey.pack, store.detached(info.id))),
        ]
        found += [
            replace(session, last_use_ms=Millis(0)) for session in iterate_sessions(store, info.id)
        ]
        for head in heads:
            chain = store.chain_of(info.id, head)
            found += [replace(block, last_use_ms=Millis(0)) for block in chain]
            found.append(replace(store.block_info(chain[0].key), last_use_ms=Millis(0)))
            payloads += [bytes(store.read_block(block)) for block in chain]
    assert len(payloads) > 20
    return found, payloads, [store.space()]


def test_tools_change_over_the_socket_what_they_are_told_to(client: Client, model: Model) -> None:
    names, payloads = names_of(model, 4), payloads_of(model, 4)
    client.put(model, names, payloads)
    before = client.changes()
    head = names.hash_at(3)
    client.set_retention(model.id, head, Retention.PINNED)
    chain = client.chain_of(model.id, head)
    assert {info.block.retention for info in chain} == {Retention.PINNED.rank}
    explanation = client.explain(model.id, names_of(model, 2, 77))
    assert (explanation.hit_blocks, explanation.asked_blocks) == (0, 2)
    assert client.check(data=True).findings == ()
    assert client.remove(model.id, names.hash_at(2), below=True) > 0
    assert client.lookup(model, names) == 2
    assert client.remove(model.id, names.hash_at(1)) > 0
    assert client.changes() > before
    assert client.match(model, names).blocks == 0
    assert client.evict(ByteCount(4096)) >= 0


def test_a_report_of_a_good_block_changes_nothing(client: Client, model: Model) -> None:
    names = names_of(model, 1)
    client.put(model, names, payloads_of(model, 1))
    info = client.chain_of(model.id, names.hash_at(0))[0]
    client.report(info.key, info.block.generation, ReadOutcome.BAD_CHECKSUM)
    assert client.statistics()["server"]["requests"]["reportblock"] >= 1
    assert client.match(model, names).blocks == 1


def test_many_threads_share_one_client(client: Client, model: Model) -> None:
    payloads = payloads_of(model, 12)

    def session(number: int) -> int:
        names = names_of(model, 12, 1000 * number)
        for stop in range(1, 13):
            assert client.put(model, names.head(stop), payloads[:stop]).held == stop
            with client.match(model, names) as match:
                assert match.blocks == stop
                assert same(read_all(match, stop), payloads[:stop])
        return client.lookup(model, names)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(session, range(1, 9))) == [12] * 8
    figures = client.statistics()["client"]
    assert (figures["misses"], figures["leases"]) == ({}, 0)
    assert figures["arena"]["in_use_bytes"] == 0


def test_statistics_hold_the_warehouses_the_servers_and_the_clients_figures(
    client: Client, model: Model
) -> None:
    client.touch(model, names_of(model, 2))
    figures = client.statistics()
    assert figures["client"]["touches"] == 1
    assert figures["server"]["clients"] >= 1
    assert figures["server"]["requests"]["touchnames"] >= 1
    assert len(figures) > 2


# A daemon that is gone


def test_connecting_to_nobody_says_so(scratch: Path) -> None:
    with pytest.raises(NoDaemon) as caught:
        connect(scratch / "socket")
    assert caught.value.exit_code == 21
    (scratch / "file").touch()
    with pytest.raises(NoDaemon):
        connect(scratch / "file")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(b"", NoDaemon), (b"\4\0\0\0oops", ProtocolError), (b"\xff" * 64, ProtocolError)],
    ids=["end", "garbage", "oversized"],
)
def test_a_daemon_that_answers_with_garbage_is_refused(
    scratch: Path, answer: bytes, kind: type[Exception]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(scratch / "socket"))
        listener.listen()

        def answer_one() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1 << 16)
                sock.sendall(answer)

        thread = threading.Thread(target=answer_one)
        thread.start()
        with pytest.raises(kind):
            connect(scratch / "socket")
        thread.join()


def test_a_killed_daemon_is_a_miss_and_its_restart_a_hit_again(scratch: Path) -> None:
    with running_daemon(scratch / "w") as daemon, daemon.client() as client:
        model = client.open_model("m", LAYOUT)
        names, payloads = names_of(model, 4), payloads_of(model, 4)
        client.put(model, names, payloads)
        match = client.match(model, names)
        assert match.held
        daemon.kill()
        assert not match.held
        report = match.read_into([np.zeros(model.layout.block_bytes(), np.uint8)])
        assert report.outcomes == (ReadOutcome.LEASE_ENDED,)
        assert client.match(model, names).blocks == 0
        assert client.lookup(model, names) == 0
        client.touch(model, names)
        assert client.put(model, names, payloads).outcomes == (PutOutcome.FAILED,) * 4
        assert not match.renew()
        match.release()
        with pytest.raises(LeaseEnded):
            client.join(b"any token")
        with pytest.raises(NoDaemon):
            client.open_model("m", LAYOUT)
        misses = client.statistics()["client"]["misses"]
        assert misses == {"no daemon": 2, "put: no daemon": 1}
        daemon.start()
        again = _until_connected(client, model, names)
        assert same(read_all(again, 4), payloads)
        assert not match.held
        assert client.statistics()["client"]["reconnects"] == 1
        assert client.put(model, names_of(model, 5), payloads_of(model, 5)).held == 5


def _until_connected(client: Client, model: Model, names: Names) -> Match:
    while (match := client.match(model, names)).blocks == 0:
        time.sleep(0.01)
    return match


def test_reads_under_way_go_on_over_a_reconnect_and_descriptors_do_not_pile_up(
    scratch: Path,
) -> None:
    with running_daemon(scratch / "w") as daemon, daemon.client() as client:
        model = client.open_model("m", LAYOUT)
        names = names_of(model, 1)
        client.put(model, names, payloads_of(model, 1))
        counts = []
        for _ in range(3):
            daemon.restart()
            read_all(_until_connected(client, model, names), 1)
            counts.append(len(list(Path("/proc/self/fd").iterdir())))
        assert counts[0] == counts[1] == counts[2]


def test_a_stopped_daemon_is_a_miss_and_the_late_lease_is_given_back(scratch: Path) -> None:
    with running_daemon(scratch / "w") as daemon, daemon.client() as patient:
        model = patient.open_model("m", LAYOUT)
        names, payloads = names_of(model, 4), payloads_of(model, 4)
        patient.put(model, names, payloads)
        with connect(daemon.socket, arena_bytes=0) as hasty:
            os.kill(daemon.pid, signal.SIGSTOP)
            assert hasty.match(model, names).blocks == 0
            assert hasty.lookup(model, names) == 0
            os.kill(daemon.pid, signal.SIGCONT)
            assert hasty.statistics()["client"]["misses"] == {"timed out": 2}
            while hasty.statistics()["client"].get("late_leases") != 1:
                time.sleep(0.01)
            while patient.statistics()["leases"]["leases"]:
                time.sleep(0.01)
            assert hasty.statistics()["client"]["connected"]


def test_a_join_given_up_takes_no_lease_away_from_another_match(scratch: Path) -> None:
    with running_daemon(scratch / "w") as daemon, daemon.client() as patient:
        model = patient.open_model("m", LAYOUT)
        names = names_of(model, 4)
        patient.put(model, names, payloads_of(model, 4))
        with daemon.client(arena_bytes=0) as hasty:
            match = hasty.match(model, names)
            assert match.held
            hasty._match_timeout_s = 0.2
            os.kill(daemon.pid, signal.SIGSTOP)
            with pytest.raises(LeaseEnded, match="in time"):
                hasty.join(match.token)
            os.kill(daemon.pid, signal.SIGCONT)
            while hasty.statistics()["client"].get("late_leases") != 1:
                time.sleep(0.01)
            assert match.held
            assert patient.statistics()["leases"]["leases"] == 1
            match.release()
            while patient.statistics()["leases"]["leases"]:
                time.sleep(0.01)


def test_a_join_and_a_release_that_cross_leave_the_joined_match_its_lease(
    client: Client, model: Model
) -> None:
    names, payloads = names_of(model, 4), payloads_of(model, 4)
    client.put(model, names, payloads)
    match = client.match(model, names)
    take = client._match_of

    def take_late(*arguments: object, **named: object) -> Match:
        match.release()  # sent behind the join, and counted here before it
        return take(*arguments, **named)  # type: ignore[arg-type]

    client._match_of = take_late  # type: ignore[method-assign]
    with client.join(match.token) as joined:
        assert joined.held
        assert client.statistics()["leases"]["leases"] == 1
        assert same(read_all(joined, 4), payloads)
    del client._match_of
    assert client.statistics()["leases"]["leases"] == 0


def test_a_model_of_another_warehouse_on_the_same_socket_is_a_miss(scratch: Path) -> None:
    with running_daemon(scratch / "w") as daemon:
        client = daemon.client()
        model = client.open_model("m", LAYOUT)
        names, payloads = names_of(model, 2), payloads_of(model, 2)
        client.put(model, names, payloads)
        daemon.stop()
        with running_daemon(scratch / "other") as second:
            daemon.socket.symlink_to(second.socket)
            with second.client() as direct:
                direct.open_model("another", LAYOUT)
            while client.match(model, names).blocks or not _missed(client, "stale epoch"):
                time.sleep(0.01)
            with pytest.raises(StaleEpoch):
                client.put(model, names, payloads)
            opened = client.open_model("m", LAYOUT)
            assert client.put(opened, names_of(opened, 2), payloads).held == 2
            client.close()
        daemon.socket.unlink()
        daemon.start()


def _missed(client: Client, cause: str) -> int:
    count: int = client.statistics()["client"]["misses"].get(cause, 0)
    return count


def test_a_client_after_close_is_a_miss(daemon: Daemon) -> None:
    client = daemon.client()
    model = client.open_model("closed", LAYOUT)
    names = names_of(model, 1)
    client.close()
    client.close()
    assert client.match(model, names).blocks == 0
    assert client.put(model, names, payloads_of(model, 1)).outcomes == (PutOutcome.FAILED,)


def test_a_forked_child_may_not_use_its_parents_client(client: Client, model: Model) -> None:
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            client.match(model, names_of(model, 1))
        except InvalidInput:
            os.write(write_end, b"refused")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write_end)
    assert os.read(read_end, 100) == b"refused"
    os.close(read_end)
    assert client.match(model, names_of(model, 1)).blocks == 0


# The server's limits and its socket


def test_arenas_of_all_clients_together_are_bounded(scratch: Path) -> None:
    with running_daemon(scratch / "w", arena_bytes=16 << 20) as daemon:
        first = daemon.client(arena_bytes=10 << 20)
        with pytest.raises(TooLarge, match="arena_bytes"):
            daemon.client(arena_bytes=10 << 20)
        first.close()
        with daemon.client(arena_bytes=0) as other:
            while other.statistics()["server"]["arena_bytes"]:
                time.sleep(0.01)
        daemon.client(arena_bytes=16 << 20).close()


@pytest.fixture
def warehouse(scratch: Path) -> Iterator[Warehouse]:
    directory = scratch / "warehouse"
    Warehouse.create(directory, [DeviceSpec(directory / "device0.img", ByteCount(16 << 20))])
    with Warehouse.open(directory) as opened:
        yield opened


def test_a_second_daemon_leaves_the_first_ones_socket_alone(
    daemon: Daemon, client: Client, warehouse: Warehouse
) -> None:
    with pytest.raises(WarehouseBusy, match="answers"):
        trio.run(serve, warehouse, daemon.socket)
    client.space()


def test_a_socket_that_cannot_be_made_says_why(scratch: Path, warehouse: Warehouse) -> None:
    (scratch / "file").touch()
    with pytest.raises(InvalidInput, match="no socket"):
        trio.run(serve, warehouse, scratch / "file")
    with pytest.raises(InvalidInput, match=str(PATH_BYTES_MAX)):
        trio.run(serve, warehouse, scratch / ("x" * PATH_BYTES_MAX))
    with pytest.raises(NotAllowed):
        trio.run(serve, warehouse, scratch / "nowhere" / "socket")
    with pytest.raises(InvalidInput, match="no-such-group"):
        trio.run(partial(serve, warehouse, scratch / "s", group="no-such-group"))
    assert not (scratch / "s").exists()


async def test_the_socket_has_its_mode_and_goes_when_serving_is_cancelled(
    scratch: Path, warehouse: Warehouse
) -> None:
    path = scratch / "socket"
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, warehouse, path, mode=0o600, group="root"))
        assert stat.S_IMODE((await trio.Path(path).stat()).st_mode) == 0o600
        client = await trio.to_thread.run_sync(partial(connect, path))
        nursery.cancel_scope.cancel()
    assert not path.exists()
    assert not client.held(b"any")
    await trio.to_thread.run_sync(client.close)


def test_a_daemon_that_ends_cleanly_removes_its_socket_and_keeps_what_it_promised(
    scratch: Path,
) -> None:
    with running_daemon(scratch / "w") as daemon, daemon.client() as client:
        model = client.open_model("m", LAYOUT)
        payloads = payloads_of(model, 40)
        held: dict[int, int] = {}
        begun = threading.Event()

        def put_until_it_fails() -> None:
            for number in range(1, 10_000):
                result = client.put(model, names_of(model, 40, 1000 * number), payloads)
                begun.set()
                if not result.held:
                    return
                held[number] = result.held

        writer = threading.Thread(target=put_until_it_fails)
        writer.start()
        assert begun.wait(PATIENT_S)
        assert daemon.stop() == 0
        writer.join()
        assert not daemon.socket.exists()
        daemon.start()
        with daemon.client() as other:
            for number, blocks in held.items():
                assert other.lookup(model, names_of(model, 40, 1000 * number)) >= blocks


def test_status_says_which_pages_arenas_have(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "w") as daemon:
        client = daemon.client()
        try:
            made = client.statistics()["server"]["arenas_made"]
        finally:
            client.close()
    assert sum(made.values()) == 1
    assert set(made) <= {HUGETLB, TRANSPARENT, SMALL}


def test_status_says_which_reader_served_the_engines(client: Client, model: Model) -> None:
    def served() -> dict[str, int]:
        figures = client.statistics()["served"].get("host", {"blocks": 0, "payload_bytes": 0})
        return {name: figures[name] for name in ("blocks", "payload_bytes")}

    names, size = names_of(model, 4), model.layout.block_bytes()
    client.put(model, names, payloads_of(model, 4))
    before = served()
    with client.match(model, names) as match:
        read_all(match, 4)
        read_all(match, 4)
    assert served() == {
        "blocks": before["blocks"] + 8,
        "payload_bytes": before["payload_bytes"] + 8 * size,
    }

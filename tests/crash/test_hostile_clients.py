"""Guaranteed: whatever one client sends, leaves out or dies of, the daemon and others go on.

Every test ends with another client at work, nothing reserved, leased or left open on account of
the hostile one, and a warehouse that holds all invariants.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.mutating import mutated_packed
from fuzz.wire import request_seeds
from support.daemon import PATIENT_S, REPOSITORY, Daemon, running_daemon
from twfs.checksums import checksums_of
from twfs.client import Client
from twfs.daemon.shared import CLIENTS_MAX
from twfs.errors import InvalidInput, ProtocolError, TooLarge
from twfs.layout import Group, Layout
from twfs.protocol.codec import (
    FrameBuffer,
    decode_reply,
    encode,
    error_of,
    layout_to_json,
    model_of,
    names_to_wire,
    unpack_numbers,
)
from twfs.protocol.messages import (
    AbandonPut,
    AnyReply,
    AskChanges,
    BeginPut,
    Counted,
    Done,
    Failed,
    Hello,
    JoinLease,
    ListChain,
    LookupNames,
    Opened,
    OpenModel,
    PublishPut,
    PutBegun,
    PutDone,
    ReleaseLease,
    RenewLease,
    Request,
    Welcome,
    WriteBlocks,
)
from twfs.protocol.wire import PROTOCOL_VERSION, REQUEST_BYTES_MAX, WireArenaBlock
from twfs.store import Model, PutOutcome, Retention
from twfs.units import ALIGN

LAYOUT = Layout("m", (Group(2, 2, 8),), 16)
ARENA_BYTES = 64 * ALIGN
SPOILT_TURNS = 60


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running_daemon(tmp_path_factory.mktemp("hostile") / "w") as running:
        yield running


@pytest.fixture
def daemon(served: Daemon) -> Iterator[Daemon]:
    """The daemon; afterwards it must hold nothing on account of the test, and serve another."""
    with served.client() as client:
        client.open_model("warm-up", LAYOUT)
        _until_alone(client)
        before = served.descriptors()
    yield served
    with served.client() as client:
        _until_alone(client)
        assert client.space().reserved_bytes == 0
        assert served.descriptors() == before
        model = client.open_model("another", LAYOUT)
        names = model.chain().extend(list(range(64))).names()
        assert client.put(model, names, [bytes(model.layout.block_bytes())] * 4).held == 4
        assert client.match(model, names).blocks == 4


def _until_alone(client: Client) -> None:
    """Wait until the daemon has let go of every other client."""
    while True:
        figures = client.statistics()
        if figures["server"]["clients"] == 1 and figures["leases"]["lease_owners"] <= 2:
            return
        time.sleep(0.005)


class Peer:
    """A client made of bytes, which may do everything wrong."""

    def __init__(self, daemon: Daemon, *, hello: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENT_S)
        self.sock.connect(str(daemon.socket))
        self.frames = FrameBuffer(16 << 20)
        self.arena = -1
        if hello:
            self.sock.sendall(encode(Hello(1, PROTOCOL_VERSION, ARENA_BYTES)))
            data, descriptors, _, _ = socket.recv_fds(self.sock, 1 << 16, 253)
            self.frames.feed(data)
            assert isinstance(self.receive(), Welcome)
            *devices, self.arena = descriptors
            for descriptor in devices:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        if self.arena >= 0:
            os.close(self.arena)

    def receive(self) -> AnyReply | None:
        """The next reply; None at the end of the connection."""
        while (body := self.frames.next_body()) is None:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.frames.feed(data)
        return decode_reply(body)

    def ask(self, request: Request) -> AnyReply | None:
        self.sock.sendall(encode(request))
        return self.receive()

    def is_refused(self) -> bool:
        """Tell whether one error came, and then the end of the connection."""
        reply = self.receive()
        refused = isinstance(reply, Failed) and type(error_of(reply)) is ProtocolError
        return refused and self.receive() is None

    def model(self) -> Model:
        opened = self.ask(OpenModel(2, "hostile", layout_to_json(LAYOUT)))
        assert isinstance(opened, Opened)
        return model_of(opened.model)

    def begin(self, first: int, blocks: int = 4) -> tuple[int, list[int]]:
        """Begin a put of names that nobody has put; return its number and what it lacks."""
        model = self.model()
        names = model.chain().extend(list(range(first, first + 16 * blocks))).names()
        request = BeginPut(3, model.id, names_to_wire(names), 0, 0, Retention.STANDARD)
        begun = self.ask(request)
        assert isinstance(begun, PutBegun)
        return begun.put, unpack_numbers(begun.lacking)


def frame_of(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def raw(**fields: object) -> bytes:
    return frame_of(msgspec.msgpack.encode(fields))


def good_block(index: int, offset: int = 0) -> WireArenaBlock:
    payload = bytes(LAYOUT.block_bytes())
    sums = checksums_of(payload)
    return WireArenaBlock(
        index, offset, len(payload), sums.xxh3, sums.lane_plain, sums.lane_weighted
    )


@pytest.mark.parametrize(
    "data",
    [
        frame_of(b"garbage"),
        b"GET / HTTP/1.1\r\n\r\n" * 10,
        bytes(4),
        (1 << 17).to_bytes(4, "little"),
        b"\xff" * 4,
        raw(t="hello", id=1, version=PROTOCOL_VERSION + 1),
        raw(t="hello", id=1, version="1"),
        raw(t="hello", id=1, version=1, arena_bytes=-1),
        raw(t="matchnames", id=1, model=1, names=[b"", b"", b"", b""]),
        raw(t="nothing", id=1),
    ],
    ids=[
        "garbage", "http", "empty frame", "large frame", "huge frame", "version", "version text",
        "negative arena", "no hello", "unknown kind",
    ],
)  # fmt: skip
def test_a_bad_hello_is_answered_once_and_the_connection_closed(
    daemon: Daemon, data: bytes
) -> None:
    with Peer(daemon, hello=False) as peer:
        peer.sock.sendall(data)
        assert peer.is_refused()


def test_an_arena_larger_than_the_daemon_has_is_refused(daemon: Daemon) -> None:
    with Peer(daemon, hello=False) as peer:
        peer.sock.sendall(encode(Hello(1, PROTOCOL_VERSION, 2**63)))
        reply = peer.receive()
        assert isinstance(reply, Failed)
        assert type(error_of(reply)) is TooLarge
        assert peer.receive() is None


@pytest.mark.parametrize(
    "data",
    [
        frame_of(b"garbage"),
        (REQUEST_BYTES_MAX + 1).to_bytes(4, "little"),
        bytes(4),
        raw(t="lookupnames", id=1, model=1, names=[b"x", b"", b"", b""]),
        raw(t="writeblocks", id=1, put=1, blocks=[]),
        raw(t="listheads", id=1, model=1, limit=0),
        raw(t="failed", id=0, kind="NoDaemon", text=""),
    ],
    ids=["garbage", "oversized", "empty", "names", "no blocks", "limit", "a reply"],
)
def test_a_bad_request_is_answered_once_and_the_connection_closed(
    daemon: Daemon, data: bytes
) -> None:
    with Peer(daemon) as peer:
        peer.sock.sendall(data)
        assert peer.is_refused()


@settings(max_examples=30)
@given(st.binary(min_size=1, max_size=2000))
def test_random_bytes_after_the_hello_harm_nobody(served: Daemon, data: bytes) -> None:
    with Peer(served) as peer:
        peer.sock.sendall(data)
        peer.sock.shutdown(socket.SHUT_WR)
        while peer.receive() is not None:
            pass
    with served.client() as client:
        client.changes()


@pytest.mark.slow
def test_spoilt_messages_on_many_connections_meet_no_bug_and_stop_nobody(daemon: Daemon) -> None:
    """Messages that are good but for a field, in any order, between those of a client at work."""
    chance, seeds = random.Random(7), request_seeds()
    with daemon.client() as client:
        model = client.open_model("worker", LAYOUT)
        for turn in range(SPOILT_TURNS):
            peers = [Peer(daemon, hello=chance.random() < 0.9) for _ in range(8)]
            for peer in peers:
                bodies = [chance.choice(seeds) for _ in range(6)]
                frames = [frame_of(mutated_packed(chance, body) or b"x") for body in bodies]
                with suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
                    peer.sock.sendall(b"".join(frames))
            names = model.chain().extend(list(range(64 * turn, 64 * turn + 64))).names()
            assert client.put(model, names, [bytes(LAYOUT.block_bytes())] * 4).held == 4
            assert client.lookup(model, names) in {0, 4}  # a spoilt EvictBytes may be a good one
            for peer in peers:
                peer.sock.close()
                if peer.arena >= 0:
                    os.close(peer.arena)
        _until_alone(client)
        assert client.statistics()["server"]["errors"].get("unexpected", 0) == 0
        assert client.check(data=True).findings == ()


def test_half_a_hello_and_silence_is_closed_and_others_do_not_wait(daemon: Daemon) -> None:
    with Peer(daemon, hello=False) as silent, Peer(daemon, hello=False) as half:
        half.sock.sendall(encode(Hello(1, PROTOCOL_VERSION))[:7])
        with daemon.client() as client:
            client.space()
        assert silent.receive() is None
        half.receive()
        assert half.receive() is None


@pytest.mark.slow
def test_half_a_request_and_silence_is_refused(daemon: Daemon) -> None:
    with Peer(daemon) as peer:
        peer.sock.sendall(encode(AskChanges(1))[:7])
        assert peer.is_refused()


@pytest.mark.slow
def test_a_client_that_never_reads_is_dropped_and_others_do_not_wait(daemon: Daemon) -> None:
    with Peer(daemon) as peer, daemon.client() as client:
        names = peer.model().chain().extend(list(range(16))).names()
        lookup = encode(LookupNames(7, 1, names_to_wire(names)))
        peer.sock.setblocking(False)
        dropped = client.statistics()["server"]["clients_dropped"]
        while client.statistics()["server"]["clients_dropped"] == dropped:
            try:
                peer.sock.send(lookup * 100)
            except BlockingIOError:
                time.sleep(0.01)
            except (BrokenPipeError, ConnectionResetError):
                break
        while client.statistics()["server"]["clients_dropped"] == dropped:
            time.sleep(0.01)


def test_a_second_hello_is_refused_and_the_connection_goes_on(daemon: Daemon) -> None:
    with Peer(daemon) as peer:
        assert isinstance(peer.ask(Hello(5, PROTOCOL_VERSION)), Failed)
        assert isinstance(peer.ask(AskChanges(6)), Counted)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("outside", {"arena_offset": ARENA_BYTES}),
        ("far outside", {"arena_offset": 2**64 - ALIGN}),
        ("over the end", {"arena_offset": ARENA_BYTES - ALIGN, "payload_bytes": ALIGN + 1}),
        ("misaligned", {"arena_offset": 8}),
        ("not lacking", {"index": 4}),
        ("no such index", {"index": 2**32 - 1}),
        ("too short", {"payload_bytes": 1}),
        ("too long", {"payload_bytes": ALIGN}),
    ],
)
def test_a_block_that_is_not_one_of_the_puts_is_refused_and_not_written(
    daemon: Daemon, name: str, change: dict[str, int]
) -> None:
    with Peer(daemon) as peer:
        put, lacking = peer.begin(1000 * len(name))
        assert lacking == [0, 1, 2, 3]
        bad = msgspec.structs.replace(good_block(1), **change)
        reply = peer.ask(WriteBlocks(4, put, (good_block(0), bad)))
        assert isinstance(reply, Failed)
        assert isinstance(error_of(reply), ProtocolError | InvalidInput)
        done = peer.ask(PublishPut(5, put))
        assert isinstance(done, PutDone)
        assert set(done.outcomes) == {list(PutOutcome).index(PutOutcome.FAILED)}


def test_a_block_handed_over_twice_is_refused(daemon: Daemon) -> None:
    with Peer(daemon) as peer:
        put, _ = peer.begin(100_000)
        twice = WriteBlocks(4, put, (good_block(0), good_block(0, ALIGN)))
        assert isinstance(peer.ask(twice), Failed)
        assert isinstance(peer.ask(WriteBlocks(5, put, (good_block(0),))), Done)
        assert isinstance(peer.ask(WriteBlocks(6, put, (good_block(0),))), Failed)
        assert isinstance(peer.ask(AbandonPut(7, put)), Done)


def test_bytes_without_their_checksum_fail_and_take_what_hangs_below_along(
    daemon: Daemon,
) -> None:
    with Peer(daemon) as peer:
        put, _ = peer.begin(200_000)
        wrong = msgspec.structs.replace(good_block(1), xxh3=bytes(16))
        blocks = (good_block(0), wrong, good_block(2), good_block(3))
        assert isinstance(peer.ask(WriteBlocks(4, put, blocks)), Done)
        done = peer.ask(PublishPut(5, put))
        assert isinstance(done, PutDone)
        failed, published = map(list(PutOutcome).index, (PutOutcome.FAILED, PutOutcome.PUBLISHED))
        assert list(done.outcomes) == [published, failed, failed, failed]


def test_a_put_ends_once(daemon: Daemon) -> None:
    with Peer(daemon) as peer:
        put, _ = peer.begin(300_000)
        assert isinstance(peer.ask(PublishPut(4, put)), PutDone)
        for request in (
            PublishPut(5, put),
            AbandonPut(6, put),
            WriteBlocks(7, put, (good_block(0),)),
        ):
            assert isinstance(peer.ask(request), Failed)


def test_numbers_and_tokens_that_nobody_gave_out_are_errors_of_one_request(
    daemon: Daemon,
) -> None:
    with Peer(daemon) as peer:
        model = peer.model()
        names = names_to_wire(model.chain().extend(list(range(16))).names())
        for request in (
            PublishPut(4, 77), AbandonPut(4, 0), JoinLease(4, b"t"),
            ListChain(4, model.id, bytes(16)),
            BeginPut(4, 2**32 - 1, names, 0, 0, Retention.STANDARD),
            BeginPut(4, model.id, names, 9, 0, Retention.STANDARD),
            BeginPut(4, model.id, names, 0, 9, Retention.STANDARD),
            LookupNames(4, model.id, names, 2), OpenModel(4, "../x", layout_to_json(LAYOUT)),
            OpenModel(4, "x", b"not json"),
        ):  # fmt: skip
            reply = peer.ask(request)
            assert isinstance(reply, Failed), request
            assert reply.id == 4
        peer.sock.sendall(encode(ReleaseLease(0, b"t")))
        assert peer.ask(RenewLease(5, b"t")) == Counted(5, None)


def test_a_thousand_connections_leave_nothing_open(daemon: Daemon) -> None:
    for number in range(1000):
        with Peer(daemon, hello=number % 2 == 0):
            pass


def test_one_client_too_many_is_told_so_and_the_others_are_served(daemon: Daemon) -> None:
    with daemon.client() as client:
        peers: list[Peer] = []
        try:
            while client.statistics()["server"]["clients"] < CLIENTS_MAX:
                peers.append(Peer(daemon, hello=False))
            with Peer(daemon, hello=False) as refused:
                reply = refused.receive()
            assert isinstance(reply, Failed)
            assert type(error_of(reply)) is TooLarge
            client.space()
        finally:
            for peer in peers:
                peer.sock.close()
        _until_alone(client)


MID_PUT = """
import sys, time
from twfs.client import connect
from twfs.layout import Group, Layout
from twfs.protocol.link import RemotePut
from twfs.store import Retention
client = connect(sys.argv[1], connect_timeout_s=20, match_timeout_s=20)
model = client.open_model("killed", Layout("m", (Group(2, 2, 8),), 16))
client.put(model, model.chain().extend(list(range(64))).names(), [bytes(2048)] * 4)
match = client.match(model, model.chain().extend(list(range(64))).names())
assert match.blocks == 4
names = model.chain().extend(list(range(1000, 1640))).names()
put = RemotePut(client._connector.link(), client._executor(), model.id, names,
                group=0, shard=0, retention=Retention.STANDARD)
assert len(put.lacking) == 40
print("ready", flush=True)
time.sleep(1000)
"""


def test_a_client_killed_in_a_put_leaves_no_reservation_and_no_lease(daemon: Daemon) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MID_PUT, str(daemon.socket)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with daemon.client() as client:
        assert client.space().reserved_bytes > 0
        assert client.statistics()["leases"]["leased_bytes"] > 0
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        _until_alone(client)
        assert client.space().reserved_bytes == 0
        assert client.statistics()["leases"]["leased_bytes"] == 0


def leave_after(count: int) -> Callable[[Peer, int], None]:
    def leave(peer: Peer, put: int) -> None:
        for index in range(count):
            peer.sock.sendall(encode(WriteBlocks(4, put, (good_block(index, ALIGN * index),))))

    return leave


@pytest.mark.parametrize(
    "leave",
    [
        leave_after(0), leave_after(1), leave_after(4),
        lambda peer, put: peer.sock.sendall(encode(AbandonPut(4, put))),
        lambda peer, put: peer.sock.sendall(encode(PublishPut(4, put))),
        lambda peer, put: peer.sock.sendall(encode(PublishPut(4, put)) + b"garbage"),
    ],
    ids=["begun", "one write", "four writes", "abandon", "publish", "publish and garbage"],
)  # fmt: skip
def test_a_connection_that_ends_in_a_put_leaves_no_reservation(
    daemon: Daemon, leave: Callable[[Peer, int], None], request: pytest.FixtureRequest
) -> None:
    with Peer(daemon) as peer:
        put, _ = peer.begin(400_000 + 1000 * len(request.node.name))
        leave(peer, put)


def test_an_arena_cannot_be_shrunk_under_the_daemon(daemon: Daemon) -> None:
    with Peer(daemon) as peer:
        put, _ = peer.begin(500_000)
        with pytest.raises(PermissionError):
            os.ftruncate(peer.arena, 0)
        assert isinstance(peer.ask(WriteBlocks(4, put, (good_block(0),))), Done)


def test_a_daemon_without_descriptors_to_spare_goes_on(scratch: Path) -> None:
    with running_daemon(scratch / "w") as daemon, daemon.client() as client:
        few = str(len(daemon.descriptors()) + 4)
        subprocess.run(["prlimit", "--pid", str(daemon.pid), f"--nofile={few}:4096"], check=True)
        peers = [Peer(daemon, hello=False) for _ in range(8)]
        client.space()
        for peer in peers:
            peer.sock.close()
        subprocess.run(["prlimit", "--pid", str(daemon.pid), "--nofile=4096:4096"], check=True)
        daemon.client().close()

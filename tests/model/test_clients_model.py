"""Three clients of one daemon against a dict: what any of them published, all of them read.

Puts of different clients overlap, leases are joined, connections end and the daemon is killed, in
any order. A hit has the bytes that were published; a lease ends with its last connection and no
other; nothing that was published is missing unless it was removed or evicted. The checker ends it.
"""

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.daemon import Daemon, running_daemon
from support.modelling import MODEL_LAYOUTS, examples, fresh_payload, names_along, paths, which
from support.mounting import until
from twfs.client import Client
from twfs.datapath.match import Match
from twfs.datapath.upload import upload
from twfs.errors import LeaseEnded, NoSuchBlock, TwfsError
from twfs.prefix import Names
from twfs.protocol.link import Link, RemotePut
from twfs.records import BlockKey
from twfs.store import Model, PutOutcome, ReadOutcome, Retention
from twfs.units import ByteCount

CLIENTS = 3
HELD_MAX = 4
PUTS_MAX = 3
numbers = st.integers(0, 20)
handles = st.integers(0, CLIENTS - 1)


class Put:
    """A put that one client has begun, over the connection that it had then."""

    def __init__(self, client: Client, model: Model, names: Names, shard: int) -> None:
        self.link: Link = client._connector.link()
        self.port = RemotePut(
            self.link, client._executor(), model.id, names, group=0, shard=shard,
            retention=Retention.STANDARD,
        )  # fmt: skip
        self.model, self.names, self.shard = model, names, shard


class Held:
    """A match of one client, and what it must read as long as its connection stands."""

    def __init__(self, client: Client, match: Match, wanted: dict[tuple[int, int], bytes]) -> None:
        self.client, self.match, self.wanted = client, match, wanted


class ClientsMachine(RuleBasedStateMachine):
    """Drives three clients, and remembers what is published under each name."""

    daemon: ClassVar[Daemon]
    examples: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).examples += 1
        self.clients = [self.daemon.client(arena_bytes=1 << 20) for _ in range(CLIENTS)]
        self.models: dict[str, Model] = {}
        self.published: dict[BlockKey, bytes] = {}
        self.puts: list[Put] = []
        self.held: list[Held] = []
        self.written = 0
        self.known: list[tuple[str, list[int]]] = []  # paths that were put once

    @initialize()
    def open_models(self) -> None:
        for name, layout in MODEL_LAYOUTS.items():
            own = f"{name}-{self.examples}"
            found = [client.open_model(own, layout) for client in self.clients]
            assert found == found[:1] * CLIENTS
            self.models[name] = found[0]

    def keys(self, put: Put) -> list[BlockKey]:
        return [
            BlockKey(put.model.id, put.names.hash_at(index), 0, put.shard)
            for index in range(len(put.names))
        ]

    def end(self, put: Put) -> None:
        """Send all bytes of an open put, and publish it; a dead connection publishes nothing."""
        payloads = []
        for _ in range(len(put.names)):
            self.written += 1
            payloads.append(fresh_payload(put.model.layout, self.written))
        arena = put.link.arena
        assert arena is not None
        try:
            result = upload(put.port, arena, put.model.layout, 0, payloads)
        except TwfsError:
            assert not put.link.channel.alive()
            return
        for key, outcome, payload in zip(self.keys(put), result.outcomes, payloads, strict=True):
            if outcome is PutOutcome.PUBLISHED:
                assert key not in self.published
                self.published[key] = payload
            else:
                assert outcome is PutOutcome.PRESENT
                assert key in self.published or self.removed_under(put, key)

    def removed_under(self, put: Put, key: BlockKey) -> bool:
        """Whether the put was told that it need not bring *key*, which went since."""
        index = self.keys(put).index(key)
        return index not in put.port.lacking

    @rule(handle=handles, name=which, path=paths, cut=st.integers(0, 5))
    def put(self, handle: int, name: str, path: list[int], cut: int) -> None:
        model = self.models[name]
        self.known.append((name, path))
        names = names_along(model, path)
        names = names.slice(min(cut, len(path) - 1), len(path)) if cut < 2 else names
        for shard in range(model.layout.shards):
            self.end(Put(self.clients[handle], model, names, shard))

    @precondition(lambda self: len(self.puts) < PUTS_MAX)
    @rule(handle=handles, name=which, path=paths)
    def begin(self, handle: int, name: str, path: list[int]) -> None:
        model = self.models[name]
        self.puts.append(Put(self.clients[handle], model, names_along(model, path), 0))

    @precondition(lambda self: self.puts)
    @rule(number=numbers, well=st.booleans())
    def finish(self, number: int, well: bool) -> None:
        put = self.puts.pop(number % len(self.puts))
        if well:
            self.end(put)
        else:
            put.port.abandon()

    def stop_of(self, model: Model, names: Names) -> int:
        """Blocks that every match must have."""
        for index in range(len(names)):
            for shard in range(model.layout.shards):
                if BlockKey(model.id, names.hash_at(index), 0, shard) not in self.published:
                    return index
        return len(names)

    @precondition(lambda self: self.known)
    @rule(handle=handles, number=numbers, more=st.lists(st.integers(0, 1), max_size=2))
    def match(self, handle: int, number: int, more: list[int]) -> None:
        """The chain of a path that was put, or one that goes on behind it."""
        name, path = self.known[number % len(self.known)]
        model, client = self.models[name], self.clients[handle]
        names = names_along(model, path + more)
        stop = self.stop_of(model, names)
        assert {each.lookup(model, names) for each in self.clients} == {stop}
        match = client.match(model, names)
        assert match.blocks == stop
        wanted = {
            (shard, index): self.published[BlockKey(model.id, names.hash_at(index), 0, shard)]
            for shard in range(model.layout.shards)
            for index in range(stop)
        }
        held = Held(client, match, wanted)
        self.read(held)
        if stop and len(self.held) < HELD_MAX:
            self.held.append(held)
        else:
            match.release()

    def read(self, held: Held) -> None:
        for shard in {shard for shard, _ in held.wanted}:
            count = held.match.blocks
            into = [bytearray(len(held.wanted[shard, 0])) for _ in range(count)]
            assert held.match.read_into(into, shard=shard).outcomes == (ReadOutcome.HIT,) * count
            assert [bytes(got) for got in into] == [held.wanted[shard, i] for i in range(count)]

    @precondition(lambda self: self.held and len(self.held) < HELD_MAX)
    @rule(number=numbers, handle=handles)
    def join(self, number: int, handle: int) -> None:
        """Another client joins a lease; it then outlives the first one's."""
        held, client = self.held[number % len(self.held)], self.clients[handle]
        joined = client.join(held.match.token)
        self.held.append(Held(client, joined, held.wanted))

    @precondition(lambda self: self.held)
    @rule(number=numbers)
    def release(self, number: int) -> None:
        held = self.held.pop(number % len(self.held))
        token = held.match.token
        held.match.release()
        held.client.space()  # a release is one-way: the answer behind it says that it was taken
        if all(other.match.token != token for other in self.held):
            with pytest.raises(LeaseEnded):
                self.clients[0].join(token)

    def gone(self) -> None:
        """Forget what is not there any more; under a lease of ours all must be there."""
        for key in list(self.published):
            try:
                self.clients[0].block_info(key)
            except NoSuchBlock:
                del self.published[key]

    @precondition(lambda self: self.published)
    @rule(handle=handles, blocks=st.sampled_from([1, 3, 100]))
    def evict(self, handle: int, blocks: int) -> None:
        before = set(self.published)
        self.clients[handle].evict(ByteCount(blocks * 8192))
        self.gone()
        leased = {
            BlockKey(held.match.model.id, held.match.names.hash_at(index), 0, shard)
            for held in self.held
            for shard, index in held.wanted
        }
        assert leased & before <= set(self.published)

    @precondition(lambda self: self.published)
    @rule(handle=handles, name=which, number=numbers)
    def remove(self, handle: int, name: str, number: int) -> None:
        model, client = self.models[name], self.clients[handle]
        heads = client.heads(model.id)
        if heads:
            head = heads[number % len(heads)]
            client.remove(model.id, head)
            self.gone()
            assert BlockKey(model.id, head, 0, 0) not in self.published

    @precondition(lambda self: self.held or self.puts)
    @rule(handle=handles)
    def reconnect(self, handle: int) -> None:
        """A client leaves: its leases end, and its puts; a new one comes."""
        client = self.clients[handle]
        client.close()
        for held in [held for held in self.held if held.client is client]:
            assert not held.match.held
            self.held.remove(held)
        self.clients[handle] = client = self.daemon.client(arena_bytes=1 << 20)
        until(  # the leases end behind the puts, which are abandoned by a thread
            lambda: client.statistics()["server"]["clients"] == CLIENTS, "the old connection ends"
        )

    @precondition(lambda self: self.held or self.puts)
    @rule()
    def crash(self) -> None:
        """The daemon is killed: every lease is over, and all that was published is there."""
        self.daemon.restart()
        for held in self.held:
            assert not held.match.held
        self.held = []
        for client in self.clients:
            client.reconnect(20.0)
        before = dict(self.published)
        self.gone()
        assert self.published == before

    @invariant()
    def leased_blocks_read_as_before(self) -> None:
        for held in self.held:
            self.read(held)

    def teardown(self) -> None:
        try:
            for put in self.puts:
                put.port.abandon()
            for held in self.held:
                held.match.release()
            assert self.clients[0].check(data=True).findings == ()
            self.clients[0].evict(ByteCount(1 << 40))
        finally:
            for client in self.clients:
                client.close()


@pytest.mark.slow
def test_clients_of_one_daemon_agree_with_a_perfect_store(scratch: Path) -> None:
    with running_daemon(scratch / "w", device_bytes=16 << 20, lease_ms=600_000) as daemon:
        ClientsMachine.daemon = daemon
        run_state_machine_as_test(
            ClientsMachine, settings=settings(max_examples=examples(8), stateful_step_count=30)
        )

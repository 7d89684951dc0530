"""Classes of sessions against a plain reference: recounted block by block after every step.

Sessions with an id and without, that grow, fork, are touched, change class, are forgotten, evicted
and expire, on a clock that is given, and over restarts. What is pinned is never lost to eviction,
what is over goes, what is not over stays, and the sums by class are those of the blocks.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from support.modelling import names_along, paths
from support.warehouses import (
    MHA,
    assert_memory_agrees,
    make_warehouse,
    put,
    records_of,
    settle,
    stop_tending,
)
from twfs import Hint, Retention
from twfs.config import parse
from twfs.errors import NoSuchBlock, PromiseRefused
from twfs.eviction.evicting import freed_bytes, sweep_expired
from twfs.eviction.retaining import flush, keep_classes
from twfs.metadata import ledger, sessions
from twfs.records import BlockKey
from twfs.store import Model
from twfs.units import ByteCount, Millis
from twfs.warehouse import Warehouse

BLOCK = 8192
HOUR_MS = 3_600_000
CONFIG = b"""
[retention.ephemeral]
ttl = "2h"
[retention.durable]
ttl = "1d"
[retention.pinned]
share = 0.01
"""
TTL_MS = {0: 2 * HOUR_MS, 2: 24 * HOUR_MS}
ids = st.sampled_from(["", "", "a", "b", "c"])
classes = st.sampled_from(Retention)
maybe = st.none() | classes


class SessionsMachine(RuleBasedStateMachine):
    """Drives a warehouse; remembers of each id the class that it must have."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="twfs-model-"))
        self.now_ms = 10**12
        make_warehouse(self.directory)
        self.warehouse = self.open()
        self.wanted: dict[str, int] = {}  # of sessions with an id

    def open(self) -> Warehouse:
        warehouse = Warehouse.open(
            self.directory, clock=lambda: Millis(self.now_ms), config=parse(CONFIG)
        )
        stop_tending(warehouse)
        return warehouse

    @initialize()
    def open_model(self) -> None:
        self.model: Model = self.warehouse.open_model("m", MHA)

    def known(self) -> dict[str, int]:
        """The classes of the sessions with an id that are there."""
        with self.warehouse._core.metadata.read() as view:
            return {
                key.id.decode(): session.retention
                for key, session in sessions.every(view)
                if key.named
            }

    def attempt(self, call: Callable[[], object], session: str, retention: int | None) -> None:
        """Do *call*, which asks for a class; the reference follows unless it is refused."""
        before = self.known()
        try:
            call()
        except PromiseRefused:
            assert retention == 3 or before.get(session) == 3 or not session
            if session in before:  # what it has is pinned, where only the put did not fit
                assert self.known()[session] in {before[session], retention}
                self.wanted[session] = self.known()[session]
            return
        if session:
            was = self.wanted.get(session) if session in before else None
            self.wanted[session] = (
                retention if retention is not None else (1 if was is None else was)
            )

    @rule(path=paths, skipped=st.sampled_from([0, 0, 0, 1, 2]), session=ids, retention=maybe)
    def put_chain(
        self, path: list[int], skipped: int, session: str, retention: Retention | None
    ) -> None:
        """Of some chains the tail comes first."""
        names, hint = names_along(self.model, path), Hint(session, retention)
        names = names.slice(min(skipped, len(names) - 1), len(names))
        rank = None if retention is None else retention.rank
        self.attempt(lambda: put(self.warehouse, self.model, names, hint=hint), session, rank)

    @rule(path=paths, session=st.sampled_from("abc"))
    def touch(self, path: list[int], session: str) -> None:
        names = names_along(self.model, path)
        held = self.warehouse.lookup(self.model, names)
        self.warehouse.touch(self.model, names, Hint(session))
        flush(self.warehouse._core)
        if held:
            self.wanted.setdefault(session, 1)

    @rule(session=st.sampled_from("abc"), retention=classes)
    def retain(self, session: str, retention: Retention) -> None:
        there = session in self.known()

        def change() -> None:
            try:
                self.warehouse.retain(self.model.id, session, retention)
            except NoSuchBlock:
                assert not there

        if there:
            self.attempt(change, session, retention.rank)
        else:
            change()

    @rule(path=paths, retention=classes)
    def set_class(self, path: list[int], retention: Retention) -> None:
        """Of whatever ends there, or of nobody: a chain up to a block."""
        names = names_along(self.model, path)
        held = self.warehouse.lookup(self.model, names)
        if not held:
            return
        head = names.hash_at(held - 1)
        with self.warehouse._core.metadata.read() as view:
            at = [
                key.id.decode()
                for key in sessions.ending_at(view, self.model.id, head)
                if key.named
            ]
        try:
            self.warehouse.set_retention(self.model.id, head, retention)
        except PromiseRefused:
            assert retention is Retention.PINNED
        else:
            self.wanted.update(dict.fromkeys(at, retention.rank))

    @rule(session=st.sampled_from("abc"))
    def forget(self, session: str) -> None:
        before = set(records_of(self.warehouse._core))
        others = self.covered(without=session)
        self.warehouse.forget(self.model, session)
        settle(self.warehouse)
        assert session not in self.known()
        assert others & before <= set(records_of(self.warehouse._core))

    def covered(self, *, without: str) -> set[BlockKey]:
        """Blocks that a session with another id is over."""
        core = self.warehouse._core
        records = records_of(core)
        with core.metadata.read() as view:
            heads = [s.head for key, s in sessions.every(view) if key.id != without.encode()]
        return {key for head in heads for key in self.chain(records, head)}

    def chain(self, records: dict, head: bytes) -> list[BlockKey]:  # type: ignore[type-arg]
        """The blocks from *head* up to the first that is there."""
        found: list[BlockKey] = []
        key = BlockKey(self.model.id, head, 0, 0)  # type: ignore[arg-type]
        while key in records:
            found.append(key)
            if ledger.starts_chain(records[key], MHA):
                break
            key = key.at(records[key].parent)
        return found

    def pinned(self) -> set[BlockKey]:
        core = self.warehouse._core
        return {
            key
            for key, block in records_of(core).items()
            if core.slots.retention[block.slot] == Retention.PINNED.rank
        }

    @rule(blocks=st.integers(1, 40))
    def evict(self, blocks: int) -> None:
        pinned = self.pinned()
        self.warehouse.evict(ByteCount(blocks * BLOCK))
        settle(self.warehouse)
        assert pinned <= set(records_of(self.warehouse._core))

    @rule(hours=st.integers(1, 30))
    def wait_and_sweep(self, hours: int) -> None:
        core = self.warehouse._core
        self.now_ms += hours * HOUR_MS
        before, pinned = records_of(core), self.pinned()
        ends = {
            key: int(core.slots.stamp[block.slot])
            + TTL_MS.get(int(core.slots.retention[block.slot]), 1 << 60)
            for key, block in before.items()
        }
        while futures := sweep_expired(core):
            freed_bytes(futures)
            settle(self.warehouse)
        left = set(records_of(core))
        assert pinned <= left
        assert all(ends[key] <= self.now_ms for key in set(before) - left), "none too early"
        for key in left:
            if ends[key] <= self.now_ms:  # only where something is below it that stays
                assert core.slots.children[before[key].slot]

    @rule()
    def reopen(self) -> None:
        keep_classes(self.warehouse._core)
        self.warehouse.close()
        self.warehouse = self.open()

    @invariant()
    def all_is_as_a_slow_count_says(self) -> None:
        core = self.warehouse._core
        settle(self.warehouse)
        known = self.known()
        self.wanted = {name: rank for name, rank in self.wanted.items() if name in known}
        assert known == self.wanted
        records = records_of(core)
        best: dict[BlockKey, int] = {}
        with core.metadata.read() as view:
            ends = [(s.head, s.retention) for _, s in sessions.every(view)]
            said = {head for head, _ in ends}
            ends += [
                (head, 1)
                for model, head in view.all_heads()
                if model == self.model.id and head not in said
            ]
        for head, rank in ends:
            for key in self.chain(records, head):
                best[key] = max(best.get(key, 0), rank)
        sums = [0, 0, 0, 0]
        for key, block in records.items():
            meant = best.get(key, min(block.retention, 1))
            assert core.slots.retention[block.slot] == meant, key
            sums[meant] += block.device_bytes
        said_bytes = self.warehouse.statistics()["retention"]
        assert [said_bytes[each.value]["bytes"] for each in Retention] == sums
        assert sums[3] <= int(core.terms.shares[3] * core.allocator.total_bytes)
        assert core.promised_bytes == 0
        assert self.warehouse.check().findings == ()
        assert_memory_agrees(core)

    def teardown(self) -> None:
        self.warehouse.close()
        shutil.rmtree(self.directory, ignore_errors=True)


TestSessions = SessionsMachine.TestCase
TestSessions.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, derandomize=True
)

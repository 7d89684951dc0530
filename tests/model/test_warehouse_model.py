"""A warehouse against a dict: whatever is done to it, a hit has the bytes that were published.

Chains, branches, own keys, shards, holes, leases, open puts, epochs and reopening in any order.
After every step the checker finds nothing, and memory (links, heads, free space) is recounted.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from support.modelling import MODEL_LAYOUTS, fresh_payload, names_along, paths, which
from support.warehouses import (
    assert_memory_agrees,
    links_of,
    make_warehouse,
    own_names,
    records_of,
    settle,
    stop_tending,
)
from twfs.admin import moving
from twfs.checksums import checksums_of
from twfs.config import AdmissionSettings, Config, EvictionSettings
from twfs.datapath.match import Match
from twfs.datapath.putting import Put
from twfs.devices.payload import aligned_buffer
from twfs.errors import StaleEpoch
from twfs.eviction import evicting
from twfs.layout import Layout
from twfs.metadata import ledger
from twfs.prefix import Names
from twfs.records import Block, BlockKey
from twfs.store import ArenaBlock, Model, PutOutcome, ReadOutcome, Retention
from twfs.units import ByteCount, PrefixHash, align_up
from twfs.warehouse import Warehouse

LAYOUTS = MODEL_LAYOUTS
OPEN_MAX = 3  # puts and leases at once

some_shards = st.sampled_from([(0,), (1,), (0, 1)])
# Few keys and any parents: rings, branches, orphans and contradictions come by themselves.
own_keys = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.one_of(st.none(), st.sampled_from("abcd")),
        st.sampled_from([0, 0, 5, 9]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda key: key[0],
)


class OpenPut:
    """A put between its last byte and its end."""

    def __init__(self, put: Put, payloads: dict[int, bytes]) -> None:
        self.put = put
        self.payloads = payloads


class Held:
    """A match under lease, and the bytes that it must go on to have."""

    def __init__(self, match: Match, wanted: dict[tuple[int, int], bytes]) -> None:
        self.match = match
        self.wanted = wanted  # by shard and index


class WarehouseMachine(RuleBasedStateMachine):
    """Drives a warehouse, and remembers what was published under each name."""

    config = Config()

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="twfs-model-"))
        make_warehouse(self.directory)
        self.published: dict[BlockKey, bytes] = {}
        self.puts: list[OpenPut] = []
        self.leases: list[Held] = []
        self.models: dict[str, Model] = {}
        self.written = 0
        self.warehouse = self.open()

    def open(self) -> Warehouse:
        warehouse = Warehouse.open(self.directory, config=self.config)
        stop_tending(warehouse)
        return warehouse

    @initialize()
    def open_models(self) -> None:
        for name, layout in LAYOUTS.items():
            self.models[name] = self.warehouse.open_model(name, layout)

    def names(self, name: str, path: Sequence[int]) -> Names:
        """The chain along *path*."""
        return names_along(self.models[name], path)

    def records(self) -> dict[BlockKey, Block]:
        return records_of(self.warehouse._core)

    def fresh(self, layout: Layout) -> bytes:
        """A payload that was never there before."""
        self.written += 1
        return fresh_payload(layout, self.written)

    def begin(self, name: str, names: Names, shard: int) -> None:
        """Begin a put and hand over all bytes."""
        model = self.models[name]
        put = self.warehouse.begin_put(
            model.id, names, group=0, shard=shard, retention=Retention.STANDARD, owner=0
        )
        length = model.layout.block_bytes()
        step = align_up(length)
        arena = aligned_buffer(step * max(1, len(put.lacking)))
        payloads, blocks = {}, []
        for number, index in enumerate(put.lacking):
            payload = payloads[index] = self.fresh(model.layout)
            arena[number * step : number * step + length] = payload
            sums = checksums_of(payload)
            blocks.append(
                ArenaBlock(
                    index, number * step, length, sums.xxh3, sums.lane_plain, sums.lane_weighted
                )
            )
        put.write_blocks(arena, blocks)
        self.puts.append(OpenPut(put, payloads))

    def publish(self, which: int) -> None:
        opened = self.puts.pop(which)
        put, before = opened.put, self.records()
        if not self.warehouse._core.is_current(put._model.id):
            try:
                put.publish()
            except StaleEpoch:
                return
            raise AssertionError("published into an epoch that is over")
        result = put.publish()
        after = self.records()
        for index, outcome in enumerate(result.outcomes):
            key = put._key(index)
            if outcome is PutOutcome.PUBLISHED:
                assert key not in before or before[key].hole
                assert not after[key].hole
                self.published[key] = opened.payloads[index]
            elif outcome is PutOutcome.PRESENT:
                assert key in after or index not in opened.payloads  # removed under the put
            elif outcome is PutOutcome.FAILED:  # only own keys contradict each other
                assert put._names.keys
            elif outcome is PutOutcome.NOT_ADMITTED:
                assert self.config.admission.second_touch
                assert index not in opened.payloads
            else:
                raise AssertionError(outcome)
        assert set(before) <= set(after)

    @rule(
        name=which, path=paths, cut=st.integers(0, 5), shards=st.sampled_from([(0,), (1,), (0, 1)])
    )
    def put_chain(self, name: str, path: list[int], cut: int, shards: tuple[int, ...]) -> None:
        """Often without its beginning, as engines do that hold it themselves."""
        names = self.names(name, path)
        names = names.slice(min(cut, len(path) - 1), len(path)) if cut < 3 else names
        for shard in shards:
            if shard < LAYOUTS[name].shards:
                self.begin(name, names, shard)
                self.publish(-1)

    @rule(keys=own_keys, name=which)
    def put_own(self, keys: list[tuple[str, str | None, int]], name: str) -> None:
        for shard in range(LAYOUTS[name].shards):
            self.begin(name, own_names(self.models[name], *keys), shard)
            self.publish(-1)

    @precondition(lambda self: len(self.puts) < OPEN_MAX)
    @rule(name=which, path=paths)
    def begin_one(self, name: str, path: list[int]) -> None:
        self.begin(name, self.names(name, path), 0)

    @precondition(lambda self: self.puts)
    @rule(number=st.integers(0, OPEN_MAX), well=st.booleans())
    def end_one(self, number: int, well: bool) -> None:
        number %= len(self.puts)
        if well:
            self.publish(number)
        else:
            self.puts.pop(number).put.abandon()

    def stop_of(self, name: str, names: Names) -> int:
        """Blocks that a match must have, block by block."""
        records, model = self.records(), self.models[name]
        for index in range(len(names)):
            for shard in range(model.layout.shards):
                block = records.get(BlockKey(model.id, names.hash_at(index), 0, shard))
                digest = names.digests[32 * index : 32 * index + 32]
                if block is None or block.hole or block.digest != digest:
                    return index
        return len(names)

    @rule(name=which, path=paths, start=st.integers(0, 3), keep=st.booleans())
    def match(self, name: str, path: list[int], start: int, keep: bool) -> None:
        model, names = self.models[name], self.names(name, path)
        held = self.stop_of(name, names)
        assert self.warehouse.lookup(model, names) == held
        match = self.warehouse.match(model, names, start=min(start, len(names)))
        if start <= held:
            assert match.blocks == held
        wanted = {
            (shard, index): self.published[BlockKey(model.id, names.hash_at(index), 0, shard)]
            for shard in range(model.layout.shards)
            for index in range(match.start, match.blocks)
        }
        self.leases.append(Held(match, wanted))
        self.read(self.leases[-1])
        if not keep or len(self.leases) > OPEN_MAX:
            self.leases.pop(0 if keep else -1).match.release()

    def read(self, held: Held) -> None:
        """Every block under a lease reads as it did when it was matched."""
        for shard in {shard for shard, _ in held.wanted}:
            count = held.match.blocks - held.match.start
            into: list[npt.NDArray[Any]] = [
                np.zeros(len(held.wanted[shard, held.match.start]), np.uint8) for _ in range(count)
            ]
            report = held.match.read_into(into, shard=shard)
            assert report.outcomes == (ReadOutcome.HIT,) * count
            for index, got in enumerate(into, held.match.start):
                assert got.tobytes() == held.wanted[shard, index]

    @precondition(lambda self: self.leases)
    @rule(number=st.integers(0, OPEN_MAX))
    def release(self, number: int) -> None:
        self.leases.pop(number % len(self.leases)).match.release()

    @rule(blocks=st.integers(1, 6))
    def evict(self, blocks: int) -> None:
        before, core = self.records(), self.warehouse._core
        pinned = {key for key, block in before.items() if core.slots.leases[block.slot]}
        self.warehouse.evict(ByteCount(blocks * 8192))
        self.gone(before)
        assert pinned <= set(self.records())
        left = self.records()
        for key in left:  # no chain has lost its middle
            block = before[key]
            layout = core.models[key.model].layout
            parent = key.at(block.parent)
            if not ledger.starts_chain(block, layout) and parent in before:
                assert parent in left

    def gone(self, before: dict[BlockKey, Block]) -> None:
        """Forget what is not there any more; nothing else may have changed."""
        after = self.records()
        assert set(after) <= set(before)
        for key in set(before) - set(after):
            self.published.pop(key, None)

    @rule(name=which, number=st.integers(0, 20))
    def remove(self, name: str, number: int) -> None:
        model, core = self.models[name], self.warehouse._core
        heads = self.warehouse.heads(model.id)
        if not heads:
            return
        head = heads[number % len(heads)]
        links, before = links_of(core), self.records()
        infos = self.warehouse.chain_of(model.id, head)
        own = {info.key.prefix_hash for info in infos if info.links == 1}
        used = {key.prefix_hash for key, count in links.items() if key.model == model.id and count}
        self.warehouse.remove(model.id, head)
        self.gone(before)
        after = self.records()
        assert not any(key.prefix_hash in own and key.model == model.id for key in after)
        kept = {key for key in before if key.model != model.id or key.prefix_hash in used - own}
        assert kept <= set(after)

    @rule(number=st.integers(0, 50))
    def lose(self, number: int) -> None:
        """Bytes are lost: the block becomes a hole, and its record stays."""
        records = self.records()
        whole = sorted((key for key, block in records.items() if not block.hole), key=str)
        if whole:
            key = whole[number % len(whole)]
            core = self.warehouse._core
            assert evicting.spoil(core, key, records[key].generation)
            assert set(self.records()) == set(records)

    @rule(first=st.integers(0, 50), count=st.integers(1, 8), path=paths)
    def move(self, first: int, count: int, path: list[int]) -> None:
        """As a drain does, leased blocks first; a put behind it must not get the old places."""
        self.put_chain("plain", path, 5, (0,))
        self.match("plain", path, 0, keep=True)
        before, core = self.records(), self.warehouse._core
        whole = sorted(
            (key for key, block in before.items() if not block.hole),
            key=lambda key: (not core.slots.leases[before[key].slot], str(key)),
        )
        first = first if first > 25 else 0
        chosen = whole[first % len(whole) :][:count] if whole else []
        moved = moving.move(core, [(key, before[key]) for key in chosen])
        assert (moved.blocks, moved.lost) == (len(chosen), 0)
        after = self.records()
        assert set(after) == set(before)
        for key in chosen:
            assert after[key].generation > before[key].generation
            assert after[key].ino == before[key].ino
            assert not set(after[key].extents) & set(before[key].extents)
        settle(self.warehouse)
        for _ in range(count):  # one by one, so that each goes where it fits best
            self.begin("plain", self.names("plain", [2 + self.written]), 0)
            self.publish(-1)

    @rule(name=which, number=st.integers(0, 20), retention=st.sampled_from(Retention))
    def retain(self, name: str, number: int, retention: Retention) -> None:
        heads = self.warehouse.heads(self.models[name].id)
        if heads:
            head = heads[number % len(heads)]
            self.warehouse.set_retention(self.models[name].id, head, retention)

    @rule(name=which)
    def new_epoch(self, name: str) -> None:
        self.models[name] = self.warehouse.new_epoch(self.models[name])

    @rule()
    def sweep(self) -> None:
        core, before = self.warehouse._core, self.records()
        evicting.sweep_epochs(core)
        self.gone(before)
        current = {model.id for model in self.models.values()}
        for key, block in self.records().items():
            assert key.model in current or core.slots.leases[block.slot] or self.has_child(key)
        assert {key for key in before if key.model in current} <= set(self.records())

    def has_child(self, key: BlockKey) -> bool:
        with self.warehouse._core.metadata.read() as view:
            return bool(view.children(key))

    @rule()
    def reopen(self) -> None:
        before = self.records()
        for opened in self.puts:
            opened.put.abandon()
        self.warehouse.close()
        for held in self.leases:
            assert not held.match.held
        self.puts, self.leases = [], []
        self.warehouse = self.open()
        assert self.records() == before
        for name, model in self.models.items():
            assert self.warehouse.open_model(name) == model

    @rule(number=st.integers(0, 50))
    def read_one(self, number: int) -> None:
        """As the mount reads it."""
        keys = sorted((key for key, block in self.records().items() if not block.hole), key=str)
        if keys:
            key = keys[number % len(keys)]
            info = self.warehouse.block_info(key)
            assert bytes(self.warehouse.read_block(info)) == self.published[key]

    @invariant()
    def leased_blocks_read_as_before(self) -> None:
        for held in self.leases:
            self.read(held)

    @invariant()
    def all_is_sound(self) -> None:
        settle(self.warehouse)
        assert self.warehouse.check().findings == ()
        reserved = [block for opened in self.puts for block in opened.put._reserved.values()]
        assert_memory_agrees(self.warehouse._core, reserved)

    @invariant()
    def sessions_add_up(self) -> None:
        for model in self.models.values():
            taken: dict[tuple[PrefixHash, int], tuple[int, int]] = {}
            sessions = self.warehouse.sessions(model.id)
            for session in sessions:
                for info in self.warehouse.chain_of(model.id, session.head):
                    place = (info.key.prefix_hash, info.key.shard)
                    taken[place] = (info.block.device_bytes, info.links)
            own = sum(size for size, links in taken.values() if links == 1)
            assert sum(session.own_bytes for session in sessions) == own

    def teardown(self) -> None:
        try:
            for opened in self.puts:
                opened.put.abandon()
            for held in self.leases:
                held.match.release()
            settle(self.warehouse)
            assert self.warehouse.check(data=True).findings == ()
            assert_memory_agrees(self.warehouse._core)
        finally:
            self.warehouse.close()
            shutil.rmtree(self.directory)


class OtherSettings(WarehouseMachine):
    """The same where the least recently used goes first, and what is offered twice is let in."""

    config = Config(
        eviction=EvictionSettings(policy="lru"),
        admission=AdmissionSettings(second_touch=(Retention.STANDARD,)),
    )


WarehouseMachine.TestCase.settings = settings(max_examples=35, stateful_step_count=30)
TestWarehouse = WarehouseMachine.TestCase
OtherSettings.TestCase.settings = settings(max_examples=15, stateful_step_count=30)
TestOtherSettings = OtherSettings.TestCase

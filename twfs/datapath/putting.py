"""Put: reserve, write, flush, publish; or forfeit.

The order is the promise: bytes and headers are on the devices and flushed before the one
transaction that makes them visible, and nothing before that transaction can be seen. A put holds
the blocks that were there already, so that it never evicts its own ancestors. Methods block; one
put is driven by one thread at a time, but its windows may be written by several.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final

import numpy as np

from twfs.checksums import host_sums_of
from twfs.core.state import Core
from twfs.datapath import reserving
from twfs.datapath.runs import Run, plan_runs
from twfs.devices.payload import aligned_buffer
from twfs.errors import (
    DeviceError,
    InvalidInput,
    WarehouseClosed,
)
from twfs.eviction import retaining
from twfs.eviction.choosing import Newcomer
from twfs.eviction.evicting import keep_low_water, keep_quota
from twfs.eviction.pinning import Brought, promise_put
from twfs.eviction.ranking import rank_of
from twfs.eviction.using import note_put
from twfs.hints import NO_HINT, Hint, Retention
from twfs.index import slots as states
from twfs.metadata import ledger
from twfs.metadata.sessions import Request
from twfs.metadata.tables import ModelRecord, WriteView
from twfs.policy.admission import Asked
from twfs.prefix import Names
from twfs.records import Block, BlockKey, Checksums, Extent, Header
from twfs.store import ArenaBlock, PutOutcome, PutResult
from twfs.tenants import EVERYBODY
from twfs.units import (
    ALIGN,
    ByteCount,
    DeviceIndex,
    Digest,
    PrefixHash,
    TokenCount,
    align_up,
)

PUT_BLOCKS_MAX: Final = 1 << 16  # a million tokens at 16 a block; more belongs in two puts


class Put:
    """One put under way; made by begin_put. See the module's docstring."""

    def __init__(
        self, core: Core, model: ModelRecord, names: Names, *, group: int, shard: int,
        retention: Retention, tenant: int = EVERYBODY, uid: int | None = None,
        lengths: Sequence[int] = (), hint: Hint = NO_HINT,
    ) -> None:  # fmt: skip
        self._core = core
        self._hint = hint
        self._promised = 0  # bytes that this put may pin
        self._tenant = tenant
        self._share = core.tenants.shares.get(tenant, 0)
        self._uid = uid  # whose bound on reservations counts; None: there is none
        self._model = model
        self._names = names
        self._group = group
        self._shard = shard
        self._retention = retention
        # Payload bytes by index: all alike, but where the layout allows any length.
        self._of_file = bool(lengths)
        self._lengths = lengths or (model.layout.block_bytes(group),) * len(names)
        self._layers = model.layout.summed_layers(group)
        self._pinned = np.zeros(0, np.int64)
        self._pin = 0
        self._reserved: dict[int, Block] = {}  # by index; checksums come with the bytes
        self._written: dict[int, Block] = {}
        self._failed: set[int] = set()
        self._stuck: dict[int, list[Future[None]]] = {}  # writes that hang, by index
        self._outcomes: dict[int, PutOutcome] = {}
        self._touched: set[DeviceIndex] = set()
        self._changed = threading.Condition()  # guards what was written, and the next two
        self._writing = 0
        self._sealed = False  # takes no more bytes
        self._ended = False  # no reservation is left; under the core's lock, as all below
        self._submitted = False  # the transaction decides: nothing may be forfeited before
        self._committed = False
        self.lacking: list[int] = []

    def _key(self, index: int) -> BlockKey:
        return BlockKey(self._model.id, self._names.hash_at(index), self._group, self._shard)

    def compare(self) -> list[int]:
        """Pin what is there and return the indices of what is not. Hold the core's lock."""
        slots, found = self._core.slots, set()
        lacking = []
        refused: set[PrefixHash] = set()  # a chain through a collision is not the one it names
        with self._core.metadata.read() as view:
            for index in range(len(self._names)):
                if self._parent(index) in refused:
                    self._outcomes[index] = PutOutcome.COLLISION
                    refused.add(self._names.hash_at(index))
                    continue
                block = view.block(self._key(index))
                if block is not None and slots.state[block.slot] == states.LIVE:
                    found.add(int(block.slot))
                    mine = (self._digest(index), self._own_key(index), self._tenant_at(index))
                    if (block.digest, block.key, block.tenant) != mine:
                        self._outcomes[index] = PutOutcome.COLLISION
                        refused.add(self._names.hash_at(index))
                        continue
                    # What lies on a device that is offline is stored anew: engines go on then.
                    offline = self._core.standings.offline
                    if not block.hole and not any(e.device in offline for e in block.extents):
                        self._outcomes[index] = PutOutcome.PRESENT
                        continue
                lacking.append(index)
            above: dict[PrefixHash, int] = {}
            named = {self._names.hash_at(index) for index in range(len(self._names))}
            for parent_hash in {self._parent(index) for index in lacking} - named:
                parent = view.block(BlockKey(self._model.id, parent_hash, self._group, self._shard))
                if parent is not None and slots.state[parent.slot] == states.LIVE:
                    found.add(int(parent.slot))
                    above[parent_hash] = parent.tenant
        for index in lacking:  # a chain is of one tenant, but for its public beginning
            parent_hash = self._parent(index)
            of = above.get(parent_hash, self._tenant_at(index))
            if not self._core.tenants.follows(of, self._tenant_at(index)):
                refused.add(parent_hash)
        for index in lacking if refused else ():
            if self._parent(index) in refused:
                self._outcomes[index] = PutOutcome.COLLISION
                refused.add(self._names.hash_at(index))
        lacking = [index for index in lacking if index not in self._outcomes]
        self._pinned = np.array(sorted(found), np.int64)
        self._pin = self._core.pin(self._pinned)
        return lacking

    def _tenant_at(self, index: int) -> int:
        """Whose block *index* is: the tenant's, or its share group's."""
        return self._share if index < self._names.public else self._tenant

    def _digest(self, index: int) -> Digest:
        return Digest(self._names.digests[32 * index : 32 * index + 32])

    def _parent(self, index: int) -> PrefixHash:
        return self._names.parent_at(index)

    def _own_key(self, index: int) -> bytes:
        return self._names.keys[index] if self._names.keys else b""

    def promise(self, lacking: list[int]) -> list[int]:
        """The leading part of *lacking* that is promised what it asks for. Hold the core's lock.

        That is all, but where it is to be pinned. PromiseRefused if nothing of it is.
        """
        core = self._core
        if self._retention is not Retention.PINNED:
            return lacking
        needs = [ByteCount(ALIGN + align_up(self._lengths[index])) for index in lacking]
        fit, self._promised = promise_put(
            core,
            Brought(
                self._model, self._group, self._shard, self._names, lacking, needs,
                self._pinned.tolist(),
            ),
        )  # fmt: skip
        for index in lacking[fit:]:
            self._outcomes[index] = PutOutcome.NO_ROOM
        return lacking[:fit]

    def _asked(self, candidates: list[tuple[int, Block]]) -> Request:
        """What this put says of its session: it ends where the leading part ends that is there."""
        there = {index for index, _ in candidates}
        reach = []
        for index in range(len(self._names)):
            if index not in there and self._outcomes.get(index) is not PutOutcome.PRESENT:
                break
            reach.append(self._names.hash_at(index))
        return Request(
            self._tenant, self._hint.session, self._retention.rank, reach, self._core.clock(),
            self._share,
        )  # fmt: skip

    def admit(self, lacking: list[int]) -> list[int]:
        """Those of *lacking* that are let in; the rest is not admitted. Hold the core's lock.

        The class that the session has is settled first: it is that of the blocks.
        """
        self._retention = retaining.class_of_put(
            self._core, self._model.id, self._tenant, self._hint.session, self._retention,
            [self._parent(index) for index in lacking[:1]],
        )  # fmt: skip
        if self._of_file:  # who writes a file has written it, worth it or not
            return lacking
        needs = [ALIGN + align_up(self._lengths[index]) for index in lacking]
        mix = (self._model.id * 1009 + self._group) * 1013 + self._shard
        admitted = self._core.gate.admit(
            Asked(self._names, lacking, needs, self._retention, mix * 0x9E3779B1)
        )
        for index in admitted.first_touch + admitted.worn:
            self._outcomes[index] = PutOutcome.NOT_ADMITTED
        self._core.counters.first_touch_blocks += len(admitted.first_touch)
        self._core.counters.worn_blocks += len(admitted.worn)
        return admitted.indices

    def reserve(self, lacking: list[int]) -> None:
        """Reserve extents for the longest leading part of *lacking* that fits, making room.

        Evicts of the put's own tenant what its quota has no room for. WarehouseFull or
        QuotaExceeded if there is something lacking and none of it fits.
        """
        if not lacking:
            return
        core = self._core
        needs = [ByteCount(ALIGN + align_up(self._lengths[index])) for index in lacking]
        newcomer = (
            None
            if self._of_file
            else Newcomer(
                rank_of(self._retention),
                core.policy.of_new(
                    self._names.positions[lacking[0]], self._hint.stop, self._hint.return_ms
                ),
                self._tenant,
            )
        )
        extents, why = reserving.reserve(
            core, needs, tenant=self._tenant, uid=self._uid, newcomer=newcomer
        )
        try:
            self.lacking = lacking[: len(extents)]
            for index in lacking[len(extents) :]:
                self._outcomes[index] = why
            if why is PutOutcome.NOT_ADMITTED:
                with core.lock:
                    core.counters.worthless_blocks += len(lacking) - len(extents)
            self._number(extents)
        except BaseException:
            with core.lock:
                reserving.release(core, extents, tenant=self._tenant, uid=self._uid)
            raise

    def _number(self, extents: list[tuple[Extent, ...]]) -> None:
        """Give every reserved block its generation, inode and slot: all of them, or none."""
        generations, inos = self._core.take_numbers(len(extents))
        now = self._core.clock()
        with self._core.lock:
            slots = self._core.slots.allot(len(extents))
            self._core.gate.spend(sum(each.length for room in extents for each in room))
            self._reserved = {
                index: Block(
                    generations[number], inos[number], slots[number], self._parent(index),
                    self._digest(index), TokenCount(self._names.positions[index]),
                    ByteCount(self._lengths[index]), Checksums(bytes(16), 0, 0), extents[number],
                    now, self._own_key(index), self._tenant_at(index), self._retention.rank,
                    payer=self._tenant if index < self._names.public else 0,
                )
                for number, index in enumerate(self.lacking)
            }  # fmt: skip

    def write_blocks(self, arena: memoryview, blocks: Sequence[ArenaBlock]) -> None:
        """Check the bytes of *blocks* in *arena* and write them; what fails shows in the outcomes.

        InvalidInput if a block is not lacking, of another length, not aligned or outside the arena.
        """
        for block in blocks:
            end = block.arena_offset + align_up(block.payload_bytes)
            if (
                block.index not in self._reserved
                or block.payload_bytes != self._lengths[block.index]
                or block.arena_offset % ALIGN
                or not 0 <= block.arena_offset < end <= len(arena)
            ):
                raise InvalidInput(
                    f"block {block.index} of {block.payload_bytes} bytes at arena offset "
                    f"{block.arena_offset} is not one that this put lacks, in {len(arena)} bytes"
                )
        with self._changed:
            if self._sealed:  # its extents may be somebody else's by now
                raise InvalidInput("blocks for a put that has been published or abandoned")
            self._writing += 1
        runs: dict[Future[None], Run] = {}
        try:
            headers = aligned_buffer(ALIGN * max(1, len(blocks)))
            for run in plan_runs(self._reserved, arena, headers, blocks):
                future = self._core.standings.write(
                    run.device, self._write_run, arena, headers, blocks, run
                )
                runs[future] = run
        finally:
            stuck = self._core.standings.wait({each: (run.device,) for each, run in runs.items()})
            with self._changed:
                for future in stuck:  # its extents are not free before it has ended
                    for number in runs[future].indices:
                        self._stuck.setdefault(blocks[number].index, []).append(future)
                self._writing -= 1
                self._changed.notify_all()
        for future, run in runs.items():
            if future in stuck or self._gone(future):
                with self._changed:
                    self._failed.update(blocks[number].index for number in run.indices)
            else:
                future.result()

    @staticmethod
    def _gone(future: "Future[None]") -> bool:
        """Tell whether I/O was not done because its device is offline."""
        return future.cancelled() or isinstance(future.exception(), DeviceError)

    @property
    def whole(self) -> bool:
        """Whether all of its names were lacking, and all their bytes are written."""
        with self._changed:
            return len(self._written) == len(self._names) and not self._failed

    @property
    def is_present(self) -> bool:
        """Whether any of its names was there before."""
        return PutOutcome.PRESENT in self._outcomes.values()

    def _seal(self) -> None:
        """Take no more bytes, and wait for those on their way."""
        with self._changed:
            self._sealed = True
            self._changed.wait_for(lambda: not self._writing)

    def _write_run(
        self, arena: memoryview, headers: memoryview, blocks: Sequence[ArenaBlock], run: Run
    ) -> None:
        """Check the blocks that begin in *run*, make their headers, write it all."""
        whole: dict[int, Block] = {}
        bad: set[int] = set()
        for number in run.indices:
            block = blocks[number]
            reserved = self._reserved[block.index]
            first = reserved.extents[0]
            if first.device == run.device and run.offset <= first.offset < run.end:
                view = arena[block.arena_offset : block.arena_offset + block.payload_bytes]
                sums = Checksums(block.xxh3, block.lane_plain, block.lane_weighted)
                xxh3, layer_sums = host_sums_of(view, self._layers)
                if xxh3 != block.xxh3:
                    bad.add(block.index)
                record = reserved.with_sums(sums)
                whole[block.index] = record
                headers[number * ALIGN : (number + 1) * ALIGN] = self._header(
                    block.index, record, layer_sums
                )
        try:
            self._core.standings.device(run.device).write_from(run.buffers, run.offset)
        except DeviceError:
            self._core.standings.look()
            bad.update(blocks[number].index for number in run.indices)
        with self._changed:
            self._written.update(whole)
            self._failed |= bad
            self._touched.add(run.device)

    def _header(self, index: int, block: Block, layer_sums: tuple[int, ...]) -> bytes:
        device = self._core.standings.device(block.extents[0].device)
        return Header(
            self._core.uuid, device.uuid, self._model.layout.fingerprint, self._model.name,
            self._model.epoch, self._group, self._shard, self._names.hash_at(index), block,
            layer_sums,
        ).pack(self._core.secret)  # fmt: skip

    def publish(
        self, also: Callable[[WriteView, ledger.Published], Any] | None = None,
        then: Callable[[Any], None] | None = None,
    ) -> PutResult:  # fmt: skip
        """Flush, publish what was written, forfeit the rest; blocks until it is durable.

        *also* goes on in the same transaction: what it raises undoes the publish and is raised.
        *then* gets its result right after the commit, in the writer thread.
        """
        assert not self._sealed, "published twice"
        self._seal()
        self._flush()
        candidates = self._candidates()
        asked = self._asked(candidates)
        now = self._core.clock()

        def after(done: ledger.Published) -> None:
            with self._core.lock:
                self._committed = True
                self._core.enter(done, now)
                note_put(self._core, self._model.id, self._tenant, done, self._hint)
                self._settle(candidates, done)
            if then is not None:
                then(done.also)

        def job(view: WriteView) -> ledger.Published:
            blocks = [(self._key(index), block) for index, block in candidates]
            done = ledger.publish(
                view, self._model, blocks, self._core.standings.offline,
                self._core.tenants.follows, asked=asked,
            )  # fmt: skip
            done.also = None if also is None else also(view, done)
            return done

        self._submitted = True
        try:
            future: Future[ledger.Published] = self._core.metadata.submit(job, after)
        except WarehouseClosed:
            self._submitted = False
            raise
        # Not here by try/except: an interrupted wait must not forfeit what may yet be published.
        future.add_done_callback(self._forfeit_failed)
        done = future.result()
        for (index, _), outcome in zip(candidates, done.outcomes, strict=True):
            self._outcomes[index] = outcome
        result = self._result()
        keep_low_water(self._core)
        keep_quota(self._core, self._tenant)
        return result

    def _flush(self) -> None:
        """Flush every device that was written to; a failure is final for its blocks."""
        bad = self._core.standings.flush(set(self._touched))
        if bad:
            self._failed |= {
                index
                for index, block in self._written.items()
                if any(extent.device in bad for extent in block.extents)
            }

    def _candidates(self) -> list[tuple[int, Block]]:
        """What may be published: written whole, and not below a block of this put that was not."""
        lost: set[PrefixHash] = set()
        candidates = []
        for index in sorted(self._reserved):
            if index not in self._written or index in self._failed or self._parent(index) in lost:
                self._outcomes[index] = PutOutcome.FAILED
                lost.add(self._names.hash_at(index))
            else:
                candidates.append((index, self._written[index]))
        return candidates

    def _forfeit_failed(self, ended: "Future[ledger.Published]") -> None:
        """Forfeit all, if the transaction was undone."""
        if ended.exception() is not None and not self._committed:
            self._submitted = False
            self.abandon()

    def _settle(self, candidates: list[tuple[int, Block]], done: ledger.Published) -> None:
        """Give back what was reserved and not published; unpin. Hold the core's lock."""
        published = {
            index
            for (index, _), outcome in zip(candidates, done.outcomes, strict=True)
            if outcome is PutOutcome.PUBLISHED
        }
        kept_slots = {int(entered.block.slot) for entered in done.entered}
        self._forfeit(published, kept_slots)

    def _forfeit(self, published: set[int], kept_slots: set[int] | None = None) -> None:
        """End the reservation of all blocks but *published*, and the put. Hold the core's lock."""
        core = self._core
        unwritten = [self._reserved[i] for i in self._reserved.keys() - self._written.keys()]
        core.gate.spend(-sum(block.device_bytes for block in unwritten))
        for index, block in self._reserved.items():
            core.count_reserved(self._uid, self._tenant, -block.device_bytes)
            if index not in published:
                core.release_after(block.extents, self._stuck.get(index, []))
            if index not in published or block.slot not in (kept_slots or ()):
                core.slots.give_back(block.slot)
        core.unpin(self._pinned, self._pin)
        core.puts_of[self._tenant] -= 1
        core.promised_bytes -= self._promised
        self._promised = 0
        self._ended = True

    def abandon(self) -> None:
        """Give up: forfeit every reservation, unless a publish is under way. Idempotent.

        Waits for bytes on their way.
        """
        self._seal()
        with self._core.lock:
            if not self._ended and not self._submitted:
                self._forfeit(set())

    def _result(self) -> PutResult:
        outcomes = tuple(self._outcomes[index] for index in range(len(self._names)))
        count = {outcome: outcomes.count(outcome) for outcome in PutOutcome}
        written = sum(self._reserved[i].device_bytes for i in self._written)
        with self._core.lock:
            self._core.counters.count_put(
                published=count[PutOutcome.PUBLISHED], present=count[PutOutcome.PRESENT],
                collisions=count[PutOutcome.COLLISION], failed=count[PutOutcome.FAILED],
                no_room=count[PutOutcome.NO_ROOM], over_quota=count[PutOutcome.OVER_QUOTA],
                written_bytes=written,
            )  # fmt: skip
        return PutResult(outcomes, ByteCount(written))

"""The state of an open warehouse, and the few steps that keep memory and tables together.

`lock` guards slots, leases, allocator and the maps below; it is held for microseconds, never over
I/O or a commit. What a transaction changed enters memory in the metadata's writer thread, right
after its commit: until then a published block is a miss, and a removed one is condemned.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

import numpy as np

from twfs.config import Config
from twfs.core.counters import Counters
from twfs.devices.device import Device
from twfs.devices.extents import Allocator
from twfs.devices.flushing import Flusher
from twfs.devices.limbo import Freed, Left, unpin_left
from twfs.devices.roster import Roster, write_roster
from twfs.devices.standing import Standings
from twfs.devices.wiping import Wiper
from twfs.errors import DeviceError, NoSuchModel, StaleEpoch, WarehouseClosed
from twfs.index import slots
from twfs.index.charges import Charges
from twfs.index.clocks import Clock, wall_ms
from twfs.index.leases import Ended, Leases
from twfs.index.siblings import is_alone, share_classes
from twfs.index.slots import Slots
from twfs.metadata import ledger
from twfs.metadata.environment import After, Job, Metadata
from twfs.metadata.filerows import FileRow
from twfs.metadata.meter import Meter
from twfs.metadata.sessions import Covered, SessionKey, Touch
from twfs.metadata.tables import LENGTH, ModelRecord, WriteView
from twfs.policy.admission import Gate
from twfs.policy.recording import Recorder
from twfs.policy.retention import Promises, Terms
from twfs.policy.scoring import Policy, policy_of
from twfs.records import BlockKey, Extent
from twfs.store import Served
from twfs.tenants import Tenants
from twfs.units import ALIGN, Generation, Ino, Millis, ModelId

T = TypeVar("T")

NUMBERS_AHEAD: Final = 1 << 20  # generations and inodes made durable at once


@dataclass(slots=True)
class Core:
    """All parts of one open warehouse; see the module's docstring."""

    directory: Path
    uuid: UUID
    metadata: Metadata
    standings: Standings  # of the devices
    allocator: Allocator
    slots: Slots
    leases: Leases
    secret: bytes
    roster: Roster  # as it is on the devices
    tenants: Tenants  # of the roster; replaced whole, never changed: readers take no lock
    lock: threading.RLock  # the one that guards the standings too
    clock: Clock = wall_ms
    config: Config = field(default_factory=Config)
    terms: Terms = field(init=False)
    promises: Promises = field(default_factory=Promises)
    promised_bytes: int = 0  # of pins under way, which the arrays do not show yet
    unkept: set[SessionKey] = field(default_factory=set)  # their class is to enter the roster
    asked: dict[SessionKey, Touch] = field(default_factory=dict)  # by touches, not committed yet
    next_expiry_ms: int = 0  # no block's time to live is over before that
    models: dict[ModelId, ModelRecord] = field(default_factory=dict)
    current: dict[str, ModelId] = field(default_factory=dict)
    limbo: dict[int, tuple[Extent, ...]] = field(default_factory=dict)  # by slot, leased still
    to_erase: set[int] = field(default_factory=set)  # slots: overwrite their headers first
    to_doom: dict[int, int] = field(default_factory=dict)  # slots in limbo: a purge is to erase it
    doomed: dict[Extent, int] = field(default_factory=dict)  # nobody reads it: how to erase it
    policy: Policy = field(init=False)  # of eviction
    gate: Gate = field(init=False)  # what is let in
    meter: Meter = field(default_factory=lambda: Meter(0))
    recorder: Recorder = field(init=False)  # of requests; opening.py sets it
    counters: Counters = field(default_factory=Counters)
    served: dict[str, Served] = field(default_factory=dict)  # by reader, as reported at release
    left: "dict[int, list[Left]]" = field(default_factory=dict)  # by slot, places left by a move
    changes: int = 0  # grows with everything that a listing would show
    reserved_bytes: int = 0
    reserved_of: Counter[int] = field(default_factory=Counter)  # the same bytes by uid
    puts_of: Counter[int] = field(default_factory=Counter)  # puts under way by tenant
    evicting: int = 0  # background transactions under way
    trimming: Counter[int] = field(default_factory=Counter)  # the same for quotas, by tenant
    _next_generation: int = 0
    _next_ino: int = 0
    _numbers_end: int = 0
    _numbers: threading.Lock = field(default_factory=threading.Lock)
    _enrolling: threading.Lock = field(default_factory=threading.Lock)
    _enrolled: bool = False  # anything since open
    wiper: Wiper = field(init=False)
    gone_files: deque[FileRow] = field(default_factory=deque)  # whose blocks are not all there
    _pins: int = 0

    def __post_init__(self) -> None:
        self.terms = Terms.of(self.config)

        def count(headers: int) -> None:
            self.counters.erased_blocks += headers

        self.wiper = Wiper(self.allocator, self.lock, lambda: (self.devices, self.flushers), count)
        given = self.config.eviction
        self.policy = policy_of(given.policy, given.attention_tokens)
        self.gate = Gate(self.config.admission, self.allocator.total_bytes, self.clock)

    @property
    def devices(self) -> dict[int, Device]:
        """The devices that are there, by number; replaced whole, so readers take no lock."""
        return self.standings.devices

    @property
    def flushers(self) -> dict[int, Flusher]:
        """The shared flushes of the devices that are there."""
        return self.standings.flushers

    def record(self, model_id: ModelId) -> ModelRecord:
        """The record of a model in any epoch; StaleEpoch if that is over and gone, NoSuchModel."""
        record = self.models.get(model_id)
        if record is None:
            with self.metadata.read() as view:
                given = view.counter("model")
            if 0 < model_id < given:  # a number is taken away only with its epoch
                raise StaleEpoch(f"model number {model_id} is of an epoch that is over: open anew")
            raise NoSuchModel(f"no model has the number {model_id}")
        return record

    def model(self, model_id: ModelId) -> ModelRecord:
        """The record of a model in its present epoch; StaleEpoch, NoSuchModel."""
        record = self.record(model_id)
        if self.current[record.name] != model_id:
            raise StaleEpoch(
                f"epoch {record.epoch} of model {record.name} is over: open the model again"
            )
        return record

    def bounded_uid(self, owner: int) -> int | None:
        """The user of *owner*, if the bounds on one user apply to it."""
        with self.lock:
            uid = self.leases.uid_of(owner)
        return None if uid in self.tenants.operators else uid

    @property
    def charges(self) -> Charges:
        """Who is charged for how much."""
        return self.slots.charges

    def count_reserved(self, uid: int | None, tenant: int, byte_count: int) -> None:
        """Add to what is reserved, on the accounts of *uid* and *tenant* too. Hold the lock."""
        self.reserved_bytes += byte_count
        self.charges.reserved[tenant] += byte_count
        if uid is not None:
            self.reserved_of[uid] += byte_count

    def is_current(self, model_id: ModelId) -> bool:
        """Tell whether *model_id* is the present epoch of a model."""
        record = self.models.get(model_id)
        return record is not None and self.current.get(record.name) == model_id

    def take_numbers(self, count: int) -> tuple[list[Generation], list[Ino]]:
        """Return *count* generations and inodes that nobody had; may wait for a commit.

        Their range was durable before the first of it is used, so a crash never gives one twice.
        """
        with self._numbers:
            if self._next_generation + count > self._numbers_end:
                self._extend_numbers(max(count, NUMBERS_AHEAD))
            first, first_ino = self._next_generation, self._next_ino
            self._next_generation += count
            self._next_ino += count
        generations = [Generation(first + at) for at in range(count)]
        return generations, [Ino(first_ino + at) for at in range(count)]

    def _extend_numbers(self, count: int) -> None:
        """Make a new range durable."""
        with self.metadata.read() as view:  # only here they change, and under the lock of numbers
            generation, ino = view.counter("generation"), view.counter("ino")

        def job(view: WriteView) -> None:
            view.set_counter("generation", generation + count)
            view.set_counter("ino", ino + count)

        self.enrol(
            lambda roster: replace(roster, generation_end=generation + count, ino_end=ino + count),
            job,
        )
        self._next_generation, self._next_ino = generation, ino
        self._numbers_end = generation + count

    @contextmanager
    def enrolling_held(self) -> Iterator[None]:
        """Let nothing change in the roster during the block: devices and metadata agree."""
        with self._enrolling:
            yield

    def enrol(
        self, change: Callable[[Roster], Roster], job: Job[T], after: After[T] | None = None
    ) -> T:
        """Make *change* durable in the roster of the devices, and then *job* in the metadata.

        One at a time; blocks. If the second is lost in a crash, the next start does it again from
        the roster, or undoes the first. DeviceError, TooLarge, WarehouseClosed, what *job* raises.
        """
        with self._enrolling:
            with self.metadata.read():  # WarehouseClosed, before a closed device says less
                pass
            if not self._enrolled:
                # Two steps in every run: metadata that is one behind has seen a crash, metadata
                # that is more behind is an old copy.
                self._enrol(self.roster, lambda _: None, None)
                self._enrolled = True
            return self._enrol(change(self.roster), job, after)

    def _enrol(self, changed: Roster, job: Job[T], after: After[T] | None) -> T:
        roster = replace(changed, sequence=self.roster.sequence + 1)
        self.write_roster(roster)

        def noted(view: WriteView) -> T:
            view.set_meta("roster", LENGTH.pack(roster.sequence))
            return job(view)

        result = self.metadata.submit(noted, after).result()
        self.metadata.settle()  # or the next roster could be two steps ahead after a power cut
        self.roster = roster
        return result

    def write_roster(self, roster: Roster) -> None:
        """Make *roster* durable on every device that takes it; DeviceError if none does, TooLarge.

        Waits for no device that hangs.
        """
        futures = {
            self.standings.write(
                index, write_roster, [device], roster, self.secret, self.uuid
            ): (index,)
            for index, device in self.devices.items()
        }  # fmt: skip
        stuck = self.standings.wait(futures)
        ended = [each for each in futures if each not in stuck and not each.cancelled()]
        failed = [each.exception() for each in ended if each.exception() is not None]
        if len(ended) == len(failed):
            raise failed[0] or DeviceError("") if failed else DeviceError(
                "no device takes the roster: all are offline; see `twfs device list`"
            )  # fmt: skip

    def release_after(self, extents: Sequence[Extent], writes: "Sequence[Future[None]]") -> None:
        """Make reserved *extents* free once *writes* to them, which hang, ended. Hold the lock."""
        left = len(writes)

        def ended(_: object) -> None:
            nonlocal left
            with self.lock:
                left -= 1
                if not left:
                    self.allocator.release(extents)

        if not writes:
            self.allocator.release(extents)
        for write in writes:
            write.add_done_callback(ended)

    def adopt_device(self, add: Callable[[Roster], T]) -> T:
        """Run *add* with the present roster, which cannot change meanwhile."""
        with self._enrolling:
            return add(self.roster)

    def enter(self, published: ledger.Published, now_ms: Millis) -> None:
        """Let memory follow a publish that is committed."""
        with self.lock:
            for entered in published.entered:
                self._enter_one(entered, now_ms)
            self.leave_places(published.replaced)
            self.counters.replaced_blocks += len(published.replaced)
            changed: list[int] = []
            for child, parent in published.adopted:
                if self.slots.parent[child] == slots.NONE:
                    changed += self.slots.adopt(child, parent)
            if published.attached:
                self.slots.detached[published.attached] = False
            self.slots.move_heads(published.heads.added, published.heads.dropped)
            self.cover(published.covered, changed, [each.key for each in published.entered])
            self.changes += 1

    def cover(
        self, covered: Covered, changed: Sequence[int] = (), entered: Sequence[BlockKey] = (),
        gone: Sequence[BlockKey] = (),
    ) -> None:  # fmt: skip
        """Let classes follow what a transaction changed of sessions. Hold the lock.

        *changed* are slots whose class did so already, *entered* and *gone* blocks new and removed.
        """
        moved = [*changed, *self.slots.cover(covered.marks)]
        if any(not is_alone(model) for model in self.models.values()):
            with self.metadata.read() as view:
                share_classes(view, self.slots, self.models, moved, entered=entered, gone=gone)
        self.counters.refused_sessions += covered.refused
        self.unkept.update(covered.unkept)
        if moved:
            self.next_expiry_ms = 0

    def _enter_one(self, entered: ledger.Entered, now_ms: Millis) -> None:
        block = entered.block
        units = block.device_bytes // ALIGN
        if entered.filled:
            self.slots.fill(
                block.slot, units=units, device=block.extents[0].device, payer=block.charged,
                retention=block.retention,
            )  # fmt: skip
            self.slots.use([block.slot], now_ms)
        else:
            self.slots.set_live(
                block.slot, entered.key.pack(), entered.parent_slot, position=block.position,
                units=units, now_ms=now_ms, detached=block.detached,
                device=block.extents[0].device, retention=block.retention, tenant=block.tenant,
                payer=block.charged,
            )  # fmt: skip

    def leave(self, removed: ledger.Removed, *, evicted: bool) -> None:
        """Let memory follow a removal that is committed; its space waits for `free_space`."""
        with self.lock:
            if evicted and removed.blocks and self.is_current(removed.blocks[0][0].model):
                gone = [int(block.slot) for _, block in removed.blocks]
                self.promises.judge(self.slots, self.terms, gone, self.clock())
            self.slots.move_heads(removed.heads.added, removed.heads.dropped)
            self.cover(removed.covered, gone=[key for key, _ in removed.blocks])
            self.gone_files += removed.files
            self.to_erase |= removed.rows
            for key in removed.kept:
                self._spare(key)
            over = Freed()  # limbo whose last lease ended while the commit was under way
            for _, block in removed.blocks:
                self.slots.drop(block.slot)
                if block.slot not in removed.limbo:
                    self.slots.give_back(block.slot)
                    if block.slot in self.to_erase:
                        self.to_erase.discard(block.slot)
                        removed.erase += block.extents[:1]
                elif self.slots.leases[block.slot]:
                    self.slots.state[block.slot] = slots.LIMBO
                    self.limbo[block.slot] = block.extents
                else:
                    self.slots.give_back(block.slot)
                    self._add_freed(over, block.slot, block.extents)
            self._free_limbo(over)
            if evicted:
                self.counters.evicted_blocks += len(removed.blocks)
                self.counters.evicted_bytes += sum(b.device_bytes for _, b in removed.blocks)
            else:
                self.counters.removed_blocks += len(removed.blocks)
            self.changes += 1

    def free_space(self, removed: ledger.Removed) -> None:
        """Let the extents of a removal that no power cut can undo be written again (I19)."""
        free = Freed(headers=removed.erase)
        for _, block in removed.blocks:
            if block.slot not in removed.limbo:
                free.extents += block.extents
        self._hand_out(free)

    def _spare(self, key: BlockKey) -> None:
        """Let a condemned block live: it has gained a child, or its removal failed."""
        with self.metadata.read() as view:
            block = view.block(key)
        if block is not None and self.slots.state[block.slot] == slots.CONDEMNED:
            self.slots.state[block.slot] = slots.LIVE
            self.to_erase.discard(block.slot)

    def revive(self, keys: Sequence[BlockKey]) -> None:
        """Let condemned *keys* live on, those that are not gone. Any thread."""
        with self.lock:
            for key in keys:
                self._spare(key)

    def end_leases(self, ended: list[Ended]) -> None:
        """Count down the slots of leases that are over; frees limbo. Hold the lock."""
        for lease in ended:
            self.unpin(lease.slots, lease.pin)

    def pin(self, pinned: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> int:
        """Keep the blocks in these slots (each named once) from eviction. Hold the lock.

        Returns the number of this pin, which unpin wants.
        """
        self.slots.leases[pinned] += 1
        self._pins += 1
        return self._pins

    def unpin(self, pinned: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", pin: int) -> None:
        """Undo *pin*; the last one out of limbo frees its extents. Hold the lock."""
        self.slots.leases[pinned] -= 1
        if not self.limbo and not self.left:
            return
        over = Freed()
        for slot in pinned.tolist():
            if slot in self.left:
                over.extents += unpin_left(self.left, slot, pin)
            if slot in self.limbo and self.slots.leases[slot] == 0:
                self._add_freed(over, slot, self.limbo.pop(slot))
                self.slots.give_back(slot)
        self._free_limbo(over)

    def leave_places(self, places: Sequence[tuple[int, tuple[Extent, ...]]]) -> None:
        """Keep the extents that blocks (by slot) had until now for those who may read them still.

        They are in limbo already, and free when all pins of now have ended: not when the slot has
        none, for a hot block always has one. Hold the lock.
        """
        over = Freed()
        for slot, extents in places:
            holders = int(self.slots.leases[slot])
            if holders:
                self.left.setdefault(slot, []).append(Left(extents, self._pins, holders))
            else:
                over.extents += extents
        self._free_limbo(over)

    def _free_limbo(self, over: Freed) -> None:
        """Queue the end of *over*'s time in limbo; it is free once that is certain (I19)."""
        if over.extents:
            with suppress(WarehouseClosed):  # limbo is emptied at the next start too
                self.metadata.submit(
                    lambda view: ledger.free_limbo(view, over.extents),
                    settled=lambda _: self._hand_out(over), urgent=True,
                )  # fmt: skip

    def _add_freed(self, freed: Freed, slot: int, extents: tuple[Extent, ...]) -> None:
        """Add what the block in *slot* had, unless a purge is to erase it first; to_erase ends."""
        if slot in self.to_doom:
            self.doomed.update(dict.fromkeys(extents, self.to_doom.pop(slot)))
            self.to_erase.discard(slot)
            return
        freed.extents += extents
        if slot in self.to_erase:
            self.to_erase.discard(slot)
            freed.headers += extents[:1]

    def _hand_out(self, freed: Freed) -> None:
        """Let extents whose removal is certain be reserved again, headers overwritten first."""
        self.wiper.hand_out(freed)

    def count_served(self, served: Sequence[Served]) -> None:
        """Add what a holder of a lease says that its readers delivered. Hold the lock."""
        for part in served:
            before = self.served.get(part.reader, Served(part.reader))
            self.served[part.reader] = before.plus(part.blocks, part.payload_bytes)

    def expire(self) -> None:
        """End the leases whose time is over. Hold the lock."""
        self.end_leases(self.leases.expire())

    def submit_removal(
        self, model: ModelRecord, keys: list[BlockKey], *, evicted: bool, doom: int | None = None
    ) -> "Future[ledger.Removed]":
        """Queue the removal of *keys*, condemned before and deepest first.

        Memory follows its commit, and the future ends once the space may be used. No lease begins
        on a condemned block, so what is leased when the job runs is all that may go to limbo. With
        *doom* (tables.TO_DISCARD, TO_OVERWRITE) all of it does, until a purge has erased it.
        """

        def job(view: WriteView) -> ledger.Removed:
            with self.lock:
                leased = frozenset(
                    block.slot
                    for block in map(view.block, keys)
                    if block is not None and (doom is not None or self.slots.leases[block.slot])
                )
            removed = ledger.remove(view, model, keys, to_limbo=leased, over=not evicted)
            if doom is not None:
                for extent in (each for _, block in removed.blocks for each in block.extents):
                    view.add_limbo(extent, doom)
            return removed

        def after(removed: ledger.Removed) -> None:
            with self.lock:
                if doom is not None:
                    self.to_doom.update((int(block.slot), doom) for _, block in removed.blocks)
                self.leave(removed, evicted=evicted)

        def spare(ended: "Future[ledger.Removed]") -> None:
            if ended.exception() is not None:
                self.revive(keys)

        future = self.metadata.submit(
            job, after, settled=self.free_space, urgent=True,
        )  # fmt: skip
        future.add_done_callback(spare)
        return future

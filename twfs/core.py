"""The state of an open warehouse, and the few steps that keep memory and tables together.

`lock` guards slots, leases, allocator and the maps below; it is held for microseconds, never over
I/O or a commit. What a transaction changed enters memory in the metadata's writer thread, right
after its commit: until then a published block is a miss, and a removed one is condemned.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

import numpy as np

from twfs import ledger, slots
from twfs.device import Device
from twfs.errors import NoSuchModel, StaleEpoch, WarehouseClosed, WarehouseFull
from twfs.extents import Allocator
from twfs.flushing import Flusher
from twfs.leases import Ended, Leases
from twfs.metadata import After, Job, Metadata
from twfs.records import BlockKey, Extent
from twfs.roster import Roster, write_roster
from twfs.slots import Slots
from twfs.store import Served
from twfs.tables import LENGTH, ModelRecord, WriteView
from twfs.tenants import Tenants
from twfs.units import ALIGN, DeviceIndex, Generation, Ino, Millis, ModelId

T = TypeVar("T")

NUMBERS_AHEAD: Final = 1 << 20  # generations and inodes made durable at once
RESERVED_PARTS: Final = 4  # of the space for puts of one user: never all that others need
IO_THREADS: Final = 4  # writes in flight; more gain nothing on one drive (facts: 2 to 4)


def wall_ms() -> Millis:
    """Wall clock in milliseconds."""
    return Millis(time.time_ns() // 1_000_000)


@dataclass(slots=True)
class Counters:
    """What happened since open; every distinct path has a number."""

    matches: int = 0
    matched_blocks: int = 0
    asked_blocks: int = 0
    shortened_matches: int = 0  # the client may lease no more
    digest_mismatches: int = 0
    puts: int = 0
    published_blocks: int = 0
    present_blocks: int = 0
    collisions: int = 0
    failed_blocks: int = 0
    no_room_blocks: int = 0
    written_bytes: int = 0
    evicted_blocks: int = 0
    evicted_bytes: int = 0
    removed_blocks: int = 0
    holes: int = 0
    reports: int = 0
    mount_reads: int = 0
    mount_read_bytes: int = 0


@dataclass(slots=True)
class Core:
    """All parts of one open warehouse; see the module's docstring."""

    directory: Path
    uuid: UUID
    metadata: Metadata
    devices: dict[int, Device]  # replaced whole, never changed: readers take no lock
    allocator: Allocator
    slots: Slots
    leases: Leases
    secret: bytes
    roster: Roster  # as it is on the devices
    tenants: Tenants  # of the roster; replaced whole, never changed: readers take no lock
    lock: threading.RLock = field(default_factory=threading.RLock)
    models: dict[ModelId, ModelRecord] = field(default_factory=dict)
    current: dict[str, ModelId] = field(default_factory=dict)
    limbo: dict[int, tuple[Extent, ...]] = field(default_factory=dict)  # by slot, leased still
    counters: Counters = field(default_factory=Counters)
    served: dict[str, Served] = field(default_factory=dict)  # by reader, as reported at release
    io: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(IO_THREADS, "twfs-io")
    )
    flushers: dict[DeviceIndex, Flusher] = field(default_factory=dict)
    changes: int = 0  # grows with everything that a listing would show
    reserved_bytes: int = 0
    reserved_of: Counter[int] = field(default_factory=Counter)  # the same bytes by uid
    puts_of: Counter[int] = field(default_factory=Counter)  # puts under way by tenant
    evicting: int = 0  # background transactions under way
    _next_generation: int = 0
    _next_ino: int = 0
    _numbers_end: int = 0
    _numbers: threading.Lock = field(default_factory=threading.Lock)
    _enrolling: threading.Lock = field(default_factory=threading.Lock)

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

    def room_of(self, uid: int | None) -> int:
        """What the puts of *uid* may reserve more; None is bounded by the space alone."""
        total = self.allocator.total_bytes
        if uid is None:
            return total
        return max(0, total // RESERVED_PARTS - self.reserved_of[uid])

    def count_reserved(self, uid: int | None, byte_count: int) -> None:
        """Add to what is reserved, on the account of *uid* too. Hold the lock."""
        self.reserved_bytes += byte_count
        if uid is not None:
            self.reserved_of[uid] += byte_count

    def no_room(self, uid: int | None, need: int) -> WarehouseFull:
        """The error that says why not one block of *need* bytes can be reserved."""
        if self.room_of(uid) < need:
            return WarehouseFull(
                f"uid {uid} has {self.reserved_of[uid or 0]} bytes reserved for puts under way, "
                f"and one user may have 1/{RESERVED_PARTS} of the space: end some"
            )
        return WarehouseFull(
            f"no room for a block of {need} bytes: {self.allocator.free_bytes} bytes are free "
            "and nothing may be evicted; release leases or add a device"
        )

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
        return (
            [Generation(number) for number in range(first, first + count)],
            [Ino(number) for number in range(first_ino, first_ino + count)],
        )

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
            roster = replace(change(self.roster), sequence=self.roster.sequence + 1)
            write_roster(self.devices.values(), roster, self.secret, self.uuid)

            def noted(view: WriteView) -> T:
                view.set_meta("roster", LENGTH.pack(roster.sequence))
                return job(view)

            result = self.metadata.submit(noted, after).result()
            self.roster = roster
            return result

    def enter(self, published: ledger.Published, now_ms: Millis) -> None:
        """Let memory follow a publish that is durable."""
        with self.lock:
            for entered in published.entered:
                self._enter_one(entered, now_ms)
            for child, parent in published.adopted:
                if self.slots.parent[child] == slots.NONE:
                    self.slots.adopt(child, parent)
            if published.attached:
                self.slots.detached[published.attached] = False
            self._move_links(published.heads)
            self.changes += 1

    def _enter_one(self, entered: ledger.Entered, now_ms: Millis) -> None:
        block = entered.block
        units = block.device_bytes // ALIGN
        if entered.filled:
            self.slots.units[block.slot] = units
            self.slots.hole[block.slot] = False
            self.slots.use([block.slot], now_ms)
        else:
            self.slots.set_live(
                block.slot, entered.key.pack(), entered.parent_slot, position=block.position,
                units=units, now_ms=now_ms, detached=block.detached,
            )  # fmt: skip

    def leave(self, removed: ledger.Removed, *, evicted: bool) -> None:
        """Let memory follow a removal that is durable."""
        with self.lock:
            self._move_links(removed.heads)
            for key in removed.kept:
                self._spare(key)
            over: list[Extent] = []  # limbo whose last lease ended while the commit was under way
            for _, block in removed.blocks:
                self.slots.drop(block.slot)
                if block.slot not in removed.limbo:
                    self.slots.give_back(block.slot)
                    self.allocator.release(block.extents)
                elif self.slots.leases[block.slot]:
                    self.slots.state[block.slot] = slots.LIMBO
                    self.limbo[block.slot] = block.extents
                else:
                    self.slots.give_back(block.slot)
                    over += block.extents
            self._free_limbo(over)
            if evicted:
                self.counters.evicted_blocks += len(removed.blocks)
                self.counters.evicted_bytes += sum(b.device_bytes for _, b in removed.blocks)
            else:
                self.counters.removed_blocks += len(removed.blocks)
            self.changes += 1

    def _spare(self, key: BlockKey) -> None:
        """Let a condemned block live: it has gained a child, or its removal failed."""
        with self.metadata.read() as view:
            block = view.block(key)
        if block is not None and self.slots.state[block.slot] == slots.CONDEMNED:
            self.slots.state[block.slot] = slots.LIVE

    def _move_links(self, heads: ledger.HeadMoves) -> None:
        """Count heads over blocks anew after heads moved.

        A head that moves along its chain changes nothing below the nearer end, so that a turn
        costs its own blocks, and evicting a tail costs that tail.
        """
        both = set(heads.added) & set(heads.dropped)
        added = [slot for slot in heads.added if slot not in both]
        dropped = {slot for slot in heads.dropped if slot not in both}
        rising: set[int] = set()
        for head in added:
            met = self._meet(head, dropped)
            if met is None:
                rising.add(head)
            else:
                self.slots.link_head(head, 1, met)
                dropped.discard(met)
        for head in dropped:
            met = self._meet(head, rising)
            self.slots.link_head(head, -1, met)
            if met is not None:
                rising.discard(met)
        for head in rising:
            self.slots.link_head(head, 1)

    def _meet(self, slot: int, ends: set[int]) -> int | None:
        """The first of *ends* on the way from *slot* to the root."""
        parent = self.slots.parent
        at = slot
        while ends and at != slots.NONE:
            if at in ends:
                return at
            at = int(parent[at])
        return None

    def end_leases(self, ended: list[Ended]) -> None:
        """Count down the slots of leases that are over; frees limbo. Hold the lock."""
        for lease in ended:
            self.unpin(lease.slots)

    def pin(self, pinned: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> None:
        """Keep the blocks in these slots (each named once) from eviction. Hold the lock."""
        self.slots.leases[pinned] += 1

    def unpin(self, pinned: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> None:
        """Undo pin; the last one out of limbo frees its extents. Hold the lock."""
        self.slots.leases[pinned] -= 1
        if not self.limbo:
            return
        over: list[Extent] = []
        for slot in pinned.tolist():
            if slot in self.limbo and self.slots.leases[slot] == 0:
                over += self.limbo.pop(slot)
                self.slots.give_back(slot)
        self._free_limbo(over)

    def _free_limbo(self, extents: list[Extent]) -> None:
        """Queue the end of *extents*' time in limbo; memory follows its commit."""

        def free(_: None) -> None:
            with self.lock:
                self.allocator.release(extents)

        if extents:
            with suppress(WarehouseClosed):  # limbo is emptied at the next start too
                self.metadata.submit(
                    lambda view: ledger.free_limbo(view, extents), free, urgent=True
                )

    def count_served(self, served: Sequence[Served]) -> None:
        """Add what a holder of a lease says that its readers delivered. Hold the lock."""
        for part in served:
            before = self.served.get(part.reader, Served(part.reader))
            self.served[part.reader] = before.plus(part.blocks, part.payload_bytes)

    def expire(self) -> None:
        """End the leases whose time is over. Hold the lock."""
        self.end_leases(self.leases.expire())

    def submit_removal(
        self, model: ModelRecord, keys: list[BlockKey], *, evicted: bool
    ) -> "Future[ledger.Removed]":
        """Queue the removal of *keys*, condemned before and deepest first.

        Memory follows its commit. No lease begins on a condemned block, so what is leased when
        the job runs is all that may go to limbo.
        """

        def job(view: WriteView) -> ledger.Removed:
            with self.lock:
                leased = frozenset(
                    block.slot
                    for block in map(view.block, keys)
                    if block is not None and self.slots.leases[block.slot]
                )
            return ledger.remove(view, model, keys, to_limbo=leased)

        def spare(ended: "Future[ledger.Removed]") -> None:
            if ended.exception() is not None:
                with self.lock:
                    for key in keys:
                        self._spare(key)

        future = self.metadata.submit(
            job, lambda removed: self.leave(removed, evicted=evicted), urgent=True
        )
        future.add_done_callback(spare)
        return future

"""The warehouse: one node's store, opened by this process alone. The facade over its parts.

It is a Store, a Namespace and a LeaseHolder. All methods are synchronous and thread-safe. Those
that say so block on devices or commits; all others are short enough for an event loop.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from uuid import UUID

import numpy as np

from twfs.admin import advising, erasing, tenancy, usage
from twfs.admin.members import Members
from twfs.admin.namespace import OpenNamespace
from twfs.admin.purging import Purger
from twfs.checking.scrubbing import Scrubber
from twfs.config import Config, settings_of
from twfs.copying import Copying
from twfs.core import enrolling, metering, opening
from twfs.core.operating import Verbs
from twfs.core.state import Core
from twfs.datapath import matching, offering
from twfs.datapath.localput import LocalPort
from twfs.datapath.match import Match
from twfs.datapath.putting import Put
from twfs.datapath.sources import Sources
from twfs.datapath.upload import check_payloads, upload
from twfs.devices.arena import Arena
from twfs.devices.device import Device
from twfs.devices.formatting import DeviceSpec
from twfs.errors import InvalidInput, TwfsError, WarehouseClosed
from twfs.eviction import evicting, retaining
from twfs.hints import NO_HINT, Hint, check_session
from twfs.index.clocks import Clock, wall_ms
from twfs.index.leases import Located
from twfs.layout import Layout
from twfs.metadata.meter import check_prefill
from twfs.metadata.tables import DeviceRecord
from twfs.prefix import Names
from twfs.records import EXTENT_DTYPE, LOCATED_DTYPE, BlockKey
from twfs.store import (
    Durability,
    Model,
    Pieces,
    PutResult,
    ReadOutcome,
    Retention,
    Served,
)
from twfs.tenants import EVERYBODY
from twfs.units import ByteCount, ModelId, align_up
from twfs.vfs.files import Files

log = logging.getLogger(__name__)

LEASE_MS: Final = 60_000
ARENA_BYTES: Final = 256 << 20  # of the in-process put path
TEND_SECONDS: Final = 1.0  # expired leases are looked for this often
KEEP_TENDS: Final = 60  # after the devices did not take the classes, until they are tried again
PERSIST_TENDS: Final = 20  # heat reaches the disk every 20 s, so within the promised 30


class Warehouse(OpenNamespace):
    """See the module's docstring. Make one with `Warehouse.open`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._owner = core.leases.add_owner(os.getuid(), core.allocator.total_bytes)
        self._sources = Sources(core.standings)
        self._members = Members(core)
        self._arena: Arena | None = None
        self._puts = ThreadPoolExecutor(2, "twfs-put")
        self._closing = threading.Event()
        self._idle = threading.Condition()  # guards the next two, and the arena
        self._closed = False
        self._busy = 0  # calls under way that close has to wait for
        self.scrubber = Scrubber(core)
        self.files = Files(core)
        self.purger = Purger(core)
        self.verbs: Verbs = {
            **self.scrubber.verbs(), **erasing.verbs(core), **self._members.verbs(),
            **tenancy.verbs(core), **usage.verbs(core), **advising.verbs(core),
            **self.purger.verbs(),
        }  # fmt: skip
        self._keep_next = 0  # the turn in which classes are kept again
        self._tender = threading.Thread(target=self._tend, name="twfs-tend", daemon=True)
        self._tender.start()

    @classmethod
    def create(
        cls, directory: Path, devices: Sequence[DeviceSpec], *, force: bool = False,
        group: str | None = None,
    ) -> None:  # fmt: skip
        """Make a warehouse in *directory* over *devices*, for the members of *group* too.

        WarehouseExists, DeviceInUse unless forced; NoSpaceForImage, WarehouseBusy, InvalidInput.
        """
        opening.create(directory, devices, force=force, group=group)

    @classmethod
    def open(
        cls, directory: Path, *, lease_ms: int = LEASE_MS, clock: Clock = wall_ms,
        durability: Durability | str = Durability.STRICT, wary: bool = False, degraded: bool = True,
        config: Config | None = None,
    ) -> Self:  # fmt: skip
        """Open the warehouse in *directory*, exclusively; *durability* is "strict" or "relaxed".

        *clock* stamps uses and publishes; leases have a clock of their own.
        *wary*: let a child process read the metadata first, for LMDB ends a process on some damage.
        *config*: the settings, by default those of the file twfs.toml in *directory*.
        Without a device that is missing, damaged, another's or read-only, which `notes` tells,
        while another takes writes; unless *degraded* is False. NoSuchWarehouse, WarehouseBusy,
        WrongDevice, CorruptSuperblock, TruncatedDevice, CorruptMetadata, FormatTooNew, ReadOnly,
        InvalidInput.
        """
        if durability not in list(Durability):
            raise InvalidInput(f"durability is strict or relaxed, not {durability!r}")
        directory = Path(directory)
        core = opening.open_core(
            directory, lease_ms=lease_ms, durability=Durability(durability), wary=wary,
            degraded=degraded, clock=clock,
            config=settings_of(directory) if config is None else config,
        )  # fmt: skip
        try:
            return cls(core)
        except BaseException:
            opening.close_core(core)
            raise

    @property
    def uuid(self) -> UUID:
        """Which warehouse this is."""
        return self._core.uuid

    @property
    def directory(self) -> Path:
        """Where its metadata lies."""
        return self._core.directory

    @property
    def devices(self) -> Mapping[int, Device]:
        """Its devices that are there, by number."""
        return self._core.devices

    def table(self) -> list[tuple[DeviceRecord, Path, Device | None]]:
        """All devices, by number, and where they are; None for one that is offline."""
        core = self._core
        return [
            (each.record, core.directory / each.record.path, core.devices.get(index))
            for index, each in sorted(core.standings.all.items())
        ]

    @property
    def notes(self) -> list[str]:
        """What an operator should know: devices that are offline, read-only or damaged."""
        return [
            f"device {each.index} ({each.record.path}): {note}"
            for each in self._core.standings.all.values()
            for note in each.notes
        ]

    def resume(self) -> None:
        """Go on with drains that were under way when the warehouse was closed, or killed."""
        self._members.resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keep the warehouse open during a call that blocks; WarehouseClosed if it is not."""
        with self._idle:
            if self._closed:
                raise WarehouseClosed(f"{self.directory} has been closed: open it again")
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def _tend(self) -> None:
        """Background: call `_keep_house` every so often, whatever became of the turn before."""
        turns = 0
        while not self._closing.wait(TEND_SECONDS):
            turns += 1
            try:
                self._keep_house(turns)
            except Exception:  # leases must end, whatever else fails
                log.exception("the warehouse's background work failed; the next turn tries again")

    def _keep_house(self, turn: int) -> None:
        """End expired leases, persist heat, drop blocks of old epochs and expired ones.

        What touches said of sessions enters the tables here, and classes that came with a publish
        the roster.
        """
        self._core.standings.look()
        with self._core.lock:
            self._core.expire()
            written = self._core.counters.written_bytes + self._core.counters.moved_bytes
            over = any(not self._core.is_current(model) for model in self._core.models)
        self.files.tend()
        self.purger.tend()
        evicting.keep_quotas(self._core)
        self._core.recorder.tend(written)
        if turn % PERSIST_TENDS == 0:
            self._core.slots.persist()
            with suppress(TwfsError):
                metering.persist(self._core)
        with suppress(TwfsError):
            retaining.flush(self._core)
            evicting.sweep_expired(self._core)
        if turn >= self._keep_next:
            try:
                retaining.keep_classes(self._core)
            except TwfsError:  # no device takes it now
                self._keep_next = turn + KEEP_TENDS
        if over:
            with suppress(TwfsError):  # the disk is full, say; the next turn tries again
                evicting.sweep_epochs(self._core)

    def close(self) -> None:
        """Finish what is under way and let go of everything. Blocks; idempotent."""
        self.purger.stop()
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: not self._busy)
        self._closing.set()
        self.scrubber.close()
        self._tender.join()
        with suppress(TwfsError):
            retaining.flush(self._core)
            retaining.keep_classes(self._core)
        self._members.close()
        self.purger.close()
        self.files.close()
        self._puts.shutdown()
        self._sources.close()
        with suppress(TwfsError):
            metering.persist(self._core).result()
        opening.close_core(self._core)
        if self._arena is not None:
            self._arena.close()

    # Models

    def open_model(
        self, name: str, layout: Layout | None = None, *, tenant: str | None = None
    ) -> Model:
        """See Store.open_model; may wait for a commit."""
        return tenancy.open_model(self._core, name, layout, tenant)

    def new_epoch(self, model: Model) -> Model:
        """Make all blocks of *model* unreachable; waits for a commit."""
        with self._core.lock:
            record = self._core.model(model.id)
        record = enrolling.enter_model(self._core, record.name, record.layout, anew=True)
        return tenancy.model_for(self._core, record, model.tenant)

    # Store

    def match(self, model: Model, names: Names, *, start: int = 0) -> Match:
        """See Store.match."""
        located = self.match_located(model.id, names, start, self._owner, tenant=model.tenant)
        if located is None:
            return Match(
                self, b"", model, names, start, start, np.zeros(0, LOCATED_DTYPE),
                np.zeros(0, EXTENT_DTYPE), self._sources.now(),
            )  # fmt: skip
        return self._match_of(model, names, located)

    def join(self, token: bytes) -> Match:
        """See Store.join; the names of the match are its hashes alone."""
        located = self.join_located(token, self._owner)
        record = self._core.models[located.model]
        model = tenancy.model_for(self._core, record, located.tenant)
        return self._match_of(model, located.names(record.layout), located)

    def _match_of(self, model: Model, names: Names, located: Located) -> Match:
        return Match(
            self, located.token, model, names, located.start, located.blocks, located.located,
            located.extents, self._sources.now(),
        )  # fmt: skip

    def lookup(self, model: Model, names: Names, *, start: int = 0) -> int:
        """See Store.lookup."""
        return self.lookup_blocks(model.id, names, start, model.tenant)

    def touch(self, model: Model, names: Names, hint: Hint = NO_HINT) -> None:
        """See Store.touch."""
        self.touch_blocks(model.id, names, model.tenant, hint)

    def count_prefill(self, model: Model, tokens: int, seconds: float) -> None:
        """See Store.count_prefill."""
        check_prefill(tokens, seconds)
        self.count_prefill_of(model.id, tokens, seconds)

    def count_prefill_of(self, model: ModelId, tokens: int, seconds: float) -> None:
        """As count_prefill, by the model's number."""
        metering.count_prefill(self._core, model, tokens, seconds)

    def put(
        self, model: Model, names: Names, payloads: Sequence[Pieces], *,
        group: int = 0, shard: int = 0, retention: Retention = Retention.STANDARD,
        hint: Hint = NO_HINT,
        copying: Copying | None = None,
    ) -> PutResult:  # fmt: skip
        """See Store.put. Blocks."""
        check_payloads(model.layout, group, payloads)
        if len(payloads) != len(names):
            raise InvalidInput(f"{len(payloads)} payloads for {len(names)} names")
        with self._using():
            put = self.begin_put(
                model.id, names, group=group, shard=shard, retention=retention,
                owner=self._owner, tenant=model.tenant, hint=hint,
            )  # fmt: skip
            try:
                arena = self._put_arena(model.layout.block_bytes(group))
            except BaseException:
                put.abandon()
                raise
            port = LocalPort(put, arena, self._puts)
            return upload(port, arena, model.layout, group, payloads, copying=copying)

    def forget(self, model: Model, session: str) -> ByteCount:
        """See Store.forget. Blocks."""
        return self.forget_session(model.id, session, model.tenant)

    def _put_arena(self, block_bytes: int) -> Arena:
        """The arena that puts copy into, made for the first."""
        with self._idle:
            if self._arena is None or self._arena.byte_count < align_up(block_bytes):
                self._arena = Arena.private(max(ARENA_BYTES, align_up(block_bytes)))
            return self._arena

    # LeaseHolder

    def held(self, token: bytes) -> bool:
        """See LeaseHolder.held."""
        with self._core.lock:
            return not self._closed and self._core.leases.held(token, self._owner)

    def release(self, token: bytes, served: Sequence[Served] = ()) -> None:
        """See LeaseHolder.release."""
        self.release_lease(token, self._owner, served)

    def renew(self, token: bytes) -> bool:
        """See LeaseHolder.renew."""
        return self.renew_lease(token, self._owner) is not None

    def report(self, key: BlockKey, generation: int, outcome: ReadOutcome) -> None:
        """See LeaseHolder.report; the block is re-read in the background."""
        del outcome
        with suppress(RuntimeError):  # closed meanwhile: it is found out again another time
            self._puts.submit(self._judge_quietly, key, generation)

    def _judge_quietly(self, key: BlockKey, generation: int) -> None:
        """report_block for the background, where nobody waits for what it raises."""
        with suppress(TwfsError):
            self.report_block(key, generation)

    # For the server: owners and leases

    def add_owner(self, uid: int) -> int:
        """A number for one connection of *uid*."""
        with self._core.lock:
            return self._core.leases.add_owner(uid)

    def end_owner(self, owner: int) -> None:
        """End all leases of a connection that has closed."""
        with self._core.lock:
            self._core.end_leases(self._core.leases.end_owner(owner))

    def match_located(
        self,
        model: ModelId,
        names: Names,
        start: int,
        owner: int,
        *,
        tenant: int = EVERYBODY,
    ) -> Located | None:
        """The longest match, leased to *owner*; None if there is none, or the epoch is over."""
        with suppress(WarehouseClosed):
            return matching.match_located(self._core, model, names, start, owner, tenant=tenant)
        return None

    def join_located(self, token: bytes, owner: int) -> Located:
        """Another owner's lease, held by *owner* too; LeaseEnded."""
        return matching.join_located(self._core, token, owner)

    def release_lease(self, token: bytes, owner: int, served: Sequence[Served] = ()) -> None:
        """End *owner*'s part of a lease, and count what it read under it."""
        with self._core.lock:
            self._core.count_served(served)
            metering.count_reads(self._core, token, served)
            ended = self._core.leases.release(token, owner)
            self._core.end_leases([] if ended is None else [ended])

    def renew_lease(self, token: bytes, owner: int) -> int | None:
        """A full term again, in ms; None if the lease is over."""
        with self._core.lock:
            return self._core.leases.renew(token, owner)

    def lookup_blocks(
        self, model: ModelId, names: Names, start: int, tenant: int = EVERYBODY
    ) -> int:
        """Where a match would end."""
        with suppress(WarehouseClosed):
            return matching.lookup_blocks(self._core, model, names, start, tenant)
        return start

    def touch_blocks(
        self, model: ModelId, names: Names, tenant: int = EVERYBODY, hint: Hint = NO_HINT
    ) -> None:
        """Count a use."""
        with suppress(WarehouseClosed):
            matching.touch_blocks(self._core, model, names, tenant, hint)

    def begin_put(
        self, model: ModelId, names: Names, *, group: int, shard: int, retention: Retention,
        owner: int, tenant: int = EVERYBODY, hint: Hint = NO_HINT,
    ) -> Put:  # fmt: skip
        """Begin a put of *owner*; see offering.begin_put. Blocks when room must be made."""
        with self._using():
            return offering.begin_put(
                self._core, model, names, group=group, shard=shard, retention=retention,
                tenant=tenant, uid=self._core.bounded_uid(owner), hint=hint,
            )  # fmt: skip

    def report_block(self, key: BlockKey, generation: int) -> bool:
        """Re-read a block that a reader found bad; True if it is lost now. Blocks."""
        with self._using():
            return evicting.judge(self._core, key, generation)

    def forget_session(self, model: ModelId, session: str, tenant: int = EVERYBODY) -> ByteCount:
        """Delete a session of *tenant* by its id; see Store.forget. Blocks."""
        with self._using():
            return retaining.forget(self._core, model, tenant, check_session(session))

"""Purges: what is asked for is gone, and its bytes are erased, also if a crash comes between.

The order: what is to go is a durable row; who asked for it goes from the access record; blocks are
unpublished, and in the same transaction their extents are marked as to be erased; each is erased
and its device flushed; then it is free; at last the row goes. The next start goes on where a killed
process was. Blocks that others use stay. What cannot be erased now (leased, its device away or
read-only) stays marked, and is erased later.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any, Final

import msgspec

from twfs.admin import purgeable
from twfs.admin.purgeable import Row
from twfs.admin.shredding import Doomed, Erased
from twfs.core.operating import NoArguments, Verb, Verbs
from twfs.core.state import Core
from twfs.devices.roster import Roster
from twfs.errors import (
    CorruptMetadata,
    InvalidInput,
    NoSuchTenant,
    NotAllowed,
    TwfsError,
    WarehouseClosed,
)
from twfs.eviction.retaining import end_session, flush
from twfs.metadata.sessions import SessionKey
from twfs.metadata.tables import RETIRED, TO_DISCARD, TO_OVERWRITE, ReadView, WriteView
from twfs.records import BlockKey, Extent

PURGES: Final = "purges"  # of the meta table: the rows of purges that are not over, as JSON
PURGES_MAX: Final = 256
BATCH_BLOCKS: Final = 512  # of a transaction
WAIT_MS_MAX: Final = 24 * 3_600_000
LOOK_S: Final = 0.05  # between two looks for leases that ended
RETRY_TENDS: Final = 60  # after a device could not be written to


class Purge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `purge` takes: which blocks (all that is given must hold), and how.

    *session* is an engine's id, or MODEL/HASH. *older_ms*: not used for so long. *wait_ms*: how
    long to wait for leases. *free_space*: erase that too, where earlier copies may lie.
    """

    session: str | None = None
    tenant: str | None = None
    model: str | None = None
    older_ms: int | None = None
    overwrite: bool = False
    free_space: bool = True
    wait_ms: int = 0
    dry_run: bool = False


@dataclass(slots=True)
class _Tally:
    """What one purge did."""

    blocks: int = 0
    sessions: int = 0
    shared_blocks: int = 0
    shared_bytes: int = 0
    mine: dict[Extent, None] = field(default_factory=dict)
    free: Erased = field(default_factory=Erased)
    free_left_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    accesses: int = 0  # rows of the access record
    record_stays: bool = False


class Purger:
    """The purges of one warehouse. Thread-safe; one purge works at a time."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._work = threading.Lock()  # whoever erases
        self._stop = threading.Event()
        self._doomed = Doomed(core, self._stop)
        self._thread = ThreadPoolExecutor(1, "twfs-purge")
        self._busy = threading.Event()
        self._tends = 0
        with core.metadata.read() as view:
            self._interrupted = bool(rows_of(view))
        if self._interrupted or core.doomed:
            self._later()

    def verbs(self, uid: int | None = None) -> Verbs:
        """`purge`, as *uid* may use it: NotAllowed but for a tenant of theirs; None: an operator's.

        NoSuchTenant, NoSuchModel, NoSuchBlock for a session that is not there, InvalidInput. And
        `purges`, which daemon/permitting.py leaves to operators.
        """
        return {
            "purge": Verb(Purge, partial(self.purge, uid=uid)),
            "purges": Verb(NoArguments, lambda _: self.waiting()),
        }

    def stop(self) -> None:
        """Let what is under way end at the next batch: the next start goes on with it."""
        self._stop.set()

    def close(self) -> None:
        """As stop, and wait for that."""
        self.stop()
        self._thread.shutdown()
        with self._work:
            pass

    # In the background

    def tend(self) -> None:
        """Every second: erase what leases or devices have let go of meanwhile."""
        self._tends += 1
        with self._core.lock:
            waiting = set(self._core.doomed)
        if waiting and (waiting - self._doomed.tried or self._tends % RETRY_TENDS == 0):
            self._later()

    def _later(self) -> None:
        if not self._busy.is_set():
            self._busy.set()
            with suppress(RuntimeError):  # it is closing
                self._thread.submit(self._in_background)

    def _in_background(self) -> None:
        """Go on with what a process before did not finish, and erase what waits."""
        try:
            with self._work, suppress(TwfsError):  # tried again at the next tend or start
                if self._interrupted:
                    with self._core.metadata.read() as view:
                        rows = rows_of(view)
                    for row in rows:
                        self._carry_out(row, 0, resumed=True)
                        self._strike(row)
                    self._interrupted = False
                self._doomed.erase()
        finally:
            self._busy.clear()

    # A purge

    def purge(self, asked: Purge, *, uid: int | None = None) -> dict[str, Any]:
        """Carry out a purge; what was erased, what stays, and what could not be erased. Blocks."""
        row = self._checked(asked, uid)
        if asked.dry_run:
            return self._counted(row)
        with self._work:
            row = self._note(row)
            tally = self._carry_out(row, asked.wait_ms)
            self._strike(row)
            return self._report(row, tally)

    def _checked(self, asked: Purge, uid: int | None) -> Row:
        """The row of what is asked for."""
        core = self._core
        if asked.session is None and asked.tenant is None and asked.model is None and (
            asked.older_ms is None
        ):  # fmt: skip
            raise InvalidInput("say what is to go: a session, a tenant, a model or an age")
        if asked.session is not None and asked.older_ms is not None:
            raise InvalidInput("an age does not go with a session: it is one or the other")
        if not 0 <= asked.wait_ms <= WAIT_MS_MAX or not 0 <= (asked.older_ms or 0) < 1 << 62:
            raise InvalidInput(f"wait at most {WAIT_MS_MAX} ms, and give an age in ms from 0 on")
        tenants, tenant = core.tenants, None
        free_space = asked.free_space
        if uid is not None and uid not in tenants.operators:
            with suppress(NoSuchTenant):  # who does not own it is not told whether it is there
                tenant = None if asked.tenant is None else tenants.number_of(asked.tenant)
            if tenant is None or tenants.is_group(tenant) or tenants.owner_of(tenant) != uid:
                raise NotAllowed(
                    f"uid {uid} owns no tenant {(asked.tenant or '')[:64]!r}: only operators and "
                    "the owner of a tenant purge its blocks"
                )
            if asked.overwrite:  # of all that is free: that would be on everybody's account
                free_space = False
        elif asked.tenant is not None:
            tenant = tenants.number_of(asked.tenant)
        now_ms = core.clock()
        row = Row(
            0, now_ms, asked.model, tenant,
            None if asked.older_ms is None else max(now_ms - asked.older_ms, 0),
            asked.overwrite, free_space,
        )  # fmt: skip
        purgeable.check_model(core, row)
        if asked.session is not None:
            flush(core)
            row = replace(row, ends=purgeable.ends_of(core, row, asked.session))
        return row

    def _counted(self, row: Row) -> dict[str, Any]:
        """What a purge would do."""
        with self._core.lock:
            chosen = purgeable.choose(self._core, row, condemn=False)
        return {
            "dry_run": True, "purged_blocks": chosen.blocks, "purged_bytes": chosen.byte_count,
            "shared_blocks": chosen.shared_blocks, "shared_bytes": chosen.shared_bytes,
            "sessions": len(row.ends or ()),
        }  # fmt: skip

    def _note(self, row: Row) -> Row:
        """Make the row durable; with its number."""

        def job(view: WriteView) -> Row:
            rows, number = rows_of(view), view.counter("purge") + 1
            if len(rows) >= PURGES_MAX:
                raise InvalidInput(f"{len(rows)} purges are not over yet: mend the devices before")
            noted = replace(row, number=number)
            view.set_counter("purge", number)
            view.set_meta(PURGES, msgspec.json.encode([*rows, noted]))
            return noted

        noted = self._core.metadata.submit(job).result()
        self._core.metadata.settle()
        return noted

    def _strike(self, row: Row) -> None:
        """The purge is over: all is erased, or marked as to be erased."""

        def job(view: WriteView) -> None:
            left = [each for each in rows_of(view) if each.number != row.number]
            view.set_meta(PURGES, msgspec.json.encode(left))

        self._core.metadata.submit(job).result()

    def _carry_out(self, row: Row, wait_ms: int, *, resumed: bool = False) -> _Tally:
        """Do what *row* says, from wherever it is."""
        tally = _Tally()
        self._end_sessions(row, tally)
        with self._core.lock:
            chosen = purgeable.choose(self._core, row, condemn=True, resumed=resumed)
            self._core.changes += 1
        tally.shared_blocks, tally.shared_bytes = chosen.shared_blocks, chosen.shared_bytes
        keys = purgeable.in_order(self._core, chosen)
        self._erase_accesses(row, keys, tally)
        self._unpublish(row, keys, tally)
        self._wait(tally, wait_ms)
        if row.free_space:
            tally.free, tally.free_left_bytes, notes = self._doomed.erase_free(row.overwrite)
            tally.notes += notes
        return tally

    def _end_sessions(self, row: Row, tally: _Tally) -> None:
        """Forget the sessions that go, and their ids on the devices."""
        for model, tenant, name, _ in row.ends or ():
            if name and model in self._core.models:
                key = SessionKey.of(model, tenant, name)
                tally.sessions += end_session(self._core, key) is not None
        if row.ends is None and row.before_ms is None:

            def without(roster: Roster) -> Roster:
                left = tuple(
                    each for each in roster.classes
                    if (row.tenant is not None and each.tenant != row.tenant)
                    or (row.model is not None and each.model != row.model)
                )  # fmt: skip
                return replace(roster, classes=left)

            if without(self._core.roster) != self._core.roster:
                self._core.enrol(without, lambda _: None)

    def _erase_accesses(self, row: Row, keys: list[BlockKey], tally: _Tally) -> None:
        """Take out of the access record who asked for what goes.

        First, while it is known: a start that goes on with the purge only finds what is left.
        """
        with self._core.lock:
            of = purgeable.accesses_of(self._core, row)
        try:
            used = {
                model: b"".join(key.prefix_hash for key in mine)
                for model, mine in groupby(keys, lambda key: key.model)
            }
            tally.accesses = self._core.recorder.erase(used, of)
        except (OSError, CorruptMetadata) as error:
            tally.record_stays = True
            tally.notes.append(
                f"the access record was not erased: {getattr(error, 'strerror', None) or error}"
            )

    def _unpublish(self, row: Row, keys: list[BlockKey], tally: _Tally) -> None:
        """Take condemned blocks out, a bounded transaction at a time, and erase behind it."""
        core, doom = self._core, TO_OVERWRITE if row.overwrite else TO_DISCARD
        left = len(keys)
        try:
            for batch in _batches(keys):
                if self._stop.is_set():
                    raise WarehouseClosed("the warehouse closes: the next start ends the purge")
                record = core.models[batch[0].model]
                left -= len(batch)
                removed = core.submit_removal(record, batch, evicted=False, doom=doom).result()
                for _, block in removed.blocks:
                    tally.blocks += 1
                    tally.mine |= dict.fromkeys(block.extents)
                tally.shared_blocks += len(removed.kept)
                self._doomed.erase()
        except BaseException:
            core.revive(keys[len(keys) - left :])
            raise

    def _wait(self, tally: _Tally, wait_ms: int) -> None:
        """Wait until leases have ended and all is erased, at most so long."""
        deadline = time.monotonic() + wait_ms / 1000
        while True:
            with self._core.lock:
                self._core.expire()
                leased = self._leased(tally)
            self._doomed.erase()
            if not leased or time.monotonic() >= deadline or self._stop.wait(LOOK_S):
                return

    def _leased(self, tally: _Tally) -> list[Extent]:
        """What leases read still. Hold the lock."""
        held = (extent for extents in self._core.limbo.values() for extent in extents)
        return [extent for extent in held if extent in tally.mine]

    def _left(self, extents: Iterable[Extent]) -> list[dict[str, Any]]:
        """What of *extents* nobody reads and is not erased yet, by device, and why."""
        stuck: dict[int, int] = defaultdict(int)
        for extent in extents:
            stuck[extent.device] += extent.length
        return [
            {"device": device, "bytes": count, "why": self._doomed.why(device)}
            for device, count in sorted(stuck.items())
        ]

    def waiting(self) -> dict[str, Any]:
        """The purges that are not over, and what those that are have left to be erased."""
        core = self._core
        with core.lock, core.metadata.read() as view:
            rows = rows_of(view)
            doomed = list(core.doomed)
            leased = sum(
                extent.length
                for extent, why in view.all_limbo()
                if why in {TO_DISCARD, TO_OVERWRITE} and extent not in core.doomed
            )
            purges = [
                {
                    "number": row.number, "asked_ms": row.asked_ms, "model": row.model,
                    "tenant": None if row.tenant is None else core.tenants.name_of(row.tenant),
                    "before_ms": row.before_ms,
                    "sessions": [name or head for _, _, name, head in row.ends or ()],
                }
                for row in rows
            ]  # fmt: skip
        return {
            "purges": purges, "leased_bytes": leased, "left_on_devices": self._left(doomed),
        }  # fmt: skip

    def _report(self, row: Row, tally: _Tally) -> dict[str, Any]:
        core = self._core
        with core.lock, core.metadata.read() as view:
            leased = self._leased(tally)
            stuck = [extent for extent in core.doomed if extent in tally.mine]
            retired = sum(extent.length for extent, why in view.all_limbo() if why == RETIRED)
        leased_bytes = sum(extent.length for extent in leased)
        purged = sum(extent.length for extent in tally.mine)
        erased = self._doomed.take_erased()
        return {
            "dry_run": False, "number": row.number, "sessions": tally.sessions,
            "purged_blocks": tally.blocks, "purged_bytes": purged,
            "erased_bytes": purged - leased_bytes - sum(extent.length for extent in stuck),
            "discarded_bytes": erased.discarded, "overwritten_bytes": erased.overwritten,
            "shared_blocks": tally.shared_blocks, "shared_bytes": tally.shared_bytes,
            "leased_bytes": leased_bytes, "left_on_devices": self._left(stuck),
            "retired_bytes": retired, "erased_accesses": tally.accesses,
            "free_space": row.free_space,
            "free_discarded_bytes": tally.free.discarded,
            "free_overwritten_bytes": tally.free.overwritten,
            "free_left_bytes": tally.free_left_bytes, "notes": tally.notes,
            "complete": not (
                leased or stuck or tally.free_left_bytes or retired or tally.record_stays
            ),
        }  # fmt: skip


def rows_of(view: ReadView) -> list[Row]:
    """The purges that are not over; none of them if their list cannot be read."""
    try:
        return msgspec.json.decode(view.meta(PURGES) or b"[]", type=list[Row])
    except (msgspec.DecodeError, ValueError, RecursionError):
        return []


def _batches(keys: list[BlockKey]) -> Iterator[list[BlockKey]]:
    """*keys* in order, a transaction's worth of one model at a time."""
    for _, group in groupby(keys, lambda key: key.model):
        mine = list(group)
        for start in range(0, len(mine), BATCH_BLOCKS):
            yield mine[start : start + BATCH_BLOCKS]

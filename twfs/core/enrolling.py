"""What is written to the roster before the metadata says it: models, their epochs, tenants.

Also the look at both when a warehouse is opened. All of it blocks.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from uuid import UUID

from twfs.core.state import Core
from twfs.devices.device import Device
from twfs.devices.roster import Roster, RosterClass, RosterModel, rosters_of, write_roster
from twfs.errors import CorruptMetadata
from twfs.layout import Layout
from twfs.metadata import ledger
from twfs.metadata.environment import Metadata
from twfs.metadata.sessions import Ends, Session, SessionKey, enter, every, find
from twfs.metadata.tables import LENGTH, ModelRecord, ReadView, WriteView
from twfs.tenants import Tenants, pack_tenants, unpack_tenants
from twfs.units import ModelId


def enter_model(core: Core, name: str, layout: Layout, *, anew: bool) -> ModelRecord:
    """Enter the model *name*, or with *anew* its next epoch; one that is there stays otherwise."""
    now = core.clock()

    def change(roster: Roster) -> Roster:
        with core.lock:
            old = core.models[core.current[name]] if name in core.current else None
        if old is not None and not anew:
            return roster
        epoch = 0 if old is None else old.epoch + 1
        return replace(roster, models=roster.with_model(RosterModel(name, epoch, layout, now)))

    def after(record: ModelRecord) -> None:
        with core.lock:
            core.models[record.id] = record
            core.current[record.name] = record.id
            core.changes += 1

    return core.enrol(
        change, lambda view: ledger.next_model(view, name, layout, now, anew=anew), after
    )


def enter_tenants(core: Core, change: Callable[[Roster], Roster]) -> None:
    """Enter what *change* makes of the roster's tenants; blocks until it is durable."""
    changed: list[Roster] = []

    def noted(roster: Roster) -> Roster:
        changed.append(change(roster))
        return changed[0]

    def after(_: None) -> None:
        with core.lock:
            core.tenants = Tenants(changed[0].tenants, core.tenants.operators)
            core.changes += 1

    core.enrol(noted, lambda view: keep_tenants(view, changed[0]), after)


def roster_of(view: ReadView, sequence: int, before: Roster) -> Roster:
    """The roster that says what the metadata says; tenants and numbers are those of *before*.

    Of the classes it has those that are kept for sessions which are there still.
    """
    newest: dict[str, ModelRecord] = {}
    for record in view.models():
        if record.name not in newest or newest[record.name].epoch < record.epoch:
            newest[record.name] = record
    return replace(
        before,
        sequence=sequence,
        generation_end=max(before.generation_end, view.counter("generation")),
        ino_end=max(before.ino_end, view.counter("ino")),
        models=tuple(
            RosterModel(name, record.epoch, record.layout, record.created_ms)
            for name, record in sorted(newest.items())
        ),
        classes=_classes_of(view, newest),
    )


def _classes_of(view: ReadView, newest: dict[str, ModelRecord]) -> tuple[RosterClass, ...]:
    """The classes that the roster keeps, of models in their present epoch."""
    names = {record.id: record.name for record in newest.values()}
    found = [
        RosterClass(
            names[key.model], key.tenant, key.id.decode() if key.named else "", session.head,
            session.retention,
        )
        for key, session in every(view)
        if session.kept and key.model in names
    ]  # fmt: skip
    return tuple(sorted(found, key=RosterClass.place))


def enter_classes(view: WriteView, classes: Iterable[RosterClass]) -> None:
    """Give sessions the classes that a roster says; those that are not there begin where it says.

    A row whose block is gone says nothing. A session that has gone on since keeps its place.
    """
    records = {record.id: record for record in view.models()}
    for row in classes:
        record = records.get(view.model_id(row.model) or ModelId(0))
        if record is None:
            continue
        ends = Ends.of(view, record)
        key = (
            SessionKey.of(record.id, row.tenant, row.session)
            if row.session
            else SessionKey.without_id(record.id, row.tenant, row.head)
        )
        before = find(view, key)
        head = row.head if before is None else before.head
        block = ends.standing(head)
        if block is not None and (row.session or block.tenant == row.tenant):
            used_ms = 0 if before is None else before.used_ms
            enter(view, key, Session(head, row.retention, kept=True, used_ms=used_ms))


def settle(
    metadata: Metadata, devices: Collection[Device], secret: bytes, warehouse: UUID
) -> Roster:
    """Bring metadata and roster together after a start; returns the roster that is now durable.

    The roster may be one ahead, if a crash came between the two: its epochs are taken over, for an
    epoch that may have begun must not be forgotten. CorruptMetadata if it is farther ahead: the
    metadata is an old copy then.
    """
    with metadata.read() as view:
        known = LENGTH.unpack(view.meta("roster") or bytes(8))[0]
    rosters = rosters_of(devices, secret, warehouse)
    found = max(rosters, key=lambda each: each.sequence, default=None)
    ahead = 0 if found is None else found.sequence - known
    if ahead > 1:
        raise CorruptMetadata(
            f"{metadata.directory} is older than the devices: their roster has changed "
            f"{ahead} times since; put the newest metadata there, or run `twfs rebuild`"
        )
    with metadata.read() as view:
        newest = _with_tenants(view, found, known)
    if ahead == 1:
        metadata.submit(lambda view: _take_over(view, newest)).result()
        metadata.settle()
    with metadata.read() as view:
        roster = roster_of(view, max(known, newest.sequence), newest)
    if ahead == 0 and all(each == roster for each in rosters) and len(rosters) == len(devices):
        return roster
    roster = replace(roster, sequence=roster.sequence + 1)
    write_roster(devices, roster, secret, warehouse)

    def agree(view: WriteView) -> None:
        view.set_meta("roster", LENGTH.pack(roster.sequence))
        keep_tenants(view, roster)

    metadata.submit(agree).result()
    metadata.settle()
    return roster


def keep_tenants(view: WriteView, roster: Roster) -> None:
    """Let the metadata have a copy of the tenants: a device that is lost must not take them."""
    view.set_meta("tenants", pack_tenants(roster.tenant_end, roster.tenants))


def _with_tenants(view: ReadView, found: Roster | None, known: int) -> Roster:
    """The roster *found* on the devices; with the metadata's tenants if those are newer.

    *known* is the sequence of the roster that the metadata agrees with. CorruptMetadata.
    """
    newest = found or Roster(known)
    copy = view.meta("tenants")
    if copy is None:
        return newest
    try:
        end, tenants = unpack_tenants(copy)
    except ValueError as error:
        raise CorruptMetadata(f"{error}: run `twfs rebuild`") from error
    stale = found is None or found.sequence < known
    return replace(
        newest,
        tenant_end=max(end, newest.tenant_end),
        tenants=tenants if stale else newest.tenants,
    )


def _take_over(view: WriteView, roster: Roster) -> None:
    """Let the metadata have the epochs, classes and number ends of *roster*, and its sequence."""
    for model in roster.models:
        record = next(
            (
                each
                for each in view.models()
                if each.id == view.model_id(model.name) and each.epoch < model.epoch
            ),
            None,
        )
        if record is not None:
            ledger.next_model(view, model.name, record.layout, model.created_ms, anew=True)
    enter_classes(view, roster.classes)
    for name, end in (("generation", roster.generation_end), ("ino", roster.ino_end)):
        view.set_counter(name, max(view.counter(name), end))
    view.set_meta("roster", LENGTH.pack(roster.sequence))

"""Classes of sessions changed, and what touches said brought into the tables.

A class that is not the one in the headers goes to the roster of the devices first, and then to the
tables, so that it outlives the metadata. What a touch says waits for one commit a second with many
others. All of it blocks.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np

from twfs.core.state import Core
from twfs.devices.roster import CLASSES_BYTES_MAX, Roster, RosterClass, classes_bytes
from twfs.errors import NoSuchBlock, NoSuchModel, PromiseRefused, StaleEpoch, TooLarge, TwfsError
from twfs.eviction.evicting import remove_session
from twfs.eviction.pinning import promise_ends, promise_moves
from twfs.hints import Hint, Retention
from twfs.index import slots as states
from twfs.metadata.sessions import (
    EPHEMERAL,
    SESSIONS_MAX,
    STANDARD,
    Covered,
    Ends,
    Session,
    SessionKey,
    Touch,
    drop,
    ending_at,
    enter,
    every,
    find,
)
from twfs.metadata.tables import ReadView, WriteView
from twfs.policy.retention import PINNED
from twfs.records import BlockKey
from twfs.units import ByteCount, ModelId, PrefixHash

RETENTIONS: Final = tuple(Retention)
USED_STEP_MS: Final = 3_600_000  # a session that does not move is noted as used this often
PRUNED_PARTS: Final = 8  # of the sessions: so many end when there are nearly too many


# Classes.


def set_retention(core: Core, model: ModelId, head: PrefixHash, retention: Retention) -> None:
    """Give the sessions that end at *head* a class; without any, the one without id.

    NoSuchBlock, NoSuchModel, StaleEpoch, PromiseRefused, TooLarge.
    """
    layout = core.record(model).layout
    with core.metadata.read() as view:
        block = view.block(BlockKey(model, head, layout.spine, 0))
        if block is None:
            raise NoSuchBlock(f"no session {head.hex()}")
        keys = [key for key in ending_at(view, model, head) if key.named]
    keys = keys or [SessionKey.without_id(model, block.tenant, head)]
    assign(core, keys, retention.rank)


def retain(core: Core, model: ModelId, tenant: int, session: str, retention: Retention) -> None:
    """Give the session with an engine's id a class; NoSuchBlock and what set_retention raises."""
    core.record(model)
    assign(core, [SessionKey.of(model, tenant, session)], retention.rank)


def _head_of(view: ReadView, key: SessionKey) -> PrefixHash:
    """Where a session ends; NoSuchBlock if there is none."""
    if not key.named:
        return PrefixHash(key.id[1:])
    session = find(view, key)
    if session is None:
        raise NoSuchBlock(f"no session has the id {key.id.decode(errors='replace')!r}")
    return session.head


def assign(core: Core, keys: Sequence[SessionKey], rank: int) -> None:
    """Give sessions the class *rank*: all or none of them; durable on the devices at return.

    What is pinned is reserved first, and the ends of the chains are held until the arrays say so.
    """
    with core.lock:
        with core.metadata.read() as view:
            ends = [_slot_of(core, view, key) for key in keys]
            keys = [
                key if key.named else replace(key, tenant=int(core.slots.tenant[slot]))
                for key, slot in zip(keys, ends, strict=True)
            ]
            fresh, promised = promise_ends(core, view, ends) if rank == PINNED else (set(), 0)
        pinned = np.array(sorted({*ends, *fresh}), np.int64)
        pin = core.pin(pinned)
    try:
        core.enrol(
            lambda roster: _with_classes(core, roster, [(key, rank) for key in keys]),
            lambda view: _assigned(core, view, keys, rank),
            lambda covered: _follow(core, covered),
        )
    finally:
        with core.lock:
            core.promised_bytes -= promised
            core.unpin(pinned, pin)


def _slot_of(core: Core, view: ReadView, key: SessionKey) -> int:
    """The slot of the block where a session ends; NoSuchBlock. Hold the lock."""
    head = _head_of(view, key)
    block = view.block(BlockKey(key.model, head, core.record(key.model).layout.spine, 0))
    if block is None or core.slots.state[block.slot] != states.LIVE:
        raise NoSuchBlock(f"no session {head.hex()}")
    return int(block.slot)


def _follow(core: Core, covered: Covered) -> None:
    with core.lock:
        core.cover(covered)
        core.changes += 1


def _with_classes(
    core: Core, roster: Roster, changes: Sequence[tuple[SessionKey, int]]
) -> Roster:  # fmt: skip
    """*roster* with the classes of *changes*, and without those of sessions that are over.

    TooLarge if they take more than their part of it.
    """
    wanted = dict(changes)
    rows: dict[tuple[str, int, str, bytes], RosterClass] = {}
    with core.metadata.read() as view:
        for row in roster.classes:
            model = core.current.get(row.model)
            if model is None:
                continue
            key = (
                SessionKey.of(model, row.tenant, row.session)
                if row.session
                else SessionKey.without_id(model, row.tenant, row.head)
            )
            session = find(view, key)
            if session is not None and key not in wanted:
                _add_row(core, view, rows, key, session.head, session.retention)
        for key, rank in wanted.items():
            with suppress(NoSuchBlock):  # it ended meanwhile
                _add_row(core, view, rows, key, _head_of(view, key), rank)
    classes = tuple(sorted(rows.values(), key=RosterClass.place))
    size = classes_bytes(classes)
    if size > CLASSES_BYTES_MAX:
        raise TooLarge(
            f"{len(classes)} sessions have a class of their own, which takes {size} bytes of "
            f"{CLASSES_BYTES_MAX} on every device: give some of them the class of their blocks"
        )
    return replace(roster, classes=classes)


def _add_row(  # noqa: PLR0917 - what one row says
    core: Core, view: ReadView, rows: dict[tuple[str, int, str, bytes], RosterClass],
    key: SessionKey, head: PrefixHash, rank: int,
) -> None:  # fmt: skip
    """Note the class of a session, if that of its head's header is another."""
    model = core.models.get(key.model)
    if model is None or not core.is_current(key.model):
        return
    block = view.block(BlockKey(key.model, head, model.layout.spine, 0))
    if block is None or block.retention == rank:
        return
    row = RosterClass(
        model.name, key.tenant, key.id.decode() if key.named else "", head, rank
    )  # fmt: skip
    rows[row.model, row.tenant, row.session, b"" if key.named else head] = row


def _assigned(core: Core, view: WriteView, keys: Sequence[SessionKey], rank: int) -> Covered:
    """The transaction of `assign`."""
    covered = Covered()
    for key in keys:
        ends = Ends(view, key.model, core.record(key.model).layout)
        head = _head_of(view, key)
        block = ends.standing(head)
        if block is None:
            raise NoSuchBlock(f"no session {head.hex()}: it has just gone")
        before = find(view, key)
        kept = block.retention != rank
        low = rank == EPHEMERAL and view.is_head(key.model, head)
        if key.named or rank > STANDARD or low:
            used_ms = core.clock() if before is None else before.used_ms
            enter(view, key, Session(head, rank, kept, used_ms))
        elif kept and view.is_head(key.model, head):
            enter(view, key, Session(head, rank, kept, core.clock()))
        else:
            drop(view, key)
        ends.look(head, block)
        covered.note(ends)
    return covered


# What waits for a commit with others.


def flush(core: Core) -> None:
    """Bring into the tables what touches said, and onto the devices the classes that are not there.

    What cannot be done now, for a device that takes no writes, is tried again.
    """
    with core.lock:
        asked, core.asked = core.asked, {}
    if asked:
        _flush_touches(core, asked)
    with core.metadata.read() as view:
        many = view.count("sessions") > SESSIONS_MAX - SESSIONS_MAX // PRUNED_PARTS
    if many:
        core.metadata.submit(lambda view: _prune(core, view), lambda c: _follow(core, c)).result()


def _flush_touches(core: Core, asked: dict[SessionKey, Touch]) -> None:
    with core.lock:
        stay, promised = promise_moves(core, asked)

    def job(view: WriteView) -> Covered:
        covered = Covered()
        for model in {key.model for key in asked}:
            record = core.models.get(model)
            if record is None:
                continue
            ends = Ends.of(view, record)
            for key, touch in asked.items():
                if key.model == model and key.named:
                    if key not in stay:
                        ends.advance(touch.asked)
                    _note_use(view, key, touch)
            covered.note(ends)
        return covered

    try:
        core.metadata.submit(job, lambda covered: _follow(core, covered)).result()
    finally:
        with core.lock:
            core.promised_bytes -= promised
    with core.lock:
        core.counters.touched_sessions += len(asked)
    for key, touch in asked.items():
        if touch.wanted is not None:
            # One-way: who touched has gone on. A promise that is refused is counted.
            with suppress(NoSuchBlock, NoSuchModel, StaleEpoch, PromiseRefused, TooLarge):
                change(core, key, touch.wanted)


def _note_use(view: WriteView, key: SessionKey, touch: Touch) -> None:
    """Remember that a session is in use, though it has not moved."""
    session = find(view, key)
    if session is not None and touch.asked.now_ms - session.used_ms > USED_STEP_MS:
        enter(view, key, replace(session, used_ms=touch.asked.now_ms))


def change(core: Core, key: SessionKey, rank: int) -> None:
    """Give a session a class, unless it has that; as assign."""
    with core.metadata.read() as view:
        session = find(view, key)
    if (STANDARD if session is None else session.retention) != rank or (
        session is None and key.named
    ):
        assign(core, [key], rank)


def change_asked(core: Core, model: ModelId, tenant: int, hint: Hint) -> None:
    """Before a put: give the session of *hint*, if it is known, the class that is asked for.

    What assign raises; a session that is new gets its class with the put.
    """
    if hint.retention is None or not hint.session:
        return
    key = SessionKey.of(model, tenant, hint.session)
    with core.metadata.read() as view:
        known = find(view, key)
    if known is not None and known.retention != hint.retention.rank:
        with suppress(NoSuchBlock):  # it ended meanwhile, so it is new
            assign(core, [key], hint.retention.rank)


def class_of_put(  # noqa: PLR0917 - what a put says of its session
    core: Core, model: ModelId, tenant: int, session: str, retention: Retention,
    parents: Sequence[PrefixHash],
) -> Retention:  # fmt: skip
    """The class of the blocks of a put: that of its session, *retention* if that is new.

    Without id the session is that of the head among *parents*, which goes on, and gets no less.
    """
    with core.metadata.read() as view:
        if session:
            known = find(view, SessionKey.of(model, tenant, session))
            return retention if known is None else RETENTIONS[min(known.retention, PINNED)]
        ranks = [
            found.retention
            for parent in parents
            if view.is_head(model, parent)
            for key in ending_at(view, model, parent)
            if not key.named and (found := find(view, key)) is not None
        ]
    return RETENTIONS[min(max([retention.rank, *ranks]), PINNED)]


def keep_classes(core: Core) -> None:
    """Write to the devices the classes that only the tables have. What a device raises, TooLarge.

    They came with a publish of blocks that were there already with another class in their headers.
    """
    with core.lock:
        waiting = set(core.unkept)
    if not waiting:
        return
    with core.metadata.read() as view:
        now = [(key, s.retention) for key in waiting if (s := find(view, key)) is not None]

    def job(view: WriteView) -> None:
        for key, rank in now:
            session = find(view, key)
            if session is not None and session.retention == rank:
                enter(view, key, replace(session, kept=True))

    try:
        core.enrol(lambda roster: _with_classes(core, roster, now), job)
    except TooLarge:
        core.counters.unkept_classes += len(now)
    with core.lock:
        core.unkept -= waiting


def _prune(core: Core, view: WriteView) -> Covered:
    """End the sessions with an id that were not used for longest, but for pinned ones."""
    known = [(s.used_ms, key) for key, s in every(view) if key.named and s.retention != PINNED]
    known.sort(key=lambda pair: (pair[0], pair[1].pack()))
    covered = Covered()
    for _, key in known[: SESSIONS_MAX // PRUNED_PARTS]:
        _end(core, view, key, covered)
    return covered


def _end(core: Core, view: WriteView, key: SessionKey, covered: Covered) -> None:
    """Take a session out of the tables."""
    session = drop(view, key)
    record = core.models.get(key.model)
    if session is not None and record is not None:
        ends = Ends.of(view, record)
        ends.look(session.head)
        covered.note(ends)


def forget(core: Core, model: ModelId, tenant: int, session: str) -> ByteCount:
    """Delete a session by its id, with every block that no other session uses; 0 if there is none.

    StaleEpoch, NoSuchModel.
    """
    core.model(model)
    found = end_session(core, SessionKey.of(model, tenant, session))
    if found is None:
        return ByteCount(0)
    with core.metadata.read() as view:
        alone = view.is_head(model, found.head) and not ending_at(view, model, found.head)
    if not alone:
        return ByteCount(0)
    with suppress(TwfsError):  # it was removed, or goes on, since
        return remove_session(core, model, found.head)
    return ByteCount(0)


def end_session(core: Core, key: SessionKey) -> Session | None:
    """Forget a session with an id, and its class on the devices; what was known of it."""
    record = core.record(key.model)
    with core.lock:
        core.asked.pop(key, None)
    with core.metadata.read() as view:
        found = find(view, key)
    if found is None:
        return None

    def job(view: WriteView) -> Covered:
        covered = Covered()
        _end(core, view, key, covered)
        return covered

    def without(roster: Roster) -> Roster:
        mine = (record.name, key.tenant, key.id.decode())
        left = (c for c in roster.classes if (c.model, c.tenant, c.session) != mine)
        return replace(roster, classes=tuple(left))

    if found.kept:
        core.enrol(without, job, lambda covered: _follow(core, covered))
    else:
        core.metadata.submit(job, lambda covered: _follow(core, covered)).result()
    with core.lock:
        core.counters.forgotten_sessions += 1
    return found

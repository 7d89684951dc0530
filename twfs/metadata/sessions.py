"""Sessions in the tables: where each ends, its class, and how it moves as chains grow and shrink.

A session with an engine's id has a record. One without is a head, and has a record only while its
class is not standard: so a warehouse of plain chains has none. A session *ends* at a block, which
stands for its prefix hash; a block's class is the highest of the sessions that end at it or below
it. Functions of a view, and of nothing else; what changed is said in `Ends.marks`, so that the
arrays in memory can follow once it is durable.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from twfs.errors import CorruptMetadata
from twfs.hints import Retention
from twfs.layout import Layout
from twfs.metadata.tables import MODEL_KEY, ModelRecord, ReadView, WriteView
from twfs.records import SESSION, SESSION_KEY, Block, BlockKey
from twfs.units import HASH_BYTES, ModelId, PrefixHash

STANDARD: Final = Retention.STANDARD.rank
EPHEMERAL: Final = Retention.EPHEMERAL.rank
NO_ID: Final = b"\0"  # then the head: no id that a hint may give begins so
SESSIONS_MAX: Final = 1 << 18  # with an id: 60 MB of tables; the longest unused end before that
NO_PARENT: Final = bytes(16)


@dataclass(frozen=True, slots=True)
class Session:
    """One session: where it ends, its class, and whether that class is in the roster."""

    head: PrefixHash
    retention: int
    kept: bool = False
    used_ms: int = 0  # when it moved last

    def pack(self) -> bytes:
        """Return the record."""
        return SESSION.pack(self.head, self.retention, self.kept, bytes(6), self.used_ms)

    @classmethod
    def unpack(cls, data: bytes) -> "Session":
        """Make a session of its record; ValueError if it is none."""
        if len(data) != SESSION.size:
            raise ValueError(f"a session's record of {len(data)} bytes")
        head, retention, kept, reserved, used_ms = SESSION.unpack(data)
        if kept > 1 or any(reserved):
            raise ValueError("a session's record with reserved bits set")
        return cls(PrefixHash(head), retention, bool(kept), used_ms)


@dataclass(frozen=True, slots=True)
class SessionKey:
    """What names a session: model, tenant, and the id, or the head of one without."""

    model: ModelId
    tenant: int
    id: bytes  # UTF-8; or NO_ID and the head

    @classmethod
    def of(cls, model: ModelId, tenant: int, session: str) -> "SessionKey":
        """The name of the session with the engine's id *session*."""
        return cls(model, tenant, session.encode())

    @classmethod
    def without_id(cls, model: ModelId, tenant: int, head: PrefixHash) -> "SessionKey":
        """The name of the session without id that ends at *head*."""
        return cls(model, tenant, NO_ID + head)

    @property
    def named(self) -> bool:
        """Whether an engine gave it an id."""
        return not self.id.startswith(NO_ID)

    def pack(self) -> bytes:
        """Return the key."""
        return SESSION_KEY.pack(self.model, self.tenant) + self.id

    @classmethod
    def unpack(cls, data: bytes) -> "SessionKey":
        """Undo pack; ValueError if *data* is no key."""
        if len(data) <= SESSION_KEY.size:
            raise ValueError(f"a session's key of {len(data)} bytes")
        model, tenant = SESSION_KEY.unpack_from(data)
        key = cls(ModelId(model), tenant, data[SESSION_KEY.size :])
        if not key.named and len(key.id) != len(NO_ID) + HASH_BYTES:
            raise ValueError("a session's key without id and without head")
        return key

    def end_at(self, head: PrefixHash) -> bytes:
        """The key under which the table of ends has it."""
        return MODEL_KEY.pack(self.model) + head + SESSION_KEY.pack(0, self.tenant)[4:] + self.id


def find(view: ReadView, key: SessionKey) -> Session | None:
    """One session; CorruptMetadata if its record cannot be read."""
    value = view.get_raw("sessions", key.pack())
    if value is None:
        return None
    try:
        return Session.unpack(value)
    except ValueError as error:
        raise CorruptMetadata(f"the record of session {key.id!r}: {error}") from error


def every(view: ReadView) -> Iterator[tuple[SessionKey, Session]]:
    """All sessions; CorruptMetadata if one cannot be read."""
    for key, value in view.raw("sessions"):
        try:
            yield SessionKey.unpack(key), Session.unpack(value)
        except ValueError as error:
            raise CorruptMetadata(f"a session is unreadable: {error}") from error


def ending_at(view: ReadView, model: ModelId, head: PrefixHash) -> list[SessionKey]:
    """The sessions with a record that end at *head*."""
    start = MODEL_KEY.pack(model) + head
    return [
        SessionKey.unpack(MODEL_KEY.pack(model) + key[len(start) :])
        for key in view.keys_with("ends", start)
    ]


def enter(view: WriteView, key: SessionKey, session: Session) -> None:
    """Add a session, or replace what is known of it."""
    before = find(view, key)
    if before is not None and before.head != session.head:
        view.delete_raw("ends", key.end_at(before.head))
    view.put_raw("sessions", key.pack(), session.pack())
    if before is None or before.head != session.head:
        view.put_raw("ends", key.end_at(session.head), b"")


def drop(view: WriteView, key: SessionKey) -> Session | None:
    """Take a session out; what was known of it."""
    before = find(view, key)
    if before is not None:
        view.delete_raw("ends", key.end_at(before.head))
        view.delete_raw("sessions", key.pack())
    return before


def own_class(view: ReadView, model: ModelId, head: PrefixHash) -> int:
    """The highest class of the sessions that end at *head*, from 1; 0 if none does."""
    ranks = [
        min(session.retention, Retention.PINNED.rank)
        for key in ending_at(view, model, head)
        if (session := find(view, key)) is not None
    ]
    if ranks:
        return max(ranks) + 1
    return STANDARD + 1 if view.is_head(model, head) else 0


@dataclass(frozen=True, slots=True)
class Request:
    """What a put or a touch says of the session that it belongs to."""

    tenant: int
    session: str  # the engine's id; "": the chain's head is the session
    retention: int  # of a session that is new
    reach: Sequence[PrefixHash]  # blocks of the chain, in order: it ends at the last that is there
    now_ms: int = 0
    share: int = 0  # the tenant's share group, whose blocks its chains may end at
    # Only one that moves is looked at, so that touching costs nothing where nothing is new.
    only_named: bool = False


@dataclass(frozen=True, slots=True)
class Touch:
    """What a touch said of a session, on its way into the tables."""

    asked: Request
    wanted: int | None  # the class, where it said one


class Ends:
    """The ends of sessions of one model, inside one transaction."""

    def __init__(self, view: WriteView, model: ModelId, layout: Layout) -> None:
        self.view = view
        self.model = model
        self._layout = layout
        self.touched: dict[PrefixHash, int] = {}  # slots of blocks whose own class may be another
        self.gone: list[int] = []  # slots of blocks that are removed
        self.refused = 0  # sessions that were not entered: there are too many
        self.unkept: list[SessionKey] = []  # their class is not that of their head's header
        self._lifted: dict[PrefixHash, list[tuple[SessionKey, Session]]] = {}

    @classmethod
    def of(cls, view: WriteView, model: ModelRecord) -> "Ends":
        """The ends of sessions of *model*."""
        return cls(view, model.id, model.layout)

    def standing(self, head: PrefixHash) -> Block | None:
        """The block that stands for *head*."""
        return self.view.block(BlockKey(self.model, head, self._layout.spine, 0))

    def parent_of(self, block: Block) -> PrefixHash | None:
        """The prefix hash before *block*; None if it starts its chain."""
        first = not block.key and block.position == self._layout.block_tokens
        return None if block.parent == NO_PARENT or first else block.parent

    def look(self, head: PrefixHash, block: Block | None = None) -> None:
        """Note that the own class of *head* may have changed."""
        if head not in self.touched:
            block = block or self.standing(head)
            if block is not None:
                self.touched[head] = int(block.slot)

    def marks(self) -> list[tuple[int, int]]:
        """Slot and own class of every block that was looked at, as it is now."""
        return [(slot, 0) for slot in self.gone] + [
            (slot, own_class(self.view, self.model, head)) for head, slot in self.touched.items()
        ]

    def place(self, key: SessionKey, session: Session) -> None:
        """Let a session end at its head, which stands; one without id may end itself by that.

        Without id it needs a record only if it says something: above standard, or below it where
        nobody else would say what the head is.
        """
        before = find(self.view, key)
        if before is not None:
            self.look(before.head)
        block = self.standing(session.head)
        assert block is not None, session
        if not key.named:
            key = self._rename(key, session.head, block.tenant)
            there = find(self.view, key)
            if there is not None:
                session = replace(
                    session, retention=max(session.retention, there.retention), kept=there.kept
                )
            low = session.retention == EPHEMERAL and self.view.is_head(self.model, session.head)
            if not low and session.retention <= STANDARD:
                drop(self.view, key)
                self.look(session.head, block)
                return
        enter(self.view, key, session)
        self.look(session.head, block)
        moved = before is None or before.head != session.head
        if session.retention != block.retention and (moved or not session.kept):
            self.unkept.append(key)

    def _rename(self, key: SessionKey, head: PrefixHash, tenant: int) -> SessionKey:
        """The key of a session without id that ends at *head*, a block of *tenant*, now."""
        fresh = SessionKey.without_id(self.model, tenant, head)
        if fresh != key:
            drop(self.view, key)
        return fresh

    # As chains grow.

    def grow(self, ceased: PrefixHash, heads: Sequence[PrefixHash]) -> None:
        """Let the session without id of *ceased*, which is no head any more, go on to *heads*."""
        for key in ending_at(self.view, self.model, ceased):
            session = find(self.view, key)
            if key.named or session is None:
                continue
            for head in heads:
                if self._is_before(ceased, head):
                    self.place(key, replace(session, head=head))
                    break

    def _is_before(self, ancestor: PrefixHash, head: PrefixHash) -> bool:
        """Tell whether *ancestor* is *head*, or a block before it."""
        end = self.standing(ancestor)
        at: PrefixHash | None = head
        while at is not None:
            if at == ancestor:
                return True
            block = self.standing(at)
            if block is None or (
                end is not None and 0 < block.position <= end.position and not block.detached
            ):
                return False
            at = self.parent_of(block)
        return False

    def advance(self, asked: Request) -> None:
        """Let the session of a request end where its chain ends now."""
        head = self._last_there(asked)
        if head is None:
            return
        if not asked.session:
            known = any(not key.named for key in ending_at(self.view, self.model, head))
            if not asked.only_named and (asked.retention != STANDARD or known):
                key = SessionKey.without_id(self.model, asked.tenant, head)
                self.place(key, Session(head, asked.retention, used_ms=asked.now_ms))
            return
        key = SessionKey.of(self.model, asked.tenant, asked.session)
        before = find(self.view, key)
        if before is None:
            if self.view.count("sessions") >= SESSIONS_MAX:
                self.refused += 1
                self.advance(replace(asked, session=""))
                return
            self.place(key, Session(head, asked.retention, used_ms=asked.now_ms))
        elif not self._is_before(head, before.head):
            self.place(key, replace(before, head=head, used_ms=asked.now_ms))
            if before.retention == EPHEMERAL and not self._is_before(before.head, head):
                self._leave_behind(key, before)

    def _leave_behind(self, key: SessionKey, before: Session) -> None:
        """What an ephemeral session turned away from stays ephemeral, if it is a head."""
        left = before.head
        if self.view.is_head(self.model, left) and not ending_at(self.view, self.model, left):
            fresh = SessionKey.without_id(self.model, key.tenant, left)
            self.place(fresh, Session(left, EPHEMERAL, used_ms=before.used_ms))

    def _last_there(self, asked: Request) -> PrefixHash | None:
        """The last of the request's blocks that stands, if it is its tenant's or their group's."""
        for head in reversed(asked.reach):
            block = self.standing(head)
            if block is not None:
                return head if block.tenant in {asked.tenant, asked.share} else None
        return None

    # As chains shrink.

    def lift(self, head: PrefixHash, block: Block, *, over: bool) -> None:
        """Before *block*, which stands for *head*, goes: its sessions end at its parent.

        Unless they are *over* with it.
        """
        here = self._lifted.pop(head, [])
        for key in ending_at(self.view, self.model, head):
            session = drop(self.view, key)
            if session is not None:
                here.append((key, session))
        self.touched.pop(head, None)
        self.gone.append(int(block.slot))
        parent = self.parent_of(block)
        if here and parent is not None and not over:
            self._lifted.setdefault(parent, []).extend(here)

    def land(self) -> None:
        """After all has gone that goes: let what was lifted end where it is now.

        A session that is no more than standard is over where others go on: its own blocks are gone.
        """
        for head, here in self._lifted.items():
            if self.standing(head) is None:  # a detached chain is gone to its first block
                continue
            over = not self.view.is_head(self.model, head)
            for key, session in here:
                if session.retention > STANDARD or not over:
                    self.place(key, replace(session, head=head))
            self.look(head)
        self._lifted = {}


@dataclass(slots=True)
class Covered:
    """What a transaction changed of sessions, for the arrays in memory to follow."""

    marks: list[tuple[int, int]] = field(default_factory=list)  # slot, own class + 1 or 0
    refused: int = 0
    unkept: list[SessionKey] = field(default_factory=list)

    def note(self, ends: Ends) -> None:
        """Take over what *ends* says, at the end of the transaction's part."""
        self.marks += ends.marks()
        self.refused += ends.refused
        self.unkept += ends.unkept

"""What the tables mean by sessions, in columns: which are sound, and the class of every block.

For the checker, which compares it with the memory of a warehouse in use, and for repair.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np

from twfs.checking.snapshot import KEY_DTYPE, Snapshot, take_snapshot
from twfs.core.state import Core
from twfs.hints import Retention
from twfs.index.slots import LIVE, NOBODY, IntArray
from twfs.metadata.sessions import STANDARD, Session, SessionKey
from twfs.records import BlockKey
from twfs.units import ModelId, PrefixHash

PINNED: Final = Retention.PINNED.rank
NO_CLASS: Final = -1  # of a block that no session is over
LOOKS: Final = 3  # at a warehouse in use: what changes between them is no finding


def flaw_of(taken: Snapshot, key: SessionKey, session: Session) -> str:
    """What is wrong with a session, empty if nothing is."""
    if session.retention > PINNED:
        return f"has the class {session.retention}"
    unnamed = SessionKey.without_id(key.model, key.tenant, session.head)
    if not key.named and key != unnamed:
        return f"is named by another head than {session.head.hex()}, where it ends"
    row = _rows(taken, [_standing(taken, key.model, session.head)])[0]
    if row < 0:
        return f"ends at {session.head.hex()}, which is not there"
    if not key.named and int(taken.rows["tenant"][row]) != key.tenant:
        return f"without id ends at a block of tenant {taken.rows['tenant'][row]}"
    return ""


def flaws(taken: Snapshot) -> Iterator[str]:
    """What is wrong with the sessions and the table of their ends, one sentence each."""
    for key, session in taken.sessions.items():
        flaw = flaw_of(taken, key, session)
        if flaw:
            yield f"session {key.id!r} {flaw}"
    meant = meant_ends(taken.sessions)
    for end in sorted(taken.ends - meant):
        yield f"the end {end.hex()} is of no session"
    for end in sorted(meant - taken.ends):
        yield f"the end {end.hex()} of a session is missing"


def sound_sessions(taken: Snapshot) -> dict[SessionKey, Session]:
    """The sessions that nothing is wrong with."""
    return {
        key: session
        for key, session in taken.sessions.items()
        if not flaw_of(taken, key, session)
    }  # fmt: skip


def meant_ends(sessions: dict[SessionKey, Session]) -> frozenset[bytes]:
    """The keys that the table of ends has for *sessions*."""
    return frozenset(key.end_at(session.head) for key, session in sessions.items())


def _standing(taken: Snapshot, model: int, head: bytes) -> bytes:
    """The packed key of the block that stands for a prefix hash."""
    layout = taken.layout(model)
    spine = 0 if layout is None else layout.spine
    return BlockKey(ModelId(model), PrefixHash(head), spine, 0).pack()


def _rows(taken: Snapshot, keys: list[bytes]) -> IntArray:
    """The rows of *keys*, -1 where there is none."""
    if not len(taken) or not keys:
        return np.full(len(keys), -1, np.int64)
    wanted = np.array(keys, KEY_DTYPE)
    at = np.minimum(np.searchsorted(taken.keys, wanted), len(taken) - 1)
    return np.where(taken.keys[at] == wanted, at, -1)


def meant_classes(taken: Snapshot) -> IntArray:
    """The class of every block: the highest of the sessions that end at it or below it."""
    own = np.full(len(taken), NO_CLASS, np.int64)
    if not len(taken):
        return own
    size = 4
    heads = [
        _standing(taken, int.from_bytes(name[:size], "big"), name[size:])
        for name in (taken.heads[at : at + 1].tobytes() for at in range(len(taken.heads)))
    ]
    rows = _rows(taken, heads)
    own[rows[rows >= 0]] = STANDARD
    said: dict[int, int] = {}
    ends = [_standing(taken, key.model, session.head) for key, session in taken.sessions.items()]
    for row, session in zip(_rows(taken, ends).tolist(), taken.sessions.values(), strict=True):
        said[row] = max(said.get(row, NO_CLASS), min(session.retention, PINNED))
    said.pop(-1, None)
    own[list(said)] = list(said.values())
    best = _risen(taken, own)
    keys = taken.key_bytes.copy()
    keys[:, 20:] = 0
    for record in taken.models.values():
        keys[taken.model == record.id, 20] = record.layout.spine
    wanted = keys.view(KEY_DTYPE).ravel()
    at = np.minimum(np.searchsorted(taken.keys, wanted), len(taken) - 1)
    stands = taken.keys[at] == wanted
    best = np.where(stands, best[at], best)
    given = np.minimum(taken.rows["retention"].astype(np.int64), NOBODY)
    uncovered = best == NO_CLASS
    return np.where(uncovered, np.where(stands, given[at], given), best)


def _risen(taken: Snapshot, own: IntArray) -> IntArray:
    """The highest of *own* at or below every row."""
    best, above = own.copy(), taken.parent_row
    missing = np.zeros(len(taken), np.int64)
    np.add.at(missing, above[above >= 0], 1)
    frontier = np.flatnonzero(missing == 0)
    while len(frontier):
        inner = frontier[above[frontier] >= 0]
        parents = above[inner]
        np.maximum.at(best, parents, best[inner])
        np.subtract.at(missing, parents, 1)
        touched = np.unique(parents)
        frontier = touched[missing[touched] == 0]
    return best


def wrong_in_memory(core: Core, taken: Snapshot) -> Iterator[str]:
    """Blocks whose class in memory is not the one that the tables mean.

    Of a warehouse in use, so only what stays wrong over several looks counts.
    """
    wrong = _differing(core, taken)
    for _ in range(LOOKS - 1):
        if not wrong:
            return
        core.metadata.submit(lambda _: None).result()  # memory has followed all commits before
        with core.metadata.read() as view:
            taken = take_snapshot(view)
        again = _differing(core, taken)
        wrong = {key: text for key, text in again.items() if key in wrong}
    yield from wrong.values()


def _differing(core: Core, taken: Snapshot) -> dict[bytes, str]:
    """By packed key, what is wrong with the class in memory of the blocks that are there."""
    meant = meant_classes(taken)
    slots = taken.rows["slot"].astype(np.int64)
    with core.lock:
        here = len(core.slots)
        known = slots < here
        at = np.where(known, slots, 0)
        same = known & (core.slots.state[at] == LIVE)
        mine = core.slots.key[at].view(np.dtype(f"S{core.slots.key.dtype.itemsize}"))
        same &= mine == taken.keys
        has = core.slots.retention[at].copy()
    return {
        taken.keys[row : row + 1].tobytes(): (
            f"block {taken.name(row)} has class {has[row]} in memory, and the highest of the "
            f"sessions over it is {meant[row]}"
        )
        for row in np.flatnonzero(same & (has != meant)).tolist()
    }

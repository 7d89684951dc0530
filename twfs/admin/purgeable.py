"""Which blocks a purge takes: those that it names, and that nobody else needs.

A block stays where a block below it stays. Chosen under the lock in one step, and condemned there
and then: nobody matches them any more.
"""

from dataclasses import dataclass, field

import numpy as np

from twfs.core.state import Core
from twfs.errors import NoSuchBlock, NoSuchModel
from twfs.eviction.evicting import condemn
from twfs.index import slots as states
from twfs.index.slots import NONE, IntArray
from twfs.layout import FILES_NAME
from twfs.metadata.sessions import ending_at, every, find
from twfs.metadata.tables import ReadView
from twfs.policy.accesses import Chooser
from twfs.records import BlockKey
from twfs.units import ALIGN, HASH_BYTES, ModelId, PrefixHash

End = tuple[ModelId, int, str, str]  # model, tenant, the engine's id or "", the head in hex


@dataclass(frozen=True, slots=True)
class Row:
    """A purge as the metadata keeps it; *ends* are the sessions that it names, if it names any."""

    number: int
    asked_ms: int
    model: str | None
    tenant: int | None
    before_ms: int | None  # only what was not used from then on
    overwrite: bool
    free_space: bool
    ends: tuple[End, ...] | None = None


@dataclass(slots=True)
class Chosen:
    """Slots that go, or keys of them in order; and how much stays because others need it."""

    slots: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    parents: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: list[BlockKey] = field(default_factory=list)
    blocks: int = 0
    byte_count: int = 0
    shared_blocks: int = 0
    shared_bytes: int = 0


def check_model(core: Core, row: Row) -> None:
    """Raise NoSuchModel unless the model of *row*, if it names one, is there; files are none."""
    with core.lock:
        if row.model is not None and (row.model not in core.current or row.model == FILES_NAME):
            raise NoSuchModel(f"no model {row.model[:200]!r}; files are removed in the mount")


def ends_of(core: Core, row: Row, session: str) -> tuple[End, ...]:
    """The sessions that *session* names, an engine's id or MODEL/HASH; NoSuchBlock."""
    name, _, digits = session.rpartition("/")
    found: list[End] = []
    with core.lock, core.metadata.read() as view:
        model = core.current.get(name)
        if model is not None and len(digits) == 2 * HASH_BYTES and _is_hex(digits):
            found = _ends_at(core, view, model, PrefixHash(bytes.fromhex(digits)))
        found += [
            (key.model, key.tenant, key.id.decode(), known.head.hex())
            for key, known in every(view)
            if key.named and key.id == session.encode()
        ]
        found = [
            end for end in found
            if end[0] in core.models
            and (row.tenant is None or end[1] == row.tenant)
            and (row.model is None or core.models[end[0]].name == row.model)
            and core.models[end[0]].name != FILES_NAME
        ]  # fmt: skip
    if not found:
        raise NoSuchBlock(f"no session {session[:200]!r}: give MODEL/HASH, or an engine's id")
    return tuple(found)


def _is_hex(text: str) -> bool:
    return all(each in "0123456789abcdef" for each in text)


def _ends_at(core: Core, view: ReadView, model: ModelId, head: PrefixHash) -> list[End]:
    """The sessions that end at *head*: those with an id, and the one that has none."""
    block = view.block(BlockKey(model, head, core.models[model].layout.spine, 0))
    if block is None:
        return []
    named = [key for key in ending_at(view, model, head) if key.named]
    return [
        *((key.model, key.tenant, key.id.decode(), head.hex()) for key in named),
        (model, block.tenant, "", head.hex()),
    ]


def choose(core: Core, row: Row, *, condemn: bool, resumed: bool = False) -> Chosen:
    """What *row* takes, condemned unless it is only counted. Hold the lock.

    *resumed*: what was published since the purge was asked for stays.
    """
    if row.ends is not None:
        return _of_sessions(core, row, really=condemn)
    slots, here = core.slots, len(core.slots)
    models = [
        record.id for record in core.models.values()
        if row.model in {None, record.name} and record.name != FILES_NAME
    ]  # fmt: skip
    live = slots.state[:here] == states.LIVE
    mine = live & np.isin(slots.models(), models)
    shared = np.zeros(here, np.bool_)
    if row.tenant is not None:
        own = slots.tenant[:here] == row.tenant
        shared = mine & ~own & (slots.payer[:here] == row.tenant)
        mine &= own
    if row.before_ms is not None:
        used = np.maximum(slots.stamp[:here], np.uint64(slots.known_from_ms))
        mine &= used < np.uint64(row.before_ms)
        shared &= mine
    if resumed:
        _spare_later(core, row, mine)
    stays = _above(slots.parent[:here], live & ~mine)
    shared |= mine & stays
    mine &= ~stays
    gone = np.flatnonzero(mine)
    if condemn:
        slots.state[gone] = states.CONDEMNED
    units = slots.units[:here].astype(np.int64)
    return Chosen(
        gone, slots.parent[gone].astype(np.int64), [], len(gone), int(units[gone].sum()) * ALIGN,
        int(shared.sum()), int(units[shared].sum()) * ALIGN,
    )  # fmt: skip


def accesses_of(core: Core, row: Row) -> Chooser:
    """What of the access record goes with *row*, whatever blocks it is of. Hold the lock.

    All of its tenant and model, till it was asked for: also of epochs that are gone, where it names
    a model. Of sessions and what is old only what is of blocks that go: rows say of neither.
    """
    stay = [
        record.id for record in core.models.values()
        if row.model not in {None, record.name} or record.name == FILES_NAME
    ]  # fmt: skip

    def chooser(rows: IntArray) -> IntArray:
        if row.ends is not None or row.before_ms is not None:
            return np.zeros(len(rows), np.bool_)
        gone = ~np.isin(rows["model"], stay)
        if row.tenant is not None:
            gone &= rows["tenant"] == row.tenant
        if "time_ms" in (rows.dtype.names or ()):
            gone &= rows["time_ms"] <= row.asked_ms
        return gone

    return chooser


def _spare_later(core: Core, row: Row, mine: IntArray) -> None:
    """Take out of *mine* what was published after the purge was asked for."""
    with core.metadata.read() as view:
        for slot in np.flatnonzero(mine).tolist():
            block = view.block(core.slots.key_of(slot))
            if block is None or block.published_ms > row.asked_ms:
                mine[slot] = False


def _above(parent: IntArray, marked: IntArray) -> IntArray:
    """*marked* blocks, and all above them."""
    found = marked.copy()
    rising = np.flatnonzero(marked)
    while len(rising):
        up = parent[rising]
        up = np.unique(up[up != NONE])
        rising = up[~found[up]]
        found[rising] = True
    return found


def _of_sessions(core: Core, row: Row, *, really: bool) -> Chosen:
    """The blocks that nobody but the sessions of *row* uses, deepest first."""
    chosen, slots = Chosen(), core.slots
    mine = {(end[0], PrefixHash(bytes.fromhex(end[3]))) for end in row.ends or ()}
    ids = {(end[0], end[1], end[2]) for end in row.ends or ()}
    for model, head in sorted(mine):
        record = core.models.get(model)
        if record is None:
            continue
        with core.metadata.read() as view:
            block = view.block(BlockKey(model, head, record.layout.spine, 0))
            if block is None or slots.state[block.slot] != states.LIVE:
                continue
            line = slots.ancestors(block.slot)
            others = [
                key for key in ending_at(view, model, head)
                if key.named and (key.model, key.tenant, key.id.decode()) not in ids
                and find(view, key) is not None
            ]  # fmt: skip
            alone = view.is_head(model, head) and not others
            own = [
                slot for slot in line
                if alone and slots.over[slot].sum() == 1 and slots.state[slot] == states.LIVE
            ]  # fmt: skip
            stays = [slot for slot in line if slot not in set(own)]
            chosen.shared_blocks += len(stays)
            chosen.shared_bytes += int(slots.units[stays].sum()) * ALIGN
            hashes = [slots.key_of(slot).prefix_hash for slot in own]
            if hashes:
                for group in range(len(record.layout.groups)):
                    for shard in range(record.layout.shards):
                        chosen.keys += condemn(
                            core, view, hashes, BlockKey(model, head, group, shard)
                        )
            chosen.blocks = len(chosen.keys)
            known = [view.block(key) for key in chosen.keys]
            chosen.byte_count = sum(each.device_bytes for each in known if each is not None)
    if not really:
        core.revive(chosen.keys)
    return chosen


def in_order(core: Core, chosen: Chosen) -> list[BlockKey]:
    """The keys of what goes: one model's together, those below before what is above them."""
    if chosen.keys or not len(chosen.slots):
        return chosen.keys
    place = {slot: at for at, slot in enumerate(chosen.slots.tolist())}
    up = np.array([place.get(parent, -1) for parent in chosen.parents.tolist()], np.int64)
    rows = np.arange(len(up))
    depth = (up >= 0).astype(np.int64)
    jump = np.where(up >= 0, up, rows)
    while True:  # each turn doubles how far it looks up
        further = depth[jump]
        if not further.any():
            break
        depth, jump = depth + further, jump[jump]
    keys = [core.slots.key_of(slot) for slot in chosen.slots.tolist()]
    order = sorted(rows.tolist(), key=lambda at: (keys[at].model, -depth[at]))
    return [keys[at] for at in order]

"""Who uses how much of the devices: `twfs du`. Sums that add up to what is used, to the byte.

The arrays are copied under the lock, which takes milliseconds for a million blocks; all else is
numpy over the copy. Blocks a second or so for a million blocks, and nobody meanwhile.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Final

import msgspec
import numpy as np

from twfs.core.operating import Verb, Verbs
from twfs.core.state import Core
from twfs.index import slots as states
from twfs.index.slots import KEY_BYTES, IntArray
from twfs.metadata.tables import RETIRED, ModelRecord
from twfs.units import ALIGN, DeviceIndex, ModelId

ROWS_MAX: Final = 10_000  # of one answer; the rest is one sum
COPIED: Final = ("key", "parent", "links", "units", "payer", "tenant", "position", "state")
HASH_AT: Final = slice(4, 20)  # of a packed key


class By(StrEnum):
    """What the rows of a usage are of."""

    TENANT = "tenant"
    MODEL = "model"
    SESSION = "session"


class AskUsage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `du` takes."""

    by: By = By.TENANT
    limit: Annotated[int, msgspec.Meta(ge=1, le=ROWS_MAX)] = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """What one tenant, model or session takes on the devices, headers and padding included.

    *shared_bytes* are of blocks that others have too: of a tenant those of its share group that it
    is charged for, so they are nobody else's row; of a session all that it has in common with
    others, so they are in several rows.
    """

    name: str
    blocks: int
    exclusive_bytes: int
    shared_bytes: int
    tenant: str | None = None
    model: str | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """All that is used on all devices; see `adds_up`."""

    by: By
    rows: list[Row]  # the largest first
    other_rows: int  # behind these, how many
    other_bytes: int  # and what they take: of sessions exclusively
    shared_once_bytes: int  # of sessions: what several have, each block once; else in the rows
    no_session_bytes: int  # of sessions: of blocks below no head, waiting for others
    blocks: int
    block_bytes: int
    payload_bytes: int  # where layouts allow any length, with the padding
    header_bytes: int
    padding_bytes: int
    leaving_bytes: int  # of blocks that are being removed
    limbo_bytes: int  # of blocks removed or moved, which leases may read still
    retired_bytes: int  # bytes were lost there, so they are never used again
    reserved_bytes: int  # for puts under way
    transit_bytes: int  # freed or taken by what is just being committed; at rest 0
    used_bytes: int
    total_bytes: int

    @property
    def adds_up(self) -> bool:
        """Whether rows and lines give exactly what is used."""
        own = sum(row.exclusive_bytes for row in self.rows) + self.other_bytes
        if self.by is not By.SESSION:
            own += sum(row.shared_bytes for row in self.rows)
        return (
            own + self.shared_once_bytes + self.no_session_bytes
            == self.block_bytes
            == self.payload_bytes + self.header_bytes + self.padding_bytes
        ) and self.block_bytes + self.leaving_bytes + self.limbo_bytes + self.retired_bytes + (
            self.reserved_bytes + self.transit_bytes
        ) == self.used_bytes


@dataclass(slots=True)
class _Taken:
    """A copy of what the lock guards; arrays of the slots in use, one row each."""

    key: IntArray
    parent: IntArray
    links: IntArray
    units: IntArray
    payer: IntArray
    tenant: IntArray
    position: IntArray
    state: IntArray
    models: dict[ModelId, ModelRecord]
    names: dict[int, str]
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def live(self) -> IntArray:
        """Tell which slots have a published block."""
        return np.asarray(self.state == states.LIVE)

    @property
    def bytes(self) -> IntArray:
        """What each block takes."""
        return self.units.astype(np.int64) * ALIGN

    def columns(self) -> tuple[IntArray, IntArray, IntArray]:
        """Model, group and shard of each block."""
        raw = self.key.view(np.uint8).reshape(len(self.key), KEY_BYTES)
        model = np.ascontiguousarray(raw[:, :4]).view(">u4").ravel().astype(np.int64)
        shard = np.ascontiguousarray(raw[:, 21:23]).view(">u2").ravel().astype(np.int64)
        return model, raw[:, 20].astype(np.int64), shard


def usage(core: Core, by: By = By.TENANT, limit: int = 1000) -> Usage:
    """What takes how much of the devices; the *limit* largest rows, at most ROWS_MAX."""
    taken, limit = _take(core), min(limit, ROWS_MAX)
    live = np.flatnonzero(taken.live)
    if by is By.SESSION:
        return _by_session(taken, live, limit)
    rows = _by_tenant(taken, live) if by is By.TENANT else _by_model(taken, live)
    rows.sort(key=lambda row: (-row.exclusive_bytes - row.shared_bytes, row.name))
    left = rows[limit:]
    other = (len(left), sum(row.exclusive_bytes + row.shared_bytes for row in left))
    return _usage(taken, live, by, rows[:limit], other)


def _take(core: Core) -> _Taken:
    """Copy what is needed, at one moment."""
    with core.lock, core.metadata.read() as view:
        slots, here = core.slots, len(core.slots)
        arrays = {name: getattr(slots, name)[:here].copy() for name in COPIED}
        taken = _Taken(**arrays, models=dict(core.models), names={})
        left = [e for places in core.left.values() for each in places for e in each.extents]
        removed = [e for held in core.limbo.values() for e in held]
        total = sum(each.record.data_area[1] for each in core.standings.all.values())
        free = sum(core.allocator.free_bytes_of(DeviceIndex(index)) for index in core.standings.all)
        taken.names = {int(n): core.tenants.name_of(int(n)) for n in np.unique(taken.payer)}
        retired = sum(extent.length for extent, why in view.all_limbo() if why == RETIRED)
        taken.lines = {
            "limbo_bytes": sum(extent.length for extent in [*left, *removed, *core.doomed]),
            "retired_bytes": retired,
            "reserved_bytes": core.reserved_bytes,
            "used_bytes": total - free,
            "total_bytes": total,
        }
    going = taken.state == states.CONDEMNED
    taken.lines["leaving_bytes"] = int(taken.bytes[going].sum())
    return taken


def _usage(
    taken: _Taken, live: IntArray, by: By, rows: list[Row], other: tuple[int, int], *,
    shared_once: int = 0, no_session: int = 0,
) -> Usage:  # fmt: skip
    """All figures around *rows*; *other* has the number and bytes of rows that were left out."""
    lines, total = taken.lines, int(taken.bytes[live].sum())
    payload, headers = _payload_bytes(taken, live)
    known = sum(
        lines[name] for name in ("leaving_bytes", "limbo_bytes", "retired_bytes", "reserved_bytes")
    )
    return Usage(
        by, rows, *other, shared_once, no_session, len(live), total,
        payload, headers, total - payload - headers,
        transit_bytes=lines["used_bytes"] - total - known, **lines,
    )  # fmt: skip


def _payload_bytes(taken: _Taken, live: IntArray) -> tuple[int, int]:
    """Bytes of payloads, and of headers, of the blocks that have any."""
    model, group, _ = taken.columns()
    there = live[taken.units[live] > 0]  # a hole has none
    payload = 0
    pairs, which = np.unique(model[there] << 16 | group[there], return_inverse=True)
    counts = np.bincount(which.reshape(-1), minlength=len(pairs))
    whole = np.bincount(
        which.reshape(-1), weights=taken.bytes[there].astype(np.float64), minlength=len(pairs)
    )
    for pair, count, total in zip(pairs.tolist(), counts.tolist(), whole.tolist(), strict=True):
        layout = taken.models[ModelId(pair >> 16)].layout
        if layout.any_length(pair & 0xFFFF):
            payload += int(total) - count * ALIGN
        else:
            payload += count * layout.block_bytes(pair & 0xFFFF)
    return payload, len(there) * ALIGN


def _by_tenant(taken: _Taken, live: IntArray) -> list[Row]:
    """One row for each tenant that is charged for anything, and for groups with unpaid blocks."""
    payer, sizes = taken.payer[live].astype(np.int64), taken.bytes[live]
    shared = taken.tenant[live] != payer
    rows = []
    for number in np.unique(payer).tolist():
        mine = payer == number
        rows.append(
            Row(
                taken.names[number], int(mine.sum()), int(sizes[mine & ~shared].sum()),
                int(sizes[mine & shared].sum()), tenant=taken.names[number],
            )
        )  # fmt: skip
    return rows


def _by_model(taken: _Taken, live: IntArray) -> list[Row]:
    """One row for each model; an epoch that is over has its own. No block is of two models."""
    model, _, _ = taken.columns()
    model, sizes = model[live], taken.bytes[live]
    newest: dict[str, int] = {}
    for record in taken.models.values():
        newest[record.name] = max(newest.get(record.name, 0), record.epoch)
    rows = []
    for number in np.unique(model).tolist():
        record, mine = taken.models[ModelId(number)], model == number
        over = record.epoch < newest[record.name]
        name = f"{record.name} (epoch {record.epoch}, over)" if over else record.name
        rows.append(Row(name, int(mine.sum()), int(sizes[mine].sum()), 0, model=record.name))
    return rows


def _by_session(taken: _Taken, live: IntArray, limit: int) -> Usage:
    """One row for each head; what several have in common is a line of its own."""
    standing = _standing(taken, live)
    count = len(taken.key)
    sizes, blocks = np.zeros(count, np.int64), np.zeros(count, np.int64)
    np.add.at(sizes, standing, taken.bytes[live])
    np.add.at(blocks, standing, 1)
    links = taken.links.astype(np.int64)
    once = int(sizes[links > 1].sum())
    nowhere = int(sizes[links < 1].sum())
    # A head is counted at itself, and not at any block below.
    beneath = np.zeros(count, np.int64)
    child = np.flatnonzero(taken.live & (taken.parent != states.NONE))
    np.add.at(beneath, taken.parent[child], links[child])
    heads = np.flatnonzero(taken.live & (links > beneath))
    exclusive, whole, chain = _sums_above(
        taken.parent, heads, np.where(links == 1, sizes, 0), sizes, blocks
    )
    order = np.lexsort((heads, -whole))[:limit]
    model, _, _ = taken.columns()
    rows = []
    for at in order.tolist():
        slot = int(heads[at])
        rows.append(
            Row(
                taken.key[slot].tobytes()[HASH_AT].hex(), int(chain[at]), int(exclusive[at]),
                int(whole[at] - exclusive[at]),
                tenant=taken.names.get(int(taken.payer[slot])),
                model=taken.models[ModelId(int(model[slot]))].name,
                tokens=int(taken.position[slot]),
            )
        )  # fmt: skip
    left = int(exclusive.sum()) - sum(row.exclusive_bytes for row in rows)
    other = (len(heads) - len(rows), left)
    return _usage(taken, live, By.SESSION, rows, other, shared_once=once, no_session=nowhere)


def _sums_above(parent: IntArray, heads: IntArray, *weights: IntArray) -> tuple[IntArray, ...]:
    """For each of *heads* the sums of *weights* over it and all its ancestors.

    The height looked at doubles with each round, so there are as many as the depth has bits.
    """
    count = len(parent)
    up = np.append(np.where(parent == states.NONE, count, parent), count).astype(np.int64)
    sums = [np.append(each, 0) for each in weights]
    while (up != count).any():
        sums = [each + each[up] for each in sums]
        up = up[up]
    return tuple(each[heads] for each in sums)


def _standing(taken: _Taken, live: IntArray) -> IntArray:
    """For each of *live* the slot of the block that stands for its prefix hash, else itself."""
    found = live.copy()
    model, group, shard = taken.columns()
    spine = {number: record.layout.spine for number, record in taken.models.items()}
    parted = [
        number
        for number, record in taken.models.items()
        if len(record.layout.groups) * record.layout.shards > 1
    ]
    among = np.flatnonzero(np.isin(model[live], parted))
    if not len(among):
        return found
    mine = live[among]
    raw = np.ascontiguousarray(
        taken.key.view(np.uint8).reshape(len(taken.key), KEY_BYTES)[mine, HASH_AT]
    )
    high, low = raw.view(">u8").reshape(-1, 2).T
    of = model[mine]
    stands = (shard[mine] == 0) & (group[mine] == np.array([spine[n] for n in of.tolist()]))
    order = np.lexsort((~stands, low, high, of))  # what stands comes first of its name
    same = np.ones(len(order), np.bool_)
    same[:1] = False
    for column in (of[order], high[order], low[order]):
        same[1:] &= column[1:] == column[:-1]
    lead = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    leader = order[lead]
    found[among[order]] = np.where(stands[leader], mine[leader], mine[order])
    return found


def verbs(core: Core) -> Verbs:
    """What operators ask."""
    return {"du": Verb(AskUsage, lambda asked: usage(core, asked.by, asked.limit))}

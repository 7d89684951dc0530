"""Match, lookup, touch, join: what an engine asks before it reads.

All of it runs in the caller's thread within microseconds a block: batched gets of one snapshot,
and numpy over the records. Nothing here waits.
"""

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twfs.core import metering
from twfs.core.state import Core
from twfs.errors import InvalidInput, LeaseEnded
from twfs.eviction.using import note_touch
from twfs.hints import NO_HINT, Hint, Retention
from twfs.index import slots as states
from twfs.index.leases import Leases, Located
from twfs.layout import GroupKind, Layout
from twfs.metadata.sessions import STANDARD, Request, SessionKey, Touch
from twfs.metadata.tables import ReadView
from twfs.policy.accesses import Kind
from twfs.policy.retention import PINNED
from twfs.prefix import Names
from twfs.records import (
    BLOCK_DTYPE,
    BLOCK_FIXED,
    BLOCK_KEY,
    EXTENT,
    EXTENT_DTYPE,
    FLAG_HOLE,
    LOCATED_DTYPE,
    TENANT,
    TENANT_OFFSET,
    Block,
)
from twfs.store import Explanation
from twfs.tenants import EVERYBODY
from twfs.units import ALIGN, ByteCount, ModelId, PrefixHash, TokenCount

TOUCHES_MAX: Final = 65_536  # of sessions, between two commits: a second's worth and more
BATCH: Final = 512  # gets before looking whether the chain has ended


@dataclass(frozen=True, slots=True)
class Found:
    """Consecutive records of one (group, shard), from the asked-for start on."""

    group: int
    shard: int
    first: int  # index in the names of the first record
    values: list[bytes]
    records: "npt.NDArray[Any]"  # BLOCK_DTYPE
    tenant: int = EVERYBODY
    share: int = EVERYBODY  # the tenant's share group, whose blocks it reaches too; else itself

    def part(self, first: int, stop: int) -> "Found":
        """The records of the indices from *first* up to *stop*."""
        a, b = first - self.first, stop - self.first
        return Found(
            self.group, self.shard, first, self.values[a:b], self.records[a:b], self.tenant,
            self.share,
        )  # fmt: skip


def find(core: Core, view: ReadView, model: ModelId, names: Names, part: Found) -> Found:
    """Return the longest run of usable blocks for the group, shard and first index of *part*.

    Usable: there, not a hole, of the tenant or its share group, of the same digest and key, live in
    memory. Hold the lock.
    """
    before = BLOCK_KEY.pack(model, bytes(16), part.group, part.shard)
    prefix, suffix = before[:4], before[20:]
    hashes = names.hashes
    values: list[bytes] = []
    for at in range(part.first, len(names), BATCH):
        stop = min(at + BATCH, len(names))
        keys = [prefix + hashes[16 * i : 16 * i + 16] + suffix for i in range(at, stop)]
        got = view.raw_blocks(keys)
        values += got
        if len(got) < len(keys):
            break
    size = BLOCK_DTYPE.itemsize
    joined = b"".join([value[:size] for value in values])
    records = np.frombuffer(joined, BLOCK_DTYPE)
    good = usable(core, names, part, values, records)
    return Found(
        part.group, part.shard, part.first, values[:good], records[:good], part.tenant,
        part.share,
    )  # fmt: skip


def usable(
    core: Core, names: Names, part: Found, values: list[bytes], records: "npt.NDArray[Any]"
) -> int:
    """How many leading *records* are live, whole, of *part*'s tenant, and what *names* mean."""
    count, first = len(records), part.first
    if not count:
        return 0
    good = (core.slots.state[records["slot"]] == states.LIVE) & (
        (records["flags"] & FLAG_HOLE) == 0
    )
    if core.standings.offline:
        good &= _on_devices(core, values, records)
    digests = np.ascontiguousarray(records["digest"]).view("<u8").reshape(count, 4)
    wanted = np.frombuffer(names.digests, "<u8", 4 * count, 32 * first).reshape(count, 4)
    same = (digests == wanted).all(axis=1)
    if not same.all():
        core.counters.digest_mismatches += 1
    good &= same & ((records["tenant"] == part.tenant) | (records["tenant"] == part.share))
    if names.keys:
        good &= np.array(
            [
                value[len(value) - size :] == key if size else not key
                for value, size, key in zip(
                    values, records["key_bytes"].tolist(), names.keys[first : first + count],
                    strict=True,
                )
            ]
        )  # fmt: skip
    elif records["key_bytes"].any():
        good &= records["key_bytes"] == 0
    return count if good.all() else int(good.argmin())


def _on_devices(core: Core, values: list[bytes], records: "npt.NDArray[Any]") -> Any:
    """Tell which of *records* lie on devices that are there, with all their extents."""
    offline = list(core.standings.offline)
    there = ~np.isin(records["device"], offline)
    for at in np.flatnonzero(records["extent_count"] > 1).tolist():
        count = int(records["extent_count"][at])
        extents = np.frombuffer(values[at], EXTENT_DTYPE, count, BLOCK_FIXED.size)
        there[at] = not np.isin(extents["device"], offline).any()
    return there


def boundary(layout: Layout, found: list[Found], start: int) -> int:
    """The longest prefix, in blocks, for which every group has what its kind needs."""
    stop = min(
        (
            run.first + len(run.records)
            for run in found
            if layout.groups[run.group].kind is GroupKind.FULL
        ),
        default=start,
    )
    others = [run for run in found if layout.groups[run.group].kind is not GroupKind.FULL]
    while stop > start and not all(_serves(layout, run, stop) for run in others):
        stop -= 1
    return stop


def needed_from(layout: Layout, group: int, stop: int) -> int:
    """The first index that *group* needs for a match that ends behind *stop* blocks."""
    of = layout.groups[group]
    if of.kind is GroupKind.STATE:
        return stop - 1
    if of.window_tokens is not None:
        return max(0, stop - -(-of.window_tokens // layout.block_tokens))
    return 0


def _serves(layout: Layout, run: Found, stop: int) -> bool:
    """Tell whether a sparse group has the blocks that a match of *stop* blocks needs."""
    first = max(needed_from(layout, run.group, stop), run.first)
    wanted = range(first - run.first, stop - run.first)
    return all(i < len(run.values) and bool(run.values[i]) for i in wanted)


def find_sparse(core: Core, view: ReadView, model: ModelId, names: Names, part: Found) -> Found:
    """As find, for groups that need not have every block: absent ones have an empty value."""
    values: list[bytes] = []
    rows = np.zeros(len(names) - part.first, BLOCK_DTYPE)
    for offset, index in enumerate(range(part.first, len(names))):
        key = BLOCK_KEY.pack(model, names.hash_at(index), part.group, part.shard)
        value = view.raw_block(key)
        if value is not None:
            row = np.frombuffer(value[: BLOCK_DTYPE.itemsize], BLOCK_DTYPE)
            if usable(core, names, replace(part, first=index), [value], row):
                rows[offset] = row[0]
                values.append(value)
                continue
        values.append(b"")
    return Found(part.group, part.shard, part.first, values, rows, part.tenant, part.share)


def gather(
    core: Core, model: ModelId, names: Names, start: int, tenant: int
) -> tuple[int, list[Found]]:
    """Return where the longest match ends and, per group and shard, the records it needs.

    Hold the lock: what it returns is live until the lock is let go. InvalidInput if *start* is not
    within the names.
    """
    if not 0 <= start <= len(names):
        raise InvalidInput(f"a match from block {start} of {len(names)}")
    layout = core.model(model).layout
    found = []
    empty = np.zeros(0, BLOCK_DTYPE)
    stop = len(names)
    share = core.tenants.shares.get(tenant, tenant)
    with core.metadata.read() as view:
        order = sorted(
            range(len(layout.groups)), key=lambda g: layout.groups[g].kind is not GroupKind.FULL
        )
        for group in order:
            full = layout.groups[group].kind is GroupKind.FULL
            for shard in range(layout.shards):
                part = Found(group, shard, start, [], empty, tenant, share)
                seek = find if full else find_sparse
                run = seek(core, view, model, names.head(stop), part)
                found.append(run)
                if full:
                    stop = start + len(run.records)
    stop = boundary(layout, found, start)
    needed = [
        run.part(max(start, needed_from(layout, run.group, stop)), stop)
        for run in sorted(found, key=lambda run: (run.group, run.shard))
    ]
    return stop, needed


def rows_of(names: Names, needed: list[Found]) -> "tuple[npt.NDArray[Any], npt.NDArray[Any]]":
    """LOCATED_DTYPE rows of *needed* and their EXTENT_DTYPE extents, in the same order."""
    count = sum(len(run.records) for run in needed)
    rows = np.zeros(count, LOCATED_DTYPE)
    extents: list[npt.NDArray[Any]] = []
    hashes = np.frombuffer(names.hashes, "V16")
    at = 0
    for run in needed:
        here = rows[at : at + len(run.records)]
        for name in ("generation", "payload_bytes", "lane_plain", "lane_weighted", "xxh3",
                     "extent_count"):  # fmt: skip
            here[name] = run.records[name]
        here["prefix_hash"] = hashes[run.first : run.first + len(here)]
        here["group"], here["shard"] = run.group, run.shard
        here["index"] = np.arange(run.first, run.first + len(here))
        extents.append(_extents_of(run))
        at += len(here)
    return rows, np.concatenate(extents) if extents else np.zeros(0, EXTENT_DTYPE)


def _extents_of(run: Found) -> "npt.NDArray[Any]":
    """All extents of *run* in order; nearly always one a block, which numpy copies at once."""
    counts = run.records["extent_count"]
    if (counts == 1).all():
        extents = np.zeros(len(run.records), EXTENT_DTYPE)
        for name in ("offset", "units", "device"):
            extents[name] = run.records[name]
        return extents
    return np.concatenate(
        [
            np.frombuffer(value, EXTENT_DTYPE, count, BLOCK_FIXED.size)
            for value, count in zip(run.values, counts.tolist(), strict=True)
        ]
    )


def match_located(
    core: Core,
    model: ModelId,
    names: Names,
    start: int,
    owner: int,
    *,
    tenant: int = EVERYBODY,
) -> Located | None:
    """Lease the longest match and say where it lies; None if there is none, or its epoch is over.

    It ends where *owner* may lease no more. InvalidInput if *start* is behind the names.
    """
    with core.lock:
        if not core.is_current(model):
            return None
        core.expire()
        core.counters.matches += 1
        core.counters.asked_blocks += len(names) - start
        stop, needed = gather(core, model, names, start, tenant)
        note_match(core, model, names, needed, tenant=tenant, start=start, stop=stop)
        if stop <= start:
            return None
        rows, extents = rows_of(names, needed)
        room_bytes = core.leases.room_bytes(owner)
        if int(extents["units"].sum()) * ALIGN > room_bytes:
            core.counters.shortened_matches += 1
            stop = start + _fitting(rows, extents, start, room_bytes)
            if stop <= start:
                return None
            stop, needed = gather(core, model, names.head(stop), start, tenant)
            if stop <= start:
                return None
            rows, extents = rows_of(names, needed)
        lease_bytes = ByteCount(int(extents["units"].sum()) * ALIGN)
        used = np.concatenate([run.records["slot"] for run in needed]).astype(np.int64)
        located = Located(
            Leases.new_token(), model, start, stop, rows, extents, core.leases.term_ms, tenant
        )
        core.leases.grant(located, used, lease_bytes, owner, core.pin(used))
        core.counters.matched_blocks += stop - start
        _use(core, used, needed)
        layout = core.models[model].layout
        spine = [r.records["slot"] for r in needed if (r.group, r.shard) == (layout.spine, 0)]
        metering.count_match(core, tenant, model, spine[0].astype(np.int64), layout.block_tokens)
        core.slots.note_user(used, tenant, core.tenants.shares.get(tenant, 0))
        return located


def note_match(
    core: Core, model: ModelId, names: Names, needed: list[Found], *, tenant: int, start: int,
    stop: int,
) -> None:  # fmt: skip
    """Enter a match in the access record, under the class of the deepest block found."""
    retention = Retention.STANDARD.rank
    if stop > start and len(needed[-1].records):
        retention = int(core.slots.retention[needed[-1].records["slot"][-1]])
    core.recorder.note(
        Kind.MATCH, model, core.models[model].layout, names.hashes, tenant=tenant,
        retention=retention, start=start, stop=stop,
    )  # fmt: skip


def _fitting(
    rows: "npt.NDArray[Any]", extents: "npt.NDArray[Any]", start: int, room_bytes: int
) -> int:
    """How many leading blocks, all groups and shards of them, take at most *room_bytes*."""
    owner = np.repeat(rows["index"].astype(np.int64) - start, rows["extent_count"])
    needs = np.bincount(owner, weights=extents["units"].astype(np.float64)) * ALIGN
    return int(np.searchsorted(np.cumsum(needs), room_bytes, side="right"))


def _use(core: Core, used: "npt.NDArray[Any]", needed: list[Found]) -> None:
    """Stamp what was matched, and what is before it: the asker held that itself."""
    now = core.clock()
    core.slots.use(used, now)
    core.slots.stop[used] = 0  # the session is back: how its request ends is not known yet
    core.slots.back_ms[used] = 0
    for run in needed:
        if run.first and len(run.records):
            core.slots.use(core.slots.ancestors(int(run.records["slot"][0])), now)


def lookup_blocks(
    core: Core, model: ModelId, names: Names, start: int, tenant: int = EVERYBODY
) -> int:
    """Where the longest match would end, in blocks; *start* or less means none."""
    with core.lock:
        return gather(core, model, names, start, tenant)[0] if core.is_current(model) else start


def touch_blocks(
    core: Core, model: ModelId, names: Names, tenant: int = EVERYBODY, hint: Hint = NO_HINT
) -> None:
    """Count a use of those of *names* that are there, and note how the request ended."""
    with core.lock:
        if not core.is_current(model):
            return
        held, needed = gather(core, model, names, 0, tenant)
        used = [run.records["slot"] for run in needed if len(run.records)]
        retention = Retention.STANDARD.rank
        if used:
            slots = np.concatenate(used)
            retention = int(core.slots.retention[slots[-1]])
            core.slots.use(slots, core.clock())
            note_touch(core, model, names.hash_at(0), slots, hint, tenant=tenant)
        core.recorder.note(
            Kind.TOUCH, model, core.models[model].layout, names.hashes, tenant=tenant,
            retention=retention, stop=0 if hint.stop is None else hint.stop.code, held=bool(used),
        )  # fmt: skip
        if held and (hint.session or hint.retention is not None):
            note_session(core, model, tenant, names.hash_at(held - 1), hint)


def note_session(core: Core, model: ModelId, tenant: int, head: PrefixHash, hint: Hint) -> None:
    """Remember what a touch says of its session, for one commit with many others. Hold the lock."""
    named = bool(hint.session)
    key = (
        SessionKey.of(model, tenant, hint.session)
        if named
        else SessionKey.without_id(model, tenant, head)
    )
    if key not in core.asked and len(core.asked) >= TOUCHES_MAX:
        core.counters.lost_touches += 1
        return
    before = core.asked.get(key)
    wanted = None if hint.retention is None else hint.retention.rank
    if wanted is None and before is not None:
        wanted = before.wanted
    # What is to be pinned has to be promised first: that is done when the class is set.
    retention = STANDARD if wanted is None or wanted == PINNED else wanted
    asked = Request(
        tenant, hint.session, retention, [head], core.clock(), core.tenants.shares.get(tenant, 0),
        only_named=True,
    )  # fmt: skip
    core.asked[key] = Touch(asked, wanted)


def join_located(core: Core, token: bytes, owner: int) -> Located:
    """Let *owner* hold another's lease too; LeaseEnded, TooLarge.

    LeaseEnded too for a user who may not act for the lease's tenant any more.
    """
    with core.lock:
        core.expire()
        tenant = core.leases.tenant_of(token)
        if tenant is not None and not core.tenants.may_act(core.leases.uid_of(owner), tenant):
            raise LeaseEnded("the lease is over, or belongs to another user")
        return core.leases.join(token, owner)


def explain(core: Core, model: ModelId, names: Names, tenant: int = EVERYBODY) -> Explanation:
    """Say why *names* are a hit as far as they are, and what is wrong behind."""
    with core.lock:
        if not core.is_current(model):
            cause = "this epoch of the model is over: all its blocks are misses"
            return Explanation(0, TokenCount(0), len(names), names.hash_at(0), cause)
        stop, _ = gather(core, model, names, 0, tenant)
    tokens = TokenCount(names.positions[stop - 1] if stop else 0)
    if stop == len(names):
        return Explanation(stop, tokens, len(names), None, "every block asked for is held")
    return Explanation(
        stop, tokens, len(names), names.hash_at(stop), _cause(core, model, names, stop, tenant)
    )


def _cause(core: Core, model: ModelId, names: Names, index: int, tenant: int) -> str:
    """Why block *index* is a miss, in one sentence."""
    layout = core.models[model].layout
    with core.metadata.read() as view:
        for group, of in enumerate(layout.groups):
            for shard in range(layout.shards):
                where = f"block {index} (group {group}, shard {shard})"
                if of.kind is not GroupKind.FULL:
                    continue
                raw = view.raw_block(BLOCK_KEY.pack(model, names.hash_at(index), group, shard))
                # One of another tenant is no different from none to who asks.
                reached = (tenant, core.tenants.shares.get(tenant, tenant))
                if raw is None or TENANT.unpack_from(raw, TENANT_OFFSET)[0] not in reached:
                    return f"{where} is not in the store: never put, evicted or removed"
                row = np.frombuffer(raw[: BLOCK_DTYPE.itemsize], BLOCK_DTYPE)[0]
                if int(row["flags"]) & FLAG_HOLE:
                    return f"{where} is a hole: its bytes were lost, the next put fills it"
                if row["digest"].tobytes() != names.digests[32 * index : 32 * index + 32]:
                    return f"{where} has another digest: two prefixes share this name"
                if core.slots.state[int(row["slot"])] != states.LIVE:
                    return f"{where} is just being evicted"
                for extent in Block.unpack(raw).extents:
                    if extent.device in core.standings.offline:
                        return f"{where} lies on device {extent.device}, which is offline"
    return (
        f"a window or state group lacks what a match of {index + 1} blocks needs: "
        "its blocks were never put at this boundary, or were evicted"
    )


assert EXTENT.size == EXTENT_DTYPE.itemsize

"""Making room: eviction by rank, score and depth, removal of sessions, old epochs, lost blocks.

Only a block without child and without lease is evicted, so a chain loses its tail and never its
middle (invariant I18 of FORMAT.md). Victims are chosen in one step under the lock, together with
the lease check, and are condemned there and then: nobody matches them any more.
"""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from itertools import islice
from typing import Any, Final

import numpy as np

from twfs.core import metering
from twfs.core.state import Core
from twfs.devices.payload import read_payload
from twfs.errors import BadPayload, DeviceError, NoSuchBlock, NotEmpty
from twfs.eviction import quotas, sharing
from twfs.eviction.choosing import Newcomer, choose_blocks, choose_expired, victims
from twfs.index import slots as states
from twfs.layout import Layout
from twfs.metadata import ledger
from twfs.metadata.filerows import FileRow
from twfs.metadata.tables import ReadView, WriteView
from twfs.policy.retention import PINNED
from twfs.records import Block, BlockKey
from twfs.units import ByteCount, ModelId, PrefixHash

VICTIMS_PER_COMMIT: Final = 2048  # about 30 ms of transaction: readers of the tables never notice
LOW_WATER_PARTS: Final = 256  # of the space, kept free ahead of demand: what is free holds nothing
LOOK_MS_MAX: Final = 60_000  # between two looks for blocks whose time to live is over
LOW_WATER_BYTES_MAX: Final = 8 << 30


def low_water_bytes(core: Core) -> int:
    """Free bytes below which eviction begins in the background."""
    return min(core.allocator.allotted_bytes // LOW_WATER_PARTS, LOW_WATER_BYTES_MAX)


def submit_eviction(
    core: Core, wanted_bytes: int, *, erase: bool = False, payer: int | None = None,
    newcomer: Newcomer | None = None,
) -> "list[Future[ledger.Removed]]":  # fmt: skip
    """Choose victims worth *wanted_bytes* and queue their removal; see choosing.py.

    One future per transaction. The lock is let go after every so many victims, unless the caller
    holds it: nobody waits for longer than it takes to look at all blocks once, or to choose those.
    """
    chosen = victims(core, wanted_bytes, payer=payer, newcomer=newcomer)
    futures: list[Future[ledger.Removed]] = []
    while True:
        with core.lock:
            keys = [core.slots.key_of(slot) for slot in islice(chosen, VICTIMS_PER_COMMIT)]
            # One model's together, or victims of two models by turns would be a transaction each.
            keys.sort(key=lambda key: key.model)
            futures += submit_condemned(core, keys, evicted=True, erase=erase)
        if len(keys) < VICTIMS_PER_COMMIT:
            return futures


def submit_condemned(
    core: Core, keys: list[BlockKey], *, evicted: bool, erase: bool = False
) -> "list[Future[ledger.Removed]]":
    """Queue the removal of condemned *keys*, in order; one transaction holds one model's.

    With *erase* their headers are overwritten before the extents are handed out. Hold the lock.
    """
    if erase:
        with core.metadata.read() as view:
            core.to_erase.update(
                block.slot for block in map(view.block, keys) if block is not None and block.extents
            )
    futures = []
    start = 0
    for stop in range(1, len(keys) + 1):
        whole = stop == len(keys) or stop - start == VICTIMS_PER_COMMIT
        if whole or keys[stop].model != keys[start].model:
            model = core.models[keys[start].model]
            futures.append(core.submit_removal(model, keys[start:stop], evicted=evicted))
            start = stop
    return futures


def freed_bytes(futures: "list[Future[ledger.Removed]]") -> ByteCount:
    """Wait for removals; bytes of the blocks they removed."""
    return ByteCount(
        sum(
            block.device_bytes
            for future in futures
            for _, block in future.result().blocks
        )
    )  # fmt: skip


def evict(core: Core, wanted_bytes: int) -> ByteCount:
    """Evict about *wanted_bytes*; blocks until it is durable; returns what was evicted."""
    return freed_bytes(submit_eviction(core, wanted_bytes))


def keep_low_water(core: Core) -> None:
    """Begin to evict in the background if less than the low-water mark is free."""
    with core.lock:
        missing = low_water_bytes(core) - core.allocator.free_bytes
        if missing <= 0 or core.evicting:
            return
        core.evicting += 1  # this choice, which others need not make too
    try:
        futures = submit_eviction(core, 2 * missing)
        with core.lock:
            core.evicting += len(futures)
        for future in futures:
            future.add_done_callback(lambda _: _one_done(core))
    finally:
        _one_done(core)


def _one_done(core: Core) -> None:
    with core.lock:
        core.evicting -= 1


def sweep_expired(core: Core) -> "list[Future[ledger.Removed]]":
    """Begin to evict blocks whose time to live is over; a transaction's worth of them.

    Between two looks that found something it only asks the clock. Blocks of devices that are
    offline stay: they make no room, and are found again.
    """
    with core.lock:
        now_ms = core.clock()
        if now_ms < core.next_expiry_ms or core.evicting:
            return []
        core.expire()
        slots = core.slots
        leaves = slots.leaves()
        there = ~np.isin(slots.device[leaves], list(core.standings.offline))
        leaves = leaves[there & (slots.retention[leaves] != PINNED)]
        ends = core.terms.ends(slots, leaves)
        over = ends <= np.uint64(now_ms)
        core.next_expiry_ms = now_ms + LOOK_MS_MAX
        if not over.any():
            if len(ends):
                core.next_expiry_ms = min(core.next_expiry_ms, int(ends.min()))
            return []
        core.next_expiry_ms = 0
        gone = choose_expired(core, leaves[over], VICTIMS_PER_COMMIT)
        core.counters.expired_blocks += len(gone)
        keys = [slots.key_of(slot) for slot in gone]
        keys.sort(key=lambda key: key.model)
        return submit_condemned(core, keys, evicted=True)


def keep_quota(core: Core, tenant: int) -> None:
    """Begin to evict of *tenant* in the background if its quota is nearly used up, or was cut."""

    def done(_: object) -> None:
        with core.lock:
            core.trimming[tenant] -= 1

    with core.lock:
        above = quotas.above_low_water_bytes(core, tenant)
        if above and not core.trimming[tenant]:
            futures = submit_own(core, tenant, above)
            core.trimming[tenant] += len(futures)
            for future in futures:
                future.add_done_callback(done)


def submit_own(
    core: Core, tenant: int, wanted_bytes: int, newcomer: Newcomer | None = None
) -> "list[Future[Any]]":
    """Begin to make room within the quota of *tenant*; what to wait for. Hold the lock.

    Charges pass to those who used a public block later, then its own blocks are evicted; what of
    these may not go may at last be charged to whoever used it at all.
    """
    going, passing = sharing.let_go(core, tenant, wanted_bytes)
    if passing < wanted_bytes:
        going += submit_eviction(core, wanted_bytes - passing, payer=tenant, newcomer=newcomer)
    return going or sharing.let_go(core, tenant, wanted_bytes, lent=False)[0]


def keep_quotas(core: Core) -> None:
    """keep_quota of all tenants; and public blocks that nobody pays for find who does."""
    sharing.claim(core)
    for tenant in core.tenants:
        keep_quota(core, tenant.id)


def remove_session(
    core: Core, model: ModelId, head: PrefixHash, *, erase: bool = False, below: bool = False
) -> ByteCount:
    """Unpublish a session from the tail up, every block that no other session uses.

    What hangs below them (incomplete, so under no head) goes too. With *below* it is the block
    *head*, which need be none, and what goes on from it. Leased blocks wait in limbo.
    NoSuchBlock, or NotEmpty when *head* is not a head; NoSuchModel, StaleEpoch.
    """
    layout = core.record(model).layout
    standing = BlockKey(model, head, layout.spine, 0)
    with core.lock:
        with core.metadata.read() as view:
            block = view.block(standing)
            if block is None or core.slots.state[block.slot] != states.LIVE:
                raise NoSuchBlock(f"no session {head.hex()}")
            if not below and not view.is_head(model, head):
                raise NotEmpty(f"{head.hex()} is no session's head: longer sessions go on from it")
            own = (
                [head]
                if below
                else [
                    core.slots.key_of(slot).prefix_hash
                    for slot in core.slots.ancestors(block.slot)
                    if core.slots.over[slot].sum() == 1 and core.slots.state[slot] == states.LIVE
                ]
            )
            keys = [
                key
                for group in range(len(layout.groups))
                for shard in range(layout.shards)
                for key in condemn(core, view, own, BlockKey(model, head, group, shard))
            ]
        futures = submit_condemned(core, keys, evicted=False, erase=erase)
        passing = _let_go_over(core, layout, standing, block)
    freed = freed_bytes(futures)
    wait(passing)
    return freed


def _let_go_over(
    core: Core, layout: Layout, standing: BlockKey, block: Block
) -> "list[Future[Any]]":
    """Pass on public blocks over a session that is being removed. Hold the lock."""
    payer = block.charged
    slots = core.slots
    public = [slot for slot in slots.ancestors(block.slot) if slots.tenant[slot] != payer]
    if not public:
        return []
    with core.metadata.read() as view:
        found = [
            view.block(BlockKey(standing.model, slots.key_of(slot).prefix_hash, group, shard))
            for slot in public
            for group in range(len(layout.groups))
            for shard in range(layout.shards)
        ]
    among = np.array([each.slot for each in found if each is not None], np.int64)
    return sharing.let_go(core, payer, quotas.UNBOUNDED, among=among)[0]


def remove_chain(
    core: Core, model: ModelId, hashes: Sequence[PrefixHash]
) -> "list[Future[ledger.Removed]]":
    """Queue the removal of blocks (group 0, shard 0), and of all below them; waits for nothing.

    *hashes* are in chain order. Their headers are overwritten where they carry a file's row.
    """
    with core.lock:
        with core.metadata.read() as view:
            own = list(hashes)[::-1]
            keys = condemn(core, view, own, BlockKey(model, PrefixHash(bytes(16))))
        return submit_condemned(core, keys, evicted=False)


def condemn(core: Core, view: ReadView, own: list[PrefixHash], key: BlockKey) -> list[BlockKey]:
    """Condemn the blocks named *own* of the group and shard of *key*, and all below them.

    Returns those that there are, deepest first, ready for removal. Hold the lock.
    """
    found = []
    waiting = [key.at(prefix_hash) for prefix_hash in own]  # the first block of the chain is last
    named = set(own)
    while waiting:
        each = waiting.pop()
        block = view.block(each)
        if block is not None and core.slots.state[block.slot] == states.LIVE:
            core.slots.state[block.slot] = states.CONDEMNED
            found.append(each)
        waiting += [key.at(child) for child in view.children(each) if child not in named]
    return found[::-1]


def sweep_epochs(core: Core) -> ByteCount:
    """Remove all blocks of epochs that are over, but those under lease; then their models."""
    freed = 0
    with core.lock:
        over = [record for record in core.models.values() if not core.is_current(record.id)]
    for record in over:
        while True:
            with core.lock:
                core.expire()
                leaves = core.slots.leaves()
                mine = leaves[core.slots.models()[leaves] == record.id]
                chosen = choose_blocks(core, mine, VICTIMS_PER_COMMIT)
                keys = [core.slots.key_of(slot) for slot in chosen]
                futures = submit_condemned(core, keys, evicted=True)
            if not futures:
                break
            freed += freed_bytes(futures)
        _forget_if_empty(core, record.id)
    return ByteCount(freed)


def _forget_if_empty(core: Core, model: ModelId) -> None:
    def job(view: WriteView) -> bool:
        if view.has_blocks(model):
            return False
        view.delete_model(model)
        return True

    if core.metadata.submit(job).result():
        with core.lock:
            metering.fold(core)  # by the model's name, while it is known
            core.models.pop(model, None)


def judge(core: Core, key: BlockKey, generation: int) -> bool:
    """A reader says that a block reads badly: read it here, and make a hole if it is so.

    True if the block is lost. The report is a hint only: another life of the block, or one that
    reads well here, stays.
    """
    core.counters.reports += 1
    with core.metadata.read() as view:
        block = view.block(key)
    if block is None or block.generation != generation or block.hole:
        return False
    try:
        core.standings.read(
            {extent.device for extent in block.extents},
            lambda: read_payload(core.devices, key, block, lanes=True),
        )
    except (BadPayload, DeviceError):
        return spoil(core, key, generation)
    return False


def spoil(core: Core, key: BlockKey, generation: int) -> bool:
    """Make a hole of a block whose bytes are lost; False if it has changed meanwhile.

    Or if a device that it lies on is not there any more: that goes offline then, and its blocks
    are misses until it is back, not lost.
    """
    with core.metadata.read() as view:
        block = view.block(key)
    if block is None or not core.standings.are_there(each.device for each in block.extents):
        return False
    return bool(forget(core, [(key, generation)]))


def forget(core: Core, lost: Sequence[tuple[BlockKey, int]]) -> int:
    """Make holes of blocks, by key and generation, wherever they lie; waits.

    Returns of how many: those that have changed meanwhile stay.
    """

    def job(view: WriteView) -> list[tuple[Block, FileRow | None]]:
        spoilt = [ledger.spoil(view, key, generation) for key, generation in lost]
        return [before for before in spoilt if before is not None]

    def after(spoilt: list[tuple[Block, FileRow | None]]) -> None:
        with core.lock:
            core.gone_files += [file for _, file in spoilt if file is not None]
            for before, _ in spoilt:
                core.counters.holes += 1
                core.slots.spoil(before.slot)
            core.changes += 1

    return len(core.metadata.submit(job, after).result())

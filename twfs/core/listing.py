"""What is in the store, for the mount and the tools: models, heads, chains, sessions, space.

Reads only; short enough for an event loop, and in bounded pieces where there may be many.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np

from twfs.core.state import Core
from twfs.devices.payload import read_payload
from twfs.errors import BlockGone, CorruptMetadata, InvalidInput, NoSuchBlock
from twfs.index import slots as states
from twfs.layout import FILES_NAME
from twfs.metadata.sessions import ending_at
from twfs.metadata.tables import ReadView
from twfs.records import TENANT, TENANT_OFFSET, Block, BlockKey
from twfs.store import BlockInfo, ModelInfo, Retention, SessionInfo, Space
from twfs.units import ALIGN, ByteCount, Millis, ModelId, PrefixHash, TokenCount

PIECE_MAX: Final = 10_000  # heads or sessions of one answer
RETENTIONS: Final = tuple(Retention)
Mine = Callable[[int], bool]  # tells whether a tenant's blocks are the asker's to see


def anyones(_: int) -> bool:
    """All tenants' blocks."""
    return True


def models(core: Core) -> list[ModelInfo]:
    """All models in their present epoch, by name."""
    with core.lock:
        slots = core.slots
        here = len(slots)
        live = slots.state[:here] == states.LIVE
        owner = slots.models()
        heads: dict[ModelId, int] = {}
        with core.metadata.read() as view:
            for model, _ in view.all_heads():
                heads[model] = heads.get(model, 0) + 1
        found = []
        for name, model_id in sorted(core.current.items()):
            if name == FILES_NAME:  # a directory of the mount, and no model that anybody opens
                continue
            record = core.models[model_id]
            mine = live & (owner == model_id)
            found.append(
                ModelInfo(
                    model_id, name, record.epoch, record.layout, record.created_ms,
                    int(mine.sum()), heads.get(model_id, 0),
                    ByteCount(int(slots.units[:here][mine].sum()) * ALIGN),
                )
            )  # fmt: skip
        return found


def heads(
    core: Core, model: ModelId, after: PrefixHash | None, limit: int, mine: Mine = anyones
) -> list[PrefixHash]:
    """Up to *limit* heads behind *after*, of the tenants that are *mine*."""
    if not 0 < limit <= PIECE_MAX:
        raise InvalidInput(f"limit is {limit}; it must be 1 to {PIECE_MAX}")
    found: list[PrefixHash] = []
    while len(found) < limit:
        with core.metadata.read() as view:
            if mine is anyones:
                return view.heads(model, after, limit)
            piece = view.heads(model, after, PIECE_MAX)
            found += [head for head in piece if mine(_tenant_of(core, view, model, head))]
        if len(piece) < PIECE_MAX:
            break
        after = piece[-1]
    return found[:limit]


def _tenant_of(core: Core, view: ReadView, model: ModelId, prefix_hash: PrefixHash) -> int:
    """The tenant of the standing block of *prefix_hash*; that of a lost tenant if there is none."""
    record = core.models.get(model)
    key = BlockKey(model, prefix_hash, 0 if record is None else record.layout.spine, 0)
    value = view.raw_block(key.pack())
    return -1 if value is None else int(TENANT.unpack_from(value, TENANT_OFFSET)[0])


def chain_slots(core: Core, view: ReadView, model: ModelId, prefix_hash: PrefixHash) -> list[int]:
    """Slots of the standing blocks from the first to *prefix_hash*. Hold the lock."""
    record = core.record(model)
    block = view.block(BlockKey(model, prefix_hash, record.layout.spine, 0))
    if block is None or core.slots.state[block.slot] != states.LIVE:
        raise NoSuchBlock(f"no block {prefix_hash.hex()} in model {record.name}")
    return core.slots.ancestors(block.slot)[::-1]


def chain_of(core: Core, model: ModelId, prefix_hash: PrefixHash) -> list[BlockInfo]:
    """All blocks from the first to *prefix_hash*, by index, group, shard."""
    if model not in core.models:
        raise NoSuchBlock(f"no model has the number {model}")
    layout = core.models[model].layout
    found: list[BlockInfo] = []
    with core.lock, core.metadata.read() as view:
        slots = chain_slots(core, view, model, prefix_hash)
        links = np.maximum(core.slots.links[slots], 1).tolist()
        stamps = core.slots.stamp[slots].tolist()
        hashes = [core.slots.key[slot].tobytes()[4:20] for slot in slots]
        for index, name in enumerate(hashes):
            for group in range(len(layout.groups)):
                for shard in range(layout.shards):
                    key = BlockKey(model, PrefixHash(name), group, shard)
                    block = view.block(key)
                    if block is not None:
                        found.append(
                            BlockInfo(
                                key,
                                _as_now(core, block),
                                index,
                                Millis(stamps[index]),
                                links[index],
                            )
                        )
    return found


def block_info(core: Core, key: BlockKey) -> BlockInfo:
    """One block; NoSuchBlock. Its index is that of its chain, 0 for a detached one."""
    with core.lock, core.metadata.read() as view:
        block = view.block(key)
        if block is None or core.slots.state[block.slot] != states.LIVE:
            raise NoSuchBlock(f"no block {key.prefix_hash.hex()}")
        return _info(core, view, key, block)


def _as_now(core: Core, block: Block) -> Block:
    """*block* with the class that it has now; its record has that of its publish."""
    now = int(core.slots.retention[block.slot])
    return block if now == block.retention else replace(block, retention=now)


def _info(core: Core, view: ReadView, key: BlockKey, block: Block) -> BlockInfo:
    slots = core.slots
    layout = core.models[key.model].layout
    standing = view.block(BlockKey(key.model, key.prefix_hash, layout.spine, 0))
    slot = block.slot if standing is None else standing.slot
    depth = 0 if block.detached else len(slots.ancestors(slot)) - 1
    return BlockInfo(
        key,
        _as_now(core, block),
        depth,
        Millis(int(slots.stamp[block.slot])),
        max(1, int(slots.links[slot])),
    )


def detached(core: Core, model: ModelId, mine: Mine = anyones) -> list[BlockKey]:
    """Published blocks whose parent, or one before it, is not there; of tenants that are *mine*."""
    with core.lock:
        slots = core.slots
        here = len(slots)
        waiting = np.flatnonzero(slots.detached[:here] & (slots.state[:here] == states.LIVE))
        keys = [slots.key_of(slot) for slot in waiting.tolist()]
    found = [key for key in keys if key.model == model]
    if mine is anyones:
        return found
    with core.metadata.read() as view:
        tenants = [view.raw_block(key.pack()) for key in found]
    return [
        key
        for key, value in zip(found, tenants, strict=True)
        if value is not None and mine(TENANT.unpack_from(value, TENANT_OFFSET)[0])
    ]


def sessions(
    core: Core, model: ModelId, after: PrefixHash | None, limit: int, mine: Mine = anyones
) -> list[SessionInfo]:
    """As heads, with figures; own bytes are of blocks under this head alone."""
    found: list[SessionInfo] = []
    while not found and (piece := heads(core, model, after, limit, mine)):
        after = piece[-1]
        for head in piece:
            with suppress(NoSuchBlock):  # evicted since the heads were read
                found.append(session(core, model, head))
    return found


def session(core: Core, model: ModelId, head: PrefixHash) -> SessionInfo:
    """The figures of one head."""
    record = core.record(model)
    layout = record.layout
    with core.lock, core.metadata.read() as view:
        slots = chain_slots(core, view, model, head)
        links = core.slots.links[slots]
        units = core.slots.units[slots].astype(np.int64)
        payload = len(slots) * layout.block_bytes(layout.spine)
        if len(layout.groups) * layout.shards > 1:
            units, payload = _all_units(core, view, slots)
        block = view.block(BlockKey(model, head, layout.spine, 0))
        if block is None:
            raise CorruptMetadata(f"head {head.hex()} has no block: run `twfs check`")
        own = int(units[links <= 1].sum()) * ALIGN
        return SessionInfo(
            record.name, head, TokenCount(block.position or len(slots) * layout.block_tokens),
            len(slots), ByteCount(payload), ByteCount(own),
            ByteCount(int(units.sum()) * ALIGN - own),
            Millis(int(core.slots.stamp[slots[-1]])), block.published_ms,
            RETENTIONS[int(core.slots.retention[slots[-1]])],
            core.tenants.name_of(block.tenant),
            tuple(key.id.decode() for key in ending_at(view, model, head) if key.named),
        )  # fmt: skip


def _all_units(
    core: Core, view: ReadView, slots: list[int]
) -> "tuple[np.ndarray[tuple[int, ...], np.dtype[np.int64]], int]":
    """Per standing slot: 4 KiB units of all its groups and shards; and their payload bytes."""
    units = np.zeros(len(slots), np.int64)
    payload = 0
    for place, slot in enumerate(slots):
        key = core.slots.key_of(slot)
        layout = core.models[key.model].layout
        for group in range(len(layout.groups)):
            for shard in range(layout.shards):
                block = view.block(BlockKey(key.model, key.prefix_hash, group, shard))
                if block is not None:
                    units[place] += block.device_bytes // ALIGN
                    payload += block.payload_bytes
    return units, payload


def read_block(core: Core, info: BlockInfo) -> memoryview:
    """The verified payload of this life of a block, read under a pin. Blocks on the device.

    BlockGone, BadPayload, DeviceError.
    """
    with core.lock:
        with core.metadata.read() as view:
            block = view.block(info.key)
        if (
            block is None
            or block.ino != info.block.ino  # a block that was moved is the same one
            or block.hole
            or core.slots.state[block.slot] != states.LIVE
        ):
            raise BlockGone(f"block {info.key.prefix_hash.hex()} has been evicted")
        pinned = np.array([block.slot], np.int64)
        pin = core.pin(pinned)
    try:
        payload = core.standings.read(
            {extent.device for extent in block.extents},
            lambda: read_payload(core.devices, info.key, block)[1],
        )
    finally:
        with core.lock:
            core.unpin(pinned, pin)
    with core.lock:
        core.counters.mount_reads += 1
        core.counters.mount_read_bytes += len(payload)
    return payload


def space(core: Core) -> Space:
    """Bytes of the data areas: total, free, in limbo, reserved, evictable."""
    with core.lock, core.metadata.read() as view:
        limbo = sum(extent.length for extent in view.runs("limbo"))
        here = len(core.slots)
        free_to_go = (
            (core.slots.state[:here] == states.LIVE)
            & (core.slots.leases[:here] == 0)
            & (core.slots.retention[:here] != Retention.PINNED.rank)
        )  # fmt: skip
        return Space(
            core.allocator.total_bytes,
            core.allocator.free_bytes,
            ByteCount(limbo),
            ByteCount(core.reserved_bytes),
            ByteCount(int(core.slots.units[:here][free_to_go].sum()) * ALIGN),
        )

"""The checker: one function per invariant of FORMAT.md, over one snapshot.

Used by `twfs check`, offline or inside the daemon, and at the end of every test. It changes
nothing. While the warehouse is in use a block may be evicted and its place overwritten; so what
looks wrong on a device counts only if the record is still the same after the look. Blocks.
"""

import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from twfs import ledger
from twfs import slots as states
from twfs.core import Core
from twfs.errors import BadPayload, CorruptMetadata, DeviceError
from twfs.layout import GroupKind, Layout
from twfs.payload import aligned_buffer, header_complaint, read_payload
from twfs.records import Block, BlockKey, Extent, Header, Superblock, sealed_with
from twfs.store import CheckReport, Finding
from twfs.tables import ModelRecord, ReadView
from twfs.units import ALIGN, EXTENTS_MAX, ModelId, PrefixHash, align_up

FINDINGS_MAX: Final = 1000  # of one run; who has more needs no more of them
THREADS: Final = 8  # device reads in flight: headers are small, so queue depth is all
RETENTION_MAX: Final = 3


@dataclass(slots=True)
class _Snapshot:
    """What the tables say at one moment."""

    blocks: dict[BlockKey, Block] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    children: set[tuple[BlockKey, PrefixHash]] = field(default_factory=set)
    heads: set[tuple[ModelId, PrefixHash]] = field(default_factory=set)
    models: dict[ModelId, ModelRecord] = field(default_factory=dict)
    free: list[Extent] = field(default_factory=list)
    limbo: list[Extent] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=lambda: {"generation": 0, "ino": 0})

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Note what of the table *what* cannot be read, and go on."""
        try:
            yield
        except (CorruptMetadata, ValueError, struct.error) as error:
            self.unreadable.append(f"{what}: {error}")

    def layout(self, key: BlockKey) -> Layout | None:
        """The layout of the block's model, if that is there."""
        record = self.models.get(key.model)
        return None if record is None else record.layout


def take_snapshot(view: ReadView) -> _Snapshot:
    """Read all tables; what cannot be unpacked is noted, not raised."""
    taken = _Snapshot()
    for raw_key, raw in view.all_blocks():
        try:
            taken.blocks[BlockKey.unpack(raw_key)] = Block.unpack(raw)
        except ValueError as error:
            taken.unreadable.append(f"{raw_key.hex()}: {error}")
    for raw_key, child in view.all_children():
        try:
            taken.children.add((BlockKey.unpack(raw_key), PrefixHash(child)))
        except ValueError as error:
            taken.unreadable.append(f"children of {raw_key.hex()}: {error}")
    with taken.noting("the heads"):
        taken.heads.update(view.all_heads())
    with taken.noting("the models"):
        taken.models = {record.id: record for record in view.models()}
    with taken.noting("the free runs"):
        taken.free.extend(view.runs("free"))
    with taken.noting("limbo"):
        taken.limbo.extend(view.runs("limbo"))
    with taken.noting("the counters"):
        taken.counters.update({name: view.counter(name) for name in taken.counters})
    return taken


def superblocks_agree(core: Core, _: _Snapshot) -> Iterator[str]:
    """I1: both copies of every superblock are whole and name this warehouse and device."""
    for device in core.devices.values():
        for which, found in zip(("first", "last"), device.superblocks(), strict=True):
            if not isinstance(found, Superblock):
                yield f"device {device.index}: the {which} superblock copy: {found}"
            elif (found.warehouse, found.device, found.index) != (
                core.uuid, device.uuid, device.index,
            ):  # fmt: skip
                yield f"device {device.index}: the {which} superblock copy is of another device"


def records_unpack(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I2: every record of the metadata can be read."""
    yield from taken.unreadable


def extents_tile(core: Core, taken: _Snapshot) -> Iterator[str]:
    """I3: blocks, free runs and limbo cover each data area exactly once."""
    owned = [
        (extent.device, extent.offset, extent.length, f"block {key.prefix_hash.hex()}")
        for key, block in taken.blocks.items()
        for extent in block.extents
    ]
    owned += [(e.device, e.offset, e.length, "free run") for e in taken.free]
    owned += [(e.device, e.offset, e.length, "limbo") for e in taken.limbo]
    owned.sort(key=lambda each: each[:2])
    for device in (each.record for each in core.standings.all.values()):
        start, length = device.data_area
        at, before = int(start), "the start of the data area"
        for _, offset, size, what in (each for each in owned if each[0] == device.index):
            if offset > at:
                yield f"device {device.index}: {offset - at} bytes at {at} belong to nothing"
            elif offset < at:
                yield f"device {device.index}: {what} at {offset} overlaps {before}"
            at, before = max(at, offset + size), f"{what} at {offset}"
        if at < start + length:
            yield f"device {device.index}: {start + length - at} bytes at {at} belong to nothing"


def extents_fit(core: Core, taken: _Snapshot) -> Iterator[str]:
    """I4: a block's extents hold exactly header and padded payload, inside data areas."""
    areas = {index: each.record.data_area for index, each in core.standings.all.items()}
    for key, block in taken.blocks.items():
        if block.hole:
            continue
        wanted = ALIGN + align_up(block.payload_bytes)
        if block.device_bytes != wanted or len(block.extents) > EXTENTS_MAX:
            yield f"block {key.prefix_hash.hex()}: {block.device_bytes} bytes, not {wanted}"
        for extent in block.extents:
            start, length = areas.get(extent.device, (0, 0))
            if not start <= extent.offset <= extent.offset + extent.length <= start + length:
                yield f"block {key.prefix_hash.hex()}: {extent} is outside every data area"


def headers_agree(core: Core, taken: _Snapshot) -> Iterator[str]:
    """I5: the header on the device says what the record says."""

    def misplaced(header: Header, key: BlockKey, block: Block) -> str | None:
        model, on = taken.models.get(key.model), core.devices[block.extents[0].device]
        if (header.warehouse, header.device) != (core.uuid, on.uuid):
            return "its header is of another warehouse or device"
        if model is not None and (header.fingerprint, header.model_name, header.epoch) != (
            model.layout.fingerprint, model.name, model.epoch,
        ):  # fmt: skip
            return "its header is of another model, epoch or layout"
        return None

    def look(pair: tuple[BlockKey, Block]) -> str | None:
        key, block = pair
        if not block.extents or _away(core, block):
            return None
        buffer = aligned_buffer(ALIGN)
        first = block.extents[0]
        try:
            core.devices[first.device].read_into([buffer], first.offset)
            header = Header.unpack(buffer)
            complaint = header_complaint(header, key, block) or misplaced(header, key, block)
            if not complaint and not sealed_with(core.secret, buffer):
                complaint = "its header is not sealed with this warehouse's secret"
        except (ValueError, DeviceError) as error:
            complaint = str(error)
        if complaint is None or not _unchanged(core, key, block):
            return None
        return f"block {key.prefix_hash.hex()} at {first}: {complaint}"

    yield from _all_at_once(look, taken)


def numbers_are_unique(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I6: generations and inodes are unique, and below their counters."""
    for name, of in (("generation", "generation"), ("ino", "ino")):
        numbers = [getattr(block, of) for block in taken.blocks.values()]
        for number, count in Counter(numbers).items():
            if count > 1:
                yield f"{of} {number} belongs to {count} blocks"
        if numbers and max(numbers) >= taken.counters[name]:
            yield f"{of} {max(numbers)} is not below its counter {taken.counters[name]}"


def slots_are_unique(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I7: no two blocks have one slot."""
    for slot, count in Counter(block.slot for block in taken.blocks.values()).items():
        if count > 1:
            yield f"slot {slot} belongs to {count} blocks"


def children_agree(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I8: the children table has exactly the (parent, child) pairs of the blocks."""
    meant = set()
    for key, block in taken.blocks.items():
        layout = taken.layout(key)
        if layout is not None and not ledger.starts_chain(block, layout):
            meant.add((replace(key, prefix_hash=block.parent), key.prefix_hash))
    for parent, child in meant - taken.children:
        yield f"block {child.hex()} is missing among the children of {parent.prefix_hash.hex()}"
    for parent, child in taken.children - meant:
        yield f"{child.hex()} is noted as a child of {parent.prefix_hash.hex()} but is none"


def heads_agree(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I9: the heads are exactly the attached, complete blocks without a complete child."""
    complete = {
        (key.model, key.prefix_hash)
        for key in taken.blocks
        if (layout := taken.layout(key)) is not None
        and (key.group, key.shard) == (layout.spine, 0)
        and all(
            replace(key, group=group, shard=shard) in taken.blocks
            for group, shard in ledger.required(layout)
        )
    }
    inner = {
        (parent.model, parent.prefix_hash)
        for parent, child in taken.children
        if (parent.model, child) in complete
    }
    meant = {
        (model, prefix_hash)
        for model, prefix_hash in complete - inner
        if not taken.blocks[
            BlockKey(model, prefix_hash, taken.models[model].layout.spine, 0)
        ].detached
    }
    for _model, prefix_hash in meant - taken.heads:
        yield f"{prefix_hash.hex()} is a head but not noted as one"
    for _model, prefix_hash in taken.heads - meant:
        yield f"{prefix_hash.hex()} is noted as a head but is none"


def layouts_agree(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I10: a block's model is there, and group, shard and length are of its layout."""
    for key, block in taken.blocks.items():
        layout = taken.layout(key)
        name = key.prefix_hash.hex()
        if layout is None:
            yield f"block {name} is of model number {key.model}, which is not there"
        elif key.group >= len(layout.groups) or key.shard >= layout.shards:
            yield f"block {name} has group {key.group}, shard {key.shard}: the layout has not"
        elif block.payload_bytes != layout.block_bytes(key.group):
            yield (
                f"block {name} has {block.payload_bytes} bytes, its layout says "
                f"{layout.block_bytes(key.group)}"
            )


def positions_grow(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I11: a block ends behind its parent, where both positions are known."""
    for key, block in taken.blocks.items():
        layout = taken.layout(key)
        if layout is None or ledger.starts_chain(block, layout):
            continue
        parent = taken.blocks.get(replace(key, prefix_hash=block.parent))
        if parent is not None and 0 < block.position <= parent.position:
            yield (
                f"block {key.prefix_hash.hex()} ends at token {block.position}, its parent at "
                f"{parent.position}"
            )


def payloads_match(core: Core, taken: _Snapshot) -> Iterator[str]:
    """I12: every payload has its checksums. Reads everything."""

    def look(pair: tuple[BlockKey, Block]) -> str | None:
        key, block = pair
        if block.hole or _away(core, block):
            return None
        try:
            read_payload(core.devices, key, block, lanes=True)
        except (BadPayload, DeviceError) as error:
            return str(error) if _unchanged(core, key, block) else None
        return None

    yield from _all_at_once(look, taken)


def holes_are_empty(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I13: a hole has no extents, and every other block has some."""
    for key, block in taken.blocks.items():
        if block.hole == bool(block.extents):
            yield f"block {key.prefix_hash.hex()}: hole={block.hole}, {len(block.extents)} extents"


def classes_exist(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I14: the retention class is one of the four."""
    for key, block in taken.blocks.items():
        if block.retention > RETENTION_MAX:
            yield f"block {key.prefix_hash.hex()} has retention class {block.retention}"


def free_runs_are_merged(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I15: no two free runs touch."""
    for before, after in zip(taken.free, taken.free[1:], strict=False):
        if before.device == after.device and before.offset + before.length == after.offset:
            yield f"free runs {before} and {after} touch"


def chains_have_no_gap(_: Core, taken: _Snapshot) -> Iterator[str]:
    """I16: a block of a full group is detached, or its parent is there and is not detached."""
    for key, block in taken.blocks.items():
        layout = taken.layout(key)
        if layout is None or ledger.starts_chain(block, layout):
            continue
        if key.group < len(layout.groups) and (layout.groups[key.group].kind is not GroupKind.FULL):
            if block.detached:
                yield f"block {key.prefix_hash.hex()} is detached, but its group has no chains"
            continue
        parent = taken.blocks.get(replace(key, prefix_hash=block.parent))
        if block.detached == (parent is not None and not parent.detached):
            yield (
                f"block {key.prefix_hash.hex()} is "
                + ("detached though its parent is there" if block.detached else "without parent")
            )


INVARIANTS: Final[dict[int, Callable[[Core, _Snapshot], Iterator[str]]]] = {
    1: superblocks_agree,
    2: records_unpack,
    3: extents_tile,
    4: extents_fit,
    5: headers_agree,
    6: numbers_are_unique,
    7: slots_are_unique,
    8: children_agree,
    9: heads_agree,
    10: layouts_agree,
    11: positions_grow,
    12: payloads_match,
    13: holes_are_empty,
    14: classes_exist,
    15: free_runs_are_merged,
    16: chains_have_no_gap,
}
DATA_INVARIANT: Final = 12  # reads every payload: only when asked to


def _away(core: Core, block: Block) -> bool:
    """Tell whether some of *block* is on a device that is offline: a miss, which breaks nothing."""
    return any(extent.device in core.standings.offline for extent in block.extents)


def _unchanged(core: Core, key: BlockKey, block: Block) -> bool:
    """Tell whether the record is still the one that was checked."""
    with core.metadata.read() as view:
        now = view.block(key)
    if now is None or now.generation != block.generation or now.extents != block.extents:
        return False
    with core.lock:
        return bool(core.slots.state[block.slot] == states.LIVE)


def _all_at_once(
    look: Callable[[tuple[BlockKey, Block]], str | None], taken: _Snapshot
) -> Iterator[str]:
    """Look at all blocks from several threads."""
    with ThreadPoolExecutor(THREADS, "twfs-check") as pool:
        for found in pool.map(look, list(taken.blocks.items()), chunksize=64):
            if found is not None:
                yield found


def run(core: Core, *, data: bool = False) -> CheckReport:
    """Check every invariant; with *data* every payload too. At most FINDINGS_MAX findings."""
    began = time.monotonic()
    with core.metadata.read() as view:
        taken = take_snapshot(view)
    findings: list[Finding] = []
    for number, invariant in INVARIANTS.items():
        if number == DATA_INVARIANT and not data:
            continue
        for text in invariant(core, taken):
            if len(findings) < FINDINGS_MAX:
                findings.append(Finding(number, text))
    payloads = sum(not block.hole for block in taken.blocks.values()) if data else 0
    return CheckReport(
        tuple(findings), len(taken.blocks), payloads, round(time.monotonic() - began, 3)
    )

"""Small warehouses on real image files, and what must be true of one that has come to rest.

`open_warehouse` ends with the checker over every payload and with a comparison of all that memory
holds against the tables, counted by brute force. Payloads are made from names, so that whoever
reads a block knows what its bytes must be.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twfs.checksums import checksums_of
from twfs.core.state import Core
from twfs.datapath.putting import Put
from twfs.devices.formatting import DeviceSpec
from twfs.devices.payload import aligned_buffer
from twfs.index import slots as states
from twfs.layout import Arrangement, Group, GroupKind, Layout
from twfs.metadata import ledger
from twfs.prefix import Chain, Names, OwnKey, names_of_keys
from twfs.records import Block, BlockKey
from twfs.store import ArenaBlock, Model, PutResult, ReadOutcome, Retention
from twfs.units import ALIGN, ByteCount, align_up
from twfs.warehouse import Warehouse

Payload = npt.NDArray[np.uint8]

DEVICE_BYTES: Final = 16 << 20  # the least that a device may have: 14.9 MiB of data
BLOCK_TOKENS: Final = 16

MHA: Final = Layout(
    "test/mha", (Group(layers=2, kv_heads=2, head_size=8, dtype="float16"),), BLOCK_TOKENS
)
BIG: Final = Layout(
    "test/big", (Group(layers=8, kv_heads=8, head_size=128, dtype="float16"),), BLOCK_TOKENS
)
MLA: Final = Layout(
    "test/mla", (Group(layers=3, head_size=72, arrangement=Arrangement.LAYER_LATENT),),
    BLOCK_TOKENS, replicated=True,
)  # fmt: skip
SHARDED: Final = Layout(
    "test/sharded", (Group(layers=2, kv_heads=4, head_size=8, dtype="float16"),), BLOCK_TOKENS,
    shards=2,
)  # fmt: skip
HYBRID: Final = Layout(
    "test/hybrid",
    (
        Group(layers=1, kv_heads=2, head_size=8, kind=GroupKind.WINDOW, window_tokens=32),
        Group(layers=2, kv_heads=2, head_size=8),
        Group(layers=2, kind=GroupKind.STATE, layer_bytes=1000, arrangement=Arrangement.OPAQUE),
    ),
    BLOCK_TOKENS,
)  # fmt: skip
LAYOUTS: Final = {"mha": MHA, "mla": MLA, "sharded": SHARDED, "hybrid": HYBRID}


def make_warehouse(
    directory: Path, devices: Sequence[int] = (DEVICE_BYTES,), *, force: bool = False
) -> None:
    """Create a warehouse over image files of these sizes."""
    specs = [
        DeviceSpec(directory / f"device{index}.img", ByteCount(size))
        for index, size in enumerate(devices)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    Warehouse.create(directory, specs, force=force)


@contextmanager
def open_warehouse(
    directory: Path, devices: Sequence[int] = (DEVICE_BYTES,), **options: Any
) -> Iterator[Warehouse]:
    """Open the warehouse in *directory*, made if it is not there; it must end without finding."""
    if not (directory / "meta").exists():
        make_warehouse(directory, devices)
    warehouse = Warehouse.open(directory, **options)
    try:
        yield warehouse
        stop_tending(warehouse)
        settle(warehouse)
        assert_sound(warehouse)
    finally:
        warehouse.close()


def stop_tending(warehouse: Warehouse) -> None:
    """End what the warehouse does in the background by itself."""
    warehouse._closing.set()
    warehouse._tender.join()


def settle(warehouse: Warehouse) -> None:
    """Wait for what is queued: evictions in the background, and limbo that is to be freed."""
    for _ in range(2):  # the end of a lease may queue another transaction
        warehouse._core.metadata.submit(lambda _: None, settled=lambda _: None).result()
        warehouse._core.wiper.drain()  # what is freed there may wait for its headers


@contextmanager
def commits_held(warehouse: Warehouse) -> Iterator[None]:
    """Keep the writer thread inside a transaction: what is queued meanwhile waits."""
    entered, gate = threading.Event(), threading.Event()

    def job(_: object) -> None:
        entered.set()
        gate.wait()

    future = warehouse._core.metadata.submit(job)
    entered.wait()
    try:
        yield
    finally:
        gate.set()
        future.result()


@contextmanager
def waiting_for_commit(warehouse: Warehouse, *works: Callable[[], object]) -> Iterator[None]:
    """Begin *works*, each in a thread and once the one before has queued its transaction.

    None is committed before the end of this context; then all have ended.
    """
    threads = [threading.Thread(target=work) for work in works]
    with commits_held(warehouse):
        for number, thread in enumerate(threads, 1):
            thread.start()
            while warehouse._core.metadata._queue.qsize() < number:
                thread.join(timeout=0.001)
        yield
    for thread in threads:
        thread.join()


def assert_sound(warehouse: Warehouse) -> None:
    """Fail unless the checker finds nothing and memory agrees with the tables."""
    report = warehouse.check(data=True)
    assert report.findings == (), report.findings[:5]
    assert_memory_agrees(warehouse._core)


def records_of(core: Core) -> dict[BlockKey, Block]:
    """All blocks that the tables have."""
    with core.metadata.read() as view:
        return {BlockKey.unpack(key): Block.unpack(value) for key, value in view.all_blocks()}


def links_of(core: Core) -> Counter[BlockKey]:
    """Heads over every standing block, counted one head at a time."""
    records, found = records_of(core), Counter[BlockKey]()
    with core.metadata.read() as view:
        models = {record.id: record.layout for record in view.models()}
        heads = list(view.all_heads())
    for model, head in heads:
        layout = models[model]
        key: BlockKey | None = BlockKey(model, head, layout.spine, 0)
        while key is not None:
            found[key] += 1
            block = records[key]
            key = None if ledger.starts_chain(block, layout) else key.at(block.parent)
    return found


def assert_memory_agrees(core: Core, reserved: Sequence[Block] = ()) -> None:
    """Fail unless slots and allocator are what the tables say, but for *reserved* blocks."""
    records, links = records_of(core), links_of(core)
    children: Counter[BlockKey] = Counter()
    slots = core.slots
    with core.lock:
        for key, block in records.items():
            layout = core.models[key.model].layout
            parent_key = key.at(block.parent)
            parent = records.get(parent_key)
            above = states.NONE
            if parent is not None and not ledger.starts_chain(block, layout):
                children[parent_key] += 1
                above = int(parent.slot)
            at = int(block.slot)
            seen = (
                int(slots.state[at]), slots.key_of(at), int(slots.parent[at]),
                int(slots.links[at]), int(slots.units[at]) * ALIGN, bool(slots.detached[at]),
                bool(slots.hole[at]), int(slots.position[at]),
            )  # fmt: skip
            assert seen == (
                states.LIVE, key, above, links[key], block.device_bytes, block.detached,
                block.hole, block.position,
            ), key  # fmt: skip
        for key, block in records.items():
            assert int(slots.children[block.slot]) == children[key], key
        assert core.reserved_bytes == sum(block.device_bytes for block in reserved)
        assert_charges_agree(core, records, reserved)
        count = slots.statistics()
        assert count["slots_live"] == len(records)
        assert (count["slots_pending"], count["slots_condemned"]) == (len(reserved), 0)
        assert count["slots_limbo"] == len(core.limbo)
        with core.metadata.read() as view:
            free = [*core.allocator.runs(), *(e for block in reserved for e in block.extents)]
            assert list(view.runs("free")) == ledger.merged(free)
            in_limbo = sorted(view.leased_limbo(), key=str)
        left = [e for places in core.left.values() for each in places for e in each.extents]
        removed = [e for held in core.limbo.values() for e in held]
        assert in_limbo == sorted([*removed, *left], key=str)


def assert_charges_agree(
    core: Core, records: dict[BlockKey, Block], reserved: Sequence[Block] = ()
) -> None:
    """Fail unless tenants are charged for exactly the blocks that they have in *records*."""
    held: Counter[int] = Counter()
    cells: Counter[tuple[int, int, int]] = Counter()
    for key, block in records.items():
        held[block.charged] += block.device_bytes
        retention = int(core.slots.retention[block.slot])
        cells[block.charged, key.model, retention] += block.device_bytes
    waiting: Counter[int] = Counter()
    for block in reserved:
        waiting[block.charged] += block.device_bytes
    for counted, meant in ((core.charges.held, held), (core.charges.reserved, waiting)):
        assert {tenant: total for tenant, total in counted.items() if total} == +meant  # no holes
    found = {account: cell.held_bytes for account, cell in core.charges.cells.items()}
    assert {account: held for account, held in found.items() if held} == +cells


def payload_of(layout: Layout, prefix_hash: bytes, group: int = 0, shard: int = 0) -> Payload:
    """The bytes that the block of this name has in these tests."""
    seed = int.from_bytes(prefix_hash, "little") * 1024 + group * 64 + shard
    return np.random.default_rng(seed).integers(0, 256, layout.block_bytes(group), np.uint8)


def payloads_of(layout: Layout, names: Names, group: int = 0, shard: int = 0) -> list[Payload]:
    """One payload per name."""
    return [payload_of(layout, names.hash_at(i), group, shard) for i in range(len(names))]


def tokens_of(blocks: int, seed: int = 0) -> list[int]:
    """Token ids of whole blocks; those of the same seed begin alike."""
    return [(seed * 1009 + index) % 50_000 for index in range(blocks * BLOCK_TOKENS)]


def chain_of(model: Model, blocks: int, seed: int = 0, *, fork: int | None = None) -> Names:
    """Names of a chain; with *fork* it leaves seed 0's chain behind so many blocks."""
    chain: Chain = model.chain()
    if fork is not None:
        chain.extend(tokens_of(fork))
        blocks -= fork
    return chain.extend(tokens_of(blocks, seed)).names()


def own_names(model: Model, *keys: tuple[str, str | None, int]) -> Names:
    """Names of an engine's own keys: (key, parent, end position) each."""
    return names_of_keys(
        model.root(),
        [
            OwnKey(key.encode(), None if parent is None else parent.encode(), end)
            for key, parent, end in keys
        ],
    )


def put(
    warehouse: Warehouse, model: Model, names: Names, *, group: int = 0, shard: int = 0,
    **options: Any,
) -> PutResult:  # fmt: skip
    """Put the payloads of *names* for one group and shard."""
    payloads = payloads_of(model.layout, names, group, shard)
    return warehouse.put(model, names, payloads, group=group, shard=shard, **options)


def put_whole(warehouse: Warehouse, model: Model, names: Names) -> None:
    """Put *names* for every group and shard, as an engine with all its ranks does."""
    for group in range(len(model.layout.groups)):
        for shard in range(model.layout.shards):
            assert put(warehouse, model, names, group=group, shard=shard).held == len(names)


def upload_all(warehouse: Warehouse, model: Model, names: Names, **options: Any) -> Put:
    """Begin a put and write all its blocks, as far as before publish."""
    group, shard = options.get("group", 0), options.get("shard", 0)
    begun = warehouse.begin_put(
        model.id, names, group=group, shard=shard, retention=Retention.STANDARD, owner=0
    )
    write_all(begun, model, names, begun.lacking, group=group, shard=shard)
    return begun


def write_all(
    begun: Put, model: Model, names: Names, indices: Sequence[int], *, group: int = 0,
    shard: int = 0,
) -> None:  # fmt: skip
    """Hand the payloads of *indices* to a put."""
    length = model.layout.block_bytes(group)
    step = align_up(length)
    arena = aligned_buffer(step * max(1, len(indices)))
    blocks = []
    for number, index in enumerate(indices):
        payload = payload_of(model.layout, names.hash_at(index), group, shard)
        arena[number * step : number * step + length] = payload.tobytes()
        sums = checksums_of(payload)
        blocks.append(
            ArenaBlock(index, number * step, length, sums.xxh3, sums.lane_plain, sums.lane_weighted)
        )
    begun.write_blocks(arena, blocks)


def read_all(warehouse: Warehouse, model: Model, names: Names, *, start: int = 0) -> int:
    """Match *names* and read it all; every byte must be right. Blocks from 0 that are held."""
    with warehouse.match(model, names, start=start) as match:
        for group, shard in sorted({(int(r["group"]), int(r["shard"])) for r in match._located}):
            rows = match._located[
                (match._located["group"] == group) & (match._located["shard"] == shard)
            ]
            length = model.layout.block_bytes(group)
            into = [np.zeros(length, np.uint8) for _ in rows]
            report = match.read_into(into, group=group, shard=shard, first=int(rows["index"][0]))
            assert set(report.outcomes) == {ReadOutcome.HIT}
            for row, got in zip(rows, into, strict=True):
                wanted = payload_of(model.layout, row["prefix_hash"].tobytes(), group, shard)
                assert np.array_equal(got, wanted)
        return match.blocks


def flip_payload(warehouse: Warehouse, block: Block, byte: int = 0) -> None:
    """Change one bit of a block's payload on its device, behind the warehouse's back."""
    flip_device(warehouse, block, ALIGN + byte)


def flip_device(warehouse: Warehouse, block: Block, byte: int) -> None:
    """Change one bit of a block's header or payload on its device."""
    extent = block.extents[0]
    with warehouse.devices[extent.device].path.open("r+b", buffering=0) as file:
        file.seek(extent.offset + byte)
        before = file.read(1)
        file.seek(extent.offset + byte)
        file.write(bytes([before[0] ^ 1]))


def block_at(
    warehouse: Warehouse, model: Model, names: Names, index: int, *, group: int = 0, shard: int = 0
) -> tuple[BlockKey, Block]:
    """The full name and the record of one block."""
    key = BlockKey(model.id, names.hash_at(index), group, shard)
    with warehouse._core.metadata.read() as view:
        block = view.block(key)
    assert block is not None
    return key, block

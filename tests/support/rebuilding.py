"""Random warehouses to be lost and rebuilt, and what is compared of them.

`python -m support.rebuilding DIRECTORY` rebuilds, as a process that may be killed.
"""

import random
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from support.warehouses import LAYOUTS, chain_of, own_names, put, records_of
from twfs.errors import PromiseRefused
from twfs.records import Block, BlockKey
from twfs.recovery.rebuild import rebuild
from twfs.store import Model, Retention
from twfs.units import ByteCount, Slot
from twfs.warehouse import Warehouse

Name = tuple[str, bytes, int, int]  # model, prefix hash, group, shard


@dataclass
class State:
    """Everything that a warehouse knows of its blocks, by names that outlive a rebuild."""

    blocks: dict[Name, Block]
    heads: set[tuple[str, bytes]]
    children: set[tuple[Name, bytes]]
    links: dict[Name, int]
    generation: int  # the next one
    ino: int


def state_of(warehouse: Warehouse) -> State:
    """What *warehouse* knows of the blocks of present epochs."""
    core = warehouse._core
    with core.metadata.read() as view:
        models = {model.id: model for model in view.models() if core.is_current(model.id)}
        heads = {(models[m].name, bytes(h)) for m, h in view.all_heads() if m in models}
        children = {
            (named, bytes(child))
            for key, child in view.all_children()
            if (named := name_of(BlockKey.unpack(key), models)) is not None
        }
        counters = view.counter("generation"), view.counter("ino")
    blocks, links = {}, {}
    for key, block in records_of(core).items():
        named = name_of(key, models)
        if named is not None:
            blocks[named] = replace(block, slot=Slot(0))
            links[named] = int(core.slots.links[block.slot])
    return State(blocks, heads, children, links, *counters)


def name_of(key: BlockKey, models: dict) -> Name | None:  # type: ignore[type-arg]
    """The name that outlives a rebuild; None of an old epoch."""
    model = models.get(key.model)
    return None if model is None else (model.name, bytes(key.prefix_hash), key.group, key.shard)


def assert_back(before: State, after: State, *, exactly: bool) -> None:
    """Fail unless all blocks are back as they were; *exactly*: and nothing else is."""
    for name, block in before.blocks.items():
        assert name in after.blocks, name
        there = after.blocks[name]
        # What came back beside may have joined a detached block to its chain.
        wanted = block if exactly or not block.detached else replace(block, detached=there.detached)
        assert there == wanted, name
    if exactly:
        assert after.blocks.keys() == before.blocks.keys()
        assert (after.heads, after.children) == (before.heads, before.children)
        assert after.links == before.links
    assert after.generation >= before.generation
    assert after.ino >= before.ino


def fill(warehouse: Warehouse, chance: random.Random, turns: int) -> bool:
    """Do random things; tells whether nothing of a present epoch was evicted or removed."""
    names = chance.sample(sorted(LAYOUTS), 2)
    models = {name: warehouse.open_model(name, LAYOUTS[name]) for name in names}
    exactly = True
    for _ in range(turns):
        name = chance.choice(names)
        model = models[name]
        match chance.randrange(12):
            case 0:
                models[name] = warehouse.new_epoch(model)
            case 1:
                exactly &= not warehouse.evict(ByteCount(chance.randrange(1 << 18)))
            case 2 if heads := warehouse.heads(model.id):
                warehouse.remove(model.id, chance.choice(heads))
                exactly = False
            case 3:
                _put_own_keys(warehouse, model, chance)
            case _:
                _put_chain(warehouse, model, chance)
    return exactly


def _put_chain(warehouse: Warehouse, model: Model, chance: random.Random) -> None:
    """Some groups and shards of a chain, a branch, or the end of one whose beginning may lack."""
    fork = chance.choice([None, None, 2, 5])
    blocks = (fork or 0) + chance.randrange(1, 10)
    names = chain_of(model, blocks, chance.randrange(8), fork=fork)
    start = chance.choice([0, 0, 0, blocks // 2])
    for group in range(len(model.layout.groups)):
        for shard in range(model.layout.shards):
            if chance.random() < 0.9:
                retention = chance.choice(list(Retention))
                if retention is Retention.PINNED and chance.random() < 0.8:
                    retention = Retention.STANDARD
                some = names.slice(start, blocks) if start else names
                with suppress(PromiseRefused):  # to pin an end whose beginning lacks
                    put(warehouse, model, some, group=group, shard=shard, retention=retention)


def _put_own_keys(warehouse: Warehouse, model: Model, chance: random.Random) -> None:
    """A chain of an engine's own keys."""
    start, count = chance.randrange(3), chance.randrange(1, 6)
    seed = chance.randrange(5)
    names = own_names(
        model,
        *(
            (f"key-{seed}-{n}", f"key-{seed}-{n - 1}" if n else None, 16 * (n + 1))
            for n in range(start, start + count)
        ),
    )
    put(warehouse, model, names, group=model.layout.spine)


def main(directory: str) -> None:
    """Rebuild."""
    rebuild(Path(directory), force=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

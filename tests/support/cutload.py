"""A random load on a warehouse whose devices are nearly full, recorded for power cuts.

It puts chains with branches, several at once, in two models, evicts, removes, leases, and makes
holes and epochs.
"""

import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from support.powercut import Recorder
from support.warehouses import MHA, chain_of, open_warehouse, payload_of, payloads_of, upload_all
from twfs.checksums import checksums_of
from twfs.datapath.match import Match
from twfs.datapath.putting import Put
from twfs.errors import NoSuchBlock, NotEmpty, StaleEpoch, WarehouseFull
from twfs.eviction import evicting
from twfs.layout import Group, Layout
from twfs.metadata.environment import Metadata
from twfs.metadata.tables import RETIRED, WriteView
from twfs.prefix import Names
from twfs.records import BlockKey, Extent
from twfs.store import Durability, Model, PutOutcome
from twfs.units import ByteCount, ByteOffset
from twfs.warehouse import Warehouse

USABLE_BYTES: Final = 480 << 10  # of a device; so a check takes milliseconds, and all is reused
WIDE: Final = Layout(
    "test/wide", (Group(layers=5, kv_heads=4, head_size=16, dtype="float16"),), 16
)  # 20 KiB a block: several writes of one block's extents, where space is in pieces
LAYOUTS: Final = {"m": MHA, "w": WIDE}
HELD_MAX: Final = 2  # puts begun, and leases, at a time
HOLES_MAX: Final = 3  # each takes space for good


def shrink(directory: Path) -> None:
    """Retire all of each device but USABLE_BYTES, as if bytes had been lost there."""
    tables = Metadata.open(directory / "meta")

    def job(view: WriteView) -> None:
        for run in list(view.runs("free")):
            rest = Extent(
                run.device, ByteOffset(run.offset + USABLE_BYTES),
                ByteCount(run.length - USABLE_BYTES),
            )  # fmt: skip
            view.take_free(rest)
            view.add_limbo(rest, RETIRED)

    tables.submit(job).result()
    tables.close()


class CutLoad:
    """One warehouse under load; `known` has every chain that was ever offered, by model."""

    def __init__(self, directory: Path, recorder: Recorder, durability: Durability) -> None:
        self._directory = directory
        self._recorder = recorder
        self._durability = durability
        self.known: dict[int, list[Names]] = {}
        self.sums: dict[BlockKey, bytes] = {}  # xxh3 of the bytes that a name stands for
        self._begun: list[tuple[Put, Model, Names, int]] = []
        self._matches: list[Match] = []
        self._holes = 0

    def run(self, chance: random.Random, steps: int) -> None:
        """Do *steps* things; the checker finds nothing afterwards."""
        with open_warehouse(self._directory, durability=self._durability) as warehouse:
            for name, layout in LAYOUTS.items():
                self._recorder.opened(warehouse.open_model(name, layout).id)
            for _ in range(steps):
                model = warehouse.open_model(chance.choice(sorted(LAYOUTS)))
                with suppress(WarehouseFull, StaleEpoch):
                    self._step(warehouse, model, chance)
            for begun, *_ in self._begun:
                begun.abandon()
            for match in self._matches:
                match.release()

    def _step(self, warehouse: Warehouse, model: Model, chance: random.Random) -> None:
        kind = chance.choices(
            (
                "put",
                "begin",
                "publish",
                "abandon",
                "remove",
                "match",
                "release",
                "hole",
                "evict",
                "epoch",
            ),
            (30, 12, 12, 3, 8, 8, 6, 2, 2, 1),
        )[0]
        if kind == "put":
            self._put(warehouse, model, self._chain(model, chance))
        elif kind == "begin" and len(self._begun) < HELD_MAX:
            names, since = self._chain(model, chance), self._now()
            self._begun.append((upload_all(warehouse, model, names), model, names, since))
        elif kind == "publish" and self._begun:
            put, model, names, since = self._begun.pop(0)
            self._tell(model, names, put.publish().outcomes, since)
        elif kind == "abandon" and self._begun:
            self._begun.pop()[0].abandon()
        elif kind == "remove" and (heads := warehouse.heads(model.id)):
            with suppress(NoSuchBlock, NotEmpty):
                warehouse.remove(model.id, chance.choice(heads))
        elif kind == "match" and len(self._matches) < HELD_MAX and self.known.get(model.id):
            self._matches.append(warehouse.match(model, chance.choice(self.known[model.id])))
        elif kind == "release" and self._matches:
            self._matches.pop(0).release()
        elif kind == "hole" and self._holes < HOLES_MAX:
            self._hole(warehouse, chance)
        elif kind == "evict":
            warehouse.evict(ByteCount(64 << 10))
        elif kind == "epoch":
            self._recorder.opened(warehouse.new_epoch(model).id)

    def _now(self) -> int:
        return len(self._recorder.records)

    def _chain(self, model: Model, chance: random.Random) -> Names:
        """A chain of its own, or a branch, or one that was offered before."""
        seed, fork = chance.randrange(1, 30), chance.choice([None, None, 1, 2, 4])
        names = chain_of(model, (fork or 0) + chance.randrange(1, 7), seed, fork=fork)
        self.known.setdefault(model.id, []).append(names)
        for index in range(len(names)):
            key = BlockKey(model.id, names.hash_at(index))
            if key not in self.sums:
                self.sums[key] = checksums_of(payload_of(model.layout, key.prefix_hash)).xxh3
        return names

    def _put(self, warehouse: Warehouse, model: Model, names: Names) -> None:
        since = self._now()
        result = warehouse.put(model, names, payloads_of(model.layout, names))
        self._tell(model, names, result.outcomes, since)

    def _tell(self, model: Model, names: Names, outcomes: Sequence[PutOutcome], since: int) -> None:
        """A put has returned: what it published is promised from here on."""
        published = [
            BlockKey(model.id, names.hash_at(index))
            for index, outcome in enumerate(outcomes)
            if outcome is PutOutcome.PUBLISHED
        ]
        self._recorder.returned(published, since)

    def _hole(self, warehouse: Warehouse, chance: random.Random) -> None:
        """Say of a block that its bytes are lost."""
        core = warehouse._core
        with core.metadata.read() as view:
            keys = sorted((BlockKey.unpack(key) for key, _ in view.all_blocks()), key=str)
            if not keys:
                return
            key = chance.choice(keys)
            block = view.block(key)
        assert block is not None
        self._holes += evicting.spoil(core, key, block.generation)

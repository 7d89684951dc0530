"""A warehouse on real block devices whose faults a test commands, and how to ask it for its blocks.

Whatever a device does, a HIT is compared byte for byte here; so every test that reads through
`outcomes` would fail of a wrong byte.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from support.faultrules import EVERYWHERE, Act, Op, Rule
from support.faultydisks import FaultyDisks
from support.warehouses import DEVICE_BYTES, MHA, block_at, payload_of, settle
from twfs.devices.formatting import DeviceSpec
from twfs.prefix import Names
from twfs.records import DATA_START, Extent
from twfs.store import Model, ReadOutcome, Store
from twfs.units import ALIGN
from twfs.warehouse import Warehouse

DISKS: Final = ("device0", "device1")  # by their index in the warehouse
HIT: Final = ReadOutcome.HIT


@dataclass(frozen=True, slots=True)
class Media:
    """Two faulty disks and the directory of the warehouse on them."""

    disks: FaultyDisks
    directory: Path

    @classmethod
    def made(cls, disks: FaultyDisks, directory: Path) -> Self:
        """A new warehouse on *disks*, whatever they hold; *directory* lies on a sound one."""
        specs = [DeviceSpec(loop) for loop in disks.loops.values()]
        Warehouse.create(directory, specs, force=True)
        return cls(disks, directory)

    @contextmanager
    def opened(self, **options: Any) -> Iterator[tuple[Warehouse, Model]]:
        """The warehouse, open, and its model; it is for the test to end with the checker."""
        with Warehouse.open(self.directory, **options) as warehouse:
            yield warehouse, warehouse.open_model("m", MHA)

    def extent(self, warehouse: Warehouse, model: Model, names: Names, index: int) -> Extent:
        """Where block *index* lies; blocks of these tests have one extent."""
        _, block = block_at(warehouse, model, names, index)
        assert len(block.extents) == 1
        return block.extents[0]

    def rule(self, extent: Extent, op: Op, act: Act, **more: int) -> Rule:
        """A rule for the bytes of *extent*."""
        return Rule(
            disk=DISKS[extent.device], op=op, act=act, low=extent.offset,
            high=extent.offset + extent.length, **more,
        )  # fmt: skip

    def image(self, extent: Extent) -> "np.memmap[Any, np.dtype[np.uint8]]":
        """The bytes of *extent* on the medium itself."""
        path = self.disks.images[DISKS[extent.device]]
        return np.memmap(path, np.uint8, "r+", extent.offset, (extent.length,))


def everywhere(op: Op, act: Act, disk: str = DISKS[0], **more: int) -> Rule:
    """A rule for a whole disk, but for the superblocks when it is about data."""
    low = 0 if op is Op.FLUSH else DATA_START
    high = EVERYWHERE if op is Op.FLUSH else DEVICE_BYTES - ALIGN
    return Rule(disk=disk, op=op, act=act, low=low, high=high, **more)


def outcomes(store: Store, model: Model, names: Names, **options: Any) -> list[ReadOutcome]:
    """Read what is held of *names*, as an engine does; every HIT must have the right bytes."""
    with store.match(model, names) as match:
        into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(match.blocks)]
        found = list(match.read_into(into, **options).outcomes) if into else []
        for index, outcome in enumerate(found):
            wanted = payload_of(MHA, names.hash_at(index))
            right = np.array_equal(into[index], wanted)
            assert right or outcome is not HIT, f"block {index} is a hit with wrong bytes"
        return found


def judged(warehouse: Warehouse) -> None:
    """Wait until all reports of readers were judged, and their holes are durable."""
    both = threading.Barrier(3)
    for _ in range(2):  # its threads: when both are here, nothing is left behind
        warehouse._puts.submit(both.wait)
    both.wait()
    settle(warehouse)


def invariants(warehouse: Warehouse) -> list[int]:
    """What the checker finds, with data."""
    return sorted(finding.invariant for finding in warehouse.check(data=True).findings)


def devices_of(warehouse: Warehouse, model: Model, names: Names) -> list[int]:
    """On which device each block lies."""
    return [
        block_at(warehouse, model, names, index)[1].extents[0].device
        for index in range(len(names))
    ]  # fmt: skip

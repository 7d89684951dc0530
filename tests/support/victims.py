"""Processes that are to be killed, by name, and what each leaves for the next one to find.

`python -m support.victims NAME DIRECTORY SEED` is one; it prints a report a line, as Survivor
takes them. Started anew on what the last one left, until it is killed again.
"""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from support.crashing import FOREVER, Report, write
from support.daemon import PATIENT_S
from support.draining import drain_for_ever
from support.mounting import until
from support.warehouses import (
    DEVICE_BYTES,
    MHA,
    chain_of,
    open_warehouse,
    payloads_of,
    stop_tending,
)
from twfs.client import Client, connect
from twfs.daemon.server import serve
from twfs.devices.formatting import DeviceSpec
from twfs.errors import CorruptMetadata, CorruptSuperblock, NoSuchWarehouse, WrongDevice
from twfs.metadata.environment import Metadata
from twfs.metadata.tables import WriteView
from twfs.records import BlockKey
from twfs.recovery import repair
from twfs.recovery.rebuild import rebuild
from twfs.units import ByteCount, PrefixHash
from twfs.warehouse import Warehouse

Reporting = Callable[[Report], None]


def writer(directory: Path, seed: int, report: Reporting) -> None:
    """Put, branch and remove in a warehouse of its own."""
    write(directory, seed, FOREVER, report)


def daemon(directory: Path, _: int, report: Reporting) -> None:
    """Serve the socket; whoever started it is the client. Reports that it listens."""

    async def run() -> None:
        warehouse = Warehouse.open(directory)
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: serve(
                warehouse, directory / "socket", arena_bytes=64 << 20, task_status=task_status
            ))  # fmt: skip
            report(("serving", 0, 0, 0))

    trio.run(run)


def client(directory: Path, seed: int, report: Reporting) -> None:
    """Be an engine of the daemon that whoever started it keeps running in *directory*."""
    with connect(
        directory / "socket", arena_bytes=4 << 20, connect_timeout_s=PATIENT_S,
        match_timeout_s=PATIENT_S,
    ) as engine:  # fmt: skip
        use(engine, seed, report)


def use(engine: Client, seed: int, report: Reporting) -> None:
    """Put chains and read them until a put is not taken; reports what is durable. TwfsErrors."""
    chance = random.Random(seed)
    model = engine.open_model("m", MHA)
    while True:
        own, blocks = chance.randrange(1, 40), chance.randrange(1, 9)
        names = chain_of(model, blocks, own)
        if engine.put(model, names, payloads_of(MHA, names)).held != blocks:
            return
        report(("put", own, -1, blocks))
        with engine.match(model, names) as found:
            found.read_into([bytearray(MHA.block_bytes()) for _ in range(found.blocks)])


def creator(directory: Path, _: int, report: Reporting) -> None:
    """Make a warehouse beside the other one, over whatever is left of the last attempt."""
    while True:
        specs = [DeviceSpec(directory / "made.img", ByteCount(DEVICE_BYTES))]
        Warehouse.create(directory / "made", specs, force=True)
        report(("created", 0, 0, 0))


def settle_created(directory: Path) -> None:
    """What a killed creator left is a whole empty warehouse, or can be made into one."""
    made = directory / "made"
    try:
        Warehouse.open(made).close()  # open_warehouse would make it
        with open_warehouse(made) as warehouse:
            assert warehouse.models() == []
    except (NoSuchWarehouse, CorruptMetadata, CorruptSuperblock, WrongDevice):
        make_again(directory)


def make_again(directory: Path) -> None:
    """Create over the remains, and use it."""
    specs = [DeviceSpec(directory / "made.img", ByteCount(DEVICE_BYTES))]
    Warehouse.create(directory / "made", specs, force=True)
    with open_warehouse(directory / "made") as warehouse:
        warehouse.open_model("m", MHA)
    shutil.rmtree(directory / "made")


def scrubber(directory: Path, _: int, report: Reporting) -> None:
    """Read every block again and again."""
    with Warehouse.open(directory) as warehouse:
        while True:
            warehouse.operate("scrub-start", rate_bytes_s=0, whole=True)
            report(("scrubbing", 0, 0, 0))
            until(lambda: warehouse.operate("scrub-status")["state"] != "running", "a pass ends")


def drainer(directory: Path, _: int, report: Reporting) -> None:
    """Move every block from one device to the other, and back."""
    drain_for_ever(directory, lambda index: report(("draining", index, 0, 0)))


def repairer(directory: Path, seed: int, report: Reporting) -> None:
    """Break what can be made anew from the blocks, and repair it."""
    chance = random.Random(seed)
    while True:
        metadata = Metadata.open(directory / "meta")
        metadata.submit(lambda view: break_tables(view, chance)).result()
        metadata.close()
        report(("broken", 0, 0, 0))
        repair.run(directory)


def break_tables(view: WriteView, chance: random.Random) -> None:
    """Lose some heads, children and free runs."""
    for model, prefix_hash in list(view.all_heads()):
        if chance.random() < LOSSES:
            view.drop_head(model, prefix_hash)
    for parent, child in list(view.all_children()):
        if chance.random() < LOSSES:
            view.drop_child(BlockKey.unpack(parent), PrefixHash(child))
    for run in list(view.runs("free")):
        if chance.random() < LOSSES:
            view.take_free(run)


def rebuilder(directory: Path, _: int, report: Reporting) -> None:
    """Make the metadata anew."""
    while True:
        rebuild(directory, force=True)
        report(("rebuilt", 0, 0, 0))


VICTIMS: Final[dict[str, Callable[[Path, int, Reporting], None]]] = {
    "writer": writer,
    "daemon": daemon,
    "client": client,
    "creator": creator,
    "scrubber": scrubber,
    "drainer": drainer,
    "repairer": repairer,
    "rebuilder": rebuilder,
}
LOSSES: Final = 0.2  # of what a repairer has to mend


def settle_repair(directory: Path) -> None:
    """What a killed repairer left is mended by another run."""
    repair.run(directory)
    assert repair.run(directory).done == ()


def settle_drain(directory: Path) -> None:
    """What a killed drainer left: both devices take blocks again."""
    with open_warehouse(directory) as warehouse:
        for index in list(warehouse.devices):
            warehouse.operate("device-online", device=index)
        stop_tending(warehouse)


# What is done after a kill, before the warehouse is looked at.
SETTLING: Final[dict[str, Callable[[Path], None]]] = {
    "creator": settle_created,
    "drainer": settle_drain,
    "repairer": settle_repair,
}


def main(name: str, directory: str, seed: str) -> None:
    """Be a victim, and print what it reports."""

    def report(what: Report) -> None:
        sys.stdout.write(" ".join(map(str, what)) + "\n")
        sys.stdout.flush()

    VICTIMS[name](Path(directory), int(seed), report)


if __name__ == "__main__":
    main(*sys.argv[1:])

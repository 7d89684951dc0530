"""Processes that are to be killed, by name, and what each leaves for the next one to find.

`python -m support.victims NAME DIRECTORY SEED` is one; it prints a report a line, as Survivor
takes them. Started anew on what the last one left, until it is killed again.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from support.crashing import FOREVER, Report, write
from support.warehouses import DEVICE_BYTES, MHA, open_warehouse
from twfs.errors import CorruptMetadata, CorruptSuperblock, NoSuchWarehouse, WrongDevice
from twfs.formatting import DeviceSpec
from twfs.server import serve
from twfs.units import ByteCount
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


VICTIMS: Final[dict[str, Callable[[Path, int, Reporting], None]]] = {
    "writer": writer,
    "daemon": daemon,
    "creator": creator,
}


def main(name: str, directory: str, seed: str) -> None:
    """Be a victim, and print what it reports."""

    def report(what: Report) -> None:
        sys.stdout.write(" ".join(map(str, what)) + "\n")
        sys.stdout.flush()

    VICTIMS[name](Path(directory), int(seed), report)


if __name__ == "__main__":
    main(*sys.argv[1:])

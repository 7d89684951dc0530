"""`twfs device`: list the devices of a warehouse; add, drain, remove one; bring one back.

All of it works while the warehouse is mounted and in use: engines notice nothing.
"""

import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from twfs.errors import DeviceNotEmpty, InvalidInput
from twfs_tools.output import JsonFlag, Steps, parse_size, print_json, print_table, say, size
from twfs_tools.target import SocketOption, Target, WarehouseArgument, daemon_pid, locate, opened

POLL_SECONDS: Final = 0.5

NumberArgument = Annotated[int, typer.Argument(help="The number, as `twfs device list` shows it.")]

app = typer.Typer(
    help="List devices; add, drain, remove them while in use; bring one back that was offline."
)


@app.command("list")
def list_devices(
    warehouse: WarehouseArgument, socket: SocketOption = None, *, as_json: JsonFlag = False
) -> None:
    """List the devices: how each stands, what is on it, and its errors.

    online: all is well. read-only: it refused or failed writes; reads go on. draining: it is being
    emptied. offline: it is gone, or not the one that it was; its blocks are misses until it is
    back (see `online`), and are stored anew elsewhere when engines put them.
    """
    with opened(warehouse, socket) as store:
        rows = store.operate("device-list")
    if as_json:
        print_json({"devices": rows})
        return
    print_table(
        (">DEVICE", "STATE", ">SIZE", ">USED", ">BLOCKS", ">ERRORS", "PATH"),
        [
            (
                row["index"], row["state"], size(row["size_bytes"]), size(row["used_bytes"]),
                f"{row['blocks']:,}", row["errors"], row["path"],
            )
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        for note in row["notes"]:
            say(f"note: device {row['index']}: {note}")
        drain = row["drain"]
        if drain is not None:
            say(f"drain of device {row['index']}: {_progress(drain)}")


@app.command("add")
def add_device(
    warehouse: WarehouseArgument,
    device: Annotated[str, typer.Argument(help="A block device, or an image as PATH:SIZE.")],
    socket: SocketOption = None,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite what the device holds now.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Format a device and take it into the warehouse; blocks go to it from then on."""
    path, colon, wanted = device.rpartition(":")
    sized = bool(colon) and not Path(device).exists()
    with opened(warehouse, socket) as store:
        row = store.operate(
            "device-add", path=str(Path(path if sized else device).absolute()),
            size_bytes=parse_size(wanted) if sized else None, force=force,
        )  # fmt: skip
    if as_json:
        print_json(row)
    else:
        say(f"device {row['index']} is {row['path']}, {size(row['size_bytes'])}")


@app.command("drain")
def drain_device(
    warehouse: WarehouseArgument,
    device: NumberArgument,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Bytes to move in a second; default 256M.")
    ] = None,
    socket: SocketOption = None,
    *,
    background: Annotated[
        bool, typer.Option("--background", help="Come back at once; the daemon goes on.")
    ] = False,
    lost: Annotated[
        bool, typer.Option("--lost", help="Give up the blocks of a device that is offline.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Empty a device: every block moves to the others while engines go on reading.

    Waits for the end; Ctrl-C leaves the daemon at it. After a restart the daemon goes on by
    itself. `twfs device online` takes it back.
    """
    alone = daemon_pid(locate(warehouse, socket).socket) is None
    if background and alone:
        raise InvalidInput("no daemon is there to go on in the background: leave that option out")
    given: dict[str, Any] = {"device": device, "lost": lost}
    if rate is not None:
        given["rate_bytes_s"] = parse_size(rate)
    with opened(warehouse, socket) as store:
        row = store.operate("device-drain", **given)
        if not background and not lost:
            row = _await_drain(store, row)
    if as_json:
        print_json(row)
    elif lost:
        say(f"the blocks of device {device} are given up: `twfs device remove` takes it out")
    else:
        say(f"drain of device {device}: {_progress(row['drain'])}")


def _await_drain(store: Target, row: dict[str, Any]) -> dict[str, Any]:
    """Wait until a drain has ended; DeviceNotEmpty if it did without emptying its device."""
    with Steps(f"draining device {row['index']}", row["blocks"]) as steps:
        moved = 0
        while row["drain"]["running"]:
            time.sleep(POLL_SECONDS)
            row = next(r for r in store.operate("device-list") if r["index"] == row["index"])
            steps.advance(row["drain"]["moved_blocks"] - moved, row["drain"]["waiting_for"] or None)
            moved = row["drain"]["moved_blocks"]
    if not row["drain"]["done"]:
        raise DeviceNotEmpty(f"device {row['index']} is not empty: {row['drain']['waiting_for']}")
    return row


@app.command("remove")
def remove_device(
    warehouse: WarehouseArgument,
    device: NumberArgument,
    socket: SocketOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Take an empty device out of the warehouse and wipe its superblocks; drain it before."""
    with opened(warehouse, socket) as store:
        done = store.operate("device-remove", device=device)
    if as_json:
        print_json(done)
        return
    say(f"device {device} ({done['path']}) is removed")
    if done["not_wiped"]:
        say(f"its superblock still names this warehouse, as it was not wiped: {done['not_wiped']}")


@app.command("online")
def online_device(
    warehouse: WarehouseArgument,
    device: NumberArgument,
    socket: SocketOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Take a device back into use that was offline, refused writes, or was being drained."""
    with opened(warehouse, socket) as store:
        row = store.operate("device-online", device=device)
    if as_json:
        print_json(row)
    else:
        say(f"device {device} is {row['state']}: {row['path']}")


def _progress(drain: dict[str, Any]) -> str:
    """Say in a few words how far a drain is."""
    done = f"{drain['moved_blocks']:,} blocks, {size(drain['moved_bytes'])} moved"
    if drain["lost_blocks"]:
        done += f", {drain['lost_blocks']:,} could not be read and are holes"
    if drain["done"]:
        return f"{done}; the device is empty"
    return f"{done}; waits for: {drain['waiting_for']}" if drain["waiting_for"] else done

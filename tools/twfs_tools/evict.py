"""`twfs evict`: make room now, or remove one session."""

from typing import Annotated

import typer

from twfs.errors import InvalidInput
from twfs.units import ByteCount
from twfs_tools.output import JsonFlag, parse_size, print_json, say, size, working
from twfs_tools.target import SocketOption, WarehouseArgument, model_named, opened, parse_hash


def evict(
    warehouse: WarehouseArgument,
    wanted: Annotated[
        str | None, typer.Option("--bytes", help="Evict in order until this much more is free.")
    ] = None,
    session: Annotated[
        str | None, typer.Option("--session", metavar="MODEL/HASH", help="Remove this session.")
    ] = None,
    socket: SocketOption = None,
    *,
    erase: Annotated[
        bool,
        typer.Option("--erase", help="Overwrite their headers too: no rebuild brings them back."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Evict by retention class and age, or remove one session (blocks that others share stay)."""
    if (wanted is None) == (session is None):
        raise InvalidInput("give either --bytes or --session")
    goal = ByteCount(0) if wanted is None else parse_size(wanted)
    name, _, digits = (session or "").rpartition("/")
    if session is not None and not name:
        raise InvalidInput(f"{session!r} is not MODEL/HASH, as `twfs ls` lists them")
    head = parse_hash(digits) if session is not None else None
    with opened(warehouse, socket) as store, working("evicting"):
        waiting = 0
        if erase:
            done = (
                store.operate("evict_erasing", wanted_bytes=goal)
                if head is None
                else store.operate("remove_erasing", model=name, head=digits)
            )
            freed, waiting = ByteCount(done["freed_bytes"]), done["waiting_blocks"]
        elif head is not None:
            freed = store.remove(model_named(store, name).id, head)
        else:
            freed = store.evict(goal)
        space = store.space()
    if as_json:
        print_json({
            "freed_bytes": freed, "free_bytes": space.free_bytes,
            "limbo_bytes": space.limbo_bytes, "total_bytes": space.total_bytes,
            "waiting_blocks": waiting,
        })  # fmt: skip
        return
    say(f"freed {size(freed)}; {size(space.free_bytes)} of {size(space.total_bytes)} are free")
    if waiting:
        say(f"{waiting:,} blocks are still being read: they are erased when their leases end")
    if wanted is not None and freed < goal:
        say(f"that is {size(goal - freed)} less than asked: the rest is pinned or leased")

"""`twfs purge`: blocks gone, and their bytes erased."""

from typing import Annotated, Any, Final

import typer

from twfs.config import duration_ms
from twfs.errors import InvalidInput
from twfs_tools.output import JsonFlag, age, print_json, print_table, say, size, working
from twfs_tools.target import SocketOption, TenantOption, WarehouseArgument, opened

EXIT_LEFT: Final = 50  # something could not be erased


def purge(  # noqa: PLR0917 - typer passes by name
    warehouse: WarehouseArgument,
    session: Annotated[
        str | None,
        typer.Option("--session", help="This session: an engine's id, or MODEL/HASH."),
    ] = None,
    tenant: TenantOption = None,
    model: Annotated[str | None, typer.Option("--model", help="Of this model alone.")] = None,
    older: Annotated[
        str | None,
        typer.Option("--older-than", metavar="AGE", help="Not used for so long: 30d, 12h, 90m."),
    ] = None,
    wait: Annotated[
        str, typer.Option("--wait", help="How long to wait for blocks that are being read.")
    ] = "60s",
    socket: SocketOption = None,
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write zeros over all of it, not only discard it.")
    ] = False,
    free_space: Annotated[
        bool,
        typer.Option(help="Erase what is free too: copies from before may lie there."),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Purge nothing: show what is still to be erased.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove blocks for good: unpublish them and erase their bytes.

    All options that choose must hold together. Blocks that others use stay, and are counted.
    Ends with 50 if something could not be erased yet, or at all; what waits for a lease or a device
    is erased when that is over, also after a restart. `--list` shows what waits so.
    """
    if listed:
        if any(each is not None for each in (session, tenant, model, older)):
            raise InvalidInput("`--list` shows all that waits: give no choice with it")
        with opened(warehouse, socket) as store:
            _list(store.operate("purges"), as_json=as_json)
        return
    older_ms = None if older is None else duration_ms(older)
    wait_ms = duration_ms(wait)
    if wait_ms is None or (older is not None and older_ms is None):
        raise InvalidInput("`never` is no length of time to wait for, and no age")
    given: dict[str, Any] = {
        "session": session, "tenant": tenant, "model": model, "older_ms": older_ms,
        "overwrite": overwrite, "free_space": free_space, "wait_ms": wait_ms,
    }  # fmt: skip
    with opened(warehouse, socket) as store:
        if dry_run or not yes:
            counted = store.operate("purge", **given, dry_run=True)
            if dry_run:
                _show(counted, as_json=as_json)
                return
            typer.confirm(
                f"purge {counted['purged_blocks']:,} blocks, {size(counted['purged_bytes'])}",
                abort=True, err=True,
            )  # fmt: skip
        with working("purging"):
            done = store.operate("purge", **given)
    _show(done, as_json=as_json)
    if not done["complete"]:
        raise typer.Exit(EXIT_LEFT)


def _list(found: dict[str, Any], *, as_json: bool) -> None:
    """Print what waits to be erased."""
    if as_json:
        print_json(found)
        return
    for each in found["purges"]:
        of = {name: each[name] for name in ("tenant", "model") if each[name] is not None}
        if each["sessions"]:
            of["sessions"] = ", ".join(each["sessions"])
        if each["before_ms"] is not None:
            of["last used"] = f"over {age(each['before_ms'])}"
        what = ", ".join(f"{name} {value}" for name, value in of.items())
        say(f"purge {each['number']}, begun {age(each['asked_ms'])}, is under way: {what}")
    rows = [("being read", "", size(found["leased_bytes"]))] if found["leased_bytes"] else []
    rows += [
        (f"device {each['device']}", each["why"] or "is next", size(each["bytes"]))
        for each in found["left_on_devices"]
    ]
    if rows:
        print_table(("LEFT TO ERASE", "WHY", ">SIZE"), rows)
    elif not found["purges"]:
        say("nothing waits to be erased")


def _show(done: dict[str, Any], *, as_json: bool) -> None:
    """Print a report."""
    if as_json:
        print_json(done)
        return
    verb = "would go" if done["dry_run"] else "gone"
    rows = [
        (verb, f"{done['purged_blocks']:,} blocks", size(done["purged_bytes"])),
        ("shared: stay", f"{done['shared_blocks']:,} blocks", size(done["shared_bytes"])),
    ]
    if not done["dry_run"]:
        rows += [
            ("discarded", "", size(done["discarded_bytes"])),
            ("overwritten", "", size(done["overwritten_bytes"])),
            ("free space discarded", "", size(done["free_discarded_bytes"])),
            ("free space overwritten", "", size(done["free_overwritten_bytes"])),
            ("access record", f"{done['erased_accesses']:,} requests", ""),
            ("left: being read", "", size(done["leased_bytes"])),
        ]
        rows += [
            (f"left: device {each['device']}", each["why"], size(each["bytes"]))
            for each in done["left_on_devices"]
        ]
        rows += [
            ("left: lost places", "never used again", size(done["retired_bytes"])),
            ("left: free space", "", size(done["free_left_bytes"])),
        ]
    print_table(("WHAT", "", ">SIZE"), rows)
    for note in done.get("notes", ()):
        say(f"note: {note}")

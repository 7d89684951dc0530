"""`twfs du`: who uses how much of the devices, so that the sums are what is used."""

from typing import Annotated, Any

import typer

from twfs.admin.usage import ROWS_MAX, By
from twfs_tools.output import JsonFlag, print_json, print_table, say, size
from twfs_tools.target import SocketOption, WarehouseArgument, opened

LINES = (
    ("payload", "payload_bytes"),
    ("headers", "header_bytes"),
    ("padding", "padding_bytes"),
    ("being removed", "leaving_bytes"),
    ("limbo (leases may read it)", "limbo_bytes"),
    ("retired (bytes were lost there)", "retired_bytes"),
    ("reserved for puts", "reserved_bytes"),
    ("in a commit just now", "transit_bytes"),
)


def du(
    warehouse: WarehouseArgument,
    by: Annotated[By, typer.Option("--by", help="What the rows are of.")] = By.TENANT,
    top: Annotated[
        int, typer.Option("--top", min=1, max=ROWS_MAX, help="How many rows, the largest first.")
    ] = 50,
    socket: SocketOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Show what tenants, models or sessions use alone and share; it adds up to what is used.

    Bytes are of the devices, headers and padding included. Of a tenant, shared is what it is
    charged for in its share group; of a session, what it has in common with other sessions.
    """
    with opened(warehouse, socket) as store:
        found: dict[str, Any] = store.operate("du", by=by.value, limit=top)
    if as_json:
        print_json(found)
        return
    rows = [
        (row["name"], row["model"] or "", row["tenant"] or "", f"{row['blocks']:,}",
         size(row["exclusive_bytes"]), size(row["shared_bytes"]))
        for row in found["rows"]
    ]  # fmt: skip
    columns = (by.value.upper(), "MODEL", "TENANT", ">BLOCKS", ">EXCLUSIVE", ">SHARED")
    shown = (0, 3, 4, 5) if by is not By.SESSION else range(len(columns))
    print_table([columns[i] for i in shown], [[row[i] for i in shown] for row in rows])
    if found["other_rows"]:
        say(f"and {found['other_rows']:,} others: {size(found['other_bytes'])}")
    if by is By.SESSION:
        say(f"in several sessions, counted once: {size(found['shared_once_bytes'])}")
        say(f"in no session: {size(found['no_session_bytes'])}")
    say(f"blocks: {found['blocks']:,}, {size(found['block_bytes'])}; used of the devices:")
    print_table(
        ("PART", ">BYTES", ">"),
        [
            *((name, f"{found[key]:,}", size(found[key])) for name, key in LINES if found[key]),
            ("used", f"{found['used_bytes']:,}", size(found["used_bytes"])),
        ],
    )

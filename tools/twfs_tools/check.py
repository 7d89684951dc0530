"""`twfs check`: every invariant of FORMAT.md, and with --data every payload."""

from typing import Annotated, Final

import typer

from twfs.errors import CheckFailed
from twfs_tools.output import JsonFlag, print_json, say, working
from twfs_tools.target import SocketOption, WarehouseArgument, opened

FINDINGS_EXIT: Final = CheckFailed.exit_code


def check(
    warehouse: WarehouseArgument,
    socket: SocketOption = None,
    *,
    data: Annotated[
        bool, typer.Option("--data", help="Read and verify every payload too.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check the warehouse, through its daemon or offline; ends with 3 if anything is broken.

    Prints one line per finding: the number of the invariant, and what breaks it.
    """
    with opened(warehouse, socket) as store, working("reading" if data else "checking"):
        report = store.check(data=data)
    if as_json:
        print_json({"ok": not report.findings, "report": report})
    else:
        for finding in report.findings:
            say(f"invariant {finding.invariant}: {finding.text}")
        verified = f", {report.payloads:,} payloads verified" if data else ""
        found = f"{len(report.findings):,} findings" if report.findings else "nothing found"
        say(f"{report.blocks:,} blocks checked{verified} in {report.seconds:.1f} s: {found}")
    if report.findings:
        raise typer.Exit(FINDINGS_EXIT)

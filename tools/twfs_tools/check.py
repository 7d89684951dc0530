"""`twfs check`: every invariant of FORMAT.md, with --data every payload; --repair mends."""

from dataclasses import asdict
from typing import Annotated, Final

import typer

from twfs.errors import CheckFailed, InvalidInput, NoDaemon, WarehouseBusy
from twfs.store import CheckReport
from twfs_tools.output import JsonFlag, print_json, say, working
from twfs_tools.target import Place, SocketOption, WarehouseArgument, daemon_pid, locate, opened

FINDINGS_EXIT: Final = CheckFailed.exit_code
LINES_MAX: Final = 1000  # of what a repair did: who has more needs no more of them


def check(
    warehouse: WarehouseArgument,
    socket: SocketOption = None,
    *,
    data: Annotated[
        bool, typer.Option("--data", help="Read and verify every payload too.")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Mend what can be mended; no daemon may run meanwhile."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check the warehouse, through its daemon or offline; ends with 3 if anything is broken.

    Prints one line per finding: the number of the invariant, and what breaks it. With --repair what
    cannot be proved to be right is let go, and all else is made to agree; ends with 3 if anything
    is still broken then.
    """
    place = locate(warehouse, socket)
    daemon = daemon_pid(place.socket)
    if repair:
        _repair(place, daemon, data=data, as_json=as_json)
        return
    with working("reading" if data else "checking"):
        if daemon is not None:
            with opened(warehouse, socket) as store:
                report = store.check(data=data)
        else:
            report = _offline(place, named=socket is not None, data=data)
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


def _offline(place: Place, *, named: bool, data: bool) -> CheckReport:
    """Check a warehouse that nobody has open, without changing anything, be it damaged or not."""
    from twfs.checking import invariants as checker  # noqa: PLC0415 - the tools that need neither start faster
    from twfs.checking.subject import offline  # noqa: PLC0415

    if place.directory is None or named:
        raise NoDaemon(f"nobody answers on {place.socket}: start the daemon with `twfs serve`")
    with offline(place.directory) as subject:
        return checker.run(subject, data=data)


def _repair(place: Place, daemon: int | None, *, data: bool, as_json: bool) -> None:
    """Repair, and say what was done and what is left."""
    from twfs.recovery import repair  # noqa: PLC0415

    if daemon is not None:
        raise WarehouseBusy(
            f"process {daemon} serves the warehouse on {place.socket}: stop it before a repair"
        )
    if place.directory is None:
        raise InvalidInput("a repair needs the warehouse's directory, not a socket")
    with working("repairing"):
        report = repair.run(place.directory, data=data)
    if as_json:
        print_json({"ok": not report.left, "report": asdict(report)})
    else:
        for line in report.done[:LINES_MAX]:
            say(f"mended: {line}")
        if len(report.done) > LINES_MAX:
            say(f"mended: {len(report.done) - LINES_MAX:,} more")
        for finding in report.left:
            say(f"not mended: invariant {finding.invariant}: {finding.text}")
        left = f"{len(report.left):,} findings left" if report.left else "nothing left to mend"
        say(
            f"{report.blocks:,} of {report.blocks_before:,} blocks stay, {report.holes:,} of them "
            f"holes, after {report.seconds:.1f} s: {left}"
        )
    if report.left:
        raise typer.Exit(FINDINGS_EXIT)

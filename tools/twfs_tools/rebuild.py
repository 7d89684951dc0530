"""`twfs rebuild`: the metadata made anew from the devices, and then checked."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twfs.errors import CheckFailed
from twfs_tools.output import Gauge, JsonFlag, print_json, say, size, working

if TYPE_CHECKING:
    from twfs.recovery.rebuild import Report
    from twfs.recovery.scanning import Progress
    from twfs.store import CheckReport


def rebuild(
    directory: Annotated[Path, typer.Argument(help="The warehouse's directory.")],
    devices: Annotated[
        list[Path] | None,
        typer.Option(
            "--device",
            help="Each of its devices; default those that the old metadata names, else the images "
            "in DIRECTORY.",
        ),
    ] = None,
    without: Annotated[
        list[int] | None,
        typer.Option("--without-device", help="Number of a device to give up, with its blocks."),
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Although the metadata is fine.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Rebuild lost, damaged or outdated metadata in DIRECTORY from the headers on its devices.

    Every block that was published and has not been overwritten comes back; evicted, removed and
    unpublished ones may too. Reads all of the devices; changes only DIRECTORY; ends with a check.
    """
    from twfs.recovery.rebuild import rebuild as rebuild_now  # noqa: PLC0415
    from twfs.warehouse import Warehouse  # noqa: PLC0415

    with Gauge() as gauge:
        report = rebuild_now(
            directory, devices or (), without=without or (), force=force,
            watch=lambda progress: _show(gauge, progress),
        )  # fmt: skip
    with working("checking"), Warehouse.open(directory) as warehouse:
        checked = warehouse.check()
    if as_json:
        print_json({"ok": not checked.findings, "rebuilt": asdict(report), "check": checked})
    else:
        _tell(report, checked)
    if checked.findings:
        raise typer.Exit(CheckFailed.exit_code)


def _show(gauge: Gauge, progress: "Progress") -> None:
    """Move the bar; bytes are shown as such, blocks counted."""
    in_bytes = progress.phase != "writing"
    count = f"{progress.blocks:,} headers" if in_bytes else f"of {progress.total:,} blocks"
    shown = f"{size(progress.done)} of {size(progress.total)}, " if in_bytes else ""
    gauge.show(
        progress.phase, progress.done, progress.total, f"{shown}{count}", progress.seconds_left
    )


def _tell(report: "Report", checked: "CheckReport") -> None:
    """Say in lines what came back and what did not."""
    for number, path in sorted(report.devices.items()):
        say(f"device {number}: {path}")
    for number in report.without:
        say(f"device {number}: given up, with every block that lay on it")
    took = " + ".join(f"{seconds:.1f} s {phase}" for phase, seconds in report.seconds.items())
    say(f"{size(report.read_bytes)} read: {took}")
    if report.unreadable_bytes:
        say(f"{size(report.unreadable_bytes)} cannot be read")
    say(
        f"{report.headers:,} headers found, {report.accepted:,} blocks are back "
        f"({size(report.accepted_bytes)} in {report.models:,} models, {report.detached:,} detached)"
    )
    for cause, count in sorted(report.rejected.items()):
        say(f"{count:,} headers {cause}")
    say("blocks that had been evicted, removed or not yet published may be among those back")
    for note in report.notes:
        say(f"note: {note}")
    if report.old is not None:
        say(f"the old metadata is kept in {report.old}: remove it when all is well")
    for finding in checked.findings:
        say(f"invariant {finding.invariant}: {finding.text}")
    found = f"{len(checked.findings):,} findings" if checked.findings else "nothing found"
    say(f"{checked.blocks:,} blocks checked in {checked.seconds:.1f} s: {found}")

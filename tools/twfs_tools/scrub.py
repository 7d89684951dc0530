"""`twfs scrub`: read every block again, now; what has gone bad becomes a hole.

Beside a daemon the pass is the daemon's, and goes on when this command ends.
"""

import time
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer

from twfs.errors import CheckFailed, InvalidInput
from twfs.store import Namespace
from twfs_tools.output import JsonFlag, Steps, age, parse_size, print_json, say, size
from twfs_tools.target import SocketOption, WarehouseArgument, daemon_pid, locate, opened

POLL_SECONDS: Final = 0.5  # between two looks at the pass
AT_WORK: Final = frozenset({"running", "stopping"})
NO_LIMIT: Final = 0


def scrub(
    warehouse: WarehouseArgument,
    socket: SocketOption = None,
    rate: Annotated[
        str | None,
        typer.Option(
            "--rate",
            help="Bytes per second, as 64M; 0 is no limit. Default: what others leave; without a "
            "daemon no limit.",
        ),
    ] = None,
    *,
    whole: Annotated[
        bool, typer.Option("--whole", help="Begin anew, even where a pass is unfinished.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--background", help="Wait for the end; the daemon goes on.")
    ] = True,
    show: Annotated[bool, typer.Option("--status", help="Only say how far it is.")] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the pass; the next one goes on where it was.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Read and verify every block; ends with 3 if any was bad, or a device fails.

    A bad block becomes a hole, which the next put fills; its place on the device is not used again.
    """
    if show + stop + (rate is not None or whole or not wait) > 1:
        raise InvalidInput("--status and --stop stand alone")
    alone = daemon_pid(locate(warehouse, socket).socket) is None
    if alone and not wait:
        raise InvalidInput("--background needs a daemon, which goes on: start one, or wait")
    with opened(warehouse, socket) as store:
        if show or stop:
            status = store.operate("scrub-stop" if stop else "scrub-status")
        else:
            wanted = parse_size(rate) if rate is not None else NO_LIMIT if alone else None
            status = store.operate("scrub-start", rate_bytes_s=wanted, whole=whole)
            if wait:
                status = _await_end(store, status)
    if as_json:
        print_json({"scrub": status})
    else:
        _tell(status)
    if wait and not (show or stop) and (status["bad_blocks"] or status["failing_devices"]):
        raise typer.Exit(CheckFailed.exit_code)


def _await_end(store: Namespace, status: dict[str, Any]) -> dict[str, Any]:
    """Follow the pass to its end; the last status."""
    with Steps("scrubbing", 100) as steps:
        shown = 0
        while status["state"] in AT_WORK:
            percent = int(100 * share_of(status))
            steps.advance(max(0, percent - shown), summary(status))
            shown = max(shown, percent)
            time.sleep(POLL_SECONDS)
            status = store.operate("scrub-status")
    return status


def share_of(status: Mapping[str, Any]) -> float:
    """How much of the pass is done, 0 to 1."""
    total = status["total_bytes"]
    return min(1.0, status["read_bytes"] / total) if total else 1.0


def summary(status: Mapping[str, Any]) -> str:
    """Say in one line what the scrubber does, or when it did."""
    if not status["pass"]:
        return "scrub: never run"
    done = f"{status['blocks']:,} blocks, {size(status['read_bytes'])}"
    bad = f"{status['bad_blocks']:,} bad"
    if status["state"] == "idle":
        last = status["last"]
        text = f"pass {status['pass']} ended {age(last['ended_ms'])}: {done} read, {bad}"
    else:
        text = f"pass {status['pass']} {status['state']}, {100 * share_of(status):.1f} %: {done}"
        text += f" read, {bad}"
        if status["eta_seconds"] is not None:
            text += f", {size(status['present_bytes_s'])}/s"
            text += f", {_duration(status['eta_seconds'])} left"
    if status["skipped_blocks"]:
        text += f", {status['skipped_blocks']:,} skipped"
    return f"scrub: {text}"


def _duration(seconds: int) -> str:
    """Show a duration."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def _tell(status: Mapping[str, Any]) -> None:
    """Print the summary, and what was found bad."""
    say(summary(status))
    for text in status["findings"]:
        say(f"bad: {text}")
    for index in status["failing_devices"]:
        say(f"device {index} fails: its blocks were left as they are; check the drive")
    if status["trouble"]:
        say(f"ended early: {status['trouble']}")

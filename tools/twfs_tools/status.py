"""`twfs status`: space, models, hit rates and every counter of the daemon."""

from collections.abc import Iterator, Mapping
from typing import Any

from twfs.store import Space
from twfs_tools.output import JsonFlag, print_json, print_table, say, size
from twfs_tools.scrub import summary
from twfs_tools.target import (
    SocketOption,
    WarehouseArgument,
    daemon_pid,
    locate,
    opened,
)


def status(
    warehouse: WarehouseArgument, socket: SocketOption = None, *, as_json: JsonFlag = False
) -> None:
    """Show space, hit rates, leases, devices, which reader served, and all counters."""
    place = locate(warehouse, socket)
    pid = daemon_pid(place.socket)
    with opened(warehouse, socket) as store:
        space, statistics = store.space(), store.statistics()
        models = store.models()
    if as_json:
        print_json({
            "directory": place.directory, "socket": place.socket, "daemon_pid": pid,
            "space": space, "statistics": statistics,
            "models": [
                {"model": info.name, "epoch": info.epoch, "blocks": info.blocks,
                 "heads": info.heads, "device_bytes": info.device_bytes}
                for info in models
            ],
        })  # fmt: skip
        return
    served = f"daemon {pid}" if pid is not None else "no daemon (opened by this command)"
    say(f"{warehouse}: {served}, {len(models)} models, {_space(space)}")
    say(_hits(statistics))
    for name, served in statistics.get("served", {}).items():
        say(f"read by {name}: {served['blocks']:,} blocks, {size(served['payload_bytes'])}")
    if "scrub" in statistics:
        say(summary(statistics["scrub"]))
    for device in statistics.get("devices", []):
        for note in device.get("notes", []):
            say(f"note: {device.get('path')}: {note}")
    print_table(
        ("COUNTER", ">VALUE"), [(name, _value(name, value)) for name, value in flat(statistics)]
    )


def _space(space: Space) -> str:
    """Say in one line how full the devices are."""
    used = space.total_bytes - space.free_bytes
    share = 100 * used / space.total_bytes if space.total_bytes else 0.0
    return (
        f"{size(used)} of {size(space.total_bytes)} used ({share:.1f} %), "
        f"{size(space.evictable_bytes)} evictable, {size(space.limbo_bytes)} in limbo, "
        f"{size(space.reserved_bytes)} reserved"
    )


def _hits(statistics: Mapping[str, Any]) -> str:
    """Say in one line how much of what was asked for was there."""
    counters = statistics.get("counters", {})
    asked, matched = counters.get("asked_blocks", 0), counters.get("matched_blocks", 0)
    rate = f"{100 * matched / asked:.1f} % of {asked:,} blocks" if asked else "nothing asked yet"
    return f"hits since the start: {rate}"


def flat(statistics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested *statistics*, in their order."""
    for name, value in statistics.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}.")
        elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            for index, each in enumerate(value):
                yield from flat(each, f"{path}.{index}.")
        else:
            yield path, value


def _value(name: str, value: object) -> str:
    """Show one value with the unit that its name ends with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if name.endswith("_bytes"):
        return size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"

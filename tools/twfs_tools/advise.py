"""`twfs advise`: what the warehouse's own record says of its size, its users and their prompts."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from twfs.admin.advising import PARTINGS_MAX, Live, Wishes
from twfs.admin.advising import advise as advice
from twfs.config import duration_ms
from twfs.errors import InvalidInput
from twfs.policy.accesses import read_record
from twfs_tools.advise_plot import draw
from twfs_tools.output import JsonFlag, parse_size, print_json, print_table, say, size
from twfs_tools.target import SocketOption, WarehouseArgument, opened

Capacities = Annotated[
    list[str] | None,
    typer.Option("--capacity", help="A size to predict for (20T); repeatable."),
]
Endurance = Annotated[
    str | None, typer.Option("--tbw", help="Bytes that may be written to all drives (7P).")
]
DriveWrites = Annotated[
    float | None, typer.Option("--dwpd", min=0, help="Or drive writes per day that they bear.")
]
Years = Annotated[
    float, typer.Option("--years", min=0.1, help="For so many years the drives bear --dwpd.")
]
Idle = Annotated[
    str, typer.Option("--idle", help="A session is live while it is away for less than this.")
]
Prompts = Annotated[bool, typer.Option("--prompts", help="Where prompts part that could be one.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="A PNG of the hit-rate curve to write.")]


def advise(  # noqa: PLR0917 - the command line
    warehouse: WarehouseArgument,
    capacities: Capacities = None,
    tbw: Endurance = None,
    dwpd: DriveWrites = None,
    years: Years = 5.0,
    idle: Idle = "1h",
    top: Annotated[
        int, typer.Option("--top", min=1, max=PARTINGS_MAX, help="How many rows of --prompts.")
    ] = 20,
    plot: Plot = None,
    socket: SocketOption = None,
    *,
    prompts: Prompts = False,
    as_json: JsonFlag = False,
) -> None:
    """Say what more or less space would do, who pays for it, and how long the drives last.

    From the access record that the daemon keeps. Hit rates are of tokens in whole blocks, as a
    warehouse of that size with the same policy of eviction would have them.
    """
    idle_ms = duration_ms(idle)
    if not idle_ms:
        raise InvalidInput("--idle never: every session would be live; give 10m or 1h")
    wishes = Wishes(
        tuple(parse_size(text) for text in capacities or ()),
        None if tbw is None else parse_size(tbw), dwpd, years, idle_ms,
    )  # fmt: skip
    with opened(warehouse, socket) as store:
        if prompts:
            found: list[dict[str, Any]] = store.operate("prompts", limit=top)
            _show_prompts(found, as_json=as_json)
            return
        now = msgspec.convert(store.operate("record"), Live, str_keys=True)
    document = advice(read_record(Path(now.record)), now, wishes)
    if plot is not None:
        draw(plot, document)
    if as_json:
        print_json(document)
    else:
        _print(document)
        if plot is not None:
            say(f"plot: {plot}")


def _print(document: dict[str, Any]) -> None:
    """The tables for people."""
    say(
        f"{document['requests']:,} requests in {_span(document['span_days'])}, of 1 block in "
        f"{1 / document['block_part']:,.0f} all uses: {_percent(document['hit_rate'])} of the "
        f"tokens were held, {_percent(document['ceiling'])} had been asked for before; all "
        f"different blocks are {size(document['footprint_bytes'])}\n"
    )
    total = document["total_bytes"]
    say(f"simulated with these blocks, and the policy {document['policy']}:")
    print_table(
        ["SPACE", ">OF NOW", ">HITS", ">WRITTEN/DAY", ">DRIVES LAST"],
        [
            [
                size(each["bytes"]),
                f"{each['bytes'] / total:.3g} x" if total else "-", _percent(each["hit_rate"]),
                _size_or_dash(each["written_bytes_per_day"]), _years(each["life_years"]),
            ]
            for each in document["curve"]
        ],
    )  # fmt: skip
    _print_writes(document["writes"])
    _print_sessions(document["sessions"])
    for part in ("tenants", "classes", "models"):
        say("")
        _print_part(part, document[part])


def _print_writes(writes: dict[str, Any]) -> None:
    """One line about the flash."""
    worn = writes["drive_writes_per_day"]
    say(
        f"\nwritten: {size(writes['bytes_per_day'])} a day"
        + (f", {worn:.3g} drive writes a day" if worn is not None else "")
        + (
            f": the drives last {_years(writes['life_years'])}"
            if writes["life_years"]
            else "; give --tbw or --dwpd to see how long the drives last"
        )
    )


def _print_sessions(sessions: dict[str, Any] | None) -> None:
    """One line about what a session needs."""
    if sessions is None:
        say("sessions: the record is too short to say what they need")
        return
    say(
        f"sessions: {sessions['sessions']:,.1f} live at a time (away for less than "
        f"{sessions['idle_s']:g} s); one needs {size(sessions['needed_bytes'])}, its whole chain "
        f"is {size(sessions['chain_bytes'])}; all together use "
        f"{size(sessions['working_set_bytes'])}"
    )


def _print_part(part: str, rows: list[dict[str, Any]]) -> None:
    """Tenants, classes or models: what they hold, and what it gives."""
    columns = [part.upper(), ">REQUESTS", ">ASKED TOKENS", ">HELD TOKENS", ">HITS", ">BYTES",
               ">TOKENS/GIB/DAY"]  # fmt: skip
    print_table(
        columns,
        [
            [
                row["name"], _number(row.get("requests")), _number(row.get("asked_tokens")),
                _number(row["held_tokens"]),
                _percent(row["hit_rate"]) if "hit_rate" in row else "-",
                _size_or_dash(row.get("held_bytes")), _number(row.get("tokens_per_gib_day")),
            ]
            for row in rows
        ],
    )  # fmt: skip


def _show_prompts(found: list[dict[str, Any]], *, as_json: bool) -> None:
    """Where prompts part, and a sentence each for who writes them."""
    if as_json:
        print_json(found)
        return
    if not found:
        say("no prompts part that could be one")
        return
    print_table(
        ["MODEL", "TENANT", ">ALIKE TOKENS", ">WAYS ON", ">TOKENS EACH", ">STORED", ">LOST TOKENS",
         ">LOST", "AFTER"],
        [
            [
                row["model"], row["tenant"], f"{row['position']:,}", f"{row['fan_out']:,}",
                f"{row['common_tokens']:,}", f"{row['behind_tokens']:,}",
                f"{row['lost_tokens']:,}", size(row["lost_bytes"]), row["after"],
            ]
            for row in found
        ],
    )  # fmt: skip
    say("")
    for row in found[:3]:
        say(row["advice"])


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _size_or_dash(value: float | None) -> str:
    return "-" if value is None else size(value)


def _years(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} years"


def _span(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours"

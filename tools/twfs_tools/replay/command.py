"""The command `twfs replay`: options in; a table, a JSON document and a plot out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from twfs.errors import CorruptMetadata, InvalidInput
from twfs.store import Durability
from twfs_tools.output import JsonFlag, Steps, parse_size, print_json, print_table, say, size
from twfs_tools.replay.drive import Hints
from twfs_tools.replay.options import DEFAULT_POLICY, numbers_of, seconds_of, seeds_of
from twfs_tools.replay.plan import CAPACITIES, TOKEN_BYTES, Plan, run
from twfs_tools.replay.plot import draw
from twfs_tools.replay.traces import Session, halves, read_traces

FULL: Final = "full"

Traces = Annotated[
    list[Path], typer.Argument(help="Session files (*.json), Mooncake traces (*.jsonl), folders.")
]
Windows = Annotated[
    list[str] | None,
    typer.Option("--window", help="Sessions start over so long; repeatable. Default 1h."),
]
Seeds = Annotated[
    str, typer.Option("--seeds", help="Seeds of the starts: 5 (for 1 to 5), 7-9 or 3,8.")
]
Capacities = Annotated[
    list[str] | None,
    typer.Option(
        "--capacity",
        help="Part of all blocks (25%) or modelled bytes (20T); repeatable. Default 1% to 100%.",
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="Of eviction, as twfs.toml names it; repeatable."),
]
BlockTokens = Annotated[
    int | None,
    typer.Option("--block-tokens", min=16, max=4096, help="Tokens of a block. Default 256."),
]
TokenBytes = Annotated[
    int, typer.Option("--token-bytes", min=1, help="KV bytes of a token, as modelled.")
]
Payload = Annotated[
    str, typer.Option("--payload", help="Bytes of a block on the device; full: as modelled.")
]
Front = Annotated[
    str, typer.Option("--front", help="The engine's own memory, an LRU, in modelled bytes.")
]
ClassMap = Annotated[
    list[str] | None,
    typer.Option("--class-map", help="PATTERN=CLASS of sessions' names; repeatable."),
]
TenantCount = Annotated[
    int, typer.Option("--tenants", min=0, help="Deal the sessions to so many tenants.")
]
TenantMap = Annotated[
    list[str] | None,
    typer.Option("--tenant-map", help="PATTERN=TENANT of sessions' names; repeatable."),
]
Quotas = Annotated[
    list[str] | None, typer.Option("--quota", help="TENANT=modelled bytes; repeatable.")
]
Weights = Annotated[
    list[str] | None, typer.Option("--weight", help="TENANT=weight under pressure; repeatable.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Settings of the warehouse, as in twfs.toml.")
]
Half = Annotated[str, typer.Option("--half", help="Every other session only: `learn` or `report`.")]
ReadPart = Annotated[
    float, typer.Option("--read", min=0, max=1, help="Part of the hits to read and compare.")
]
Directory = Annotated[
    Path, typer.Option("--directory", help="Where the scratch goes; it is removed afterwards.")
]
DurabilityOption = Annotated[
    Durability, typer.Option("--durability", help="When a publish returns.")
]
Plot = Annotated[Path | None, typer.Option("--plot", help="A PNG of hit rates to write.")]
Shared = Annotated[
    bool, typer.Option("--share-prefixes", help="Tools and system prompts alike are the same.")
]
Touch = Annotated[
    bool, typer.Option("--touch/--no-touch", help="Report uses, also those that --front served.")
]
HintsOption = Annotated[
    Hints, typer.Option("--hints", help="When a session says who it is, and how a request ended.")
]
Advise = Annotated[
    list[str] | None,
    typer.Option(
        "--advise", help="A capacity to predict from each run's access record; repeatable."
    ),
]
BoundsOnly = Annotated[
    bool, typer.Option("--bounds", help="Only the marks that are computed, without a warehouse.")
]


def replay(  # noqa: PLR0917 - the command line
    traces: Traces,
    windows: Windows = None,
    seeds: Seeds = "1",
    capacities: Capacities = None,
    policies: Policies = None,
    block_tokens: BlockTokens = None,
    token_bytes: TokenBytes = TOKEN_BYTES,
    payload: Payload = "4K",
    front: Front = "0",
    class_map: ClassMap = None,
    tenants: TenantCount = 0,
    tenant_map: TenantMap = None,
    quotas: Quotas = None,
    weights: Weights = None,
    config: ConfigFile = None,
    half: Half = "",
    read_part: ReadPart = 0.0,
    directory: Directory = Path("/var/tmp"),
    durability: DurabilityOption = Durability.STRICT,
    hints: HintsOption = Hints.ANSWER,
    plot: Plot = None,
    *,
    share_prefixes: Shared = False,
    touch: Touch = True,
    bounds_only: BoundsOnly = False,
    advise: Advise = None,
    as_json: JsonFlag = False,
) -> None:
    """Replay traces of real sessions through a real warehouse, scaled down in bytes alone.

    Each policy stands beside an exact LRU and Belady's optimum with bypass on the same requests.
    """
    if not directory.is_dir():
        raise InvalidInput(f"{directory} is not a directory: give --directory with room for it")
    plan = Plan(
        sessions=_chosen(read_traces(traces), half),
        names=[trace.name for trace in traces],
        windows_s=[seconds_of(each) for each in windows or ["1h"]],
        seeds=seeds_of(seeds),
        capacities=list(capacities or CAPACITIES),
        policies=list(policies or [DEFAULT_POLICY]),
        block_tokens=block_tokens,
        token_bytes=token_bytes,
        payload_bytes=None if payload == FULL else parse_size(payload),
        share_prefixes=share_prefixes,
        front_bytes=parse_size(front),
        touch=touch,
        hints=hints,
        classes=class_map or [],
        tenants=tenants,
        tenant_map=tenant_map or [],
        quotas=numbers_of(quotas or [], "SIZE"),
        weights=numbers_of(weights or [], "WEIGHT"),
        config=b"" if config is None else config.read_bytes(),
        read_part=read_part,
        durability=durability,
        directory=directory,
        warehouse=not bounds_only,
        advise=advise or [],
    )
    with Steps("requests", plan.replays) as steps:
        document = run(plan, steps.advance)
    _show(document, plot, as_json=as_json)


def _chosen(sessions: list[Session], half: str) -> list[Session]:
    """All sessions, or one half of them; InvalidInput."""
    if half not in {"", "learn", "report"}:
        raise InvalidInput(f"--half is learn or report, not {half!r}")
    learn, report = halves(sessions)
    return {"": sessions, "learn": learn, "report": report}[half]


def _show(document: Mapping[str, Any], plot: Path | None, *, as_json: bool) -> None:
    """Print and draw; CorruptMetadata if a warehouse was not sound at the end of its replay."""
    if plot is not None:
        draw(plot, document)
    if as_json:
        print_json(document)
    else:
        _print(document)
        if plot is not None:
            say(f"plot: {plot}")
    findings = [each for each in document["runs"] if each.get("findings")]
    if findings:
        raise CorruptMetadata(
            f"{len(findings)} warehouses were not sound after their replay: "
            f"{findings[0]['findings'][0]}"
        )


def _print(document: Mapping[str, Any]) -> None:
    """The tables for people."""
    stream, several = document["streams"][0], len(document["settings"]["seeds"]) > 1
    say(
        f"{stream['requests']:,} requests of {stream['sessions']:,} sessions: "
        f"{stream['asked_blocks']:,} blocks asked for, {stream['unique_blocks']:,} of them "
        f"different ({size(stream['unique_bytes'])}); an infinite store hits "
        f"{100 * stream['ceiling']:.2f} % of the tokens\n"
    )
    columns = ["policy", ">window", ">capacity", ">modelled", ">hits %", ">of ceiling %",
               ">amplification", ">written/unique"]  # fmt: skip
    rows = [
        [
            row["policy"], f"{row['window_s'] / 3600:g} h", f"{100 * row['capacity_part']:.3g} %",
            size(row["capacity_bytes"]),
            *(_mean(row, key, scale, several=several) for key, scale in (
                ("hit_rate", 100), ("of_ceiling", 100), ("amplification", 1),
                ("written_per_unique", 1),
            )),
        ]
        for row in sorted(
            document["summary"], key=lambda row: (row["window_s"], row["capacity_part"])
        )
    ]  # fmt: skip
    print_table(columns, rows)
    replayed = [each for each in document["runs"] if each["replayed"]]
    if replayed:
        say("")
        _print_speed(replayed)
    _print_advised([each for each in replayed if each["advised"]])
    for part in ("classes", "tenants"):
        _print_parts(part, [each for each in replayed if each[part]])


def _mean(row: Mapping[str, Any], key: str, scale: int, *, several: bool) -> str:
    """A mean, and the standard deviation over several seeds."""
    text = f"{scale * row[key]:.2f}"
    return f"{text} ± {scale * row[f'{key}_sd']:.2f}" if several else text


def _print_speed(runs: Sequence[Mapping[str, Any]]) -> None:
    """What the replays took, and what they were made of."""
    print_table(
        ["policy", ">window", ">seed", ">capacity", ">look-ups/s", ">publishes/s",
         ">publishes/CPU s", ">seconds", ">peak memory", ">physical", "check"],
        [
            [
                run["policy"], f"{run['window_s'] / 3600:g} h", run["seed"],
                f"{100 * run['capacity_part']:.3g} %", f"{run['lookups_per_s']:,.0f}",
                f"{run['publishes_per_s']:,.0f}", f"{run['publishes_per_cpu_s']:,.0f}",
                f"{run['wall_s']:.1f}", size(run["peak_memory_bytes"]),
                size(run["physical_capacity_bytes"]),
                "clean" if not run["findings"] else f"{len(run['findings'])} findings",
            ]
            for run in runs
        ],
    )  # fmt: skip


def _print_advised(runs: Sequence[Mapping[str, Any]]) -> None:
    """What `twfs advise` says after each run, beside the run at that capacity if there was one."""
    if not runs:
        return
    say("")
    print_table(
        ["recorded with", ">window", ">seed", ">at capacity", ">advised %", ">replayed %",
         ">off by", ">a live session needs"],
        [
            [
                f"{run['policy']}, {100 * run['capacity_part']:.3g} %",
                f"{run['window_s'] / 3600:g} h", run["seed"],
                f"{100 * each['capacity_part']:.3g} %", f"{100 * each['hit_rate']:.2f}",
                *(
                    ("-", "-")
                    if each["off_by"] is None
                    else (f"{100 * each['replayed_hit_rate']:.2f}", f"{100 * each['off_by']:+.2f}")
                ),
                "-" if each["session_bytes"] is None else size(each["session_bytes"]),
            ]
            for run in runs
            for each in run["advised"]
        ],
    )  # fmt: skip


def _print_parts(part: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """The same by class or by tenant, where there are several."""
    if not runs:
        return
    say("")
    print_table(
        [part, "policy", ">window", ">seed", ">capacity", ">requests", ">hits %", ">of ceiling %",
         ">written blocks", ">refused blocks"],
        [
            [
                each["name"] or "everybody", run["policy"], f"{run['window_s'] / 3600:g} h",
                run["seed"], f"{100 * run['capacity_part']:.3g} %", f"{each['requests']:,}",
                f"{100 * each['hit_rate']:.2f}", f"{100 * each['of_ceiling']:.2f}",
                f"{each['written_blocks']:,}", f"{each['refused_blocks']:,}",
            ]
            for run in runs
            for each in run[part]
        ],
    )  # fmt: skip

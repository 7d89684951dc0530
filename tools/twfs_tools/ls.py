"""`twfs ls`: the sessions of a warehouse, as `ls` and `du` of the mount would show them."""

from typing import Annotated, Any

import typer

from twfs.store import ModelInfo, SessionInfo, iterate_sessions
from twfs_tools.output import JsonFlag, age, print_json, print_table, say, size, working
from twfs_tools.target import SocketOption, TenantOption, WarehouseArgument, model_named, opened


def ls(
    warehouse: WarehouseArgument,
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    socket: SocketOption = None,
    tenant: TenantOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """List sessions: tenant, tokens, blocks, bytes of their own and shared, last use, class.

    `own` and `shared` count device bytes, headers and padding included, as `du` does; a shared
    block is in the `shared` of each session over it, and once in the model's device bytes.
    `payload_bytes` (in JSON) counts what `ls -l` shows.
    """
    with opened(warehouse, socket) as store, working("listing"):
        infos = store.models() if model is None else [model_named(store, model)]
        listed = [
            (info, [s for s in iterate_sessions(store, info.id) if tenant in {None, s.tenant}])
            for info in infos
        ]
        detached = {info.name: len(store.detached(info.id)) for info in infos}
    if as_json:
        print_json({"models": [_document(info, of, detached[info.name]) for info, of in listed]})
        return
    for info, sessions in listed:
        _print(info, sessions, detached[info.name])
    if not listed:
        say("no models")


def session_document(info: SessionInfo) -> dict[str, Any]:
    """Return *info* as it stands in JSON."""
    return {
        "head": info.head, "tokens": info.tokens, "blocks": info.blocks,
        "payload_bytes": info.payload_bytes, "own_bytes": info.own_bytes,
        "shared_bytes": info.shared_bytes, "last_use_ms": info.last_use_ms,
        "published_ms": info.published_ms, "retention": info.retention, "tenant": info.tenant,
        "ids": info.ids,
    }  # fmt: skip


def _document(info: ModelInfo, sessions: list[SessionInfo], detached: int) -> dict[str, Any]:
    """Return one model's part of the JSON document."""
    return {
        "model": info.name, "epoch": info.epoch, "blocks": info.blocks, "detached": detached,
        "device_bytes": info.device_bytes, "own_bytes": sum(each.own_bytes for each in sessions),
        "sessions": [session_document(each) for each in sessions],
    }  # fmt: skip


def _print(info: ModelInfo, sessions: list[SessionInfo], detached: int) -> None:
    """Print one model's table and its sum."""
    print_table(
        ("SESSION", "TENANT", ">TOKENS", ">BLOCKS", ">OWN", ">SHARED", "CLASS", "LAST USE"),
        [
            (
                each.head.hex(), each.tenant, f"{each.tokens:,}", f"{each.blocks:,}",
                size(each.own_bytes), size(each.shared_bytes), each.retention.value,
                age(each.last_use_ms),
            )
            for each in sessions
        ],
        title=f"{info.name}  (epoch {info.epoch})",
    )  # fmt: skip
    more = f", {detached:,} detached blocks" if detached else ""
    say(
        f"{len(sessions):,} sessions, {info.blocks:,} blocks, {size(info.device_bytes)} "
        f"on the device{more}\n"
    )

"""`twfs pin` and `twfs retain`: the class of sessions, by their head or by the engine's id."""

from contextlib import suppress
from typing import Annotated

import typer

from twfs.errors import InvalidInput, NoSuchBlock, NotAllowed
from twfs.hints import Retention, check_session
from twfs.store import ModelInfo
from twfs.tenants import EVERYBODY
from twfs_tools.output import JsonFlag, print_json, say, working
from twfs_tools.target import (
    SocketOption,
    Target,
    TenantOption,
    WarehouseArgument,
    model_named,
    opened,
    parse_hash,
)

SessionsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SESSION...",
        help="MODEL/HASH, as `twfs ls` and the mount show them, or an engine's id of a session.",
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Look for ids in this model only.")
]


def pin(
    warehouse: WarehouseArgument,
    sessions: SessionsArgument,
    model: ModelOption = None,
    tenant: TenantOption = None,
    socket: SocketOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Keep sessions whatever happens: refused where more would be pinned than may be."""
    _retain(warehouse, sessions, Retention.PINNED, model, tenant, socket, as_json=as_json)


def retain(  # noqa: PLR0917 - typer passes by name
    warehouse: WarehouseArgument,
    sessions: SessionsArgument,
    retention: Annotated[Retention, typer.Option("--class", help="The class they get.")],
    model: ModelOption = None,
    tenant: TenantOption = None,
    socket: SocketOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Give sessions a class; a block has the highest of the sessions over it."""
    _retain(warehouse, sessions, retention, model, tenant, socket, as_json=as_json)


def _retain(  # noqa: PLR0917 - what both commands take
    warehouse: WarehouseArgument, sessions: list[str], retention: Retention,
    model: str | None, tenant: str | None, socket: SocketOption, *, as_json: bool,
) -> None:  # fmt: skip
    """Change one session after the other; the first that fails ends it."""
    done: list[str] = []
    with opened(warehouse, socket) as store, working("retaining"):
        infos = store.models() if model is None else [model_named(store, model)]
        try:
            for session in sessions:
                _one(store, infos, session, retention, tenant)
                done.append(session)
        finally:
            if done and not as_json:
                say(f"{retention.value}: {', '.join(done)}")
    if as_json:
        print_json({"class": retention, "sessions": done})


def _one(
    store: Target, infos: list[ModelInfo], session: str, retention: Retention,
    tenant: str | None,
) -> None:  # fmt: skip
    """Change one session, wherever it is; NoSuchBlock if it is nowhere."""
    name, _, digits = session.rpartition("/")
    at = next((info for info in infos if info.name == name), None)
    if at is not None:
        with suppress(InvalidInput):  # an id may have a slash too
            store.set_retention(at.id, parse_hash(digits), retention)
            return
    check_session(session)
    found = 0
    for info in infos:
        for number in _tenants(store, tenant):
            with suppress(NoSuchBlock):
                store.retain(info.id, session, retention, tenant=number)
                found += 1
    if not found:
        raise NoSuchBlock(
            f"no session {session!r}: give MODEL/HASH as `twfs ls` lists them, or an engine's id"
        )


def _tenants(store: Target, tenant: str | None) -> list[int]:
    """The numbers of the tenants to look at: all that the asker may see, unless one is named."""
    try:
        tenants = store.tenants()
    except NotAllowed:
        if tenant is not None:
            raise
        return [EVERYBODY]
    if tenant is not None:
        return [tenants.number_of(tenant)]
    return sorted({EVERYBODY, *(each.id for each in tenants)})

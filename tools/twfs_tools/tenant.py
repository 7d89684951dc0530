"""`twfs tenant`: who owns blocks, and which users may act for whom. For operators."""

import os
import pwd
from typing import Annotated, Any

import typer

from twfs.errors import InvalidInput
from twfs.tenants import EVERYBODY_NAME
from twfs_tools.output import JsonFlag, print_json, print_table, say
from twfs_tools.target import SocketOption, WarehouseArgument, opened

NameArgument = Annotated[str, typer.Argument(help="The tenant.")]
OwnerOption = Annotated[
    str | None,
    typer.Option("--owner", help="The user, by name or number, who sees its directories."),
]
UidsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--uid", help="Users, by name or number, who may act for it; repeatable, or with commas."
    ),
]

app = typer.Typer(help="List tenants, add and change them, take them out.")


@app.command("list")
def list_tenants(
    warehouse: WarehouseArgument, socket: SocketOption = None, *, as_json: JsonFlag = False
) -> None:
    """List all tenants; `everybody` is always there, and open to all unless it was restricted."""
    with opened(warehouse, socket) as store:
        tenants: list[dict[str, Any]] = store.operate("tenant-list")
    if all(each["name"] != EVERYBODY_NAME for each in tenants):
        tenants.insert(0, {"id": 0, "name": EVERYBODY_NAME, "owner": None, "uids": None})
    if as_json:
        print_json({"tenants": tenants})
        return
    print_table(
        (">NUMBER", "TENANT", "OWNER", "MAY ACT FOR IT"),
        [
            (
                each["id"], each["name"], "the mount's" if each["owner"] is None else
                _user(each["owner"]),
                "anyone" if each["uids"] is None else ", ".join(map(_user, each["uids"])) or "-",
            )
            for each in tenants
        ],
    )  # fmt: skip


@app.command("add")
def add(
    warehouse: WarehouseArgument,
    name: NameArgument,
    owner: OwnerOption = None,
    uids: UidsOption = None,
    socket: SocketOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Make a tenant: a secret salt of its own, so that it shares no hit with any other.

    The owner (default: who calls this) sees its directories in the mount; the users of --uid
    (default: the owner) may read and write its blocks as engines do.
    """
    seen_by = os.getuid() if owner is None else parse_user(owner)
    acting = parse_users(uids) if uids else [seen_by]
    with opened(warehouse, socket) as store:
        made = store.operate("tenant-add", name=name, owner=seen_by, uids=acting)
    _show("made", made, as_json=as_json)


@app.command("set")
def change(
    warehouse: WarehouseArgument,
    name: NameArgument,
    owner: OwnerOption = None,
    uids: UidsOption = None,
    socket: SocketOption = None,
    *,
    anyone: Annotated[
        bool, typer.Option("--anyone", help=f"Open {EVERYBODY_NAME!r} to all again.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Give a tenant another owner, or other users; --uid replaces all it had.

    `twfs tenant set WAREHOUSE everybody --uid USER` closes the tenant without a salt to others.
    """
    if owner is None and not uids and not anyone:
        raise InvalidInput("nothing to change: give --owner, --uid or --anyone")
    arguments: dict[str, Any] = {"name": name, "anyone": anyone}
    if owner is not None:
        arguments["owner"] = parse_user(owner)
    if uids:
        arguments["uids"] = parse_users(uids)
    with opened(warehouse, socket) as store:
        changed = store.operate("tenant-set", **arguments)
    if anyone:
        changed = {"id": 0, "name": EVERYBODY_NAME, "owner": None, "uids": None}
    _show("changed", changed, as_json=as_json)


@app.command("remove")
def remove(
    warehouse: WarehouseArgument,
    name: NameArgument,
    socket: SocketOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Take out a tenant that has no blocks; its number and salt are never used again."""
    with opened(warehouse, socket) as store:
        gone = store.operate("tenant-remove", name=name)
    _show("removed", gone, as_json=as_json)


def parse_user(text: str) -> int:
    """Return the uid that *text* means, a number or a name; InvalidInput."""
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError as error:
        raise InvalidInput(f"there is no user {text!r}: give a name or a number") from error


def parse_users(texts: list[str]) -> list[int]:
    """Return the uids of all of *texts*, which may hold several with commas; InvalidInput."""
    return [parse_user(part) for text in texts for part in text.split(",") if part]


def _user(uid: int) -> str:
    """A user as `ls -l` shows it."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


def _show(what: str, tenant: dict[str, Any], *, as_json: bool) -> None:
    """Say what has become of *tenant*."""
    if as_json:
        print_json({what: tenant})
        return
    uids = "anyone" if tenant["uids"] is None else ", ".join(map(_user, tenant["uids"])) or "nobody"
    say(f"tenant {tenant['name']} (number {tenant['id']}) {what}; {uids} may act for it")

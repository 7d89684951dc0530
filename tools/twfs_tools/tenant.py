"""`twfs tenant`: who owns blocks, and which users may act for whom. For operators."""

import os
import pwd
from typing import Annotated, Any, Final

import msgspec
import typer

from twfs.errors import InvalidInput
from twfs.tenants import EVERYBODY_NAME, Tenant
from twfs_tools.output import JsonFlag, parse_size, print_json, print_table, say, size
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

QuotaOption = Annotated[
    str | None,
    typer.Option(
        "--quota", help="Bytes of the devices that it may hold, as 100G; `none` for no limit."
    ),
]
WeightOption = Annotated[
    int | None,
    typer.Option("--weight", help="Of its part where space is short; others have 1."),
]
ShareOption = Annotated[
    str | None,
    typer.Option(
        "--share",
        help="The share group whose public prompts it has in common with others; `none` for none.",
    ),
]
NONE: Final = "none"
EVERYBODY_OPEN: Final = msgspec.to_builtins(Tenant(0, EVERYBODY_NAME, 0, (), anyone=True))

app = typer.Typer(help="List tenants, add and change them, take them out.")


@app.command("list")
def list_tenants(
    warehouse: WarehouseArgument, socket: SocketOption = None, *, as_json: JsonFlag = False
) -> None:
    """List all tenants; `everybody` is always there, and open to all unless it was restricted."""
    with opened(warehouse, socket) as store:
        tenants: list[dict[str, Any]] = store.operate("tenant-list")
        used: dict[str, dict[str, int]] = store.statistics()["tenants"]["charged"]
    if all(each["name"] != EVERYBODY_NAME for each in tenants):
        tenants.insert(0, EVERYBODY_OPEN)
    names = {each["id"]: each["name"] for each in tenants}
    tenants = [{**_shown(each, names), **used.get(each["name"], {})} for each in tenants]
    if as_json:
        print_json({"tenants": tenants})
        return
    print_table(
        (">NUMBER", "TENANT", "OWNER", "MAY ACT FOR IT", ">HOLDS", ">QUOTA", ">WEIGHT", "SHARES"),
        [
            (
                each["id"], each["name"],
                "the mount's" if each["owner"] is None else _user(each["owner"]),
                _acting(each), size(each.get("held_bytes", 0)),
                "-" if each["quota_bytes"] is None else size(each["quota_bytes"]),
                each["weight"], "a share group" if each["group"] else each["share"] or "-",
            )
            for each in tenants
        ],
    )  # fmt: skip


@app.command("add")
def add(
    warehouse: WarehouseArgument,
    name: NameArgument,
    *,
    owner: OwnerOption = None,
    uids: UidsOption = None,
    quota: QuotaOption = None,
    weight: WeightOption = None,
    share: ShareOption = None,
    socket: SocketOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a tenant: a secret salt of its own, so that it shares no hit with any other.

    The owner (default: who calls this) sees its directories in the mount; the users of --uid
    (default: the owner) may read and write its blocks as engines do. With --share it has public
    prompts, those that engines call so, in common with the tenants of that group.
    """
    seen_by = os.getuid() if owner is None else parse_user(owner)
    acting = parse_users(uids) if uids else [seen_by]
    limits = _limits(quota, weight, share)
    if not limits.get("quota_bytes"):
        limits.pop("quota_bytes", None)  # none is what a new tenant has
    with opened(warehouse, socket) as store:
        made = store.operate("tenant-add", name=name, owner=seen_by, uids=acting, **limits)
        names = _names(store)
    _show("made", _shown(made, names), as_json=as_json)


@app.command("set")
def change(
    warehouse: WarehouseArgument,
    name: NameArgument,
    *,
    owner: OwnerOption = None,
    uids: UidsOption = None,
    quota: QuotaOption = None,
    weight: WeightOption = None,
    share: ShareOption = None,
    socket: SocketOption = None,
    anyone: Annotated[
        bool, typer.Option("--anyone", help=f"Open {EVERYBODY_NAME!r} to all again.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Give a tenant another owner, other users, quota, weight or share group.

    --uid replaces all users it had. What a smaller quota has no room for is evicted in the
    background. `twfs tenant set WAREHOUSE everybody --uid USER` closes the tenant without a salt
    to others.
    """
    arguments: dict[str, Any] = {"name": name, "anyone": anyone, **_limits(quota, weight, share)}
    if owner is None and not uids and not anyone and len(arguments) == 2:
        raise InvalidInput(
            "nothing to change: give --owner, --uid, --anyone, --quota, --weight or --share"
        )
    if owner is not None:
        arguments["owner"] = parse_user(owner)
    if uids:
        arguments["uids"] = parse_users(uids)
    with opened(warehouse, socket) as store:
        changed = store.operate("tenant-set", **arguments)
        names = _names(store)
    _show("changed", _shown(changed, names), as_json=as_json)


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
        names = _names(store)
    _show("removed", _shown(gone, names), as_json=as_json)


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


def _limits(quota: str | None, weight: int | None, share: str | None) -> dict[str, Any]:
    """The arguments of a verb for what was given of these; InvalidInput."""
    given: dict[str, Any] = {}
    if quota is not None:
        given["quota_bytes"] = 0 if quota == NONE else parse_size(quota)
        if quota != NONE and not given["quota_bytes"]:
            raise InvalidInput("a quota of 0 bytes keeps nothing: write `none` for no limit")
    if weight is not None:
        given["weight"] = weight
    if share is not None:
        given["share"] = "" if share == NONE else share
    return given


def _names(store: Any) -> dict[int, str]:
    """The names of all tenants and share groups, by number."""
    return {each["id"]: each["name"] for each in store.operate("tenant-list")}


def _shown(tenant: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    """A tenant as it is shown: its share group by name, no users where anyone may act."""
    open_to_all = {"owner": None, "uids": None} if tenant["anyone"] else {}
    return {
        **{key: value for key, value in tenant.items() if key != "anyone"},
        **open_to_all, "share": names.get(tenant["share"]),
    }  # fmt: skip


def _acting(tenant: dict[str, Any]) -> str:
    """Who may act for a tenant, in words."""
    if tenant["group"]:
        return "its members"
    if tenant["uids"] is None:
        return "anyone"
    return ", ".join(map(_user, tenant["uids"])) or "nobody"


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
    quota = tenant["quota_bytes"]
    more = "" if quota is None else f"; its quota is {size(quota)}"
    more += f"; it shares public prompts in {tenant['share']}" if tenant["share"] else ""
    say(
        f"tenant {tenant['name']} (number {tenant['id']}) {what}; {_acting(tenant)} may act for it"
        f"{more}"
    )

"""Tenants of an open warehouse: models opened for one, and the operators' verbs that change them.

Tenants live in the roster on the devices, which rebuilds read, with a copy in the metadata, so that
neither the loss of the metadata nor that of a device takes them. The rule is in tenants.py.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import msgspec

from twfs import enrolling
from twfs.core import Core
from twfs.errors import InvalidInput, LayoutMismatch, NoSuchModel, NotEmpty, TooLarge
from twfs.layout import Layout, check_own_name
from twfs.operating import NoArguments, Verb, Verbs
from twfs.records import TENANT, TENANT_OFFSET
from twfs.roster import Roster
from twfs.secret import salt_of
from twfs.store import Model
from twfs.tables import ModelRecord
from twfs.tenants import (
    EVERYBODY,
    EVERYBODY_NAME,
    TENANT_MAX,
    UIDS_MAX,
    Tenant,
    Tenants,
    check_tenant_name,
    check_uids,
)

_Name = Annotated[str, msgspec.Meta(max_length=63)]
_Uids = Annotated[tuple[int, ...], msgspec.Meta(max_length=UIDS_MAX)]


class AddTenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `tenant-add` takes."""

    name: _Name
    owner: int
    uids: _Uids


class SetTenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `tenant-set` takes; what is None stays. *anyone* opens everybody's tenant to all."""

    name: _Name
    owner: int | None = None
    uids: _Uids | None = None
    anyone: bool = False


class NameTenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `tenant-remove` takes."""

    name: _Name


def open_model(core: Core, name: str, layout: Layout | None, tenant: str | None) -> Model:
    """Open a model for *tenant*, made with *layout* if it is not there; may wait for a commit.

    InvalidInput, LayoutMismatch, NoSuchModel, NoSuchTenant.
    """
    check_own_name(name)
    if layout is not None and any(layout.any_length(each) for each in range(len(layout.groups))):
        raise InvalidInput("blocks of any length are for the mounted files only")
    number = core.tenants.number_of(tenant)
    with core.lock:
        known = core.current.get(name)
        record = None if known is None else core.models[known]
    if record is None:
        if layout is None:
            raise NoSuchModel(f"no model {name}: open it with a layout to make it")
        record = enrolling.enter_model(core, name, layout, anew=False)
    if layout is not None and record.layout.fingerprint != layout.fingerprint:
        raise LayoutMismatch(
            f"model {name} has another layout (its own / given): "
            f"{record.layout.differences(layout)}"
        )
    return model_for(core, record, number)


def model_for(core: Core, record: ModelRecord, tenant: int) -> Model:
    """The model of *record* as opened for *tenant*, with its salt."""
    salt = salt_of(core.secret, tenant)
    return Model(record.id, record.name, record.epoch, record.layout, tenant, salt)


def list_tenants(core: Core) -> list[Tenant]:
    """All tenants that are entered, by number."""
    return list(core.tenants)


def add(core: Core, given: AddTenant) -> Tenant:
    """Enter a tenant under a number that none had before; InvalidInput, TooLarge."""
    check_tenant_name(given.name)
    (owner,) = check_uids((given.owner,))
    uids = check_uids(given.uids)
    added: list[Tenant] = []

    def change(roster: Roster) -> Roster:
        if given.name in {EVERYBODY_NAME, *(each.name for each in roster.tenants)}:
            raise InvalidInput(f"there is a tenant {given.name!r}: `twfs tenant set` changes it")
        if roster.tenant_end > TENANT_MAX:
            raise TooLarge(f"{TENANT_MAX} tenants have been made: make a second warehouse")
        added.append(Tenant(roster.tenant_end, given.name, owner, uids))
        return replace(
            roster, tenants=roster.with_tenant(added[0]), tenant_end=roster.tenant_end + 1
        )

    enrolling.enter_tenants(core, change)
    return added[0]


def change_tenant(core: Core, given: SetTenant) -> Tenant:
    """Give a tenant another owner or other uids; leases that are held go on. NoSuchTenant."""
    number = core.tenants.number_of(given.name)
    if given.anyone and (number != EVERYBODY or given.uids is not None):
        raise InvalidInput(f"only {EVERYBODY_NAME!r} can be open to anyone, and then has no uids")
    owner = None if given.owner is None else check_uids((given.owner,))[0]
    uids = None if given.uids is None else check_uids(given.uids)
    changed: list[Tenant] = []

    def change(roster: Roster) -> Roster:
        if given.anyone:
            changed.append(Tenant(EVERYBODY, EVERYBODY_NAME, 0, ()))
            left = tuple(each for each in roster.tenants if each.id != EVERYBODY)
            return replace(roster, tenants=left)
        before = Tenants(roster.tenants).get(number)
        if before is None and uids is None:
            raise InvalidInput(f"{given.name!r} is open to anyone: name the uids to restrict it to")
        before = before or Tenant(EVERYBODY, EVERYBODY_NAME, 0, ())
        changed.append(
            replace(
                before,
                owner=before.owner if owner is None else owner,
                uids=before.uids if uids is None else uids,
            )
        )
        return replace(roster, tenants=roster.with_tenant(changed[0]))

    enrolling.enter_tenants(core, change)
    return changed[0]


def remove(core: Core, given: NameTenant) -> Tenant:
    """Take a tenant out, whose number nobody gets again; NotEmpty while it has blocks or puts."""
    number = core.tenants.number_of(given.name)
    if number == EVERYBODY:
        raise InvalidInput(f"{EVERYBODY_NAME!r} is always there: `twfs tenant set` restricts it")
    with core.lock:  # from here on no put of it begins
        before = core.tenants
        gone = before.get(number)
        if gone is None or core.puts_of[number]:
            raise NotEmpty(f"tenant {given.name!r} has puts under way: try again when they ended")
        core.tenants = Tenants((each for each in before if each.id != number), before.operators)
    try:
        blocks = count_blocks(core, number)
        if blocks:
            raise NotEmpty(
                f"tenant {given.name!r} has {blocks} blocks: remove its sessions first, or let "
                "them be evicted"
            )
        enrolling.enter_tenants(
            core,
            lambda roster: replace(
                roster, tenants=tuple(each for each in roster.tenants if each.id != number)
            ),
        )
    except BaseException:
        with core.lock:
            core.tenants = before
        raise
    return gone


def count_blocks(core: Core, number: int) -> int:
    """Blocks of the tenant *number*; looks at every record, about a second for a million."""
    with core.metadata.read() as view:
        return sum(
            TENANT.unpack_from(value, TENANT_OFFSET)[0] == number for _, value in view.all_blocks()
        )


def verbs(core: Core) -> Verbs:
    """What operators ask about tenants; one change at a time."""
    changing = threading.Lock()

    def run(call: Callable[[Core, Any], Tenant]) -> Callable[[Any], Tenant]:
        def locked(given: Any) -> Tenant:
            with changing:
                return call(core, given)

        return locked

    return {
        "tenant-list": Verb(NoArguments, lambda _: list_tenants(core)),
        "tenant-add": Verb(AddTenant, run(add)),
        "tenant-set": Verb(SetTenant, run(change_tenant)),
        "tenant-remove": Verb(NameTenant, run(remove)),
    }

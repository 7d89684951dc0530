"""Tenants of an open warehouse: models opened for one, and the operators' verbs that change them.

Tenants live in the roster on the devices, which rebuilds read, with a copy in the metadata, so that
neither the loss of the metadata nor that of a device takes them. The rule is in tenants.py.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Final

import msgspec

from twfs.core import enrolling
from twfs.core.operating import NoArguments, Verb, Verbs
from twfs.core.state import Core
from twfs.devices.roster import Roster
from twfs.errors import InvalidInput, LayoutMismatch, NoSuchModel, NotEmpty, TooLarge
from twfs.eviction import evicting, sharing
from twfs.layout import Layout, check_own_name
from twfs.metadata.tables import ModelRecord
from twfs.records import TENANT, TENANT_OFFSET
from twfs.secret import salt_of
from twfs.store import Model
from twfs.tenants import (
    EVERYBODY,
    EVERYBODY_NAME,
    TENANT_MAX,
    UIDS_MAX,
    Tenant,
    Tenants,
    check_quota,
    check_tenant_name,
    check_uids,
    check_weight,
)

OPEN_TO_ALL: Final = Tenant(EVERYBODY, EVERYBODY_NAME, 0, (), anyone=True)  # before any change
_Name = Annotated[str, msgspec.Meta(max_length=63)]
_Uids = Annotated[tuple[int, ...], msgspec.Meta(max_length=UIDS_MAX)]


class AddTenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `tenant-add` takes."""

    name: _Name
    owner: int
    uids: _Uids
    quota_bytes: int | None = None
    weight: int = 1
    share: _Name | None = None


class SetTenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `tenant-set` takes; what is None stays. *anyone* opens everybody's tenant to all.

    *quota_bytes* 0 takes the quota away, and *share* "" the tenant out of its share group.
    """

    name: _Name
    owner: int | None = None
    uids: _Uids | None = None
    anyone: bool = False
    quota_bytes: int | None = None
    weight: int | None = None
    share: _Name | None = None


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
    salt, group = salt_of(core.secret, tenant), core.tenants.shares.get(tenant, 0)
    return Model(
        record.id, record.name, record.epoch, record.layout, tenant, salt,
        salt_of(core.secret, group),
    )  # fmt: skip


def list_tenants(core: Core) -> list[Tenant]:
    """All tenants that are entered, by number."""
    return list(core.tenants)


def add(core: Core, given: AddTenant) -> Tenant:
    """Enter a tenant under a number that none had before; InvalidInput, TooLarge."""
    check_tenant_name(given.name)
    (owner,) = check_uids((given.owner,))
    uids = check_uids(given.uids)
    check_quota(given.quota_bytes)
    check_weight(given.weight)
    added: list[Tenant] = []

    def change(roster: Roster) -> Roster:
        if given.name in {EVERYBODY_NAME, *(each.name for each in roster.tenants)}:
            raise InvalidInput(f"there is a tenant {given.name!r}: `twfs tenant set` changes it")
        roster, share = _with_share(roster, given.share)
        added.append(
            Tenant(
                roster.tenant_end, given.name, owner, uids, given.quota_bytes, given.weight, share
            )
        )
        return _entered(roster, added[0])

    enrolling.enter_tenants(core, change)
    return added[0]


def _entered(roster: Roster, tenant: Tenant) -> Roster:
    """The roster with a new tenant or share group; TooLarge if there are no numbers left."""
    if roster.tenant_end > TENANT_MAX:
        raise TooLarge(f"{TENANT_MAX} tenants have been made: make a second warehouse")
    return replace(roster, tenants=roster.with_tenant(tenant), tenant_end=roster.tenant_end + 1)


def _with_share(roster: Roster, name: str | None) -> tuple[Roster, int]:
    """The roster with the share group *name*, made if it is new, and its number; 0 for none.

    InvalidInput if it cannot name one, or names a tenant.
    """
    if not name:
        return roster, 0
    check_tenant_name(name)
    known = next((each for each in roster.tenants if each.name == name), None)
    if name == EVERYBODY_NAME or (known is not None and not known.group):
        raise InvalidInput(f"{name!r} is a tenant, and no share group: take another name for it")
    if known is not None:
        return roster, known.id
    return _entered(roster, Tenant(roster.tenant_end, name, 0, (), group=True)), roster.tenant_end


def change_tenant(core: Core, given: SetTenant) -> Tenant:
    """Change what is given of a tenant; leases that are held go on. InvalidInput, NoSuchTenant.

    Blocks above a quota that shrank are evicted in the background. Who leaves a share group lets go
    of the group's blocks that it is charged for; waits for that.
    """
    number = core.tenants.number_of(given.name)
    if given.anyone and (number != EVERYBODY or given.uids is not None):
        raise InvalidInput(f"only {EVERYBODY_NAME!r} can be open to anyone, and then has no uids")
    if given.share and number == EVERYBODY:
        raise InvalidInput(f"{EVERYBODY_NAME!r} has no salt, so all share with it already")
    if given.owner is not None:
        check_uids((given.owner,))
    if given.uids is not None:
        check_uids(given.uids)
    check_quota(given.quota_bytes or None)
    if given.weight is not None:
        check_weight(given.weight)
    _, share = _with_share(core.roster, given.share)  # all that may be wrong with it
    changed: list[Tenant] = []

    def change(roster: Roster) -> Roster:
        before = Tenants(roster.tenants).get(number) or OPEN_TO_ALL
        roster, share = _with_share(roster, given.share)
        changed.append(_changed(before, given, share))
        if changed[0] == OPEN_TO_ALL:
            left = tuple(each for each in roster.tenants if each.id != EVERYBODY)
            return replace(roster, tenants=left)
        return replace(roster, tenants=roster.with_tenant(changed[0]))

    with _leaving(core, number, stays=given.share is None or _group_of(core, number) == share):
        enrolling.enter_tenants(core, change)
    evicting.keep_quota(core, number)
    return changed[0]


def _group_of(core: Core, number: int) -> int:
    """The share group of the tenant *number*; 0 for none."""
    return core.tenants.shares.get(number, 0)


@contextmanager
def _leaving(core: Core, number: int, *, stays: bool) -> Iterator[None]:
    """Let a tenant be charged for no block of the group that it leaves in this context.

    NotEmpty while it has puts under way: they may be of public blocks.
    """
    before = core.tenants
    if stays or not _group_of(core, number):
        yield
        return
    with core.lock:  # from here on no put of public blocks begins
        if core.puts_of[number]:
            raise NotEmpty(
                f"tenant {before.name_of(number)!r} has puts under way: try again when they ended"
            )
        out = (replace(each, share=0) if each.id == number else each for each in before)
        core.tenants = Tenants(out, before.operators)
    try:
        sharing.leave(core, number)
        yield
    except BaseException:
        with core.lock:
            core.tenants = before
        raise


def _changed(before: Tenant, given: SetTenant, share: int) -> Tenant:
    """What becomes of *before*; InvalidInput."""
    anyone = given.anyone or (before.anyone and given.uids is None)
    if anyone and given.owner is not None:
        raise InvalidInput(f"{given.name!r} is open to anyone: name the uids to restrict it to")
    uids = before.uids if given.uids is None else check_uids(given.uids)
    quota = before.quota_bytes if given.quota_bytes is None else given.quota_bytes or None
    return replace(
        before,
        owner=0 if anyone else before.owner if given.owner is None else given.owner,
        uids=() if anyone else uids,
        quota_bytes=quota,
        weight=before.weight if given.weight is None else given.weight,
        share=before.share if given.share is None else share,
        anyone=anyone,
    )


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
        sharing.leave(core, number)
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

"""Tenants, and the rule of who may act for one and who may see its directories.

This is the one place of that rule; the socket and the mount ask it. Immutable values, any thread.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec

from twfs.errors import InvalidInput, NoSuchTenant, NotAllowed

EVERYBODY: Final = 0  # the tenant without a salt, which is always there
EVERYBODY_NAME: Final = "everybody"
TENANT_MAX: Final = (1 << 16) - 1  # a u16 in records and headers
UID_MAX: Final = (1 << 32) - 2  # the last one means nobody at all
UIDS_MAX: Final = 256  # of one tenant; a tenant's engines run as a handful of users
WEIGHT_MAX: Final = 1_000_000
QUOTA_BYTES_MAX: Final = 1 << 60  # beyond all devices: a slip of the pen
NAME_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """An owner of blocks; only the *uids* may act for it, and only *owner* sees its directories.

    A share group is one too: public blocks are its own, and tenants that name it pay for them.
    """

    id: int  # never given to another tenant; 0 stands in a roster only once it was changed
    name: str
    owner: int
    uids: tuple[int, ...]
    quota_bytes: int | None = None  # on the devices, headers and padding included; None: no limit
    weight: int = 1  # of its part of the space, where that is short
    share: int = 0  # number of the share group whose public blocks it reaches; 0: none
    group: bool = False  # a share group: nobody acts for it, its members do
    anyone: bool = False  # of everybody alone: changed, but open to all uids still


def check_tenant_name(name: str) -> None:
    """Raise InvalidInput unless *name* can be a tenant's."""
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidInput(
            f"{name!r} cannot name a tenant: up to 63 of a-z, 0-9, '.', '_' and '-', of which the "
            "first is a letter or a digit"
        )


def check_uids(uids: Iterable[int]) -> tuple[int, ...]:
    """Return *uids* sorted, each once; InvalidInput if one is none, or they are too many."""
    found = tuple(sorted(set(uids)))
    if len(found) > UIDS_MAX or any(not 0 <= uid <= UID_MAX for uid in found):
        raise InvalidInput(f"a tenant has at most {UIDS_MAX} uids, each from 0 to {UID_MAX}")
    return found


def check_quota(quota_bytes: int | None) -> None:
    """Raise InvalidInput unless *quota_bytes* can be a tenant's quota."""
    if quota_bytes is not None and not 0 < quota_bytes <= QUOTA_BYTES_MAX:
        raise InvalidInput(
            f"a quota of {quota_bytes} bytes: 1 to {QUOTA_BYTES_MAX}, or none for no limit"
        )


def check_weight(weight: int) -> None:
    """Raise InvalidInput unless *weight* can be a tenant's weight."""
    if not 1 <= weight <= WEIGHT_MAX:
        raise InvalidInput(f"a weight of {weight}: it is 1 to {WEIGHT_MAX}, against others' 1")


class Tenants:
    """All tenants at one moment. *operators* may act for all of them and see everything."""

    def __init__(
        self, tenants: Iterable[Tenant] = (), operators: frozenset[int] = frozenset({0})
    ) -> None:
        self._by_id = {tenant.id: tenant for tenant in tenants}
        self.operators = operators

    def __iter__(self) -> Iterator[Tenant]:
        """Those that are entered, by number, share groups too; everybody only once changed."""
        return iter(sorted(self._by_id.values(), key=lambda tenant: tenant.id))

    @cached_property
    def _by_name(self) -> Mapping[str, Tenant]:
        return {tenant.name: tenant for tenant in self._by_id.values()}

    def get(self, number: int) -> Tenant | None:
        """The tenant *number*, if it is entered."""
        return self._by_id.get(number)

    @cached_property
    def shares(self) -> Mapping[int, int]:
        """The share group of each tenant that is in one."""
        return {tenant.id: tenant.share for tenant in self._by_id.values() if tenant.share}

    def follows(self, above: int, below: int) -> bool:
        """Tell whether a block of the tenant *below* may have a parent of *above*.

        A chain is of one tenant, but may begin with blocks of its share group.
        """
        return above in {below, self.shares.get(below)}

    def pays(self, number: int) -> bool:
        """Tell whether blocks may be put for *number*: a tenant that is there, and no group."""
        found = self._by_id.get(number)
        return number == EVERYBODY if found is None else not found.group

    def there(self, number: int) -> bool:
        """Tell whether blocks may belong to *number*: a tenant, or a share group."""
        return number == EVERYBODY or number in self._by_id

    def is_group(self, number: int) -> bool:
        """Tell whether *number* is a share group's."""
        found = self._by_id.get(number)
        return found is not None and found.group

    def members(self, group: int) -> list[Tenant]:
        """The tenants that name the share group *group*, by number."""
        return [tenant for tenant in self if tenant.share == group and group]

    def quota_of(self, number: int) -> int | None:
        """The quota of *number* in bytes of the devices; None: no limit."""
        found = self._by_id.get(number)
        return None if found is None else found.quota_bytes

    def weight_of(self, number: int) -> int:
        """The weight of *number*; 1 for everybody, groups and lost tenants unless they have one."""
        found = self._by_id.get(number)
        return 1 if found is None else found.weight

    def name_of(self, number: int) -> str:
        """Its name; a number in words for one that is lost."""
        found = self._by_id.get(number)
        if found is not None:
            return found.name
        return EVERYBODY_NAME if number == EVERYBODY else f"tenant-{number}"

    def number_of(self, name: str | None) -> int:
        """The number of the tenant *name*, None meaning everybody; NoSuchTenant."""
        if name is None or name == EVERYBODY_NAME:
            return EVERYBODY
        found = self._by_name.get(name)
        if found is None or found.group:
            raise NoSuchTenant(f"no tenant {name!r}: see `twfs tenant list`")
        return found.id

    def may_act(self, uid: int, number: int) -> bool:
        """Tell whether *uid* may match, put, list and remove blocks of the tenant *number*.

        Of a share group whoever may act for a member of it.
        """
        if uid in self.operators:
            return True
        found = self._by_id.get(number)
        if found is None:
            return number == EVERYBODY
        if found.group:
            return any(uid in member.uids for member in self.members(number))
        return found.anyone or uid in found.uids

    def may_see(self, uid: int, number: int) -> bool:
        """Tell whether the mount shows *uid* the directories of the tenant *number*."""
        if uid in self.operators:
            return True
        found = self._by_id.get(number)
        if found is None:
            return number == EVERYBODY
        if found.group:
            return any(uid == member.owner for member in self.members(number))
        return found.anyone or uid == found.owner

    def may_import(self, uid: int, name: str) -> bool:
        """Tell whether *uid* may import blocks for the tenant *name*: as an engine or its owner."""
        known = self._by_name.get(name)
        if uid in self.operators:
            return True  # of a tenant that is not there, the error is another
        if known is None:
            return name == EVERYBODY_NAME
        if known.group:
            return False
        return self.may_act(uid, known.id) or self.may_see(uid, known.id)

    def owner_of(self, number: int) -> int | None:
        """To whom its directories belong; None where the mount's own owner has them."""
        found = self._by_id.get(number)
        if found is not None and not found.anyone:
            return found.owner
        return None if number == EVERYBODY else 0  # of a lost tenant: for operators alone

    def check_act(self, uid: int, number: int) -> None:
        """Raise NotAllowed unless *uid* may act for *number*: for one that is not there, too.

        A request is a tenant's: none names a share group.
        """
        if not self.may_act(uid, number) or (self.is_group(number) and uid not in self.operators):
            raise NotAllowed(
                f"uid {uid} may not act for tenant {number}: an operator allows it with "
                "`twfs tenant set`"
            )

    def check_name(self, uid: int, name: str | None) -> int:
        """Return the number of *name* if *uid* may act for it; NotAllowed, NoSuchTenant.

        Who may not act for it is not told whether it is there.
        """
        known = self._by_name.get(name or EVERYBODY_NAME)
        number = EVERYBODY if known is None else known.id
        there = name in {None, EVERYBODY_NAME} or (known is not None and not known.group)
        if uid not in self.operators and not (there and self.may_act(uid, number)):
            raise NotAllowed(
                f"uid {uid} may not act for a tenant {name or EVERYBODY_NAME!r}, or there is "
                "none: an operator allows it with `twfs tenant set`"
            )
        return self.number_of(name)


class _Kept(msgspec.Struct, frozen=True):
    """The copy of the tenants that the metadata keeps."""

    end: int
    tenants: tuple[Tenant, ...]


def pack_tenants(end: int, tenants: Iterable[Tenant]) -> bytes:
    """Return the copy for the metadata; *end* is the first number that was never given away."""
    return msgspec.json.encode(_Kept(end, tuple(tenants)))


def unpack_tenants(data: bytes) -> tuple[int, tuple[Tenant, ...]]:
    """Undo pack_tenants; ValueError if *data* is no such copy."""
    try:
        kept = msgspec.json.decode(data, type=_Kept)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"the copy of the tenants is unreadable: {error}") from error
    return kept.end, kept.tenants

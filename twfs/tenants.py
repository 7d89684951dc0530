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
NAME_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """An owner of blocks; only the *uids* may act for it, and only *owner* sees its directories."""

    id: int  # never given to another tenant; 0 stands in a roster only once it is restricted
    name: str
    owner: int
    uids: tuple[int, ...]


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


class Tenants:
    """All tenants at one moment. *operators* may act for all of them and see everything."""

    def __init__(
        self, tenants: Iterable[Tenant] = (), operators: frozenset[int] = frozenset({0})
    ) -> None:
        self._by_id = {tenant.id: tenant for tenant in tenants}
        self.operators = operators

    def __iter__(self) -> Iterator[Tenant]:
        """Those that are entered, by number; everybody only once it is restricted."""
        return iter(sorted(self._by_id.values(), key=lambda tenant: tenant.id))

    @cached_property
    def _by_name(self) -> Mapping[str, Tenant]:
        return {tenant.name: tenant for tenant in self._by_id.values()}

    def get(self, number: int) -> Tenant | None:
        """The tenant *number*, if it is entered."""
        return self._by_id.get(number)

    def there(self, number: int) -> bool:
        """Tell whether blocks may belong to *number*."""
        return number == EVERYBODY or number in self._by_id

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
        if found is None:
            raise NoSuchTenant(f"no tenant {name!r}: see `twfs tenant list`")
        return found.id

    def may_act(self, uid: int, number: int) -> bool:
        """Tell whether *uid* may match, put, list and remove blocks of the tenant *number*."""
        if uid in self.operators:
            return True
        found = self._by_id.get(number)
        return number == EVERYBODY if found is None else uid in found.uids

    def may_see(self, uid: int, number: int) -> bool:
        """Tell whether the mount shows *uid* the directories of the tenant *number*."""
        if uid in self.operators:
            return True
        found = self._by_id.get(number)
        return number == EVERYBODY if found is None else uid == found.owner

    def may_import(self, uid: int, name: str) -> bool:
        """Tell whether *uid* may import blocks for the tenant *name*: as an engine or its owner."""
        known = self._by_name.get(name)
        if uid in self.operators:
            return True  # of a tenant that is not there, the error is another
        if known is None:
            return name == EVERYBODY_NAME
        return self.may_act(uid, known.id) or self.may_see(uid, known.id)

    def owner_of(self, number: int) -> int | None:
        """To whom its directories belong; None where the mount's own owner has them."""
        found = self._by_id.get(number)
        if found is not None:
            return found.owner
        return None if number == EVERYBODY else 0  # of a lost tenant: for operators alone

    def check_act(self, uid: int, number: int) -> None:
        """Raise NotAllowed unless *uid* may act for *number*: for one that is not there, too."""
        if not self.may_act(uid, number):
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
        there = known is not None or name in {None, EVERYBODY_NAME}
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

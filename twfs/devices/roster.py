"""The roster: what of the metadata must survive its loss and is in no block header.

Names, epochs and layouts of the models, tenants, and where numbers end that may have been given
away. It is small and changes rarely, so all of it is written each time, to every device, by turns
into one of two places: a torn write leaves the one before. It is durable before the metadata says
the same: an epoch that was opened can so never be forgotten, and with it that old KV is void.
"""

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import msgspec

from twfs.devices.device import Device
from twfs.devices.payload import aligned_buffer
from twfs.errors import DeviceError, InvalidInput, TooLarge, TwfsError
from twfs.hints import Retention, check_session
from twfs.layout import Layout, check_model_name
from twfs.records import FORMAT_VERSION, ROSTER, ROSTER_BYTES, ROSTER_MAGIC
from twfs.secret import MAC_BYTES, mac_of
from twfs.tenants import Tenant
from twfs.units import HASH_BYTES, Millis, PrefixHash, align_up

CLASSES_BYTES_MAX: Final = ROSTER_BYTES // 4 * 3  # the rest is for models and tenants
BODY_BYTES_MAX: Final = 16 << 20  # of the JSON: a bound for what unpacking may take


@dataclass(frozen=True, slots=True)
class RosterModel:
    """A model in its present epoch."""

    name: str
    epoch: int
    layout: Layout
    created_ms: Millis


@dataclass(frozen=True, slots=True)
class RosterClass:
    """The class of a session where it is not that of the headers: changed after the publish."""

    model: str
    tenant: int
    session: str  # the engine's id; "": the one without id that ended at *head*
    head: PrefixHash  # where it ended when its class was written
    retention: int

    def place(self) -> tuple[str, int, str, bytes]:
        """What orders the rows."""
        return self.model, self.tenant, self.session, self.head


@dataclass(frozen=True, slots=True)
class Roster:
    """All of it; *sequence* grows by one with every change."""

    sequence: int = 0
    generation_end: int = 1  # no generation from here on has been given away
    ino_end: int = 1
    tenant_end: int = 1
    models: tuple[RosterModel, ...] = ()
    tenants: tuple[Tenant, ...] = ()
    classes: tuple[RosterClass, ...] = ()

    def with_model(self, model: RosterModel) -> tuple[RosterModel, ...]:
        """The models, with *model* in its place."""
        others = (each for each in self.models if each.name != model.name)
        return tuple(sorted((*others, model), key=lambda each: each.name))

    def with_tenant(self, tenant: Tenant) -> tuple[Tenant, ...]:
        """The tenants, with *tenant* in its place."""
        others = (each for each in self.tenants if each.id != tenant.id)
        return tuple(sorted((*others, tenant), key=lambda each: each.id))

    def pack(self, secret: bytes, warehouse: UUID) -> bytes:
        """Return what goes to the device; TooLarge if it does not fit its place."""
        body = zlib.compress(json.dumps(self._document(), sort_keys=True).encode(), 6)
        length = ROSTER.size + MAC_BYTES + len(body)
        if length > ROSTER_BYTES:
            raise TooLarge(
                f"{len(self.models)} models, {len(self.tenants)} tenants and {len(self.classes)} "
                f"classes of sessions take {length} bytes, "
                f"and a device has room for {ROSTER_BYTES}: make a second warehouse"
            )
        fixed = ROSTER.pack(
            ROSTER_MAGIC, FORMAT_VERSION, 0, warehouse.bytes, self.sequence, len(body)
        )
        return fixed + mac_of(secret, fixed + body) + body

    def _document(self) -> dict[str, Any]:
        return {
            "generation_end": self.generation_end,
            "ino_end": self.ino_end,
            "tenant_end": self.tenant_end,
            "models": [
                {
                    "name": model.name, "epoch": model.epoch, "created_ms": model.created_ms,
                    "layout": model.layout.to_dict(),
                }
                for model in self.models
            ],
            "tenants": [msgspec.to_builtins(each) for each in self.tenants],
            "classes": _rows_of(self.classes),
        }  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes | memoryview, secret: bytes, warehouse: UUID) -> "Roster":
        """Make a roster of what lies in one place; ValueError says what is wrong.

        Nothing behind the fixed part is looked at before its MAC has proved it.
        """
        if len(data) < ROSTER.size + MAC_BYTES:
            raise ValueError(f"roster of {len(data)} bytes")
        magic, version, _, owner, sequence, length = ROSTER.unpack_from(data)
        start = ROSTER.size + MAC_BYTES
        if magic != ROSTER_MAGIC or owner != warehouse.bytes or version != FORMAT_VERSION:
            raise ValueError("no roster of this warehouse and version")
        if length > min(ROSTER_BYTES, len(data)) - start:
            raise ValueError(f"roster says that {length} bytes follow")
        fixed, body = bytes(data[: ROSTER.size]), bytes(data[start : start + length])
        if mac_of(secret, fixed + body) != bytes(data[ROSTER.size : start]):
            raise ValueError("roster is not sealed with this warehouse's secret")
        try:
            unzip = zlib.decompressobj()
            parts = json.loads(unzip.decompress(body, BODY_BYTES_MAX))
            return cls(
                sequence, parts["generation_end"], parts["ino_end"], parts["tenant_end"],
                tuple(
                    RosterModel(
                        each["name"], each["epoch"], Layout.from_dict(each["layout"]),
                        Millis(each["created_ms"]),
                    )
                    for each in parts["models"]
                ),
                msgspec.convert(parts["tenants"], tuple[Tenant, ...]),
                tuple(map(_class_of, parts["classes"])),
            )  # fmt: skip
        except (zlib.error, KeyError, TypeError, RecursionError, InvalidInput,
                msgspec.ValidationError) as error:  # fmt: skip
            raise ValueError(f"roster cannot be read: {error}") from error


def _rows_of(classes: Sequence[RosterClass]) -> list[list[Any]]:
    """Rows of model, tenant, id, head, class."""
    return [
        [each.model, each.tenant, each.session, each.head.hex(), each.retention]
        for each in classes
    ]  # fmt: skip


def _class_of(row: Any) -> RosterClass:
    """Undo one of _rows_of; ValueError, TypeError, InvalidInput if it is none."""
    model, tenant, session, head, retention = row
    if session:
        check_session(session)
    name = bytes.fromhex(head)
    if (
        [type(model), type(tenant), type(session), type(retention)] != [str, int, str, int]
        or len(name) != HASH_BYTES
        or not 0 <= tenant < 1 << 16
        or not 0 <= retention <= Retention.PINNED.rank
    ):
        raise ValueError(f"{row!r:.200} is no class of a session")
    return RosterClass(check_model_name(model), tenant, session, PrefixHash(name), retention)


def classes_bytes(classes: Sequence[RosterClass]) -> int:
    """About the bytes that *classes* take in a roster."""
    return len(zlib.compress(json.dumps(_rows_of(classes)).encode(), 1))


def read_roster(device: Device, secret: bytes, warehouse: UUID) -> Roster | None:
    """Return the newest whole roster of *device*, None if there is none; DeviceError."""
    found: Roster | None = None
    for place in range(2):
        buffer = aligned_buffer(ROSTER_BYTES)
        device.read_roster(buffer, place)
        try:
            roster = Roster.unpack(buffer, secret, warehouse)
        except ValueError:
            continue
        if found is None or roster.sequence > found.sequence:
            found = roster
    return found


def rosters_of(devices: Iterable[Device], secret: bytes, warehouse: UUID) -> list[Roster]:
    """Return the newest roster of each of *devices* that has one that can be read."""
    found: list[Roster] = []
    for device in devices:
        try:
            roster = read_roster(device, secret, warehouse)
        except DeviceError:
            continue
        if roster is not None:
            found.append(roster)
    return found


def newest_roster(devices: Iterable[Device], secret: bytes, warehouse: UUID) -> Roster | None:
    """Return the newest roster that any of *devices* has, None if none has one."""
    found = rosters_of(devices, secret, warehouse)
    return max(found, key=lambda each: each.sequence, default=None)


def write_roster(devices: Iterable[Device], roster: Roster, secret: bytes, warehouse: UUID) -> None:
    """Make *roster* durable on every device that takes it; an error if none does, or TooLarge.

    It takes the place of the last but one, so the last stays until this one is whole.
    """
    packed = roster.pack(secret, warehouse)
    buffer = aligned_buffer(align_up(len(packed)))
    buffer[: len(packed)] = packed
    failed: TwfsError | None = None
    written = 0
    for device in devices:
        try:
            device.write_roster(buffer, roster.sequence % 2)
            device.flush()
            written += 1
        except TwfsError as error:
            failed = error
    if not written:
        raise failed or DeviceError("there is no device to write the roster to")

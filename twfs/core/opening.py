"""Create a warehouse, and open one: devices, metadata, and the state in memory built from them.

Everything that is found wrong here is an error with one sentence, before anything is changed;
but a device that cannot be used is offline, as long as another can be written to.
"""

import os
import shutil
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np

from twfs.config import Config
from twfs.core import enrolling, modes
from twfs.core.state import Core
from twfs.devices.device import Device
from twfs.devices.extents import Allocator
from twfs.devices.formatting import DeviceSpec, format_device
from twfs.devices.roster import Roster, write_roster
from twfs.devices.standing import Standing, Standings
from twfs.errors import (
    CorruptMetadata,
    FormatTooNew,
    FormatTooOld,
    InvalidInput,
    NotAllowed,
    ReadOnly,
    TwfsError,
    WarehouseBusy,
    WarehouseExists,
)
from twfs.hints import Retention
from twfs.index.clocks import Clock, Steady, wall_ms
from twfs.index.leases import Leases
from twfs.index.siblings import share_all, slot_of
from twfs.index.slots import GROWTH_MIN, KEY_BYTES, SLOTS_MAX, Slots
from twfs.metadata import ledger, sessions
from twfs.metadata.environment import FIRST_INO, Metadata
from twfs.metadata.metafile import scout
from twfs.metadata.meter import META as METER
from twfs.metadata.meter import Meter
from twfs.metadata.sessions import Covered, SessionKey
from twfs.metadata.tables import (
    LENGTH,
    TO_DISCARD,
    TO_OVERWRITE,
    DeviceRecord,
    ModelRecord,
    ReadView,
    WriteView,
)
from twfs.policy.accesses import RECORD_DIRECTORY
from twfs.policy.recording import Recorder, remove_record
from twfs.records import BLOCK_DTYPE, BlockKey, Extent
from twfs.secret import SECRET_FILE, keep_secret, make_secret
from twfs.store import Durability
from twfs.tenants import Tenants
from twfs.units import ALIGN, ByteCount, DeviceIndex, ModelId

META_DIRECTORY: Final = "meta"
GONE_DIRECTORY: Final = "meta.gone"  # of the warehouse that is being created over
HEAT_FILE: Final = "heat"
DEVICES_MAX: Final = 64  # one node's drives; each costs every client a descriptor
UID_LEASE_QUARTERS: Final = 3  # all clients of one user: the rest stays for others' puts
LEASE_PARTS: Final = 2  # one client may lease half of all space: never all of it


def create(
    directory: Path, devices: Sequence[DeviceSpec], *, force: bool, group: str | None = None
) -> None:
    """Make a warehouse in *directory* over *devices*; the metadata comes last.

    With *group* its members may use it as engines do, else its owner alone.

    WarehouseExists unless forced; whatever format_device raises, and then no image file that was
    made here is left.
    """
    if not 1 <= len(devices) <= DEVICES_MAX:
        raise InvalidInput(f"a warehouse has 1 to {DEVICES_MAX} devices, not {len(devices)}")
    paths = [spec.path.resolve() for spec in devices]
    if len(set(paths)) != len(paths):
        raise InvalidInput("a device is named twice")
    meta = directory / META_DIRECTORY
    if (meta / "data.mdb").exists():
        if not force:
            raise WarehouseExists(
                f"{directory} holds a warehouse already: use it, or --force to lose all its blocks"
            )
        with suppress(CorruptMetadata, FormatTooNew, FormatTooOld):  # it may be beyond repair
            Metadata.open(meta).close()  # but nobody else may have it open
    if group is not None:
        modes.gid_of(group)
    made_directory = not directory.exists()
    try:
        directory.mkdir(modes.OWN_DIRECTORY, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{directory} cannot be made: {error.strerror}") from error
    with ExitStack() as undo:
        if made_directory:
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
        _fill(directory, devices, undo, force=force)
        if group is not None:
            modes.share(directory, [spec.path for spec in devices], group)
        undo.pop_all()


def name_of(directory: Path, path: Path) -> str:
    """How the metadata names the device at *path*: relative if inside the warehouse."""
    path, home = path.resolve(), directory.resolve()
    return str(path.relative_to(home)) if path.is_relative_to(home) else str(path)


def _fill(directory: Path, devices: Sequence[DeviceSpec], undo: ExitStack, *, force: bool) -> None:
    """Format the devices, then make the metadata of an empty warehouse."""
    meta, gone = directory / META_DIRECTORY, directory / GONE_DIRECTORY
    shutil.rmtree(gone, ignore_errors=True)
    if meta.exists():  # a crash from here on leaves no warehouse, and not half of the old one
        meta.rename(gone)
        undo.callback(gone.rename, meta)
    warehouse = uuid.uuid4()
    records, free = [], []
    for number, spec in enumerate(devices):
        index = DeviceIndex(number)
        fresh = not spec.path.exists()
        superblock = format_device(spec, warehouse=warehouse, index=index, force=force)
        if fresh:
            undo.callback(spec.path.unlink, missing_ok=True)
        name = name_of(directory, spec.path)
        records.append(DeviceRecord(index, superblock.device, name, superblock.size_bytes))
        start = superblock.data_start
        end = superblock.size_bytes - ALIGN
        free.append(Extent(index, start, ByteCount(end - start)))
    (directory / HEAT_FILE).unlink(missing_ok=True)
    remove_record(directory / RECORD_DIRECTORY)
    meta.mkdir(modes.OWN_DIRECTORY)
    undo.callback(shutil.rmtree, meta, ignore_errors=True)
    secret = make_secret()
    _write_first_roster(directory, records, warehouse, secret)
    Metadata.create(meta, warehouse, records, free, secret)
    undo.callback((directory / SECRET_FILE).unlink, missing_ok=True)
    keep_secret(directory, secret)
    shutil.rmtree(gone, ignore_errors=True)


def _write_first_roster(
    directory: Path, records: Sequence[DeviceRecord], warehouse: UUID, secret: bytes
) -> None:
    """Write the roster of an empty warehouse to all its devices."""
    with ExitStack() as closing:
        devices = []
        for known in records:
            device = Device.open(
                directory / known.path, warehouse=warehouse, device=known.uuid, index=known.index
            )
            closing.callback(device.close)
            devices.append(device)
        write_roster(devices, Roster(ino_end=FIRST_INO), secret, warehouse)


def open_device(directory: Path, known: DeviceRecord, warehouse: UUID) -> Standing:
    """Open one device as it can be: for reading only where it takes no writes, else not at all.

    What only the operator's set-up forbids is raised: WarehouseBusy, NotAllowed, FormatTooNew,
    FormatTooOld.
    """
    path = directory / known.path

    def opened(*, read_only: bool) -> Standing:
        device = Device.open(
            path, warehouse=warehouse, device=known.uuid, index=known.index, read_only=read_only
        )
        return Standing(known, device)

    try:
        return opened(read_only=False)
    except (ReadOnly, NotAllowed):
        return opened(read_only=True)
    except (WarehouseBusy, FormatTooNew, FormatTooOld):
        raise
    except TwfsError as error:
        return Standing(known, None, offline=str(error), cause=error)


def open_devices(
    directory: Path, metadata: Metadata, undo: ExitStack, *, degraded: bool
) -> dict[int, Standing]:
    """Open all devices; what is wrong with one is raised if no other can be written to.

    Unless *degraded* it is raised at once.
    """
    warehouse = metadata.warehouse()
    standings: dict[int, Standing] = {}
    for known in metadata.devices():
        standing = open_device(directory, known, warehouse)
        undo.callback(standing.close)
        standings[known.index] = standing
    bad = [each for each in standings.values() if each.offline or each.read_only]
    if bad and (not degraded or len(bad) == len(standings)):
        if bad[0].cause is not None:
            raise bad[0].cause
        raise ReadOnly(f"{directory / bad[0].record.path} takes no writes: {bad[0].read_only}")
    return standings


def open_core(
    directory: Path, *, lease_ms: int, durability: Durability = Durability.STRICT,
    wary: bool = False, degraded: bool = True, clock: Clock = wall_ms,
    config: Config | None = None,
) -> Core:  # fmt: skip
    """Open everything; see Warehouse.open for what may be raised."""
    if wary:
        scout(directory / META_DIRECTORY)
    with ExitStack() as undo:
        metadata = Metadata.open(directory / META_DIRECTORY, durability)
        undo.callback(metadata.close)
        warehouse = metadata.warehouse()
        standings = open_devices(directory, metadata, undo, degraded=degraded)
        devices = [each.device for each in standings.values() if each.device is not None]
        slots = Slots(directory / HEAT_FILE, clock)
        undo.callback(slots.close)
        with metadata.read() as view:
            units = sum(each.record.data_area[1] // ALIGN for each in standings.values())
            load_slots(view, slots, units)
        steady = Steady(clock, slots.latest())
        _know_uses(metadata, slots, steady)
        secret = metadata.secret()
        roster = enrolling.settle(metadata, devices, secret, warehouse)
        metadata.submit(_begin).result()
        metadata.settle()  # what it freed is free for certain
        with metadata.read() as view:
            allocator = Allocator(
                {each.index: each.record.data_area for each in standings.values()},
                view.runs("free"),
            )
            records = view.models()
            unkept = _unkept(view, records)
            doomed = {e: why for e, why in view.all_limbo() if why in {TO_DISCARD, TO_OVERWRITE}}
        lock = threading.RLock()
        operators = frozenset({0, os.geteuid()})
        leases = Leases(
            lease_ms, ByteCount(allocator.total_bytes // LEASE_PARTS),
            bytes_per_uid_max=ByteCount(allocator.total_bytes // 4 * UID_LEASE_QUARTERS),
            unbounded=operators,
        )  # fmt: skip
        core = Core(
            directory, warehouse, metadata, Standings(lock, allocator, standings.values()),
            allocator, slots, leases, secret, roster, Tenants(roster.tenants, operators), lock,
            steady, config or Config(),
        )  # fmt: skip
        core.recorder = Recorder(directory / RECORD_DIRECTORY, core.config.record, steady, secret)
        with metadata.read() as view:
            core.meter = Meter.load(view.meta(METER), clock())
        with suppress(NotAllowed):  # it lies in the metadata too
            keep_secret(directory, secret)
        core.unkept = unkept
        core.doomed = doomed
        core.models = {record.id: record for record in records}
        for record in sorted(records, key=lambda record: record.epoch):
            core.current[record.name] = record.id
        with core.lock, metadata.read() as view:
            core.cover(Covered(marks=_marks_of_kept(view, core)))
        undo.pop_all()
        return core


def close_core(core: Core) -> None:
    """Finish what is under way and let go of everything."""
    core.recorder.flush(core.counters.written_bytes + core.counters.moved_bytes)
    core.wiper.close()
    core.metadata.close()
    with core.lock:
        core.slots.close()
    core.standings.close()


def _begin(view: WriteView) -> None:
    """At start: no lease is left, so limbo is empty; and who has it open is noted."""
    ledger.empty_limbo(view)
    view.set_meta("pid_namespace", str(os.stat("/proc/self/ns/pid").st_ino).encode())
    view.set_meta("boot_id", Path("/proc/sys/kernel/random/boot_id").read_bytes().strip())


def load_slots(view: ReadView, slots: Slots, units: int) -> None:
    """Build the arrays in memory from all records; CorruptMetadata if one cannot be.

    *units* is what the devices have of 4 KiB. A block takes two or more, so there were never more
    slots than that, but for holes; a record that says otherwise would cost memory without limit.
    """
    keys, rows = bytearray(), bytearray()
    size = BLOCK_DTYPE.itemsize
    for key, value in view.all_blocks():
        if len(key) != KEY_BYTES or len(value) < size:
            raise CorruptMetadata(
                f"a block record has a key of {len(key)} and a value of {len(value)} bytes: "
                "run `twfs check`"
            )
        keys += key
        rows += value[:size]
    records = np.frombuffer(bytes(rows), BLOCK_DTYPE)
    slots_max = min(SLOTS_MAX, max(units + len(records) + GROWTH_MIN, slots.had()))
    if len(records) and int(records["slot"].max()) >= slots_max:
        raise CorruptMetadata(
            f"a block record names slot {records['slot'].max()}; there were never more than "
            f"{slots_max}: the metadata must be made anew from the devices"
        )
    models = view.models()
    spines = {record.id: record.layout.spine for record in models}
    heads = [
        BlockKey(model, prefix_hash, spines.get(model, 0), 0).pack()
        for model, prefix_hash in view.all_heads()
    ]
    starts = records["parent"] == np.void(ledger.NO_PARENT)
    owner = np.frombuffer(bytes(keys), np.uint8).reshape(-1, KEY_BYTES)[:, :4]
    owner = np.ascontiguousarray(owner).view(">u4").reshape(-1)
    for model in models:
        first = records["position"] == model.layout.block_tokens
        starts |= first & (records["key_bytes"] == 0) & (owner == model.id)
    slots.load(bytes(keys), records, starts, heads, _ends_of(view, spines))
    packed_keys = np.frombuffer(bytes(keys), f"S{KEY_BYTES}")
    share_all(slots, packed_keys, spines, records["slot"].astype(np.int64))
    for number in np.flatnonzero(records["extent_count"] > 1).tolist():
        packed = bytes(keys[number * KEY_BYTES : (number + 1) * KEY_BYTES])
        block = view.block(BlockKey.unpack(packed))
        assert block is not None
        slots.units[block.slot] = block.device_bytes // ALIGN
    slots.charge_all()


def _ends_of(view: ReadView, spines: Mapping[ModelId, int]) -> dict[bytes, int]:
    """The highest class of the sessions that end at a block, by its packed key."""
    found: dict[bytes, int] = {}
    for key, session in sessions.every(view):
        packed = BlockKey(key.model, session.head, spines.get(key.model, 0), 0).pack()
        found[packed] = max(found.get(packed, 0), min(session.retention, Retention.PINNED.rank))
    return found


def _unkept(view: ReadView, models: Sequence[ModelRecord]) -> set[SessionKey]:
    """Sessions whose class is neither in the roster nor that of their head's header."""
    spines = {record.id: record.layout.spine for record in models}
    found = set()
    for key, session in sessions.every(view):
        block = view.block(BlockKey(key.model, session.head, spines.get(key.model, 0), 0))
        if block is not None and not session.kept and session.retention != block.retention:
            found.add(key)
    return found


def _marks_of_kept(view: ReadView, core: Core) -> list[tuple[int, int]]:
    """Where sessions end whose class the roster has: a crash may have left it there alone.

    It has entered the tables after the arrays were made of them.
    """
    found = []
    for key, session in sessions.every(view):
        model = core.models.get(key.model)
        if session.kept and model is not None:
            slot = slot_of(view, BlockKey(key.model, session.head, model.layout.spine, 0))
            if slot is not None:
                found.append((slot, sessions.own_class(view, key.model, session.head)))
    return found


def _know_uses(metadata: Metadata, slots: Slots, clock: Clock) -> None:
    """Learn from when on last uses are known; the file of them that was lost is noted durably.

    Else what was used an hour before would count as never used, and its time to live as over.
    """
    with metadata.read() as view:
        known = int.from_bytes(view.meta("uses_from") or b"", "little")
    if slots.find_lost_stamps():
        known = max(known, clock())
        metadata.submit(lambda view: view.set_meta("uses_from", LENGTH.pack(known))).result()
    slots.known_from_ms = known

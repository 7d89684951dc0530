"""Create a warehouse, and open one: devices, metadata, and the state in memory built from them.

Everything that is found wrong here is an error with one sentence, before anything is changed.
"""

import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import numpy as np

from twfs import enrolling, ledger, modes
from twfs.core import Core
from twfs.device import Device
from twfs.errors import (
    CorruptMetadata,
    FormatTooNew,
    FormatTooOld,
    InvalidInput,
    NotAllowed,
    WarehouseExists,
)
from twfs.extents import Allocator
from twfs.flushing import Flusher
from twfs.formatting import DeviceSpec, format_device
from twfs.leases import Leases
from twfs.metadata import Metadata
from twfs.records import BLOCK_DTYPE, BlockKey, Extent
from twfs.secret import SECRET_FILE, keep_secret, make_secret
from twfs.slots import KEY_BYTES, Slots
from twfs.tables import DeviceRecord, ReadView, WriteView
from twfs.tenants import Tenants
from twfs.units import ALIGN, ByteCount, DeviceIndex

META_DIRECTORY: Final = "meta"
HEAT_FILE: Final = "heat"
DEVICES_MAX: Final = 64  # one node's drives; each costs every client a descriptor
SLOTS_MAX: Final = 1 << 31
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


def _fill(directory: Path, devices: Sequence[DeviceSpec], undo: ExitStack, *, force: bool) -> None:
    """Format the devices, then make the metadata of an empty warehouse."""
    warehouse = uuid.uuid4()
    records, free = [], []
    for number, spec in enumerate(devices):
        index = DeviceIndex(number)
        fresh = not spec.path.exists()
        superblock = format_device(spec, warehouse=warehouse, index=index, force=force)
        if fresh:
            undo.callback(spec.path.unlink, missing_ok=True)
        path = spec.path.resolve()
        home = directory.resolve()
        name = str(path.relative_to(home)) if path.is_relative_to(home) else str(path)
        records.append(DeviceRecord(index, superblock.device, name, superblock.size_bytes))
        start = superblock.data_start
        end = superblock.size_bytes - ALIGN
        free.append(Extent(index, start, ByteCount(end - start)))
    meta = directory / META_DIRECTORY
    if meta.exists():
        shutil.rmtree(meta)
    (directory / HEAT_FILE).unlink(missing_ok=True)
    meta.mkdir(modes.OWN_DIRECTORY)
    undo.callback(shutil.rmtree, meta, ignore_errors=True)
    secret = make_secret()
    Metadata.create(meta, warehouse, records, free, secret)
    undo.callback((directory / SECRET_FILE).unlink, missing_ok=True)
    keep_secret(directory, secret)


def open_core(directory: Path, *, lease_ms: int) -> Core:
    """Open everything; see Warehouse.open for what may be raised."""
    with ExitStack() as undo:
        metadata = Metadata.open(directory / META_DIRECTORY)
        undo.callback(metadata.close)
        warehouse = metadata.warehouse()
        devices: dict[int, Device] = {}
        for known in metadata.devices():
            device = Device.open(
                directory / known.path, warehouse=warehouse, device=known.uuid, index=known.index
            )  # fmt: skip
            undo.callback(device.close)
            devices[device.index] = device
        slots = Slots(directory / HEAT_FILE)
        undo.callback(slots.close)
        with metadata.read() as view:
            load_slots(view, slots)
        secret = metadata.secret()
        roster = enrolling.settle(metadata, devices.values(), secret, warehouse)
        metadata.submit(_begin).result()
        with metadata.read() as view:
            allocator = Allocator(
                {each.index: each.data_area for each in devices.values()}, view.runs("free")
            )
            records = view.models()
        operators = frozenset({0, os.geteuid()})
        core = Core(
            directory, warehouse, metadata, devices, allocator, slots,
            Leases(
                lease_ms, ByteCount(allocator.total_bytes // LEASE_PARTS),
                bytes_per_uid_max=ByteCount(allocator.total_bytes // 4 * UID_LEASE_QUARTERS),
                unbounded=operators,
            ),
            secret, roster, Tenants(roster.tenants, operators),
        )  # fmt: skip
        with suppress(NotAllowed):  # it lies in the metadata too
            keep_secret(directory, secret)
        core.models = {record.id: record for record in records}
        for record in sorted(records, key=lambda record: record.epoch):
            core.current[record.name] = record.id
        core.flushers = {each.index: Flusher(each) for each in devices.values()}
        undo.pop_all()
        return core


def close_core(core: Core) -> None:
    """Finish what is under way and let go of everything."""
    core.io.shutdown()
    core.metadata.close()
    with core.lock:
        core.slots.close()
    for device in core.devices.values():
        device.close()


def _begin(view: WriteView) -> None:
    """At start: no lease is left, so limbo is empty; and who has it open is noted."""
    ledger.empty_limbo(view)
    view.set_meta("pid_namespace", str(os.stat("/proc/self/ns/pid").st_ino).encode())
    view.set_meta("boot_id", Path("/proc/sys/kernel/random/boot_id").read_bytes().strip())


def load_slots(view: ReadView, slots: Slots) -> None:
    """Build the arrays in memory from all records; CorruptMetadata if one cannot be."""
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
    if len(records) and int(records["slot"].max()) >= SLOTS_MAX:
        raise CorruptMetadata("a block record names a slot that cannot be: run `twfs check`")
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
    slots.load(bytes(keys), records, starts, heads)
    for number in np.flatnonzero(records["extent_count"] > 1).tolist():
        packed = bytes(keys[number * KEY_BYTES : (number + 1) * KEY_BYTES])
        block = view.block(BlockKey.unpack(packed))
        assert block is not None
        slots.units[block.slot] = block.device_bytes // ALIGN

"""What an operator does with the devices of an open warehouse: list, add, drain, remove, online.

The list in the metadata changes first, in one transaction; memory follows it. One change at a
time. All of it blocks. Numbers of devices are never given twice.
"""

import threading
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from twfs.admin.draining import RATE_BYTES_S, Drain
from twfs.admin.moving import batches, blocks_on, drained_bytes
from twfs.core import modes
from twfs.core.opening import DEVICES_MAX, LEASE_PARTS, name_of, open_device
from twfs.core.operating import NoArguments, Verb, Verbs
from twfs.core.state import Core
from twfs.devices.device import Device, DeviceStatistics
from twfs.devices.formatting import DeviceSpec, format_device
from twfs.devices.roster import Roster, write_roster
from twfs.devices.standing import DeviceState, Standing
from twfs.errors import (
    DeviceError,
    DeviceNotEmpty,
    InvalidInput,
    NoSuchDevice,
    ReadOnly,
    TwfsError,
)
from twfs.eviction.evicting import forget
from twfs.index import slots as states
from twfs.metadata.tables import DeviceRecord, WriteView
from twfs.records import Extent
from twfs.units import ByteCount, DeviceIndex

IDLE_SECONDS_MAX: Final = 5.0  # for I/O under way, before a device is opened anew
IDLE_STEP_S: Final = 0.05


class AddDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `device-add` takes: an absolute path, and the size of an image file to be made."""

    path: str
    size_bytes: int | None = None
    force: bool = False


class DrainDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `device-drain` takes; *lost* gives up the blocks of a device that is offline."""

    device: int
    rate_bytes_s: int = RATE_BYTES_S
    lost: bool = False


class OneDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `device-remove` and `device-online` take."""

    device: int


class Members:
    """The devices of one warehouse, as an operator changes them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._changing = threading.Lock()
        self._drains: dict[DeviceIndex, Drain] = {}

    def verbs(self) -> Verbs:
        """The operators' verbs."""
        return {
            "device-list": Verb(NoArguments, lambda _: self.listed()),
            "device-add": Verb(AddDevice, self.add),
            "device-drain": Verb(DrainDevice, self.drain),
            "device-remove": Verb(OneDevice, lambda given: self.remove(given.device)),
            "device-online": Verb(OneDevice, lambda given: self.online(given.device)),
        }

    def close(self) -> None:
        """End all drains; they go on when asked for again."""
        for drain in list(self._drains.values()):
            drain.stop()

    def resume(self) -> None:
        """Go on with the drains that the list of devices tells of."""
        for standing in self._core.standings.all.values():
            if standing.state is DeviceState.DRAINING:
                with self._changing:
                    self._start(standing.index, RATE_BYTES_S)

    def _standing(self, index: int) -> Standing:
        standing = self._core.standings.all.get(index)
        if standing is None:
            there = ", ".join(map(str, sorted(self._core.standings.all)))
            raise NoSuchDevice(f"there is no device {index}: there are {there}")
        return standing

    # List

    def listed(self) -> list[dict[str, Any]]:
        """One row per device: what it is, how it stands, what is on it, and its counters."""
        core = self._core
        with core.lock:
            here = len(core.slots)
            live = (core.slots.state[:here] == states.LIVE) & ~core.slots.hole[:here]
            numbers, counts = np.unique(core.slots.device[:here][live], return_counts=True)
            blocks = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
            return [
                self._row(each, blocks.get(index, 0))
                for index, each in sorted(core.standings.all.items())
            ]

    def _row(self, standing: Standing, blocks: int) -> dict[str, Any]:
        core, record = self._core, standing.record
        free = core.allocator.free_bytes_of(record.index)
        figures = DeviceStatistics() if standing.device is None else standing.device.statistics()
        flushes = {} if standing.flusher is None else standing.flusher.statistics()
        drain = self._drains.get(record.index)
        return {
            "index": record.index,
            "uuid": str(record.uuid),
            "path": str(core.directory / record.path),
            "size_bytes": record.size_bytes,
            "state": standing.state.value,
            "used_bytes": record.data_area[1] - free,
            "blocks": blocks,  # that begin there
            "notes": standing.notes,
            "drain": None if drain is None else drain.progress(),
            **asdict(figures),
            **flushes,
        }

    # Add

    def add(self, given: AddDevice) -> dict[str, Any]:
        """Format a device and take it into the warehouse; its row.

        InvalidInput, and whatever format_device raises; then nothing has changed.
        """
        core, path = self._core, Path(given.path)
        if not path.is_absolute():
            raise InvalidInput(f"{path} is no absolute path: the daemon works elsewhere")
        with self._changing:
            if len(core.standings.all) >= DEVICES_MAX:
                raise InvalidInput(f"a warehouse has at most {DEVICES_MAX} devices: drain one")
            with core.metadata.read() as view:
                known = [each.index + 1 for each in view.devices()]
                index = DeviceIndex(max(view.counter("device"), *known))
            size = None if given.size_bytes is None else ByteCount(given.size_bytes)
            fresh = not path.exists()
            superblock = format_device(
                DeviceSpec(path, size), warehouse=core.uuid, index=index, force=given.force
            )
            record = DeviceRecord(
                index, superblock.device, name_of(core.directory, path), superblock.size_bytes
            )
            try:
                group = modes.group_of(core.directory)
                if group is not None:
                    modes.share_image(path, group)
                self._take_in(record)
            except BaseException:
                if fresh:
                    path.unlink(missing_ok=True)
                raise
        return self._listed_one(index)

    def _listed_one(self, index: int) -> dict[str, Any]:
        return next(row for row in self.listed() if row["index"] == index)

    def _take_in(self, record: DeviceRecord) -> None:
        """Open a device that was formatted, enter it in the metadata, and let memory follow."""
        core = self._core
        standing = open_device(core.directory, record, core.uuid)
        if standing.device is None or standing.read_only:
            standing.close()
            raise standing.cause or ReadOnly(f"{record.path}: {standing.read_only}")
        device = standing.device

        def job(view: WriteView) -> None:
            view.set_devices([*view.devices(), record])
            view.set_counter("device", record.index + 1)
            view.add_free(Extent(record.index, *record.data_area))

        def after(_: None) -> None:
            with core.lock:
                core.allocator.add_device(record.index, record.data_area)
                core.standings.replace(record.index, standing)
                core.leases.allow(ByteCount(core.allocator.total_bytes // LEASE_PARTS))
                core.changes += 1

        def take_in(roster: Roster) -> None:
            write_roster([device], roster, core.secret, core.uuid)
            core.metadata.submit(job, after).result()

        try:
            core.adopt_device(take_in)  # no epoch opens between: the device would not know it
        except BaseException:
            if record.index not in core.standings.all:
                standing.close()
            raise

    # Drain

    def drain(self, given: DrainDevice) -> dict[str, Any]:
        """Begin to empty a device, or go on with it; its row, with the progress.

        NoSuchDevice; InvalidInput for the last device that takes blocks; DeviceError for one that
        is offline, unless its blocks are given up.
        """
        if given.rate_bytes_s <= 0:
            raise InvalidInput(f"a rate of {given.rate_bytes_s} bytes a second: above 0, please")
        index = DeviceIndex(given.device)
        with self._changing:
            standing = self._standing(index)
            others = [
                each for each in self._core.standings.all.values()
                if each.state is DeviceState.ONLINE and each.index != index
            ]  # fmt: skip
            if not others and not given.lost:
                raise InvalidInput(
                    f"device {index} is the last one that takes blocks: add another before"
                )
            if standing.offline and not given.lost:
                raise DeviceError(
                    f"device {index} is offline ({standing.offline}): bring it back with `twfs "
                    "device online`, or give its blocks up with `twfs device drain --lost`"
                )
            if given.lost and not standing.offline:
                raise InvalidInput(f"device {index} is there: its blocks can be moved")
            self._mark(index, draining=True)
            if given.lost:
                for batch in batches(blocks_on(self._core, index)):
                    forget(self._core, [(key, block.generation) for key, block in batch])
            else:
                self._start(index, given.rate_bytes_s)
        return self._listed_one(index)

    def _start(self, index: DeviceIndex, rate_bytes_s: int) -> None:
        """Begin a drain, or let the one under way have another rate."""
        drain = self._drains.get(index)
        if drain is not None and drain.running:
            drain.rate_bytes_s = rate_bytes_s
            return
        drain = self._drains[index] = Drain(self._core, index, rate_bytes_s)
        drain.start()

    def _mark(self, index: DeviceIndex, *, draining: bool) -> None:
        """Make it durable whether a device is being emptied, and let memory follow."""
        core = self._core

        def job(view: WriteView) -> None:
            view.set_devices(
                [
                    replace(each, draining=draining) if each.index == index else each
                    for each in view.devices()
                ]
            )

        def after(_: None) -> None:
            with core.lock:
                standing = core.standings.all[index]
                standing.record = replace(standing.record, draining=draining)
                core.standings.follow()

        core.metadata.submit(job, after).result()

    # Remove

    def remove(self, index: int) -> dict[str, Any]:
        """Take an empty device out, and wipe its superblocks: it is nobody's then.

        NoSuchDevice; DeviceNotEmpty says how much is left; InvalidInput for the last one.
        """
        core = self._core
        with self._changing:
            standing = self._standing(index)
            if len(core.standings.all) == 1:
                raise InvalidInput(f"device {index} is the only one: add another before")
            self._check_empty(standing)
            drain = self._drains.pop(standing.index, None)
            if drain is not None:
                drain.stop()

            def job(view: WriteView) -> None:
                view.forget_device(standing.index)
                view.set_devices([each for each in view.devices() if each.index != index])

            def after(_: None) -> None:
                with core.lock:
                    core.standings.replace(index, None)
                    core.allocator.remove_device(standing.index)
                    core.leases.allow(ByteCount(core.allocator.total_bytes // LEASE_PARTS))
                    core.changes += 1

            core.metadata.submit(job, after).result()
            wiped = self._wipe(standing.device) if not standing.offline else "it is offline"
            standing.close()
        return {"index": index, "path": str(standing.record.path), "not_wiped": wiped}

    def _check_empty(self, standing: Standing) -> None:
        """Stop allotting on a device; DeviceNotEmpty, and all is as before, if it holds blocks."""
        core, before = self._core, standing.record
        with core.lock:
            standing.record = replace(before, draining=True)
            core.standings.follow()
        used, leased = drained_bytes(core, standing.index)
        if not used and not leased:
            return
        with core.lock:
            standing.record = before
            core.standings.follow()
        if not used:
            raise DeviceNotEmpty(
                f"device {standing.index} has no block, but {leased} bytes that leases may still "
                f"read, for at most {core.leases.age_max_ms // 60_000} minutes: try again then"
            )
        count = sum(1 for _ in blocks_on(core, standing.index))
        raise DeviceNotEmpty(
            f"device {standing.index} holds {count} blocks ({used} bytes): run `twfs device drain` "
            "and wait for its end"
        )

    @staticmethod
    def _wipe(device: Device | None) -> str:
        """Wipe a device; returns why that could not be done, empty if it was."""
        if device is None:
            return "it is offline"
        try:
            device.wipe()
        except TwfsError as error:
            return str(error)
        return ""

    # Online

    def online(self, index: int) -> dict[str, Any]:
        """Take a device back into use that was offline, read-only or being drained; its row.

        NoSuchDevice; ReadOnly after a failed flush, which only a restart ends; DeviceError while
        I/O of before is under way; what opening it raises.
        """
        with self._changing:
            standing = self._standing(index)
            if standing.device is not None and standing.device.failed_flush:
                raise ReadOnly(
                    f"device {index} failed to flush, which is final until the daemon is started "
                    "anew: check the drive before"
                )
            drain = self._drains.pop(standing.index, None)
            if drain is not None:
                drain.stop()
            if standing.record.draining:
                self._mark(standing.index, draining=False)
            if standing.offline or standing.read_only:
                self._open_anew(standing)
        return self._listed_one(index)

    def _open_anew(self, standing: Standing) -> None:
        """Close what is left of a device's last opening, and open it."""
        core, index = self._core, standing.index
        core.standings.put_offline(index, "it is being opened anew")
        if standing.device is not None:
            waited = threading.Event()
            for _ in range(round(IDLE_SECONDS_MAX / IDLE_STEP_S)):
                if standing.device.idle():
                    break
                waited.wait(IDLE_STEP_S)
            else:
                raise DeviceError(
                    f"device {index} has I/O under way that does not end: try again when it "
                    "answers, or restart the daemon"
                )
        standing.close()
        try:
            fresh = open_device(core.directory, standing.record, core.uuid)
        except TwfsError as error:
            core.standings.replace(index, Standing(standing.record, None, offline=str(error)))
            raise
        if fresh.device is not None:
            with suppress(ReadOnly, DeviceError):  # the next change of the roster tries again
                device = fresh.device
                core.adopt_device(
                    lambda roster: write_roster([device], roster, core.secret, core.uuid)
                )
        with core.lock:
            core.standings.replace(index, fresh)
            core.changes += 1
        if fresh.cause is not None:
            raise fresh.cause

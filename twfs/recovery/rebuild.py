"""Make a warehouse's metadata anew from its devices, after it was lost, damaged or put back old.

Rosters give the models, their epochs and the ends of numbers; headers give the blocks, if they are
sealed with the secret and their payload verifies. The devices are only read. The new metadata is
made beside the old in `meta.new`, with the transactions of a put, and takes its place by one
rename: a rebuild that is killed has changed nothing, or all. Blocks.
"""

import os
import shutil
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import numpy as np

from twfs.core.enrolling import enter_classes
from twfs.core.opening import HEAT_FILE, META_DIRECTORY, name_of
from twfs.devices.device import Device, identify
from twfs.devices.roster import Roster, newest_roster
from twfs.errors import (
    CorruptMetadata,
    InvalidInput,
    NoSuchWarehouse,
    TwfsError,
    WarehouseExists,
    WrongDevice,
)
from twfs.hints import Retention
from twfs.index.clocks import wall_ms
from twfs.index.slots import STAMP_BYTES
from twfs.metadata import ledger
from twfs.metadata.environment import Metadata, lock_directory
from twfs.metadata.sessions import Ends, Session, SessionKey
from twfs.metadata.tables import LENGTH, RETIRED, DeviceRecord, ModelRecord, WriteView
from twfs.records import Block, BlockKey, Extent, Superblock
from twfs.recovery.salvaging import Salvage, salvage
from twfs.recovery.scanning import Array, Cause, Progress, Scan, Watch, unwatched
from twfs.recovery.survivors import Survivors, survivors
from twfs.secret import SECRET_BYTES, SECRET_FILE, read_secret
from twfs.store import PutOutcome
from twfs.tenants import Tenants
from twfs.units import ALIGN, ByteCount, DeviceIndex, ModelId, PrefixHash, align_up

NEW_DIRECTORY: Final = "meta.new"
OLD_DIRECTORY: Final = "meta.old-"
BLOCKS_PER_COMMIT: Final = 8192  # nobody reads meanwhile: only memory bounds it
COMMITS_QUEUED: Final = 4
HEADS_AT_ONCE: Final = 10_000
PLACES_AHEAD: Final = 2  # of a roster: an even step keeps its turn between the two places


@dataclass(slots=True)
class Report:
    """What a rebuild found and made."""

    warehouse: UUID
    devices: dict[int, str]  # path by number
    without: tuple[int, ...] = ()
    read_bytes: int = 0
    unreadable_bytes: int = 0
    headers: int = 0  # candidates: what has the magic of a header
    accepted: int = 0
    accepted_bytes: int = 0  # of payload
    rejected: dict[str, int] = field(default_factory=dict)  # by cause
    detached: int = 0
    models: int = 0
    old: str | None = None  # where the old metadata lies now
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Sources:
    """Where everything comes from, found and claimed."""

    directory: Path
    warehouse: UUID
    devices: dict[int, Device]
    secret: bytes
    roster: Roster
    old: Salvage | None


def rebuild(
    directory: Path, devices: Sequence[Path] = (), *, without: Collection[int] = (),
    force: bool = False, watch: Watch = unwatched,
) -> Report:  # fmt: skip
    """Rebuild the metadata of the warehouse in *directory*; *watch* is told how far it is.

    Its devices are those given, else those that the old metadata names, else the images in
    *directory*; those numbered in *without* are given up, with all that lies on them.
    NoSuchWarehouse, WarehouseBusy, WarehouseExists (the metadata is fine, and no *force*),
    WrongDevice, CorruptSuperblock, CorruptMetadata (no roster), InvalidInput (no secret).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise NoSuchWarehouse(f"{directory} is no directory: name the one of the warehouse")
    meta = directory / META_DIRECTORY
    with ExitStack() as stack:
        if not meta.exists():
            meta.mkdir(mode=0o700)
            stack.callback(_leave, meta)
        stack.callback(os.close, lock_directory(meta))
        _clear(directory)
        old = salvage(meta)
        sources = _open_sources(directory, devices, frozenset(without), old, stack)
        _refuse_needless(sources, force=force)
        report = Report(
            sources.warehouse,
            {number: str(device.path) for number, device in sources.devices.items()},
            tuple(sorted(without)),
        )
        for device in sources.devices.values():
            report.notes += [f"device {device.index}: {note}" for note in device.notes]
        scan, found = _read(sources, report, watch)
        stack.callback(shutil.rmtree, directory / NEW_DIRECTORY, ignore_errors=True)
        _build(sources, scan, found, report, watch)
        _swap(directory, report)
    return report


def _leave(meta: Path) -> None:
    """Take away the directory that was made for the lock, if nothing has come into it."""
    if not (meta / "data.mdb").exists():
        shutil.rmtree(meta, ignore_errors=True)


def _clear(directory: Path) -> None:
    """Take away what a rebuild that was killed has left. The metadata must be locked."""
    shutil.rmtree(directory / NEW_DIRECTORY, ignore_errors=True)
    present = directory / META_DIRECTORY / "data.mdb"
    for kept in directory.glob(OLD_DIRECTORY + "*"):
        with suppress(OSError):  # a second name of what is in use still
            if (kept / "data.mdb").samefile(present):
                shutil.rmtree(kept)


def _open_sources(
    directory: Path, given: Sequence[Path], without: frozenset[int], old: Salvage | None,
    stack: ExitStack,
) -> _Sources:  # fmt: skip
    """Find devices, secret and roster; the devices are claimed until *stack* ends."""
    found = _find_devices(directory, given, without, old)
    warehouse = next(iter(found.values()))[1].warehouse
    devices: dict[int, Device] = {}
    for number, (path, superblock) in sorted(found.items()):
        device = Device.open(
            path, warehouse=warehouse, device=superblock.device, index=superblock.index,
            read_only=True,
        )  # fmt: skip
        stack.callback(device.close)
        devices[number] = device
    secrets: list[bytes] = []
    missing: InvalidInput | None = None
    try:
        secrets.append(read_secret(directory))
    except InvalidInput as error:
        missing = error
    if old is not None and len(old.secret) == SECRET_BYTES:
        secrets.append(old.secret)
    if not secrets:
        assert missing is not None
        raise missing
    for secret in secrets:
        roster = newest_roster(devices.values(), secret, warehouse)
        if roster is not None:
            return _Sources(directory, warehouse, devices, secret, roster, old)
    raise CorruptMetadata(
        f"no device has a roster that is sealed with the secret in {directory / SECRET_FILE}: put "
        "the copy of this warehouse's secret there; without it, or without a roster, its blocks "
        "cannot be told from forgeries"
    )


def _find_devices(
    directory: Path, given: Sequence[Path], without: frozenset[int], old: Salvage | None
) -> dict[int, tuple[Path, Superblock]]:
    """The devices by number, all of one warehouse and none missing but *without*."""
    known = {device.index for device in old.devices} if old is not None else set()
    found: dict[int, tuple[Path, Superblock]] = {}
    for path in given or _likely(directory, without, old):
        superblock = identify(path)
        number = superblock.index
        if number in without:
            raise InvalidInput(f"{path} is device {number}, which is to be left out: name it once")
        if number in found:
            raise WrongDevice(
                f"{path} and {found[number][0]} are both device {number}: name only one of them"
            )
        found[number] = (path, superblock)
    owners = {superblock.warehouse for _, superblock in found.values()}
    if old is not None:
        owners.add(old.warehouse)
    if len(owners) > 1:
        raise WrongDevice(
            f"the devices are of {len(owners)} warehouses ({', '.join(map(str, owners))}): give "
            "those of one, with --device"
        )
    if not found:
        raise NoSuchWarehouse(
            f"no device of a warehouse is known in {directory}: give each with --device"
        )
    missing = (known | set(range(max(found)))) - set(found) - without
    if missing:
        names = ", ".join(map(str, sorted(missing)))
        raise WrongDevice(
            f"device {names} is missing: give all devices with --device, or give it up with "
            f"--without-device {min(missing)}, which loses what lies on it"
        )
    return found


def _likely(directory: Path, without: frozenset[int], old: Salvage | None) -> Iterator[Path]:
    """Where the devices may be, if nobody says it."""
    if old is not None:
        for device in old.devices:
            if device.index not in without:
                yield directory / device.path
        return
    for path in sorted(directory.iterdir()):
        if path.is_file():
            try:
                number = identify(path).index
            except TwfsError:
                continue
            if number not in without:
                yield path


def _refuse_needless(sources: _Sources, *, force: bool) -> None:
    """Raise WarehouseExists if the metadata can be read and says of these devices the newest."""
    old = sources.old
    if force or old is None or not old.whole or sources.roster.sequence - old.sequence > 1:
        return
    if {device.index for device in old.devices} == sources.devices.keys():
        raise WarehouseExists(
            f"the metadata in {sources.directory} can be read and is as new as its devices: use "
            "`twfs check`; --force makes it anew all the same, and brings back evicted blocks too"
        )


def _read(sources: _Sources, report: Report, watch: Watch) -> tuple[Scan, Survivors]:
    """Read the devices and choose the blocks."""
    began = time.monotonic()
    scan = Scan(sources.devices, sources.warehouse, sources.secret, sources.roster, watch)
    scan.run()
    report.seconds["reading"] = round(time.monotonic() - began, 3)
    began = time.monotonic()

    def verified(done: int, total: int) -> None:
        spent = time.monotonic() - began
        left = spent * (total - done) / done if done else None
        watch(Progress("verifying", done, total, scan.headers, left))

    found = survivors(scan, verified)
    report.seconds["verifying"] = round(time.monotonic() - began, 3)
    report.read_bytes = scan.total_bytes
    report.unreadable_bytes = scan.unreadable_bytes
    report.headers = scan.headers
    for number in sorted(found.epochs):
        report.notes.append(
            f"model {sources.roster.models[number].name}: headers are of a later epoch than the "
            "roster, which is old; only those of the latest came back"
        )
    for name, end, seen in (
        ("generation", sources.roster.generation_end, scan.generation_end),
        ("inode", sources.roster.ino_end, scan.ino_end),
    ):
        if seen > end:
            report.notes.append(
                f"the roster is old: it says that no {name} from {end} on was given away, and "
                f"headers have {seen - 1}"
            )
    return scan, found


def _build(
    sources: _Sources, scan: Scan, found: Survivors, report: Report, watch: Watch
) -> None:  # fmt: skip
    """Make the whole metadata in `meta.new`, and the file of last uses beside it."""
    began = time.monotonic()
    meta = sources.directory / NEW_DIRECTORY
    records = [
        DeviceRecord(
            DeviceIndex(number), device.uuid, name_of(sources.directory, device.path),
            device.size_bytes,
        )
        for number, device in sources.devices.items()
    ]  # fmt: skip
    free = [
        Extent(device.index, *device.data_area) for device in sources.devices.values()
    ]  # fmt: skip
    Metadata.create(meta, sources.warehouse, records, free, sources.secret)
    rows = found.found.rows()
    rows["slot"][found.order] = np.arange(len(found.order), dtype=np.uint32)
    metadata = Metadata.open(meta)
    try:
        models = metadata.submit(lambda view: _begin(view, sources, scan, found)).result()
        tenants = Tenants(sources.roster.tenants)
        _publish_all(metadata, models, found, tenants, report, watch)
        metadata.submit(lambda view: _begin_sessions(view, sources, models)).result()
        metadata.submit(lambda view: _retire(view, sources)).result()
    finally:
        metadata.close()
    scan.rejected[Cause.UNFIT] += len(found.order) - report.accepted
    report.rejected = {cause.value: count for cause, count in scan.rejected.items() if count}
    report.models = len(models)
    _write_heat(sources.directory, rows["published_ms"][found.order])
    report.seconds["writing"] = round(time.monotonic() - began, 3)


def _begin(
    view: WriteView, sources: _Sources, scan: Scan, found: Survivors
) -> list[ModelRecord]:  # fmt: skip
    """Enter the models and all counters; returns the models, in the roster's order.

    Model numbers were given one to a roster at most, so those behind its sequence are new; the
    sequence goes ahead by as many, so that this stays true.
    """
    roster, old = sources.roster, sources.old
    counters = old.counters if old is not None else {}
    first = max(counters.get("model", 0), roster.sequence + 1)
    models = []
    for number, each in enumerate(roster.models):
        models.append(
            ModelRecord(
                ModelId(first + number), each.name, found.epochs.get(number, each.epoch),
                each.layout, each.created_ms,
            )
        )  # fmt: skip
        view.put_model(models[-1])
    view.set_counter("model", first + len(models))
    for name, end, seen in (
        ("generation", roster.generation_end, scan.generation_end),
        ("ino", roster.ino_end, scan.ino_end),
    ):
        view.set_counter(name, max(view.counter(name), end, seen, counters.get(name, 0)))
    ahead = -(-(first + len(models) - roster.sequence) // PLACES_AHEAD) * PLACES_AHEAD
    view.set_meta("roster", LENGTH.pack(roster.sequence + ahead))
    return models


def _publish_all(  # noqa: PLR0917 - all that a rebuild has by then
    metadata: Metadata, models: list[ModelRecord], found: Survivors, tenants: Tenants,
    report: Report, watch: Watch,
) -> None:  # fmt: skip
    """Publish the blocks in their order, one model, group and shard to a transaction."""
    began, waiting = time.monotonic(), deque[tuple[int, "Future[ledger.Published]"]]()
    total, ended = len(found.order), 0
    while ended < total or waiting:
        if ended < total and len(waiting) < COMMITS_QUEUED:
            model, candidates = _next_batch(models, found, ended)
            ended += len(candidates)
            job = _publishing(model, candidates, tenants)
            waiting.append((len(candidates), metadata.submit(job)))
            continue
        _, future = waiting.popleft()
        done = future.result()
        for entered in done.entered:
            report.accepted += 1
            report.accepted_bytes += entered.block.payload_bytes
            report.detached += entered.block.detached
        report.detached -= len(done.attached)
        assert PutOutcome.COLLISION not in done.outcomes
        spent = time.monotonic() - began
        left = spent * (total - report.accepted) / max(1, report.accepted)
        watch(Progress("writing", report.accepted, total, total, left))


def _begin_sessions(view: WriteView, sources: _Sources, models: list[ModelRecord]) -> None:
    """Let every head be a session with the class of its header, but where the roster says more.

    When blocks were used last is not known: times to live begin anew.
    """
    said = {(row.model, row.head) for row in sources.roster.classes}
    for record in models:
        ends = Ends.of(view, record)
        after: PrefixHash | None = None
        while heads := view.heads(record.id, after, HEADS_AT_ONCE):
            after = heads[-1]
            for head in heads:
                block = ends.standing(head)
                if (record.name, head) in said or block is None:
                    continue
                if block.retention != Retention.STANDARD.rank:
                    key = SessionKey.without_id(record.id, block.tenant, head)
                    ends.place(key, Session(head, block.retention))
    enter_classes(view, sources.roster.classes)
    view.set_meta("uses_from", LENGTH.pack(wall_ms()))


def _publishing(
    model: ModelRecord, candidates: list[tuple[BlockKey, Block]], tenants: Tenants
) -> Any:
    paid = [
        (key, replace(block, payer=0) if _unpaid(block, tenants) else block)
        for key, block in candidates
    ]

    def follows(above: int, below: int) -> bool:
        # Who has left a share group keeps what hangs below the group's blocks.
        return above == below or tenants.is_group(above) or not tenants.there(above)

    return lambda view: ledger.publish(view, model, paid, follows=follows)


def _unpaid(block: Block, tenants: Tenants) -> bool:
    """Tell whether who is charged for *block* by its header is no member of its group any more."""
    return bool(block.payer) and tenants.shares.get(block.payer) != block.tenant


def _next_batch(
    models: list[ModelRecord], found: Survivors, start: int
) -> tuple[ModelRecord, list[tuple[BlockKey, Block]]]:
    """The blocks from place *start* of the order on that go in one transaction."""
    rows = found.found.rows()[found.order[start : start + BLOCKS_PER_COMMIT]]
    first = rows[0]
    same = np.ones(len(rows), np.bool_)
    for name in ("model", "group", "shard"):
        same &= rows[name] == first[name]
    count = len(rows) if same.all() else int(np.argmin(same))
    model, group, shard = models[first["model"]], int(first["group"]), int(first["shard"])
    hashes = rows["prefix_hash"][:count].tobytes()
    return model, [
        (
            BlockKey(model.id, PrefixHash(hashes[16 * place : 16 * place + 16]), group, shard),
            found.found.block(number),
        )
        for place, number in enumerate(found.order[start : start + count].tolist())
    ]


def _retire(view: WriteView, sources: _Sources) -> None:
    """Keep what the old metadata had retired from use, where no block lies there now."""
    for extent in sources.old.retired if sources.old is not None else ():
        device = sources.devices.get(extent.device)
        if device is None or not extent.length:
            continue
        for run in list(view.runs("free")):
            start = max(run.offset, extent.offset)
            end = min(run.offset + run.length, extent.offset + extent.length)
            if run.device == extent.device and start < end:
                part = replace(extent, offset=start, length=ByteCount(end - start))
                view.take_free(part)
                view.add_limbo(part, RETIRED)


def _write_heat(directory: Path, published_ms: Array) -> None:
    """Let every block count as used last when it was published."""
    stamps = np.zeros(align_up(max(1, len(published_ms)) * STAMP_BYTES) // STAMP_BYTES, np.uint64)
    stamps[: len(published_ms)] = published_ms
    fresh = directory / (HEAT_FILE + ".new")
    with fresh.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(stamps.tobytes())
        file.flush()
        os.fsync(file.fileno())
    assert fresh.stat().st_size % ALIGN == 0


def _swap(directory: Path, report: Report) -> None:
    """Put the new metadata in the place of the old, which keeps a name beside it."""
    meta, fresh = directory / META_DIRECTORY, directory / NEW_DIRECTORY
    present = meta / "data.mdb"
    (directory / (HEAT_FILE + ".new")).replace(directory / HEAT_FILE)
    if present.exists():
        kept = _old_name(directory)
        kept.mkdir(mode=0o700)
        os.link(present, kept / "data.mdb")
        _sync(kept)
        report.old = str(kept)
    _sync(directory)
    (meta / "lock.mdb").unlink(missing_ok=True)  # the reader table of the old file
    (fresh / "data.mdb").replace(present)
    _sync(meta)


def _old_name(directory: Path) -> Path:
    stamp = OLD_DIRECTORY + time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    number = 0
    while (path := directory / (stamp if not number else f"{stamp}-{number}")).exists():
        number += 1
    return path


def _sync(directory: Path) -> None:
    """Make the names in *directory* durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The tables of the metadata, typed: what one LMDB transaction can read and change.

A view lives as long as its transaction, in the thread that began it. Nothing here waits.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from twfs.errors import CorruptMetadata, InvalidInput
from twfs.layout import Layout, check_model_name
from twfs.records import DATA_START, Block, BlockKey, Extent
from twfs.units import (
    ALIGN,
    HASH_BYTES,
    ByteCount,
    ByteOffset,
    DeviceIndex,
    Millis,
    ModelId,
    PrefixHash,
)

UNREADABLE: Final = (ValueError, KeyError, TypeError, RecursionError, InvalidInput, struct.error)
TABLES: Final = (
    "meta",
    "models",
    "names",
    "blocks",
    "heads",
    "sessions",
    "ends",
    "free",
    "limbo",
    "counters",
    "files",
    "paths",
)
MODEL_KEY: Final = struct.Struct(">I")
PLACE_KEY: Final = struct.Struct(">HQ")  # device, offset: ordered by place
LENGTH: Final = struct.Struct("<Q")
LIMBO: Final = struct.Struct("<QQ")  # length; and one of the next
LEASED: Final = 0  # a lease may read it
RETIRED: Final = 1  # bytes were lost there
TO_DISCARD: Final = 2  # a purge is to erase it before it is free
TO_OVERWRITE: Final = 3  # the same, by overwriting
ONLINE: Final = "online"
DRAINING: Final = "draining"


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A device as the metadata names it."""

    index: DeviceIndex
    uuid: UUID
    path: str
    size_bytes: ByteCount
    draining: bool = False  # being emptied, also after a restart

    @property
    def data_area(self) -> tuple[ByteOffset, ByteCount]:
        """Offset and length of what blocks may take, also while the device itself is away."""
        return DATA_START, ByteCount(self.size_bytes - ALIGN - DATA_START)


def pack_devices(devices: Sequence[DeviceRecord]) -> bytes:
    """Return the list of devices as JSON."""
    return json.dumps(
        [
            {
                "index": device.index,
                "uuid": str(device.uuid),
                "path": device.path,
                "size_bytes": device.size_bytes,
                "state": DRAINING if device.draining else ONLINE,
            }
            for device in devices
        ]
    ).encode()


def unpack_devices(data: bytes) -> list[DeviceRecord]:
    """Undo pack_devices; CorruptMetadata if that did not make *data*."""
    try:
        return _unpacked_devices(data)
    except UNREADABLE as error:
        raise CorruptMetadata(f"the list of devices is unreadable: {error}") from error


def _unpacked_devices(data: bytes) -> list[DeviceRecord]:
    parts = json.loads(data)
    if not parts or type(parts) is not list:
        raise ValueError("it names none")
    found: list[DeviceRecord] = []
    for number, part in enumerate(parts):
        index, uuid, path, size = (part[name] for name in ("index", "uuid", "path", "size_bytes"))
        kinds = [type(value) for value in (index, uuid, path, size)]
        state = part.get("state", ONLINE)
        before = found[-1].index if found else -1  # numbers may have gaps
        if (
            kinds != [int, str, str, int]
            or not before < index < 1 << 16
            or "\0" in path
            or (state not in {ONLINE, DRAINING})
        ):
            raise ValueError(f"row {number} is {part!r:.200}")
        record = DeviceRecord(
            DeviceIndex(index), UUID(uuid), path, ByteCount(size), state == DRAINING
        )
        found.append(record)
    return found


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model and epoch; an older epoch's record stays until its blocks are gone."""

    id: ModelId
    name: str
    epoch: int
    layout: Layout
    created_ms: Millis

    def pack(self) -> bytes:
        """Return the record as JSON."""
        return json.dumps(
            {
                "name": self.name,
                "epoch": self.epoch,
                "created_ms": self.created_ms,
                "layout": self.layout.to_dict(),
            },
            sort_keys=True,
        ).encode()

    @classmethod
    def unpack(cls, model_id: ModelId, data: bytes) -> "ModelRecord":
        """Make a record of JSON; one of UNREADABLE if it is none."""
        parts = json.loads(data)
        numbers = [parts["epoch"], parts["created_ms"]]
        if not all(type(number) is int and 0 <= number < 1 << 64 for number in numbers):
            raise ValueError(f"epoch and time are {numbers!r:.80}")
        epoch, created_ms = numbers
        layout = Layout.from_dict(parts["layout"])
        return cls(model_id, check_model_name(parts["name"]), epoch, layout, Millis(created_ms))


def _unreadable(what: str, error: Exception) -> CorruptMetadata:
    """The error of a row that cannot be what its table holds."""
    return CorruptMetadata(f"{what} is unreadable: {error}")


def _unpacked(form: struct.Struct, data: bytes, what: str) -> tuple[Any, ...]:
    """The numbers of *data*; CorruptMetadata if it has another length."""
    try:
        return form.unpack(data)
    except struct.error as error:
        raise _unreadable(what, error) from error


def _hash_of(data: bytes) -> PrefixHash:
    """The 16 bytes *data* of a row; ValueError if it has another length."""
    if len(data) != HASH_BYTES:
        raise ValueError(f"a hash of {len(data)} bytes")
    return PrefixHash(data)


class ReadView:
    """One snapshot of the tables. Short-lived; of one thread."""

    def __init__(self, txn: Any, tables: dict[str, Any]) -> None:
        self._txn = txn
        self._tables = tables
        self._blocks = tables["blocks"]

    def end(self) -> None:
        """End the snapshot, and let go of it.

        LMDB has few slots for readers, and py-lmdb gives one back only with the transaction's
        object: whoever keeps this view, a traceback for one, must not keep that.
        """
        txn, self._txn = self._txn, None
        txn.abort()

    def meta(self, name: str) -> bytes | None:
        """A value of the meta table."""
        return self._get("meta", name.encode())

    def devices(self) -> list[DeviceRecord]:
        """The devices, by index; CorruptMetadata if their list cannot be read."""
        return unpack_devices(self.meta("devices") or b"")

    def _get(self, table: str, key: bytes) -> bytes | None:
        value: bytes | None = self._txn.get(key, db=self._tables[table])
        return value

    def raw_blocks(self, keys: list[bytes]) -> list[bytes]:
        """Records of the leading *keys* that are all there: stops at the first absence."""
        get, table = self._txn.get, self._blocks
        found = []
        for key in keys:
            value = get(key, None, table)
            if value is None:
                break
            found.append(value)
        return found

    def raw_block(self, key: bytes) -> bytes | None:
        """One packed record."""
        value: bytes | None = self._txn.get(key, None, self._blocks)
        return value

    def block(self, key: BlockKey) -> Block | None:
        """One record; CorruptMetadata if it cannot be read."""
        value = self.raw_block(key.pack())
        if value is None:
            return None
        try:
            return Block.unpack(value)
        except ValueError as error:
            raise CorruptMetadata(f"the record of block {key} is unreadable: {error}") from error

    def has_blocks(self, model: ModelId) -> bool:
        """Tell whether any block of *model* is there."""
        cursor = self._txn.cursor(db=self._blocks)
        prefix = MODEL_KEY.pack(model)
        return bool(cursor.set_range(prefix)) and cursor.key().startswith(prefix)

    def all_blocks(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (packed key, packed record), in key order."""
        yield from self._txn.cursor(db=self._blocks).iternext(keys=True, values=True)

    def blocks_after(self, key: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Every (packed key, packed record) behind the packed *key* (b"": all), in key order."""
        cursor = self._txn.cursor(db=self._blocks)
        if cursor.set_range(key):
            for found, value in cursor.iternext(keys=True, values=True):
                if found != key:
                    yield found, value

    def children(self, parent: BlockKey) -> list[PrefixHash]:
        """Hashes of the blocks of the same group and shard whose parent is *parent*.

        CorruptMetadata if one cannot be read.
        """
        cursor = self._txn.cursor(db=self._tables["children"])
        if not cursor.set_key(parent.pack()):
            return []
        try:
            return [_hash_of(value) for value in cursor.iternext_dup()]
        except ValueError as error:
            raise _unreadable(f"a child of {parent}", error) from error

    def all_children(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (packed parent key, child hash)."""
        yield from self._txn.cursor(db=self._tables["children"]).iternext(keys=True, values=True)

    def is_head(self, model: ModelId, prefix_hash: PrefixHash) -> bool:
        """Tell whether *prefix_hash* is a head."""
        return self._get("heads", MODEL_KEY.pack(model) + prefix_hash) is not None

    def heads(self, model: ModelId, after: PrefixHash | None, limit: int) -> list[PrefixHash]:
        """Up to *limit* heads behind *after*, in order."""
        prefix = MODEL_KEY.pack(model)
        cursor = self._txn.cursor(db=self._tables["heads"])
        found: list[PrefixHash] = []
        more = cursor.set_range(prefix + (after or b""))
        while more and len(found) < limit:
            key = cursor.key()
            if not key.startswith(prefix):
                break
            if key[4:] != after:
                found.append(PrefixHash(key[4:]))
            more = cursor.next()
        return found

    def all_heads(self) -> Iterator[tuple[ModelId, PrefixHash]]:
        """Every head of every model; CorruptMetadata if one cannot be read."""
        for key in self._txn.cursor(db=self._tables["heads"]).iternext(keys=True, values=False):
            try:
                yield ModelId(MODEL_KEY.unpack(key[:4])[0]), _hash_of(key[4:])
            except UNREADABLE as error:
                raise _unreadable("a head", error) from error

    def models(self) -> list[ModelRecord]:
        """All models, older epochs included; CorruptMetadata if one cannot be read."""
        found = []
        for key, value in self._txn.cursor(db=self._tables["models"]):
            try:
                model_id = ModelId(MODEL_KEY.unpack(key)[0])
                found.append(ModelRecord.unpack(model_id, value))
            except UNREADABLE as error:
                raise _unreadable("a model's record", error) from error
        return found

    def model_id(self, name: str) -> ModelId | None:
        """The id of the present epoch of the model *name*; CorruptMetadata."""
        value = self._get("names", name.encode())
        return None if value is None else ModelId(_unpacked(MODEL_KEY, value, "a model's name")[0])

    def runs(self, table: str) -> Iterator[Extent]:
        """The extents of "free" or "limbo", by place; CorruptMetadata if one cannot be read."""
        form = LIMBO if table == "limbo" else LENGTH
        for extent, _ in self._places(table, form):
            yield extent

    def leased_limbo(self) -> Iterator[Extent]:
        """The extents of limbo that are free once no lease reads them; CorruptMetadata."""
        return (extent for extent, why in self.all_limbo() if why == LEASED)

    def all_limbo(self) -> Iterator[tuple[Extent, int]]:
        """All extents of limbo, and why each is there; CorruptMetadata."""
        for extent, (why,) in self._places("limbo", LIMBO):
            yield extent, why

    def in_limbo(self, extent: Extent) -> bool:
        """Tell whether *extent* is in limbo, whatever for; CorruptMetadata."""
        value = self._get("limbo", PLACE_KEY.pack(extent.device, extent.offset))
        return value is not None and _unpacked(LIMBO, value, "a value of limbo")[0] == extent.length

    def _places(self, table: str, form: struct.Struct) -> Iterator[tuple[Extent, tuple[int, ...]]]:
        """The extents of *table*, each with what follows its length."""
        for key, value in self._txn.cursor(db=self._tables[table]):
            device, offset = _unpacked(PLACE_KEY, key, f"a key of {table}")
            length, *more = _unpacked(form, value, f"a value of {table}")
            yield Extent(DeviceIndex(device), ByteOffset(offset), ByteCount(length)), tuple(more)

    def counter(self, name: str) -> int:
        """A counter; 0 before its first change. CorruptMetadata."""
        value = self._get("counters", name.encode())
        return 0 if value is None else int(_unpacked(LENGTH, value, f"the counter {name}")[0])

    def raw(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, value) of a table as it lies there, in key order."""
        yield from self._txn.cursor(db=self._tables[table]).iternext(keys=True, values=True)

    def get_raw(self, table: str, key: bytes) -> bytes | None:
        """One value of a table as it lies there."""
        return self._get(table, key)

    def under(self, table: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, value) of a table whose key begins with *prefix*, in key order."""
        cursor = self._txn.cursor(db=self._tables[table])
        if cursor.set_range(prefix):
            for key, value in cursor.iternext(keys=True, values=True):
                if not key.startswith(prefix):
                    return
                yield key, value

    def keys_with(self, table: str, prefix: bytes) -> list[bytes]:
        """All keys of a table that begin with *prefix*, in order."""
        return [key for key, _ in self.under(table, prefix)]

    def count(self, table: str) -> int:
        """Records in one table."""
        return int(self._txn.stat(self._tables[table])["entries"])

    def counts(self) -> dict[str, int]:
        """Records in each table."""
        return {name: int(self._txn.stat(table)["entries"]) for name, table in self._tables.items()}


class WriteView(ReadView):
    """The tables inside the write transaction. Only the writer thread has one."""

    def _put(self, table: str, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._tables[table])

    def set_meta(self, name: str, value: bytes) -> None:
        """Set a value of the meta table."""
        self._put("meta", name.encode(), value)

    def put_raw(self, table: str, key: bytes, value: bytes) -> None:
        """Put a packed pair: for repair, which has whole tables packed."""
        self._put(table, key, value)

    def add_raw_child(self, parent: bytes, child: bytes) -> None:
        """As add_child, of a packed parent key."""
        self._txn.put(parent, child, dupdata=True, db=self._tables["children"])

    def delete_raw(self, table: str, key: bytes, value: bytes = b"") -> None:
        """Take a packed pair out, readable or not; *value* tells which, of several with one key."""
        self._txn.delete(key, value, db=self._tables[table])

    def set_devices(self, devices: Sequence[DeviceRecord]) -> None:
        """Replace the list of devices."""
        self.set_meta("devices", pack_devices(sorted(devices, key=lambda each: each.index)))

    def put_block(self, key: BlockKey, block: Block) -> None:
        """Add or replace a record."""
        self._txn.put(key.pack(), block.pack(), db=self._blocks)

    def delete_block(self, key: BlockKey) -> None:
        """Take a record out."""
        assert self._txn.delete(key.pack(), db=self._blocks), key

    def add_child(self, parent: BlockKey, child: PrefixHash) -> None:
        """Note that *child* hangs below *parent*, which need not be there."""
        self._txn.put(parent.pack(), child, dupdata=True, db=self._tables["children"])

    def drop_child(self, parent: BlockKey, child: PrefixHash) -> None:
        """Undo add_child."""
        self._txn.delete(parent.pack(), child, db=self._tables["children"])

    def add_head(self, model: ModelId, prefix_hash: PrefixHash) -> bool:
        """Note a head; False if it was one."""
        return bool(
            self._txn.put(
                MODEL_KEY.pack(model) + prefix_hash, b"", overwrite=False, db=self._tables["heads"]
            )
        )

    def drop_head(self, model: ModelId, prefix_hash: PrefixHash) -> bool:
        """Undo add_head; False if it was none."""
        key = MODEL_KEY.pack(model) + prefix_hash
        return bool(self._txn.delete(key, db=self._tables["heads"]))

    def put_model(self, model: ModelRecord) -> None:
        """Add a model's record and let its name lead to it."""
        self._put("models", MODEL_KEY.pack(model.id), model.pack())
        self._put("names", model.name.encode(), MODEL_KEY.pack(model.id))

    def delete_model(self, model: ModelId) -> None:
        """Take out the record of an epoch that has no block any more."""
        self._txn.delete(MODEL_KEY.pack(model), db=self._tables["models"])

    def set_counter(self, name: str, value: int) -> None:
        """Set a counter."""
        self._put("counters", name.encode(), LENGTH.pack(value))

    def take_free(self, extent: Extent) -> None:
        """Take *extent* out of the free run that holds it."""
        cursor = self._txn.cursor(db=self._tables["free"])
        run = self._run_before(cursor, extent.device, extent.offset)
        end = extent.offset + extent.length
        assert run is not None, extent
        run_end = run.offset + run.length
        assert run.offset <= extent.offset, extent
        assert end <= run_end, extent
        if run.offset < extent.offset:
            self._put_run(extent.device, run.offset, extent.offset - run.offset)
        else:
            self._txn.delete(PLACE_KEY.pack(run.device, run.offset), db=self._tables["free"])
        if end < run_end:
            self._put_run(extent.device, end, run_end - end)

    def add_free(self, extent: Extent) -> None:
        """Give *extent* back, merged with the runs that touch it."""
        cursor = self._txn.cursor(db=self._tables["free"])
        start, end = int(extent.offset), extent.offset + extent.length
        before = self._run_before(cursor, extent.device, extent.offset)
        if before is not None:
            before_end = before.offset + before.length
            assert before_end <= start, (before, extent)
            if before_end == start:
                start = before.offset
        after = self._txn.get(PLACE_KEY.pack(extent.device, end), db=self._tables["free"])
        if after is not None:
            self._txn.delete(PLACE_KEY.pack(extent.device, end), db=self._tables["free"])
            end += LENGTH.unpack(after)[0]
        self._put_run(extent.device, start, end - start)

    def _put_run(self, device: int, offset: int, length: int) -> None:
        self._put("free", PLACE_KEY.pack(device, offset), LENGTH.pack(length))

    @staticmethod
    def _run_before(cursor: Any, device: int, offset: int) -> Extent | None:
        """The free run that begins at *offset* or is the last one before it on *device*."""
        found = cursor.set_range(PLACE_KEY.pack(device, offset))
        if not (found and cursor.key() == PLACE_KEY.pack(device, offset)):
            found = cursor.prev() if found else cursor.last()
        if not found:
            return None
        at_device, at = PLACE_KEY.unpack(cursor.key())
        if at_device != device:
            return None
        length = LENGTH.unpack(cursor.value())[0]
        return Extent(DeviceIndex(device), ByteOffset(at), ByteCount(length))

    def add_limbo(self, extent: Extent, why: int = LEASED) -> None:
        """Note an extent that belongs to no block and is not free: yet, or if RETIRED, ever."""
        self._put(
            "limbo", PLACE_KEY.pack(extent.device, extent.offset), LIMBO.pack(extent.length, why)
        )

    def forget_device(self, device: DeviceIndex) -> None:
        """Take out all that is noted of *device* but its blocks: free runs and limbo."""
        for table in ("free", "limbo"):
            for extent in [each for each in self.runs(table) if each.device == device]:
                self._txn.delete(PLACE_KEY.pack(device, extent.offset), db=self._tables[table])

    def drop_limbo(self, extent: Extent) -> None:
        """Undo add_limbo."""
        key = PLACE_KEY.pack(extent.device, extent.offset)
        assert self._txn.delete(key, db=self._tables["limbo"]), extent

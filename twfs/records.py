"""The records on the device and in LMDB: pack and unpack, nothing else. The twin of FORMAT.md.

Everything is little-endian and without padding; reserved bytes are zero. Unpacking treats every
byte as hostile: lengths, counts and offsets are checked before they are used, and what does not
fit raises ValueError, which the caller turns into the error of its place.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import numpy as np
import xxhash

from twfs.secret import MAC_BYTES, mac_of
from twfs.units import (
    ALIGN,
    DIGEST_BYTES,
    EXTENTS_MAX,
    HASH_BYTES,
    KEY_BYTES_MAX,
    NAME_BYTES_MAX,
    ByteCount,
    ByteOffset,
    DeviceIndex,
    Digest,
    Generation,
    Ino,
    Millis,
    ModelId,
    PrefixHash,
    Slot,
    TokenCount,
    align_up,
    is_aligned,
)

FORMAT_VERSION: Final = 3
SUPERBLOCK_MAGIC: Final = b"TWFSDEV\x01"
HEADER_MAGIC: Final = b"TWFSBLK\x01"
ROSTER_MAGIC: Final = b"TWFSROS\x01"
DATA_START: Final = ByteOffset(1 << 20)
LAYER_SUMS_MAX: Final = 256
ROSTER_STARTS: Final = (ByteOffset(4096), ByteOffset(512 << 10))  # its two places
ROSTER_BYTES: Final = 508 << 10  # of each place
MAC_OFFSET: Final = ALIGN - 8 - MAC_BYTES  # in a header, before its sum

SUPERBLOCK: Final = struct.Struct("<8sII16s16sHHIQQQ")
SUM: Final = struct.Struct("<Q")
ROSTER: Final = struct.Struct("<8sII16sQQ")
EXTENT: Final = struct.Struct("<QIHH")
HEADER: Final = struct.Struct("<8sIHH16s16sQQ32sQHHIIBBHQQQ16sQQ16s16s32sBB64sHH")
BLOCK_FIXED: Final = struct.Struct("<QQQQQQ16s16s32sIIHBBBBH")
SESSION: Final = struct.Struct("<16sBB6sQ")
SESSION_KEY: Final = struct.Struct(">IH")  # then the id, or NUL and the head of one without id
BLOCK_KEY: Final = struct.Struct(">I16sBH")  # big-endian: LMDB orders keys by their bytes

# The same bytes as BLOCK_FIXED and the EXTENT that follows it, for reading many records at once.
BLOCK_DTYPE: Final = np.dtype(
    [
        ("generation", "<u8"), ("ino", "<u8"), ("payload_bytes", "<u8"), ("published_ms", "<u8"),
        ("lane_plain", "<u8"), ("lane_weighted", "<u8"), ("xxh3", "V16"), ("parent", "V16"),
        ("digest", "V32"), ("slot", "<u4"), ("position", "<u4"), ("tenant", "<u2"),
        ("retention", "u1"), ("flags", "u1"), ("extent_count", "u1"), ("key_bytes", "u1"),
        ("payer", "<u2"),
        ("offset", "<u8"), ("units", "<u4"), ("device", "<u2"), ("extent_reserved", "<u2"),
    ]
)  # fmt: skip
# What a reader needs of one block; its extents follow in an array of their own, in block order.
LOCATED_DTYPE: Final = np.dtype(
    [
        ("generation", "<u8"), ("payload_bytes", "<u8"), ("lane_plain", "<u8"),
        ("lane_weighted", "<u8"), ("xxh3", "V16"), ("prefix_hash", "V16"), ("group", "<u2"),
        ("shard", "<u2"), ("index", "<u4"), ("extent_count", "<u4"),
    ]
)  # fmt: skip
# The same bytes as a whole header, for looking at many at once.
HEADER_DTYPE: Final = np.dtype(
    [
        ("magic", "V8"), ("version", "<u4"), ("extent_count", "<u2"), ("name_bytes", "<u2"),
        ("warehouse", "V16"), ("device", "V16"), ("offset", "<u8"), ("generation", "<u8"),
        ("fingerprint", "V32"), ("epoch", "<u8"), ("group", "<u2"), ("shard", "<u2"),
        ("position", "<u4"), ("reserved_0", "<u4"), ("retention", "u1"), ("key_bytes", "u1"),
        ("tenant", "<u2"), ("ino", "<u8"), ("payload_bytes", "<u8"), ("published_ms", "<u8"),
        ("xxh3", "V16"), ("lane_plain", "<u8"), ("lane_weighted", "<u8"), ("prefix_hash", "V16"),
        ("parent", "V16"), ("digest", "V32"), ("reserved_1", "u1"), ("reserved_2", "u1"),
        ("key", "V64"), ("layers", "<u2"), ("payer", "<u2"), ("name", "V200"),
        ("first_extent", "V16"), ("extents", "V112"), ("layer_sums", "V2048"),
        ("reserved_4", "V1386"), ("mac", "V16"), ("sum", "<u8"),
    ]
)  # fmt: skip
EXTENT_DTYPE: Final = np.dtype(
    [("offset", "<u8"), ("units", "<u4"), ("device", "<u2"), ("reserved", "<u2")]
)

assert SUPERBLOCK.size + SUM.size <= ALIGN
assert BLOCK_DTYPE.itemsize == BLOCK_FIXED.size + EXTENT.size
assert EXTENT_DTYPE.itemsize == EXTENT.size
assert HEADER_DTYPE.itemsize == ALIGN
TENANT: Final = struct.Struct("<H")  # of one record, without unpacking the rest
TENANT_OFFSET: Final = int(BLOCK_DTYPE.fields["tenant"][1])  # type: ignore[index]
FLAG_HOLE: Final = 1  # the bytes were lost: no extents; record and children stay
FLAG_DETACHED: Final = 2  # the parent, or the parent of one before it, has not come yet


@dataclass(frozen=True, slots=True)
class Superblock:
    """Who a device is. Written last at creation, to the first and the last 4 KiB of the device."""

    warehouse: UUID
    device: UUID
    index: DeviceIndex
    size_bytes: ByteCount
    created_ms: Millis
    data_start: ByteOffset = DATA_START
    version: int = FORMAT_VERSION

    def pack(self) -> bytes:
        """Return the 4096 bytes of the superblock."""
        body = SUPERBLOCK.pack(
            SUPERBLOCK_MAGIC, self.version, 0, self.warehouse.bytes, self.device.bytes,
            self.index, 0, 0, self.size_bytes, self.data_start, self.created_ms,
        )  # fmt: skip
        return _seal(body)

    @classmethod
    def unpack(cls, data: bytes) -> "Superblock":
        """Make a superblock of 4096 bytes; ValueError says what is wrong with them."""
        _unseal(data, SUPERBLOCK_MAGIC, "superblock")
        (_, version, _, warehouse, device, index, _, _, size, start, created) = (
            SUPERBLOCK.unpack_from(data)
        )
        if size % ALIGN or start % ALIGN or not 0 < start <= size - ALIGN:
            raise ValueError(f"superblock has size {size} and data start {start}")
        return cls(
            UUID(bytes=warehouse), UUID(bytes=device), DeviceIndex(index), ByteCount(size),
            Millis(created), ByteOffset(start), version,
        )  # fmt: skip


def _seal(body: bytes) -> bytes:
    """Pad *body* to 4 KiB with the xxh3-64 of all before it in the last 8 bytes."""
    padded = body.ljust(ALIGN - SUM.size, b"\0")
    return padded + SUM.pack(xxhash.xxh3_64_intdigest(padded))


def _unseal(data: bytes | memoryview, magic: bytes, what: str) -> None:
    """Raise ValueError unless *data* is 4 KiB that begin with *magic* and end with their sum."""
    if len(data) != ALIGN:
        raise ValueError(f"{what} has {len(data)} bytes, not {ALIGN}")
    if bytes(data[: len(magic)]) != magic:
        raise ValueError(f"{what} does not begin with its magic")
    if SUM.unpack_from(data, ALIGN - SUM.size)[0] != xxhash.xxh3_64_intdigest(
        data[: ALIGN - SUM.size]
    ):
        raise ValueError(f"{what} does not have its checksum")


@dataclass(frozen=True, slots=True)
class Extent:
    """A contiguous, 4 KiB-aligned run of one device."""

    device: DeviceIndex
    offset: ByteOffset
    length: ByteCount

    def __str__(self) -> str:
        return f"{self.device}:{self.offset}+{self.length}"

    def pack(self) -> bytes:
        """Return the 16 bytes of the extent."""
        return EXTENT.pack(self.offset, self.length // ALIGN, self.device, 0)

    @classmethod
    def unpack_from(cls, data: bytes | memoryview, at: int) -> "Extent":
        """Make the extent at byte *at* of *data*; ValueError if it cannot be one."""
        offset, units, device, _ = EXTENT.unpack_from(data, at)
        if not is_aligned(offset) or not units:
            raise ValueError(f"extent has offset {offset} and {units} units")
        return cls(DeviceIndex(device), ByteOffset(offset), ByteCount(units * ALIGN))


def payload_runs(extents: Sequence[Extent], payload_bytes: int) -> list[Extent]:
    """Where the payload of a block is: its *extents* without the header, padded to 4 KiB."""
    left, skip, runs = ALIGN + align_up(payload_bytes), ALIGN, []
    for extent in extents:
        length = min(extent.length, left)
        if length > skip:
            offset = ByteOffset(extent.offset + skip)
            runs.append(Extent(extent.device, offset, ByteCount(length - skip)))
        left, skip = left - length, max(skip - length, 0)
    return runs


@dataclass(frozen=True, slots=True)
class Checksums:
    """The two sums of one payload (without padding): for the host, and for a GPU."""

    xxh3: bytes  # xxh3-128, 16 bytes
    lane_plain: int  # mod 2**64
    lane_weighted: int  # mod 2**64


@dataclass(frozen=True, slots=True)
class BlockKey:
    """The full name of a block: model, prefix hash, group, shard."""

    model: ModelId
    prefix_hash: PrefixHash
    group: int = 0
    shard: int = 0

    def at(self, prefix_hash: PrefixHash) -> "BlockKey":
        """The block of the same model, group and shard under another *prefix_hash*."""
        return BlockKey(self.model, prefix_hash, self.group, self.shard)

    def pack(self) -> bytes:
        """Return the 23 bytes of the LMDB key."""
        return BLOCK_KEY.pack(self.model, self.prefix_hash, self.group, self.shard)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> "BlockKey":
        """Make a key of the 23 bytes *data*; ValueError on any other length."""
        try:
            model, prefix_hash, group, shard = BLOCK_KEY.unpack(data)
        except struct.error as error:
            raise ValueError(f"block key has {len(data)} bytes") from error
        return cls(ModelId(model), PrefixHash(prefix_hash), group, shard)


@dataclass(frozen=True, slots=True)
class Block:
    """A block's record: what LMDB keeps under its key."""

    generation: Generation
    ino: Ino
    slot: Slot
    parent: PrefixHash
    digest: Digest
    position: TokenCount
    payload_bytes: ByteCount
    checksums: Checksums
    extents: tuple[Extent, ...]
    published_ms: Millis
    key: bytes = b""
    tenant: int = 0
    retention: int = 1
    hole: bool = False
    detached: bool = False
    payer: int = 0  # of a share group's block, who is charged; 0: the tenant itself

    def pack(self) -> bytes:
        """Return the record: the fixed part, the extents, the engine's own key."""
        sums = self.checksums
        fixed = BLOCK_FIXED.pack(
            self.generation, self.ino, self.payload_bytes, self.published_ms,
            sums.lane_plain, sums.lane_weighted, sums.xxh3, self.parent, self.digest,
            self.slot, self.position, self.tenant, self.retention,
            FLAG_HOLE * self.hole | FLAG_DETACHED * self.detached,
            len(self.extents), len(self.key), self.payer,
        )  # fmt: skip
        extents = b"".join(extent.pack() for extent in self.extents) or bytes(EXTENT.size)
        return fixed + extents + self.key

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> "Block":
        """Make a record of *data*; ValueError says what is wrong."""
        if len(data) < BLOCK_DTYPE.itemsize:
            raise ValueError(f"block record has {len(data)} bytes")
        (generation, ino, payload, published, plain, weighted, xxh3, parent, digest, slot,
         position, tenant, retention, flags, count, key_bytes, payer) = (
            BLOCK_FIXED.unpack_from(data)
        )  # fmt: skip
        hole = bool(flags & FLAG_HOLE)
        end = BLOCK_FIXED.size + max(count, 1) * EXTENT.size
        if count > EXTENTS_MAX or (count == 0) != hole or key_bytes > KEY_BYTES_MAX:
            raise ValueError(f"block record has {count} extents and a key of {key_bytes} bytes")
        if len(data) != end + key_bytes:
            raise ValueError(f"block record has {len(data)} bytes instead of {end + key_bytes}")
        extents = tuple(
            Extent.unpack_from(data, BLOCK_FIXED.size + i * EXTENT.size) for i in range(count)
        )
        return cls(
            Generation(generation), Ino(ino), Slot(slot), PrefixHash(parent), Digest(digest),
            TokenCount(position), ByteCount(payload), Checksums(xxh3, plain, weighted), extents,
            Millis(published), bytes(data[end:]), tenant, retention, hole,
            bool(flags & FLAG_DETACHED), payer,
        )  # fmt: skip

    def with_sums(self, sums: "Checksums") -> "Block":
        """The same with its checksums; dataclasses.replace costs three times as much."""
        return Block(
            self.generation, self.ino, self.slot, self.parent, self.digest, self.position,
            self.payload_bytes, sums, self.extents, self.published_ms, self.key, self.tenant,
            self.retention, payer=self.payer,
        )  # fmt: skip

    @property
    def charged(self) -> int:
        """The tenant that is charged for it."""
        return self.payer or self.tenant

    @property
    def device_bytes(self) -> ByteCount:
        """What the block takes on its devices: header, payload, padding."""
        return ByteCount(sum(extent.length for extent in self.extents))


@dataclass(frozen=True, slots=True)
class Header:
    """The 4 KiB before a payload: enough to know, without LMDB, what the bytes behind it are."""

    warehouse: UUID
    device: UUID
    fingerprint: bytes
    model_name: str
    epoch: int
    group: int
    shard: int
    prefix_hash: PrefixHash
    block: Block
    layer_sums: tuple[int, ...] = ()  # xxh3-64 of each layer's run of bytes, if layers are runs

    def pack(self, secret: bytes) -> bytes:
        """Return the 4096 bytes of the header, sealed with *secret*.

        It names its own offset (the first extent's).
        """
        block, name = self.block, self.model_name.encode()
        sums = block.checksums
        assert len(name) <= NAME_BYTES_MAX
        assert len(block.key) <= KEY_BYTES_MAX
        assert len(self.layer_sums) <= LAYER_SUMS_MAX
        body = HEADER.pack(
            HEADER_MAGIC, FORMAT_VERSION, len(block.extents), len(name),
            self.warehouse.bytes, self.device.bytes, block.extents[0].offset, block.generation,
            self.fingerprint, self.epoch, self.group, self.shard, block.position, 0,
            block.retention, len(block.key), block.tenant, block.ino, block.payload_bytes,
            block.published_ms, sums.xxh3, sums.lane_plain, sums.lane_weighted,
            self.prefix_hash, block.parent, block.digest, 0, 0, block.key,
            len(self.layer_sums), block.payer,
        )  # fmt: skip
        extents = b"".join(extent.pack() for extent in block.extents)
        whole = (
            body
            + name.ljust(NAME_BYTES_MAX, b"\0")
            + extents.ljust(EXTENTS_MAX * EXTENT.size, b"\0")
            + struct.pack(f"<{len(self.layer_sums)}Q", *self.layer_sums)
        ).ljust(MAC_OFFSET, b"\0")
        return _seal(whole + mac_of(secret, whole))

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> "Header":
        """Make a header of 4096 bytes; ValueError says what is wrong. The slot is not in it: 0."""
        _unseal(data, HEADER_MAGIC, "block header")
        (_, version, extent_count, name_bytes, warehouse, device, offset, generation, fingerprint,
         epoch, group, shard, position, _, retention, key_bytes, tenant, ino, payload, published,
         xxh3, plain, weighted, prefix_hash, parent, digest, _, _, key, layers, payer) = (
            HEADER.unpack_from(data)
        )  # fmt: skip
        if version != FORMAT_VERSION:
            raise ValueError(f"block header has format version {version}")
        if not 1 <= extent_count <= EXTENTS_MAX or name_bytes > NAME_BYTES_MAX:
            raise ValueError(f"block header has {extent_count} extents, name of {name_bytes}")
        if key_bytes > KEY_BYTES_MAX or layers > LAYER_SUMS_MAX:
            raise ValueError(f"block header has a key of {key_bytes} bytes, {layers} layers")
        at = HEADER.size
        name = bytes(data[at : at + name_bytes]).decode()
        at += NAME_BYTES_MAX
        extents = tuple(Extent.unpack_from(data, at + i * EXTENT.size) for i in range(extent_count))
        if extents[0].offset != offset:
            raise ValueError(f"block header of offset {offset} names {extents[0].offset}")
        layer_sums = struct.unpack_from(f"<{layers}Q", data, at + EXTENTS_MAX * EXTENT.size)
        block = Block(
            Generation(generation), Ino(ino), Slot(0), PrefixHash(parent), Digest(digest),
            TokenCount(position), ByteCount(payload), Checksums(xxh3, plain, weighted), extents,
            Millis(published), key[:key_bytes], tenant, retention, payer=payer,
        )  # fmt: skip
        return cls(
            UUID(bytes=warehouse), UUID(bytes=device), fingerprint, name, epoch, group, shard,
            PrefixHash(prefix_hash), block, layer_sums,
        )  # fmt: skip


def sealed_with(secret: bytes, data: bytes | memoryview) -> bool:
    """Tell whether the 4096 bytes of a header were packed with *secret*."""
    return mac_of(secret, data[:MAC_OFFSET]) == bytes(data[MAC_OFFSET : MAC_OFFSET + MAC_BYTES])


assert HEADER.size + NAME_BYTES_MAX + EXTENTS_MAX * EXTENT.size + 8 * LAYER_SUMS_MAX <= MAC_OFFSET
assert HASH_BYTES == 16
assert DIGEST_BYTES == 32


def located(records: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Return LOCATED_DTYPE rows for BLOCK_DTYPE *records*; the caller adds their names."""
    rows = np.zeros(len(records), LOCATED_DTYPE)
    for name in ("generation", "payload_bytes", "lane_plain", "lane_weighted", "xxh3"):
        rows[name] = records[name]
    rows["extent_count"] = records["extent_count"]
    return rows

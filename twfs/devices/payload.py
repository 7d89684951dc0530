"""Read one block whole from the devices and prove it: for the mount, the checker and reports.

Engines do not come this way: they read many blocks at once through readers/. Blocks on the device.
"""

import mmap
from collections.abc import Callable, Mapping

from twfs.checksums import lanes_of, xxh3_of
from twfs.devices.device import Device
from twfs.errors import BadPayload, DeviceError
from twfs.records import Block, BlockKey, Extent, Header
from twfs.units import ALIGN, BLOCK_BYTES_MAX, IO_BYTES_MAX, ByteOffset, align_up


def aligned_buffer(byte_count: int) -> memoryview:
    """Fresh private memory, page-aligned, of huge pages where that pays."""
    area = mmap.mmap(-1, byte_count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if byte_count >= 2 << 20:
        area.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(area)


def read_payload(
    devices: "Mapping[int, Device]", key: BlockKey, block: Block, *, lanes: bool = False
) -> tuple[Header, memoryview]:
    """Return the header and the payload of *block*, both verified; with *lanes* by both sums.

    DeviceError if they cannot be read, BadPayload if they are not what the record says.
    """
    return verified(read_whole(devices, key, block), key, block, lanes=lanes)


def read_whole(
    devices: "Mapping[int, Device]", key: BlockKey, block: Block, *,
    io_bytes: int = IO_BYTES_MAX, before_each: Callable[[Extent, int], None] | None = None,
) -> memoryview:  # fmt: skip
    """Return header and padded payload of *block* as they lie on the devices: nothing is proved.

    *before_each* is called with extent and bytes before every read, of which none exceeds
    *io_bytes*. DeviceError, BadPayload if the record cannot be true.
    """
    _check_places(devices, key, block)
    buffer = aligned_buffer(block.device_bytes)
    at = 0
    for extent in block.extents:
        for done in range(0, extent.length, io_bytes):
            size = min(extent.length - done, io_bytes)
            if before_each is not None:
                before_each(extent, size)
            devices[extent.device].read_into(
                [buffer[at : at + size]], ByteOffset(extent.offset + done)
            )
            at += size
    return buffer


def verified(
    buffer: memoryview, key: BlockKey, block: Block, *, lanes: bool = False
) -> tuple[Header, memoryview]:
    """Return header and payload of what read_whole returned; BadPayload unless both are true.

    The lane sums are for GPUs: they cost ten times what xxh3 does, and prove nothing more here.
    """
    try:
        header = Header.unpack(buffer[:ALIGN])
    except (ValueError, UnicodeDecodeError) as error:
        raise BadPayload(f"block {key.prefix_hash.hex()}: {error}") from error
    complaint = header_complaint(header, key, block)
    if complaint:
        raise BadPayload(f"block {key.prefix_hash.hex()}: {complaint}")
    payload = buffer[ALIGN : ALIGN + block.payload_bytes]
    sums = block.checksums
    if xxh3_of(payload) != sums.xxh3 or (
        lanes and lanes_of(payload) != (sums.lane_plain, sums.lane_weighted)
    ):
        raise BadPayload(
            f"block {key.prefix_hash.hex()}: its {block.payload_bytes} bytes at "
            f"{block.extents[0]} do not have their checksums"
        )
    return header, payload


def _check_places(devices: "Mapping[int, Device]", key: BlockKey, block: Block) -> None:
    """Raise BadPayload if the record cannot be true, before memory is taken for what it says."""
    name, wanted = key.prefix_hash.hex(), ALIGN + align_up(block.payload_bytes)
    if not wanted <= block.device_bytes <= ALIGN + BLOCK_BYTES_MAX:
        raise BadPayload(
            f"block {name}: its record says {block.payload_bytes} bytes, in extents of "
            f"{block.device_bytes}"
        )
    for extent in block.extents:
        if extent.device not in devices:
            raise DeviceError(f"block {name} lies on device {extent.device}, gone")
        if extent.offset + extent.length > devices[extent.device].size_bytes:
            raise BadPayload(f"block {name}: its record says {extent}, outside of the device")


def header_complaint(header: Header, key: BlockKey, block: Block) -> str | None:
    """What in *header* contradicts the record, in words; None if nothing does."""
    there = (
        header.prefix_hash, header.group, header.shard, header.block.generation,
        header.block.digest, header.block.ino, header.block.payload_bytes, header.block.checksums,
        header.block.extents, header.block.key,
    )  # fmt: skip
    meant = (
        key.prefix_hash, key.group, key.shard, block.generation, block.digest, block.ino,
        block.payload_bytes, block.checksums, block.extents, block.key,
    )  # fmt: skip
    names = ("prefix hash", "group", "shard", "generation", "digest", "inode", "payload bytes",
             "checksums", "extents", "own key")  # fmt: skip
    wrong = [name for name, a, b in zip(names, there, meant, strict=True) if a != b]
    return f"its header has another {', '.join(wrong)}" if wrong else None

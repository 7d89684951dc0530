"""Read one block whole from the devices and prove it: for the mount, the checker and reports.

Engines do not come this way: they read many blocks at once through readers/. Blocks on the device.
"""

import mmap
from collections.abc import Mapping

from twfs.checksums import lanes_of, xxh3_of
from twfs.device import Device
from twfs.errors import BadPayload, DeviceError
from twfs.records import Block, BlockKey, Header
from twfs.units import ALIGN, IO_BYTES_MAX, ByteOffset, align_up


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

    The lane sums are for GPUs: they cost ten times what xxh3 does, and prove nothing more here.
    DeviceError if they cannot be read, BadPayload if they are not what the record says.
    """
    header, buffer = read_whole(devices, key, block, lanes=lanes)
    return header, buffer[ALIGN : ALIGN + block.payload_bytes]


def read_whole(
    devices: "Mapping[int, Device]", key: BlockKey, block: Block, *, lanes: bool = False
) -> tuple[Header, memoryview]:
    """As read_payload, but with all that lies on the device: header, payload and padding."""
    buffer = aligned_buffer(ALIGN + align_up(block.payload_bytes))
    at = 0
    for extent in block.extents:
        if extent.device not in devices:
            raise DeviceError(f"block {key.prefix_hash.hex()} lies on device {extent.device}, gone")
        for done in range(0, extent.length, IO_BYTES_MAX):
            size = min(extent.length - done, IO_BYTES_MAX)
            devices[extent.device].read_into(
                [buffer[at : at + size]], ByteOffset(extent.offset + done)
            )
            at += size
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
    return header, buffer


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

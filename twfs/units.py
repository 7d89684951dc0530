"""Types for every number that has a unit, so that mypy catches an offset passed as a length.

Not a place for helpers: only the names, the two alignment functions and the limits that the
on-device format itself fixes.
"""

from typing import Final, NewType

Ino = NewType("Ino", int)
ByteOffset = NewType("ByteOffset", int)
ByteCount = NewType("ByteCount", int)
TokenCount = NewType("TokenCount", int)
Generation = NewType("Generation", int)
Slot = NewType("Slot", int)
ModelId = NewType("ModelId", int)
LeaseId = NewType("LeaseId", int)
DeviceIndex = NewType("DeviceIndex", int)
Millis = NewType("Millis", int)  # wall clock, milliseconds since 1970
PrefixHash = NewType("PrefixHash", bytes)  # 16 bytes, shown as 32 hex digits
Digest = NewType("Digest", bytes)  # 32 bytes

ALIGN: Final = 4096  # offset, length and address of every device I/O are multiples of this
HASH_BYTES: Final = 16
DIGEST_BYTES: Final = 32
KEY_BYTES_MAX: Final = 64  # an engine's own key; sha256 hex fits exactly
EXTENTS_MAX: Final = 8  # per block: the header has room for them, and more seeks help nobody
IO_BYTES_MAX: Final = 16 << 20  # one preadv, one cuFile I/O, one pinned registration
BLOCK_BYTES_MAX: Final = (
    1 << 30
)  # payload of one block; 4096 tokens of a 70B model over 8 shards fit
NAME_BYTES_MAX: Final = 200  # a model's name, which is a directory name too


def align_up(byte_count: int) -> ByteCount:
    """Round *byte_count* up to the next multiple of 4 KiB."""
    return ByteCount(-(-byte_count // ALIGN) * ALIGN)


def is_aligned(number: int) -> bool:
    """Tell whether an offset, length or address may go to a device."""
    return number % ALIGN == 0

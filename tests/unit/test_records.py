"""Records come back as they went in, and no bytes from outside can do more than raise ValueError.

Hostile bytes: every cut, every flipped byte of a sealed record, and random bytes.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from uuid import UUID

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from twfs.records import (
    BLOCK_DTYPE,
    BLOCK_FIXED,
    BLOCK_KEY,
    EXTENT,
    FORMAT_VERSION,
    LAYER_SUMS_MAX,
    LOCATED_DTYPE,
    MAC_OFFSET,
    SUM,
    Block,
    BlockKey,
    Checksums,
    Extent,
    Header,
    Superblock,
    located,
    sealed_with,
)
from twfs.secret import MAC_BYTES
from twfs.units import (
    ALIGN,
    EXTENTS_MAX,
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
)

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
UUIDS = st.uuids()


def sized(count: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=count, max_size=count)


EXTENTS = st.builds(
    lambda device, place, units: Extent(
        DeviceIndex(device), ByteOffset(place * ALIGN), ByteCount(units * ALIGN)
    ),
    U16, st.integers(0, (1 << 52) - 1), st.integers(1, (1 << 32) - 1),
)  # fmt: skip
CHECKSUMS = st.builds(Checksums, sized(16), U64, U64)
BLOCKS = st.builds(
    Block,
    generation=U64.map(Generation), ino=U64.map(Ino), slot=U32.map(Slot),
    parent=sized(16).map(PrefixHash), digest=sized(32).map(Digest),
    position=U32.map(TokenCount), payload_bytes=U64.map(ByteCount), checksums=CHECKSUMS,
    extents=st.lists(EXTENTS, min_size=1, max_size=EXTENTS_MAX).map(tuple),
    published_ms=U64.map(Millis), key=st.binary(max_size=KEY_BYTES_MAX), tenant=U16,
    retention=st.integers(0, 255), detached=st.booleans(),
)  # fmt: skip
HEADERS = st.builds(
    Header,
    warehouse=UUIDS, device=UUIDS, fingerprint=sized(32),
    model_name=st.text(max_size=NAME_BYTES_MAX // 4), epoch=U64, group=U16, shard=U16,
    prefix_hash=sized(16).map(PrefixHash), block=BLOCKS,
    layer_sums=st.lists(U64, max_size=LAYER_SUMS_MAX).map(tuple),
)  # fmt: skip
SUPERBLOCK = Superblock(
    UUID(int=1), UUID(int=2), DeviceIndex(3), ByteCount(64 << 20), Millis(1_700_000_000_000)
)
BLOCK = Block(
    Generation(7), Ino(8), Slot(9), PrefixHash(bytes(16)), Digest(bytes(32)), TokenCount(256),
    ByteCount(5000), Checksums(bytes(16), 1, 2),
    (Extent(DeviceIndex(0), ByteOffset(1 << 20), ByteCount(3 * ALIGN)),),
    Millis(5), b"key",
)  # fmt: skip
SECRET = bytes(range(32))
HEADER = Header(
    UUID(int=1), UUID(int=2), bytes(range(32)), "a-model", 4, 1, 2, PrefixHash(b"h" * 16), BLOCK,
    (10, 11),
)  # fmt: skip


@given(UUIDS, UUIDS, U16, st.integers(257, 1 << 50), U64)
def test_superblock_comes_back_as_it_went_in(
    warehouse: UUID, device: UUID, index: int, units: int, created_ms: int
) -> None:
    superblock = Superblock(
        warehouse, device, DeviceIndex(index), ByteCount(units * ALIGN), Millis(created_ms)
    )
    packed = superblock.pack()
    assert len(packed) == ALIGN
    assert Superblock.unpack(packed) == superblock


@given(BLOCKS)
def test_block_record_comes_back_as_it_went_in(block: Block) -> None:
    assert Block.unpack(block.pack()) == block
    assert Block.unpack(memoryview(block.pack())) == block


@given(BLOCKS)
def test_hole_comes_back_without_extents(block: Block) -> None:
    hole = replace(block, hole=True, extents=())
    assert Block.unpack(hole.pack()) == hole
    assert hole.device_bytes == 0


@given(HEADERS)
def test_header_comes_back_without_what_only_lmdb_knows(header: Header) -> None:
    packed = header.pack(SECRET)
    assert len(packed) == ALIGN
    block = replace(header.block, slot=Slot(0), detached=False)
    assert Header.unpack(packed) == replace(header, block=block)


@given(U32, sized(16), st.integers(0, 255), U16)
def test_block_key_comes_back_and_sorts_by_model(
    model: int, prefix_hash: bytes, group: int, shard: int
) -> None:
    key = BlockKey(ModelId(model), PrefixHash(prefix_hash), group, shard)
    assert BlockKey.unpack(key.pack()) == key
    if model:
        assert replace(key, model=ModelId(model - 1)).pack() < key.pack()


def test_largest_header_fits() -> None:
    largest = replace(
        HEADER,
        model_name="m" * NAME_BYTES_MAX,
        layer_sums=tuple(range(LAYER_SUMS_MAX)),
        block=replace(BLOCK, slot=Slot(0), key=b"k" * KEY_BYTES_MAX, extents=BLOCK.extents * 8),
    )
    assert Header.unpack(largest.pack(SECRET)) == largest
    for over in (
        replace(HEADER, model_name="m" * (NAME_BYTES_MAX + 1)),
        replace(HEADER, layer_sums=(0,) * (LAYER_SUMS_MAX + 1)),
        replace(HEADER, block=replace(BLOCK, key=bytes(KEY_BYTES_MAX + 1))),
    ):
        with pytest.raises(AssertionError):
            over.pack(SECRET)


def test_key_with_zero_bytes_at_its_end_keeps_them() -> None:
    block = replace(BLOCK, key=b"k\0\0")
    assert Header.unpack(replace(HEADER, block=block).pack(SECRET)).block.key == b"k\0\0"
    assert Block.unpack(block.pack()).key == b"k\0\0"


def packed(sealed: Superblock | Header) -> bytes:
    return sealed.pack(SECRET) if isinstance(sealed, Header) else sealed.pack()


@pytest.mark.parametrize("sealed", [SUPERBLOCK, HEADER], ids=["superblock", "header"])
def test_any_flipped_byte_of_a_sealed_record_is_noticed(sealed: Superblock | Header) -> None:
    whole = packed(sealed)
    for at in range(ALIGN):
        with pytest.raises(ValueError, match=r"magic|checksum"):
            type(sealed).unpack(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])


def test_a_header_is_proved_by_the_secret_alone() -> None:
    whole = HEADER.pack(SECRET)
    assert sealed_with(SECRET, whole)
    assert not sealed_with(bytes(32), whole)
    for at in range(MAC_OFFSET + MAC_BYTES):  # whoever changes a byte can repair the sum alone
        changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        assert not sealed_with(SECRET, sealed_again(changed))


@pytest.mark.parametrize("count", [0, 1, ALIGN - 1, ALIGN + 1])
def test_sealed_records_of_another_length_are_refused(count: int) -> None:
    whole = HEADER.pack(SECRET) + b"\0"
    with pytest.raises(ValueError, match=f"{count} bytes"):
        Header.unpack(whole[:count])
    with pytest.raises(ValueError, match=f"{count} bytes"):
        Superblock.unpack((SUPERBLOCK.pack() + b"\0")[:count])


def sealed_again(data: bytes | bytearray) -> bytes:
    """*data* with the sum that makes it pass for whole."""
    body = bytes(data[: ALIGN - SUM.size])
    return body + SUM.pack(xxhash.xxh3_64_intdigest(body))


@given(st.integers(8, ALIGN - SUM.size - 1), sized(8))
def test_sealed_nonsense_raises_nothing_but_value_error(at: int, nonsense: bytes) -> None:
    for sealed in (HEADER, SUPERBLOCK):
        data = bytearray(packed(sealed))
        data[at : at + 8] = nonsense
        with suppress(ValueError):  # UnicodeDecodeError is one too
            type(sealed).unpack(sealed_again(data))


@pytest.mark.parametrize(
    ("offset", "byte", "complaint"),
    [
        (8, FORMAT_VERSION + 1, "version"),
        (12, 0, "0 extents"),
        (12, EXTENTS_MAX + 1, "9 extents"),
        (14, NAME_BYTES_MAX + 1, "name of 201"),
        (48 + 4, 1, "offset"),
        (117, KEY_BYTES_MAX + 1, "key of 65"),
    ],
)
def test_header_that_contradicts_itself_is_refused(offset: int, byte: int, complaint: str) -> None:
    data = bytearray(HEADER.pack(SECRET))
    data[offset] = byte
    with pytest.raises(ValueError, match=complaint):
        Header.unpack(sealed_again(data))


@pytest.mark.parametrize(
    ("size", "start"),
    [(64 << 20, 4096 + 1), ((64 << 20) + 1, 1 << 20), (1 << 20, 1 << 20), (64 << 20, 0), (0, 0)],
)
def test_superblock_of_impossible_size_is_refused(size: int, start: int) -> None:
    bad = replace(SUPERBLOCK, size_bytes=ByteCount(size), data_start=ByteOffset(start))
    with pytest.raises(ValueError, match=f"size {size} and data start {start}"):
        Superblock.unpack(bad.pack())


def test_every_cut_of_a_block_record_is_refused() -> None:
    whole = replace(BLOCK, extents=BLOCK.extents * 3).pack()
    for count in range(len(whole)):
        with pytest.raises(ValueError, match="bytes"):
            Block.unpack(whole[:count])
    with pytest.raises(ValueError, match="bytes"):
        Block.unpack(whole + b"\0")


@pytest.mark.parametrize(
    "bad",
    [
        replace(BLOCK, extents=()),
        replace(BLOCK, hole=True),
        replace(BLOCK, extents=BLOCK.extents * (EXTENTS_MAX + 1)),
        replace(BLOCK, key=bytes(KEY_BYTES_MAX + 1)),
        replace(BLOCK, extents=(replace(BLOCK.extents[0], offset=ByteOffset(5)),)),
        replace(BLOCK, extents=(replace(BLOCK.extents[0], length=ByteCount(0)),)),
    ],
)
def test_block_record_that_contradicts_itself_is_refused(bad: Block) -> None:
    with pytest.raises(ValueError, match=r"block record|extent"):
        Block.unpack(bad.pack())


@given(st.binary(max_size=BLOCK_FIXED.size + 9 * EXTENT.size))
def test_random_bytes_raise_nothing_but_value_error(data: bytes) -> None:
    unpackers: list[Callable[[bytes], object]] = [
        Block.unpack, BlockKey.unpack, Header.unpack, Superblock.unpack,
    ]  # fmt: skip
    for unpack in unpackers:
        try:
            unpack(data)
        except ValueError:
            continue
        assert unpack in (Block.unpack, BlockKey.unpack)


@pytest.mark.parametrize("count", [0, BLOCK_KEY.size - 1, BLOCK_KEY.size + 1])
def test_block_key_of_another_length_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} bytes"):
        BlockKey.unpack(bytes(count))


def test_many_records_read_as_an_array_are_the_same_records() -> None:
    blocks = [replace(BLOCK, generation=Generation(i), key=b"", slot=Slot(i)) for i in range(5)]
    blocks[3] = replace(blocks[3], hole=True, extents=())
    rows = np.frombuffer(b"".join(block.pack() for block in blocks), BLOCK_DTYPE)
    assert list(rows["generation"]) == [0, 1, 2, 3, 4]
    assert list(rows["extent_count"]) == [1, 1, 1, 0, 1]
    assert int(rows["offset"][4]) == BLOCK.extents[0].offset
    assert int(rows["units"][4]) * ALIGN == BLOCK.extents[0].length
    found = located(rows)
    assert found.dtype == LOCATED_DTYPE
    assert list(found["payload_bytes"]) == [BLOCK.payload_bytes] * 5
    assert list(found["lane_weighted"]) == [2] * 5


def test_extents_are_shown_as_operators_type_them() -> None:
    assert str(BLOCK.extents[0]) == "0:1048576+12288"

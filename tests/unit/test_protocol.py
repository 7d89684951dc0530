"""Guaranteed: what is sent is what arrives, and no bytes whatever do worse than ProtocolError.

Every decoded message has lengths, counts and bounds that its user may rely on.
"""

from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twfs import errors
from twfs.errors import InvalidInput, NoDaemon, ProtocolError, TooLarge, TwfsError, WarehouseFull
from twfs.layout import Group, Layout
from twfs.prefix import Names, OwnKey, names_of_keys, root_of
from twfs.protocol import codec, messages, wire
from twfs.protocol.codec import FrameBuffer, decode_reply, decode_request, encode
from twfs.protocol.messages import (
    AnyReply,
    AnyRequest,
    Failed,
    Hello,
    LocatedBlocks,
    MatchNames,
    Piece,
    PutDone,
    Request,
    WriteBlocks,
)
from twfs.protocol.wire import (
    BLOCKS_MAX,
    FRAME_BYTES_MAX,
    REQUEST_BYTES_MAX,
    WireArenaBlock,
    WireNames,
)
from twfs.records import EXTENT_DTYPE, LOCATED_DTYPE, Block, BlockKey, Checksums, Extent
from twfs.store import ArenaBlock, BlockInfo, Model, PutOutcome, PutResult, Space
from twfs.units import (
    ALIGN,
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

LAYOUT = Layout("m", (Group(2, 2, 8),), 16)
MODEL = Model(ModelId(3), "m", 1, LAYOUT)


def names_of_tokens(blocks: int) -> Names:
    return MODEL.chain().extend(list(range(16 * blocks))).names()


def body_of(frame: bytearray) -> bytes:
    return bytes(frame[wire.LENGTH_BYTES :])


def info_of(payload_bytes: int = 5) -> BlockInfo:
    extent = Extent(DeviceIndex(0), ByteOffset(1 << 20), ByteCount(2 * ALIGN))
    block = Block(
        Generation(2**63), Ino(7), Slot(1), PrefixHash(bytes(16)), Digest(bytes(32)),
        TokenCount(16), ByteCount(payload_bytes), Checksums(bytes(16), 2**64 - 1, 1), (extent,),
        Millis(5), b"own key",
    )  # fmt: skip
    return BlockInfo(BlockKey(ModelId(3), PrefixHash(b"h" * 16), 1, 2), block, 4, Millis(9), 2)


@given(st.integers(0, 40))
def test_names_of_tokens_arrive_as_they_were(blocks: int) -> None:
    names = names_of_tokens(blocks)
    request = MatchNames(9, 3, codec.names_to_wire(names), 0)
    arrived = decode_request(body_of(encode(request)))
    assert isinstance(arrived, MatchNames)
    assert codec.names_of(arrived.names) == names


@given(st.lists(st.binary(min_size=1, max_size=64), max_size=20))
def test_names_of_own_keys_arrive_as_they_were(keys: list[bytes]) -> None:
    names = names_of_keys(root_of(b"f", 0), [OwnKey(key, b"parent", 48) for key in keys])
    wire = codec.names_to_wire(names)
    arrived = decode_request(body_of(encode(MatchNames(9, 3, wire))))
    assert isinstance(arrived, MatchNames)
    assert codec.names_of(arrived.names) == names


@pytest.mark.parametrize(
    "parts",
    [
        (b"h" * 15, b"d" * 32, b"p" * 16, b"\1\0\0\0", []),
        (b"h" * 16, b"d" * 31, b"p" * 16, b"\1\0\0\0", []),
        (b"h" * 16, b"d" * 32, b"p" * 17, b"\1\0\0\0", []),
        (b"h" * 16, b"d" * 32, b"p" * 16, b"\1\0\0", []),
        (b"h" * 32, b"d" * 32, b"p" * 16, b"\1\0\0\0", []),
        (b"h" * 16, b"d" * 32, b"p" * 16, b"\1\0\0\0", [b"a", b"b"]),
        (b"h" * 16, b"d" * 32, b"p" * 16, b"\1\0\0\0", [b"a" * 65]),
    ],
)
def test_names_whose_lengths_disagree_are_refused(parts: tuple[object, ...]) -> None:
    body = msgspec.msgpack.encode({"t": "matchnames", "id": 1, "model": 1, "names": parts})
    with pytest.raises(ProtocolError):
        decode_request(body)


def test_more_names_than_one_request_may_have_are_refused() -> None:
    count = BLOCKS_MAX + 1
    names = Names(bytes(16 * count), bytes(32 * count), bytes(16 * count), (0,) * count)
    with pytest.raises(InvalidInput, match=str(BLOCKS_MAX)):
        codec.names_to_wire(names)


def test_as_many_names_with_keys_as_allowed_fit_a_request() -> None:
    count = BLOCKS_MAX
    names = Names(
        bytes(16 * count), bytes(32 * count), bytes(16 * count), (2**32 - 1,) * count,
        (b"k" * 64,) * count,
    )  # fmt: skip
    assert len(encode(MatchNames(1, 1, codec.names_to_wire(names)))) < REQUEST_BYTES_MAX


def test_a_position_outside_u32_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidInput):
        codec.names_to_wire(Names(bytes(16), bytes(32), bytes(16), (1 << 32,)))


@given(st.binary(max_size=300))
def test_random_bytes_are_a_message_or_a_protocol_error(body: bytes) -> None:
    for decode in (decode_request, decode_reply):
        try:
            assert isinstance(decode(body), Request | messages.Reply)
        except ProtocolError:
            continue


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=12,
)  # fmt: skip


@given(st.data())
def test_fields_of_any_kind_are_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    union = data.draw(st.sampled_from([AnyRequest, AnyReply]))
    kind = data.draw(st.sampled_from(union.__args__))
    fields = {field: data.draw(ANYTHING) for field in kind.__struct_fields__}
    body = msgspec.msgpack.encode({"t": kind.__name__.lower(), **fields})
    try:
        decode_request(body) if union is AnyRequest else decode_reply(body)
    except ProtocolError:
        return


def test_deep_nesting_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        decode_request(b"\x91" * 100_000 + b"\xc0")


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.data())
def test_frames_come_out_whole_however_they_were_cut(
    bodies: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    frames, found = FrameBuffer(50), []
    for begin, end in pairwise([0, *cuts, len(stream)]):
        frames.feed(stream[begin:end])
        while (body := frames.next_body()) is not None:
            found.append(body)
    assert found == bodies
    assert len(frames) == 0


@pytest.mark.parametrize("length", [0, 51, 2**32 - 1])
def test_a_frame_that_says_it_is_empty_or_too_long_is_refused(length: int) -> None:
    frames = FrameBuffer(50)
    frames.feed(length.to_bytes(4, "little"))
    with pytest.raises(ProtocolError, match=str(length)):
        frames.next_body()


def test_a_message_over_the_limit_of_its_direction_is_not_sent() -> None:
    with pytest.raises(TooLarge):
        encode(Piece(1, bytes(FRAME_BYTES_MAX), last=True))
    with pytest.raises(TooLarge):
        encode(messages.OpenModel(1, "m", bytes(REQUEST_BYTES_MAX)))


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, TwfsError) and kind is not TwfsError
    ],
)
def test_every_error_arrives_as_its_own_class(kind: type[TwfsError]) -> None:
    failed = decode_reply(body_of(encode(codec.failure_of(4, kind("1 of 2")))))
    assert isinstance(failed, Failed)
    arrived = codec.error_of(failed)
    assert type(arrived) is kind
    assert str(arrived) == "1 of 2"


@pytest.mark.parametrize("kind", ["TwfsError", "SystemExit", "_errno", "ClassVar", "nothing"])
def test_a_failure_of_no_class_of_ours_is_a_protocol_error(kind: str) -> None:
    assert type(codec.error_of(Failed(1, kind, "text"))) is ProtocolError


def test_a_model_and_its_layout_arrive_as_they_were() -> None:
    opened = decode_reply(body_of(encode(messages.Opened(1, codec.model_to_wire(MODEL)))))
    assert isinstance(opened, messages.Opened)
    assert codec.model_of(opened.model) == MODEL


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"\xff", b"{}", b"[" * 200_000])
def test_json_that_is_no_layout_is_the_senders_mistake(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        codec.layout_of(data)


def test_a_block_arrives_as_it_was() -> None:
    rows = decode_reply(
        body_of(encode(messages.BlockRows(1, (codec.block_info_to_wire(info_of()),))))
    )
    assert isinstance(rows, messages.BlockRows)
    assert codec.block_info_of(rows.blocks[0]) == info_of()


def test_a_broken_record_is_a_protocol_error() -> None:
    wire = codec.block_info_to_wire(info_of())
    for record in (b"", wire.record[:-1], wire.record + b"x"):
        with pytest.raises(ProtocolError):
            codec.block_info_of(msgspec.structs.replace(wire, record=record))
    with pytest.raises(ProtocolError):
        codec.key_of(b"short")


def test_space_and_outcomes_arrive_as_they_were() -> None:
    space = Space(*(ByteCount(number) for number in (2**63, 1, 2, 3, 4)))
    arrived = decode_reply(body_of(encode(messages.SpaceFigures(1, space))))
    assert isinstance(arrived, messages.SpaceFigures)
    assert arrived.space == space
    result = PutResult(tuple(PutOutcome), ByteCount(9))
    done = decode_reply(body_of(encode(codec.result_to_wire(1, result))))
    assert isinstance(done, PutDone)
    assert codec.result_of(done) == result
    with pytest.raises(ProtocolError):
        codec.result_of(PutDone(1, bytes([len(PutOutcome)]), 0))


@pytest.mark.parametrize(
    ("offset", "payload_bytes"),
    [(1, 10), (4096, 4097), (8192, 1), (0, 8193), (2**63, 1), (2**64 - 4096, 4096)],
)
def test_a_block_outside_the_arena_is_refused(offset: int, payload_bytes: int) -> None:
    wire = WireArenaBlock(0, offset, payload_bytes, bytes(16), 0, 0)
    with pytest.raises(ProtocolError):
        codec.arena_block_of(wire, 8192)


def test_a_block_at_the_end_of_the_arena_arrives_as_it_was() -> None:
    block = ArenaBlock(5, 4096, ByteCount(4000), b"x" * 16, 2**64 - 1, 3)
    request = WriteBlocks(1, 2, (codec.arena_block_to_wire(block),))
    arrived = decode_request(body_of(encode(request)))
    assert isinstance(arrived, WriteBlocks)
    assert codec.arena_block_of(arrived.blocks[0], 8192) == block


def located_reply(**changes: int) -> LocatedBlocks:
    located = np.zeros(2, LOCATED_DTYPE)
    located["index"] = (0, changes.get("index", 1))
    located["extent_count"] = (1, changes.get("extent_count", 1))
    extents = np.zeros(2, EXTENT_DTYPE)
    extents["offset"] = (1 << 20, changes.get("offset", 2 << 20))
    extents["units"] = (2, changes.get("units", 2))
    extents["device"] = (0, changes.get("device", 0))
    cut = changes.get("cut", 0)
    return LocatedBlocks(1, b"token", 3, 0, 2, located.tobytes()[cut:], extents.tobytes(), 60_000)


def test_located_rows_arrive_as_they_were() -> None:
    reply = decode_reply(body_of(encode(located_reply())))
    assert isinstance(reply, LocatedBlocks)
    located, extents = codec.rows_of(reply, {0: 64 << 20}, 2)
    assert located["index"].tolist() == [0, 1]
    assert extents["offset"].tolist() == [1 << 20, 2 << 20]


@pytest.mark.parametrize(
    "changes",
    [
        {"index": 2}, {"extent_count": 2}, {"extent_count": 9}, {"offset": 4095},
        {"offset": (64 << 20) - 4096}, {"offset": 2**64 - 4096}, {"units": 2**32 - 1},
        {"device": 1}, {"cut": 1},
    ],
)  # fmt: skip
def test_located_rows_that_point_astray_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ProtocolError):
        codec.rows_of(located_reply(**changes), {0: 64 << 20}, 2)


def test_hello_and_failure_keep_their_shape_in_every_version() -> None:
    hello = msgspec.msgpack.decode(body_of(encode(Hello(1, 77, 4096))))
    assert hello == {"t": "hello", "id": 1, "version": 77, "arena_bytes": 4096, "hugetlb": False}
    later = msgspec.msgpack.encode({**hello, "a_field_of_version_78": [1]})
    assert decode_request(later) == Hello(1, 77, 4096)
    failed = msgspec.msgpack.decode(body_of(encode(codec.failure_of(0, NoDaemon("x")))))
    assert failed == {"t": "failed", "id": 0, "kind": "NoDaemon", "text": "x"}
    assert isinstance(codec.error_of(Failed(0, "WarehouseFull", "")), WarehouseFull)


def test_packed_numbers_are_whole() -> None:
    assert codec.unpack_numbers(codec.pack_numbers([0, 2**32 - 1])) == [0, 2**32 - 1]
    with pytest.raises(ProtocolError):
        codec.unpack_numbers(b"123")


def test_names_are_decoded_once_their_lengths_are_known() -> None:
    wire = WireNames(b"h" * 16, b"d" * 32, b"p" * 16, b"\1\0\0\0")
    assert codec.names_of(wire).positions == (1,)

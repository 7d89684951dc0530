"""Messages between client and daemon: msgpack bodies behind a u32 LE length, bounded and checked.

Not a place for sockets or policy: only what goes over the wire and the checks that make a decoded
message safe to use. Every function is pure; a FrameBuffer belongs to the one task or thread that
reads its socket.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from twfs import errors
from twfs.errors import InvalidInput, ProtocolError, TooLarge, TwfsError
from twfs.hints import NO_HINT, Hint
from twfs.index.leases import Located
from twfs.layout import Layout
from twfs.prefix import Names
from twfs.protocol.messages import (
    AnyReply,
    AnyRequest,
    Failed,
    LocatedBlocks,
    PutDone,
    Reply,
    Request,
)
from twfs.protocol.wire import (
    BLOCKS_MAX,
    FRAME_BYTES_MAX,
    LENGTH_BYTES,
    REQUEST_BYTES_MAX,
    WireArenaBlock,
    WireBlockInfo,
    WireHint,
    WireModel,
    WireModelInfo,
    WireNames,
)
from twfs.records import EXTENT_DTYPE, LOCATED_DTYPE, Block, BlockKey
from twfs.store import (
    ArenaBlock,
    BlockInfo,
    Model,
    ModelInfo,
    PutOutcome,
    PutResult,
)
from twfs.units import (
    ALIGN,
    EXTENTS_MAX,
    ByteCount,
    Millis,
    ModelId,
    is_aligned,
)

ROWS_BYTES_MAX: Final = FRAME_BYTES_MAX - 1024  # what else is in a LocatedBlocks takes less
_OUTCOMES: Final = list(PutOutcome)
_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyRequest)
_replies: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyReply)


def encode(message: Request | Reply) -> bytearray:
    """Return *message* as a frame; TooLarge if it passes the limit of its direction."""
    frame = bytearray(512)
    _encoder.encode_into(message, frame, LENGTH_BYTES)
    length = len(frame) - LENGTH_BYTES
    limit = REQUEST_BYTES_MAX if isinstance(message, Request) else FRAME_BYTES_MAX
    if length > limit:
        raise TooLarge(
            f"a {type(message).__name__} message of {length} bytes passes the limit of {limit}: "
            "ask for fewer blocks at once"
        )
    frame[:LENGTH_BYTES] = length.to_bytes(LENGTH_BYTES, "little")
    return frame


def decode_request(body: bytes) -> AnyRequest:
    """Make a request of a frame's *body*; ProtocolError if it is none."""
    return _decode(_requests, body)  # type: ignore[no-any-return]


def decode_reply(body: bytes) -> AnyReply:
    """Make a reply of a frame's *body*; ProtocolError if it is none."""
    return _decode(_replies, body)  # type: ignore[no-any-return]


def _decode(decoder: "msgspec.msgpack.Decoder[Any]", body: bytes) -> Any:
    """Decode, and name every kind of garbage alike."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame of {len(body)} bytes is no message: {error}") from error


class FrameBuffer:
    """Bytes as they come from a socket, handed out as the bodies of whole frames."""

    __slots__ = ("_data", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit  # of a body; may be raised once the peer is known
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def feed(self, data: bytes | memoryview) -> None:
        """Append what the socket gave."""
        self._data += data

    def next_body(self) -> bytes | None:
        """Take the next whole body, or None; ProtocolError on a length over the limit."""
        if len(self._data) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._data[:LENGTH_BYTES], "little")
        if not 1 <= length <= self.limit:
            raise ProtocolError(f"a frame says it has {length} bytes; the limit is {self.limit}")
        end = LENGTH_BYTES + length
        if len(self._data) < end:
            return None
        body = bytes(memoryview(self._data)[LENGTH_BYTES:end])
        del self._data[:end]
        return body


def failure_of(message_id: int, error: TwfsError) -> Failed:
    """Return the reply that carries *error*."""
    return Failed(message_id, type(error).__name__, str(error))


def error_of(failed: Failed) -> TwfsError:
    """Return the error that *failed* carries, of the class it had over there."""
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, TwfsError) and kind is not TwfsError:
        return kind(failed.text)
    return ProtocolError(f"the daemon failed with {failed.kind}: {failed.text}")


def names_to_wire(names: Names) -> WireNames:
    """Return *names* as they travel; InvalidInput if they contradict themselves."""
    try:
        return WireNames(
            names.hashes,
            names.digests,
            names.parents,
            pack_numbers(names.positions),
            names.keys,
            names.public,
        )
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"these names cannot be sent: {error}") from error


def names_of(wire: WireNames) -> Names:
    """Return the Names of *wire*, whose lengths were checked when it was decoded."""
    return Names(
        wire.hashes,
        wire.digests,
        wire.parents,
        tuple(unpack_numbers(wire.positions)),
        wire.keys,
        wire.public,
    )


def hint_to_wire(hint: Hint) -> WireHint | None:
    """Return *hint* as it travels; None if it says nothing."""
    if hint == NO_HINT:
        return None
    return WireHint(hint.session, hint.retention, hint.stop, hint.return_ms)


def hint_of(wire: WireHint | None) -> Hint:
    """Return the Hint of *wire*, which was checked when it was decoded."""
    if wire is None:
        return NO_HINT
    return Hint(wire.session, wire.retention, wire.stop, wire.return_ms)


def pack_numbers(numbers: Sequence[int]) -> bytes:
    """Pack as u32 LE; OverflowError on a number outside."""
    return np.asarray(numbers, "<u4").tobytes()


def unpack_numbers(data: bytes) -> list[int]:
    """Unpack u32 LE; ProtocolError on a broken length."""
    if len(data) % 4:
        raise ProtocolError(f"{len(data)} bytes are no packed numbers")
    numbers: list[int] = np.frombuffer(data, "<u4").tolist()
    return numbers


def layout_to_json(layout: Layout) -> bytes:
    """Return *layout* as it travels; layout_of makes it again."""
    return json.dumps(layout.to_dict(), separators=(",", ":")).encode()


def model_to_wire(model: Model) -> WireModel:
    """Return *model* as it travels."""
    return WireModel(model.id, model.name, model.epoch, layout_to_json(model.layout))


def layout_of(data: bytes) -> Layout:
    """Make a layout of JSON; InvalidInput names what does not fit."""
    try:
        decoded = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"not a layout: {error}") from error
    return Layout.from_dict(decoded)


def model_of(wire: WireModel) -> Model:
    """Return the Model of *wire*; InvalidInput if its layout is none."""
    return Model(ModelId(wire.id), wire.name, wire.epoch, layout_of(wire.layout))


def model_info_to_wire(info: ModelInfo) -> WireModelInfo:
    """Return *info* as it travels."""
    model = model_to_wire(Model(info.id, info.name, info.epoch, info.layout))
    return WireModelInfo(model, info.created_ms, info.blocks, info.heads, info.device_bytes)


def model_info_of(wire: WireModelInfo) -> ModelInfo:
    """Return the ModelInfo of *wire*; InvalidInput if its layout is none."""
    model = model_of(wire.model)
    return ModelInfo(
        model.id, model.name, model.epoch, model.layout, Millis(wire.created_ms),
        wire.blocks, wire.heads, ByteCount(wire.device_bytes),
    )  # fmt: skip


def block_info_to_wire(info: BlockInfo) -> WireBlockInfo:
    """Return *info* as it travels; the slot goes with the record."""
    return WireBlockInfo(
        info.key.pack(), info.block.pack(), info.index, info.last_use_ms, info.links
    )


def block_info_of(wire: WireBlockInfo) -> BlockInfo:
    """Return the BlockInfo of *wire*; ProtocolError if key or record are none."""
    try:
        key, block = BlockKey.unpack(wire.key), Block.unpack(wire.record)
    except ValueError as error:
        raise ProtocolError(f"a message holds a broken record: {error}") from error
    return BlockInfo(key, block, wire.index, Millis(wire.last_use_ms), wire.links)


def key_of(data: bytes) -> BlockKey:
    """Return the key of its 23 bytes *data*; ProtocolError if it is none."""
    try:
        return BlockKey.unpack(data)
    except ValueError as error:
        raise ProtocolError(f"a message holds a broken key: {error}") from error


def arena_block_to_wire(block: ArenaBlock) -> WireArenaBlock:
    """Return *block* as it travels."""
    return WireArenaBlock(
        block.index, block.arena_offset, block.payload_bytes, block.xxh3,
        block.lane_plain, block.lane_weighted,
    )  # fmt: skip


def arena_block_of(wire: WireArenaBlock, arena_bytes: int) -> ArenaBlock:
    """Return the ArenaBlock of *wire*; ProtocolError unless it lies inside *arena_bytes*."""
    padded = -(-wire.payload_bytes // ALIGN) * ALIGN
    if not is_aligned(wire.arena_offset) or wire.arena_offset + padded > arena_bytes:
        raise ProtocolError(
            f"a block of {wire.payload_bytes} bytes at arena offset {wire.arena_offset} does not "
            f"lie, 4 KiB-aligned, in an arena of {arena_bytes}"
        )
    return ArenaBlock(
        wire.index, wire.arena_offset, ByteCount(wire.payload_bytes), wire.xxh3,
        wire.lane_plain, wire.lane_weighted,
    )  # fmt: skip


def result_to_wire(message_id: int, result: PutResult) -> PutDone:
    """Return *result* as the answer to request *message_id*."""
    outcomes = bytes(_OUTCOMES.index(outcome) for outcome in result.outcomes)
    return PutDone(message_id, outcomes, result.written_bytes)


def result_of(done: PutDone) -> PutResult:
    """Return the PutResult of *done*; ProtocolError on an unknown outcome."""
    if done.outcomes and max(done.outcomes) >= len(_OUTCOMES):
        raise ProtocolError(f"outcome {max(done.outcomes)} of a put is unknown")
    outcomes = tuple(_OUTCOMES[number] for number in done.outcomes)
    return PutResult(outcomes, ByteCount(done.written_bytes))


def located_to_wire(message_id: int, located: Located, term_ms: int) -> LocatedBlocks:
    """Return *located*, leased for *term_ms*, as it travels; TooLarge if no reply can hold it."""
    byte_count = located.located.nbytes + located.extents.nbytes
    if byte_count > ROWS_BYTES_MAX:
        raise TooLarge(
            f"the places of {located.blocks} blocks take {byte_count} bytes and a reply "
            f"{ROWS_BYTES_MAX}: match fewer blocks at once"
        )
    return LocatedBlocks(
        message_id, located.token, located.model, located.start, located.blocks,
        located.located.tobytes(), located.extents.tobytes(), term_ms, located.tenant,
    )  # fmt: skip


def rows_of(
    reply: LocatedBlocks, sizes: dict[int, int], asked: int | None
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
    """Return the located and extent rows of *reply*, checked against the devices' *sizes*.

    *asked* is the number of names matched, None for a joined lease. ProtocolError on rows that
    contradict each other or point outside of a device.
    """
    if len(reply.located) % LOCATED_DTYPE.itemsize or len(reply.extents) % EXTENT_DTYPE.itemsize:
        raise ProtocolError(
            f"located rows of {len(reply.located)} and extents of {len(reply.extents)} bytes"
        )
    located: npt.NDArray[np.void] = np.frombuffer(reply.located, LOCATED_DTYPE)
    extents: npt.NDArray[np.void] = np.frombuffer(reply.extents, EXTENT_DTYPE)
    if not reply.start <= reply.blocks <= BLOCKS_MAX:
        raise ProtocolError(f"a match of blocks {reply.start} to {reply.blocks}")
    if int(located["extent_count"].sum()) != len(extents):
        raise ProtocolError(f"{len(located)} located blocks with {len(extents)} extents")
    if len(located) and (
        int(located["extent_count"].max()) > EXTENTS_MAX
        or int(located["index"].max()) >= (reply.blocks if asked is None else asked)
    ):
        raise ProtocolError("located rows point outside of what was asked for")
    for device in np.unique(extents["device"]).tolist():
        on = extents[extents["device"] == device]
        size = sizes.get(device, 0)
        ends = on["offset"] + on["units"].astype("<u8") * np.uint64(ALIGN)  # may wrap around
        if max(int(on["offset"].max()), int(ends.max())) > size or (on["offset"] % ALIGN).any():
            raise ProtocolError(f"extents point outside of device {device}")
    return located, extents

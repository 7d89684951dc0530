"""What is fuzzed of the socket: requests as the daemon takes them, replies as a client does.

Requests that only look are answered from the sample warehouse; of those that change something the
fields are taken apart as the daemon does, and no further. The live daemon is fuzzed by
tests/crash/test_hostile_clients.py.
"""

# ruff: noqa: ARG002  (the signatures are those of what is stood in for)

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from msgspec.structs import replace

from fuzz.sample import sample_warehouse
from support.warehouses import MHA, chain_of
from twfs.daemon.answers import ANSWERS, status_of
from twfs.daemon.permitting import Permitted
from twfs.daemon.shared import names_asked
from twfs.datapath.match import Match
from twfs.errors import TwfsError
from twfs.hints import Stop
from twfs.index.leases import Located
from twfs.protocol.codec import (
    FrameBuffer,
    arena_block_of,
    block_info_of,
    block_info_to_wire,
    decode_reply,
    decode_request,
    encode,
    error_of,
    failure_of,
    hint_of,
    hint_to_wire,
    key_of,
    layout_of,
    layout_to_json,
    located_to_wire,
    model_of,
    model_to_wire,
    names_of,
    names_to_wire,
    result_of,
    rows_of,
    unpack_numbers,
)
from twfs.protocol.messages import (
    AnyReply,
    AskChanges,
    AskSpace,
    AskStatus,
    BeginPut,
    CheckAll,
    Counted,
    Done,
    EvictBytes,
    ExplainNames,
    Failed,
    ForgetSession,
    Hello,
    InfoOfBlock,
    JoinLease,
    ListChain,
    ListDetached,
    ListHeads,
    ListModels,
    ListSessions,
    LocatedBlocks,
    LookupNames,
    MatchNames,
    NewEpoch,
    Opened,
    OpenModel,
    Piece,
    PublishPut,
    PutBegun,
    PutDone,
    ReadPayload,
    ReleaseLease,
    RemoveSession,
    RenewLease,
    ReportBlock,
    Request,
    RetainNamed,
    RetainSession,
    TouchNames,
    Welcome,
    WriteBlocks,
)
from twfs.protocol.remote import RemoteNamespace
from twfs.protocol.wire import HELLO_BYTES_MAX, LENGTH_BYTES, WireArenaBlock, WireDevice, WireHint
from twfs.readers.select import Readers
from twfs.store import LeaseHolder, Model, ReadOutcome, Retention, Served
from twfs.units import ByteCount, ModelId

ARENA_BYTES: Final = 1 << 20
SIZES: Final = {0: 16 << 20}
LOOKING: Final = (
    ListModels, ListHeads, ListSessions, ListDetached, ListChain, InfoOfBlock, ExplainNames,
    AskSpace, CheckAll, AskChanges,
)  # fmt: skip


def feed_request(data: bytes) -> None:
    """Decode a request and answer it: TwfsError only."""
    with suppress(TwfsError):
        request = decode_request(data)
        assert encode(request)
        take_apart(request)
        take_hint(request)
        if isinstance(request, LOOKING) and not (isinstance(request, CheckAll) and request.data):
            encode(ANSWERS[type(request)](Permitted(sample_warehouse(), 0), request))


def take_hint(request: Any) -> None:
    """Make a hint of what came in, and what came in of it again."""
    if isinstance(request, TouchNames | BeginPut):
        hint = hint_of(request.hint)
        assert hint_of(hint_to_wire(hint)) == hint


def take_apart(request: Any) -> None:
    """Use the fields of *request* as the daemon does, as far as nothing is changed by it."""
    warehouse = sample_warehouse()
    if isinstance(request, MatchNames | LookupNames):
        warehouse.lookup_blocks(ModelId(request.model), names_asked(request), request.start)
    if isinstance(request, MatchNames):
        names = names_asked(request)
        owner = warehouse.add_owner(0)
        try:
            located = warehouse.match_located(ModelId(request.model), names, request.start, owner)
            if located is not None:
                encode(located_to_wire(request.id, located, located.term_ms))
        finally:
            warehouse.end_owner(owner)
    elif isinstance(request, TouchNames | BeginPut):
        names_of(request.names)
    elif isinstance(request, OpenModel) and request.layout is not None:
        assert layout_of(request.layout).fingerprint
    elif isinstance(request, NewEpoch):
        model_of(request.model)
    elif isinstance(request, WriteBlocks):
        for wire in request.blocks:
            block = arena_block_of(wire, ARENA_BYTES)
            assert block.arena_offset + block.payload_bytes <= ARENA_BYTES
    elif isinstance(request, ReadPayload):
        warehouse.read_block(block_info_of(request.info))
    elif isinstance(request, ReportBlock):
        warehouse.report_block(key_of(request.key), request.generation)
    elif isinstance(request, ReleaseLease):
        assert all(Served(name).plus(*much) for name, *much in request.served)


class _Answering(RemoteNamespace):
    """A client's namespace over a daemon that says the same to whatever it is asked."""

    def __init__(self, reply: AnyReply) -> None:
        self._reply: AnyReply | None = reply
        self._times = 3  # a listing goes on as long as rows come

    def _request(self, request: Request, timeout_s: float | None) -> AnyReply | None:
        self._times -= 1
        return self._reply if self._times > 0 else None

    def _request_pieces(
        self, request: Request, timeout_s: float | None
    ) -> Iterator[AnyReply | None]:
        yield self._reply
        yield None


def feed_reply(data: bytes) -> None:
    """Decode a reply, and use it as a client does in answer to everything: TwfsError only."""
    try:
        reply = decode_reply(data)
    except TwfsError:
        return
    if isinstance(reply, Failed):
        assert isinstance(error_of(reply), TwfsError)
    elif isinstance(reply, Welcome):
        assert hash((reply.warehouse, reply.devices)) is not None
    elif isinstance(reply, LocatedBlocks):
        feed_located(reply)
    with suppress(TwfsError):
        if isinstance(reply, Opened):
            assert model_of(reply.model).layout.fingerprint
        elif isinstance(reply, PutBegun):
            unpack_numbers(reply.lacking)
        elif isinstance(reply, PutDone):
            result_of(reply)
    info = sample_info()
    client = _Answering(reply)
    asks: tuple[Any, ...] = (
        client.models, lambda: client.heads(ModelId(1)), lambda: client.sessions(ModelId(1)),
        lambda: client.detached(ModelId(1)), lambda: client.block_info(info.key),
        lambda: client.chain_of(ModelId(1), info.key.prefix_hash),
        lambda: client.read_block(info), client.space, client.check, client.changes,
        lambda: client.evict(ByteCount(1)), client._daemon_statistics,
    )  # fmt: skip
    for ask in asks:
        client._times = 3
        with suppress(TwfsError):
            ask()


class _Nobody(LeaseHolder):
    """Holds nothing, so that no read begins."""

    def held(self, token: bytes) -> bool:
        return False

    def release(self, token: bytes, served: Any = ()) -> None:
        """Nothing is held."""

    def renew(self, token: bytes) -> bool:
        return False

    def report(self, key: Any, generation: int, outcome: ReadOutcome) -> None:
        """Nobody listens."""


def feed_located(reply: LocatedBlocks) -> None:
    """Make a match of rows: its blocks lie inside the devices, and reading plans stay in bounds."""
    model = sample_model()
    names = chain_of(model, 6)
    for asked in (6, reply.blocks):
        with suppress(TwfsError):
            located, extents = rows_of(reply, SIZES, asked)
            match = Match(
                _Nobody(), reply.token, model, names, reply.start, reply.blocks, located, extents,
                Readers({}),
            )  # fmt: skip
            assert match.tokens >= 0
            match.read_into([bytearray(MHA.block_bytes())])
    with suppress(TwfsError):
        located, extents = rows_of(reply, SIZES, None)
        Located(
            reply.token, model.id, reply.start, reply.blocks, located, extents, reply.term_ms
        ).names(model.layout)


def feed_frames(data: bytes) -> None:
    """Cut a stream into frames, in steps: ProtocolError only, and no more kept than was fed."""
    for step in (1, 7, len(data) or 1):
        frames = FrameBuffer(HELLO_BYTES_MAX)
        with suppress(TwfsError):
            for at in range(0, min(len(data), 4096), step):
                frames.feed(data[at : at + step])
                while (body := frames.next_body()) is not None:
                    feed_request(body)
                assert len(frames) <= len(data)


def sample_model() -> Model:
    """The plain model of the sample."""
    return sample_warehouse().open_model("mha")


def sample_info() -> Any:
    """A block of it."""
    model = sample_model()
    names = chain_of(model, 6)
    return sample_warehouse().chain_of(model.id, names.hash_at(5))[0]


def body_of(message: Any) -> bytes:
    """The body of the frame that carries *message*."""
    return bytes(encode(message)[LENGTH_BYTES:])


def request_seeds() -> list[bytes]:
    """One request of each kind, good for the sample warehouse."""
    model, info = sample_model(), sample_info()
    names = names_to_wire(chain_of(model, 6))
    head = info.key.prefix_hash
    requests: list[Request] = [
        Hello(1, 1, 4096), OpenModel(2, "mha", layout_to_json(MHA)), OpenModel(2, "other"),
        NewEpoch(3, model_to_wire(model)), MatchNames(4, model.id, names, 0), JoinLease(5, b"t"),
        LookupNames(6, model.id, names, 2), TouchNames(7, model.id, names), RenewLease(8, b"t"),
        TouchNames(7, model.id, names, 0, WireHint("a", Retention.PINNED, Stop.TOOL_USE, 9)),
        BeginPut(9, model.id, names, 0, 0, Retention.STANDARD, 0, WireHint("b")),
        ForgetSession(9, model.id, "a"), RetainNamed(9, model.id, "a", Retention.DURABLE),
        ReleaseLease(0, b"token"), ReportBlock(0, info.key.pack(), 7, ReadOutcome.BAD_CHECKSUM),
        BeginPut(9, model.id, names, 0, 0, Retention.STANDARD),
        WriteBlocks(10, 1, (WireArenaBlock(1, 4096, 2048, bytes(16), 1, 2),)), PublishPut(11, 1),
        ListModels(12), ListHeads(13, model.id), ListSessions(14, model.id, head),
        ListDetached(15, model.id, info.key.pack()), ListChain(16, model.id, head),
        InfoOfBlock(17, info.key.pack()), ReadPayload(18, block_info_to_wire(info)),
        RemoveSession(19, model.id, head), RetainSession(20, model.id, head, Retention.PINNED),
        EvictBytes(21, 4096), ExplainNames(22, model.id, names), AskSpace(23), CheckAll(24),
        AskStatus(25), AskChanges(26),
    ]  # fmt: skip
    return [body_of(request) for request in requests]


def reply_seeds() -> list[bytes]:
    """One reply of each kind, as the sample warehouse gives it."""
    warehouse, model, info = sample_warehouse(), sample_model(), sample_info()
    owner = warehouse.add_owner(0)
    located = warehouse.match_located(model.id, chain_of(model, 6), 0, owner)
    warehouse.end_owner(owner)
    assert located is not None
    replies: list[AnyReply] = [
        ANSWERS[type(request)](Permitted(warehouse, 0), request)
        for request in map(decode_request, request_seeds())
        if isinstance(request, LOOKING)
    ]
    device = WireDevice(0, bytes(16), "/dev/nvme0n1", 16 << 20, True)
    replies += [
        Welcome(1, 1, bytes(16), (device,), 4096), failure_of(2, TwfsError("text")), Done(3),
        Opened(4, model_to_wire(model)), Counted(5, 7), Counted(5, None),
        located_to_wire(6, located, 60_000), PutBegun(7, 1, b"\0\0\0\0\1\0\0\0"),
        PutDone(8, b"\0\1\2", 4096), Piece(9, b"x" * info.block.payload_bytes, True),
        status_of(10, {"server": {"clients": 1}}),
    ]  # fmt: skip
    return [body_of(replace(reply, id=reply.id)) for reply in replies]

"""The daemon's end of one client: handshake, requests, puts, and the end of it all.

One trio task reads; blocking requests get a child task and a worker thread each. Whatever a client
sends, only its own connection suffers. Listening and limits over all clients are in server.py.
"""

import array
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Final

import trio

from twfs.daemon.answers import ANSWERS, status_of
from twfs.daemon.greeting import Handed, hand_out, hello_of, make_arena
from twfs.daemon.permitting import Permitted
from twfs.daemon.shared import OpenPut, Shared, names_asked, peer_of
from twfs.devices.arena import Arena
from twfs.errors import LeaseEnded, ProtocolError, TooLarge, TwfsError
from twfs.index.leases import Located
from twfs.protocol.codec import (
    FrameBuffer,
    arena_block_of,
    block_info_of,
    decode_request,
    encode,
    failure_of,
    hint_of,
    key_of,
    located_to_wire,
    names_of,
    pack_numbers,
    result_to_wire,
)
from twfs.protocol.messages import (
    AbandonPut,
    AnyReply,
    AnyRequest,
    AskDevices,
    AskStatus,
    BeginPut,
    Counted,
    CountPrefill,
    DeviceTable,
    Done,
    JoinLease,
    LookupNames,
    MatchNames,
    NewEpoch,
    OpenModel,
    Piece,
    PublishPut,
    PutBegun,
    ReadPayload,
    ReleaseLease,
    RenewLease,
    ReportBlock,
    TouchNames,
    Welcome,
    WriteBlocks,
)
from twfs.protocol.wire import HELLO_BYTES_MAX, PIECE_BYTES, PROTOCOL_VERSION, REQUEST_BYTES_MAX
from twfs.store import ArenaBlock, Served
from twfs.units import ModelId

log = logging.getLogger(__name__)

REQUESTS_MAX: Final = 64  # of one client in flight; a further one waits unread
PUTS_MAX: Final = 64  # of one client open at once: each holds reservations
RECEIVE_BYTES: Final = 256 << 10
HELLO_SECONDS_MAX: Final = 5.0
FRAME_SECONDS_MAX: Final = 10.0  # from a frame's first byte to its last: no hoarding of memory
SEND_SECONDS_MAX: Final = 10.0  # a client that does not read its replies is dropped
STOP_SECONDS_MAX: Final = 5.0  # for the answer to a publish that a stop has overtaken


class Connection:
    """One client; see the module's docstring."""

    def __init__(self, shared: Shared, sock: trio.socket.SocketType) -> None:
        self._shared = shared
        self._sock = sock
        self._pid, self._uid = peer_of(sock)
        self._permitted = Permitted(shared.warehouse, self._uid)
        self._account = shared.account(self._uid)
        self._frames = FrameBuffer(HELLO_BYTES_MAX)
        self._sending = trio.Lock()
        self._in_flight = trio.Semaphore(REQUESTS_MAX)
        self._scope = trio.CancelScope()
        self._owner: int | None = None
        self._arena: Arena | None = None
        self._arena_bytes = 0
        self._puts: dict[int, OpenPut] = {}
        self._next_put = 1

    async def run(self) -> None:
        """Serve the client until it leaves, misbehaves, or the daemon stops; never raises.

        The caller has counted it in; this takes it off again.
        """
        shared = self._shared
        try:
            with self._scope:
                if await self._greet():
                    async with trio.open_nursery() as nursery:
                        await self._serve(nursery)
                        nursery.cancel_scope.cancel()
        except Exception:
            shared.errors["unexpected"] += 1
            log.exception("client of pid %d ended by an unexpected error", self._pid)
        finally:
            with trio.CancelScope(shield=True):
                await self._end()
            shared.leave(self._uid)

    async def _end(self) -> None:
        """Let go of everything that the client had. No request of its is under way any more."""
        for opened in self._puts.values():
            try:
                await trio.to_thread.run_sync(opened.put.abandon, limiter=self._account.commits)
            except Exception:
                log.exception("a put of pid %d could not be abandoned", self._pid)
        self._puts.clear()
        if self._owner is not None:
            self._shared.warehouse.end_owner(self._owner)
        if self._arena is not None:
            self._arena.close()
        self._shared.add_arena(self._uid, -self._arena_bytes)
        self._sock.close()

    async def _greet(self) -> bool:
        """Exchange hello and welcome; False if there was none."""
        try:
            with trio.move_on_after(HELLO_SECONDS_MAX):
                body = await self._next_body()
                if body is not None:
                    return await self._welcome(body)
        except TwfsError as error:
            await self._refuse(error)
        return False

    async def _welcome(self, body: bytes) -> bool:
        """Answer the hello with the device table and the descriptors; False if the peer left."""
        shared, hello = self._shared, hello_of(decode_request(body))
        self._arena = await make_arena(shared, hello, self._uid)
        self._arena_bytes = 0 if self._arena is None else self._arena.byte_count
        self._owner = shared.warehouse.add_owner(self._uid)
        handed = await self._hand_out()
        try:
            welcome = Welcome(
                hello.id, PROTOCOL_VERSION, shared.warehouse.uuid.bytes, handed.rows,
                self._arena_bytes,
            )  # fmt: skip
            fd = None if self._arena is None else self._arena.fd
            own = [] if fd is None else [fd]
            await self._send(welcome, [*handed.descriptors, *own])
        finally:
            handed.close()
        self._frames.limit = REQUEST_BYTES_MAX
        return True

    async def _hand_out(self) -> Handed:
        """The table of devices with a descriptor of each, to be closed by the caller."""
        async with self._shared.tables:
            return await trio.to_thread.run_sync(
                hand_out, self._shared.warehouse, limiter=self._shared.commits
            )

    async def _devices(self, request: AskDevices) -> None:
        handed = await self._hand_out()
        try:
            await self._send(DeviceTable(request.id, handed.rows), handed.descriptors)
        finally:
            handed.close()

    async def _next_body(self) -> bytes | None:
        """Receive up to the next whole frame; None when the peer has left."""
        deadline = None
        while (body := self._frames.next_body()) is None:
            if not len(self._frames):
                data = await self._receive()
            else:
                deadline = deadline or trio.current_time() + FRAME_SECONDS_MAX
                with trio.CancelScope(deadline=deadline) as scope:
                    data = await self._receive()
                if scope.cancelled_caught:
                    raise ProtocolError(
                        f"a frame took more than {FRAME_SECONDS_MAX:.0f} s to arrive"
                    )
            if not data:
                return None
            self._shared.received_bytes += len(data)
            self._frames.feed(data)
        return body

    async def _receive(self) -> bytes:
        """What the socket gives next; empty when the peer has left."""
        try:
            return await self._sock.recv(RECEIVE_BYTES)
        except OSError:
            return b""

    async def _serve(self, nursery: trio.Nursery) -> None:
        """Take requests until the peer leaves or sends what is no request."""
        try:
            while (body := await self._next_body()) is not None:
                await self._take(decode_request(body), nursery)
        except ProtocolError as error:
            await self._refuse(error)

    async def _refuse(self, error: TwfsError) -> None:
        """Tell the peer why its connection is closed, if it still listens."""
        self._shared.errors[type(error).__name__] += 1
        log.warning("client of pid %d, uid %d is closed: %s", self._pid, self._uid, error)
        await self._send(failure_of(0, error))

    async def _take(self, request: AnyRequest, nursery: trio.Nursery) -> None:
        """Answer *request* here and now, or start a task for it."""
        kind = type(request)
        self._shared.requests[kind.__name__.lower()] += 1
        try:
            self._permitted.permit(request)
            in_loop = self._IN_LOOP.get(kind)
            if in_loop is not None:
                reply = in_loop(self, request)
                if reply is not None:
                    await self._send(reply)
                if len(self._frames):  # many at once never keep others waiting
                    await trio.lowlevel.checkpoint()
                return
            answer = self._prepare(request)
        except TwfsError as error:
            self._shared.errors[type(error).__name__] += 1
            if kind not in self._ONE_WAY:
                await self._send(failure_of(request.id, error))
            return
        await self._in_flight.acquire()
        nursery.start_soon(self._answer, request.id, answer)

    async def _answer(self, message_id: int, answer: Callable[[], Any]) -> None:
        """Run one blocking request to its end, and send its reply."""
        try:
            reply = await answer()
            if reply is not None:
                await self._send(reply)
        except TwfsError as error:
            self._shared.errors[type(error).__name__] += 1
            await self._send(failure_of(message_id, error))
        except Exception:
            self._shared.errors["unexpected"] += 1
            log.exception("a request of pid %d failed unexpectedly", self._pid)
            self._scope.cancel()
        finally:
            self._in_flight.release()

    async def _send(self, reply: AnyReply, passing: Sequence[int] = ()) -> None:
        """Send *reply*, with descriptors; a peer that does not take it in time is dropped."""
        try:
            frame = encode(reply)
        except TooLarge as error:
            frame, passing = encode(failure_of(reply.id, error)), ()
        await self._send_bytes(memoryview(frame), passing)

    async def _send_bytes(self, data: memoryview, passing: Sequence[int]) -> None:
        """Send *data* whole, or end the connection."""
        if (
            not passing and not self._sending.locked()
        ):  # mostly the socket takes it all, and at once
            with suppress(OSError):
                sent = os.write(self._sock.fileno(), data)
                self._shared.sent_bytes += sent
                data = data[sent:]
            if not data:
                return
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", passing))]
        async with self._sending:
            with trio.move_on_after(SEND_SECONDS_MAX) as scope:
                try:
                    if passing:  # they come with the first byte
                        data = data[await self._sock.sendmsg([data], ancillary) :]
                    while data:
                        sent = await self._sock.send(data)
                        self._shared.sent_bytes += sent
                        data = data[sent:]
                except OSError:
                    self._scope.cancel()
        if scope.cancelled_caught:
            self._shared.dropped += 1
            log.warning("client of pid %d does not read its replies: dropped", self._pid)
            self._scope.cancel()

    # Requests that are answered in the loop, in their order.

    def _match(self, request: MatchNames) -> AnyReply:
        names = names_asked(request)
        warehouse, model = self._shared.warehouse, ModelId(request.model)
        located = warehouse.match_located(
            model, names, request.start, self._owned(), tenant=request.tenant
        )
        if located is None:
            return Counted(request.id, None)
        return self._located(request.id, located, located.term_ms)

    def _join(self, request: JoinLease) -> AnyReply:
        warehouse, owner = self._shared.warehouse, self._owned()
        located = warehouse.join_located(request.token, owner)
        term_ms = warehouse.renew_lease(request.token, owner)  # what is left may be little
        if term_ms is None:
            raise LeaseEnded("the lease ended while it was joined")
        return self._located(request.id, located, term_ms)

    def _located(self, message_id: int, located: Located, term_ms: int) -> AnyReply:
        """Return *located* as it travels; the lease is released if it cannot."""
        try:
            return located_to_wire(message_id, located, term_ms)
        except TooLarge:
            self._shared.warehouse.release_lease(located.token, self._owned())
            raise

    def _lookup(self, request: LookupNames) -> AnyReply:
        names, model = names_asked(request), ModelId(request.model)
        lookup = self._shared.warehouse.lookup_blocks
        return Counted(request.id, lookup(model, names, request.start, request.tenant))

    def _count_prefill(self, request: CountPrefill) -> None:
        model, seconds = ModelId(request.model), request.seconds
        self._shared.warehouse.count_prefill_of(model, request.tokens, seconds)

    def _touch(self, request: TouchNames) -> None:
        names, model = names_of(request.names), ModelId(request.model)
        hint = hint_of(request.hint)
        self._shared.warehouse.touch_blocks(model, names, request.tenant, hint)

    def _renew(self, request: RenewLease) -> AnyReply:
        term_ms = self._shared.warehouse.renew_lease(request.token, self._owned())
        return Counted(request.id, term_ms)

    def _release(self, request: ReleaseLease) -> None:
        served = [Served(name).plus(*much) for name, *much in request.served]
        self._shared.warehouse.release_lease(request.token, self._owned(), served)

    def _owned(self) -> int:
        """The number under which this connection holds leases."""
        assert self._owner is not None  # since the welcome
        return self._owner

    _IN_LOOP: ClassVar[Mapping[type[Any], Callable[["Connection", Any], AnyReply | None]]] = {
        MatchNames: _match,
        JoinLease: _join,
        LookupNames: _lookup,
        TouchNames: _touch,
        CountPrefill: _count_prefill,
        RenewLease: _renew,
        ReleaseLease: _release,
    }
    _ONE_WAY: ClassVar[frozenset[type[Any]]] = frozenset(
        {TouchNames, CountPrefill, ReleaseLease, ReportBlock}
    )

    # Requests that block. What _prepare does is done before the next request is read.

    def _prepare(self, request: AnyRequest) -> Callable[[], Any]:
        """Check *request* and return what answers it."""
        if isinstance(request, WriteBlocks):
            return self._admit_write(request)
        if isinstance(request, PublishPut | AbandonPut):
            opened = self._take_put(request.put)
            end = self._publish if isinstance(request, PublishPut) else self._abandon
            return partial(end, request.id, request.put, opened)
        if isinstance(request, BeginPut):
            return partial(self._begin, request)
        if isinstance(request, ReadPayload):
            return partial(self._read_payload, request)
        if isinstance(request, ReportBlock):
            return partial(self._report, request)
        return partial(self._ask, request)

    async def _ask(self, request: AnyRequest) -> AnyReply | None:
        shared = self._shared
        if isinstance(request, AskDevices):
            await self._devices(request)
            return None
        if isinstance(request, AskStatus):
            statistics = await trio.to_thread.run_sync(
                shared.warehouse.statistics, limiter=self._account.tools
            )
            return status_of(request.id, {**statistics, "server": shared.statistics()})
        answer = ANSWERS.get(type(request))
        if answer is None:
            raise ProtocolError(f"a {type(request).__name__} message out of turn")
        engines = isinstance(request, OpenModel | NewEpoch)  # they do not wait behind tools
        account = self._account
        limiter = account.commits if engines else account.tools
        reply: AnyReply = await trio.to_thread.run_sync(
            answer, self._permitted, request, limiter=limiter
        )
        return reply

    def _open_put(self, number: int) -> OpenPut:
        """Return the open put *number* of this connection."""
        opened = self._puts.get(number)
        if opened is None or opened.closing:
            raise ProtocolError(f"put {number} is not open on this connection")
        return opened

    def _take_put(self, number: int) -> OpenPut:
        """Return the open put *number*, which takes no more windows from now on."""
        opened = self._open_put(number)
        opened.closing = True
        return opened

    async def _begin(self, request: BeginPut) -> AnyReply:
        if len(self._puts) >= PUTS_MAX:
            raise TooLarge(f"{PUTS_MAX} puts are open on this connection: publish some first")
        begin = lambda: self._shared.warehouse.begin_put(  # noqa: E731
            ModelId(request.model), names_of(request.names), group=request.group,
            shard=request.shard, retention=request.retention, owner=self._owned(),
            tenant=request.tenant, hint=hint_of(request.hint),
        )  # fmt: skip
        put = await trio.to_thread.run_sync(begin, limiter=self._account.commits)
        number, self._next_put = self._next_put, self._next_put + 1
        self._puts[number] = OpenPut(put, set(put.lacking))
        return PutBegun(request.id, number, pack_numbers(put.lacking))

    def _admit_write(self, request: WriteBlocks) -> Callable[[], Any]:
        """Check a window against arena and put, and count it as under way."""
        opened, arena = self._open_put(request.put), self._arena
        if arena is None:
            raise ProtocolError("blocks of a client that has no arena")
        blocks = [arena_block_of(wire, arena.byte_count) for wire in request.blocks]
        indices = {block.index for block in blocks}
        if len(indices) != len(blocks) or not indices <= opened.wanted:
            raise ProtocolError(f"put {request.put} does not lack some of these blocks (any more)")
        opened.wanted -= indices
        opened.writing += 1
        return lambda: self._write(request.id, opened, arena.view, blocks)

    async def _write(
        self, message_id: int, opened: OpenPut, arena: memoryview, blocks: list[ArenaBlock]
    ) -> AnyReply:
        try:
            await trio.to_thread.run_sync(
                opened.put.write_blocks, arena, blocks, limiter=self._account.writes
            )
        finally:
            opened.leave_write()
        return Done(message_id)

    async def _publish(self, message_id: int, number: int, opened: OpenPut) -> None:
        await opened.close()
        commits = self._account.commits
        with trio.CancelScope(shield=True):  # a stop waits for what is being made durable
            try:
                result = await trio.to_thread.run_sync(opened.put.publish, limiter=commits)
            except BaseException:
                await trio.to_thread.run_sync(opened.put.abandon, limiter=commits)
                raise
            finally:
                del self._puts[number]
        with trio.move_on_after(STOP_SECONDS_MAX, shield=True):
            await self._send(result_to_wire(message_id, result))

    async def _abandon(self, message_id: int, number: int, opened: OpenPut) -> AnyReply:
        await opened.close()
        await trio.to_thread.run_sync(opened.put.abandon, limiter=self._account.commits)
        del self._puts[number]
        return Done(message_id)

    async def _read_payload(self, request: ReadPayload) -> None:
        info = block_info_of(request.info)
        async with self._account.reads, self._shared.reads:
            payload = await trio.to_thread.run_sync(
                self._permitted.read_block, info, limiter=self._account.commits
            )
            for at in range(0, len(payload), PIECE_BYTES):
                data = bytes(payload[at : at + PIECE_BYTES])
                await self._send(Piece(request.id, data, at + PIECE_BYTES >= len(payload)))

    async def _report(self, request: ReportBlock) -> None:
        if not self._permitted.may_report(request, trio.current_time()):
            return
        with suppress(TwfsError):  # a hint; what it found is counted over there
            await trio.to_thread.run_sync(
                self._shared.warehouse.report_block, key_of(request.key), request.generation,
                limiter=self._account.tools,
            )  # fmt: skip

"""A client's connection: handshake, framed requests and replies, many threads at once.

Whichever thread waits for a reply reads the socket and hands the others theirs; there is no
background thread. Every wait has a limit. Thread-safe; not for use after fork.
"""

import array
import itertools
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from twfs.errors import NoDaemon, NotAllowed, ProtocolError, TwfsError
from twfs.protocol.codec import FrameBuffer, decode_reply, encode, error_of
from twfs.protocol.messages import AnyReply, DeviceTable, Failed, Hello, Piece, Request, Welcome
from twfs.protocol.wire import FRAME_BYTES_MAX, PROTOCOL_VERSION

DESCRIPTORS_MAX: Final = 253  # the kernel's SCM_MAX_FD
PASSED_SPACE: Final = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
RECEIVE_BYTES: Final = 256 << 10
LATE_MAX: Final = 4096  # replies given up on; more outstanding ones mean a daemon that is lost
GONE: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL


def greet(
    path: Path, *, arena_bytes: int, hugetlb: bool, timeout_s: float
) -> tuple["Channel", Welcome, list[int]]:
    """Connect to the daemon at *path*; return the channel, its welcome and the descriptors.

    All within *timeout_s* seconds. NoDaemon if nobody answers; NotAllowed; ProtocolError on
    another version; TooLarge if the daemon has no such arena left.
    """
    deadline = time.monotonic() + timeout_s
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    descriptors: list[int] = []
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.sendall(encode(Hello(1, PROTOCOL_VERSION, arena_bytes, hugetlb)))
        welcome = _receive_welcome(sock, descriptors, deadline)
        expected = sum(device.passed for device in welcome.devices) + bool(welcome.arena_bytes)
        if len(descriptors) != expected:
            raise ProtocolError(f"{len(descriptors)} descriptors came instead of {expected}")
        sock.setblocking(False)  # noqa: FBT003 - the library's own signature
        return Channel(sock), welcome, descriptors
    except BaseException as error:
        sock.close()
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, PermissionError):
            raise NotAllowed(f"{path} may not be opened: join the group that owns it") from error
        if isinstance(error, OSError):
            raise NoDaemon(f"no daemon answers on {path}: {error}; start twfsd") from error
        raise


def _receive_welcome(sock: socket.socket, descriptors: list[int], deadline: float) -> Welcome:
    """Receive the answer to the hello; descriptors are appended as they come."""
    frames = FrameBuffer(FRAME_BYTES_MAX)
    while (body := frames.next_body()) is None:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        data, ancillary, flags, _ = sock.recvmsg(
            RECEIVE_BYTES, PASSED_SPACE, socket.MSG_CMSG_CLOEXEC
        )
        descriptors += _descriptors_in(ancillary)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("the daemon passed more descriptors than this process may have")
        if not data:
            raise NoDaemon("the daemon closed the connection during the hello")
        frames.feed(data)
    reply = decode_reply(body)
    if isinstance(reply, Failed):
        raise error_of(reply)
    if not isinstance(reply, Welcome) or reply.version != PROTOCOL_VERSION:
        raise ProtocolError(f"a {type(reply).__name__} instead of a welcome to version 1")
    return reply


def _descriptors_in(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a message; they are the caller's to close."""
    numbers = array.array("i")
    for level, kind, passed in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(passed[: len(passed) // numbers.itemsize * numbers.itemsize])
    return list(numbers)


class _Waiter:
    """One request's replies as they come."""

    __slots__ = ("descriptors", "done", "id", "replies")

    def __init__(self, message_id: int) -> None:
        self.id = message_id
        self.done = False  # no further reply is to come
        self.replies: deque[AnyReply] = deque()
        self.descriptors: list[int] = []  # that came with a table of devices


class Channel:
    """One connection, until it is ended by either side; see the module's docstring."""

    def __init__(self, sock: socket.socket) -> None:
        self.on_late: Callable[[AnyReply], None] = lambda _: None  # for replies given up on
        self._sock = sock
        self._frames = FrameBuffer(FRAME_BYTES_MAX)
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Waiter] = {}
        self._late: set[int] = set()
        self._leading = False
        self._dead: TwfsError | None = None
        self._passed: list[int] = []  # descriptors of a reply that is not there whole
        self._users = 0
        self._sent = 0
        self._received = 0
        self._late_count = 0

    def call(self, request: Request, timeout_s: float | None) -> AnyReply | None:
        """Send *request* and return its reply, None after *timeout_s* seconds (None: no limit).

        A reply that comes later goes to `on_late`. NoDaemon if the connection has ended.
        """
        deadline = _deadline(timeout_s)
        waiter = self._enter()
        try:
            return self._wait(waiter, deadline) if self._post(waiter, request, deadline) else None
        finally:
            self._leave(waiter)

    def call_for_devices(
        self, request: Request, timeout_s: float
    ) -> tuple[DeviceTable, list[int]] | None:
        """As call, for the table of devices; its descriptors are the caller's to close.

        None too if they did not all come, for want of descriptors in this process.
        """
        deadline = _deadline(timeout_s)
        waiter = self._enter()
        try:
            reply = self._wait(waiter, deadline) if self._post(waiter, request, deadline) else None
            if isinstance(reply, DeviceTable):
                wanted = sum(device.passed for device in reply.devices)
                if len(waiter.descriptors) == wanted:
                    descriptors, waiter.descriptors = waiter.descriptors, []
                    return reply, descriptors
            return None
        finally:
            self._leave(waiter)

    def pieces(self, request: Request, timeout_s: float | None) -> Iterator[AnyReply | None]:
        """As call, for a request that is answered by several pieces; *timeout_s* is for each."""
        waiter = self._enter()
        try:
            sent = self._post(waiter, request, _deadline(timeout_s))
            while not waiter.done:
                yield self._wait(waiter, _deadline(timeout_s)) if sent else None
        finally:
            self._leave(waiter)

    def tell(self, request: Request, timeout_s: float) -> bool:
        """Send a one-way *request*; False if it could not be sent."""
        try:
            if self._late:
                self._drain()
            return self._send(request, _deadline(timeout_s))
        except NoDaemon:
            return False

    def alive(self) -> bool:
        """Tell whether the connection stands, without waiting; unread replies do not matter."""
        try:
            with self._using():
                if not self._poll(0, 0.0) & GONE:
                    return True
        except NoDaemon:
            return False
        self.end(NoDaemon("the daemon has closed the connection"))
        return False

    def end(self, error: TwfsError) -> None:
        """End the connection, with *error* for all who wait. Idempotent."""
        with self._changed:
            if self._dead is None:
                self._dead = error
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
                self._close_if_unused()
            self._changed.notify_all()

    def statistics(self) -> dict[str, int]:
        """Messages sent and received, replies that came too late, and who waits."""
        with self._changed:
            return {
                "sent": self._sent,
                "received": self._received,
                "late": self._late_count,
                "waiting": len(self._waiting),
            }

    def _enter(self) -> _Waiter:
        """Return a waiter with a number of its own; NoDaemon if the connection has ended."""
        with self._changed:
            self._check()
            number = next(self._ids) & 0xFFFFFFFF or next(self._ids) & 0xFFFFFFFF  # 0: none
            waiter = self._waiting[number] = _Waiter(number)
            return waiter

    def _post(self, waiter: _Waiter, request: Request, deadline: float | None) -> bool:
        """Send *request* under the waiter's number; False if it could not be sent in time."""
        if self._late:
            self._drain()
        waiter.done = not self._send(replace(request, id=waiter.id), deadline)
        return not waiter.done

    def _check(self) -> None:
        """Raise if the connection has ended. Hold the lock."""
        if self._dead is not None:
            raise NoDaemon(str(self._dead)) from self._dead

    def _close_if_unused(self) -> None:
        """Close the descriptor once no thread polls it: its number may be another's next."""
        if self._dead is not None and not self._users:
            self._sock.close()
            _close_all(self._passed)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keep the descriptor open; NoDaemon if the connection has ended."""
        with self._changed:
            self._check()
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._close_if_unused()

    def _poll(self, events: int, left_s: float | None) -> int:
        """Wait for *events* and return those that came; a poll object serves one thread only."""
        poll = select.poll()
        poll.register(self._sock, events | select.POLLRDHUP)
        found = poll.poll(None if left_s is None else max(left_s, 0.0) * 1000)
        return found[0][1] if found else 0

    def _send(self, request: Request, deadline: float | None) -> bool:
        """Send a frame; False if the daemon did not take it in time. Half a frame ends it all."""
        left = frame = memoryview(encode(request))
        left_s = _left(deadline)
        if not self._sending.acquire(timeout=-1 if left_s is None else left_s):
            return False
        try:
            with self._using():
                self._sent += 1
                left = self._send_some(frame)
                while left:
                    left_s = _left(deadline)
                    if left_s == 0.0:
                        break
                    if self._poll(select.POLLOUT | select.POLLIN, left_s) & select.POLLIN:
                        self._drain()  # the daemon may be waiting for us to read
                        self._poll(select.POLLOUT, min(0.001, left_s or 0.001))
                    left = self._send_some(left)
        except OSError as error:
            self.end(NoDaemon(f"the daemon is gone: {error}"))
            raise NoDaemon(f"the daemon is gone: {error}") from error
        finally:
            self._sending.release()
        if left and len(left) < len(frame):
            self.end(NoDaemon("the daemon stopped reading in the middle of a request"))
        return not left

    def _send_some(self, data: memoryview) -> memoryview:
        """Send what the socket takes; return the rest."""
        while data:
            try:
                data = data[self._sock.send(data, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                break
        return data

    def _wait(self, waiter: _Waiter, deadline: float | None) -> AnyReply | None:
        """Wait for *waiter*'s next reply, reading the socket if nobody else does."""
        while True:
            with self._changed:
                while not waiter.replies:
                    self._check()
                    left_s = _left(deadline)
                    if left_s == 0.0:
                        return None
                    if not self._leading:
                        self._leading = True
                        break
                    self._changed.wait(left_s)
                else:
                    reply = waiter.replies.popleft()
                    waiter.done = _is_last(reply)
                    return reply
            self._lead(waiter, deadline)

    def _lead(self, waiter: _Waiter, deadline: float | None) -> None:
        """Read and hand out replies until *waiter* has one, the time is over, or all is."""
        try:
            with suppress(NoDaemon), self._using():
                while not waiter.replies and self._dead is None and _left(deadline) != 0.0:
                    if self._poll(select.POLLIN, _left(deadline)):
                        self._receive()
        finally:
            with self._changed:
                self._leading = False
                self._changed.notify_all()

    def _drain(self) -> None:
        """Hand out what has come, without waiting, unless another thread does."""
        with self._changed:
            if self._leading:
                return
            self._leading = True
        try:
            with suppress(NoDaemon), self._using():
                while self._dead is None and self._receive():
                    pass
        finally:
            with self._changed:
                self._leading = False
                self._changed.notify_all()

    def _receive(self) -> bool:
        """Hand out what one receive gives; False if there is nothing now, or ever. Lead first."""
        try:
            data, ancillary, _, _ = self._sock.recvmsg(
                RECEIVE_BYTES, PASSED_SPACE, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        except OSError as error:
            self.end(NoDaemon(f"the daemon is gone: {error}"))
            return False
        if not data:
            self.end(NoDaemon("the daemon has closed the connection"))
            return False
        try:
            # The kernel never joins what two messages passed, so they are all of the next table.
            self._passed += _descriptors_in(ancillary)
            self._frames.feed(data)
            while (body := self._frames.next_body()) is not None:
                self._hand_out(decode_reply(body))
        except ProtocolError as error:
            _close_all(self._passed)
            self.end(error)
            return False
        return True

    def _hand_out(self, reply: AnyReply) -> None:
        """Give *reply* to who waits for it, or to `on_late`."""
        with self._changed:
            self._received += 1
            waiter = self._waiting.get(reply.id)
            if isinstance(reply, DeviceTable):
                if waiter is not None:
                    waiter.descriptors += self._passed
                    self._passed = []
                _close_all(self._passed)
            if waiter is not None:
                waiter.replies.append(reply)
                self._changed.notify_all()
                return
            if reply.id not in self._late:
                if isinstance(reply, Failed):
                    raise ProtocolError(f"the daemon closes the connection: {reply.text}")
                raise ProtocolError(f"a reply to request {reply.id}, which was not sent")
            self._late_count += 1
            if _is_last(reply):
                self._late.discard(reply.id)
        self.on_late(reply)

    def _leave(self, waiter: _Waiter) -> None:
        """Stop waiting; a reply that is still to come is late, and so is one that lies here."""
        with self._changed:
            del self._waiting[waiter.id]
            unread = list(waiter.replies)
            _close_all(waiter.descriptors)
            if not (waiter.done or (unread and _is_last(unread[-1]))):
                self._late.add(waiter.id)
            flooded = len(self._late) > LATE_MAX
        for reply in unread:
            self.on_late(reply)
        if flooded:
            self.end(NoDaemon(f"more than {LATE_MAX} requests were not answered in time"))


def _close_all(descriptors: list[int]) -> None:
    """Close descriptors that nobody takes."""
    while descriptors:
        os.close(descriptors.pop())


def _is_last(reply: AnyReply) -> bool:
    """Tell whether no other reply to the same request follows."""
    return not isinstance(reply, Piece) or reply.last


def _deadline(timeout_s: float | None) -> float | None:
    """The monotonic time *timeout_s* from now."""
    return None if timeout_s is None else time.monotonic() + timeout_s


def _left(deadline: float | None) -> float | None:
    """Seconds up to *deadline*, at least 0."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())

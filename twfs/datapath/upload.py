"""One put's way into a shared arena: copy what is lacking, sum it, hand it over in windows.

Used alike by the client and by the in-process warehouse, through a PutPort. Not a place for
sockets or devices. `upload` may run in several threads at once; each call has two worker threads.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from twfs.checksums import copy_bytes, flat_bytes, flat_tensor, lanes_of, loaded_torch, on_device
from twfs.copying import Copying
from twfs.devices.arena import Arena, Piece
from twfs.errors import GivenUp, InvalidInput, TooLarge
from twfs.layout import Layout
from twfs.protocol.wire import WINDOW_BLOCKS_MAX
from twfs.store import ArenaBlock, PutResult
from twfs.units import ALIGN, ByteCount, align_up

if TYPE_CHECKING:
    from twfs.store import Buffer, Pieces, PutPort

WINDOW_BYTES_MAX: Final = 64 << 20  # of one window: several I/Os of 16 MiB at once
WINDOWS_PER_ARENA: Final = 8  # a window takes at most this part, so that filling overlaps writing
FILLING_MAX: Final = 2  # windows being filled at once, one per worker thread
WRITING_MAX: Final = 4  # windows handed over and not yet answered
PIECES_MAX: Final = 4096  # of one payload: K and V of each of 256 layers, page by page
MASK_64: Final = (1 << 64) - 1
LANE_BYTES: Final = 4
GIVE_UP_SECONDS: Final = 0.05  # between two looks whether the caller has given up
SUMMED_BYTES: Final = 1 << 20  # copied and summed in one go: fits the L2 of one core


def check_payloads(layout: Layout, group: int, payloads: "Sequence[Pieces]") -> None:
    """Raise InvalidInput unless each payload is contiguous pieces of the layout's block_bytes.

    Reads no payload byte; call it before a put begins.
    """
    if not 0 <= group < len(layout.groups):
        raise InvalidInput(f"group {group} does not exist: the layout has {len(layout.groups)}")
    wanted = layout.block_bytes(group)
    for index, payload in enumerate(payloads):
        try:
            found = sum(_byte_count(piece) for piece in pieces_of(payload))
        except InvalidInput as error:
            raise InvalidInput(f"payload {index} cannot be stored: {error}") from error
        if found != wanted:
            raise InvalidInput(
                f"payload {index} has {found} bytes; the layout's block_bytes of group {group} "
                f"is {wanted}"
            )


def pieces_of(payload: "Pieces") -> "Sequence[Buffer]":
    """Return the pieces of *payload*, which may be a single buffer; InvalidInput if too many."""
    pieces = payload if isinstance(payload, list | tuple) else (payload,)
    if len(pieces) > PIECES_MAX:
        raise InvalidInput(f"a payload in {len(pieces)} pieces; at most {PIECES_MAX} are allowed")
    return pieces


def _byte_count(piece: "Buffer") -> int:
    """Bytes of one piece, wherever it is; InvalidInput if it is not contiguous."""
    return int(flat_tensor(piece).numel()) if on_device(piece) else int(flat_bytes(piece).size)


def upload(
    port: "PutPort", arena: Arena, layout: Layout, group: int, payloads: "Sequence[Pieces]",
    *, copying: Copying | None = None,
) -> PutResult:  # fmt: skip
    """Copy the payloads that *port* lacks into *arena*, window by window, and publish.

    *payloads* were checked before; those that are on a GPU are read once the streams current in
    this thread have got so far. Returns when nothing is under way any more: on any exception too,
    after which the put is abandoned. TooLarge if one block does not fit the arena; GivenUp if
    *copying* was given up and there is no room.
    """
    copying = copying or Copying()
    try:
        if not copying.begin():
            raise GivenUp("the caller wanted its memory back before it was read")
        windows = _windows_of(port.lacking, align_up(layout.block_bytes(group)), arena.byte_count)
        if any(on_device(piece) for payload in payloads for piece in pieces_of(payload)):
            arena.pin()
            _finish_streams(payloads)
        _Upload(port, arena, layout.block_bytes(group), payloads, copying).send(windows)
        return port.publish()
    except BaseException:
        copying.finish()
        port.abandon()
        raise


def _windows_of(lacking: Sequence[int], padded_bytes: int, arena_bytes: int) -> list[Sequence[int]]:
    """Cut the indices of lacking blocks into windows."""
    if not lacking:
        return []
    if padded_bytes > arena_bytes:
        raise TooLarge(
            f"a block takes {padded_bytes} bytes and the arena has {arena_bytes}: "
            "connect with larger arena_bytes"
        )
    most = max(1, min(WINDOW_BYTES_MAX, arena_bytes // WINDOWS_PER_ARENA) // padded_bytes)
    step = min(most, WINDOW_BLOCKS_MAX)
    return [lacking[at : at + step] for at in range(0, len(lacking), step)]


def _finish_streams(payloads: "Sequence[Pieces]") -> None:
    """Wait until what this thread's current streams were given has written the payloads."""
    torch = loaded_torch()
    devices = {
        piece.device for payload in payloads for piece in pieces_of(payload) if on_device(piece)
    }
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


@dataclass(frozen=True, slots=True)
class _Filled:
    """A window in the arena, ready to be handed over."""

    piece: Piece
    blocks: list[ArenaBlock]


class _Upload:
    """One put's windows under way; used by the thread that called upload."""

    def __init__(
        self, port: "PutPort", arena: Arena, block_bytes: ByteCount, payloads: "Sequence[Pieces]",
        copying: Copying,
    ) -> None:  # fmt: skip
        self._port = port
        self._arena = arena
        self._copying = copying
        self._block_bytes = block_bytes
        self._payloads = payloads
        self._writing: deque[Future[None]] = deque()

    def send(self, windows: "list[Sequence[int]]") -> None:
        """Fill and hand over *windows*; returns, or raises, when none is under way."""
        try:
            if len(windows) == 1:
                self._hand_over(self._fill(windows[0], self._take(windows[0])))
            elif windows:
                self._send_with_workers(windows)
            self._copying.finish()
            while self._writing:
                self._writing.popleft().result()
        except BaseException:
            self._copying.finish()  # nobody fills any more, and what is being written is a copy
            raise
        finally:
            wait_for(self._writing)  # their arena pieces come back only then

    def _send_with_workers(self, windows: "list[Sequence[int]]") -> None:
        """Fill windows in worker threads, and hand each over from this one."""
        with ThreadPoolExecutor(FILLING_MAX, "twfs-upload") as workers:
            filling: deque[Future[_Filled]] = deque()
            try:
                for window in windows:
                    if len(filling) == FILLING_MAX:
                        self._hand_over(filling.popleft().result())
                    piece = self._take(window, filling)
                    filling.append(workers.submit(self._fill, window, piece))
                while filling:
                    self._hand_over(filling.popleft().result())
            finally:
                for future in filling:
                    if future.exception() is None:
                        future.result().piece.release()

    def _take(
        self, window: Sequence[int], filling: "deque[Future[_Filled]] | None" = None
    ) -> Piece:
        """Take the arena piece for *window*, waiting for room.

        Whoever waits has handed over all that it holds, so that no two uploads wait for each other.
        """
        byte_count = align_up(self._block_bytes) * len(window)
        piece = self._arena.take(byte_count, timeout_s=0)
        while filling and piece is None:
            self._hand_over(filling.popleft().result())
        while piece is None:
            if self._copying.given_up:
                raise GivenUp(f"no room for {byte_count} bytes before the caller wanted them back")
            piece = self._arena.take(byte_count, timeout_s=GIVE_UP_SECONDS)
        return piece

    def _hand_over(self, filled: _Filled) -> None:
        """Give a filled window to the port; its piece comes back with the answer."""
        try:
            while len(self._writing) >= WRITING_MAX:
                self._await_oldest()
            future = self._port.write(filled.blocks)
        except BaseException:
            filled.piece.release()
            raise
        future.add_done_callback(lambda _: filled.piece.release())
        self._writing.append(future)

    def _await_oldest(self) -> None:
        """Wait until the window that was handed over first is written, which may take long."""
        while not self._writing[0].done():
            if self._copying.given_up:
                raise GivenUp("a write took long, and the caller wanted its memory back meanwhile")
            wait_for([self._writing[0]], GIVE_UP_SECONDS)
        self._writing.popleft().result()

    def _fill(self, window: Sequence[int], piece: Piece) -> _Filled:
        """Copy the payloads of *window* into *piece*, pad them and sum them."""
        length = self._block_bytes
        step = align_up(length)
        blocks = []
        try:
            into = np.frombuffer(piece.view, np.uint8)
            for at, index in zip(range(0, piece.byte_count, step), window, strict=True):
                into[at + length : at + step] = 0
                xxh3, plain, weighted = _copy(
                    pieces_of(self._payloads[index]), into[at : at + length]
                )
                where = piece.offset + at
                blocks.append(ArenaBlock(index, where, length, xxh3, plain, weighted))
        except BaseException:
            piece.release()
            raise
        return _Filled(piece, blocks)


class _Sums:
    """Sums a payload as it is copied, while its bytes are still in the processor's L2."""

    def __init__(self, into: Any, *, lanes: bool) -> None:
        self._into = into
        self._lanes = lanes  # False: they come from the source
        self._xxh3 = xxhash.xxh3_128()
        self._done = 0
        self.plain = 0
        self.weighted = 0

    def advance(self, copied: int, *, end: bool = False) -> None:
        """Sum what was *copied* so far, in runs that are worth a call."""
        stop = copied if end else copied // ALIGN * ALIGN
        if stop == self._done or (not end and stop - self._done < SUMMED_BYTES):
            return
        run = self._into[self._done : stop]
        self._xxh3.update(run.data)
        if self._lanes:
            self.add(lanes_of(run), self._done)
        self._done = stop

    def add(self, lanes: tuple[int, int], at: int) -> None:
        """Add the lane sums of the bytes from *at* on, whose first lane has weight at/4 + 1."""
        self.plain += lanes[0]
        self.weighted += lanes[1] + lanes[0] * (at // LANE_BYTES)

    def result(self) -> tuple[bytes, int, int]:
        """The xxh3 and both lane sums of the whole payload."""
        return self._xxh3.digest(), self.plain & MASK_64, self.weighted & MASK_64


def _copy(pieces: "Sequence[Buffer]", into: Any) -> tuple[bytes, int, int]:
    """Copy *pieces* one behind the other into the array *into*; return xxh3 and lane sums.

    The lane sums of pieces on a GPU are taken there, from the source, so that a copy that went
    wrong is found out by whoever reads.
    """
    places = np.cumsum([0] + [_byte_count(piece) for piece in pieces]).tolist()
    if places[-1] != into.size:
        raise InvalidInput(f"a payload of {into.size} bytes had {places[-1]} when it was copied")
    on_source = all(
        on_device(piece) and at % LANE_BYTES == 0 for piece, at in zip(pieces, places, strict=False)
    )
    sums = _Sums(into, lanes=not on_source)
    for piece, at in zip(pieces, places, strict=False):
        if on_device(piece):
            source = flat_tensor(piece)
            lanes = _copy_from_device(source, into[at : at + source.numel()], sums=on_source)
            sums.add(lanes, at)
        else:
            source = flat_bytes(piece)
            for start in range(0, source.size, SUMMED_BYTES):
                stop = min(start + SUMMED_BYTES, source.size)
                copy_bytes(into[at + start : at + stop], source[start:stop])
                sums.advance(at + stop)
    sums.advance(into.size, end=True)
    return sums.result()


def _copy_from_device(source: Any, into: Any, *, sums: bool) -> tuple[int, int]:
    """Copy the flat uint8 tensor *source* into host memory; return its lane sums, or zeros.

    Works on a stream of its own, so that an engine's kernels are not waited for.
    """
    torch = loaded_torch()
    cuda = source.device.type == "cuda"
    side = torch.cuda.Stream(source.device) if cuda else None
    with torch.cuda.stream(side) if cuda else nullcontext():
        torch.from_numpy(into).copy_(source, non_blocking=cuda)
        lanes = lanes_of(source) if sums else (0, 0)
        if side is not None:
            side.synchronize()
    return lanes

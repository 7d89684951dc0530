"""Guaranteed: every lacking payload reaches the port whole, padded and summed, in bounded windows.

Whatever goes wrong, the put is abandoned and no piece of the arena stays taken.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier, Event

import numpy as np
import pytest
import torch

from twfs.checksums import checksums_of
from twfs.copying import Copying
from twfs.datapath.upload import WINDOWS_PER_ARENA, check_payloads, pieces_of, upload
from twfs.devices.arena import Arena
from twfs.errors import GivenUp, InvalidInput, NoDaemon, TooLarge
from twfs.layout import Arrangement, Group, Layout
from twfs.protocol.wire import WINDOW_BLOCKS_MAX
from twfs.store import ArenaBlock, PutOutcome, PutResult
from twfs.units import ALIGN, ByteCount, align_up


def layout_of(block_bytes: int) -> Layout:
    group = Group(1, arrangement=Arrangement.OPAQUE, layer_bytes=block_bytes)
    return Layout("m", (group,), 16)


class MemoryPort:
    """A put that keeps what it is given; *before* may raise in each write."""

    def __init__(
        self,
        arena: Arena,
        lacking: Sequence[int],
        executor: ThreadPoolExecutor,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.lacking = lacking
        self.kept: dict[int, tuple[bytes, ArenaBlock]] = {}
        self.windows: list[int] = []
        self.published = self.abandoned = 0
        self.arena = arena
        self.before = before
        self.executor = executor
        self.futures: list[Future[None]] = []

    def write(self, blocks: Sequence[ArenaBlock]) -> "Future[None]":
        self.windows.append(len(blocks))
        future = self.executor.submit(self._write, blocks)
        self.futures.append(future)
        return future

    def _write(self, blocks: Sequence[ArenaBlock]) -> None:
        self.before()
        for block in blocks:
            end = block.arena_offset + align_up(block.payload_bytes)
            self.kept[block.index] = (bytes(self.arena.view[block.arena_offset : end]), block)

    def publish(self) -> PutResult:
        assert all(future.done() for future in self.futures)
        self.published += 1
        return PutResult((PutOutcome.PUBLISHED,) * len(self.kept), ByteCount(0))

    def abandon(self) -> None:
        assert all(future.done() for future in self.futures)
        self.abandoned += 1


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.shared(64 * ALIGN)
    yield made
    assert made.statistics()["in_use_bytes"] == 0
    made.close()


def random_payloads(
    count: int, byte_count: int
) -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    random_bytes = np.random.default_rng(count)
    return [random_bytes.integers(0, 256, byte_count, dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize("block_bytes", [1, 4095, 4096, 10_000, 64 * ALIGN])
def test_every_lacking_payload_arrives_whole_and_padded_with_zeros(
    arena: Arena, executor: ThreadPoolExecutor, block_bytes: int
) -> None:
    arena.view[:] = b"\xee" * len(arena.view)
    payloads = random_payloads(30, block_bytes)
    lacking = sorted(random.Random(block_bytes).sample(range(30), 21))
    port = MemoryPort(arena, lacking, executor)
    result = upload(port, arena, layout_of(block_bytes), 0, payloads)
    assert len(result.outcomes) == 21
    assert (port.published, port.abandoned) == (1, 0)
    assert sorted(port.kept) == lacking
    for index, (padded, block) in port.kept.items():
        sums = checksums_of(payloads[index])
        assert padded == payloads[index].tobytes().ljust(align_up(block_bytes), b"\0")
        assert (block.xxh3, block.lane_plain, block.lane_weighted) == (
            sums.xxh3, sums.lane_plain, sums.lane_weighted
        )  # fmt: skip


def test_windows_leave_room_for_filling_the_next(
    arena: Arena, executor: ThreadPoolExecutor
) -> None:
    port = MemoryPort(arena, range(100), executor)
    upload(port, arena, layout_of(100), 0, random_payloads(100, 100))
    assert sum(port.windows) == 100
    assert max(port.windows) <= 64 // WINDOWS_PER_ARENA


def test_a_window_has_at_most_the_blocks_of_one_request(executor: ThreadPoolExecutor) -> None:
    arena = Arena.shared(4 * WINDOWS_PER_ARENA * WINDOW_BLOCKS_MAX * ALIGN)
    count = WINDOW_BLOCKS_MAX + 1
    port = MemoryPort(arena, range(count), executor)
    upload(port, arena, layout_of(1), 0, random_payloads(count, 1))
    assert sorted(port.windows) == [1, WINDOW_BLOCKS_MAX]
    arena.close()


def test_nothing_lacking_copies_nothing_and_publishes(
    arena: Arena, executor: ThreadPoolExecutor
) -> None:
    port = MemoryPort(arena, [], executor)
    upload(port, arena, layout_of(100), 0, random_payloads(3, 100))
    assert (port.published, port.windows) == (1, [])
    assert arena.statistics()["taken"] == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(2048, dtype=torch.float32).to(torch.bfloat16),
        lambda: torch.arange(4096, dtype=torch.float32).to(torch.float8_e4m3fn),
        lambda: torch.arange(4096).to(torch.uint8).reshape(2, 2, 1024),
        lambda: np.arange(2048, dtype=np.float16),
        lambda: bytearray(range(256)) * 16,
        lambda: memoryview(bytes(4096)),
        lambda: [torch.ones(1023, dtype=torch.uint8), b"\1\2\3", np.ones(767, np.float32), b"ab"],
        lambda: (torch.ones(2, 512, dtype=torch.bfloat16), torch.zeros(2048, dtype=torch.uint8)),
        lambda: torch.ones(2048, dtype=torch.bfloat16, requires_grad=True),
    ],
    ids=["bf16", "fp8", "uint8", "numpy", "bytearray", "bytes", "list", "tuple", "with gradient"],
)
def test_tensors_arrays_and_buffers_in_pieces_arrive_as_their_bytes(
    arena: Arena, executor: ThreadPoolExecutor, make: Callable[[], object]
) -> None:
    payload = make()
    wanted = b""
    for piece in pieces_of(payload):
        if isinstance(piece, torch.Tensor):
            wanted += piece.detach().view(torch.uint8).numpy().tobytes()
        else:
            wanted += memoryview(piece).tobytes()
    port = MemoryPort(arena, [0], executor)
    check_payloads(layout_of(len(wanted)), 0, [payload])
    upload(port, arena, layout_of(len(wanted)), 0, [payload])
    padded, block = port.kept[0]
    assert padded[: len(wanted)] == wanted
    assert block.xxh3 == checksums_of(wanted).xxh3


@pytest.mark.parametrize(
    "payload",
    [
        bytes(4095), bytes(4097), [bytes(4096), b"x"], [],
        np.zeros((64, 128), np.uint8)[:, ::2], torch.zeros(64, 128, dtype=torch.uint8)[:, ::2],
        torch.zeros(64, 64, dtype=torch.uint8).t(), "text", 7, None, [bytes(1)] * 4097,
        np.array([object()]),
    ],
)  # fmt: skip
def test_payloads_that_are_not_the_layouts_bytes_are_refused(payload: object) -> None:
    check_payloads(layout_of(4096), 0, [bytes(4096)])
    with pytest.raises(InvalidInput, match="payload 1 "):
        check_payloads(layout_of(4096), 0, [bytes(4096), payload])


def test_a_group_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidInput, match="group 1"):
        check_payloads(layout_of(4096), 1, [])


def test_a_block_larger_than_the_arena_is_refused_and_the_put_abandoned(
    arena: Arena, executor: ThreadPoolExecutor
) -> None:
    port = MemoryPort(arena, [0], executor)
    with pytest.raises(TooLarge, match="arena_bytes"):
        upload(port, arena, layout_of(65 * ALIGN), 0, [bytes(65 * ALIGN)])
    assert (port.published, port.abandoned) == (0, 1)


@pytest.mark.parametrize("fails_at", [1, 2, 5, 9])
@pytest.mark.parametrize("kind", [NoDaemon, KeyboardInterrupt])
def test_a_write_that_fails_abandons_the_put_when_no_other_is_under_way(
    arena: Arena, executor: ThreadPoolExecutor, fails_at: int, kind: type[BaseException]
) -> None:
    calls = iter(range(1, 100))

    def fail() -> None:
        if next(calls) == fails_at:
            raise kind("here")

    port = MemoryPort(arena, range(90), executor, fail)
    with pytest.raises(kind):
        upload(port, arena, layout_of(2 * ALIGN), 0, random_payloads(90, 2 * ALIGN))
    assert (port.published, port.abandoned) == (0, 1)


def test_a_payload_that_turns_bad_while_it_is_copied_abandons_the_put(
    arena: Arena, executor: ThreadPoolExecutor
) -> None:
    payloads: list[object] = [*random_payloads(40, 2 * ALIGN)]
    payloads[33] = np.zeros(ALIGN, np.uint8)  # as if another thread had resized it after the check
    payloads[35] = np.zeros((2, 2, ALIGN), np.uint8)[:, ::2]
    port = MemoryPort(arena, range(40), executor)
    with pytest.raises((InvalidInput, ValueError, AssertionError)):
        upload(port, arena, layout_of(2 * ALIGN), 0, payloads)
    assert (port.published, port.abandoned) == (0, 1)


@pytest.mark.parametrize("block_units", [1, 20, 33, 64])
def test_uploads_that_share_a_small_arena_do_not_wait_for_each_other_forever(
    arena: Arena, executor: ThreadPoolExecutor, block_units: int
) -> None:
    payloads = random_payloads(12, block_units * ALIGN)
    start = Barrier(6)

    def one() -> PutResult:
        with ThreadPoolExecutor(2) as own:
            port = MemoryPort(arena, range(12), own)
            start.wait()
            return upload(port, arena, layout_of(block_units * ALIGN), 0, payloads)

    with ThreadPoolExecutor(6) as pool:
        results = [future.result(60) for future in [pool.submit(one) for _ in range(6)]]
    assert [len(result.outcomes) for result in results] == [12] * 6


def test_copying_ends_before_the_bytes_are_published(
    arena: Arena, executor: ThreadPoolExecutor
) -> None:
    port = MemoryPort(arena, range(20), executor)
    published: list[int] = []
    copying = Copying(lambda: published.append(port.published))
    upload(port, arena, layout_of(100), 0, random_payloads(20, 100), copying=copying)
    assert published == [0]
    assert copying.wait(0)


def test_a_put_that_is_given_up_stops_waiting_for_room(
    arena: Arena, executor: ThreadPoolExecutor
) -> None:
    hogged = arena.take(arena.byte_count)
    assert hogged is not None
    port = MemoryPort(arena, [0], executor)
    copying = Copying()
    upload_of = ThreadPoolExecutor(1)
    put = upload_of.submit(
        upload, port, arena, layout_of(100), 0, random_payloads(1, 100), copying=copying
    )
    while not arena.statistics()["waits"]:
        time.sleep(0.001)
    assert not copying.wait(0)
    copying.give_up()
    with pytest.raises(GivenUp):
        put.result()
    assert copying.wait(0)
    assert (port.published, port.abandoned) == (0, 1)
    hogged.release()
    upload_of.shutdown()


@pytest.mark.parametrize("hogged_blocks", [48, 0], ids=["no room", "many windows"])
def test_a_put_that_is_given_up_gives_memory_back_while_its_writes_hang(
    arena: Arena, executor: ThreadPoolExecutor, hogged_blocks: int
) -> None:
    hogged = arena.take(hogged_blocks * ALIGN) if hogged_blocks else None
    hang = Event()

    def wait() -> None:
        hang.wait()

    port = MemoryPort(arena, range(60), executor, before=wait)
    copying = Copying()
    with ThreadPoolExecutor(1) as upload_of:
        put = upload_of.submit(
            upload, port, arena, layout_of(100), 0, random_payloads(60, 100), copying=copying
        )
        while len(port.windows) < 2:
            time.sleep(0.001)
        copying.give_up()
        given_back = copying.wait(20)
        assert not put.done()
        hang.set()
        with pytest.raises(GivenUp):
            put.result()
    assert given_back
    assert (port.published, port.abandoned) == (0, 1)
    if hogged is not None:
        hogged.release()

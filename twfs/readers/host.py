"""The host reader: O_DIRECT preadv from several threads, into the destination or huge pages.

Serves host memory; staged builds on it. What cannot be placed directly (unaligned, in pieces, by
layers), and all that is read with a deadline, goes through the reader's own arena and a copy of
exactly the payload. Thread-safe.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Condition, Lock
from typing import Any, Final

import xxhash

from twfs.checksums import Bytes, copy_bytes, flat_bytes
from twfs.devices.arena import Arena
from twfs.readers.ahead import Ahead, Reading, Room
from twfs.readers.arenas import Arenas
from twfs.readers.base import (
    ARENA_TIMEOUT_S,
    HEADER_BYTES,
    BlockRead,
    DeviceSource,
    ForkGuard,
    Tally,
)
from twfs.readers.hanging import Hands, TimedWave, Watch
from twfs.readers.planning import MERGED_BYTES_MIN, Io, Job, pieces_of, plan, wanted_of
from twfs.records import Header
from twfs.store import ReadOutcome
from twfs.units import ALIGN, DeviceIndex

SMALL_READS_THREADS: Final = 32  # in flight when reads are small: a drive needs many of them


class Wave:
    """The I/Os of one wave, worked off by the caller and helping threads. Thread-safe.

    A helper that starts after the end finds it closed, so ending needs no list of helpers, which
    a KeyboardInterrupt could leave incomplete.
    """

    def __init__(self, ios: Sequence[Io]) -> None:
        self._ios = deque(ios)
        self._changed = Condition()
        self._helpers = 0
        self._closed = False
        self._failure: BaseException | None = None

    def next(self) -> Io | None:
        """Take the next I/O, None when there is no more."""
        try:
            return self._ios.popleft()
        except IndexError:
            return None

    def help(self, perform: Callable[[Io], None]) -> None:
        """Work I/Os off on a helping thread; what is raised comes out of end."""
        with self._changed:
            if self._closed:
                return
            self._helpers += 1
        failure: BaseException | None = None
        try:
            while (io := self.next()) is not None:
                perform(io)
        except BaseException as error:  # noqa: BLE001 - raised again by end, in the caller
            failure = error
        with self._changed:
            self._helpers -= 1
            self._failure = self._failure or failure
            self._changed.notify_all()

    def end(self, *, stop: bool) -> None:
        """Wait until no helper works any more; with *stop* without beginning further I/Os.

        KeyboardInterrupt is put off until then: memory must not be freed under an I/O.
        """
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                if stop:
                    self._ios.clear()
                with self._changed:
                    self._closed = True
                    while self._helpers:
                        self._changed.wait()
                break
            except KeyboardInterrupt as error:
                interrupt, stop = error, True
        if interrupt is not None:
            raise interrupt
        if self._failure is not None:
            raise self._failure


class HostReader:
    """See the module's docstring; *arena_bytes* bounds what a read holds besides destinations."""

    name = "host"

    def __init__(
        self,
        sources: Mapping[DeviceIndex, DeviceSource],
        *,
        threads: int = 4,
        arena_bytes: int = 64 << 20,
        watch: Watch | None = None,
    ) -> None:
        self._sources = sources
        self._watch = watch or Watch()
        self._hands: dict[DeviceSource, Hands] = {}
        self._threads = threads
        self._arenas = Arenas(self._make_arena, arena_bytes)
        self._room = Room(self._arenas, arena_bytes)
        self._guard = ForkGuard()
        self._lock = Lock()
        self._executor = ThreadPoolExecutor(
            max(threads, SMALL_READS_THREADS), f"twfs-{self.name}"
        )  # starts threads only as they are needed
        self._scratch = Arena.private(ALIGN)  # takes headers, never looked at
        self._skipped = flat_bytes(self._scratch.view)
        self._tally = Tally()

    def read(
        self,
        blocks: Sequence[BlockRead],
        held: Callable[[], bool],
        after: Sequence[Any] = (),
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        """Read and verify *blocks*; see Reader.read."""
        self._guard.check()
        self._wait_for(after)
        outcomes = [ReadOutcome.NOT_READ] * len(blocks)
        begin = direct = 0
        while begin < len(blocks):
            if not held():
                outcomes[begin:] = [ReadOutcome.LEASE_ENDED] * (len(blocks) - begin)
                break
            jobs: list[Job] = []
            large: list[Arena] = []
            wave: TimedWave[Io] | None = None
            try:
                if not self._gather(blocks, begin, jobs, large, deadline):
                    outcomes[begin:] = [ReadOutcome.TIMED_OUT] * (len(blocks) - begin)
                    break
                if deadline is None:
                    self._run(jobs, outcomes)
                else:
                    for job in jobs:
                        outcomes[job.at] = ReadOutcome.TIMED_OUT
                    wave = self._timed_wave(jobs, outcomes)
                    wave.begin(self._hands_of)
                    wave.wait(deadline)
            finally:
                self._settle()
                give_back = partial(self._give_back, jobs, large)
                if wave is None:
                    give_back()
                elif not wave.when_over(give_back):
                    self._arenas.leave(pieces_of(jobs))
            direct += sum(job.piece is None for job in jobs)
            begin += len(jobs)
        self._tally.count_read(blocks, outcomes, direct)
        return outcomes

    def read_ahead(self, blocks: Sequence[BlockRead]) -> Ahead:
        """Begin to read the first of *blocks*, which have no targets yet: as many as have room."""
        self._guard.check()
        jobs: list[Job] = []
        for at, block in enumerate(blocks):
            piece = self._room.take(block.padded_bytes)
            if piece is None:
                break
            jobs.append(Job(block, at, flat_bytes(piece.view), HEADER_BYTES, piece))
        outcomes = [ReadOutcome.TIMED_OUT] * len(jobs)
        reading = Reading(jobs, outcomes, self._timed_wave(jobs, outcomes))
        ahead = Ahead(reading, self._room, self._tally, self._deliver)
        try:
            ahead.begin(self._hands_of)
        except BaseException:  # no more threads, say: nobody else could give the memory back
            ahead.drop()
            raise
        return ahead

    def _wait_for(self, after: Sequence[Any]) -> None:
        """Make sure that earlier work on the destinations is done; host memory has none."""

    def _places_directly(self, block: BlockRead) -> bool:
        """Tell whether the device may write into *block*'s destination."""
        return block.whole and block.targets[0].array is not None

    def _deliver(self, block: BlockRead, source: Bytes) -> None:
        """Bring verified bytes from the arena to their destination."""
        at = 0
        for target in block.targets:
            assert target.array is not None
            copy_bytes(target.array, source[at : at + target.byte_count])
            at += target.byte_count

    def _settle(self) -> None:
        """Wait for what _deliver began; called before the arena's pieces are given back."""

    def _make_arena(self, byte_count: int) -> Arena:
        """Make memory to read into."""
        return Arena.private(byte_count)

    def _gather(
        self,
        blocks: Sequence[BlockRead],
        begin: int,
        jobs: list[Job],
        large: list[Arena],
        deadline: float | None,
    ) -> bool:
        """Fill *jobs* with blocks from *begin* on, as many as the arena has room for.

        Waits only while it holds nothing, so that two reads cannot wait for each other. False if
        there was no room for even one in ARENA_TIMEOUT_S, or until *deadline*.
        """
        timeout_s = ARENA_TIMEOUT_S
        if deadline is not None:
            timeout_s = min(timeout_s, deadline - time.monotonic())
            if timeout_s <= 0:
                return False
        for at in range(begin, len(blocks)):
            block = blocks[at]
            if deadline is None and self._places_directly(block):
                array = block.targets[0].array
                assert array is not None
                jobs.append(Job(block, at, array, HEADER_BYTES, None))
                continue
            start, stop, header = wanted_of(block)
            byte_count = header + stop - start
            if not self._arenas.fits(byte_count):
                if jobs:
                    break
                arena = self._arenas.large(byte_count, timeout_s)
                if arena is None:
                    return False
                large.append(arena)
                piece = arena.take(byte_count)
            else:
                hangs = None if deadline is None else self._hung
                piece = self._arenas.take(byte_count, 0 if jobs else timeout_s, hangs)
            if piece is None:
                break
            jobs.append(Job(block, at, flat_bytes(piece.view), start, piece))
        return bool(jobs)

    def _give_back(self, jobs: list[Job], large: list[Arena]) -> None:
        """Give the memory of *jobs* back: no I/O is under way into it any more."""
        self._arenas.give_back(pieces_of(jobs))
        if large:
            self._arenas.close_large(large[0])

    def _run(self, jobs: list[Job], outcomes: list[ReadOutcome]) -> None:
        """Read all *jobs* and put their outcomes into *outcomes*."""
        ios = self._plan(jobs, outcomes)
        small = sum(io.byte_count for io in ios) < len(ios) * MERGED_BYTES_MIN
        workers = min(len(ios), SMALL_READS_THREADS if small else self._threads)
        wave = Wave(ios)
        done = False

        def perform(io: Io) -> None:
            self._perform(io, outcomes)

        try:
            for _ in range(workers - 1):  # the caller is the last of them
                self._executor.submit(wave.help, perform)
            while (io := wave.next()) is not None:
                perform(io)
            done = True
        finally:
            wave.end(stop=not done)

    def _timed_wave(self, jobs: list[Job], outcomes: list[ReadOutcome]) -> TimedWave[Io]:
        """Return the I/Os of all *jobs*, not yet begun; *outcomes* stay of what is not finished."""
        ios = self._plan(jobs, outcomes)
        of: dict[DeviceSource, list[Io]] = {}
        for io in ios:
            source = self._sources.get(DeviceIndex(io.device))
            if source is not None:
                of.setdefault(source, []).append(io)
        small = sum(io.byte_count for io in ios) < len(ios) * MERGED_BYTES_MIN
        threads = SMALL_READS_THREADS if small else self._threads
        finish = partial(self._ended, outcomes)
        return TimedWave(of, threads, self._read_parts, finish)

    def _hands_of(self, source: DeviceSource) -> Hands:
        """Return the threads that read *source* for those who do not wait."""
        with self._lock:
            for gone in set(self._hands) - set(dict(self._sources).values()):
                del self._hands[gone]
            hands = self._hands.get(source)
            if hands is None:
                most = max(self._threads, SMALL_READS_THREADS)
                hands = self._hands[source] = Hands(most, f"twfs-{self.name}-timed")
            return hands

    def _plan(self, jobs: list[Job], outcomes: list[ReadOutcome]) -> list[Io]:
        """Return the I/Os of all *jobs*."""
        return plan(
            jobs, outcomes, self._sources, hung=self._hung(), threads=self._threads,
            skipped=self._skipped,
        )  # fmt: skip

    def _perform(self, io: Io, outcomes: list[ReadOutcome]) -> None:
        """Do one I/O, and finish every block that it completes."""
        self._ended(outcomes, io, self._read_parts(io))

    def _read_parts(self, io: Io, fd: int | None = None) -> list[bool]:
        """Do one I/O, through *fd* if given; tell for each part whether it came."""
        self._tally.count_io(io.byte_count)
        if self._preadv(io.device, io.buffers, io.offset, io.byte_count, fd):
            return [True] * len(io.parts)
        # One bad sector must not cost its neighbours: ask for each part alone.
        return [
            len(io.parts) > 1 and self._preadv(span.device, [memory], span.offset, span.length, fd)
            for _, span, memory in io.parts
        ]

    def _ended(self, outcomes: list[ReadOutcome], io: Io, came: list[bool]) -> None:
        """Finish every block that an I/O completes."""
        for (job, _, _), part_came in zip(io.parts, came, strict=True):
            if self._part_done(job, came=part_came):
                outcomes[job.at] = self._finish(job)

    def _hung(self) -> set[DeviceIndex]:
        """The devices that are known to hang."""
        return {at for at, source in dict(self._sources).items() if self._watch.hung(source)}

    def _preadv(
        self, device: int, buffers: list[Bytes], offset: int, byte_count: int, fd: int | None = None
    ) -> bool:
        """Read exactly *byte_count* bytes; False if the device gives an error or less."""
        source = self._sources.get(DeviceIndex(device))
        if source is None:  # it has just been taken out
            return False
        flight = self._watch.begin(source)
        try:
            to = source.fd if fd is None else fd
            return os.preadv(to, buffers, offset) == byte_count  # type: ignore[arg-type]
        except OSError:
            return False
        finally:
            self._watch.end(source, flight)

    def _part_done(self, job: Job, *, came: bool) -> bool:
        """Count a part of *job*; True when it was the last."""
        with self._lock:
            job.left -= 1
            job.failed = job.failed or not came
            return job.left == 0

    def _finish(self, job: Job) -> ReadOutcome:
        """Verify and deliver a block that has been read whole."""
        block, outcome = job.block, ReadOutcome.DEVICE_ERROR
        if not job.failed:
            if block.layers is not None:
                return self._finish_layers(job)
            payload = job.memory[: block.payload_bytes]
            if xxhash.xxh3_128_digest(payload.data) == block.checksums.xxh3:
                if job.then is not None:
                    job.then()
                elif job.piece is not None:
                    self._deliver(block, payload)
                return ReadOutcome.HIT
            outcome = ReadOutcome.BAD_CHECKSUM
        if job.piece is None:
            block.targets[0].clear()
        return outcome

    def _finish_layers(self, job: Job) -> ReadOutcome:
        """Verify the layers that were read against the sums in the header; deliver them."""
        block, layers = job.block, job.block.layers
        assert layers is not None
        try:
            header = Header.unpack(job.memory[:HEADER_BYTES].data)
        except ValueError:
            return ReadOutcome.BAD_CHECKSUM
        if (
            header.block.generation != block.generation
            or header.prefix_hash != block.prefix_hash
            or (header.group, header.shard) != (block.group, block.shard)
            or header.block.payload_bytes != block.payload_bytes
            or header.block.checksums.xxh3 != block.checksums.xxh3
            or len(header.layer_sums) != layers.count
        ):
            return ReadOutcome.BAD_CHECKSUM
        begin = HEADER_BYTES + layers.first * layers.layer_bytes % ALIGN
        payload = job.memory[begin : begin + (layers.stop - layers.first) * layers.layer_bytes]
        for index in range(layers.first, layers.stop):
            at = (index - layers.first) * layers.layer_bytes
            run = payload[at : at + layers.layer_bytes]
            if xxhash.xxh3_64_intdigest(run.data) != header.layer_sums[index]:
                return ReadOutcome.BAD_CHECKSUM
        self._deliver(block, payload)
        return ReadOutcome.HIT

    def statistics(self) -> dict[str, Any]:
        """What was read, and the arena."""
        return self._tally.statistics() | {
            "threads": self._threads,
            "under_way": self._watch.statistics(),
        } | self._arenas.statistics()  # fmt: skip

    def close(self) -> None:
        """Wait for reads under way and let go of threads and memory."""
        self._executor.shutdown()
        self._arenas.close()

"""One replay: a stream of requests through a real warehouse, whose clock is the trace's.

Every request is matched, what it lacks is put while the match is held, and then its session says
how it ended. Blocks are scaled down in bytes and in nothing else: as many fit as would fit of the
modelled ones. One request follows the other, so a replay has the same decisions every time.
"""

import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from twfs.admin.advising import Live, Wishes, advise
from twfs.admin.usage import By, Usage
from twfs.config import Config
from twfs.devices.formatting import DEVICE_BYTES_MIN, DeviceSpec
from twfs.errors import DeviceError, NoSpaceForImage, WarehouseFull
from twfs.hints import Hint, Retention, Stop
from twfs.policy.accesses import read_record
from twfs.prefix import Names
from twfs.records import DATA_START
from twfs.store import Durability, Model, PutOutcome, ReadOutcome
from twfs.units import ALIGN, ByteCount, Millis, align_up
from twfs.warehouse import Warehouse
from twfs_tools.output import size
from twfs_tools.replay.naming import Naming, Payloads, layout_for
from twfs_tools.replay.streams import IntArray, Stream

BEGINNING_MS: Final = 1_700_000_000_000  # when every replay begins; some day, not 1970
METADATA_BYTES: Final = 2048  # of LMDB for a block, twice what is seen
SLACK_BYTES: Final = 64 << 20
PUT_BLOCKS: Final = 4096  # of one put: a prompt of a million tokens
READ_BYTES: Final = 1 << 30  # read back at once
STOPS: Final = {"tool_use": Stop.TOOL_USE, "end_turn": Stop.END_TURN}


class Hints(StrEnum):
    """When a session says who it is and how its request ended."""

    NONE = "none"
    TOUCH = "touch"  # who it is with the put; how the request ended when it has, by a touch
    PUT = "put"  # all of it with the put already, which follows the match at once
    ANSWER = "answer"  # the same, but at the time at which the trace says that the answer ended
    ENDS = "ends"  # and who is not heard of again after that says so: the session is deleted


@dataclass(frozen=True)
class Setup:
    """What is varied between replays of one stream."""

    capacity_blocks: int
    payload_bytes: int = 4096  # at least; more where so few blocks are no device
    config: Config = field(default_factory=Config)
    hints: Hints = Hints.PUT
    front_blocks: int = 0  # of the engine's own memory
    touch: bool = True  # uses are reported, also those that the engine's memory served
    read_part: float = 0.0  # of the requests, whose hits are read and compared
    durability: Durability = Durability.STRICT
    advised_blocks: tuple[int, ...] = ()  # capacities that its access record is asked about
    class_of: Callable[[str], Retention | None] = lambda _: None  # of a session's name
    prepare: Callable[[Warehouse], None] = lambda _: None  # before the first request

    @property
    def unit_bytes(self) -> int:
        """A block on the device: its header and its payload."""
        needed = max(
            ALIGN + align_up(self.payload_bytes), -(-DEVICE_BYTES_MIN // self.capacity_blocks)
        )
        return align_up(needed)

    @property
    def device_bytes(self) -> int:
        """The device that holds just that many blocks."""
        return DATA_START + ALIGN + self.capacity_blocks * self.unit_bytes


@dataclass
class Outcome:
    """What became of every request (arrays of n), and of the warehouse."""

    front: IntArray  # blocks that the engine held itself
    hits: IntArray  # blocks of the leading run held by either
    published: IntArray
    refused: IntArray  # blocks that found no room
    evicted_blocks: int = 0
    used_bytes: int = 0
    total_bytes: int = 0
    metadata_bytes: int = 0
    match_s: float = 0.0
    put_s: float = 0.0
    touch_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    read_blocks: int = 0
    peak_bytes: int = 0  # of this process
    findings: list[str] = field(default_factory=list)  # of the check at the end
    unit_bytes: int = 0
    statistics: dict[str, Any] = field(default_factory=dict)
    advice: dict[str, Any] = field(default_factory=dict)  # of `twfs advise` at the end


class TraceClock:
    """Time as the trace has it."""

    def __init__(self) -> None:
        self.now_ms = BEGINNING_MS

    def __call__(self) -> Millis:
        """The time of the request under way."""
        return Millis(self.now_ms)


@contextmanager
def scratch_warehouse(setup: Setup, clock: TraceClock, directory: Path) -> Iterator[Warehouse]:
    """A warehouse for one replay under *directory*; gone afterwards. NoSpaceForImage."""
    needed = setup.device_bytes + METADATA_BYTES * setup.capacity_blocks + SLACK_BYTES
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise NoSpaceForImage(
            f"a replay of {setup.capacity_blocks:,} blocks needs {size(needed)} in {directory}, "
            f"which has {size(free)} free: use another --directory or less capacity"
        )
    root = Path(tempfile.mkdtemp(prefix="twfs-replay-", dir=directory))
    try:
        spec = DeviceSpec(root / "device0.img", ByteCount(setup.device_bytes))
        Warehouse.create(root / "warehouse", [spec])
        with Warehouse.open(
            root / "warehouse", clock=clock, config=setup.config, durability=setup.durability
        ) as warehouse:
            yield warehouse
    finally:
        shutil.rmtree(root)


def replay(
    stream: Stream, setup: Setup, directory: Path, front: IntArray,
    advance: Callable[[int], None] = lambda _: None,
) -> Outcome:  # fmt: skip
    """Run *stream* through a warehouse under *directory*; what is unsound at its end is a finding.

    *front*: blocks of each request that the engine's own memory holds. *advance* is told how many
    requests more are done.
    """
    clock = TraceClock()
    with scratch_warehouse(setup, clock, directory) as warehouse:
        setup.prepare(warehouse)
        run = _Run(stream, setup, warehouse, clock, front)
        wall, cpu = time.perf_counter(), time.process_time()
        if setup.hints in {Hints.ANSWER, Hints.ENDS}:
            for ms, number, ended in stream.moments():
                clock.now_ms = BEGINNING_MS + ms
                (run.answer if ended else run.arrive)(number)
                advance(ended)
        else:
            for number in range(len(stream)):
                run.request(number)
                advance(1)
        warehouse.operate("settle")
        outcome = run.outcome
        outcome.wall_s = time.perf_counter() - wall
        outcome.cpu_s = time.process_time() - cpu
        run.finish()
    return outcome


def _over_with(stream: Stream) -> dict[int, dict[tuple[int, int, int], None]]:
    """By request: the sessions that nobody hears of after it, by tenant, model and session."""
    last = {session: number for number, session in enumerate(stream.session.tolist())}
    over: dict[int, dict[tuple[int, int, int], None]] = {number: {} for number in last.values()}
    for owner in zip(
        stream.tenant.tolist(), stream.model.tolist(), stream.session.tolist(), strict=True
    ):
        over[last[owner[2]]][owner] = None
    return over


class _Run:
    """A replay under way."""

    def __init__(
        self, stream: Stream, setup: Setup, warehouse: Warehouse, clock: TraceClock, front: IntArray
    ) -> None:
        self._stream = stream
        self._setup = setup
        self._warehouse = warehouse
        self._clock = clock
        self._payload_bytes = setup.unit_bytes - ALIGN
        self._payloads = Payloads(self._payload_bytes)
        layouts = [
            layout_for(name, self._payload_bytes, stream.block_tokens) for name in stream.models
        ]
        self._models: dict[tuple[int, int], Model] = {
            (tenant, model): warehouse.open_model(
                f"{stream.models[model] or 'model'}", layouts[model],
                tenant=stream.tenants[tenant] or None,
            )
            for tenant, model in sorted(
                set(zip(stream.tenant.tolist(), stream.model.tolist(), strict=True))
            )
        }  # fmt: skip
        self._naming = Naming.of(stream, self._models)
        self._classes = [setup.class_of(name) for name in stream.sessions]
        self._over_with = _over_with(stream) if setup.hints is Hints.ENDS else {}
        self._reading = np.random.default_rng(0).random(len(stream)) < setup.read_part
        count = len(stream)
        self.outcome = Outcome(
            front, np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64),
            unit_bytes=setup.unit_bytes,
        )  # fmt: skip

    def _hint(self, number: int, *, ended: bool) -> Hint:
        """What the engine says of a request's session, at its put or when it *ended*."""
        session = int(self._stream.session[number])
        if self._setup.hints is Hints.NONE:
            return Hint(retention=self._classes[session])
        known = ended or self._setup.hints is not Hints.TOUCH
        stop = STOPS.get(self._stream.stop[number], Stop.OTHER) if known else None
        return Hint(self._stream.sessions[session], self._classes[session], stop)

    def request(self, number: int) -> None:
        """Match one request, put what it lacks, say that it was used."""
        stream, warehouse, outcome = self._stream, self._warehouse, self.outcome
        chain = stream.chain(number)
        if not len(chain):
            return
        self._clock.now_ms = BEGINNING_MS + int(stream.at_ms[number])
        model, names = self._named(number, chain)
        start = int(outcome.front[number])
        before = time.perf_counter()
        with warehouse.match(model, names, start=start) as match:
            held = max(start, match.blocks)
            outcome.match_s += time.perf_counter() - before
            outcome.hits[number] = held
            if self._reading[number] and held > start:
                self._read(match, chain[start:held])
            before = time.perf_counter()
            if held < len(chain):
                self._put(number, model, names.slice(held, len(chain)), chain[held:])
            outcome.put_s += time.perf_counter() - before
        self._touch(number, model, names)

    def arrive(self, number: int) -> None:
        """Match one request, whose answer ends later."""
        chain, start = self._stream.chain(number), int(self.outcome.front[number])
        if len(chain):
            model, names = self._named(number, chain)
            before = time.perf_counter()
            with self._warehouse.match(model, names, start=start) as match:
                held = max(start, match.blocks)
                self.outcome.match_s += time.perf_counter() - before
                self.outcome.hits[number] = held
                if self._reading[number] and held > start:
                    self._read(match, chain[start:held])

    def answer(self, number: int) -> None:
        """Keep what has been computed for a request; a session that is over with it is deleted."""
        chain = self._stream.chain(number)
        if len(chain):
            self._keep(number, chain)
        for tenant, model, session in self._over_with.get(number, ()):
            self._warehouse.forget(self._models[tenant, model], self._stream.sessions[session])

    def _keep(self, number: int, chain: IntArray) -> None:
        """Put what the store lacks of a request that has been answered, and say that it was used.

        The engine has all of it in its own memory now, also what was evicted meanwhile.
        """
        model, names = self._named(number, chain)
        held = int(self.outcome.hits[number])
        before = time.perf_counter()
        if not self.outcome.front[number]:
            held = min(held, self._warehouse.lookup(model, names))
        if held < len(chain):
            self._put(number, model, names.slice(held, len(chain)), chain[held:])
        self.outcome.put_s += time.perf_counter() - before
        self._touch(number, model, names)

    def _touch(self, number: int, model: Model, names: Names) -> None:
        """Say that a request has used all its blocks, wherever they were, and how it ended."""
        served = self._setup.front_blocks and self.outcome.front[number]
        if self._setup.touch and (served or self._setup.hints is not Hints.NONE):
            before = time.perf_counter()
            self._warehouse.touch(model, names, self._hint(number, ended=True))
            self.outcome.touch_s += time.perf_counter() - before

    def _named(self, number: int, chain: IntArray) -> tuple[Model, Names]:
        """The model of a request, and the names of its *chain* there."""
        owner = (int(self._stream.tenant[number]), int(self._stream.model[number]))
        return self._models[owner], self._naming.names(chain, owner)

    def _put(self, number: int, model: Model, names: Names, chain: IntArray) -> None:
        """Store the blocks of *chain*, as many of the first as there is room for."""
        hint = self._hint(number, ended=False)
        for at in range(0, len(chain), PUT_BLOCKS):
            part = chain[at : at + PUT_BLOCKS]
            payloads = [self._payloads.of(block) for block in part.tolist()]
            try:
                done = self._warehouse.put(
                    model, names.slice(at, at + len(part)), payloads, hint=hint
                )
            except WarehouseFull:
                self.outcome.refused[number] += len(chain) - at
                break
            published = done.outcomes.count(PutOutcome.PUBLISHED)
            self.outcome.published[number] += published
            self.outcome.refused[number] += len(part) - published
            if done.held < len(part):
                self.outcome.refused[number] += len(chain) - at - len(part)
                break
        self._warehouse.operate("settle")

    def _read(self, match: Any, chain: IntArray) -> None:
        """Read what was matched and compare every byte; DeviceError if one is wrong."""
        step = max(1, READ_BYTES // self._payload_bytes)
        buffers = [np.empty(self._payload_bytes, np.uint8) for _ in chain[:step]]
        for at in range(0, len(chain), step):
            part = chain[at : at + step]
            into = buffers[: len(part)]
            report = match.read_into(into, first=match.blocks - len(chain) + at)
            for block, buffer, found in zip(part.tolist(), into, report.outcomes, strict=True):
                if found is not ReadOutcome.HIT or not self._payloads.is_of(block, buffer):
                    raise DeviceError(f"block {block} of the trace was read back as {found}")
        self.outcome.read_blocks += len(chain)

    def finish(self) -> None:
        """Check the warehouse, and that what was counted here is what it holds."""
        outcome, warehouse = self.outcome, self._warehouse
        outcome.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = warehouse.check(data=True)
        outcome.findings = [f"I{each.invariant}: {each.text}" for each in report.findings]
        outcome.statistics = warehouse.statistics()
        counters, space = outcome.statistics["counters"], warehouse.space()
        outcome.evicted_blocks = counters["evicted_blocks"]
        outcome.total_bytes = space.total_bytes
        outcome.used_bytes = space.total_bytes - space.free_bytes
        outcome.metadata_bytes = outcome.statistics["metadata"]["file_bytes"]
        if self._setup.advised_blocks:
            outcome.advice = self._advice()
        published = int(outcome.published.sum())
        left = published - outcome.evicted_blocks - counters["removed_blocks"]
        sums = {
            "published blocks": (published, counters["published_blocks"]),
            "blocks left": (left, report.blocks),
            "used bytes": (left * outcome.unit_bytes, outcome.used_bytes),
        }
        outcome.findings += [
            f"{what}: {mine:,} by the replay, {its:,} by the warehouse"
            for what, (mine, its) in sums.items()
            if mine != its
        ] + self._usage()

    def _advice(self) -> dict[str, Any]:
        """What `twfs advise` says of the requests, for the capacities that were asked about."""
        now = msgspec.convert(self._warehouse.operate("record"), Live, str_keys=True)
        unit = self._setup.unit_bytes
        sizes = tuple(blocks * unit for blocks in self._setup.advised_blocks)
        return advise(read_record(Path(now.record)), now, Wishes(sizes))

    def _usage(self) -> list[str]:
        """Whether what `twfs du` says of tenants, models and sessions adds up to what is used."""
        found = []
        for by in By:
            usage = msgspec.convert(self._warehouse.operate("du", by=by.value), Usage)
            if not usage.adds_up or usage.used_bytes != self.outcome.used_bytes:
                found.append(
                    f"the rows by {by} do not add up to the {self.outcome.used_bytes:,} bytes "
                    f"used, of which twfs du knows {usage.used_bytes:,}"
                )
        return found

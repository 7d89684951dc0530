"""The worker's side of an engine: blocks between its memory and the store, many jobs at once.

A job is a list of (memory, block). A load has a deadline, so it comes through the reader's own
memory (GPU memory where cuFile serves); what did not come is told block by block, and after the
deadline nothing is written any more. A store is done for the engine when its memory has been read;
publishing follows. Thread-safe; submitting never blocks, and a failure is a result, never an
exception.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from twfs.checksums import loaded_torch
from twfs.copying import Copying
from twfs.engines.attaching import Attachment
from twfs.engines.finding import Held, names_in
from twfs.errors import InvalidInput
from twfs.hints import NO_HINT, Hint
from twfs.prefix import Names, joined
from twfs.store import LeasedMatch, Model, Pieces, PutResult

LOADERS: Final = 4  # loads at once: each reads its blocks in parallel itself
URGENT_LOADERS: Final = 2  # that a step waits for, so they stand in no queue
STORERS: Final = 4  # stores at once: they mostly wait for commits
GRACE_S: Final = 0.2  # that a store which is being copied gets before it is given up
LOAD_SECONDS_MAX: Final = 2.0  # then computing is sooner done, whatever the estimate says


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks to store, each the parent of the next: engine's keys, and the place of the first.

    Named by who stores them, in *epoch* and none other: KV of older weights must not enter it.
    """

    keys: tuple[bytes, ...]
    parent: bytes | None  # of the first; None: it begins a chain
    index: int  # of the first in its chain


@dataclass(frozen=True, slots=True)
class Offer:
    """What one store job offers: runs of blocks of one request."""

    runs: tuple[Run, ...]
    epoch: int
    tenant: str | None = None
    hint: Hint = NO_HINT
    public: int = 0  # leading blocks of the request's chain that are the share group's
    since: bytes = b""  # the Finder's

    @property
    def blocks(self) -> int:
        """How many blocks."""
        return sum(len(run.keys) for run in self.runs)

    def names(self, model: Model, block_tokens: int) -> Names:
        """The blocks' names in *model*; InvalidInput on a key that is none."""
        return joined(
            [
                names_in(
                    model,
                    run.keys,
                    run.parent,
                    run.index,
                    block_tokens,
                    public=self.public,
                    since=self.since,
                )
                for run in self.runs
            ]
        )


def runs_of(chain: Sequence[bytes], indices: Sequence[int]) -> tuple[Run, ...]:
    """Return the blocks *indices* (ascending) of a *chain* of keys as runs."""
    return tuple(run_of(chain, indices[at], stop - at) for at, stop in stretches(indices))


def run_of(chain: Sequence[bytes], first: int, count: int) -> Run:
    """Return *count* blocks of a *chain* of keys, from place *first* on."""
    parent = chain[first - 1] if first else None
    return Run(tuple(chain[first : first + count]), parent, first)


def stretches(places: Sequence[int]) -> list[tuple[int, int]]:
    """Where in *places* (ascending) neighbours begin, and where they stop."""
    if not places or places[-1] - places[0] == len(places) - 1:
        return [(0, len(places))] if places else []
    gaps = [at for at, (one, other) in enumerate(pairwise(places), 1) if other != one + 1]
    return list(pairwise((0, *gaps, len(places))))


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a job. Of a load: the leading blocks that are right; all others are not."""

    job: int
    store: bool
    blocks: int  # loaded; of a store all, since the engine need not know
    asked: int
    payload_bytes: int
    seconds: float


@dataclass(slots=True)
class _Job:
    store: bool
    asked: int
    begun_s: float
    copying: Copying = field(default_factory=Copying)  # done when the memory is the engine's again


class Transfers:
    """Jobs of one worker; see the module's docstring. *shard* is the worker's rank."""

    def __init__(
        self, attachment: Attachment, *, shard: int = 0, block_tokens: int | None = None
    ) -> None:
        self._attachment = attachment
        self._shard = shard
        self._block_tokens = block_tokens or attachment.layout.block_tokens
        self._loaders = ThreadPoolExecutor(LOADERS, "twfs-load")
        self._urgent = ThreadPoolExecutor(URGENT_LOADERS, "twfs-urgent")
        self._storers = ThreadPoolExecutor(STORERS, "twfs-store")
        self._changed = threading.Condition()
        self._jobs: dict[int, _Job] = {}
        self._finished: list[Done] = []
        self._closed = False

    def load(
        self, job: int, held: Held | LeasedMatch, destinations: Sequence[Pieces], *,
        group: int = 0, first: int | None = None, timeout_s: float = LOAD_SECONDS_MAX,
        urgent: bool = False, asked: int | None = None,
    ) -> None:  # fmt: skip
        """Begin to load one block into each of *destinations*, from *held*'s first (*first*) on.

        *held* is a lease to be joined, released here at the end, or a match, which stays the
        caller's. Within *timeout_s* seconds from now the job is in `finished`, as one that *asked*
        for so many blocks.
        """
        entered = self._enter(job, store=False, asked=asked or len(destinations))
        after = _events_of(destinations)
        deadline_s = entered.begun_s + timeout_s
        first = held.first if isinstance(held, Held) else first

        def read(match: LeasedMatch) -> tuple[int, int]:
            return self._read(match, destinations, group, first, deadline_s)

        def work() -> None:
            blocks, read_bytes = self._attachment.quietly(
                "a load failed",
                lambda: self._load(held, read, after),
                (0, 0),
            )
            self._end(job, blocks, read_bytes)

        self._submit(self._urgent if urgent else self._loaders, work, job)

    def _load(
        self, held: Held | LeasedMatch, read: Callable[[LeasedMatch], tuple[int, int]],
        after: Sequence[Any],
    ) -> tuple[int, int]:  # fmt: skip
        """Have *read* read, on a thread of ours; it tells the leading blocks and their bytes."""
        for event in after:
            event.synchronize()
        if not isinstance(held, Held):
            return read(held)
        if not held.token:
            self._attachment.count("loads without a lease")
            return 0, 0
        self._attachment.model(held.tenant)  # a lease is joined on a model that is known
        with self._attachment.store.join(held.token) as match:
            return read(match)

    def _read(
        self, match: LeasedMatch, destinations: Sequence[Pieces], group: int, first: int | None,
        deadline_s: float,
    ) -> tuple[int, int]:  # fmt: skip
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            self._attachment.count("loads that were late before they began")
            return 0, 0
        report = match.read_into(
            destinations, group=group, shard=self._shard, first=first, timeout_s=left_s
        )
        if report.blocks < len(destinations):
            self._attachment.complain("a load was short", report.outcomes[report.blocks])
        return report.blocks, report.payload_bytes

    def fail(self, job: int, asked: int) -> None:
        """Enter a load that failed before it began."""
        self._enter(job, store=False, asked=asked)
        self._end(job, 0, 0)

    def store(
        self, job: int, offer: Offer, payloads: Sequence[Pieces], *, group: int = 0,
        stored: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Begin to store one payload per block of *offer*; `finished` when they have been read.

        *stored* is told, on a thread of ours, how many leading blocks are held in the end; never
        of a store that came after `close`.
        """
        entered = self._enter(job, store=True, asked=len(payloads))
        copied_bytes = len(payloads) * self._attachment.layout.block_bytes(group)
        entered.copying = Copying(lambda: self._end(job, len(payloads), copied_bytes))
        after = _events_of(payloads)

        def work() -> None:
            held = 0
            try:
                if not entered.copying.given_up:
                    held = self._attachment.quietly(
                        "a store failed",
                        lambda: self._store(offer, payloads, group, entered.copying, after),
                        0,
                    )
            finally:
                entered.copying.finish()
                stored(held)

        self._submit(self._storers, work, job)

    def _store(
        self, offer: Offer, payloads: Sequence[Pieces], group: int, copying: Copying,
        after: Sequence[Any],
    ) -> int:  # fmt: skip
        """Put, on a thread of ours; returns how many leading blocks are held."""
        for event in after:
            event.synchronize()
        model = self._attachment.model(offer.tenant, epoch=offer.epoch)
        if model is None:
            self._attachment.count("stores without a model")
            return 0
        names = offer.names(model, self._block_tokens)
        if len(names) != len(payloads):
            raise InvalidInput(f"{len(payloads)} payloads for {len(names)} names")
        result: PutResult = self._attachment.store.put(
            model, names, payloads, group=group, shard=self._shard, copying=copying,
            hint=offer.hint,
        )  # fmt: skip
        self._attachment.count("stored blocks", result.held)
        if result.held < len(payloads):
            self._attachment.complain("a store was short", result.outcomes[result.held])
        return result.held

    def _enter(self, job: int, *, store: bool, asked: int) -> _Job:
        with self._changed:
            entered = self._jobs[job] = _Job(store, asked, time.monotonic())
            return entered

    def _submit(self, executor: ThreadPoolExecutor, work: Callable[[], None], job: int) -> None:
        """Hand *work* to a thread; once closed, the job has failed."""
        try:
            executor.submit(work)
        except RuntimeError:
            self._end(job, 0, 0)

    def _end(self, job: int, blocks: int, payload_bytes: int) -> None:
        """Note that the memory of *job* is the engine's again."""
        with self._changed:
            ended = self._jobs.pop(job)
            seconds = time.monotonic() - ended.begun_s
            self._finished.append(
                Done(job, ended.store, blocks, ended.asked, payload_bytes, seconds)
            )
            self._changed.notify_all()

    def finished(self) -> list[Done]:
        """What has finished since the last call."""
        with self._changed:
            finished, self._finished = self._finished, []
            return finished

    def wait(self, jobs: Collection[int]) -> None:
        """Return when no job uses the engine's memory: loads by their deadline, stores soon.

        A store that has not been copied after a moment is given up, for it may wait for room.
        """
        deadline_s = time.monotonic() + GRACE_S
        while True:
            with self._changed:
                under_way = [self._jobs[job] for job in jobs if job in self._jobs]
                left_s = deadline_s - time.monotonic()
                if not under_way:
                    return
                if left_s > 0 or all(each.copying.given_up for each in under_way):
                    self._changed.wait(left_s if left_s > 0 else None)
                    continue
            for each in under_way:  # without the lock: one that has not begun ends in the call
                each.copying.give_up()

    def drain(self) -> None:
        """Wait for all jobs: whoever gives memory back to its device must call this first."""
        with self._changed:
            jobs = list(self._jobs)
        self.wait(jobs)

    def close(self) -> None:
        """Wait for all jobs and end the threads. Idempotent."""
        self._closed = True
        self.drain()
        for executor in (self._loaders, self._urgent, self._storers):
            executor.shutdown()


def _events_of(memory: Sequence[Pieces]) -> list[Any]:
    """Record an event on the caller's stream of each GPU: its work on *memory* comes first."""
    torch = loaded_torch()
    if torch is None or not torch.cuda.is_initialized():
        return []
    devices = {
        piece.device
        for pieces in memory
        for piece in (pieces if isinstance(pieces, list | tuple) else (pieces,))
        if isinstance(piece, torch.Tensor) and piece.device.type == "cuda"
    }
    events = []
    for device in devices:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return events

"""The scheduler's side of an engine: which blocks of each waiting request the store holds.

All keys of a request go in one message when it is first asked for. The answer comes on a thread of
its own; the scheduler waits half a millisecond at most, and looks again in its next step. One lease
per request serves all its asks until it ends. Names of blocks are the engine's own keys, each the
parent of the next. Used by one scheduler thread; nothing here raises because of the store.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Final

from twfs.engines.attaching import Attachment
from twfs.engines.requests import NO_PARAMS, Params
from twfs.prefix import Names, joined, names_of_run
from twfs.store import LeasedMatch, Model
from twfs.units import HASH_BYTES

ANSWER_SECONDS: Final = 0.0005  # that a step may wait for an answer, in all
LATER_SECONDS: Final = 0.005  # then an answer that ends has left the engine
NAMED_AT_ONCE: Final = 128  # keys: about 0.1 ms of one processor, then others may have Python
ASIDE_SECONDS: Final = 50e-6  # as long as a thread takes to wake; else this one has Python again
NAMED_SOON: Final = 128  # keys: of more no answer comes while a step may wait
BEHIND_PUBLIC: Final = b"behind public "  # enters the names of what goes on from public blocks
BEHIND_RESET: Final = b"behind reset "  # enters those of KV whose weights nobody can tell
RESET_BYTES: Final = 16  # random, so that two resets are never the same
RENEW_SECONDS: Final = 20.0  # a lease lasts 60 s; a request that waits longer is renewed


@dataclass(frozen=True, slots=True)
class Held:
    """Blocks under a lease, as a worker in another process needs to know them."""

    token: bytes
    first: int  # index in the request's chain of the first block to load
    count: int
    tenant: str | None = None


@dataclass(slots=True)
class _Asked:
    """One request: its latest ask and what came of it."""

    params: Params = NO_PARAMS
    keys: Sequence[bytes] = ()  # the engine's own, which may grow
    count: int = 0  # of these keys that were asked for
    last: bytes = b""  # of these: it proves all before it
    start: int = 0
    asked_s: float = 0.0
    step: int = 0  # of the engine's, in which it was asked
    number: int = 0  # of the ask: an answer to an older one is of no use
    pending: bool = False  # the store is being asked
    blocks: int | None = None  # that a match holds from the first on; None: no answer
    match: LeasedMatch | None = None
    renewed_s: float = 0.0
    names: Names | None = None  # of as many of its keys as were named
    model: Model | None = None  # under which they were named
    declined: bool = False  # nothing more is loaded for it
    answered: threading.Event = field(default_factory=threading.Event)


class Desk:
    """A thread that does one thing after the other for a scheduler that must not wait."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[tuple[float, Callable[[], None] | None]] = SimpleQueue()
        self._later: deque[tuple[float, Callable[[], None]]] = deque()
        self._working = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None], *, later: bool = False) -> None:
        """Have *work* done; it must not raise. *later* when the engine's own step is over."""
        self._queue.put((time.monotonic() + LATER_SECONDS if later else 0.0, work))

    def under_way(self) -> int:
        """How much was put and is not done, without what waits for later."""
        return self._queue.qsize() + self._working

    def close(self, timeout_s: float) -> None:
        """End when all that was put is done, or after *timeout_s* seconds. Idempotent."""
        self._queue.put((0.0, None))
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            self._working = True
            work()
            self._working = False
        for _, work in self._later:
            work()

    def _next(self) -> Callable[[], None] | None:
        """What is to be done next; None at the end."""
        while True:
            left_s = self._later[0][0] - time.monotonic() if self._later else None
            if left_s is not None and left_s <= 0:
                return self._later.popleft()[1]
            with suppress(Empty):
                due_s, work = self._queue.get(timeout=left_s)
                if work is None or not due_s:
                    return work
                self._later.append((due_s, work))


def names_in(
    model: Model, keys: Sequence[bytes], parent: bytes | None, first: int, block_tokens: int,
    *, public: int = 0, since: bytes = b"",
) -> Names:  # fmt: skip
    """Return the names of *keys*, each the parent of the next, at places from *first* on.

    The first *public* blocks of their chain are the share group's, if *model* was opened for a
    member; what is behind them is the tenant's own, and found only behind as many of them. *since*
    is a Finder's: then nothing is shared. InvalidInput on a key that is none.
    """
    ends = range(block_tokens * (first + 1), block_tokens * (first + len(keys)) + 1, block_tokens)
    if since or not public or not model.public_salt:
        return names_of_run(model.root(since), keys, parent, ends)
    cut = min(max(0, public - first), len(keys))
    shared, own = model.root(public=True), model.root(BEHIND_PUBLIC + public.to_bytes(4, "little"))
    head = replace(names_of_run(shared, keys[:cut], parent, ends[:cut]), public=cut)
    above = keys[cut - 1] if cut else parent
    rest = names_of_run(own, keys[cut:], above, ends[cut:])
    if len(rest) and first + cut == public and above is not None:
        linked = names_of_run(shared, [above], None, [0]).hashes + rest.parents[HASH_BYTES:]
        rest = replace(rest, parents=linked)
    return joined([head, rest])


def name_keys(
    model: Model, keys: Sequence[bytes], first: int, stop: int, block_tokens: int, *,
    public: int = 0, since: bytes = b"",
) -> Names:  # fmt: skip
    """Return the names of *keys* from *first* up to *stop*, letting other threads run meanwhile."""
    parts = []
    for at in range(first, stop, NAMED_AT_ONCE):
        end = min(at + NAMED_AT_ONCE, stop)
        above = keys[at - 1] if at else None
        parts.append(
            names_in(model, keys[at:end], above, at, block_tokens, public=public, since=since)
        )
        if end < stop:
            time.sleep(ASIDE_SECONDS)
    return joined(parts)


class Finder:
    """What the store holds of each request; see the module's docstring.

    Per request: admit, ask (often), held and loaded (per load), finish. *block_tokens* are those of
    one key. With *ahead* reads into this process's memory begin with the answer: the engine asks
    for them a step later.
    """

    def __init__(
        self, attachment: Attachment, block_tokens: int, *, answer_s: float = ANSWER_SECONDS,
        ahead: bool = False,
    ) -> None:  # fmt: skip
        self._attachment = attachment
        self._block_tokens = block_tokens
        self._answer_s = answer_s
        self._ahead = ahead
        self._requests: dict[str, _Asked] = {}
        self._step = 0
        self._waited_step = -1
        self._took_s = 0.0  # the latest answer
        self._resetting = False  # a new epoch is wanted and not there yet
        self.since = b""  # tells the names of what is stored since a reset; see there
        self._lock = threading.Lock()  # between an answer and who does not want it any more
        self._desk = Desk("twfs-finder")

    def admit(self, request: str, params: Params = NO_PARAMS) -> None:
        """Note a new request; one that is asked for without this has no parameters."""
        self._requests[request] = _Asked(params)
        if self._attachment.epoch(params.tenant) is None:
            self._desk.put(lambda: self._open(params.tenant))

    def _open(self, tenant: str | None) -> None:
        self._attachment.model(tenant)

    def params(self, request: str) -> Params:
        """What *request* said of itself."""
        asked = self._requests.get(request)
        return NO_PARAMS if asked is None else asked.params

    def ask(self, request: str, keys: Sequence[bytes], start: int) -> int | None:
        """How many of *keys*, from the first on, the engine may count on; None: ask again.

        It holds *start* of them itself, so *start* is a miss. The blocks behind stay leased until
        `finish`, or until an ask that needs another lease. What is not answered within the
        attachment's patience is a miss. *keys* are not copied: there may be thousands.
        """
        asked = self._requests.get(request)
        if asked is None:
            asked = self._requests[request] = _Asked()
        if self._resetting:
            self._desk.put(self._reset)
            return start
        if asked.declined or start >= len(keys):
            return start
        if not _serves(asked, keys, start):
            self._begin(asked, keys, start)
        if asked.blocks is None:
            self._wait(asked)
        if asked.blocks is None:
            if time.monotonic() - asked.asked_s <= self._attachment.patience_s:
                return None
            self._release(asked)  # a late answer goes with it
            asked.blocks = start
            self._attachment.count("unanswered asks")
        self._keep(asked)
        return max(start, min(asked.blocks, len(keys)))

    def _wait(self, asked: _Asked) -> None:
        """Give the answer a moment, once per step, if it may come in it.

        In that of the ask it does where the answer before did: a daemon that has slept is later.
        """
        unnamed = asked.count - (0 if asked.names is None else len(asked.names))
        if unnamed > NAMED_SOON or self._desk.under_way() > 1:
            return
        fresh = asked.step == self._step
        if self._waited_step < self._step and not (fresh and self._took_s > self._answer_s):
            self._waited_step = self._step
            asked.answered.wait(self._answer_s)

    def next_step(self) -> None:
        """A step of the engine's scheduler is over: an ask of the next may wait."""
        self._step += 1

    def _begin(self, asked: _Asked, keys: Sequence[bytes], start: int) -> None:
        """Have the store asked; what was leased before is let go."""
        self._release(asked)
        asked.keys, asked.count, asked.last = keys, len(keys), keys[-1]
        asked.start, asked.asked_s, asked.step = start, time.monotonic(), self._step
        asked.answered.clear()
        asked.pending = True
        number = asked.number
        self._desk.put(lambda: self._answer(asked, number))

    def _answer(self, asked: _Asked, number: int) -> None:
        """Match, on the desk's thread."""
        patience_s = self._attachment.patience_s
        if asked.number != number or time.monotonic() - asked.asked_s > patience_s:
            return  # nobody waits for it any more, or not long enough
        match = self._attachment.quietly("a match failed", lambda: self._match(asked), None)
        with self._lock:
            wanted = asked.number == number
            self._took_s = time.monotonic() - asked.asked_s
            if wanted:
                asked.pending = False
                asked.match, asked.renewed_s = match, time.monotonic()
                asked.blocks = asked.start if match is None else match.blocks
                asked.answered.set()
        if not wanted:
            self._drop(match)
        elif match is None or not match.token:
            self._attachment.doubt(asked.params.tenant)
        elif self._ahead:
            self._attachment.quietly("a read ahead failed", match.read_ahead, None)

    def _match(self, asked: _Asked) -> LeasedMatch | None:
        keys = asked.keys[: asked.count]  # at once: the engine may take keys back meanwhile
        if len(keys) < asked.count or keys[-1] != asked.last:
            return None  # it has: what was asked for is not of interest any more
        names = self._named(asked, keys)
        if names is None or asked.model is None:
            return None
        return self._attachment.store.match(asked.model, names, start=asked.start)

    def _named(self, asked: _Asked, keys: Sequence[bytes]) -> Names | None:
        """The names of *keys*, which nobody changes now; None: no model.

        Those named before are not named again.
        """
        model = self._attachment.model(asked.params.tenant)
        if model is None:
            return None
        known = asked.names if asked.model == model else None
        first, count = 0 if known is None else len(known), len(keys)
        last = min(first, count) - 1
        if known is not None and last >= 0 and known.keys[last] != keys[last]:
            known, first = None, 0  # an engine whose user goes on otherwise takes keys back
        if known is None or first < count:
            public = asked.params.public_tokens // self._block_tokens
            if public and not model.public_salt:
                self._attachment.complain("public tokens without a share group", model.name)
            more = name_keys(
                model, keys, first, count, self._block_tokens, public=public, since=self.since
            )
            known = more if known is None else joined([known, more])
            asked.names, asked.model = known, model
        return known.head(count)

    def _keep(self, asked: _Asked) -> None:
        """Renew the lease of a request that waits for long."""
        now_s = time.monotonic()
        match = asked.match
        if match is not None and now_s - asked.renewed_s > RENEW_SECONDS:
            asked.renewed_s = now_s
            self._desk.put(lambda: self._renew(asked, match))

    def _renew(self, asked: _Asked, match: LeasedMatch) -> None:
        if asked.match is match and not self._renewed(match):
            asked.blocks = asked.start  # over: a load would fail
            self._attachment.count("leases that ended while a request waited")

    def _renewed(self, match: LeasedMatch) -> bool:
        return bool(self._attachment.quietly("a renewal failed", match.renew, None))

    def held(self, request: str, first: int, count: int) -> Held | None:
        """What a worker needs to load *count* blocks from *first* on; None if they are not held."""
        asked = self._requests.get(request)
        if asked is None or asked.match is None or asked.blocks is None:
            return None
        if not asked.start <= first <= first + count <= asked.blocks:
            return None
        return Held(asked.match.token, first, count, asked.params.tenant)

    def match(self, request: str) -> LeasedMatch | None:
        """The lease itself, for a worker in this process; it stays this finder's."""
        asked = self._requests.get(request)
        return None if asked is None else asked.match

    def epoch(self, request: str) -> int | None:
        """The epoch that blocks of *request* are stored in; None as long as nobody has said."""
        return None if self._resetting else self._attachment.epoch(self.params(request).tenant)

    def loaded(self, request: str) -> None:
        """Let go of the lease of *request*: its load has ended."""
        asked = self._requests.get(request)
        if asked is not None:
            self._release(asked)

    def decline(self, request: str) -> None:
        """Let every later ask of *request* be a miss: its load failed, or would not pay."""
        asked = self._requests.get(request)
        if asked is not None:
            asked.declined = True
            self._release(asked)

    def finish(self, request: str, keys: Sequence[bytes]) -> None:
        """End *request*, whose whole chain is *keys*: one touch for all of it, no more lease.

        *keys* stay as they are from now on.
        """
        asked = self._requests.pop(request, None)
        if asked is None:
            return
        self._release(asked, later=True)
        if keys:
            touch = lambda: self._touch(asked, keys)  # noqa: E731
            self._desk.put(
                lambda: self._attachment.quietly("a touch failed", touch, None), later=True
            )

    def _touch(self, asked: _Asked, keys: Sequence[bytes]) -> None:
        names = self._named(asked, keys[:])
        if names is not None and asked.model is not None:
            self._attachment.store.touch(asked.model, names, asked.params.hint)

    def _release(self, asked: _Asked, *, later: bool = False) -> None:
        """Let go of the lease; what was answered is over with it."""
        with self._lock:
            asked.number += 1
            asked.pending, asked.blocks = False, None
            match, asked.match = asked.match, None
        if match is not None:
            self._desk.put(lambda: self._drop(match), later=later)

    def _drop(self, match: LeasedMatch | None) -> None:
        if match is not None:
            self._attachment.quietly("a release failed", match.release, None)

    def reset(self) -> None:
        """Open a new epoch and forget every answer.

        Until the store has said so, all is a miss and nothing is to be stored; a store that does
        not answer is asked again with every ask. The weights may be others from now on than the
        model's files say. So what this engine stores gets names that no other finds, nor this one
        after a restart: these have the weights of the files.
        """
        self._resetting, self.since = True, BEHIND_RESET + os.urandom(RESET_BYTES)
        for asked in self._requests.values():
            self._release(asked)
            asked.names = asked.model = None
        self._desk.put(self._reset)

    def _reset(self) -> None:
        if self._resetting and self._attachment.new_epoch():
            self._resetting = False

    def close(self) -> None:
        """Release all leases. Idempotent."""
        for asked in self._requests.values():
            self._release(asked)
        self._requests.clear()
        self._desk.close(self._attachment.patience_s * 4)


def _serves(asked: _Asked, keys: Sequence[bytes], start: int) -> bool:
    """Tell whether what is being asked, or was answered, says all of *keys* from *start* on."""
    if not (asked.pending or asked.blocks is not None) or start < asked.start:
        return False
    if len(keys) > asked.count and asked.blocks == asked.count:
        return False  # all that was asked for is there, and there is more to ask for
    if len(keys) < asked.count:
        return keys[-1] == asked.keys[len(keys) - 1]
    return keys[asked.count - 1] == asked.last

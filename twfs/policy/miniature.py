"""What a warehouse of another size would have held: a small one, of sampled blocks, by its rules.

A miniature (Waldspurger et al., "Cache Modeling and Optimization using Miniature Simulations",
USENIX ATC 2017) holds the blocks that the record keeps, in the same part of the space. It is no
stack of distances: what a request misses enters when its answer has ended, so what is missing, and
what meanwhile takes no room, depends on the size.

Blocks that one event used lie in one *run*: one chain's, of one age, one end and one session, thus
of one score. Tails of runs go. What is not simulated: classes, quotas, admission, what a session
says of its return, and blocks that come or go by the operator's hand.
"""

import heapq
from collections.abc import Iterator
from typing import Final

import numpy as np

from twfs.policy.accesses import AGAIN_MS, CODE_MASK, PUT_SOON, USED_NOW, Kind
from twfs.policy.asking import Asked, Bools, Floats, Ints
from twfs.policy.scoring import Policy, Reuse
from twfs.units import ALIGN

RUNS_PER_ROW: Final = 4
LOOKED_AT: Final = 64  # runs put in order at first: few are wanted mostly
NONE: Final = -1


def parents_of(asked: Asked) -> Ints:
    """The sampled block before each block in its chain; NONE for the first, or if no row tells."""
    chain = asked.block
    begins = np.zeros(len(chain), np.bool_)
    begins[asked.first[:-1]] = True
    parent = np.full(int(chain.max(initial=-1)) + 1, NONE, np.int64)
    inner = np.flatnonzero(~begins)
    parent[chain[inner]] = chain[inner - 1]
    return parent


def simulate(asked: Asked, capacity_bytes: float, policy: Policy) -> Bools:
    """Which of the (a,) samples that were asked for a warehouse of that capacity had held."""
    if not len(asked.block):
        return np.zeros(0, np.bool_)
    return _Miniature(asked, capacity_bytes, policy).run()[asked.at]


class _Miniature:
    """One simulation under way."""

    def __init__(self, asked: Asked, capacity_bytes: float, policy: Policy) -> None:
        self._asked, self._policy = asked, policy
        self._rows = asked.record.rows
        self._capacity = capacity_bytes
        self._room = capacity_bytes * asked.rate
        count = int(asked.block.max()) + 1
        owner = np.repeat(np.arange(len(self._rows)), self._rows["samples"])
        self._size = np.zeros(count)
        self._size[asked.block] = self._rows["units"][owner].astype(np.float64) * ALIGN
        self._position = np.zeros(count, np.int64)
        tokens = self._rows["tokens"][owner].astype(np.int64)
        self._position[asked.block] = (asked.record.samples["index"] + np.int64(1)) * tokens
        self._parent = parents_of(asked)
        self._children = np.zeros(count, np.int64)  # that are held
        self._run_of = np.full(count, NONE, np.int64)  # of blocks that are held
        self._total = 0.0
        runs = RUNS_PER_ROW * len(self._rows) + 1
        self._blocks: list[Ints] = []  # of each run when it was made, by depth
        self._left = np.zeros(runs, np.int64)  # how many are there still
        self._used_ms = np.zeros(runs)
        self._stop = np.zeros(runs, np.int64)
        self._session = np.zeros(runs, np.int64)
        self._score = np.zeros(runs)
        self._last = np.zeros(runs, np.int64)  # block of each
        self._alive = np.zeros(runs, np.int64)  # runs, some of which have nothing left
        self._alive_count = 0
        self._latest_ms = np.zeros(len(self._rows))  # when each session was heard of

    def run(self) -> Bools:
        """Every row; which of the (m,) samples were held."""
        asked, rows = self._asked, self._rows
        held = np.zeros(len(asked.block), np.bool_)
        waits = self._waiting()
        times, stops, starts = (rows[each].tolist() for each in ("time_ms", "stop", "start"))
        sessions, of_match = asked.session.tolist(), asked.of_match.tolist()
        for row, kind in enumerate(rows["kind"].tolist()):
            ms, session, about = times[row], sessions[row], of_match[row]
            if kind == Kind.MATCH:
                span = slice(int(asked.first[row]), int(asked.first[row + 1]))
                held[span.start : span.start + self._match(row, span, ms, starts[row])] = True
                if not waits[row]:
                    self._end(asked.block[span], ms, 0, session, used=True, put=True)
            elif kind == Kind.END and about >= 0:
                chain = asked.block[asked.first[about] : asked.first[about + 1]]
                code, put = stops[row] & CODE_MASK, bool(waits[about])
                used = bool(stops[row] & USED_NOW) or (code > 0 and not put)
                self._end(chain, ms, code, session, used=used, put=put)
                waits[about] = False
            elif kind in {Kind.PUT, Kind.TOUCH}:
                chain = asked.block[asked.first[row] : asked.first[row + 1]]
                put = kind == Kind.PUT
                self._end(chain, ms, stops[row] & CODE_MASK, session, used=not put, put=put)
        return held

    def _waiting(self) -> Bools:
        """Matches whose first END brings what they missed; for all others it comes at once."""
        about, kinds = self._asked.of_match, self._rows["kind"]
        ends = np.flatnonzero((kinds == Kind.END) & (about >= 0))
        matches, first = np.unique(about[ends], return_index=True)
        ends = ends[first]
        soon = (self._rows["stop"][ends] & PUT_SOON) != 0
        waits = np.zeros(len(about), np.bool_)
        waits[matches] = ~soon | (self._rows["start"][ends] < AGAIN_MS)
        waits[kinds != Kind.MATCH] = False
        return waits

    def _match(self, row: int, span: slice, ms: int, start: int) -> int:
        """How many samples of the leading run are held; they are used now."""
        chain, session = self._asked.block[span], int(self._asked.session[row])
        unheard = self._asked.held_bytes[span] + self._size[chain] <= self._capacity
        if unheard.any():  # held before the record began
            self._enter(chain, self._leading(chain, unheard), ms, 0, session)
        count = self._leading(chain, None)
        if count and self._asked.record.samples["index"][span.start + count - 1] >= start:
            self._use(chain[:count], ms, 0, session)
        return count

    def _leading(self, chain: Ints, beside: Bools | None) -> int:
        """How many of *chain*, from its first on, are held, or are some of *beside*."""
        there = self._run_of[chain] != NONE
        if beside is not None:
            there = there | beside
        return len(chain) if there.all() else int(there.argmin())

    def _enter(self, chain: Ints, stop: int, ms: int, code: int, session: int) -> None:
        """Let in what is missing of the first *stop* of *chain*."""
        missing = chain[:stop][self._run_of[chain[:stop]] == NONE]
        if not len(missing):
            return
        self._total += float(self._size[missing].sum())
        parents = self._parent[missing]
        np.add.at(self._children, parents[parents >= 0], 1)
        self._use(missing, ms, code, session)

    def _end(
        self, chain: Ints, ms: int, code: int, session: int, *, used: bool, put: bool
    ) -> None:  # fmt: skip
        """A request has ended: *used* restamps what is held, *put* lets in what is missing."""
        count = self._leading(chain, None)
        above = int(self._parent[chain[0]])
        reachable = above < 0 or self._run_of[above] != NONE
        if put and reachable:
            self._enter(chain, len(chain), ms, code, session)
            count = len(chain)
        if used and count:
            self._use(chain[:count], ms, code, session)
        if used or put:
            self._latest_ms[session] = max(self._latest_ms[session], self._heard_ms(chain, ms))
        if self._total > self._room:
            self._make_room(ms)

    def _heard_ms(self, chain: Ints, ms: int) -> float:
        """When a session was heard of that has used *chain*: when its first block was."""
        run = int(self._run_of[chain[0]])
        return float(self._used_ms[run]) if run != NONE else float(ms)

    def _use(self, chain: Ints, ms: int, code: int, session: int) -> None:
        """Make *chain*, all of it held, a run of its own."""
        run = len(self._blocks)
        before = self._run_of[chain]
        np.subtract.at(self._left, before[before != NONE], 1)
        self._run_of[chain] = run
        self._blocks.append(chain)
        self._left[run] = len(chain)
        self._used_ms[run], self._stop[run], self._session[run] = ms, code, session
        self._last[run] = chain[-1]
        self._alive[self._alive_count] = run
        self._alive_count += 1

    def _make_room(self, ms: int) -> None:
        """Let go what is worth least, tails first, until the rest has room."""
        alive = self._alive[: self._alive_count]
        alive = alive[self._left[alive] > 0]
        self._alive_count = len(alive)
        self._alive[: self._alive_count] = alive
        scores = self._score[alive] = self._scores(alive, ms)
        turns = _in_order(alive, scores)
        rising: list[tuple[float, int]] = []  # runs whose tail has lost its last child
        run = next(turns, None)
        while self._total > self._room and (rising or run is not None):
            if rising and (run is None or rising[0][0] <= self._score[run]):
                self._shorten(heapq.heappop(rising)[1], rising)
            elif run is not None:
                self._shorten(run, rising)
                run = next(turns, None)

    def _shorten(self, run: int, rising: list[tuple[float, int]]) -> None:
        """Let go the tail of *run*, as far as nothing else hangs on it and room is wanted."""
        blocks = self._blocks[run]
        mine = blocks[self._run_of[blocks] == run]
        if not len(mine):
            return
        children = self._children[mine].copy()
        children[:-1] -= self._parent[mine[1:]] == mine[:-1]
        bound = np.flatnonzero(children > 0)
        tail = mine[int(bound[-1]) + 1 if len(bound) else 0 :][::-1]
        freed = np.cumsum(self._size[tail])
        tail = tail[: int(np.searchsorted(freed, self._total - self._room)) + 1]
        if not len(tail):
            return
        self._run_of[tail] = NONE
        self._left[run] -= len(tail)
        self._blocks[run] = stays = mine[: len(mine) - len(tail)]
        if len(stays):
            self._last[run] = stays[-1]
        self._total -= float(freed[len(tail) - 1])
        parents = self._parent[tail]
        np.subtract.at(self._children, parents[parents >= 0], 1)
        above = int(parents[-1])
        if above >= 0 and not self._children[above]:
            over = int(self._run_of[above])
            heapq.heappush(rising, (float(self._score[over]), over))

    def _scores(self, runs: Ints, ms: int) -> Floats:
        """What each of *runs* is worth at *ms*: as much as its last block."""
        used = self._used_ms[runs]
        if not isinstance(self._policy, Reuse):
            return used
        passed = self._latest_ms[self._session[runs]] > used
        values = self._policy.values(self._stop[runs], np.maximum(ms - used, 1.0), passed)
        return self._policy.deepened(values, self._position[self._last[runs]])


def _in_order(runs: Ints, scores: Floats) -> Iterator[int]:
    """Yield *runs*, the least score first; sorts few of many where few are wanted."""
    wanted = LOOKED_AT
    while len(runs):
        some = np.ones(len(runs), np.bool_)
        if len(runs) > wanted:
            some = scores <= np.partition(scores, wanted)[wanted]
        yield from runs[some][np.argsort(scores[some], kind="stable")].tolist()
        runs, scores = runs[~some], scores[~some]
        wanted *= 4

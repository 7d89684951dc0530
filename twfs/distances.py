"""Hit rates for any capacity from sampled reuse distances: SHARDS on chains of blocks.

The reuse distance of a block is what else was used since it was used last, in bytes; an LRU of more
has it still. Of 1 in n blocks all uses are known, so n times the distance among these is an
estimate of it without bias (Waldspurger et al., FAST '15).

A chain is a hit only as far as all of it is there. The warehouse evicts tails first, so the blocks
of one use stand in the order of their depth: what is deeper goes earlier, and distances grow along
a chain. So a block that is held has all before it held too, and counting blocks by their distance
counts leading runs. Where chains are put in pieces this holds but for a few blocks; each block has
therefore the largest distance up to its own depth.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twfs.accesses import LEVEL_MAX, Group, Kind
from twfs.units import ALIGN

ROWS_MAX: Final = 400_000  # looked at, one after the other: some 20 s
SAMPLES_MAX: Final = 6_000_000  # looked at: 0.5 GB
NEVER: Final = np.inf  # the distance of a block that was not used before
USUAL_DEVIATIONS: Final = 1.5  # from how many uses a sample should have; found on three traces
CONTINUES_PARTS: Final = 2  # a chain that shares half of what the one before had is its session

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Distances:
    """What a record says of reuse: arrays of a asked-for samples, and of n rows."""

    bytes: Floats  # (a,) NEVER if the block was not used before
    tokens: Floats  # (a,) that each sample stands for
    row: Ints  # (a,) whose it is
    block: Ints  # (a,) which block it is, as a small number
    size: Floats  # (a,) bytes of the block itself
    found: Bools  # (a,) it was held when it was asked for
    session: Ints  # (n,) rows that went on where another ended have its number
    footprint_bytes: float  # of all different blocks
    rate: float  # part of all blocks looked at

    def hits(
        self, capacity_bytes: float, asked_tokens: float, where: "Bools | slice" = slice(None)
    ) -> float:
        """The part of *asked_tokens* that an LRU of that capacity holds; of the samples *where*.

        A sample has a bit more or less of all uses than its rate; how much is known exactly. Of
        what is usual for a sample of these blocks the same part are hits as of them (a regression
        on the uses of each block). More is missing if a block that very many requests begin with
        is not in the sample: those are hits. 0 if there are no samples.
        """
        tokens, blocks = self.tokens[where], self.block[where]
        if not len(tokens) or not asked_tokens:
            return 0.0
        needed = self.bytes[where] + self.size[where]
        held = (needed <= capacity_bytes) & np.isfinite(needed)
        uses = np.bincount(blocks, weights=tokens)
        hits = np.bincount(blocks, weights=tokens * held, minlength=len(uses))
        spread = float(uses @ uses)
        off = asked_tokens - float(uses.sum()) / self.rate
        usual = USUAL_DEVIATIONS * (spread * (1 - self.rate)) ** 0.5 / self.rate
        ordinary = max(-usual, min(usual, off))
        found = float(hits.sum()) / self.rate + float(uses @ hits) / spread * ordinary
        return float(min(1.0, max(0.0, (found + off - ordinary) / asked_tokens)))


def within_bounds(record: Group) -> Group:
    """*record* thinned until looking at it takes seconds."""
    while (
        len(record.rows) > ROWS_MAX or len(record.samples) > SAMPLES_MAX
    ) and record.level < LEVEL_MAX:
        record = record.thinned(record.level + 1)
    return record


def distances_of(record: Group, held_bytes: float = 0.0) -> Distances:
    """The reuse distances in *record*, already within bounds.

    What was held when the record first hears of it was used before, nobody knows when; its distance
    is taken to be *held_bytes*, what the warehouse holds, or what was used since if that is more.
    """
    return _Stack(record, held_bytes).run()


class _Stack:
    """The rows by turns, and which of each one's samples no later row has used.

    A Fenwick tree over the rows sums what is left of those behind one: it was used since.
    """

    def __init__(self, record: Group, held_bytes: float) -> None:
        self._rows, self._record, self._held = record.rows, record, held_bytes
        self._scale = float(2**record.level)
        names, which = np.unique(record.samples["id"], return_inverse=True)
        self._block: Ints = which.reshape(-1).astype(np.int64)
        self._size = record.rows["units"].astype(np.float64) * ALIGN
        count = len(record.rows)
        self._owner = np.full(len(names), -1, np.int64)  # the row that used a block last
        self._place = np.zeros(len(names), np.int64)  # and where in it
        self._start = np.zeros(count, np.int64)  # place of the first that is left of each row
        self._tree = [0.0] * (count + 1)
        self._total = 0.0
        self._session = np.zeros(count, np.int64)
        self._footprint = 0.0

    def _add(self, row: int, byte_count: float) -> None:
        tree, at = self._tree, row + 1
        while at < len(tree):
            tree[at] += byte_count
            at += at & -at
        self._total += byte_count

    def _behind(self, row: int) -> float:
        """Bytes left of the rows after *row*."""
        tree, at, before = self._tree, row + 1, 0.0
        while at:
            before += tree[at]
            at &= at - 1
        return self._total - before

    def run(self) -> Distances:
        """Every row, and what it asked for."""
        rows = self._rows
        distances = np.full(len(self._block), NEVER)
        ends = np.cumsum(rows["samples"].astype(np.int64))
        for row, end in enumerate(ends.tolist()):
            first = end - int(rows["samples"][row])
            distances[first:end] = self._row(row, first, end)
        owner = np.repeat(np.arange(len(rows)), rows["samples"])
        index = self._record.samples["index"].astype(np.int64)
        asked = (rows["kind"][owner] == Kind.MATCH) & (index >= rows["start"][owner])
        mine = owner[asked]
        found = index[asked] < rows["stop"][mine]
        return Distances(
            distances[asked], rows["tokens"][mine].astype(np.float64), mine, self._block[asked],
            self._size[mine],
            found, self._session, self._footprint * self._scale, 1 / self._scale,
        )  # fmt: skip

    def _row(self, row: int, first: int, end: int) -> Floats:
        """Distances of one row's samples; it has used them now."""
        chain, size = self._block[first:end], self._size[row]
        owners, places = self._owner[chain], self._place[chain]
        count = end - first
        distances = np.full(count, NEVER)
        known = owners >= 0
        self._session[row] = self._session_of(row, first, owners, places)
        for owner in np.unique(owners[known]).tolist():
            mine = owners == owner
            taken = places[mine]
            own, start = self._size[owner], int(self._start[owner])
            distances[mine] = (self._behind(owner) + (taken - start) * own) * self._scale
            self._add(owner, -len(taken) * own)
            if int(taken.min()) == start:
                self._start[owner] = int(taken.max()) + 1
        fresh = count - int(known.sum())
        if fresh:
            self._unheard(row, first, known, distances)
        self._footprint += fresh * size
        self._owner[chain] = row
        self._place[chain] = np.arange(count)
        self._add(row, count * size)
        if self._rows["kind"][row] == Kind.MATCH:
            inside = int(np.searchsorted(
                self._record.samples["index"][first:end], self._rows["start"][row]
            ))  # fmt: skip
            distances[inside:] = np.maximum.accumulate(distances[inside:])
        return distances

    def _unheard(self, row: int, first: int, known: Bools, distances: Floats) -> None:
        """Give blocks that were held before the record heard of them a distance."""
        index = self._record.samples["index"][first : first + len(known)]
        held = ~known & (index < self._rows["stop"][row])
        distances[held] = max(self._held, self._total * self._scale)

    def _session_of(self, row: int, first: int, owners: Ints, places: Ints) -> int:
        """The row that began the session which *row* goes on with; itself if it begins one."""
        known = np.flatnonzero(owners >= 0)
        if not len(known):
            return row
        deepest = int(known[-1])
        before = int(owners[deepest])
        shared = int(self._record.samples["index"][first + deepest]) + 1
        went_on = int(places[deepest]) == int(self._rows["samples"][before]) - 1
        if went_on or shared * CONTINUES_PARTS >= int(self._rows["count"][before]):
            return int(self._session[before])
        return row


def live_sessions(record: Group, found: Distances, idle_ms: int, instants: int = 32) -> Any:
    """What sessions need that were heard of within *idle_ms*, at so many moments of the record.

    Their number, the mean bytes of the whole chain of one, and the bytes of all different blocks
    that they used; a dict of means over the moments, or None if the record is too short to say.
    """
    rows = record.rows
    use = np.flatnonzero(rows["kind"] != Kind.PUT)
    if len(use) < 2:
        return None
    times = rows["time_ms"].astype(np.int64)
    begin, end = int(times[use[0]]), int(times[use[-1]])
    moments = np.linspace(begin + min(idle_ms, (end - begin) // 2), end, instants).astype(np.int64)
    count = rows["count"].astype(np.float64)
    chain = count * rows["units"] * ALIGN
    # Rows without a sample are not there: each that is stands for those like it.
    weight = 1 / -np.expm1(np.log1p(-min(found.rate, 1 - 1e-12)) * np.maximum(count, 1))
    first = np.concatenate([[0], np.cumsum(rows["samples"].astype(np.int64))])
    sums = np.zeros(4)
    for moment in moments.tolist():
        a, b = (int(np.searchsorted(times, moment - ms, side="right")) for ms in (idle_ms, 0))
        window = use[(use >= a) & (use < b)]
        if not len(window):
            continue
        sessions, last = np.unique(found.session[window][::-1], return_index=True)
        latest = window[::-1][last]
        ids, at = np.unique(record.samples["id"][first[a] : first[b]], return_index=True)
        owner = np.searchsorted(first, at + first[a], side="right") - 1
        needed = float((rows["units"][owner].astype(np.float64) * ALIGN).sum()) / found.rate
        del ids, sessions
        live = float(weight[latest].sum())
        sums += (1, live, float((weight[latest] * chain[latest]).sum()), needed)
    moments_used, live, chains, needed = sums
    if not live:
        return None
    return {
        "idle_s": idle_ms / 1000,
        "sessions": live / moments_used,
        "chain_bytes": chains / live,
        "needed_bytes": needed / live,
        "working_set_bytes": needed / moments_used,
    }

"""What the access record says was asked for: of sampled blocks each use, and whose session it was.

Of 1 in n blocks all uses are known, so what is counted of them, times n, is an estimate without
bias of what all would show (SHARDS: Waldspurger et al., FAST '15).
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twfs.policy.accesses import LEVEL_MAX, Group, Kind
from twfs.units import ALIGN

ROWS_MAX: Final = 60_000  # looked at, one after the other
SAMPLES_MAX: Final = 1_500_000  # looked at, again for each capacity
NOT_HELD: Final = np.inf  # of a block that nobody held before the record heard of it
USUAL_DEVIATIONS: Final = 1.5  # from how many uses a sample should have; found on three traces
CONTINUES_PARTS: Final = 2  # a chain that shares half of what the one before had is its session

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Asked:
    """A record of n rows and m samples, of which a were asked for."""

    record: Group
    block: Ints  # (m,) which block each sample is, as a small number
    first: Ints  # (n + 1,) where the samples of each row begin
    held_bytes: Floats  # (m,) what a store must hold to have had it already; NOT_HELD
    session: Ints  # (n,) rows that went on where another ended have its number
    of_match: Ints  # (n,) the row of the match that an END ends; -1 for others, or if it is gone
    at: Ints  # (a,) the samples that were asked for
    row: Ints  # (a,) whose they are
    tokens: Floats  # (a,) that each stands for
    before: Bools  # (a,) it was used before, or held
    footprint_bytes: float  # of all different blocks

    @property
    def rate(self) -> float:
        """The part of all blocks that is looked at."""
        return 2.0**-self.record.level

    def hits(self, held: Bools, asked_tokens: float, where: "Bools | slice" = slice(None)) -> float:
        """The part of *asked_tokens* that was held, from which (a,) samples were; of those *where*.

        A sample has a bit more or less of all uses than its rate; how much is known exactly. Of
        what is usual for a sample of these blocks the same part are hits as of them (a regression
        on the uses of each block). More is missing if a block that very many requests begin with
        is not in the sample: those are hits. 0 if there are no samples.
        """
        tokens, blocks = self.tokens[where], self.block[self.at[where]]
        if not len(tokens) or not asked_tokens:
            return 0.0
        uses = np.bincount(blocks, weights=tokens)
        hits = np.bincount(blocks, weights=tokens * held[where], minlength=len(uses))
        spread = float(uses @ uses)
        off = asked_tokens - float(uses.sum()) / self.rate
        usual = USUAL_DEVIATIONS * (spread * (1 - self.rate)) ** 0.5 / self.rate
        ordinary = max(-usual, min(usual, off))
        found = float(hits.sum()) / self.rate + float(uses @ hits) / spread * ordinary
        return float(min(1.0, max(0.0, (found + off - ordinary) / asked_tokens)))


def within_bounds(record: Group) -> Group:
    """*record* thinned until looking at it for several capacities takes seconds."""
    while (
        len(record.rows) > ROWS_MAX or len(record.samples) > SAMPLES_MAX
    ) and record.level < LEVEL_MAX:
        record = record.thinned(record.level + 1)
    return record


def asked_of(record: Group, used_bytes: float = 0.0) -> Asked:
    """What *record*, already within bounds, says was asked for.

    What was held when the record first hears of it was used before, nobody knows when; a store has
    it if that holds *used_bytes*, which the warehouse does, or what was used since if that is more.
    """
    return _Walk(record, used_bytes).run()


class _Walk:
    """The rows by turns, and which row used each block last."""

    def __init__(self, record: Group, used_bytes: float) -> None:
        self._rows, self._record, self._used = record.rows, record, used_bytes
        names, which = np.unique(record.samples["id"], return_inverse=True)
        self._block: Ints = which.reshape(-1).astype(np.int64)
        count = len(record.rows)
        self._first = np.zeros(count + 1, np.int64)
        np.cumsum(record.rows["samples"], out=self._first[1:])
        self._owner = np.full(len(names), -1, np.int64)  # the row that used a block last
        self._place = np.zeros(len(names), np.int64)  # and where in it
        self._session = np.arange(count)
        self._held = np.full(len(self._block), NOT_HELD)
        self._before = np.zeros(len(self._block), np.bool_)
        self._footprint = 0.0

    def run(self) -> Asked:
        """Every row, and what it asked for."""
        rows, record = self._rows, self._record
        of_match = _matches_of(record, self._first)
        kinds = rows["kind"].tolist()
        for row, kind in enumerate(kinds):
            if kind == Kind.END:
                self._session[row] = self._session[of_match[row]] if of_match[row] >= 0 else row
            else:
                self._row(row, matched=kind == Kind.MATCH)
        owner = np.repeat(np.arange(len(rows)), rows["samples"])
        index = record.samples["index"]
        at = np.flatnonzero((rows["kind"][owner] == Kind.MATCH) & (index >= rows["start"][owner]))
        mine = owner[at]
        return Asked(
            record, self._block, self._first, self._held, self._session, of_match, at, mine,
            rows["tokens"][mine].astype(np.float64), self._before[at],
            self._footprint * 2**record.level,
        )  # fmt: skip

    def _row(self, row: int, *, matched: bool) -> None:
        """It has used its blocks now."""
        first, end = int(self._first[row]), int(self._first[row + 1])
        chain = self._block[first:end]
        owners, places = self._owner[chain], self._place[chain]
        known = owners >= 0
        self._session[row] = self._session_of(row, first, owners, places)
        if matched:
            held = ~known & (self._record.samples["index"][first:end] < self._rows["stop"][row])
            self._held[first:end][held] = max(self._used, self._footprint * 2**self._record.level)
            self._before[first:end] = known | held
        self._footprint += float((~known).sum()) * float(self._rows["units"][row]) * ALIGN
        self._owner[chain] = row
        self._place[chain] = np.arange(end - first)

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


def _matches_of(record: Group, first: Ints) -> Ints:
    """The row that each END refers to: of that time and length, with that least block; else -1."""
    rows, ids = record.rows, record.samples["id"]
    found = np.full(len(rows), -1, np.int64)
    if not len(rows):
        return found
    least = np.minimum.reduceat(ids, first[:-1]).tolist()
    times, starts = rows["time_ms"].tolist(), rows["start"].tolist()
    counts, kinds = rows["count"].tolist(), rows["kind"].tolist()
    known: dict[tuple[int, int, int], int] = {}
    for row, kind in enumerate(kinds):
        if kind == Kind.END:
            found[row] = known.get((times[row] - starts[row], counts[row], least[row]), -1)
        elif kind != Kind.PUT:
            known[times[row], counts[row], least[row]] = row
    return found


def live_sessions(found: Asked, idle_ms: int, instants: int = 32) -> Any:
    """What sessions need that were heard of within *idle_ms*, at so many moments of the record.

    Their number, the mean bytes of the whole chain of one, and the bytes of all different blocks
    that they used; a dict of means over the moments, or None if the record is too short to say.
    """
    record, rows = found.record, found.record.rows
    heard = np.where(rows["kind"] == Kind.END, found.of_match >= 0, rows["kind"] != Kind.PUT)
    use = np.flatnonzero(heard)
    if len(use) < 2:
        return None
    times = rows["time_ms"].astype(np.int64)
    begin, end = int(times[use[0]]), int(times[use[-1]])
    moments = np.linspace(begin + min(idle_ms, (end - begin) // 2), end, instants).astype(np.int64)
    count = rows["count"].astype(np.float64)
    chain = count * rows["units"] * ALIGN
    # Rows without a sample are not there: each that is stands for those like it.
    weight = 1 / -np.expm1(np.log1p(-min(found.rate, 1 - 1e-12)) * np.maximum(count, 1))
    first = found.first
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

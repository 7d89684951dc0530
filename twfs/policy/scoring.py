"""What a block is worth keeping: a policy gives each a score, and the least score goes first.

A policy only looks at the arrays of the slots. Which blocks may go at all, and in which order of
rank, is decided elsewhere (`ranking`).

`lru` is the time of the last use. `reuse` is the chance that the block is used again, for the time
that it is held until then: the highest return of holding it for any further time (Gittins' index).
It knows of a block how long ago it was used, how that request ended, whether its session has gone
on without it, and when its session said that it would be back. Two things follow that recency
cannot do: what has just been used need not be the best, since nobody is back within a second; and
a block that is not yet here may be worth less than all that are, so that it is not let in.
"""

import math
import struct
from itertools import pairwise
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from twfs.hints import Stop
from twfs.index.slots import IntArray, Slots

Scores = npt.NDArray[np.float64]

# Of sessions that are still away so long after their last request (seconds, from), how many are
# back in each second. Measured on one half of the sessions of coding agents in kv-cache-tester, and
# rounded; behind 512 s it matters no more how the request ended.
EDGES_S: Final = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536)
_LATE: Final = (5e-4, 1.7e-4, 6e-5, 2e-6, 2e-7, 1e-7)
_SOON: Final = {
    # Who does not say how requests end is not known to be back quickly: only recency counts.
    None: (0.047, 0.0465, 0.046, 0.0455, 0.045, 0.044, 3e-2, 1.7e-2, 1.1e-2, 5e-3, 2.6e-3, 8e-4),
    Stop.TOOL_USE: (2e-3, 3e-2, 0.11, 9e-2, 7e-2, 4.5e-2, 2.5e-2, 1.6e-2, 8e-3, 6e-3, 3.4e-3, 8e-4),
    Stop.END_TURN: (
        5e-4,
        6.2e-3,
        6.1e-3,
        6e-3,
        5.9e-3,
        2.3e-3,
        2.2e-3,
        2.1e-3,
        2e-3,
        1.6e-3,
        1.2e-3,
        8e-4,
    ),
}
LAST_S: Final = (
    131_072.0  # where the last span is taken to end; what is away longer fades with time
)
MONOTONE_S: Final = 64  # behind the hump of quick returns, longer away is worth less
PASSED_PART: Final = 1 / 256  # of the blocks that were passed over 0.4 % were used again
LATE_MS: Final = 10_000  # a session that says when it is back may be so much off
STEPS: Final = 32  # of the table in an octave of ages; between them it is a straight line
FRACTION_BITS: Final = 47  # of a float64's 52, below a step
OCTAVES: Final = 43  # ages up to 2 ** 43 ms, 278 years

_FLOAT: Final = struct.Struct("<d")
_BITS: Final = struct.Struct("<q")
_ONE: Final = 1023 * STEPS  # the step of 1.0
_FRACTION: Final = (1 << FRACTION_BITS) - 1
_TO_PART: Final = 1.0 / (1 << FRACTION_BITS)


def index_of(hazards: tuple[float, ...], edges_s: tuple[int, ...] = EDGES_S) -> list[float]:
    """The highest return of holding on, from each of *edges_s* on: chance by mean time held.

    *hazards*: returns a second in each span, of those still away.
    """
    widths = [b - a for a, b in zip(edges_s, (*edges_s[1:], LAST_S), strict=True)]
    found: list[float] = []
    for first in range(len(hazards)):
        away, back, held, best = 1.0, 0.0, 0.0, 0.0
        for hazard, width in zip(hazards[first:], widths[first:], strict=True):
            stays = math.exp(-hazard * width)
            back += away * (1 - stays)
            held += away * (1 - stays) / hazard
            away *= stays
            best = max(best, back / held)
        if found and edges_s[first] >= MONOTONE_S:
            best = min(best, 0.9 * found[-1])
        found.append(best)
    return found


def _table() -> Scores:
    """The index by stop code (rows) and by step of log time, from 1 ms on, in one array."""
    octave, step = np.divmod(np.arange(OCTAVES * STEPS + 1), STEPS)
    seconds = 2.0**octave * (1 + step / STEPS) / 1000
    middles = [1e-3, *(math.sqrt(a * b) for a, b in pairwise(EDGES_S[1:])), LAST_S]
    rows = []
    for stop in (None, *Stop):
        spans = _SOON.get(stop, _SOON[None]) + _LATE
        row = np.exp(np.interp(np.log(seconds), np.log(middles), np.log(index_of(spans))))
        rows.append(np.where(seconds > LAST_S, row * LAST_S / seconds, row))
    return np.concatenate(rows)


class Policy(Protocol):
    """How blocks of one rank are put in order."""

    @property
    def name(self) -> str:
        """What the configuration calls it."""

    def scores(self, slots: Slots, which: IntArray, now_ms: int) -> Scores:
        """The scores at *now_ms* of the blocks in the slots *which*. Hold the lock."""

    def score(self, slots: Slots, slot: int, now_ms: int) -> float:
        """The same for one block, without the cost of arrays."""

    def of_new(self, position: int, stop: Stop | None, return_ms: int | None) -> float:
        """The score of a block that is put now, by a request that says so of its end.

        It ends at *position*, in tokens.
        """


class Recency:
    """The least recently used goes first; stamps are milliseconds, which float64 holds exactly."""

    name: Final = "lru"

    def scores(self, slots: Slots, which: IntArray, now_ms: int) -> Scores:  # noqa: ARG002
        """The time of the last use."""
        return slots.stamp[which].astype(np.float64)

    def score(self, slots: Slots, slot: int, now_ms: int) -> float:  # noqa: ARG002
        """The time of the last use."""
        return float(slots.stamp[slot])

    def of_new(self, position: int, stop: Stop | None, return_ms: int | None) -> float:  # noqa: ARG002
        """Nothing is more recent than what is put now."""
        return math.inf


class Reuse:
    """The chance of reuse for the time held; see the module's docstring.

    With *attention_tokens* a block counts for what computing it again costs: one at that depth
    twice as much as the first, since attention then costs as much as all else. 0: all count alike.
    """

    name: Final = "reuse"
    _rows: Final[Scores] = _table()
    _flat: Final[list[float]] = _rows.tolist()
    _row: Final = OCTAVES * STEPS + 1

    def __init__(self, attention_tokens: int = 0) -> None:
        self._per_token = 1 / attention_tokens if attention_tokens else 0.0

    def scores(self, slots: Slots, which: IntArray, now_ms: int) -> Scores:
        """Chance by time, of each block for itself."""
        stamps = slots.stamp[which]
        ages = np.maximum(np.float64(now_ms) - stamps.astype(np.float64), 1.0)
        passed = slots.uses.latest_ms[slots.session[which]] > stamps
        values = self.values(slots.stop[which], ages, passed)
        back = slots.back_ms[which].astype(np.int64) - now_ms
        if (back > 0).any():
            expected = 1000 / np.maximum(back + LATE_MS, 1)
            values = np.where((back > 0) & ~passed, np.maximum(values, expected), values)
        return self.deepened(values, slots.position[which])

    def score(self, slots: Slots, slot: int, now_ms: int) -> float:
        """Chance by time of one block."""
        stamp = int(slots.stamp[slot])
        value = self._one(int(slots.stop[slot]), max(now_ms - stamp, 1))
        back = int(slots.back_ms[slot]) - now_ms
        if slots.uses.latest_ms[slots.session[slot]] > stamp:
            value *= PASSED_PART
        elif back > 0:
            value = max(value, 1000 / (back + LATE_MS))
        if self._per_token:
            value *= 1 + int(slots.position[slot]) * self._per_token
        return value

    def values(self, stops: IntArray, ages: Scores, passed: npt.NDArray[np.bool_]) -> Scores:
        """The index by how a request ended, ms since then (1 or more), and if it was passed over.

        Without what sessions say of their return, and what blocks count for by their depth.
        """
        values = self._index(stops, ages)
        values[passed] *= PASSED_PART
        return values

    def deepened(self, values: Scores, positions: IntArray) -> Scores:
        """*values* times what blocks that end at *positions*, in tokens, count for."""
        return values * (1 + positions * self._per_token) if self._per_token else values

    def _index(self, stops: IntArray, ages: Scores) -> Scores:
        """From the table, for ages of 1 ms or more: a float's bits are the log and the rest."""
        bits = ages.view(np.int64)
        at = (bits >> FRACTION_BITS) - _ONE + stops.astype(np.int64) * self._row
        part = (bits & _FRACTION) * _TO_PART
        low: Scores = self._rows[at]
        high: Scores = self._rows[at + 1]
        return low + part * (high - low)

    def _one(self, stop: int, age: float) -> float:
        """The same for one."""
        bits: int = _BITS.unpack(_FLOAT.pack(age))[0]
        at = (bits >> FRACTION_BITS) - _ONE + stop * self._row
        low = self._flat[at]
        return low + (bits & _FRACTION) * _TO_PART * (self._flat[at + 1] - low)

    def of_new(self, position: int, stop: Stop | None, return_ms: int | None) -> float:
        """That of a block which has just been used."""
        value = self._one(0 if stop is None else stop.code, 1.0)
        if return_ms is not None:
            value = max(value, 1000 / (return_ms + LATE_MS))
        return value * (1 + position * self._per_token)


LRU: Final = Recency()


def policy_of(name: str, attention_tokens: int = 0) -> Policy:
    """The policy that the configuration names."""
    return Recency() if name == Recency.name else Reuse(attention_tokens)

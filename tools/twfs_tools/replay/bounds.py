"""What no store, an exact LRU and a clairvoyant one would have held: the marks a policy is put to.

All count the blocks of a request's leading run that are held, and then let in the rest. Both stores
hold whole chains down to a depth, which makes them fast: neither looks at single blocks.

LRU: what was used last goes last; among the blocks of one request the deepest goes first. So the
order of going is a row of runs, each what is left of one request's chain, and one pass tells the
hits for every capacity at once: a block is held if fewer blocks than the capacity stand before it.

Belady's optimum with bypass: whatever will be asked for last goes first, the deepest of it before
the rest, and what has just been asked for may go at once. All blocks whose next use is one request
are a run of that request's chain, so how many of each run are held is all there is to know.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from twfs_tools.replay.streams import IntArray, Stream

NEVER: Final = 1 << 62


@dataclass(frozen=True)
class Hits:
    """Blocks of each request's leading run that were held, and blocks that were written."""

    blocks: IntArray  # (n,)
    written_blocks: int


def ceiling(stream: Stream) -> IntArray:
    """Blocks of each request that were asked for before: the hits of an infinite store."""
    seen = np.zeros(stream.unique_blocks, np.bool_)
    hits = np.zeros(len(stream), np.int64)
    for number, chain in enumerate(stream.chains()):
        hits[number] = int(seen[chain].sum())  # what was seen is seen with all before it
        seen[chain] = True
    return hits


def stack_distances(stream: Stream) -> IntArray:
    """Of every reference, how many blocks were used after its block was last; NEVER at its first.

    Counted are other blocks that stand before it in LRU's order: it is a hit in a store of more.
    """
    length = len(stream)
    owner = np.full(stream.unique_blocks, -1, np.int64)  # the request that used a block last
    left = np.zeros(length, np.int64)  # blocks that each request was the last to use
    start = np.zeros(length, np.int64)  # depth of the first of them
    distances = np.full(len(stream.blocks), NEVER, np.int64)
    for number, chain in enumerate(stream.chains()):
        owners = owner[chain]
        known = int(np.count_nonzero(owners >= 0))
        at = int(stream.first[number])
        if known:
            after = np.cumsum(left[:number][::-1])[::-1]  # blocks last used by this or a later one
            mine = owners[:known]
            behind = np.append(after, 0)[mine + 1]
            distances[at : at + known] = behind + np.arange(known) - start[mine]
            taken = np.bincount(mine, minlength=number)
            left[:number] -= taken
            start[:number] += taken
        owner[chain] = number
        left[number] = len(chain)
    return distances


def lru(stream: Stream, capacities: Sequence[int]) -> list[Hits]:
    """Hits of an exact LRU of each of *capacities*, in blocks; it writes all that it misses.

    A request longer than the store leaves its leading part there.
    """
    distances = stack_distances(stream)
    found = []
    place = np.arange(len(distances)) - np.repeat(stream.first[:-1], stream.lengths())
    for capacity in capacities:
        held = distances < capacity
        hits = np.add.reduceat(np.append(held, False), stream.first[:-1])
        hits[stream.lengths() == 0] = 0
        written = int(np.count_nonzero(~held & (place < capacity)))
        found.append(Hits(hits.astype(np.int64), written))
    return found


def next_uses(stream: Stream) -> IntArray:
    """Of every reference, the next request that asks for its block; NEVER if none does."""
    upcoming = np.full(stream.unique_blocks, NEVER, np.int64)
    uses = np.empty(len(stream.blocks), np.int64)
    for number in range(len(stream) - 1, -1, -1):
        chain = stream.chain(number)
        uses[stream.first[number] : stream.first[number + 1]] = upcoming[chain]
        upcoming[chain] = number
    return uses


def optimum(stream: Stream, capacity: int, uses: IntArray | None = None) -> Hits:
    """Hits of Belady's optimum with bypass in a store of *capacity* blocks.

    *uses*: next_uses, if it is known. It writes what it keeps beyond the request.
    """
    uses = next_uses(stream) if uses is None else uses
    held = np.zeros(len(stream), np.int64).tolist()  # blocks by the request they wait for
    waiting: list[int] = []  # requests that some are held for, the farthest first
    total = written = 0
    hits = np.zeros(len(stream), np.int64)
    for number in range(len(stream)):
        was_held, held[number] = held[number], 0
        hits[number] = was_held
        first, stop = stream.first[number], stream.first[number + 1]
        coming, counts = np.unique(uses[first:stop], return_counts=True)
        ahead = [
            each for each in zip(coming.tolist(), counts.tolist(), strict=True) if each[0] != NEVER
        ]
        for request, count in ahead:
            if not held[request]:
                heapq.heappush(waiting, -request)
            held[request] += count
        total += sum(count for _, count in ahead) - was_held
        total -= _drop(held, waiting, total - capacity)
        # What stays of this chain is its leading part: nearer uses are those of shallower blocks.
        stays = sum(min(count, held[request]) for request, count in ahead)
        written += max(0, stays - was_held)
    return Hits(hits, written)


def _drop(held: list[int], waiting: list[int], excess: int) -> int:
    """Drop *excess* blocks, those for the farthest requests first; how many there were to drop."""
    left = excess
    while left > 0:
        farthest = -waiting[0]
        gone = min(left, held[farthest])
        held[farthest] -= gone
        left -= gone
        if not held[farthest]:
            heapq.heappop(waiting)
    return max(0, excess)

"""What vLLM's scheduler offers the store: no block twice in a minute, as much as there is room for.

A request may offer thousands of keys in a step, of which twfs may take a millisecond: so nothing
here is done or kept key by key. A key proves all that is before it in its chain, so a run of blocks
is known by the last of its keys. Used by the scheduler's thread alone.
"""

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Final

KNOWN_SECONDS: Final = 60.0  # that a block which was offered is not offered again
KNOWN_MAX: Final = 200_000  # ends of runs and forks; some 300 bytes each
FORK_TOKENS: Final = 1024  # so often a run is known by a key in its midst: others may fork there
FORGOTTEN_AT_ONCE: Final = 256  # offers: in a step, of those that are over
OFFERED_AT_ONCE: Final = 512  # keys: in a step, of requests that go on

Owner = tuple[str | None, int]  # tenant, and public blocks: what else than its key names a block
Run = tuple[int, Sequence[Any]]  # the place of the first in its request's chain, and the keys


@dataclass(slots=True)
class _Noted:
    """A run that was offered; the keys at its end and at the forks in it stand for it."""

    owner: Owner
    ends: list[Any]
    begin: int  # place of its first block
    since_s: float


class Known:
    """Blocks that were offered lately, and whose they are.

    Of a chain that leaves a known one between two forks (1,024 tokens) the blocks since the first
    of them are not known.
    """

    def __init__(self, block_tokens: int) -> None:
        self._fork_blocks = max(1, FORK_TOKENS // block_tokens)
        self._ends: dict[Owner, dict[Any, _Noted]] = {}
        self._noted: deque[_Noted] = deque()  # the same, oldest first
        self._count = 0

    def lacking(self, owner: Owner, first: int, keys: Sequence[Any], now_s: float) -> list[Run]:
        """What of *keys*, which follow each other from place *first* on, is not known."""
        ends = self._ends.get(owner)
        if not ends or not keys:
            return [(first, keys)] if keys else []
        since_s, found = now_s - KNOWN_SECONDS, list[Run]()
        stop = place = first + len(keys)  # what is from *stop* on is settled, from *place* on seen
        # A known chain is soon at an end or a fork, from where a whole run is skipped.
        while first < place and stop - place <= self._fork_blocks:
            place -= 1
            noted = ends.get(keys[place - first])
            if noted is not None and noted.since_s > since_s and noted.begin <= place:
                if place + 1 < stop:
                    found.append((place + 1, keys[place + 1 - first : stop - first]))
                stop = place = noted.begin
        # What was not may be thousands of keys that are all new.
        left = keys[: max(0, place - first)]
        met = [(at, ends[key]) for at, key in enumerate(left, first) if key in ends]
        for at, noted in reversed(met):
            if noted.since_s > since_s and noted.begin <= at < stop:
                if at + 1 < stop:
                    found.append((at + 1, keys[at + 1 - first : stop - first]))
                stop = noted.begin
        if first < stop:
            found.append((first, keys[: stop - first]))
        return found[::-1]

    def note(self, owner: Owner, first: int, keys: Sequence[Any], now_s: float) -> None:
        """These are offered."""
        forks = keys[(-first - 1) % self._fork_blocks : -1 : self._fork_blocks]
        self._enter(_Noted(owner, [*forks, keys[-1]], first, now_s))

    def _enter(self, noted: _Noted) -> None:
        self._ends.setdefault(noted.owner, {}).update(zip(noted.ends, repeat(noted)))
        self._noted.append(noted)
        self._count += len(noted.ends)

    def lost(self, owner: Owner, keys: Sequence[Any], held: int) -> None:
        """Of *keys*, which were offered at once, only the first *held* have come to be stored."""
        ends = self._ends.get(owner, {})
        over = [noted for key in keys[held:] if (noted := ends.pop(key, None)) is not None]
        if held and over and keys[held - 1] not in ends:  # the cut is within a run
            self._enter(replace(over[0], ends=[keys[held - 1]]))

    def forget(self, now_s: float) -> None:
        """Let go of what is over, some of it in each step."""
        for _ in range(FORGOTTEN_AT_ONCE):
            if not self._noted:
                return
            noted = self._noted[0]
            if now_s - noted.since_s < KNOWN_SECONDS and self._count <= KNOWN_MAX:
                return
            self._noted.popleft()
            self._count -= len(noted.ends)
            ends = self._ends[noted.owner]
            for key in noted.ends:
                if ends.get(key) is noted:
                    del ends[key]

    def clear(self) -> None:
        """Forget all."""
        self._ends.clear()
        self._noted.clear()
        self._count = 0


class Offers:
    """What is known to be stored, and the workers' room for *blocks_max* of what is not."""

    def __init__(self, blocks_max: int, block_tokens: int) -> None:
        self._blocks_max = blocks_max
        self._known = Known(block_tokens)
        self._storing: dict[str, dict[Any, int]] = {}  # blocks in the room, by an offer's last key
        self._taken = 0  # of the room
        self.left = OFFERED_AT_ONCE  # keys, that may be offered yet in this step

    def begin_step(self) -> None:
        """A step of the engine begins."""
        self.left = OFFERED_AT_ONCE
        self._known.forget(time.monotonic())

    def bound(self, offered: int) -> int:
        """Up to what place a request may offer in this step, that has offered so many."""
        return offered + max(0, self.left)

    def choose(
        self, request: str, owner: Owner, first: int, keys: Sequence[Any], held: tuple[int, int]
    ) -> list[Run]:
        """What to offer of *keys*, which follow each other from place *first* on.

        The engine held all itself up to place held[0], which is mostly stored already, so it takes
        no room; what follows up to held[1] is leased. What is behind goes as far as there is room.
        """
        now_s = time.monotonic()
        own = keys[: max(0, held[0] - first)]
        behind = max(0, max(held) - first)
        chosen = self._known.lacking(owner, first, own, now_s)
        room = self._blocks_max - self._taken
        for place, run in self._known.lacking(owner, first + behind, keys[behind:], now_s):
            taken = run[:room]
            room -= len(taken)
            if taken:
                self._take(request, taken)
                chosen.append((place, taken))
        for place, run in chosen:
            self._known.note(owner, place, run, now_s)
            self.left -= len(run)
        return chosen

    def _take(self, request: str, keys: Sequence[Any]) -> None:
        storing = self._storing.setdefault(request, {})
        self._taken += len(keys) - storing.pop(keys[-1], 0)
        storing[keys[-1]] = len(keys)

    def copied(self, request: str, keys: Collection[Any]) -> None:
        """These take no room any more."""
        storing = self._storing.get(request, {})
        for key in storing.keys() & keys:
            self._taken -= storing.pop(key)
        if not storing:
            self._storing.pop(request, None)

    def ended(self, store: "OpenStore") -> None:
        """Of a store all ranks have told now: what is not held may be offered again."""
        if store.held < len(store.keys):
            self._known.lost(store.owner, store.keys, store.held)

    def clear(self) -> None:
        """Forget all: what was stored is out of reach."""
        self._known.clear()
        self._storing.clear()
        self._taken = 0


@dataclass(slots=True)
class OpenStore:
    """A store as far as the ranks have told what became of it."""

    owner: Owner
    keys: list[Any]
    ranks: int  # that have not told
    held: int  # leading keys that all the others hold


class OpenStores:
    """The scheduler's stores whose end not all ranks have reported; each reports each one once."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._open: dict[int, OpenStore] = {}
        self._last = 0

    def begin(self, owner: Owner, keys: list[Any]) -> int:
        """Note a store, and return its number."""
        self._last += 1
        self._open[self._last] = OpenStore(owner, keys, self._ranks, len(keys))
        return self._last

    def ended(self, told: Mapping[int, Sequence[int]]) -> Iterator[OpenStore]:
        """The stores of which all ranks have reported now; *told* is by number what each holds."""
        for number, held in told.items():
            store = self._open.get(number)
            if store is None:  # begun before a reset
                continue
            store.ranks -= len(held)
            store.held = min(store.held, *held)
            if store.ranks == 0:
                yield self._open.pop(number)

    def clear(self) -> None:
        """Forget all: what they stored is out of reach."""
        self._open.clear()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

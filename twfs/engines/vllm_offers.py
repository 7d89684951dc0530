"""What vLLM's scheduler offers the store: no block twice in a minute, as much as there is room for.

A request may offer thousands of keys in a step, of which twfs may take a millisecond: so nothing
here is done or kept key by key. A key proves all that is before it in its chain, so a run of blocks
is known by the last of its keys. Used by the scheduler's thread alone.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

KNOWN_SECONDS: Final = 60.0  # that a block which was offered is not offered again
KNOWN_MAX: Final = 200_000  # ends of runs and forks; some 200 bytes each
FORK_TOKENS: Final = 1024  # so often a run is known by a key in its midst: others may fork there
FORGOTTEN_AT_ONCE: Final = 256  # ends and forks: in a step, of those that are over
OFFERED_AT_ONCE: Final = 512  # keys: in a step, of requests that go on
OFFER_KEYS: Final = 64  # an offer takes the time of so many keys, however few are in it
OFFER_TOKENS: Final = 256  # a request that goes on offers so many, or a multiple
PLACES: Final = 1 << 32  # more than a chain has

Owner = tuple[str | None, int]  # tenant, and public blocks: what else than its key names a block
Run = tuple[int, Sequence[Any]]  # the place of the first in its request's chain, and the keys


class Known:
    """Blocks that were offered lately, and whose they are.

    The keys at the end of a run and at the forks in it stand for it, each with one number: when it
    was offered, in milliseconds, and the place of its first block. Numbers, because Python's
    garbage collector need not look at these.
    Of a chain that leaves a known one between two forks (1,024 tokens) the blocks since the first
    of them are not known; nor is a run between two forks of which the first is not.
    """

    def __init__(self, block_tokens: int) -> None:
        self._fork_blocks = max(1, FORK_TOKENS // block_tokens)
        self._ends: dict[Owner, OrderedDict[Any, int]] = {}  # oldest first
        self._owners: deque[Owner] = deque()  # the same; whose are let go of next
        self._count = 0

    def lacking(self, owner: Owner, first: int, keys: Sequence[Any], now_s: float) -> list[Run]:
        """What of *keys*, which follow each other from place *first* on, is not known."""
        ends = self._ends.get(owner)
        if not ends or not keys:
            return [(first, keys)] if keys else []
        since, found = _numbered(now_s - KNOWN_SECONDS, PLACES - 1), list[Run]()
        stop = place = first + len(keys)  # what is from *stop* on is settled, from *place* on seen
        while first < place:
            fork = max(first, (place - 1) // self._fork_blocks * self._fork_blocks)
            # One by one only behind what is known: there may be thousands that are not.
            near = fork == first or keys[fork - 1 - first] in ends
            for at in range(place - 1, fork - 1 if near else place - 2, -1):
                noted = ends.get(keys[at - first])
                if noted is not None and noted > since and (begin := noted % PLACES) <= at:
                    if at + 1 < stop:
                        found.append((at + 1, keys[at + 1 - first : stop - first]))
                    stop = place = begin
                    break
            else:
                place = fork
        if first < stop:
            found.append((first, keys[: stop - first]))
        return found[::-1]

    def note(self, owner: Owner, first: int, keys: Sequence[Any], now_s: float) -> None:
        """These are offered."""
        forks = keys[(-first - 1) % self._fork_blocks : -1 : self._fork_blocks]
        self._enter(owner, [*forks, keys[-1]], _numbered(now_s, first))

    def _enter(self, owner: Owner, keys: Sequence[Any], noted: int) -> None:
        ends = self._ends.get(owner)
        if ends is None:
            ends = self._ends[owner] = OrderedDict()
            self._owners.append(owner)
        self._count -= len(ends)
        for key in keys:
            ends[key] = noted
            ends.move_to_end(key)
        self._count += len(ends)

    def lost(self, owner: Owner, keys: Sequence[Any], held: int) -> None:
        """Of *keys*, which were offered at once, only the first *held* have come to be stored."""
        ends = self._ends.get(owner, OrderedDict())
        over = [noted for key in keys[held:] if (noted := ends.pop(key, None)) is not None]
        self._count -= len(over)
        if held and over and keys[held - 1] not in ends:  # the cut is within a run
            self._enter(owner, [keys[held - 1]], over[0])

    def forget(self, now_s: float) -> None:
        """Let go of what is over, some of it in each step, of one owner after the other."""
        if not self._owners:
            return
        owner = self._owners.popleft()
        ends, since = self._ends[owner], _numbered(now_s - KNOWN_SECONDS, PLACES - 1)
        for _ in range(FORGOTTEN_AT_ONCE):
            if not ends or (next(iter(ends.values())) > since and self._count <= KNOWN_MAX):
                break
            ends.popitem(last=False)
            self._count -= 1
        if ends:
            self._owners.append(owner)
        else:
            del self._ends[owner]

    def clear(self) -> None:
        """Forget all."""
        self._ends.clear()
        self._owners.clear()
        self._count = 0


def _numbered(now_s: float, place: int) -> int:
    return int(1000 * now_s) * PLACES + place


class Offers:
    """What is known to be stored, and the workers' room for *blocks_max* of what is not."""

    def __init__(self, blocks_max: int, block_tokens: int) -> None:
        self._blocks_max = blocks_max
        # No more than there is room for, or a request that goes on would never offer any.
        self._offer_blocks = max(1, min(OFFER_TOKENS // block_tokens, blocks_max))
        self._known = Known(block_tokens)
        self._storing: dict[str, dict[Any, int]] = {}  # blocks in the room, by an offer's last key
        self._taken = 0  # of the room
        self.left = OFFERED_AT_ONCE  # keys, that may be offered yet in this step

    def begin_step(self) -> None:
        """A step of the engine begins."""
        self.left = OFFERED_AT_ONCE
        self._known.forget(time.monotonic())

    def bound(self, offered: int, stop: int) -> int:
        """Up to what place a request that goes on may offer in this step, *stop* at most.

        It has offered so many, and vLLM never offers again what finds no room. Few new ones, an
        answer's, wait until they are an offer's worth.
        """
        room = self._blocks_max - self._taken
        most = min(stop, offered + min(self.left, room))
        return max(offered, most - most % self._offer_blocks)

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
        self.left -= OFFER_KEYS
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

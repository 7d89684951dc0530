"""What is known about every block in memory: dense arrays by slot number, and the heat stamps.

A slot is a small number that a block keeps in its record for life. The arrays are what match,
eviction and listing look at, so that none of them scans LMDB; all but the stamps are rebuilt from
the records at open. The stamps are an mmap-ed file outside the commit path: a stamp is max(what it
was, wall clock), so it never goes back. What tenants are charged follows the arrays at each change
here (`charges`). Not thread-safe: the warehouse's lock guards it.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twfs.errors import CorruptMetadata, NoSpaceForImage
from twfs.hints import Retention
from twfs.index.charges import Charges
from twfs.index.clocks import STAMP_MS_MAX
from twfs.index.counting import NONE as NONE  # noqa: PLC0414 - a name of the arrays
from twfs.index.counting import move_marks
from twfs.index.uses import SessionUses
from twfs.records import BLOCK_KEY, FLAG_DETACHED, FLAG_HOLE, BlockKey
from twfs.units import ALIGN, ModelId, Slot

IntArray = npt.NDArray[Any]

FREE: Final = 0  # no block has this slot
PENDING: Final = 1  # reserved by a put that is not published yet
LIVE: Final = 2  # published: may be matched
CONDEMNED: Final = 3  # chosen for eviction: absent to everyone from now on
LIMBO: Final = 4  # removed, but a lease still reads it
SLOTS_MAX: Final = 1 << 31  # a slot from there on is damage
GROWTH_MIN: Final = 4096  # slots added at once, so that growing is rare

KEY_BYTES: Final = BLOCK_KEY.size
STAMP_BYTES: Final = 8
CLASSES: Final = len(Retention)
NOBODY: Final = Retention.STANDARD.rank  # the most that a block is worth which no session is over
ARRAYS: Final = (
    "key", "parent", "children", "links", "leases", "position", "units", "device", "state",
    "retention", "given", "anchored", "over", "tenant", "payer", "other", "lent", "stop",
    "back_ms", "session", "detached", "hole",
)  # fmt: skip


def highest(over: IntArray, given: IntArray) -> IntArray:
    """The class of blocks with *over* (rows of counts by class) and the class *given* at publish.

    One that no session is over has that of its publish, but not above standard: nobody asks for it.
    """
    top = CLASSES - 1 - np.argmax(over[:, ::-1] > 0, axis=1)
    return np.where(over.any(axis=1), top, np.minimum(given, NOBODY)).astype(np.uint8)


class Slots:
    """The arrays; see the module's docstring. Fields are indexed by slot."""

    def __init__(self, heat_path: Path, clock: Callable[[], int] = lambda: 0) -> None:
        self.charges = Charges(clock)
        self._failed_persists = 0
        self._heat_fd = os.open(heat_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._map: mmap.mmap | None = None
        self._count = 0  # slots in use or free below this
        self._free: list[int] = []
        self.known_from_ms = 0  # before that no use is known: a block counts as used then
        self.stamp: IntArray = np.zeros(0, np.uint64)
        self.key: IntArray = np.zeros(0, f"V{KEY_BYTES}")
        self.parent: IntArray = np.zeros(0, np.uint32)
        self.children: IntArray = np.zeros(0, np.int32)
        self.links: IntArray = np.zeros(0, np.int32)
        self.leases: IntArray = np.zeros(0, np.int32)
        self.position: IntArray = np.zeros(0, np.uint32)
        self.units: IntArray = np.zeros(0, np.uint32)  # of 4 KiB on the devices
        self.device: IntArray = np.zeros(0, np.uint16)  # that the block begins on
        self.state: IntArray = np.zeros(0, np.uint8)
        self.retention: IntArray = np.zeros(0, np.uint8)  # class that counts now
        self.given: IntArray = np.zeros(0, np.uint8)  # class as at publish
        self.anchored: IntArray = np.zeros(0, np.uint8)  # highest class of sessions that end here
        self.over: IntArray = np.zeros((0, CLASSES), np.int32)  # such ends at or below, by class
        self.tenant: IntArray = np.zeros(0, np.uint16)
        self.payer: IntArray = np.zeros(0, np.uint16)  # the tenant that is charged
        self.other: IntArray = np.zeros(0, np.uint16)  # of a share group: who used it, not paying
        self.lent: IntArray = np.zeros(0, np.bool_)  # that one used it later than who is charged
        self.stop: IntArray = np.zeros(0, np.uint8)  # how the last request ended: Stop.code, or 0
        self.back_ms: IntArray = np.zeros(0, np.uint64)  # when its session is expected, or 0
        self.session: IntArray = np.zeros(0, np.uint32)  # that used it last: a number of `uses`
        self.uses = SessionUses()
        self.detached: IntArray = np.zeros(0, np.bool_)
        self.hole: IntArray = np.zeros(0, np.bool_)
        self._grow(GROWTH_MIN)

    def __len__(self) -> int:
        return self._count

    def _grow(self, capacity: int) -> None:
        """Make room for *capacity* slots; the stamps' file is allocated, so no SIGBUS later."""
        byte_count = -(-capacity * STAMP_BYTES // ALIGN) * ALIGN
        try:
            os.posix_fallocate(self._heat_fd, 0, byte_count)
        except OSError as error:
            raise NoSpaceForImage(
                f"the file of last uses cannot grow to {byte_count} bytes: {error.strerror}; "
                "make room in the warehouse's directory"
            ) from error
        capacity = byte_count // STAMP_BYTES
        self._map = mmap.mmap(self._heat_fd, byte_count)
        self.stamp = np.frombuffer(self._map, np.uint64)
        for name in ARRAYS:
            old = getattr(self, name)
            new = np.zeros((capacity, *old.shape[1:]), old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)

    def had(self) -> int:
        """Slots that the stamps' file has room for on the disk: so many were once in use."""
        return os.fstat(self._heat_fd).st_blocks * 512 // STAMP_BYTES

    def allot(self, count: int) -> list[Slot]:
        """Return *count* slots in state PENDING; NoSpaceForImage if the stamps' file is full."""
        fresh = max(0, count - len(self._free))
        if self._count + fresh > len(self.state):
            self._grow(max(self._count + fresh, len(self.state) + len(self.state) // 2))
        taken = [self._free.pop() for _ in range(count - fresh)]
        taken.extend(range(self._count, self._count + fresh))
        self._count += fresh
        self.state[taken] = PENDING
        self.leases[taken] = 0
        self.stamp[taken] = 0  # the file may have been longer than what was in use
        return [Slot(slot) for slot in taken]

    def give_back(self, slot: int) -> None:
        """Undo allot, or end a block's life."""
        assert self.state[slot] != FREE, slot
        assert self.leases[slot] == 0, slot
        self.state[slot] = FREE
        self.detached[slot] = False
        self.hole[slot] = False
        self.stamp[slot] = 0
        self._free.append(slot)

    def set_live(
        self, slot: int, key: bytes, parent: int | None, *, position: int, units: int,
        now_ms: int, detached: bool, device: int = 0, retention: int = 1, tenant: int = 0,
        payer: int | None = None,
    ) -> None:  # fmt: skip
        """Enter a block that has just been published; its parent gains a child."""
        self.key[slot] = np.void(key)
        self.position[slot] = position
        self.units[slot] = units
        self.device[slot] = device
        self.given[slot] = self.retention[slot] = retention
        self.over[slot] = 0
        self.anchored[slot] = 0
        self.retention[slot] = highest(self.over[slot : slot + 1], self.given[slot : slot + 1])[0]
        self.tenant[slot] = tenant
        self.payer[slot] = tenant if payer is None else payer
        self.other[slot] = 0
        self.lent[slot] = False
        self.stop[slot] = 0
        self.back_ms[slot] = 0
        self.session[slot] = 0
        self.children[slot] = 0
        self.links[slot] = 0
        self.detached[slot] = detached
        self.parent[slot] = NONE
        if parent is not None:
            self.adopt(slot, parent)
        self.use([slot], now_ms)
        self.state[slot] = LIVE
        self._charge(slot)

    def _charge(self, slot: int, sign: int = 1) -> None:
        """Charge for the block in *slot*, or with *sign* -1 no more."""
        account = (int(self.payer[slot]), self.model_of(slot), int(self.retention[slot]))
        self.charges.add(account, sign * int(self.units[slot]) * ALIGN)

    def fill(self, slot: int, *, units: int, device: int, payer: int, retention: int) -> None:
        """Let the block in *slot*, a hole or one on an offline device, have bytes elsewhere."""
        self._charge(slot, -1)
        self.units[slot] = units
        self.device[slot] = device
        self.payer[slot] = payer
        self.given[slot] = retention
        self.retention[slot] = highest(self.over[slot : slot + 1], self.given[slot : slot + 1])[0]
        self.hole[slot] = False
        self._charge(slot)

    def spoil(self, slot: int) -> None:
        """Let the block in *slot* be a hole: it takes no bytes and nobody is charged."""
        self._charge(slot, -1)
        self.units[slot] = 0
        self.hole[slot] = True

    def charge_to(self, slot: int, payer: int) -> None:
        """Let another tenant be charged for the block in *slot*."""
        self._charge(slot, -1)
        self.payer[slot] = payer
        self.other[slot] = 0
        self.lent[slot] = False
        self._charge(slot)

    def classify(self, slots: Sequence[int] | IntArray, retention: IntArray | int) -> list[int]:
        """Let the blocks in *slots* have other classes; returns those of another than before."""
        some = np.asarray(slots, np.int64)
        wanted = np.broadcast_to(np.asarray(retention, np.uint8), some.shape)
        differ = self.retention[some] != wanted
        changed: list[int] = some[differ].tolist()
        for slot, rank in zip(changed, wanted[differ].tolist(), strict=True):
            self._charge(slot, -1)
            self.retention[slot] = rank
            self._charge(slot)
        return changed

    def note_user(self, slots: Sequence[int] | IntArray, tenant: int, group: int) -> None:
        """Note that *tenant* used the blocks in *slots*: those of its share *group* may go to it.

        Nothing is noted without a group.
        """
        if not group:
            return
        public = np.asarray(slots)[self.tenant[slots] == group]
        mine = self.payer[public] == tenant
        self.other[public[~mine]] = tenant
        self.lent[public] = ~mine

    def charge_all(self) -> None:
        """Charge for all blocks there are; once, after load."""
        here = np.flatnonzero(self.state[: self._count] == LIVE)
        self.charges.load(
            self.payer[here], self.models()[here], self.retention[here], self.units[here]
        )

    def adopt(self, slot: int, parent: int) -> list[int]:
        """Hang *slot*, and what is below it, below *parent*; returns slots whose class changed."""
        self.parent[slot] = parent
        self.children[parent] += 1
        if not self.over[slot].any():
            return []
        above = self.ancestors(parent)
        self.over[above] += self.over[slot]
        return self._judge_classes(above)

    def drop(self, slot: int) -> None:
        """Take a block out of the tree; give_back follows when no lease reads it any more.

        Nobody is charged for it any more: what a lease may still read is in limbo.
        """
        self._charge(slot, -1)
        parent = self.parent[slot]
        if parent != NONE:
            self.children[parent] -= 1
            self.parent[slot] = NONE

    def use(self, slots: Sequence[int] | IntArray, now_ms: int) -> None:
        """Stamp *slots* with the present time; a stamp never goes back."""
        self.stamp[slots] = np.maximum(self.stamp[slots], np.uint64(now_ms))

    def latest(self) -> int:
        """The last use of any block, in ms; stamps that can be no time do not count."""
        stamps = self.stamp[: self._count]
        sound = stamps[stamps < STAMP_MS_MAX]
        return int(sound.max()) if len(sound) else 0

    def find_lost_stamps(self) -> bool:
        """Tell whether there are blocks of which no last use is known, not even the publish.

        They are known from now on as such: asked again, there are none.
        """
        here = self._count
        lost = (self.state[:here] == LIVE) & (self.stamp[:here] == 0)
        self.stamp[:here][lost] = 1
        return bool(lost.any())

    def key_of(self, slot: int) -> BlockKey:
        """The full name of the block in *slot*."""
        return BlockKey.unpack(self.key[slot].tobytes())

    def model_of(self, slot: int) -> ModelId:
        """The model number of the block in *slot*."""
        return ModelId(int.from_bytes(self.key[slot].tobytes()[:4], "big"))

    def ancestors(self, slot: int) -> list[int]:
        """*slot*, its parent, and so on up to the first block."""
        found = []
        parent = self.parent
        at = slot
        while at != NONE:
            found.append(at)
            at = int(parent[at])
        return found

    def move_heads(self, became: Sequence[int], ceased: Sequence[int]) -> None:
        """Count heads over blocks anew after heads moved."""
        move_marks(self.parent, self.links, became, ceased)

    def cover(self, marks: Sequence[tuple[int, int]]) -> list[int]:
        """Let sessions end where *marks* say: (slot, its own class + 1, or 0 for none).

        Every block gets the highest class at or below it; returns those whose class changed.
        """
        became: list[list[int]] = [[] for _ in range(CLASSES)]
        ceased: list[list[int]] = [[] for _ in range(CLASSES)]
        for slot, own in marks:
            before = int(self.anchored[slot])
            if before != own:
                self.anchored[slot] = own
                if before:
                    ceased[before - 1].append(slot)
                if own:
                    became[own - 1].append(slot)
        moved: list[int] = []
        for rank in range(CLASSES):
            if became[rank] or ceased[rank]:
                moved += move_marks(self.parent, self.over[:, rank], became[rank], ceased[rank])
        return self._judge_classes(moved)

    def _judge_classes(self, slots: Sequence[int]) -> list[int]:
        """Set the class of *slots* by what is over them; returns those that changed."""
        if not slots:
            return []
        some = np.unique(np.asarray(slots, np.int64))
        return self.classify(some, highest(self.over[some], self.given[some]))

    def models(self) -> IntArray:
        """The model number of the block in each slot."""
        here = self._count
        keys = self.key[:here].view(np.uint8).reshape(here, KEY_BYTES)[:, :4]
        return np.ascontiguousarray(keys).view(">u4").ravel()

    def leaves(self) -> IntArray:
        """Slots that may be evicted now: live, without child, without lease."""
        count = self._count
        return np.flatnonzero(
            (self.state[:count] == LIVE)
            & (self.children[:count] == 0)
            & (self.leases[:count] == 0)
        )  # fmt: skip

    def unreachable(self) -> IntArray:
        """Tell, by slot, which blocks no match reaches: detached ones, and those below a hole."""
        here = self._count
        behind = self.detached[:here].copy()
        if self.hole[:here].any():
            up = np.where(self.parent[:here] == NONE, np.arange(here), self.parent[:here])
            lost = self.hole[:here].copy()
            while True:  # doubles the height looked at: as many rounds as the depth has bits
                wider = lost | lost[up]
                higher = up[up]
                if (wider == lost).all() and (higher == up).all():
                    break
                lost, up = wider, higher
            above = self.parent[:here]
            behind |= (above != NONE) & lost[np.where(above == NONE, 0, above)]
        return behind

    def load(
        self,
        keys: bytes,
        records: "npt.NDArray[Any]",
        starts: IntArray,
        heads: Iterable[bytes],
        ends: Mapping[bytes, int] | None = None,
    ) -> None:
        """Fill the arrays from all records, in key order.

        *keys*: the packed keys joined; *records*: BLOCK_DTYPE rows; *starts*: which of them start
        a chain; *heads*: the packed keys of the blocks that stand for the heads; *ends*: of those
        where sessions end, with the highest class of these. The extents' units
        are set by the caller where a block has more than one. CorruptMetadata if blocks are their
        own ancestors: nothing that follows parents would ever end.
        """
        count = len(records)
        slots = records["slot"].astype(np.int64)
        self._count = int(slots.max()) + 1 if count else 0
        if self._count > len(self.state):
            self._grow(self._count)
        key_array = np.frombuffer(keys, f"S{KEY_BYTES}")
        self.key[slots] = np.frombuffer(keys, f"V{KEY_BYTES}")
        self.state[slots] = LIVE
        self.position[slots] = records["position"]
        self.units[slots] = records["units"]
        self.device[slots] = records["device"]
        self.given[slots] = records["retention"]
        self.tenant[slots] = records["tenant"]
        self.payer[slots] = np.where(records["payer"] != 0, records["payer"], records["tenant"])
        self.detached[slots] = (records["flags"] & FLAG_DETACHED) != 0
        self.hole[slots] = (records["flags"] & FLAG_HOLE) != 0
        parents = np.frombuffer(keys, np.uint8).reshape(count, KEY_BYTES).copy()
        parents[:, 4:20] = np.ascontiguousarray(records["parent"]).view(np.uint8).reshape(count, 16)
        wanted = parents.view(f"S{KEY_BYTES}").ravel()
        self.parent[:] = NONE
        if count:
            at = np.minimum(np.searchsorted(key_array, wanted), count - 1)
            there = (key_array[at] == wanted) & ~starts
            self.parent[slots[there]] = slots[at[there]]
            np.add.at(self.children, slots[at[there]], 1)
        self._refuse_rings(slots, self._load_links(key_array, slots, heads, ends or {}))
        used = np.zeros(self._count, np.bool_)
        used[slots] = True
        self._free = [int(slot) for slot in np.flatnonzero(~used)[::-1]]
        self.stamp[: self._count][~used] = 0
        self.stamp[self._count :] = 0

    def _refuse_rings(self, slots: IntArray, waiting: IntArray) -> None:
        """Raise CorruptMetadata if a way up from one of the blocks *waiting* never ends."""
        if not len(waiting):
            return
        above = len(self.parent)  # what is above a first block: itself, for ever
        up = np.append(np.where(self.parent == NONE, above, self.parent), above)
        for _ in range(len(slots).bit_length()):  # as many steps up as there are blocks
            up = up[up]
        lost = waiting[up[waiting] != above]
        if len(lost):
            raise CorruptMetadata(
                f"{len(lost)} blocks are their own ancestors, {self.key_of(int(lost[0]))} first: "
                "the metadata must be made anew from the devices"
            )

    def _load_links(
        self, keys: IntArray, slots: IntArray, heads: Iterable[bytes], ends: Mapping[bytes, int]
    ) -> IntArray:
        """Count the heads and the ends of sessions over every block, leaves first.

        Returns the slots not come to.
        """
        wanted = np.array(list(heads), keys.dtype)
        if len(wanted) and len(keys):
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            found = slots[at[keys[at] == wanted]]
            self.links[found] = 1
            self.anchored[found] = NOBODY + 1
        if ends and len(keys):
            wanted = np.array(list(ends), keys.dtype)
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            there = keys[at] == wanted
            own = np.array(list(ends.values()), np.uint8)[there]
            self.anchored[slots[at[there]]] = own + 1
        marked = np.flatnonzero(self.anchored[: self._count])
        self.over[marked, self.anchored[marked].astype(np.int64) - 1] = 1
        missing = self.children.copy()
        frontier = slots[missing[slots] == 0]
        while len(frontier):
            inner = frontier[self.parent[frontier] != NONE]
            parents = self.parent[inner]
            np.add.at(self.links, parents, self.links[inner])
            np.add.at(self.over, parents, self.over[inner])
            np.subtract.at(missing, parents, 1)
            touched = np.unique(parents)
            frontier = touched[missing[touched] == 0].astype(np.int64)
        self.retention[slots] = highest(self.over[slots], self.given[slots])
        return slots[missing[slots] > 0]

    def statistics(self) -> dict[str, int]:
        """Slots by state, and bytes of the arrays."""
        states = np.bincount(self.state[: self._count], minlength=5)
        names = ("free", "pending", "live", "condemned", "limbo")
        figures = {f"slots_{name}": int(states[i]) for i, name in enumerate(names)}
        arrays = (self.stamp, *(getattr(self, name) for name in ARRAYS))
        return figures | {
            "slots_bytes": sum(array.nbytes for array in arrays) + self.uses.nbytes,
            "failed_persists": self._failed_persists,
        }

    def persist(self) -> None:
        """Write the stamps to disk; may wait for the disk, so not under the lock.

        They are a hint: a disk that refuses costs the order of evictions after the next start, and
        must stop neither a close nor who tends the leases. Failures are counted.
        """
        if self._map is not None:
            try:
                self._map.flush()
            except OSError:
                self._failed_persists += 1

    def close(self) -> None:
        """Persist the stamps and let go of the file."""
        self.persist()
        self.stamp = np.zeros(0, np.uint64)
        self._map = None
        os.close(self._heat_fd)

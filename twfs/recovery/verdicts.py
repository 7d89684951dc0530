"""What a repair decides of each block: it stays, becomes a hole, or is dropped; and why.

Only proof counts. A block stays if its header is sealed and says what the record says, and nobody
else has a better right to its place. Reads devices, changes nothing.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from twfs.checking.invariants import (
    layout_bytes,
    misfits,
    not_behind,
    out_of_layout,
    outside,
    with_header,
    with_payload,
)
from twfs.checking.proving import Complaint, prove_headers, prove_payloads
from twfs.checking.snapshot import NUMBER_MAX, Snapshot, bounded
from twfs.checking.subject import Subject
from twfs.index.slots import IntArray
from twfs.records import Header


@dataclass
class Verdicts:
    """By row: *dropped* go altogether, *lost* have no bytes any more and may be holes.

    The places of those *retired* are never used again: the device lost bytes there.
    """

    taken: Snapshot
    dropped: IntArray = field(init=False)
    lost: IntArray = field(init=False)
    retired: IntArray = field(init=False)
    why: dict[int, str] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)  # true ones, of what may be a hole

    def __post_init__(self) -> None:
        self.dropped, self.lost, self.retired = (
            np.zeros(len(self.taken), np.bool_) for _ in range(3)
        )

    def standing(self) -> IntArray:
        """Tell which rows have bytes that nothing speaks against."""
        return np.asarray(~self.dropped & ~self.lost & ~self.taken.hole)

    def drop(self, rows: IntArray, why: str) -> None:
        """Decide that *rows* (a mask) go."""
        self.dropped |= rows
        self._say(np.flatnonzero(rows).tolist(), why)

    def lose(self, rows: IntArray, why: str) -> None:
        """Decide that the bytes of *rows* (a mask) are not theirs."""
        self.lost |= rows
        self._say(np.flatnonzero(rows).tolist(), why)

    def hear(self, complaints: Iterable[Complaint], *, retire: bool) -> None:
        """Decide as the devices say; with *retire* places that lost bytes are not used again."""
        for each in complaints:
            self.lost[each.row] = True
            self.retired[each.row] |= retire and each.lost
            self._say([each.row], each.text.partition(": ")[2])
            if each.header is not None:
                self._identify(each.row, each.header)

    def _identify(self, row: int, header: Header) -> None:
        """A sealed header contradicts the record: who the block is, the header knows better.

        A hole with another digest or own key would refuse the block itself for ever.
        """
        key = self.taken.key(row)
        if (header.prefix_hash, header.group, header.shard) == (
            key.prefix_hash, key.group, key.shard,
        ):  # fmt: skip
            self.dropped[row] |= header.block.key != self.taken.own_key(row)
            self.digests[row] = header.block.digest

    def _say(self, rows: Iterable[int], why: str) -> None:
        for row in rows:
            self.why.setdefault(row, why)


def judge(subject: Subject, taken: Snapshot, *, data: bool) -> Verdicts:
    """Decide of every block; with *data* by every payload, else by those in dispute only."""
    verdicts = Verdicts(taken)
    verdicts.drop(~taken.known, "its model is not there")
    verdicts.drop(out_of_layout(taken), "its layout has no such group or shard")
    verdicts.drop(not_behind(taken), "it does not end behind its parent")
    has, wanted = misfits(taken)
    misplaced = np.zeros(len(taken), np.bool_)
    misplaced[taken.extents["row"][outside(subject, taken)]] = True
    verdicts.lose((has != wanted) | misplaced, "its extents do not fit")
    length = bounded(taken.rows["payload_bytes"])
    verdicts.lose((length != layout_bytes(taken)) & ~taken.hole, "its length is not its layout's")
    for name in ("generation", "ino"):
        verdicts.lose((taken.rows[name] > NUMBER_MAX) & ~taken.hole, f"its {name} cannot be")

    rows = np.intersect1d(with_header(subject, taken), np.flatnonzero(verdicts.standing()))
    verdicts.hear(prove_headers(subject, taken, rows), retire=True)
    if data:
        rows = np.intersect1d(with_payload(subject, taken), np.flatnonzero(verdicts.standing()))
        verdicts.hear(prove_payloads(subject, taken, rows), retire=True)
    _settle_overlaps(subject, taken, verdicts, proven=data)
    _settle_numbers(taken, verdicts)
    _prune(taken, verdicts)
    return verdicts


def _settle_overlaps(
    subject: Subject, taken: Snapshot, verdicts: Verdicts, *, proven: bool
) -> None:
    """Of all that claim one place, let the block stay whose payload is proved there.

    Free runs and limbo give way to it. If two are proved, the later generation wrote last.
    """
    standing = verdicts.standing()
    mine = taken.extents[standing[taken.extents["row"]]]
    runs = np.concatenate([mine, taken.free, taken.limbo])
    is_block = np.arange(len(runs)) < len(mine)
    order = np.lexsort((runs["offset"], runs["device"]))
    runs, is_block = runs[order], is_block[order]
    # Devices one behind the other, as one line; runs that touch each other's bytes are a cluster.
    base = runs["device"].astype(np.int64)
    ends = runs["offset"] + runs["length"]
    fresh = np.ones(len(runs), np.bool_)
    for device in np.unique(base).tolist():
        here = np.flatnonzero(base == device)
        reach = np.maximum.accumulate(ends[here])
        fresh[here[1:]] = runs["offset"][here[1:]] >= reach[:-1]
    cluster = np.cumsum(fresh) - 1
    disputed = (np.bincount(cluster, minlength=1) > 1)[cluster] if len(runs) else is_block
    rows = np.unique(runs["row"][disputed & is_block])
    if not len(rows):
        return
    if not proven:
        verdicts.hear(prove_payloads(subject, taken, rows), retire=False)
    rows = rows[verdicts.standing()[rows]]
    accepted: dict[int, list[tuple[int, int]]] = {}
    for row in rows[np.argsort(taken.rows["generation"][rows])[::-1]].tolist():
        extents = [(e.device, e.offset, e.offset + e.length) for e in taken.block(row).extents]
        if any(_taken_already(accepted.get(device, []), a, b) for device, a, b in extents):
            verdicts.lost[row] = True
            verdicts.why.setdefault(row, "a later block lies in its place")
            continue
        for device, a, b in extents:
            places = accepted.setdefault(device, [])
            places.insert(bisect_left(places, (a, b)), (a, b))


def _taken_already(places: list[tuple[int, int]], start: int, end: int) -> bool:
    """Tell whether one of *places*, in order and apart, has a byte of *start* to *end*."""
    at = bisect_left(places, (start, start))
    before = at > 0 and places[at - 1][1] > start
    return before or (at < len(places) and places[at][0] < end)


def _settle_numbers(taken: Snapshot, verdicts: Verdicts) -> None:
    """Let one of those with the same generation or inode stay; a hole gets another number."""
    for name in ("generation", "ino"):
        rows = np.flatnonzero(verdicts.standing())
        _, first = np.unique(taken.rows[name][rows], return_index=True)
        more = np.ones(len(rows), np.bool_)
        more[first] = False
        again = np.zeros(len(taken), np.bool_)
        again[rows[more]] = True
        verdicts.lose(again, f"another block has its {name}")


def _prune(taken: Snapshot, verdicts: Verdicts) -> None:
    """Drop what is lost and has no child that stays, from the tails up."""
    stays = ~verdicts.dropped
    parents = taken.parent_row[stays & (taken.parent_row >= 0)]
    children = np.bincount(parents, minlength=len(taken))
    ready = np.flatnonzero(verdicts.lost & stays & (children == 0)).tolist()
    while ready:
        row = ready.pop()
        verdicts.dropped[row] = True
        above = int(taken.parent_row[row])
        if above >= 0:
            children[above] -= 1
            if children[above] == 0 and verdicts.lost[above] and not verdicts.dropped[above]:
                ready.append(above)

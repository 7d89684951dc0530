"""The checker: one function per invariant of FORMAT.md, over one snapshot.

Used by `twfs check`, offline or inside the daemon, and at the end of every test. It changes
nothing. While the warehouse is in use a block may be evicted and its place overwritten; so what
looks wrong on a device counts only if the record is still the same after the look. Blocks.
"""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

import numpy as np

from twfs.checking.accounting import charges_are_true, payers_are_members
from twfs.checking.covering import flaws, wrong_in_memory
from twfs.checking.filecheck import files_agree
from twfs.checking.proving import prove_headers, prove_payloads
from twfs.checking.snapshot import (
    NUMBER_MAX,
    Snapshot,
    bounded,
    head_of,
    is_in,
    pair_of,
    take_enrolled,
    take_snapshot,
)
from twfs.checking.subject import Live, Subject
from twfs.devices.roster import newest_roster
from twfs.index.slots import SLOTS_MAX, IntArray
from twfs.records import Superblock
from twfs.store import CheckReport, Finding
from twfs.units import ALIGN, EXTENTS_MAX

FINDINGS_MAX: Final = 1000  # of one run; who has more needs no more of them
RETENTION_MAX: Final = 3


def superblocks_agree(subject: Subject, _: Snapshot) -> Iterator[str]:
    """I1: both copies of every superblock are whole and name this warehouse and device."""
    for device in subject.devices.values():
        for which, found in zip(("first", "last"), device.superblocks(), strict=True):
            if not isinstance(found, Superblock):
                yield f"device {device.index}: the {which} superblock copy: {found}"
            elif (found.warehouse, found.device, found.index) != (
                subject.uuid, device.uuid, device.index,
            ):  # fmt: skip
                yield f"device {device.index}: the {which} superblock copy is of another device"


def records_unpack(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I2: every record of the metadata can be read."""
    for each in taken.unreadable:
        yield each.text


def extents_tile(subject: Subject, taken: Snapshot) -> Iterator[str]:
    """I3: blocks, free runs and limbo cover each data area exactly once."""
    parts = (("block", taken.extents), ("free run", taken.free), ("limbo", taken.limbo))
    owned = np.concatenate([runs for _, runs in parts])
    kind = np.repeat(np.arange(len(parts)), [len(runs) for _, runs in parts])
    order = np.lexsort((owned["offset"], owned["device"]))
    owned, kind = owned[order], kind[order]

    def name(number: int) -> str:
        if kind[number]:
            return parts[kind[number]][0]
        return f"block {taken.name(int(owned['row'][number]))}"

    for index, (start, length) in subject.areas.items():
        mine = np.flatnonzero(owned["device"] == index)
        offsets, ends = owned["offset"][mine], owned["offset"][mine] + owned["length"][mine]
        inside = (ends > start) & (offsets < start + length)
        for at in np.flatnonzero(~inside & (kind[mine] > 0)).tolist():  # a block's is I4
            yield f"device {index}: {name(mine[at])} at {offsets[at]} is outside"
        mine, offsets, ends = mine[inside], offsets[inside], ends[inside]
        before = np.maximum.accumulate(np.concatenate([np.array([start], np.int64), ends]))
        for at in np.flatnonzero(offsets != before[:-1]).tolist():
            lies = f"device {index}: "
            if offsets[at] > before[at]:
                yield f"{lies}{offsets[at] - before[at]} bytes at {before[at]} belong to nothing"
            elif at:
                yield f"{lies}{name(mine[at])} at {offsets[at]} overlaps {name(mine[at - 1])}"
            elif kind[mine[at]]:
                yield f"{lies}{name(mine[at])} at {offsets[at]} begins outside"
        if before[-1] < start + length:
            missing = start + length - before[-1]
            yield f"device {index}: {missing} bytes at {before[-1]} belong to nothing"
        elif before[-1] > start + length and kind[mine[int(np.argmax(ends))]]:
            yield f"device {index}: {name(mine[int(np.argmax(ends))])} ends outside"
    for number in np.flatnonzero(~np.isin(owned["device"], list(subject.areas))).tolist():
        if kind[number]:
            yield f"{name(number)} on device {owned['device'][number]}, which is not there"


def outside(subject: Subject, taken: Snapshot) -> IntArray:
    """Tell which of taken.extents leave the data areas."""
    runs = taken.extents
    inside = np.zeros(len(runs), np.bool_)
    for index, (start, length) in subject.areas.items():
        inside |= (
            (runs["device"] == index)
            & (runs["offset"] >= start)
            & (runs["offset"] + runs["length"] <= start + length)
        )
    return ~inside


def misfits(taken: Snapshot) -> tuple[IntArray, IntArray]:
    """The bytes that each block's extents have, and those that it needs; 0 for a hole."""
    has = np.zeros(len(taken), np.int64)
    np.add.at(has, taken.extents["row"], taken.extents["length"])
    payload = bounded(taken.rows["payload_bytes"])
    return has, np.where(taken.hole, 0, ALIGN + -(-payload // ALIGN) * ALIGN)


def extents_fit(subject: Subject, taken: Snapshot) -> Iterator[str]:
    """I4: a block's extents hold exactly header and padded payload, inside data areas."""
    has, wanted = misfits(taken)
    wrong = (has != wanted) | (taken.rows["extent_count"] > EXTENTS_MAX)
    for row in np.flatnonzero(wrong & ~taken.hole).tolist():
        yield f"block {taken.name(row)}: {has[row]} bytes, not {wanted[row]}"
    for run in taken.extents[outside(subject, taken)]:
        where = f"{run['device']}:{run['offset']}+{run['length']}"
        yield f"block {taken.name(int(run['row']))}: {where} is outside every data area"


def with_header(subject: Subject, taken: Snapshot) -> IntArray:
    """The rows whose header can be looked at: inside a data area, of devices that are there.

    Blocks on a device that is offline are misses, which breaks nothing.
    """
    away = ~np.isin(taken.extents["device"], list(subject.devices))
    bad = taken.extents["row"][outside(subject, taken) | away]
    return np.setdiff1d(np.flatnonzero(taken.rows["extent_count"] > 0), bad)


def with_payload(subject: Subject, taken: Snapshot) -> IntArray:
    """The rows whose payload can be read: those that I4 says nothing of, but holes."""
    has, wanted = misfits(taken)
    fitting = np.flatnonzero((has == wanted) & ~taken.hole)
    return np.intersect1d(fitting, with_header(subject, taken))


def headers_agree(subject: Subject, taken: Snapshot) -> Iterator[str]:
    """I5: the header on the device says what the record says."""
    for complaint in prove_headers(subject, taken, with_header(subject, taken)):
        yield complaint.text


def numbers_are_unique(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I6: generations and inodes are unique, and with the models' numbers below their counters."""
    for name in ("generation", "ino"):
        numbers, counts = np.unique(taken.rows[name], return_counts=True)
        for at in np.flatnonzero(counts > 1).tolist():
            yield f"{name} {numbers[at]} belongs to {counts[at]} blocks"
        if len(numbers) and int(numbers[-1]) >= taken.counters[name]:
            yield f"{name} {numbers[-1]} is not below its counter {taken.counters[name]}"
    for name in ("generation", "ino", "model"):
        if taken.counters[name] > NUMBER_MAX:
            yield f"the counter {taken.counters[name]} of {name} is beyond all use"
    if taken.models and max(taken.models) >= taken.counters["model"]:
        yield f"model {max(taken.models)} is not below its counter {taken.counters['model']}"


def slots_are_unique(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I7: no two blocks have one slot, and every slot is below 2147483648."""
    numbers, counts = np.unique(taken.rows["slot"], return_counts=True)
    for at in np.flatnonzero(counts > 1).tolist():
        yield f"slot {numbers[at]} belongs to {counts[at]} blocks"
    for number in numbers[numbers >= SLOTS_MAX].tolist():
        yield f"slot {number} is beyond all slots"


def children_agree(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I8: the children table has exactly the (parent, child) pairs of the blocks."""
    meant = taken.meant_children()
    for at in np.flatnonzero(~is_in(meant, taken.children)).tolist():
        parent, child = pair_of(meant, at)
        yield f"block {child.hex()} is missing among the children of {parent.prefix_hash.hex()}"
    for at in np.flatnonzero(~is_in(taken.children, meant)).tolist():
        parent, child = pair_of(taken.children, at)
        yield f"{child.hex()} is noted as a child of {parent.prefix_hash.hex()} but is none"


def heads_agree(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I9: the heads are exactly the attached, complete blocks without a complete child."""
    meant = taken.meant_heads(taken.detached)
    for at in np.flatnonzero(~is_in(meant, taken.heads)).tolist():
        yield f"{head_of(meant, at)[1].hex()} is a head but not noted as one"
    for at in np.flatnonzero(~is_in(taken.heads, meant)).tolist():
        yield f"{head_of(taken.heads, at)[1].hex()} is noted as a head but is none"


def out_of_layout(taken: Snapshot) -> IntArray:
    """Tell which blocks have a group or shard that their layout has not."""
    wrong = np.zeros(len(taken), np.bool_)
    for record in taken.models.values():
        of = (taken.group >= len(record.layout.groups)) | (taken.shard >= record.layout.shards)
        wrong |= (taken.model == record.id) & of
    return wrong


def layout_bytes(taken: Snapshot) -> IntArray:
    """The payload's length that the layout says; -1 where it says none.

    Where the layout allows any, the one that there is, as long as the layout's bounds hold.
    """
    meant = np.full(len(taken), -1, np.int64)
    has = bounded(taken.rows["payload_bytes"])
    for record in taken.models.values():
        for group in range(len(record.layout.groups)):
            mine = (taken.model == record.id) & (taken.group == group)
            most = record.layout.block_bytes(group)
            any_length = record.layout.any_length(group)
            meant[mine] = np.clip(has[mine], 1, most) if any_length else most
    return meant


def layouts_agree(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I10: a block's model is there, and group, shard and length are of its layout."""
    for row in np.flatnonzero(~taken.known).tolist():
        model = taken.model[row]
        yield f"block {taken.name(row)} is of model number {model}, which is not there"
    misplaced = out_of_layout(taken)
    for row in np.flatnonzero(misplaced).tolist():
        place = f"group {taken.group[row]}, shard {taken.shard[row]}"
        yield f"block {taken.name(row)} has {place}: the layout has not"
    meant, has = layout_bytes(taken), bounded(taken.rows["payload_bytes"])
    for row in np.flatnonzero((has != meant) & taken.known & ~misplaced).tolist():
        yield f"block {taken.name(row)} has {has[row]} bytes, its layout says {meant[row]}"


def not_behind(taken: Snapshot) -> IntArray:
    """Tell which blocks do not end behind their parent, or are their own ancestors."""
    at = np.maximum(taken.parent_row, 0)
    position = taken.rows["position"]
    if not len(taken):
        return np.zeros(0, np.bool_)
    wrong = (taken.parent_row >= 0) & (position > 0) & (position <= position[at])
    return np.asarray(wrong | taken.in_ring)


def positions_grow(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I11: a block ends behind its parent, where both positions are known; no chain is a ring."""
    position = taken.rows["position"]
    for row in np.flatnonzero(not_behind(taken)).tolist():
        if taken.in_ring[row]:
            yield f"block {taken.name(row)} is its own ancestor"
        else:
            above = position[taken.parent_row[row]]
            yield f"block {taken.name(row)} ends at token {position[row]}, its parent at {above}"


def payloads_match(subject: Subject, taken: Snapshot) -> Iterator[str]:
    """I12: every payload has its checksums. Reads everything."""
    for complaint in prove_payloads(subject, taken, with_payload(subject, taken)):
        yield complaint.text


def holes_are_empty(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I13: a hole has no extents, and every other block has some."""
    counts = taken.rows["extent_count"]
    for row in np.flatnonzero(taken.hole == (counts > 0)).tolist():
        yield f"block {taken.name(row)}: hole={taken.hole[row]}, {counts[row]} extents"


def classes_exist(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I14: the retention class is one of the four."""
    classes = taken.rows["retention"]
    for row in np.flatnonzero(classes > RETENTION_MAX).tolist():
        yield f"block {taken.name(row)} has retention class {classes[row]}"


def free_runs_are_merged(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I15: no two free runs touch."""
    before, after = taken.free[:-1], taken.free[1:]
    touch = (before["device"] == after["device"]) & (
        before["offset"] + before["length"] == after["offset"]
    )
    for first, second in zip(before[touch].tolist(), after[touch].tolist(), strict=True):
        yield f"free runs {first[1]}:{first[2]}+{first[3]} and {second[1]}:{second[2]} touch"


def chains_have_no_gap(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I16: a block of a full group is detached, or its parent is there and is not detached."""
    if not len(taken):
        return
    above = taken.parent_row
    gap = taken.linked & ((above < 0) | taken.detached[np.maximum(above, 0)])
    for row in np.flatnonzero(taken.known & (taken.detached != (gap & taken.full))).tolist():
        if not taken.detached[row]:
            why = "is without parent"
        elif not taken.full[row]:
            why = "is detached, but its group has no chains"
        else:
            why = "is detached though " + (
                "its parent is there" if taken.linked[row] else "it starts its chain"
            )
        yield f"block {taken.name(row)} {why}"


def roster_agrees(subject: Subject, taken: Snapshot) -> Iterator[str]:
    """I22: the newest roster on the devices has the models and epochs that the metadata has."""
    with subject.enrolling_held():  # no model is made between the two looks
        roster = newest_roster(subject.devices.values(), subject.secret, subject.uuid)
        with subject.metadata.read() as view:
            taken = take_enrolled(view)
    names = {name: taken.models.get(number) for name, number in taken.names.items()}
    for name, number in taken.meant_names().items():
        if taken.names.get(name) != number:
            yield f"the name of model {name} does not lead to its newest epoch"
    for name in names.keys() - taken.meant_names().keys():
        yield f"the name {name} leads to no model"
    if roster is None:
        yield "no device has a whole roster"
        return
    ahead = roster.sequence - taken.roster_sequence
    if ahead not in (0, 1):  # 1: a crash came between roster and metadata; the next start ends it
        yield f"the roster has number {roster.sequence}, the metadata's is {taken.roster_sequence}"
    there = {model.name: (model.epoch, model.layout.fingerprint) for model in roster.models}
    meant = {
        name: (taken.models[number].epoch, taken.models[number].layout.fingerprint)
        for name, number in taken.meant_names().items()
    }
    for name in sorted(there.keys() | meant.keys()):
        has, wanted = there.get(name), meant.get(name)
        newer = has is not None and (wanted is None or has[0] > wanted[0])
        if has != wanted and not (ahead == 1 and newer):
            yield f"the roster has model {name} {_epoch(has)}, the metadata {_epoch(wanted)}"


def sessions_end_somewhere(_: Subject, taken: Snapshot) -> Iterator[str]:
    """I23: a session ends at a block that stands for its prefix hash; the ends say where."""
    yield from flaws(taken)


def classes_are_highest(subject: Subject, taken: Snapshot) -> Iterator[str]:
    """I24: in memory a block has the highest class of the sessions over it."""
    if isinstance(subject, Live):
        yield from wrong_in_memory(subject.core, taken)


def _epoch(of: tuple[int, bytes] | None) -> str:
    """An epoch and layout in words."""
    return "not" if of is None else f"in epoch {of[0]} with layout {of[1].hex()[:8]}"


INVARIANTS: Final[dict[int, Callable[[Subject, Snapshot], Iterator[str]]]] = {
    1: superblocks_agree,
    2: records_unpack,
    3: extents_tile,
    4: extents_fit,
    5: headers_agree,
    6: numbers_are_unique,
    7: slots_are_unique,
    8: children_agree,
    9: heads_agree,
    10: layouts_agree,
    11: positions_grow,
    12: payloads_match,
    13: holes_are_empty,
    14: classes_exist,
    15: free_runs_are_merged,
    16: chains_have_no_gap,
    22: roster_agrees,
    23: sessions_end_somewhere,
    24: classes_are_highest,
    25: payers_are_members,
    26: charges_are_true,
    27: files_agree,
}
DATA_INVARIANT: Final = 12  # reads every payload: only when asked to


def run(subject: Subject, *, data: bool = False) -> CheckReport:
    """Check every invariant; with *data* every payload too. At most FINDINGS_MAX findings."""
    began = time.monotonic()
    with subject.metadata.read() as view:
        taken = take_snapshot(view)
    findings: list[Finding] = []
    for number, invariant in INVARIANTS.items():
        if number == DATA_INVARIANT and not data:
            continue
        left = FINDINGS_MAX - len(findings)
        findings += [Finding(number, text) for text in islice(invariant(subject, taken), left)]
    payloads = int((~taken.hole).sum()) if data else 0
    return CheckReport(tuple(findings), len(taken), payloads, round(time.monotonic() - began, 3))

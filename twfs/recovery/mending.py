"""All tables as the blocks that stay mean them, and the differences from what is there.

Children, heads, detached flags and free runs follow from the blocks alone, so they are made anew
and not patched. Changes nothing but what it is given to write into.
"""

from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from twfs.checking.covering import meant_ends, sound_sessions
from twfs.checking.invariants import RETENTION_MAX, layout_bytes
from twfs.checking.snapshot import COUNTERS, NUMBER_MAX, RUN_DTYPE, Snapshot, is_in, shifted
from twfs.checking.subject import Subject
from twfs.devices.roster import Roster
from twfs.index.charges import astray
from twfs.index.slots import KEY_BYTES, SLOTS_MAX, IntArray
from twfs.metadata.tables import LENGTH, LIMBO, MODEL_KEY, PLACE_KEY, WriteView
from twfs.records import BLOCK_DTYPE, EXTENT, FLAG_DETACHED, FLAG_HOLE
from twfs.recovery.verdicts import Verdicts
from twfs.store import Retention
from twfs.tenants import Tenants
from twfs.units import ALIGN

FIRST_EXTENT: Final = ("offset", "units", "device", "extent_reserved")
FIRST_NUMBER: Final = {"generation": 1, "ino": 1 << 20, "model": 1}  # as of a new warehouse


@dataclass(slots=True)
class Changes:
    """Packed pairs to take out and then to put in: (table, key, value)."""

    gone: list[tuple[str, bytes, bytes]] = field(default_factory=list)
    fresh: list[tuple[str, bytes, bytes]] = field(default_factory=list)

    def write(self, view: WriteView) -> None:
        """The transaction."""
        for table, key, value in self.gone:
            view.delete_raw(table, key, value if table == "children" else b"")
        for table, key, value in self.fresh:
            if table == "children":
                view.add_raw_child(key, value)
            else:
                view.put_raw(table, key, value)


def plausible(number: int) -> int:
    """A counter, or 0 if nobody can have counted so far."""
    return number if number <= NUMBER_MAX else 0


def mended(
    subject: Subject, taken: Snapshot, verdicts: Verdicts, roster: Roster | None, done: list[str]
) -> Snapshot:
    """All tables as they are to be; what that means is added to *done*, a line each."""
    for row, why in sorted(verdicts.why.items()):
        end = "dropped" if verdicts.dropped[row] else "a hole now, for its children"
        done.append(f"block {taken.name(row)}: {why}: {end}")
    kept = ~verdicts.dropped
    lost = verdicts.lost[kept]
    meant = replace(
        taken, keys=taken.keys[kept], rows=taken.rows[kept].copy(), unreadable=[],
        tails=shifted(taken.tails, kept), names=taken.meant_names(),
    )  # fmt: skip
    number = np.cumsum(kept) - 1
    for row, digest in verdicts.digests.items():
        if kept[row]:
            meant.rows["digest"][number[row]] = np.void(digest)
    _empty_holes(meant, lost)
    counters = _number(taken, meant, lost, roster)
    _mend_fields(meant.rows, Tenants(() if roster is None else roster.tenants), done)
    # Derived columns are computed once, so what follows a change looks at a fresh copy.
    meant = replace(meant, counters=counters)
    wanted = meant.meant_detached()
    meant.rows["flags"] &= np.uint8(0xFF ^ FLAG_DETACHED)
    meant.rows["flags"][wanted] |= np.uint8(FLAG_DETACHED)
    meant = replace(meant)
    meant.children, meant.heads = meant.meant_children(), meant.meant_heads(wanted)
    meant.sessions = sound_sessions(meant)
    meant.ends = meant_ends(meant.sessions)
    _lay_out(subject, taken, meant, verdicts)
    return meant


def _empty_holes(meant: Snapshot, lost: IntArray) -> None:
    """Take the bytes from the records that are *lost*."""
    rows = meant.rows
    for row in np.flatnonzero(lost & (rows["extent_count"] > 1)).tolist():
        rest = meant.tails[row][(int(rows["extent_count"][row]) - 1) * EXTENT.size :]
        meant.tails[row] = rest
    rows["flags"][lost] |= np.uint8(FLAG_HOLE)
    for name in ("extent_count", *FIRST_EXTENT):
        rows[name][lost] = 0
    hole = (rows["flags"] & FLAG_HOLE) != 0
    rows["payload_bytes"][hole] = layout_bytes(meant)[hole]


def _number(
    taken: Snapshot, meant: Snapshot, lost: IntArray, roster: Roster | None
) -> dict[str, int]:
    """Give new numbers to holes that need some; the counters, above all that is in use."""
    ends = {"generation": 1, "ino": 1} if roster is None else {
        "generation": roster.generation_end, "ino": roster.ino_end,
    }  # fmt: skip
    hole = (meant.rows["flags"] & FLAG_HOLE) != 0
    counters = dict(taken.counters)
    for name, end in ends.items():
        column = meant.rows[name]
        highest = int(column[~hole].max()) + 1 if (~hole).any() else 0
        counters[name] = max(plausible(taken.counters[name]), end, highest, FIRST_NUMBER[name])
        again = lost | (hole & (column >= counters[name]))
        again |= hole & np.isin(column, column[~hole])
        old = np.flatnonzero(hole & ~again)
        _, first = np.unique(column[old], return_index=True)
        again[np.setdiff1d(old, old[first])] = True
        count = int(again.sum())
        column[again] = np.arange(counters[name], counters[name] + count, dtype=np.uint64)
        counters[name] += count
    counters["model"] = max(
        plausible(taken.counters["model"]), *(number + 1 for number in meant.models), 1
    )
    return counters


def _mend_fields(rows: IntArray, tenants: Tenants, done: list[str]) -> None:
    """Make classes those that there are, payers members of their groups, and slots unique."""
    wrong = rows["retention"] > RETENTION_MAX
    if wrong.any():
        rows["retention"][wrong] = Retention.STANDARD.rank
        done.append(f"{int(wrong.sum())} blocks have the class standard now: they had none")
    unpaid = astray(rows["tenant"], rows["payer"], tenants)
    if unpaid.any():
        rows["payer"][unpaid] = 0
        done.append(
            f"{int(unpaid.sum())} blocks are charged to nobody now: who paid is not of their group"
        )
    again = np.ones(len(rows), np.bool_)
    again[np.unique(rows["slot"], return_index=True)[1]] = False
    again |= rows["slot"] >= SLOTS_MAX
    count = int(again.sum())
    if count:
        unused = np.setdiff1d(np.arange(len(rows)), rows["slot"][~again])
        rows["slot"][again] = unused[:count]
        done.append(f"{count} blocks have a slot of their own now")


def _lay_out(subject: Subject, taken: Snapshot, meant: Snapshot, verdicts: Verdicts) -> None:
    """Make free runs of all that belongs to no block and is not retired."""
    doomed = taken.extents[verdicts.retired[taken.extents["row"]]]
    retired = np.concatenate([taken.limbo[taken.retired], doomed])
    used = meant.extents
    free: list[tuple[int, int, int, int]] = []
    limbo: list[tuple[int, int, int, int]] = []
    for device in subject.devices.values():
        start, length = device.data_area
        mine = used[used["device"] == device.index]
        places = sorted(zip(mine["offset"].tolist(), mine["length"].tolist(), strict=True))
        gaps = _gaps(places, start, start + length)
        lost = retired[retired["device"] == device.index]
        never = sorted(zip(lost["offset"].tolist(), lost["length"].tolist(), strict=True))
        for at, size, is_free in _split(gaps, never):
            runs = free if is_free else limbo
            runs.append((len(runs), device.index, at, size))
    meant.free, meant.limbo = np.array(free, RUN_DTYPE), np.array(limbo, RUN_DTYPE)
    meant.retired = np.ones(len(limbo), np.bool_)


def _gaps(places: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What of *start* to *end* is in none of *places*, (offset, length) in order; as start, end."""
    gaps = []
    at = start
    for offset, length in places:
        if offset > at:
            gaps.append((at, offset))
        at = max(at, offset + length)
    if at < end:
        gaps.append((at, end))
    return gaps


def _split(
    gaps: list[tuple[int, int]], never: list[tuple[int, int]]
) -> list[tuple[int, int, bool]]:
    """Cut *gaps* into runs (offset, length, free) by the places *never* used again, in order."""
    runs: list[tuple[int, int, bool]] = []
    next_never = 0
    for start, end in gaps:
        at = start
        while next_never < len(never) and sum(never[next_never]) <= at:
            next_never += 1
        number = next_never
        while number < len(never) and never[number][0] < end:
            low, high = max(at, never[number][0]), min(end, sum(never[number]))
            if low > at:
                runs.append((at, low - at, True))
            if high > low:
                runs.append((low, high - low, False))
            at = max(at, high)
            number += 1
        if at < end:
            runs.append((at, end - at, True))
    return runs


def differences(before: Snapshot, meant: Snapshot, verdicts: Verdicts, done: list[str]) -> Changes:
    """What is to be written so that the tables are *meant*; a line per table to *done*."""
    changes = Changes()
    for each in before.unreadable:
        done.append(f"{each.text}: taken out of {each.table}")
        if each.table != "meta":
            changes.gone.append((each.table, each.key, each.value))
    _blocks(before, meant, verdicts, changes)
    for table, old, new in (
        ("children", before.children, meant.children), ("heads", before.heads, meant.heads)
    ):  # fmt: skip
        size = KEY_BYTES if table == "children" else old.dtype.itemsize
        gone, fresh = old[~is_in(old, new)], new[~is_in(new, old)]
        changes.gone += [(table, name[:size], name[size:]) for name in _packed(gone)]
        changes.fresh += [(table, name[:size], name[size:]) for name in _packed(fresh)]
        _say(done, table, len(gone), len(fresh))
    _pairs(changes, done, "free", _runs(before.free), _runs(meant.free))
    held = {key: value + LENGTH.pack(bool(flag)) for (key, value), flag in zip(
        _runs(before.limbo).items(), before.retired.tolist(), strict=True)}  # fmt: skip
    never = {key: value + LENGTH.pack(1) for key, value in _runs(meant.limbo).items()}
    _pairs(changes, done, "limbo", held, never)
    _pairs(
        changes, done, "models",
        {MODEL_KEY.pack(number): b"" for number in before.models},
        {
            MODEL_KEY.pack(number): b"" if number in before.models else record.pack()
            for number, record in meant.models.items()
        },
    )  # fmt: skip
    _pairs(
        changes, done, "names",
        {name.encode(): MODEL_KEY.pack(number) for name, number in before.names.items()},
        {name.encode(): MODEL_KEY.pack(number) for name, number in meant.names.items()},
    )  # fmt: skip
    _pairs(
        changes, done, "sessions",
        {key.pack(): session.pack() for key, session in before.sessions.items()},
        {key.pack(): session.pack() for key, session in meant.sessions.items()},
    )  # fmt: skip
    _pairs(
        changes, done, "ends", dict.fromkeys(before.ends, b""), dict.fromkeys(meant.ends, b"")
    )  # fmt: skip
    for name in COUNTERS:
        if meant.counters[name] != before.counters[name]:
            changes.fresh.append(("counters", name.encode(), LENGTH.pack(meant.counters[name])))
            done.append(f"counter {name}: {meant.counters[name]}, was {before.counters[name]}")
    return changes


def _blocks(before: Snapshot, meant: Snapshot, verdicts: Verdicts, changes: Changes) -> None:
    """The records that go, and those that change."""
    changes.gone += [
        ("blocks", key, b"") for key in _packed(before.keys[verdicts.dropped])
    ]  # fmt: skip
    stayed = np.flatnonzero(~verdicts.dropped)
    plain = f"V{BLOCK_DTYPE.itemsize}"
    changed = before.rows[stayed].view(plain) != meant.rows.view(plain)
    for row in np.flatnonzero(changed).tolist():
        value = meant.rows[row : row + 1].tobytes() + meant.tails.get(row, b"")
        changes.fresh.append(("blocks", meant.keys[row : row + 1].tobytes(), value))


def _packed(names: IntArray) -> list[bytes]:
    """Strings of fixed length as bytes, with the zeros at their ends."""
    size, data = names.dtype.itemsize, names.tobytes()
    return [data[at : at + size] for at in range(0, len(data), size)]


def _runs(runs: IntArray) -> dict[bytes, bytes]:
    """Packed place and length of *runs*."""
    return {
        PLACE_KEY.pack(device, offset): LENGTH.pack(length)
        for _, device, offset, length in runs.tolist()
    }


def _pairs(
    changes: Changes, done: list[str], table: str, before: dict[bytes, bytes],
    meant: dict[bytes, bytes],
) -> None:  # fmt: skip
    """The differences of one small table."""
    gone = [key for key in before if key not in meant]
    fresh = {key: value for key, value in meant.items() if before.get(key) != value}
    changes.gone += [(table, key, b"") for key in gone]
    changes.fresh += [(table, key, value) for key, value in fresh.items()]
    _say(done, table, len(gone), len(fresh))


def _say(done: list[str], table: str, gone: int, fresh: int) -> None:
    if gone or fresh:
        done.append(f"{table}: {gone} taken out, {fresh} put in")


assert LIMBO.size == 2 * LENGTH.size
assert ALIGN == 4096

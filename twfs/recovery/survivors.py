"""Which of the blocks that a scan found make up the rebuilt warehouse, and in which order.

Among blocks that overlap the newest (highest generation) that verifies is true: whoever reserved
an extent did so after all before it had been freed. Of two lives of one block the newer is true.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from twfs.devices.roster import Roster
from twfs.metadata import ledger
from twfs.records import BLOCK_KEY
from twfs.recovery.scanning import VERIFIERS, Array, Cause, Found, Scan, Taken, crowded
from twfs.units import ALIGN

VERIFIED_AT_ONCE: Final = 4096
DEVICE_SHIFT: Final = 47  # a device of 128 TiB and 65,536 of them fit 63 bits
KEY_BYTES: Final = BLOCK_KEY.size


@dataclass(slots=True)
class Survivors:
    """The blocks, in *found*; those named in *order* come back, parents before their children."""

    found: Found
    order: Array
    epochs: dict[int, int]  # of models that have a higher one in a header than in the roster


def survivors(scan: Scan, done: Callable[[int, int], None]) -> Survivors:
    """Verify what is still to be, and choose; counts what is not chosen in *scan*.

    *done* is called with bytes verified and bytes to verify. Blocks on devices.
    """
    stale = _void_old_epochs(scan)
    found = scan.whole
    sure = len(found)
    found.extend(scan.apart)
    rows = found.rows()
    live = np.ones(len(rows), np.bool_)
    epochs = np.array([model.epoch for model in scan.roster.models] or [0], np.uint64)
    for model, epoch in stale.items():
        epochs[model] = epoch
    if len(rows):
        live &= rows["epoch"] == epochs[rows["model"]]
    scan.rejected[Cause.OLD_EPOCH] += int((~live).sum())
    _verify(scan, found, live, sure, done)
    _drop_older_lives(scan, rows, live)
    return Survivors(found, _parents_first(scan.roster, rows, live), stale)


def _void_old_epochs(scan: Scan) -> dict[int, int]:
    """The models whose roster is behind their headers, with the highest epoch seen."""
    highest: dict[int, int] = {}
    for part in (scan.whole, scan.apart):
        rows = part.rows()
        for model in np.unique(rows["model"]).tolist():
            top = int(rows["epoch"][rows["model"] == model].max())
            if top > max(highest.get(model, 0), scan.roster.models[model].epoch):
                highest[model] = top
    return highest


def _verify(
    scan: Scan, found: Found, live: Array, sure: int, done: Callable[[int, int], None]
) -> None:
    """Clear *live* of rows below newer ones, and of those from *sure* on that do not verify."""
    rows = found.rows()
    touching = _touching(found, rows, live)
    alone = [row for row in range(sure, len(rows)) if live[row] and not touching[row]]
    alone.sort(key=lambda row: (int(rows["device"][row]), int(rows["offset"][row])))
    waiting = sum(int(rows["payload_bytes"][row]) for row in range(sure, len(rows)) if live[row])
    verified = 0
    with ThreadPoolExecutor(VERIFIERS, "twfs-verify") as pool:
        # In runs: a future for each of a million blocks would take a gigabyte.
        for start in range(0, len(alone), VERIFIED_AT_ONCE):
            run = alone[start : start + VERIFIED_AT_ONCE]
            for row, good in zip(run, pool.map(scan.verify, map(found.block, run)), strict=True):
                live[row] = good
                scan.rejected[Cause.PAYLOAD] += not good
                verified += int(rows["payload_bytes"][row])
                done(verified, waiting)
    taken: dict[int, Taken] = {}
    together = np.flatnonzero(live & touching)
    newest_first = together[np.argsort(rows["generation"][together], kind="stable")[::-1]]
    for row in newest_first.tolist():
        block = found.block(row)
        places = [
            (taken.setdefault(extent.device, Taken()), extent.offset, extent.offset + extent.length)
            for extent in block.extents
        ]
        covered = any(ranges.overlaps(start, end) for ranges, start, end in places)
        if row >= sure:
            verified += block.payload_bytes
            done(verified, waiting)
        if covered or (row >= sure and not scan.verify(block)):
            live[row] = False
            scan.rejected[Cause.OVERWRITTEN if covered else Cause.PAYLOAD] += 1
            continue
        for ranges, start, end in places:
            ranges.add(start, end)


def _touching(found: Found, rows: Array, live: Array) -> Array:
    """Tell of each row whether an extent of it may overlap one of another."""
    split = [(row, extent) for row, extent in found.split() if live[row]]
    first = np.flatnonzero(live)
    owner = np.concatenate([first, np.array([row for row, _ in split], np.int64)])
    devices = np.concatenate(
        [rows["device"][first], np.array([extent.device for _, extent in split], np.uint16)]
    ).astype(np.int64)
    offsets = np.concatenate(
        [rows["offset"][first], np.array([extent.offset for _, extent in split], np.uint64)]
    ).astype(np.int64)
    lengths = np.concatenate(
        [
            rows["units"][first].astype(np.int64) * ALIGN,
            np.array([extent.length for _, extent in split], np.int64),
        ]
    )
    starts = (devices << DEVICE_SHIFT) + offsets
    order = np.argsort(starts, kind="stable")
    touching = np.zeros(len(rows), np.bool_)
    touching[owner[order][crowded(starts[order], (starts + lengths)[order])]] = True
    return touching


def _names(rows: Array) -> Array:
    """The full names as BLOCK_KEY bytes, the model by its place in the roster: n x 23."""
    names = np.zeros((len(rows), KEY_BYTES), np.uint8)
    names[:, :4] = rows["model"].astype(">u4").view(np.uint8).reshape(-1, 4)
    names[:, 4:20] = np.ascontiguousarray(rows["prefix_hash"]).view(np.uint8).reshape(-1, 16)
    names[:, 20] = rows["group"]
    names[:, 21:] = rows["shard"].astype(">u2").view(np.uint8).reshape(-1, 2)
    return names


def _drop_older_lives(scan: Scan, rows: Array, live: Array) -> None:
    """Of the rows of one full name, leave the newest."""
    here = np.flatnonzero(live)
    names = _names(rows[here]).view(f"S{KEY_BYTES}").ravel()
    order = np.lexsort((rows["generation"][here].max(initial=0) - rows["generation"][here], names))
    older = np.zeros(len(here), np.bool_)
    older[1:] = names[order][1:] == names[order][:-1]
    live[here[order][older]] = False
    scan.rejected[Cause.OLDER] += int(older.sum())


def _parents_first(roster: Roster, rows: Array, live: Array) -> Array:
    """The live rows: those of one model, group and shard together, each tree from its root on.

    A block that ends before its parent does (one of the two was never seen together with the
    other) has an end that is not known from here on: so none of them is lost.
    """
    here = np.flatnonzero(live)
    mine = rows[here]
    names = _names(mine)
    above = names.copy()
    above[:, 4:20] = np.ascontiguousarray(mine["parent"]).view(np.uint8).reshape(-1, 16)
    keys = names.view(f"S{KEY_BYTES}").ravel()
    wanted = above.view(f"S{KEY_BYTES}").ravel()
    tokens = np.array([model.layout.block_tokens for model in roster.models] or [0], np.uint32)
    starts = mine["parent"] == np.void(ledger.NO_PARENT)
    starts |= (mine["key_bytes"] == 0) & (mine["position"] == tokens[mine["model"]])
    up = np.arange(len(here))
    if len(here):
        by_name = np.argsort(keys, kind="stable")
        at = np.minimum(np.searchsorted(keys[by_name], wanted), len(keys) - 1)
        there = (keys[by_name][at] == wanted) & ~starts
        up[there] = by_name[at[there]]
    wrong = (up != np.arange(len(here))) & (mine["position"] > 0)
    wrong &= mine["position"] <= mine["position"][up]
    rows["position"][here[wrong]] = 0
    depth = (up != np.arange(len(here))).astype(np.int64)
    root = up.copy()
    while True:  # doubles the height looked at: as many rounds as the depth has bits
        higher = root[root]
        if (higher == root).all() or (depth > len(here)).any():  # a ring has no root
            break
        depth += depth[root]
        root = higher
    order = np.lexsort((depth, root, mine["shard"], mine["group"], mine["model"]))
    return here[order]

"""Counts of marks at or below every block of a forest, kept by walking only what changes.

A mark that moves along its chain changes nothing above the nearer end, so that a turn costs its
own blocks, and losing a tail costs that tail. *parent* has the slot above, NONE at a first block.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy.typing as npt

IntArray = npt.NDArray[Any]

NONE: Final = 0xFFFFFFFF  # in the parent array: no parent is there


def add_marks(
    parent: IntArray, counts: IntArray, slot: int, step: int, stop: int | None = None
) -> list[int]:
    """Add *step* to the counts of *slot* and what is above, up to before *stop*; those slots."""
    changed = []
    at = slot
    while at not in (NONE, stop):
        counts[at] += step
        changed.append(at)
        at = int(parent[at])
    return changed


def move_marks(
    parent: IntArray, counts: IntArray, became: Sequence[int], ceased: Sequence[int]
) -> list[int]:
    """Count anew after the slots *became* were marked and *ceased* are not; what changed."""
    both = set(became) & set(ceased)
    added = [slot for slot in became if slot not in both]
    dropped = {slot for slot in ceased if slot not in both}
    rising: set[int] = set()
    changed: list[int] = []
    for mark in added:
        met = _meet(parent, mark, dropped)
        if met is None:
            rising.add(mark)
        else:
            changed += add_marks(parent, counts, mark, 1, met)
            dropped.discard(met)
    for mark in dropped:
        met = _meet(parent, mark, rising)
        changed += add_marks(parent, counts, mark, -1, met)
        if met is not None:
            rising.discard(met)
    for mark in rising:
        changed += add_marks(parent, counts, mark, 1)
    return changed


def _meet(parent: IntArray, slot: int, ends: set[int]) -> int | None:
    """The first of *ends* on the way from *slot* to the root."""
    at = slot
    while ends and at != NONE:
        if at in ends:
            return at
        at = int(parent[at])
    return None

"""Extents on their way from a block that is gone to free space: what core knows of them."""

from dataclasses import dataclass, field

from twfs.records import Extent


@dataclass(slots=True)
class Freed:
    """Extents of removed blocks, and of these the ones whose headers are to be overwritten."""

    extents: list[Extent] = field(default_factory=list)
    headers: list[Extent] = field(default_factory=list)


@dataclass(slots=True)
class Left:
    """A place that a block has left while pins numbered up to *last_pin* may read it."""

    extents: tuple[Extent, ...]
    last_pin: int
    holders: int  # of these pins, how many have not ended


def unpin_left(places: dict[int, list[Left]], slot: int, pin: int) -> list[Extent]:
    """Count *pin* off the places left by *slot*'s block; returns those nobody reads now."""
    over: list[Extent] = []
    kept = []
    for left in places[slot]:
        left.holders -= pin <= left.last_pin
        if left.holders:
            kept.append(left)
        else:
            over += left.extents
    if kept:
        places[slot] = kept
    else:
        del places[slot]
    return over

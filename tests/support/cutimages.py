"""Crash images: what disks may hold after a power cut, made from the log of their writes.

A cut after any record of the log keeps, of every disk, all that came before its last flush, and of
what came behind that any subset of sectors: whole writes, or torn ones, in any order.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from support.faultrules import SECTOR, Kind, Logged

Image = npt.NDArray[np.uint8]
Range = tuple[int, int]

TORN: Final = 0.3  # of the writes that came through, those of which some sectors did not
KEPT: Final = (0.0, 0.15, 0.5, 0.85, 1.0)  # share of unflushed writes that came through


@dataclass(slots=True)
class _Disk:
    """One disk: what is durable, what is not, and how the image differs from what is durable."""

    durable: Image
    image: Image
    pending: list[Logged] = field(default_factory=list)
    changed: list[Range] = field(default_factory=list)

    def settle(self) -> None:
        """Take over all that is pending, as a flush does."""
        for record in self.pending:
            stop = record.offset + len(record.data)
            self.durable[record.offset : stop] = np.frombuffer(record.data, np.uint8)
            self.changed.append((record.offset, stop))
        self.pending.clear()

    def restore(self, *, whole: bool) -> None:
        """Make the image what is durable; only where it was changed here, unless *whole*."""
        if whole:
            self.image[:] = self.durable
        for start, stop in () if whole else self.changed:
            self.image[start:stop] = self.durable[start:stop]
        self.changed.clear()


@dataclass(frozen=True, slots=True)
class Cut:
    """Which image was made: after how many records, and what became of unflushed writes."""

    records: int
    kept: float
    unflushed: int
    written: int
    torn: int


class CrashImages:
    """Makes one crash image after another, in place: in the files that the disks serve.

    The files must hold what the log's disks held before its first record: zeros.
    """

    def __init__(self, log: Sequence[Logged], files: Mapping[int, Path]) -> None:
        self._log = log
        self._at = 0
        self._disks = {}
        for number, path in files.items():
            image = np.memmap(path, np.uint8, "r+")
            self._disks[number] = _Disk(np.zeros(len(image), np.uint8), image)

    def matches(self) -> bool:
        """Tell whether the whole log makes what the files hold now; to be asked first."""
        disks = {number: disk.durable.copy() for number, disk in self._disks.items()}
        for record in self._log:
            if record.kind is Kind.WRITE:
                stop = record.offset + len(record.data)
                disks[record.disk][record.offset : stop] = np.frombuffer(record.data, np.uint8)
        return all(np.array_equal(disks[number], self._disks[number].image) for number in disks)

    def advance(self, records: int) -> None:
        """Go on to the moment after so many *records*; never back."""
        assert records >= self._at
        for record in self._log[self._at : records]:
            if record.kind is Kind.WRITE:
                self._disks[record.disk].pending.append(record)
            elif record.kind is Kind.FLUSH:
                self._disks[record.disk].settle()
        self._at = records

    @property
    def unflushed(self) -> int:
        """Writes that a cut now may lose."""
        return sum(len(disk.pending) for disk in self._disks.values())

    def cut(self, chance: random.Random, *, spoilt: Sequence[int]) -> Cut:
        """Make the files what a cut now may leave; the *spoilt* ones were changed by others."""
        kept = chance.choice(KEPT)
        unflushed = self.unflushed
        written = torn = 0
        for number, disk in self._disks.items():
            disk.restore(whole=number in spoilt)
            through = [record for record in disk.pending if chance.random() < kept]
            chance.shuffle(through)
            for record in through:
                stop = record.offset + len(record.data)
                data = np.frombuffer(record.data, np.uint8)
                target: Any = disk.image[record.offset : stop]
                written += 1
                if 0 < kept < 1 and chance.random() < TORN:
                    torn += 1
                    sectors = _torn(chance, len(data) // SECTOR)
                    target.reshape(-1, SECTOR)[sectors] = data.reshape(-1, SECTOR)[sectors]
                else:
                    target[:] = data
                disk.changed.append((record.offset, stop))
        return Cut(self._at, kept, unflushed, written, torn)


def _torn(chance: random.Random, count: int) -> npt.NDArray[np.bool_]:
    """Choose the sectors of a torn write that came through: the first few, or any."""
    sectors = np.zeros(count, np.bool_)
    if chance.random() < 0.5:
        sectors[: chance.randrange(count + 1)] = True
    else:
        sectors[:] = np.random.default_rng(chance.randrange(1 << 32)).random(count) < 0.5
    return sectors

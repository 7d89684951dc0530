"""Who is charged for how many bytes of the devices, by tenant, model and class; now and over time.

Every published block is charged to one tenant, from the commit that publishes it to the one that
removes it, and what a put has reserved to the tenant of the put. The slots call this whenever that
changes, so the sums are those of the arrays at every moment. Not thread-safe: the warehouse's lock
guards it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from twfs.tenants import TENANT_MAX, Tenants
from twfs.units import ALIGN, ModelId

Account = tuple[int, ModelId, int]  # tenant charged, model, retention class
MS_PER_HOUR: Final = 3_600_000


@dataclass(slots=True)
class Cell:
    """What one tenant has of one model in one class; the sums grow from when they were taken."""

    held_bytes: int = 0  # of published blocks, now
    since_ms: int = 0  # to when byte_ms counts
    byte_ms: int = 0  # held bytes times milliseconds
    matched_tokens: int = 0
    matched_blocks: int = 0

    def settle(self, now_ms: int) -> None:
        """Let *byte_ms* count to *now_ms*; a clock that stands or goes back adds nothing."""
        if now_ms > self.since_ms:
            self.byte_ms += self.held_bytes * (now_ms - self.since_ms)
            self.since_ms = now_ms


@dataclass(slots=True)
class Read:
    """What readers delivered of one model to one tenant."""

    blocks: int = 0
    payload_bytes: int = 0


@dataclass(slots=True)
class Charges:
    """See the module's docstring."""

    clock: Callable[[], int]  # ms, the warehouse's
    held: Counter[int] = field(default_factory=Counter)  # bytes of published blocks, by tenant
    reserved: Counter[int] = field(default_factory=Counter)  # for puts under way, by tenant
    cells: dict[Account, Cell] = field(default_factory=dict)
    reads: dict[tuple[int, ModelId], Read] = field(default_factory=dict)

    def cell(self, account: Account) -> Cell:
        """The cell of *account*, made if it is not there."""
        found = self.cells.get(account)
        if found is None:
            found = self.cells[account] = Cell(since_ms=self.clock())
        return found

    def add(self, account: Account, byte_count: int, now_ms: int | None = None) -> None:
        """Charge *account* for so many bytes more, or with a negative number less."""
        cell = self.cell(account)
        cell.settle(self.clock() if now_ms is None else now_ms)
        cell.held_bytes += byte_count
        self.held[account[0]] += byte_count
        assert cell.held_bytes >= 0, (account, cell)

    def load(
        self, tenants: "npt.NDArray[np.uint16]", models: "npt.NDArray[np.uint32]",
        classes: "npt.NDArray[np.uint8]", units: "npt.NDArray[np.uint32]",
    ) -> None:  # fmt: skip
        """Charge for all blocks there are: one row of each array a block."""
        for account, byte_count in sums_of(tenants, models, classes, units):
            self.add(account, byte_count)

    def used(self, tenant: int) -> int:
        """What counts against the quota of *tenant*: published and reserved bytes."""
        return self.held[tenant] + self.reserved[tenant]

    def holders(self) -> list[int]:
        """Tenants that are charged for anything, by number."""
        return sorted(tenant for tenant, held in (self.held + self.reserved).items() if held)


def astray(
    owners: "npt.NDArray[np.uint16]", payers: "npt.NDArray[np.uint16]", tenants: Tenants
) -> "npt.NDArray[np.bool_]":
    """Tell which blocks of *owners* are charged to *payers* that are no members of their group."""
    share_of = np.zeros(TENANT_MAX + 1, np.uint16)
    for tenant, group in tenants.shares.items():
        share_of[tenant] = group
    return np.asarray((payers != 0) & (share_of[payers] != owners))


def sums_of(
    tenants: "npt.NDArray[np.uint16]", models: "npt.NDArray[np.uint32]",
    classes: "npt.NDArray[np.uint8]", units: "npt.NDArray[np.uint32]",
) -> Iterator[tuple[Account, int]]:  # fmt: skip
    """Bytes by account, of blocks of which each has one row in all arrays."""
    packed = (
        tenants.astype(np.uint64) << np.uint64(40)
        | models.astype(np.uint64) << np.uint64(8)
        | classes.astype(np.uint64)
    )
    accounts, which = np.unique(packed, return_inverse=True)
    sums = np.zeros(len(accounts), np.int64)
    np.add.at(sums, which.reshape(-1), units.astype(np.int64))
    for account, total in zip(accounts.tolist(), sums.tolist(), strict=True):
        model = ModelId(account >> 8 & 0xFFFFFFFF)
        yield (account >> 40, model, account & 0xFF), total * ALIGN

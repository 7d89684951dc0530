"""What goes between vLLM's scheduler and the ranks: orders to load and store, and their reports.

vLLM adds the ranks' reports up into one of its own kind, which would drop what is ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import LoadStoreSpec

from twfs.engines.finding import Held
from twfs.engines.transfers import Offer

OPEN_MAX: Final = 10_000  # stores whose end is waited for; older ones are forgotten


@dataclass
class LoadSpec(LoadStoreSpec):
    """What a worker needs for a load."""

    held: Held
    timeout_s: float
    fingerprint: bytes


@dataclass
class StoreSpec(LoadStoreSpec):
    """What a worker needs for a store."""

    offer: Offer
    fingerprint: bytes
    number: int  # among the scheduler's open stores


@dataclass
class RankReport(OffloadingWorkerMetadata):
    """VLLM's own report; what rank 0 has timed, tokens computed and in how many seconds; stores.

    Of each store that has ended, by its number: how many leading blocks each rank's store holds.
    """

    computed: tuple[int, float] | None = None
    stored: dict[int, list[int]] = field(default_factory=dict)

    def aggregate(self, other: Any) -> "RankReport":
        """Add what another rank reports; only one of them has timed anything."""
        both: Any = super().aggregate(other)
        timed = self.computed or getattr(other, "computed", None)
        stored = dict(self.stored)
        for number, held in getattr(other, "stored", {}).items():
            stored[number] = stored.get(number, []) + held
        return RankReport(both.completed_jobs, both.transfer_stats, timed, stored)


@dataclass
class _Store:
    keys: Sequence[Any]
    ranks: int  # that have not said what became of it
    held: int  # leading keys that all ranks hold, as far as they have said


class OpenStores:
    """The scheduler's stores that not all ranks have reported; a block is held if all hold it."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._open: dict[int, _Store] = {}
        self._last = 0

    def begin(self, keys: Sequence[Any]) -> int:
        """Note a store of *keys*, and return its number."""
        self._last += 1
        self._open[self._last] = _Store(keys, self._ranks, len(keys))
        if len(self._open) > OPEN_MAX:
            del self._open[next(iter(self._open))]
        return self._last

    def ended(self, report: RankReport) -> Iterator[Sequence[Any]]:
        """The keys that are held of each store of which all ranks have reported now."""
        for number, told in report.stored.items():
            store = self._open.get(number)
            if store is None:  # of before a reset
                continue
            store.ranks -= len(told)
            store.held = min(store.held, *told)
            if store.ranks <= 0:
                del self._open[number]
                yield store.keys[: store.held]

    def clear(self) -> None:
        """Forget all: what they stored is out of reach."""
        self._open.clear()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

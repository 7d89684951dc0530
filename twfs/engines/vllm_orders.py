"""What goes between vLLM's scheduler and the ranks: orders to load and store, and their reports.

vLLM adds the ranks' reports up into one of its own kind, which would drop what is ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import LoadStoreSpec

from twfs.engines.finding import Held
from twfs.engines.transfers import Offer

Owner = tuple[str | None, int]  # tenant, and public blocks: what else than its key names a block


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


@dataclass(slots=True)
class OpenStore:
    """A store as far as the ranks have told what became of it."""

    owner: Owner
    keys: list[Any]
    ranks: int  # that have not told
    held: int  # leading keys that all the others hold


class OpenStores:
    """The scheduler's stores whose end not all ranks have reported; each reports each one once."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._open: dict[int, OpenStore] = {}
        self._last = 0

    def begin(self, owner: Owner, keys: list[Any]) -> int:
        """Note a store, and return its number."""
        self._last += 1
        self._open[self._last] = OpenStore(owner, keys, self._ranks, len(keys))
        return self._last

    def ended(self, report: RankReport) -> Iterator[OpenStore]:
        """The stores of which all ranks have reported now."""
        for number, told in report.stored.items():
            store = self._open.get(number)
            if store is None:  # begun before a reset
                continue
            store.ranks -= len(told)
            store.held = min(store.held, *told)
            if store.ranks == 0:
                yield self._open.pop(number)

    def clear(self) -> None:
        """Forget all: what they stored is out of reach."""
        self._open.clear()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

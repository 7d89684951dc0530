"""What goes between vLLM's scheduler and the ranks: orders to load and store, and their reports.

vLLM adds the ranks' reports up into one of its own kind, which would drop what is ours.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import LoadStoreSpec

from twfs.engines.finding import Held
from twfs.engines.transfers import Offer


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

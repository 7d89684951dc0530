"""What a rank of vLLM tells the scheduler with each step, besides the jobs that are done.

vLLM adds the ranks' reports up into one of its own kind, which would drop what is ours.
"""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)


@dataclass
class RankReport(OffloadingWorkerMetadata):
    """VLLM's own report, and what rank 0 has timed: tokens computed, and in how many seconds."""

    computed: tuple[int, float] | None = None

    def aggregate(self, other: Any) -> "RankReport":
        """Add what another rank reports; only one of them has timed anything."""
        both: Any = super().aggregate(other)
        timed = self.computed or getattr(other, "computed", None)
        return RankReport(both.completed_jobs, both.transfer_stats, timed)

"""vLLM's CPU tier on the CPU platform, for tests and benchmarks of what is below it.

vLLM's own worker for the tier needs CUDA; this one copies between "GPU" memory, which is the host's
here, and the tier's. Everything else of the tier, its manager and secondary tiers, is vLLM's.
Imported by the engine: `spec_name` CpuTieringSpec, `spec_module_path` support.vllmtier.

EitherTier has several secondary tiers in one engine, for each request the one that it names: what
is compared then shares all else, above all the process whose luck decides over milliseconds.
"""

import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingWorker,
    RequestOffloadingContext,
    ScheduleEndContext,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostCopyWorker(OffloadingWorker):  # type: ignore[misc]
    """Rows of the engine's memory to and from the tier's, at once."""

    def __init__(self, kv: Any, per_row: int, region: Any) -> None:
        self.region = region
        self.done: list[TransferResult] = []
        self.per_row = per_row
        self.engine = [t.tensor.numpy() for t in kv.tensors]
        self.tier = [
            region.create_next_worker_view(t.page_size_bytes * per_row).numpy() for t in kv.tensors
        ]
        self.refs = kv.group_data_refs

    def _copy(self, job: int, gpu: Any, cpu: Any, *, store: bool) -> bool:
        begun_s, copied, block_at, row_at = time.monotonic(), 0, 0, 0
        for group, (size, start) in enumerate(zip(gpu.group_sizes, gpu.block_indices, strict=True)):
            if not size:
                continue
            first = start % self.per_row
            for i in range(size):
                block, place = int(gpu.block_ids[block_at + i]), first + i
                row, part = int(cpu.block_ids[row_at + place // self.per_row]), place % self.per_row
                for ref in self.refs[group]:
                    mine, theirs = self.engine[ref.tensor_idx], self.tier[ref.tensor_idx]
                    width = mine.shape[1]
                    into = theirs[row, part * width : (part + 1) * width]
                    if store:
                        into[:] = mine[block]
                    else:
                        mine[block] = into
                    copied += width
            block_at += size
            row_at += -(-(first + size) // self.per_row)
        self.done.append(TransferResult(job, True, copied, time.monotonic() - begun_s))
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy to the tier."""
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, **_: Any) -> bool:
        """Copy from the tier."""
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        """What was copied since the last call."""
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""

    def shutdown(self) -> None:
        """Let go of the tier's memory."""
        self.engine = self.tier = []
        self.region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's own, with that worker."""

    def get_worker(self, kv_caches: Any) -> HostCopyWorker:
        """The worker of this rank."""
        made: Any = vars(self).get("_worker")
        if not made:
            rank = 0 if self.replicated_layout else self.config.parallel.rank
            region = SharedOffloadRegion(
                engine_id=self._engine_id, num_chunks=self.num_chunks, rank=rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )  # fmt: skip
            made = self._worker = HostCopyWorker(kv_caches, self.blocks_per_chunk, region)
        worker: HostCopyWorker = made
        return worker


class EitherTier(SecondaryTierManager):  # type: ignore[misc]
    """Some tiers, by name. No reset reaches them, for TwfsTierConnector knows this one alone."""

    medium = Medium.STORAGE

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str,
        backpressure_detector: Any = None, *, tiers: dict[str, dict[str, Any]],
    ) -> None:  # fmt: skip
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        make = SecondaryTierFactory.create_secondary_tier
        self._tiers: dict[str, Any] = {
            name: make(config, primary_kv_view, offloading_spec) for name, config in tiers.items()
        }

    def _of(self, req_context: Any) -> Any:
        """The tier that a request names, by its parameter `tier`."""
        return self._tiers[req_context.kv_transfer_params["tier"]]

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        """As the tier's."""
        return self._of(req_context).lookup(key, req_context)

    def submit_store(self, job_metadata: TransferJob) -> None:
        """As the tier's."""
        self._of(job_metadata.req_context).submit_store(job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """As the tier's."""
        self._of(job_metadata.req_context).submit_load(job_metadata)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """All tiers'."""
        return [done for tier in self._tiers.values() for done in tier.get_finished_jobs()]

    def has_pending_work(self) -> bool:
        """Any tier's."""
        return any(tier.has_pending_work() for tier in self._tiers.values())

    def touch(self, keys: Any, req_context: Any) -> None:
        """As the tier's."""
        self._of(req_context).touch(keys, req_context)

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """As the tier's."""
        return self._of(req_context).on_new_request(req_context)

    def on_request_finished(self, req_context: Any) -> None:
        """As the tier's."""
        self._of(req_context).on_request_finished(req_context)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """All tiers'."""
        for tier in self._tiers.values():
            tier.on_schedule_end(context)

    def drain_jobs(self) -> None:
        """All tiers'."""
        for tier in self._tiers.values():
            tier.drain_jobs()

    def shutdown(self) -> None:
        """All tiers'."""
        for tier in self._tiers.values():
            tier.shutdown()

"""twfs below vLLM's CPU tier: a secondary tier, and a connector that tells it the model.

For engines that keep vLLM's own tier in host memory; see docs/vllm.md. All of it runs in the
scheduler's process; nothing here blocks it.
"""

from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    RequestOffloadingContext,
    get_offload_block_hash,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from twfs.client import ARENA_BYTES
from twfs.engines.attaching import PATIENCE_S, Attachment
from twfs.engines.finding import Finder
from twfs.engines.requests import params_of
from twfs.engines.transfers import Offer, Transfers, runs_of
from twfs.engines.vllm_layout import IDENTITY, check_windows, layout_of, prepare
from twfs.errors import InvalidInput


class TwfsTierConnector(OffloadingConnector):
    """vLLM's own connector, which hands the model's identity on to the tier."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        prepare(vllm_config, ("TieringOffloadingSpec", "vllm.v1.kv_offload.tiering.spec"))
        check_windows(kv_cache_config)
        super().__init__(vllm_config, role, kv_cache_config)


class TwfsTier(SecondaryTierManager):
    """What `secondary_tiers` names: rows of the CPU tier, to and from the store."""

    medium = Medium.STORAGE

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str,
        backpressure_detector: Any = None, *, socket: str, arena_bytes: int = ARENA_BYTES,
        patience_s: float = PATIENCE_S, **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if IDENTITY not in offloading_spec.extra_config:
            raise InvalidInput(
                "the tier is not told which model it serves: use TwfsTierConnector of "
                "twfs.engines.vllm_tier as kv_connector"
            )
        self.layout = layout_of(offloading_spec.config, row_bytes=self.block_size_bytes)
        self.attachment = Attachment(
            socket, self.layout.model, self.layout, arena_bytes=arena_bytes, patience_s=patience_s
        )
        self.finder = Finder(self.attachment, self.layout.block_tokens, ahead=True)
        self.transfers = Transfers(self.attachment)
        self._view = primary_kv_view.cast("B")
        self._requests: dict[str, dict[Any, int]] = {}  # each key's place in its request's chain
        self._chains: dict[str, list[bytes]] = {}
        self._loads: dict[int, tuple[str, list[Any]]] = {}  # what each load job asked for

    def _places(self, req_context: Any) -> tuple[list[bytes], dict[Any, int]]:
        """The keys of the request's chain so far, and the index of each."""
        positions: dict[Any, int] = vars(req_context).get("_offload_key_positions", {})
        chain = self._chains.setdefault(req_context.req_id, [])
        places = self._requests.setdefault(req_context.req_id, {})
        if len(places) < len(positions):
            for key in list(positions)[len(places) :]:
                places[key] = positions[key] // self.layout.block_tokens - 1
                if places[key] == len(chain):
                    chain.append(get_offload_block_hash(key))
        return chain, places

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        """All keys of the request in one message; RETRY until it is answered."""
        chain, places = self._places(req_context)
        if key not in places:
            return LookupResult.MISS
        blocks = self.finder.ask(req_context.req_id, chain, places[key])
        if blocks is None:
            return LookupResult.RETRY
        return LookupResult.HIT if places[key] < blocks else LookupResult.MISS

    def _rows(self, places: Any) -> list[memoryview]:
        step = self.block_size_bytes
        return [self._view[at * step : (at + 1) * step] for at in map(int, places)]

    def submit_store(self, job_metadata: Any) -> None:
        """Begin a store; the rows are free again once they were copied."""
        request_id = job_metadata.req_context.req_id
        chain, places = self._places(job_metadata.req_context)
        rows = dict(
            zip((places.get(key, -1) for key in job_metadata.keys),
                self._rows(job_metadata.chunk_ids), strict=True)
        )  # fmt: skip
        indices = sorted(index for index in rows if 0 <= index < len(chain))
        params = self.finder.params(request_id)
        epoch = self.finder.epoch(request_id)
        offer = Offer(
            runs_of(chain, indices), -1 if epoch is None else epoch, params.tenant, params.hint,
            params.public_tokens // self.layout.block_tokens,
        )  # fmt: skip
        self.transfers.store(job_metadata.job_id, offer, [rows[index] for index in indices])

    def submit_load(self, job_metadata: Any) -> None:
        """Begin a load of neighbours in one chain; what else is asked for has failed."""
        request_id = job_metadata.req_context.req_id
        _, places = self._places(job_metadata.req_context)
        keys, rows = list(job_metadata.keys), self._rows(job_metadata.chunk_ids)
        order = sorted(range(len(keys)), key=lambda i: places.get(keys[i], -1))
        first = places.get(keys[order[0]], -1)
        run = [i for at, i in enumerate(order) if places.get(keys[i], -1) == first + at]
        self._loads[job_metadata.job_id] = (request_id, [keys[i] for i in run])
        match = self.finder.match(request_id)
        held = match is not None and match.blocks >= first + len(run)
        if match is None or not held:
            self.transfers.fail(job_metadata.job_id, len(keys))
        else:
            self.transfers.load(
                job_metadata.job_id, match, [rows[i] for i in run], first=first, asked=len(keys)
            )

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Results; a request whose load failed is a miss from now on, or it would ask for ever."""
        results = []
        for done in self.transfers.finished():
            request_id, keys = self._loads.pop(done.job, ("", []))
            good = done.store or done.blocks == done.asked
            if not good:
                self.finder.decline(request_id)
            results.append(
                JobResult(
                    done.job, good, successful_keys=None if good else tuple(keys[: done.blocks]),
                    transfer_time=done.seconds, transfer_bytes=done.payload_bytes,
                )
            )  # fmt: skip
        return results

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """Read the request's own parameters."""
        params, wrong = params_of(req_context.kv_transfer_params)
        for text in wrong:
            self.attachment.complain("a parameter of a request is none", text)
        self.finder.admit(req_context.req_id, params)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        """Touch the whole chain, also what came from the engine's own memory."""
        self._requests.pop(req_context.req_id, None)
        self.finder.finish(req_context.req_id, self._chains.pop(req_context.req_id, []))

    def drain_jobs(self) -> None:
        """Return when no job uses the CPU tier's memory."""
        self.transfers.drain()

    def shutdown(self) -> None:
        """Wait for all jobs, and let go."""
        self.transfers.close()
        self.finder.close()
        self.attachment.close()
        self._view.release()  # or vLLM cannot unmap the tier

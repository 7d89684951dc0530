"""twfs below vLLM's CPU tier: a secondary tier, and a connector that tells it the model.

For engines that keep vLLM's own tier in host memory; see docs/vllm.md. All of it runs in the
scheduler's process; nothing here blocks it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
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
    """vLLM's own connector, which tells the tier which model it serves, and of resets."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        prepare(vllm_config, ("TieringOffloadingSpec", "vllm.v1.kv_offload.tiering.spec"))
        check_windows(kv_cache_config)
        super().__init__(vllm_config, role, kv_cache_config)

    def reset_cache(self) -> bool | None:
        """As vLLM's, which empties the CPU tier alone, and a new epoch below it.

        Weights were updated, or the engine sleeps. Tiers within other tiers are not reached.
        """
        done: bool | None = super().reset_cache()
        for tier in self.scheduler.manager.secondary_tiers:
            if isinstance(tier, TwfsTier):
                tier.finder.reset()
        return done


@dataclass(slots=True)
class _Request:
    """The chain of a request's keys; the engine looks one up after the other, in every step."""

    block_tokens: int
    ends: Mapping[Any, int]  # the engine's own: each key's last token; it grows
    seen: int = 0  # of these
    chain: list[bytes] = field(default_factory=list)

    def grow(self) -> None:
        """Take in what was added to *ends*."""
        for key in reversed([*islice(reversed(self.ends), len(self.ends) - self.seen)]):
            if self.place(key) == len(self.chain):
                self.chain.append(get_offload_block_hash(key))
        self.seen = len(self.ends)

    def place(self, key: Any) -> int:
        """The index of *key* in the chain, -1 if it is not there."""
        return self.ends.get(key, 0) // self.block_tokens - 1


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
        self._requests: dict[str, _Request] = {}
        self._loads: dict[int, tuple[str, list[Any]]] = {}  # what each load job asked for

    def _request(self, req_context: Any) -> _Request:
        """The request's chain so far."""
        known = self._requests.get(req_context.req_id)
        if known is None:
            ends = vars(req_context).get("_offload_key_positions", {})
            known = _Request(self.layout.block_tokens, ends)
            self._requests[req_context.req_id] = known
        if known.seen < len(known.ends):
            known.grow()
        return known

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        """All keys of the request in one message; RETRY until it is answered."""
        known = self._request(req_context)
        place = known.place(key)
        if place < 0:
            return LookupResult.MISS
        blocks = self.finder.ask(req_context.req_id, known.chain, place)
        if blocks is None:
            return LookupResult.RETRY
        return LookupResult.HIT if place < blocks else LookupResult.MISS

    def _rows(self, places: Any) -> list[memoryview]:
        step = self.block_size_bytes
        return [self._view[at * step : (at + 1) * step] for at in map(int, places)]

    def submit_store(self, job_metadata: Any) -> None:
        """Begin a store; the rows are free again once they were copied."""
        request_id = job_metadata.req_context.req_id
        known = self._request(job_metadata.req_context)
        places = map(known.place, job_metadata.keys)
        rows = dict(zip(places, self._rows(job_metadata.chunk_ids), strict=True))
        indices = sorted(index for index in rows if 0 <= index < len(known.chain))
        params = self.finder.params(request_id)
        epoch = self.finder.epoch(request_id)
        offer = Offer(
            runs_of(known.chain, indices), -1 if epoch is None else epoch, params.tenant,
            params.hint, params.public_tokens // self.layout.block_tokens, self.finder.since,
        )  # fmt: skip
        self.transfers.store(job_metadata.job_id, offer, [rows[index] for index in indices])

    def submit_load(self, job_metadata: Any) -> None:
        """Begin a load of neighbours in one chain; what else is asked for has failed."""
        request_id = job_metadata.req_context.req_id
        known = self._request(job_metadata.req_context)
        keys, rows = list(job_metadata.keys), self._rows(job_metadata.chunk_ids)
        order = sorted(range(len(keys)), key=lambda i: known.place(keys[i]))
        first = known.place(keys[order[0]])
        run = [i for at, i in enumerate(order) if known.place(keys[i]) == first + at]
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

    def on_schedule_end(self, context: Any) -> None:
        """A step of the scheduler is over."""
        self.finder.next_step()

    def on_request_finished(self, req_context: Any) -> None:
        """Touch the whole chain, also of a request that nobody has looked up here."""
        chain = self._request(req_context).chain
        del self._requests[req_context.req_id]
        self.finder.finish(req_context.req_id, chain)

    def drain_jobs(self) -> None:
        """Return when no job uses the CPU tier's memory."""
        self.transfers.drain()

    def shutdown(self) -> None:
        """Wait for all jobs, and let go."""
        self.transfers.close()
        self.finder.close()
        self.attachment.close()
        self._view.release()  # or vLLM cannot unmap the tier

"""vLLM's KV in twfs: a connector, its spec, the scheduler's manager and the workers (0.32, 0.33).

KV goes between the engine's blocks and the store without a CPU tier. A failed or late load is
computed instead. For the configuration see docs/vllm.md.
"""

import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    PrepareStoreOutput,
    RequestOffloadingContext,
    TransferResult,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from twfs.client import ARENA_BYTES
from twfs.datapath.upload import PIECES_MAX
from twfs.engines.attaching import PATIENCE_S, Attachment
from twfs.engines.breakeven import BreakEven
from twfs.engines.finding import Finder, Held
from twfs.engines.requests import params_of
from twfs.engines.transfers import Offer, Transfers, run_of, stretches
from twfs.engines.vllm_layout import check_windows, layout_of, prepare
from twfs.engines.vllm_offers import Offers, OpenStores, Owner
from twfs.engines.vllm_orders import LoadSpec, RankReport, StoreSpec
from twfs.engines.vllm_prefill import GpuMark, Mark, PrefillTimes, Prompts, prompt_tokens
from twfs.engines.vllm_requests import Request, places_of
from twfs.units import align_up

EVENT_SECONDS: Final = 2.0  # that an idle engine goes on for events of what it has stored


class TwfsManager(OffloadingManager):
    """The scheduler's side: which blocks of a request are held, which are to be stored."""

    def __init__(self, spec: "TwfsSpec") -> None:
        self.spec = spec
        self.attachment = spec.attach(arena_bytes=0)
        self.layout = spec.layout
        self._fingerprint = spec.layout.fingerprint  # made of all that it holds, each time
        self.finder = Finder(self.attachment, self.layout.block_tokens)
        self.breakeven = BreakEven(
            tokens_min=spec.extra_config.get("min_load_tokens"),
            deadline_s=spec.extra_config.get("load_deadline_s"),
        )
        self.requests: dict[str, Request] = {}
        self.hashes_per_block = self.layout.block_tokens // spec.tokens_per_hash
        room = spec.arena_bytes // align_up(self.layout.block_bytes())
        self.offers = Offers(room, self.layout.block_tokens)
        self._open = OpenStores(spec.layout.shards)
        self._copied_s = 0.0  # when the workers had last read what they store
        self._events: list[OffloadingEvent] = []
        self._told: list[bytes] = []  # keys of stores that have ended, of which events say all

    def ready(self, request: Any, computed_tokens: int) -> bool:
        """Ask for *request*, of which the engine holds some tokens; False: ask again next step."""
        step = self.layout.block_tokens
        known = self.requests[request.request_id]
        start = known.start = computed_tokens // step
        known.blocks = self.finder.ask(request.request_id, known.keys(), start)
        if known.blocks is None:
            return False
        tokens = known.blocks * step - computed_tokens
        if known.blocks > start and not self.breakeven.pays(tokens):
            self.finder.decline(request.request_id)
            known.blocks = start
        return True

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        """One key at a time, from what `ready` has found out."""
        known = self.requests.get(req_context.req_id)
        position = req_context.get_offload_key_position(key)
        if known is None or known.blocks is None or position is None:
            return LookupResult.MISS
        held = position <= known.blocks * self.layout.block_tokens
        return LookupResult.HIT if held else LookupResult.MISS

    def prepare_load(self, keys: Collection[Any], req_context: Any) -> LoadSpec:
        """Hand the lease over; one that was lost is a load that fails, and is computed."""
        request_id, known = req_context.req_id, self.requests[req_context.req_id]
        position = req_context.get_offload_key_position(next(iter(keys)))
        first = position // self.layout.block_tokens - 1
        held = self.finder.held(request_id, first, len(keys)) or Held(b"", first, len(keys))
        known.load_tokens = len(keys) * self.layout.block_tokens
        known.load_begun_s = time.monotonic()
        timeout_s = self.breakeven.deadline_s(known.load_tokens)
        return LoadSpec(held, timeout_s, self._fingerprint)

    def complete_load(self, keys: Collection[Any], req_context: Any) -> None:
        """The workers have read: the lease is over, and the store's speed known."""
        known = self.requests.get(req_context.req_id)
        if known is not None:
            known.loading = ()
            self.breakeven.loaded(known.load_tokens, time.monotonic() - known.load_begun_s)
            self.finder.loaded(req_context.req_id)

    def failed(self, block_ids: set[int]) -> None:
        """Loads into these of the engine's blocks failed: their requests are computed."""
        for request_id, known in self.requests.items():
            if any(not block_ids.isdisjoint(group) for group in known.loading):
                self.finder.decline(request_id)

    def prepare_store(self, keys: Collection[Any], req_context: Any) -> PrepareStoreOutput:
        """Offer what is not known to be stored, as far as the workers' arenas have room.

        What the engine held itself when it asked is mostly stored already, so it counts for no
        room; the daemon says which of it is lacking.
        """
        request_id, owner = req_context.req_id, self._owner_of(req_context)
        epoch, known = self.finder.epoch(request_id), self.requests.get(request_id)
        stored: list[Any] = []
        runs = []
        if epoch is not None and known is not None:
            held = known.start, known.blocks or 0
            ordered = keys if isinstance(keys, list) else list(keys)
            end_of, chain = req_context.get_offload_key_position, known.keys()
            places = places_of(ordered, end_of, self.layout.block_tokens)
            for at, stop in stretches(places):
                for first, run in self.offers.choose(
                    request_id, owner, places[at], ordered[at:stop], held
                ):
                    runs.append(run_of(chain, first, len(run)))
                    stored += run
        if epoch is None or not stored:
            return PrepareStoreOutput([], StoreSpec(Offer((), -1), self._fingerprint, 0), [])
        params, number = self.finder.params(request_id), self._open.begin(owner, stored)
        since = self.finder.since
        offer = Offer(tuple(runs), epoch, params.tenant, params.hint, owner[1], since)
        return PrepareStoreOutput(stored, StoreSpec(offer, self._fingerprint, number), [])

    def _owner_of(self, req_context: Any) -> Owner:
        """Whose the request's blocks are; also of one that has finished."""
        params, _ = params_of(req_context.kv_transfer_params)
        return params.tenant, params.public_tokens // self.layout.block_tokens

    def complete_store(self, keys: Collection[Any], req_context: Any, success: bool = True) -> None:
        """The workers have read the blocks; whether they are held is for `stored` to say."""
        self.offers.copied(req_context.req_id, keys)
        self._copied_s = time.monotonic()

    def stored(self, report: RankReport) -> None:
        """Of what all ranks have published an event comes; what is not held may be offered again.

        A store that was not whole has mostly met a daemon that is away, or a warehouse without
        room, which the next request may not.
        """
        for store in self._open.ended(report.stored):
            self.offers.ended(store)
            if self.spec.config.enable_kv_cache_events:
                if held := store.keys[: store.held]:
                    event = OffloadingEvent(held, medium=Medium.STORAGE, removed=False)
                    self._events.append(event)
                self._told += store.keys

    def has_pending_work(self) -> bool:
        """Whether an engine without requests is to go on: an event may come in a moment."""
        late = time.monotonic() - self._copied_s > EVENT_SECONDS
        return self.spec.config.enable_kv_cache_events and len(self._open) > 0 and not late

    def get_load_source(self, key: Any, req_context: Any) -> CacheHitSource:
        """For vLLM's statistics of where cached tokens came from."""
        return CacheHitSource.DISK

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What was published since the last call."""
        events, self._events = self._events, []
        return events

    def take_told(self) -> list[bytes]:
        """Keys of which no event comes any more, since the last call."""
        told, self._told = self._told, []
        return told

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """Read the request's own parameters."""
        params, wrong = params_of(req_context.kv_transfer_params)
        for text in wrong:
            self.attachment.complain("a parameter of a request is none", text)
        self.finder.admit(req_context.req_id, params)
        return RequestOffloadingContext()

    def on_schedule_end(self, context: Any) -> None:
        """All requests of a step are scheduled; what is stored of them is offered next."""
        self.offers.begin_step()
        self.finder.next_step()

    def on_request_finished(self, req_context: Any) -> None:
        """Touch the whole chain, also what came from the engine's own memory."""
        known = self.requests.pop(req_context.req_id, None)
        self.finder.finish(req_context.req_id, [] if known is None else known.keys())

    def reset_cache(self) -> None:
        """Weights were updated, or the engine sleeps: what was stored before is out of reach."""
        self.finder.reset()
        self.offers.clear()
        self._open.clear()

    def shutdown(self) -> None:
        """Release all leases."""
        self.finder.close()
        self.attachment.close()


class TwfsWorker(OffloadingWorker):
    """One rank's side: its rows of the engine's blocks, to and from the store."""

    def __init__(self, spec: "TwfsSpec", kv_caches: Any) -> None:
        self._per_block = spec.blocks_per_chunk
        self._fingerprint = spec.layout.fingerprint
        self._rows = [
            t.tensor.numpy() if t.tensor.device.type == "cpu" else t.tensor
            for t in kv_caches.tensors
        ]
        scratch = [row[0].copy() if hasattr(row, "copy") else row[0].clone() for row in self._rows]
        self._scratch = scratch  # takes what a load brings and the engine does not want
        shard = 0 if spec.config.replicated_layout else spec.config.parallel.rank
        self.attachment = spec.attach(arena_bytes=spec.arena_bytes)
        self.transfers = Transfers(self.attachment, shard=shard)
        # With pipeline stages no rank computes whole tokens, so none can tell the rate.
        alone = spec.config.parallel.rank == 0 and spec.config.parallel.pp_size == 1
        on_gpu = any(t.tensor.device.type == "cuda" for t in kv_caches.tensors)
        mark = GpuMark if on_gpu else Mark
        self.prefill = PrefillTimes(self.attachment, mark) if alone else None
        self.failed: set[int] = set()  # the engine's blocks that a load did not fill
        self._loads: dict[int, list[list[int]]] = {}
        self._ended: deque[tuple[int, int]] = deque()  # stores by number, and blocks held of each
        found = sum(row[0].nbytes for row in self._rows) * self._per_block
        pieces = len(self._rows) * self._per_block
        self._usable = found == spec.layout.block_bytes() and pieces <= PIECES_MAX
        if not self._usable:
            text = (
                f"blocks of {found} bytes in {pieces} pieces, not {spec.layout.block_bytes()} in "
                f"{PIECES_MAX} at most: nothing is kept"
            )
            self.attachment.complain("this rank's KV is not as the scheduler's", text)

    def _pieces(self, block_ids: Sequence[int | None]) -> list[Any]:
        """The engine's memory of one stored block: of each of its blocks, all tensors' rows."""
        return [
            scratch if block is None else rows[block]
            for block in block_ids
            for rows, scratch in zip(self._rows, self._scratch, strict=True)
        ]

    def _cut(self, gpu: Any, first: int, count: int) -> list[list[int | None]]:
        """The engine's blocks of each of *count* stored ones, None where it wants nothing."""
        ids, at = gpu.block_ids.tolist(), gpu.block_indices[0]
        every = range(first * self._per_block, (first + count) * self._per_block)
        wanted = [ids[i - at] if 0 <= i - at < len(ids) else None for i in every]
        step = self._per_block
        return [wanted[i : i + step] for i in range(0, len(wanted), step)]

    def _fits(self, order: LoadSpec | StoreSpec) -> bool:
        """Whether this rank's blocks are what the scheduler believes."""
        if order.fingerprint != self._fingerprint:
            text = "its layers or their sizes differ from the first rank's: nothing is kept"
            self.attachment.complain("this rank's layout is not the scheduler's", text)
        return self._usable and order.fingerprint == self._fingerprint

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, **more: Any) -> bool:
        """Begin a load; *expedited* (0.33) is one that the step waits for."""
        held = src_spec.held
        cut = self._cut(dst_spec, held.first, held.count)
        self._loads[job_id] = [[block for block in blocks if block is not None] for blocks in cut]
        if not self._fits(src_spec):
            held = Held(b"", held.first, held.count)
        self.transfers.load(
            job_id, held, [self._pieces(blocks) for blocks in cut], timeout_s=src_spec.timeout_s,
            urgent=bool(more.get("expedited")),
        )  # fmt: skip
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Begin a store."""
        ids, step = src_spec.block_ids.tolist(), self._per_block
        payloads = [self._pieces(ids[i : i + step]) for i in range(0, len(ids), step)]
        good = self._fits(dst_spec)
        self.transfers.store(
            job_id, dst_spec.offer if good else Offer((), -1), payloads,
            stored=lambda held: self._ended.append((dst_spec.number, held)),
        )  # fmt: skip
        return True

    def report(self, jobs: Any) -> RankReport | None:
        """What this rank tells with *jobs*, vLLM's own report; None if there is nothing to tell."""
        timed = None if self.prefill is None else self.prefill.take()
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        if jobs is None and timed is None and not ended:
            return None
        own = () if jobs is None else (jobs.completed_jobs, jobs.transfer_stats)
        return RankReport(*own, computed=timed, stored={number: [held] for number, held in ended})

    def get_finished(self) -> list[TransferResult]:
        """What has finished; a load that failed is told by `failed`, for others end the engine."""
        results = []
        for done in self.transfers.finished():
            for blocks in self._loads.pop(done.job, [])[done.blocks :]:
                self.failed.update(blocks)
            results.append(TransferResult(done.job, True, done.payload_bytes, done.seconds))
        return results

    def wait(self, job_ids: set[int]) -> None:
        """Wait until these jobs use the engine's memory no more."""
        self.transfers.wait(job_ids)

    def shutdown(self) -> None:
        """Wait for all jobs, and let go."""
        self.transfers.close()
        if self.prefill is not None:
            self.prefill.close()
        self.attachment.close()


class TwfsSpec(OffloadingSpec):
    """What `spec_name` names: makes manager and worker for one layout."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.replicated_layout = config.replicated_layout
        self.layout = layout_of(config)
        self.arena_bytes = int(self.extra_config.get("arena_bytes", ARENA_BYTES))
        self._made: Any = None

    def attach(self, *, arena_bytes: int) -> Attachment:
        """A hold on the store, with a connection of its own."""
        return Attachment(
            self.extra_config["socket"], self.layout.model, self.layout, arena_bytes=arena_bytes,
            patience_s=float(self.extra_config.get("patience_s", PATIENCE_S)),
        )  # fmt: skip

    def get_manager(self) -> TwfsManager:
        """The scheduler's side."""
        self._made = self._made or TwfsManager(self)
        made: TwfsManager = self._made
        return made

    def get_worker(self, kv_caches: Any) -> TwfsWorker:
        """The side of this rank."""
        self._made = self._made or TwfsWorker(self, kv_caches)
        made: TwfsWorker = self._made
        return made


class _Scheduler(OffloadingConnectorScheduler):
    """Looks up all keys of a prefix in one go instead of one by one."""

    def _maximal_prefix_lookup(
        self, keys: Any, req_context: Any, req: Any, group_config: Any, start: int
    ) -> int | None:
        blocks = self.manager.requests[req.request_id].blocks
        return max(0, min(len(keys), (blocks or 0) - start))

    def _calc_num_offloadable_tokens(self, req_status: Any, num_computed_tokens: int) -> int:
        """As vLLM's; of a request that goes on no more than a step may offer, the next one more.

        The blocks of one that has finished are the engine's again: now or never.
        """
        tokens: int = super()._calc_num_offloadable_tokens(req_status, num_computed_tokens)
        if req_status.req.is_finished():
            return tokens
        (group,), (state,) = self.config.kv_group_configs, req_status.group_states
        step = group.tokens_per_chunk
        return step * self.manager.offers.bound(state.next_stored_chunk_idx, tokens // step)

    def take_events(self) -> Iterable[Any]:
        """As vLLM's, which would keep what describes a block until it is evicted: none is."""
        yield from super().take_events()
        told, metadata = self.manager.take_told(), self._events_tracker._pending_event_metadata  # noqa: SLF001
        for key in told if metadata else ():
            metadata.pop(key, None)


class TwfsConnector(OffloadingConnector):
    """What `kv_connector` names: vLLM's own offloading connector, for which no load is fatal."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        prepare(vllm_config, ("TwfsSpec", "twfs.engines.vllm"))
        check_windows(kv_cache_config)
        super().__init__(vllm_config, role, kv_cache_config)
        stock: Any = getattr(self, "connector_scheduler", None)
        if stock is not None:
            self.manager: TwfsManager = stock.manager
            self.connector_scheduler = _Scheduler(self.manager.spec, vllm_config, kv_cache_config)

    @property
    def _worker(self) -> TwfsWorker | None:
        """The rank's side, once it has the engine's memory; None in the scheduler's process."""
        worker: TwfsWorker | None = self.connector_worker and self.connector_worker.worker
        return worker

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Block outermost: a stored block is one run of memory where the attention allows it."""
        return "BLHNC"

    def on_new_request(self, request: Any) -> None:
        """Note the request, whose hashes grow with it."""
        known = Request(request.block_hashes, self.manager.hashes_per_block)
        self.manager.requests[request.request_id] = known
        super().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """As vLLM's, once the store has answered; the scheduler asks again until then."""
        if not self.manager.ready(request, num_computed_tokens):
            return None, False
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        return found

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note which of the engine's blocks are being loaded."""
        if num_external_tokens:
            self.manager.requests[request.request_id].loading = blocks.get_block_ids()
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Let the worker know of a step that computes prompts alone: it times that."""
        meta: Any = super().build_connector_meta(scheduler_output)
        tokens = 0 if meta.load_jobs else prompt_tokens(scheduler_output)
        if tokens:
            request = next(iter(scheduler_output.num_scheduled_tokens))
            meta.twfs_prompts = Prompts(tokens, self.manager.finder.params(request).tenant)
        return meta

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """A worker's step begins."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and self._worker.prefill is not None:
            self._worker.prefill.begin(getattr(connector_metadata, "twfs_prompts", None))

    def wait_for_save(self) -> None:
        """A worker's forward pass is submitted."""
        if self._worker is not None and self._worker.prefill is not None:
            self._worker.prefill.end()
        super().wait_for_save()

    def build_connector_worker_meta(self) -> Any:
        """As vLLM's, with what this rank has timed and published."""
        jobs: Any = super().build_connector_worker_meta()
        return jobs if self._worker is None else self._worker.report(jobs)

    def update_connector_output(self, connector_output: Any) -> None:
        """Note how fast the engine computes, and which loads failed.

        Only the worker can tell: when an output comes, the next step may long have been scheduled.
        """
        report: RankReport | None = connector_output.kv_connector_worker_meta
        if report is not None and report.computed is not None:
            self.manager.breakeven.computed(*report.computed)
        if connector_output.invalid_block_ids:
            self.manager.failed(connector_output.invalid_block_ids)
        super().update_connector_output(connector_output)
        if report is not None:
            self.manager.stored(report)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The engine's blocks that a load did not fill, since the last call."""
        if self._worker is None:
            return set()
        failed, self._worker.failed = self._worker.failed, set()
        return failed

    def unregister_kv_caches(self) -> None:
        """Let no I/O be under way when the engine gives its memory back (sleep)."""
        if self._worker is not None:
            self._worker.transfers.drain()

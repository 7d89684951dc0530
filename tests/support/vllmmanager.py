"""What the scheduler's side of the connector promises vLLM, tried without an engine around it.

`python -m support.vllmmanager SOCKET` runs in the engine's environment, against a real daemon; it
ends with an assertion that failed, or prints "held".
"""

import hashlib
import pickle
import sys
import time
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, Final

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import (
    OffloadingEventsTracker,
    get_offloading_event_group_spec,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
    RequestOffloadState,
    SchedulerOffloadConfig,
)
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingKVEventsConfig,
    ReqContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from twfs.engines.attaching import Attachment
from twfs.engines.transfers import Offer, Transfers
from twfs.engines.vllm import EVENT_SECONDS, TwfsManager, TwfsSpec, _Scheduler
from twfs.engines.vllm_layout import IDENTITY
from twfs.engines.vllm_offers import OpenStores
from twfs.engines.vllm_orders import RankReport
from twfs.engines.vllm_requests import Request
from twfs.hints import Hint, Retention, Stop

TOKENS: Final = 64
BLOCK_BYTES: Final = 4096


def spec_of(
    socket: Path, *, block_bytes: int = BLOCK_BYTES, blocks_per_chunk: int = 1, **extra: Any
) -> TwfsSpec:
    """The spec of a model that is not there, of one layer as vLLM sees it.

    With room for ten of the engine's blocks, if *extra* says nothing else.
    """
    return TwfsSpec(
        OffloadingConfig(
            groups=(OffloadingGroupConfig(TOKENS, ("layer",), 0),),
            worker_kv_bytes_per_block=block_bytes, enable_kv_cache_events=True,
            extra_config={
                "socket": str(socket), "patience_s": 20.0, "arena_bytes": 10 * block_bytes,
                IDENTITY: {"revision": "none"}, **extra,
            },
            engine_id="e", model=OffloadingModelConfig("manager", "bfloat16"),
            cache=OffloadingCacheConfig(TOKENS, blocks_per_chunk),
            parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
        )
    )  # fmt: skip


def request_of(
    manager: TwfsManager, name: str, count: int, **params: Any
) -> tuple[Any, ReqContext, list[Any]]:
    """A request of so many blocks, admitted."""
    hashes = [hashlib.sha256(f"{i}".encode()).digest() for i in range(count)]
    context = ReqContext(req_id=name, kv_transfer_params={"twfs": params})
    keys = [make_offload_key(each, 0) for each in hashes]
    for index, key in enumerate(keys):
        context.set_offload_key_position(key, (index + 1) * manager.layout.block_tokens)
    manager.requests[name] = Request(hashes)
    manager.on_new_request(context)
    return SimpleNamespace(request_id=name), context, keys


def until_ready(manager: TwfsManager, request: Any, computed: int = 0) -> None:
    """Ask step by step until there is an answer."""
    while not manager.ready(request, computed):
        time.sleep(0.001)


def try_owners(manager: TwfsManager, first: ReqContext) -> None:
    """What one tenant has stored is offered for another, and for another public beginning."""
    others: list[dict[str, Any]] = [
        {"tenant": "other"},
        {"tenant": "other", "public_tokens": 2 * TOKENS},
    ]
    for number, params in enumerate(others):
        request, context, keys = request_of(manager, f"owner {number}", 16, **params)
        until_ready(manager, request)
        assert manager.prepare_store(keys[:0], context).keys_to_store == []
        offered = manager.prepare_store(keys, context).keys_to_store
        assert offered == keys[:10], (params, offered)
        manager.on_request_finished(context)
        manager.complete_store(offered, context)  # which may be later than the end
        assert manager.prepare_store(keys, first).keys_to_store == []


def try_hints(manager: TwfsManager) -> None:
    """What a request says of its session goes with its stores."""
    request, context, keys = request_of(
        manager, "hints", 1, tenant="other",
        **{"session": "s", "class": "durable", "stop": "tool_use", "return_ms": 30_000},
    )  # fmt: skip
    until_ready(manager, request)
    offer = manager.prepare_store(keys, context).store_spec.offer
    assert offer.hint == Hint("s", Retention.DURABLE, Stop.TOOL_USE, 30_000)
    manager.on_request_finished(context)


def try_reports() -> None:
    """The sum of the ranks' reports keeps what each has told, whoever comes first."""
    reports = [
        RankReport({7: 1}, TransferStats(), (100, 0.5), {1: [3], 2: [4]}),
        RankReport({7: 1, 8: 1}, stored={1: [2]}),
    ]
    for first, second in (reports, reversed(reports)):
        total = pickle.loads(pickle.dumps(first)).aggregate(second).aggregate(RankReport({7: 1}))
        assert (total.completed_jobs, total.computed) == ({7: 3, 8: 1}, (100, 0.5))
        # Two ranks have told of store 1, of whose blocks both hold two, and one of store 2.
        stores = OpenStores(2)
        assert [stores.begin((None, 0), [*keys]) for keys in ("abcd", "efgh")] == [1, 2]
        assert [(each.keys, each.held) for each in stores.ended(total.stored)] == [([*"abcd"], 2)]
        late = RankReport(stored={2: [0], 1: [2], 9: [9]})
        assert [(each.keys, each.held) for each in stores.ended(late.stored)] == [([*"efgh"], 0)]
        assert len(stores) == 0


def told(manager: TwfsManager) -> list[Any]:
    """The keys of which events tell, since the last call; each of some."""
    events = list(manager.take_events())
    assert all(event.keys for event in events)
    return [key for event in events for key in event.keys]


def try_stores(manager: TwfsManager, workers: Attachment) -> None:
    """Blocks are offered once, as room allows; told of once published; again if that failed."""
    request, context, keys = request_of(manager, "a", 16)
    until_ready(manager, request)
    assert manager.lookup(keys[0], context) is LookupResult.MISS
    # A full arena takes fewer keys, the leading ones, and blocks nobody.
    first = manager.prepare_store(keys, context)
    assert first.keys_to_store == keys[:10]
    assert manager.prepare_store(keys[10:], context).keys_to_store == []
    transfers = Transfers(workers)
    ended: SimpleQueue[int] = SimpleQueue()
    transfers.store(1, first.store_spec.offer, [bytes(BLOCK_BYTES)] * 10, stored=ended.put)
    while not transfers.finished():
        time.sleep(0.001)
    # It may yet fail: no event, for which an idle engine goes on, but not for ever.
    manager.complete_store(first.keys_to_store, context)
    assert told(manager) == []
    assert manager.has_pending_work()
    manager._copied_s -= EVENT_SECONDS
    assert not manager.has_pending_work()
    manager.stored(RankReport(stored={first.store_spec.number: [ended.get()]}))
    assert (told(manager), told(manager)) == (keys[:10], [])
    assert (manager.take_told(), manager.take_told()) == (keys[:10], [])
    # What could not be stored is offered again, what was not.
    for held in (0, 2):
        offered = manager.prepare_store(keys, context)
        assert offered.keys_to_store == keys[10:]
        manager.complete_store(keys[10:], context)
        assert manager.prepare_store(keys, context).keys_to_store == []
        assert manager.has_pending_work()
        if held == 0:
            transfers.store(2, Offer((), -1), [bytes(BLOCK_BYTES)] * 6, stored=ended.put)
            assert ended.get() == held
        manager.stored(RankReport(stored={offered.store_spec.number: [held]}))
        assert not manager.has_pending_work()
        assert told(manager) == keys[10 : 10 + held]
    assert manager.prepare_store(keys, context).keys_to_store == keys[12:]
    manager.complete_store(keys[12:], context)
    try_owners(manager, context)
    transfers.close()


def try_loads(manager: TwfsManager) -> None:
    """What is held is loaded if that pays."""
    # What is held is a hit from where the engine's own memory ends; a failed load is a miss then.
    request, context, keys = request_of(manager, "b", 16)
    until_ready(manager, request, 2 * TOKENS)
    found = [manager.lookup(key, context) for key in keys]
    assert found.count(LookupResult.HIT) == 10
    assert manager.prepare_load(keys[2:10], context).held.count == 8
    manager.requests["b"].loading = ([7], [8])
    manager.failed({1, 2})
    manager.complete_load(keys[2:10], context)
    until_ready(manager, request, 2 * TOKENS)
    assert manager.requests["b"].blocks == 10
    manager.requests["b"].loading = ([7], [8])
    manager.failed({8})
    until_ready(manager, request, 2 * TOKENS)
    assert manager.requests["b"].blocks == 2
    # Less than what pays is not loaded.
    manager.breakeven.tokens_min = 11 * TOKENS
    request, context, keys = request_of(manager, "c", 16)
    until_ready(manager, request)
    assert manager.requests["c"].blocks == 0
    # What the engine holds itself is offered whatever the room, once it is not known any more.
    manager.offers._known.clear()
    manager.requests["c"].start = 12
    assert manager.prepare_store(keys, context).keys_to_store == keys


def try_steps(socket: Path) -> None:
    """Through vLLM's own scheduler: few keys in a step, all in the end; at once at a request's."""
    manager = TwfsManager(spec_of(socket, arena_bytes=BLOCK_BYTES << 13))
    spec: Any = FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=1, head_size=64, dtype=torch.bfloat16
    )
    group: Any = GroupOffloadConfig(
        0, TOKENS, TOKENS, 1, get_offloading_event_group_spec(KVCacheGroupSpec(["layer"], spec)),
        None, spec, FullAttentionManager,
    )  # fmt: skip
    scheduler: Any = _Scheduler.__new__(_Scheduler)
    scheduler.config = SchedulerOffloadConfig((group,), 1, TOKENS, 1, False, False)
    scheduler.manager, scheduler._req_status = manager, {}
    scheduler._events_tracker = OffloadingEventsTracker(OffloadingKVEventsConfig(True, False))
    scheduler._jobs, scheduler._job_counter, scheduler._block_id_to_pending_jobs = {}, 0, {}
    scheduler._current_batch_allocated_block_ids = set()
    stopped = {"x": 2, "y": 3}  # the last step of each
    sizes = {"x": 3000, "y": 2600}
    for name, blocks in sizes.items():
        hashes = [hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(blocks)]
        known: Any = SimpleNamespace(
            request_id=name, block_hashes=hashes, kv_transfer_params=None, status=None,
            num_tokens=blocks * TOKENS + 1, num_prompt_tokens=blocks * TOKENS,
            num_computed_tokens=blocks * TOKENS, is_finished=lambda: False,
            shared_prefix_boundary=None,
        )  # fmt: skip
        manager.requests[name] = Request(hashes)
        context = ReqContext(req_id=name)
        status = RequestOffloadState(
            scheduler.config, known, context, manager.on_new_request(context)
        )
        status.update_offload_keys()
        status.group_states[0].block_ids.extend(range(1, blocks + 1))
        scheduler._req_status[name] = status
        until_ready(manager, known)
    offered: dict[str, list[int]] = {name: [] for name in sizes}
    step, counts = 0, []
    while any(len(offered[name]) < blocks for name, blocks in sizes.items()):
        step += 1
        ended = {name for name, last in stopped.items() if last == step}
        for name in ended:
            scheduler._req_status[name].req.is_finished = lambda: True
        manager.on_schedule_end(None)
        going = {name: 1 for name, last in stopped.items() if step < last}
        output = SimpleNamespace(num_scheduled_tokens=going, finished_req_ids=ended)
        jobs = scheduler._build_store_jobs(output)
        for job in jobs.values():
            offered[job.req_id] += job.src_spec.block_ids.tolist()
            assert job.dst_spec.offer.blocks == len(job.src_spec.block_ids)
        counts.append({job.req_id: job.dst_spec.offer.blocks for job in jobs.values()})
    assert counts == [{"x": 512}, {"y": 512, "x": 2488}, {"y": 2088}], counts
    assert all(offered[name] == list(range(1, blocks + 1)) for name, blocks in sizes.items())
    manager.shutdown()


def main() -> None:
    """Try one promise after the other."""
    try_reports()
    spec = spec_of(Path(sys.argv[1]))
    manager = TwfsManager(spec)
    manager.breakeven.tokens_min = 0
    workers = spec.attach(arena_bytes=1 << 20)
    try_stores(manager, workers)
    try_loads(manager)
    try_hints(manager)
    try_steps(Path(sys.argv[1]))
    for name in ("a", "b", "c", "never seen"):
        manager.on_request_finished(ReqContext(req_id=name))
    manager.reset_cache()
    assert not manager.has_pending_work()
    manager.shutdown()
    workers.close()
    sys.stdout.write("held\n")


if __name__ == "__main__":
    main()

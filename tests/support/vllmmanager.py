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

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferStats
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from twfs.engines.attaching import Attachment
from twfs.engines.transfers import Offer, Transfers
from twfs.engines.vllm import EVENT_SECONDS, TwfsManager, TwfsSpec, _Request
from twfs.engines.vllm_layout import IDENTITY
from twfs.engines.vllm_orders import OpenStores, RankReport

TOKENS: Final = 64
BLOCK_BYTES: Final = 4096


def spec_of(socket: Path, **extra: Any) -> TwfsSpec:
    """The spec of a model that is not there, with room for ten blocks."""
    return TwfsSpec(
        OffloadingConfig(
            groups=(OffloadingGroupConfig(TOKENS, ("layer",), 0),),
            worker_kv_bytes_per_block=BLOCK_BYTES, enable_kv_cache_events=True,
            extra_config={
                "socket": str(socket), "patience_s": 20.0, "arena_bytes": 10 * BLOCK_BYTES,
                IDENTITY: {"revision": "none"}, **extra,
            },
            engine_id="e", model=OffloadingModelConfig("manager", "bfloat16"),
            cache=OffloadingCacheConfig(TOKENS, 1),
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
        context.set_offload_key_position(key, (index + 1) * TOKENS)
    manager.requests[name] = _Request(hashes)
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
        request, context, keys = request_of(manager, f"owner {number}", 4, **params)
        until_ready(manager, request)
        assert manager.prepare_store(keys[:0], context).keys_to_store == []
        offered = manager.prepare_store(keys[:4], context).keys_to_store
        assert offered == keys[:4], (params, offered)
        manager.on_request_finished(context)
        manager.complete_store(offered, context)  # which may be later than the end
        assert manager.prepare_store(keys, first).keys_to_store == []


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
        assert [(each.keys, each.held) for each in stores.ended(total)] == [([*"abcd"], 2)]
        late = RankReport(stored={2: [0], 1: [2], 9: [9]})
        assert [(each.keys, each.held) for each in stores.ended(late)] == [([*"efgh"], 0)]
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
    manager.requests["b"].loading = frozenset({7, 8})
    manager.failed({1, 2})
    manager.complete_load(keys[2:10], context)
    until_ready(manager, request, 2 * TOKENS)
    assert manager.requests["b"].blocks == 10
    manager.requests["b"].loading = frozenset({7, 8})
    manager.failed({8})
    until_ready(manager, request, 2 * TOKENS)
    assert manager.requests["b"].blocks == 2
    # Less than what pays is not loaded.
    manager.breakeven.tokens_min = 11 * TOKENS
    request, context, keys = request_of(manager, "c", 16)
    until_ready(manager, request)
    assert manager.requests["c"].blocks == 0
    # What the engine holds itself is offered whatever the room, once it is not known any more.
    manager._known.clear()
    manager.requests["c"].start = 12
    assert manager.prepare_store(keys, context).keys_to_store == keys


def main() -> None:
    """Try one promise after the other."""
    try_reports()
    spec = spec_of(Path(sys.argv[1]))
    manager = TwfsManager(spec)
    manager.breakeven.tokens_min = 0
    workers = spec.attach(arena_bytes=1 << 20)
    try_stores(manager, workers)
    try_loads(manager)
    for name in ("a", "b", "c", "never seen"):
        manager.on_request_finished(ReqContext(req_id=name))
    manager.reset_cache()
    assert not manager.has_pending_work()
    manager.shutdown()
    workers.close()
    sys.stdout.write("held\n")


if __name__ == "__main__":
    main()

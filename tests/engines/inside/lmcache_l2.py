"""LMCache's contract for L2 adapters, held by ours: real package, real daemon, no engine.

Run inside LMCache's environment by tests/engines/test_lmcache.py.
"""

import asyncio
import json
import os
import select
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from lmcache.v1.check.check_mode_test_l2_adapter import run_test_mode
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.config import EvictionConfig
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.quota_manager import QuotaManager
from lmcache.v1.distributed.storage_controllers.eviction_controller import (
    L2AdapterEvictionState,
    L2EvictionController,
)
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.mp_observability.event import Event, EventType
from lmcache.v1.mp_observability.event_bus import EventBusConfig, init_event_bus
from lmcache.v1.platform import consume_fd

from support.daemon import Daemon, running_daemon
from twfs.engines.lmcache import TwfsL2Adapter
from twfs.store import iterate_heads, iterate_sessions

SHAPE: Final = (2, 4, 256, 64)  # K and V, layers, tokens, hidden: 256 KiB in bfloat16
MODEL: Final = "vendor/model-8b"
REVISIONS: Final = {MODEL: "commit-1", "other/model": "commit-1", "test_model": "1"}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon(tmp_path / "warehouse") as running:
        yield running


@pytest.fixture
def adapter(daemon: Daemon) -> Iterator[Any]:
    made = adapter_of(daemon)
    yield made
    made.close()


def adapter_of(daemon: Daemon, **params: Any) -> Any:
    """An adapter as LMCache makes it from the JSON of its command line."""
    given = {
        "socket": str(daemon.socket),
        "revisions": REVISIONS,
        "timeout_s": 20.0,
        "patience_s": 20.0,
        **params,
    }
    spec = {
        "type": "plugin", "module_path": "twfs.engines.lmcache", "class_name": "TwfsL2Adapter",
        "adapter_params": given,
    }  # fmt: skip
    arguments = type("Arguments", (), {"l2_adapter": [json.dumps(spec)]})()
    (config,) = parse_args_to_l2_adapters_config(arguments).adapters
    made = create_l2_adapter(config)
    assert isinstance(made, TwfsL2Adapter)
    return made


def keys_of(
    count: int, seed: int = 0, *, model: str = MODEL, rank: int = 0x01000100, group: int = 0,
    salt: str = "",
) -> list[ObjectKey]:  # fmt: skip
    return [
        ObjectKey(bytes([seed]) * 28 + index.to_bytes(4, "big"), model, rank, group, salt)
        for index in range(count)
    ]


def memory_of(
    count: int, seed: int | None = 0, shape: Sequence[int] = SHAPE,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Any]:  # fmt: skip
    """Random memory, or with no seed zeros, as LMCache hands it out."""
    found = []
    generator = torch.Generator().manual_seed(seed or 0)
    for _ in range(count):
        size = torch.Size(shape)
        data = torch.zeros(size.numel() * dtype.itemsize, dtype=torch.uint8)
        if seed is not None:
            data.random_(0, 256, generator=generator)
        meta = MemoryObjMetadata(
            shape=size, dtype=dtype, address=data.data_ptr(), phy_size=data.numel(), ref_count=1,
            fmt=MemoryFormat.KV_2LTD, shapes=[size], dtypes=[dtype],
        )  # fmt: skip
        found.append(TensorMemoryObj(data, meta, parent_allocator=None))
    return found


def descs_of(
    shape: Sequence[int] = SHAPE, dtype: torch.dtype = torch.bfloat16, group: int = 0
) -> dict[int, MemoryLayoutDesc]:
    return {group: MemoryLayoutDesc([torch.Size(shape)], [dtype])}


def await_event(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(60_000)
    consume_fd(fd)


def store(adapter: Any, keys: list[ObjectKey], memory: list[Any]) -> Any:
    task = adapter.submit_store_task(keys, memory)
    await_event(adapter.get_store_event_fd())
    return adapter.pop_completed_store_tasks()[task]


def lookup(adapter: Any, keys: list[ObjectKey], descs: Any = None) -> list[int]:
    task = adapter.submit_lookup_and_lock_task(keys, descs_of() if descs is None else descs)
    await_event(adapter.get_lookup_and_lock_event_fd())
    bitmap = adapter.query_lookup_and_lock_result(task)
    assert adapter.query_lookup_and_lock_result(task) is None
    return list(bitmap.get_indices_list())


def load(adapter: Any, keys: list[ObjectKey], memory: list[Any]) -> list[int]:
    task = adapter.submit_load_task(keys, memory)
    await_event(adapter.get_load_event_fd())
    return list(adapter.query_load_result(task).get_indices_list())


def same(mine: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return all(torch.equal(a.raw_data, b.raw_data) for a, b in zip(mine, theirs, strict=True))


def put_session(adapter: Any, count: int, seed: int = 0, **row: Any) -> Any:
    """Look up and store as LMCache does for a prompt of *count* blocks."""
    keys, memory = keys_of(count, seed, **row), memory_of(count, seed)
    adapter.submit_unlock([keys[index] for index in lookup(adapter, keys)])
    assert store(adapter, keys, memory).is_successful()
    return keys, memory


def test_what_was_stored_comes_back_after_a_restart_of_both(daemon: Daemon) -> None:
    first = adapter_of(daemon)
    keys, memory = keys_of(5), memory_of(5)
    assert lookup(first, keys) == []
    result = store(first, keys, memory)
    assert result.is_successful()
    assert result.bytes_transferred() == 5 * memory[0].get_size()
    assert store(first, keys, memory).bytes_transferred() == 0
    first.close()
    daemon.restart()
    second = adapter_of(daemon)
    assert lookup(second, keys + keys_of(2, seed=9)) == [0, 1, 2, 3, 4]
    into = memory_of(5, None)
    assert load(second, keys, into) == [0, 1, 2, 3, 4]
    assert same(into, memory)
    second.close()


def test_the_check_that_lmcache_ships_is_passed(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {
        "type": "plugin", "module_path": "twfs.engines.lmcache", "class_name": "TwfsL2Adapter",
        "adapter_params": {"socket": str(daemon.socket), "revisions": REVISIONS},
    }  # fmt: skip
    asyncio.run(run_test_mode("test_model", l2_adapter=[json.dumps(spec)], obj_size=65536))
    said = capsys.readouterr().out
    for line in ("5/5 correctly absent", "Batch store OK", "5/5 found", "(loaded): 5/5",
                 "(content): 5/5"):  # fmt: skip
        assert line in said, said


def test_the_event_descriptors_are_distinct(adapter: Any) -> None:
    fds = {
        adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    }  # fmt: skip
    assert len(fds) == 3


def test_kv_of_anything_else_is_a_miss(daemon: Daemon, adapter: Any) -> None:
    put_session(adapter, 3)
    others: tuple[dict[str, Any], ...] = (
        {"model": "other/model"}, {"rank": 0x02000200}, {"rank": 0x02010201}, {"group": 1},
        {"salt": "alice"},
    )  # fmt: skip
    for other in others:
        keys = keys_of(3, **other)
        assert lookup(adapter, keys, descs_of(group=other.get("group", 0))) == [], other
    assert lookup(adapter, keys_of(3), descs_of(dtype=torch.float16)) == []
    assert lookup(adapter, keys_of(3), descs_of((2, 4, 128, 128))) == []
    assert lookup(adapter, keys_of(3), descs_of((2, 8, 256, 32))) == []
    later = adapter_of(daemon, revisions={MODEL: "commit-2"})
    assert lookup(later, keys_of(3)) == []
    later.close()
    assert lookup(adapter, keys_of(3)) == [0, 1, 2]


def test_memory_of_another_shape_is_not_written(adapter: Any) -> None:
    keys, _ = put_session(adapter, 2)
    assert lookup(adapter, keys) == [0, 1]
    into = memory_of(2, None, (2, 4, 128, 128))  # of as many bytes
    assert load(adapter, keys, into) == []
    assert same(into, memory_of(2, None, (2, 4, 128, 128)))


def test_a_model_whose_weights_nobody_tells_hits_and_stores_nothing(adapter: Any) -> None:
    keys, memory = keys_of(2, model="unknown/model"), memory_of(2)
    assert lookup(adapter, keys) == []
    assert not store(adapter, keys, memory).is_successful()


def test_kv_of_an_engine_whose_weights_were_replaced_under_it_is_not_kept(
    daemon: Daemon, tmp_path: Path
) -> None:
    weights = tmp_path / "model.bin"
    weights.write_bytes(b"what the engine runs")
    where = {MODEL: str(tmp_path)}
    first = adapter_of(daemon, revisions=where)
    keys, memory = put_session(first, 2)
    locked = lookup(first, keys)
    weights.write_bytes(b"what is to be run next")
    more, its = keys_of(2, 1), memory_of(2, 1)
    assert not store(first, more, its).is_successful()
    assert lookup(first, keys) == lookup(first, more) == []
    into = memory_of(2, None)
    assert load(first, keys, into) == locked == [0, 1]  # for the request that found it
    assert same(into, memory)
    first.submit_unlock(keys)
    assert first.report_status()["counters"]["a task failed: WeightsChanged"] == 3
    first.close()
    second = adapter_of(daemon, revisions=where)
    assert lookup(second, keys) == lookup(second, more) == []
    assert store(second, keys, its).is_successful()  # the engine was restarted too
    assert lookup(second, keys) == [0, 1]
    assert load(second, keys, into) == [0, 1]
    assert same(into, its)
    second.close()


def test_a_block_whose_bytes_have_changed_is_not_loaded(daemon: Daemon, adapter: Any) -> None:
    keys, memory = put_session(adapter, 5)
    assert lookup(adapter, keys) == [0, 1, 2, 3, 4]
    flip_on_device(daemon, memory[2])
    into = memory_of(5, None)
    assert load(adapter, keys, into) == [0, 1, 3, 4]
    memory[2].raw_data.zero_()
    assert same(into, memory)
    adapter.submit_unlock(keys)
    while lookup(adapter, keys) == [0, 1, 2, 3, 4]:  # until the daemon has found out too
        adapter.submit_unlock(keys)
    memory = memory_of(5)
    assert store(adapter, keys, memory).bytes_transferred() == memory[2].get_size()
    assert lookup(adapter, keys) == [0, 1, 2, 3, 4]


def flip_on_device(daemon: Daemon, memory: Any) -> None:
    """Change one byte of a payload where it lies."""
    image = daemon.directory / "device0.img"
    payload = memory.raw_data.numpy().tobytes()
    with image.open("r+b") as file:
        at = file.read().index(payload)
        file.seek(at + 1000)
        file.write(bytes([payload[1000] ^ 0x40]))


def test_a_daemon_that_dies_under_a_lock_is_a_miss_and_no_more(
    daemon: Daemon, adapter: Any
) -> None:
    keys, memory = put_session(adapter, 3)
    assert lookup(adapter, keys) == [0, 1, 2]
    daemon.kill()
    into = memory_of(3, None)
    assert load(adapter, keys, into) == []
    assert lookup(adapter, keys) == []
    assert not store(adapter, keys_of(1, seed=7), memory_of(1)).is_successful()
    adapter.submit_unlock(keys)
    assert adapter.report_status()["is_healthy"]
    daemon.start()
    while lookup(adapter, keys) != [0, 1, 2]:
        pass
    assert load(adapter, keys, into) == [0, 1, 2]
    assert same(into, memory)


def test_an_adapter_may_come_before_its_daemon(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "warehouse") as daemon:
        daemon.kill()
        adapter = adapter_of(daemon)
        assert lookup(adapter, keys_of(2)) == []
        daemon.start()
        while not store(adapter, keys_of(2), memory_of(2)).is_successful():
            pass
        assert lookup(adapter, keys_of(2)) == [0, 1]
        adapter.close()


def test_two_conversations_show_as_two_heads_that_share_their_beginning(
    daemon: Daemon, adapter: Any
) -> None:
    shared, _ = put_session(adapter, 3)
    for seed in (5, 6):
        turn = shared + keys_of(2, seed)
        found = lookup(adapter, turn)
        assert found == [0, 1, 2]
        adapter.submit_unlock(shared)
        assert store(adapter, turn[3:], memory_of(2, seed)).is_successful()
    with daemon.client() as client:
        (info,) = client.models()
        assert info.name.startswith("vendor--model-8b-")
        sessions = list(iterate_sessions(client, info.id))
    assert [(each.blocks, each.tokens) for each in sessions] == [(5, 1280), (5, 1280)]


@pytest.fixture
def bus() -> Iterator[Any]:
    """LMCache's bus of events, on as it is without --disable-observability."""
    made = init_event_bus(EventBusConfig())
    made.start()
    yield made
    made.stop()
    init_event_bus(EventBusConfig(enabled=False))


def test_what_lmcache_says_was_used_is_used_in_the_store(daemon: Daemon, bus: Any) -> None:
    adapter = adapter_of(daemon)
    ranks = [put_session(adapter, 3, rank=rank)[0] for rank in (0x02000200, 0x02010201)]
    before = last_uses(daemon)
    time.sleep(0.01)  # stamps are milliseconds
    keys = [key for pair in zip(*ranks, strict=True) for key in pair]  # as LMCache orders them
    stranger = keys_of(1, model="unknown/model")
    bus.publish(Event(EventType.L1_KEYS_ACCESSED, metadata={"l1_tag": "", "keys": keys + stranger}))
    while min(last_uses(daemon)) <= max(before):
        pass
    while adapter.report_status()["counters"].get("touches") != 1:
        pass
    daemon.kill()
    for _ in range(3):
        bus.publish(Event(EventType.L1_KEYS_ACCESSED, metadata={"l1_tag": "", "keys": keys}))
    adapter.close()
    bus.publish(Event(EventType.L1_KEYS_ACCESSED, metadata={"l1_tag": "", "keys": keys}))
    bus.stop()
    assert bus.subscriber_exception_counts() == {}


def last_uses(daemon: Daemon) -> list[int]:
    """Of all blocks, in milliseconds."""
    with daemon.client() as client:
        return [
            block.last_use_ms
            for info in client.models()
            for head in iterate_heads(client, info.id)
            for block in client.chain_of(info.id, head)
        ]


class Heard(L2AdapterListener):  # type: ignore[misc] # LMCache ships no types
    """What LMCache's eviction hears."""

    def __init__(self) -> None:
        self.keys: set[ObjectKey] = set()
        self.accessed = 0

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        assert len(keys) == len(sizes)
        self.keys |= set(keys)

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        self.accessed += len(keys)

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        self.keys -= set(keys)


def test_what_the_daemon_evicts_is_said_when_it_is_missed(daemon: Daemon, adapter: Any) -> None:
    heard = Heard()
    adapter.register_listener(heard)
    sessions = [put_session(adapter, 20, seed) for seed in range(16)]  # 80 MiB into 63
    evicted = 0
    for keys, memory in sessions:
        found = lookup(adapter, keys)
        assert found == list(range(len(found)))
        evicted += len(keys) - len(found)
        assert heard.keys.issuperset(keys[: len(found)])
        assert heard.keys.isdisjoint(keys[len(found) :])
        into = memory_of(len(found), None)
        assert load(adapter, keys[: len(found)], into) == found
        assert same(into, memory[: len(found)])
        adapter.submit_unlock(keys[: len(found)])
    assert evicted > 0
    assert heard.accessed == 16 * 20 - evicted
    size = memory_of(1)[0].get_size()
    assert adapter.get_usage().bytes_by_cache_salt == {"": (16 * 20 - evicted) * size}


def test_keys_are_listed_in_pages_and_deleted_with_what_follows(
    daemon: Daemon, adapter: Any
) -> None:
    heard = Heard()
    adapter.register_listener(heard)
    put_session(adapter, 5)
    put_session(adapter, 4, 1, salt="alice")
    put_session(adapter, 2, 2, model="other/model", rank=0x02010201)
    assert len(listed(adapter)) == 11
    assert {key.to_object_key() for key in listed(adapter, MODEL)} == {
        *keys_of(5), *keys_of(4, 1, salt="alice"),
    }  # fmt: skip
    usage = adapter.get_usage()
    assert usage.total_bytes_used > 11 * memory_of(1)[0].get_size()
    assert usage.total_capacity_bytes > usage.total_bytes_used
    adapter.delete([keys_of(5)[3], *keys_of(1, 1, salt="alice")])
    assert lookup(adapter, keys_of(5)) == [0, 1, 2]
    assert len(listed(adapter)) == 5
    with pytest.raises(ValueError, match="cursor"):
        adapter.list_l2_keys(cursor="none")
    with pytest.raises(ValueError, match="size"):
        adapter.list_l2_keys(page_size=0)


def listed(adapter: Any, model: str | None = None) -> list[Any]:
    page = adapter.list_l2_keys(model, page_size=3)
    found = list(page.entries)
    while page.next_page_token is not None:
        page = adapter.list_l2_keys(model, page_size=3, cursor=page.next_page_token)
        found += page.entries
    assert all(each.size_bytes == memory_of(1)[0].get_size() for each in found)
    return [each.key for each in found]


def test_without_a_daemon_nothing_is_deleted_nor_said_to_be_and_eviction_goes_on(
    daemon: Daemon, adapter: Any
) -> None:
    heard = Heard()
    adapter.register_listener(heard)
    config = EvictionConfig("IsolatedLRU", trigger_watermark=0.5, eviction_ratio=0.5)
    evicting = L2EvictionController(
        [L2AdapterEvictionState(0, adapter, config)], quota_manager=QuotaManager()
    )
    keys, _ = put_session(adapter, 3, salt="alice")  # which has no quota: all is to go
    daemon.kill()
    adapter.delete(keys)
    assert heard.keys == set(keys)
    with pytest.raises(NotImplementedError, match="not now"):  # 503, and no empty page
        adapter.list_l2_keys()
    evicting.start()
    failures = removals_failed(adapter)
    while removals_failed(adapter) < failures + 2:
        assert evicting.report_status()["thread_alive"]
    daemon.start()
    while heard.keys:
        assert evicting.report_status()["thread_alive"]
    evicting.stop()
    assert lookup(adapter, keys) == []


def removals_failed(adapter: Any) -> int:
    """How many deletions failed so far."""
    counters = adapter.report_status()["counters"]
    return sum(
        count for kind, count in counters.items() if str(kind).startswith("a removal failed")
    )


def test_a_salt_is_not_stored_and_so_listed_only_once_it_is_seen(daemon: Daemon) -> None:
    first = adapter_of(daemon)
    put_session(first, 2, salt="alice")
    first.close()
    second = adapter_of(daemon)
    assert listed(second) == []
    assert lookup(second, keys_of(2, salt="alice")) == [0, 1]
    assert len(listed(second)) == 2
    second.close()
    for path in daemon.directory.rglob("*"):
        assert not path.is_file() or b"alice" not in path.read_bytes(), path


def test_a_salt_may_be_a_tenants(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.operate("tenant-add", name="acme", owner=os.getuid(), uids=[])
    adapter = adapter_of(daemon, tenants={"acme-salt": "acme"})
    put_session(adapter, 2, salt="acme-salt")
    put_session(adapter, 2, 1)
    with daemon.client() as client:
        (info,) = client.models()
        tenants = sorted(each.tenant for each in iterate_sessions(client, info.id))
    assert tenants == ["acme", "everybody"]
    adapter.close()


def test_leases_end_when_all_is_unlocked(daemon: Daemon, adapter: Any) -> None:
    keys, _ = put_session(adapter, 4)
    assert lookup(adapter, keys) == lookup(adapter, keys) == [0, 1, 2, 3]
    with daemon.client() as client:
        assert client.statistics()["leases"]["leases"] == 2
        adapter.submit_unlock(keys)
        adapter.submit_unlock(keys)
        while client.statistics()["leases"]["leases"]:
            pass

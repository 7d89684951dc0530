"""SGLang's contracts for storage, held by ours: its pools and factories, a daemon, no engine.

Run inside SGLang's environment by tests/engines/test_sglang.py.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from operator import gt
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker
from sglang.srt.mem_cache.utils import get_hash_str
from sglang.srt.runtime_context import get_context

from support.daemon import Daemon, running_daemon
from support.engines import until
from support.sglangs import hicache_config, linker_config
from twfs.datapath.match import Match
from twfs.engines.keyed import Space
from twfs.engines.sglang import key_of
from twfs.errors import InvalidInput
from twfs.store import iterate_sessions

LAYERS, SLOTS, HEADS, DIM, TOKENS = 4, 1024, 2, 64, 64  # TOKENS: of one of SGLang's pages
MODEL: Final = "vendor/model-8b"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon(tmp_path / "warehouse") as running:
        yield running


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    """SGLang's own configuration, as in an engine's process."""
    with get_context().override_server_args():
        yield


def keys_of(count: int, seed: int = 0) -> list[str]:
    tokens = [seed * 100_000 + index for index in range(count * TOKENS)]
    keys: list[str] = get_hash_str(tokens, page_size=TOKENS)
    return keys


def host_pool(
    layout: str = "page_first", dtype: torch.dtype = torch.bfloat16, page: int = TOKENS
) -> Any:
    """A real host pool with random KV."""
    k, v = (
        tuple(torch.zeros(SLOTS + TOKENS, HEADS, DIM, dtype=dtype) for _ in range(LAYERS))
        for _ in range(2)
    )

    def places(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)

    buffers = KVBuffers(
        k=k, v=v, layout=next(iter(KVBufferLayout)), k_data_ptrs=places(k), v_data_ptrs=places(v)
    )
    info = MHABufferInfo(
        buffers=buffers, page_size=page, head_num=HEADS, head_dim=DIM, v_head_dim=DIM,
        dtype=dtype, device=torch.device("cpu"),
    )  # fmt: skip
    pool = MHATokenToKVPoolHost(
        info, 2.0, 0, page, layout, pin_memory=False, device="cpu",
        device_capacity_tokens=SLOTS, start_layer=0, end_layer=LAYERS,
    )  # fmt: skip
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape).to(dtype))
    return pool


def backend(daemon: Daemon, pool: Any, *, extra: Any = None, **config: Any) -> Any:
    """The storage as SGLang makes it from its command line."""
    given = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0,
        "attn_cp_size": 1, "is_mla_model": False, "enable_storage_metrics": False,
        "is_page_first_layout": True, "model_name": MODEL, **config,
    }  # fmt: skip
    text = json.dumps(hicache_config(daemon.socket, keep_on_flush=False, revision="1"))
    page, *_, prefix_keys = HybridCacheController.parse_storage_backend_extra_config(text)
    assert prefix_keys
    given["extra_config"] = {**page, **(extra or {})}
    made = StorageBackendFactory.create_backend("dynamic", HiCacheStorageConfig(**given), pool)
    made.register_mem_pool_host(pool)
    made.on_host_pools_registered()
    return made


def slots(first: int, count: int) -> torch.Tensor:
    return torch.arange(first * TOKENS, (first + count) * TOKENS)


def content(pool: Any, first: int, count: int) -> list[torch.Tensor]:
    return [pool.get_data_page((first + i) * TOKENS, flat=True).clone() for i in range(count)]


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
def test_pages_come_back_after_a_restart_of_both(daemon: Daemon, layout: str) -> None:
    pool = host_pool(layout)
    first = backend(daemon, pool)
    assert first.batch_exists(keys_of(4)) == 0
    assert first.batch_get_v1(keys_of(4), slots(8, 4)) == [False] * 4
    assert first.batch_set_v1(keys_of(4), slots(0, 4)) == [True] * 4
    first.close()
    daemon.restart()
    second = backend(daemon, pool)
    assert second.batch_exists(keys_of(6)) == 4
    assert second.exists(keys_of(1)[0])
    assert second.batch_get_v1(keys_of(4), slots(8, 4)) == [True] * 4
    assert same(content(pool, 8, 4), content(pool, 0, 4))
    second.close()


def test_kv_of_anything_else_is_a_miss(daemon: Daemon) -> None:
    pool = host_pool()
    mine = backend(daemon, pool)
    assert all(mine.batch_set_v1(keys_of(2), slots(0, 2)))
    others = [
        backend(daemon, pool, model_name="other"), backend(daemon, pool, tp_rank=1, tp_size=2),
        backend(daemon, pool, pp_rank=1, pp_size=2), backend(daemon, pool, extra={"revision": "2"}),
        backend(daemon, host_pool(page=TOKENS // 2)), backend(daemon, host_pool("layer_first")),
        backend(daemon, host_pool(dtype=torch.float16)),
    ]  # fmt: skip
    for other in others:
        assert other.batch_exists(keys_of(2)) == 0
        other.close()
    assert mine.batch_exists(keys_of(2)) == 2
    assert mine.batch_exists(keys_of(2, seed=1)) == 0
    mine.close()


def test_kv_of_another_configuration_is_a_miss(daemon: Daemon, tmp_path: Path) -> None:
    """Config and scales by what is in the files; all else by what SGLang was told."""
    (tmp_path / "config.json").write_text('{"rope_theta": 10000}')
    (tmp_path / "scales.json").write_text("{}")
    (tmp_path / "model.bin").write_bytes(b"weights")
    given = {"model_path": str(tmp_path), "quantization_param_path": str(tmp_path / "scales.json")}

    def hits(**configured: Any) -> int:
        with get_context().override_server_args(**given, **configured):
            made = linker(daemon, device_pool())
            found = len(made.lookup("r", transfer(keys_of(2))))
            assert offload(made, keys_of(2), 1)
            made.close()
            storage = backend(daemon, host_pool())
            found += int(storage.batch_exists(keys_of(2)))
            assert all(storage.batch_set_v1(keys_of(2), slots(0, 2)))
            storage.close()
            return found

    assert hits() == 0
    assert hits() == 4
    assert hits(json_model_override_args='{"rope_theta": 5}') == 0
    assert hits(quantization="fp8") == 0
    assert hits(kv_cache_dtype="fp8_e4m3") == 0
    assert hits(attention_backend="triton") == 0
    (tmp_path / "config.json").write_text('{"rope_theta": 10001}')
    assert hits() == 0
    (tmp_path / "scales.json").write_text("[]")
    assert hits() == 0


def test_prefix_keys_make_one_chain_of_several_batches(daemon: Daemon) -> None:
    storage = backend(daemon, host_pool())
    keys = keys_of(6)
    assert all(storage.batch_set_v1(keys[:4], slots(0, 4), HiCacheStorageExtraInfo([])))
    rest = HiCacheStorageExtraInfo(prefix_keys=keys[:4])
    assert all(storage.batch_set_v1(keys[4:], slots(4, 2), rest))
    assert storage.batch_exists(keys[4:], rest) == 2
    with daemon.client() as client:
        (info,) = client.models()
        (session,) = iterate_sessions(client, info.id)
    assert (session.blocks, session.tokens) == (6, 6 * TOKENS)
    storage.close()


def uses_of(daemon: Daemon) -> list[int]:
    """When each block of the one session was used last."""
    with daemon.client(arena_bytes=0) as client:
        (info,) = client.models()
        (session,) = iterate_sessions(client, info.id)
        return [int(block.last_use_ms) for block in client.chain_of(info.id, session.head)]


def test_looking_for_pages_uses_them_and_all_before_them(daemon: Daemon) -> None:
    """A daemon that takes it later is not waited for."""
    storage = backend(daemon, host_pool())
    keys = keys_of(6)
    assert all(storage.batch_set_v1(keys, slots(0, 6)))
    before = uses_of(daemon)
    rest = HiCacheStorageExtraInfo(prefix_keys=keys[:4])
    assert storage.batch_exists(keys[4:], rest) == 2
    until(lambda: all(map(gt, uses_of(daemon), before)), "all six were used")
    before = uses_of(daemon)
    os.kill(daemon.pid, signal.SIGSTOP)
    storage._current.now().touch([key_of(key) for key in keys])
    assert storage._store.client._counts["touches"] == 2
    os.kill(daemon.pid, signal.SIGCONT)
    until(lambda: all(map(gt, uses_of(daemon), before)), "all six were used again")
    storage.close()


def until_a_hole(daemon: Daemon) -> None:
    """Wait until what a reader has reported is judged."""
    with daemon.client(arena_bytes=0) as client:
        until(lambda: client._daemon_statistics()["counters"]["holes"] == 1, "a hole")


def test_a_page_whose_bytes_have_changed_is_not_loaded(daemon: Daemon) -> None:
    pool = host_pool()
    storage = backend(daemon, pool)
    assert all(storage.batch_set_v1(keys_of(4), slots(0, 4)))
    image = daemon.directory / "device0.img"
    payload = content(pool, 2, 1)[0].view(torch.uint8).numpy().tobytes()
    with image.open("r+b") as file:
        at = file.read().index(payload) + 777
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert storage.batch_get_v1(keys_of(4), slots(8, 4)) == [True, True, False, True]
    assert same(content(pool, 8, 2), content(pool, 0, 2))
    until_a_hole(daemon)
    storage.close()


def test_a_dead_daemon_is_a_miss_and_no_more(daemon: Daemon) -> None:
    storage = backend(daemon, host_pool())
    assert all(storage.batch_set_v1(keys_of(2), slots(0, 2)))
    daemon.kill()
    assert storage.batch_exists(keys_of(2)) == 0
    assert storage.batch_get_v1(keys_of(2), slots(8, 2)) == [False] * 2
    assert storage.batch_set_v1(keys_of(2, 1), slots(0, 2)) == [False] * 2
    daemon.start()
    while storage.batch_exists(keys_of(2)) != 2:
        pass
    storage.close()


def hits_of(made: Any, keys: list[str]) -> int:
    """How many of *keys* either adapter finds."""
    if hasattr(made, "batch_exists"):
        found: int = made.batch_exists(keys)
        return found
    return len(made.lookup("r", transfer(keys)))


def store(made: Any, keys: list[str]) -> bool:
    if hasattr(made, "batch_set_v1"):
        return all(made.batch_set_v1(keys, slots(1, len(keys))))
    return offload(made, keys, 1)


Made = Callable[..., tuple[Any, Callable[[], None]]]


@pytest.fixture(params=["hicache", "linker"])
def made(request: pytest.FixtureRequest, daemon: Daemon) -> Made:
    """Makes either adapter, and what SGLang does to it when it empties its cache."""

    def make(**extra: Any) -> tuple[Any, Callable[[], None]]:
        if request.param == "linker":
            each = linker(daemon, device_pool(), **extra)
            return each, each.reset
        pool = host_pool()
        return backend(daemon, pool, extra=extra), pool.clear

    return make


def test_what_an_emptied_cache_had_is_not_found_and_what_follows_is_nobody_elses(
    daemon: Daemon, made: Made
) -> None:
    """SGLang empties it when weights are new, and does not say that they are."""
    mine, flush = made()
    assert store(mine, keys_of(2))
    other, _ = made()  # still has, or starts with, the old weights
    for seed in (1, 2):
        flush()
        assert hits_of(mine, keys_of(2)) == hits_of(mine, keys_of(2, seed - 1)) == 0
        assert store(mine, keys_of(2, seed))
        assert hits_of(mine, keys_of(2, seed)) == 2
        assert hits_of(other, keys_of(2, seed)) == 0
    with daemon.client(arena_bytes=0) as client:
        assert len(client.models()) == 2  # of this process one, however often that was
    daemon.kill()
    flush()
    daemon.start()
    until(lambda: store(mine, keys_of(2, 3)), "the daemon answers")
    assert hits_of(mine, keys_of(2, 2)) == 0
    assert hits_of(other, keys_of(2)) == 2
    mine.close()
    other.close()


def test_a_flush_that_keeps_still_forgets_where_sglang_says_that_weights_are_new(
    made: Made,
) -> None:
    mine, flush = made(keep_on_flush=True)
    assert store(mine, keys_of(2))
    flush()
    assert hits_of(mine, keys_of(2)) == 2
    get_context().override("test", weight_version="2")
    flush()
    assert hits_of(mine, keys_of(2)) == 0
    mine.close()


def test_new_weights_are_seen_where_sglang_says_so_and_what_comes_before_the_flush_is_not_kept(
    made: Made,
) -> None:
    """Threads of HiCache may still store what the old weights computed."""
    mine, flush = made(keep_on_flush=True)
    assert store(mine, keys_of(2))
    get_context().override("test", model_path="elsewhere")
    assert hits_of(mine, keys_of(2)) == 0
    assert store(mine, keys_of(2))
    flush()
    assert hits_of(mine, keys_of(2)) == 0
    assert store(mine, keys_of(2))
    flush()
    assert hits_of(mine, keys_of(2)) == 2
    mine.close()


def test_clearing_makes_all_of_it_unreachable(daemon: Daemon) -> None:
    storage = backend(daemon, host_pool(), extra={"keep_on_flush": True})
    assert all(storage.batch_set_v1(keys_of(2), slots(0, 2)))
    storage.clear()
    assert storage.batch_exists(keys_of(2)) == 0
    assert all(storage.batch_set_v1(keys_of(2), slots(0, 2)))
    assert storage.batch_exists(keys_of(2)) == 2
    storage.close()


def test_a_pool_is_left_as_it_was(daemon: Daemon) -> None:
    pool = host_pool()
    storage = backend(daemon, pool)
    assert "clear" in vars(pool)
    storage.close()
    assert "clear" not in vars(pool)


def test_one_engine_over_several_nodes_is_refused(made: Made) -> None:
    with (
        get_context().override_server_args(nnodes=2),
        pytest.raises(InvalidInput, match="over 2 nodes"),
    ):
        made()


def test_what_cannot_be_kept_is_refused_at_the_start(daemon: Daemon) -> None:
    for wrong in ({"interface_v1": 0}, {"typing_error": 1}, {"revision": ""}):
        with pytest.raises(InvalidInput):
            backend(daemon, host_pool(), extra=wrong)
    storage = backend(daemon, host_pool())
    with pytest.raises(InvalidInput, match="full attention"):
        storage.register_mem_host_pool_v2(host_pool(), PoolName.MAMBA)
    storage.close()


# The linker: from SGLang's device pools and back, without a tier between them.


def device_pool() -> Any:
    pool = MHATokenToKVPool(
        SLOTS, page_size=TOKENS, dtype=torch.bfloat16, head_num=HEADS, head_dim=DIM,
        layer_num=LAYERS, device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    for tensor in (*pool.k_buffer, *pool.v_buffer):
        tensor.copy_(torch.randn(tensor.shape).to(tensor.dtype))
    return pool


def linker(daemon: Daemon, pool: Any, components: Any = ("FULL",), **extra: Any) -> Any:
    """The linker as SGLang makes it from its command line."""
    params = SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool), page_size=TOKENS,
        attn_tp_cache_group=None, tp_cache_group=None, pp_rank=0, pp_size=1, attn_cp_rank=0,
        attn_cp_size=1, mtp_draft_device_pools=(), sidecar_draft_device_pools=(),
    )  # fmt: skip
    config = linker_config(daemon.socket, **{"keep_on_flush": False, "revision": "1", **extra})
    return create_unified_cache_linker(
        SimpleNamespace(model_path=MODEL, tp_size=1), params, backend="dynamic", config=config,
        components=[SimpleNamespace(name=name) for name in components],
    )  # fmt: skip


def transfer(keys: list[str], first: int | None = None) -> list[Any]:
    at = None if first is None else slots(first, len(keys))
    return [PoolTransfer(name=PoolName.KV, keys=keys, device_indices=at)]


def offload(made: Any, keys: list[str], first: int) -> bool:
    assert made.offload(transfer(keys, first))
    while not made.num_completed_offloads():
        pass
    done: bool = made.pop_completed_offload()
    return done


def rows(pool: Any, first: int, count: int) -> list[torch.Tensor]:
    at = slots(first, count)
    return [tensor[at].clone() for tensor in (*pool.k_buffer, *pool.v_buffer)]


def restore(made: Any, keys: list[str], first: int) -> bool:
    """Load as SGLang does around a forward; True if all layers landed."""
    if not made.load("r", transfer(keys, first)):
        return False
    index = made.start_layer_wise_loading()
    made.layer_done_counter.set_consumer(index)
    for layer in range(LAYERS):
        made.layer_done_counter.wait_until(layer)
    landed: bool = made.finish_layer_wise_loading(index)
    return landed


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_linker_restores_after_a_restart_of_both(daemon: Daemon, layerwise: bool) -> None:
    pool = device_pool()
    first = linker(daemon, pool, layerwise=layerwise)
    assert first.lookup("r", transfer(keys_of(5))) == []
    assert first.start_layer_wise_loading() == -1
    assert offload(first, keys_of(5), 1)
    first.close()
    daemon.restart()
    second = linker(daemon, pool, layerwise=layerwise)
    assert second.lookup("r", transfer(keys_of(7))) == [1, 2, 3, 4, 5]
    assert not restore(second, keys_of(7), 8)  # not all of it is there
    before = rows(pool, 1, 5)
    assert restore(second, keys_of(5), 8)
    assert same(rows(pool, 8, 5), before)
    assert second.load("s", transfer(keys_of(5), 8))
    assert second.cancel_queued_load("s")
    assert not second.cancel_queued_load("s")
    second.close()
    with daemon.client() as client:
        assert client.statistics()["leases"]["leases"] == 0


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_changed_byte_is_a_refused_load_or_a_failed_layer(
    daemon: Daemon, layerwise: bool
) -> None:
    pool = device_pool()
    made = linker(daemon, pool, layerwise=layerwise)
    assert offload(made, keys_of(3), 1)
    last = pool.v_buffer[LAYERS - 1][slots(2, 1)].view(torch.uint8).numpy().tobytes()
    image = daemon.directory / "device0.img"
    with image.open("r+b") as file:
        at = file.read().index(last) + 100
        file.seek(at)
        file.write(bytes([last[100] ^ 4]))
    if layerwise:
        assert made.load("r", transfer(keys_of(3), 8))
        index = made.start_layer_wise_loading()
        made.layer_done_counter.set_consumer(index)
        made.layer_done_counter.wait_until(0)
        assert same([pool.k_buffer[0][slots(8, 3)]], [pool.k_buffer[0][slots(1, 3)]])
        assert not made.finish_layer_wise_loading(index)  # SGLang aborts the request
    else:
        assert not made.load("r", transfer(keys_of(3), 8))  # SGLang computes it
    until_a_hole(daemon)
    made.close()


def test_a_linker_without_daemon_misses_and_answers(daemon: Daemon) -> None:
    pool = device_pool()
    made = linker(daemon, pool)
    assert offload(made, keys_of(3), 1)
    daemon.kill()
    assert made.lookup("r", transfer(keys_of(3))) == []
    assert not made.load("r", transfer(keys_of(3), 8))
    assert not offload(made, keys_of(3, 1), 1)
    daemon.start()
    while made.lookup("r", transfer(keys_of(3))) != [1, 2, 3]:
        pass
    made.close()


def test_a_load_in_which_anything_fails_is_computed(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's scheduler ends with what `load` raises."""
    pool = device_pool()
    made = linker(daemon, pool, staging_bytes=3 * 128 << 10)
    assert offload(made, keys_of(2), 1)
    for name in ("read_into", "lookup", "match", "put"):
        owner = Match if name == "read_into" else Space
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, lambda *_, **__: 1 / 0)
            if name == "lookup":
                assert made.lookup("r", transfer(keys_of(2))) == []
            elif name == "put":
                assert not offload(made, keys_of(2, 1), 1)
            else:
                assert not made.load("r", transfer(keys_of(2), 8))
    assert not made.load("r", transfer(keys_of(2)))  # without any place in memory
    assert not made.offload([])
    with daemon.client() as client:
        assert client.statistics()["leases"]["leases"] == 0
    assert restore(made, keys_of(2), 8)  # the memory for staging is free again
    made.close()


def test_what_a_linker_cannot_keep_is_refused_at_the_start(daemon: Daemon) -> None:
    with pytest.raises(InvalidInput, match="full attention"):
        linker(daemon, device_pool(), ("FULL", "MAMBA"))
    with pytest.raises(InvalidInput, match="typing_error"):
        linker(daemon, device_pool(), typing_error=1)


def test_sessions_are_told_of(daemon: Daemon) -> None:
    made = linker(daemon, device_pool())
    assert made.lookup("r", transfer(keys_of(4))) == []
    assert made.offload(transfer(keys_of(4), 1), session_id="chat-1")
    made.reset()  # waits for it
    with daemon.client() as client:
        (info,) = client.models()
        (session,) = iterate_sessions(client, info.id)
    assert (session.blocks, session.ids) == (4, ("chat-1",))
    made.close()

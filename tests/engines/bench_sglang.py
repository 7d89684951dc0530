"""How long a forward waits for the first layer of a load, against the whole of it.

`tests/engines/bench_sglang.py [ROUNDS]`, run by SGLang's own Python with PYTHONPATH=.:tests. The
daemon has an image file below TWFS_TEST_DIR; SGLang's pool is in CPU memory, the linker real, by
layers and staged in turn; nothing but reads in between. Prints JSON.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_context

from support.daemon import running_daemon
from twfs.engines.sglang_linker import TwfsLinker

LAYERS, HEADS, DIM, TOKENS = 32, 8, 128, 64  # of an 8B model: 8 MiB a page of SGLang's
PAGES: Final = 32  # 2,048 tokens, 256 MiB


def linker(pool: Any, socket: Path, *, layerwise: bool) -> Any:
    """A linker on *pool*."""
    params = SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool), page_size=TOKENS,
        attn_tp_cache_group=None, tp_cache_group=None, pp_rank=0, pp_size=1, attn_cp_rank=0,
        attn_cp_size=1, mtp_draft_device_pools=(), sidecar_draft_device_pools=(),
    )  # fmt: skip
    extra = {
        "socket": str(socket), "revision": "1", "timeout_s": 60, "patience_s": 20,
        "staging_bytes": 512 << 20, "layerwise": layerwise,
    }  # fmt: skip
    return TwfsLinker(
        SimpleNamespace(model_path="bench", tp_size=1), params,
        components=[SimpleNamespace(name="FULL")], extra_config=extra,
    )  # fmt: skip


def measure(made: Any, keys: list[str]) -> dict[str, float]:
    """Milliseconds from the load on: until SGLang may count on it, the first layer, the last."""
    at = torch.arange(PAGES * TOKENS, 2 * PAGES * TOKENS)
    begun_s = time.perf_counter()
    assert made.load("r", [PoolTransfer(name=PoolName.KV, keys=keys, device_indices=at)])
    loaded_s = time.perf_counter()
    index = made.start_layer_wise_loading()
    made.layer_done_counter.set_consumer(index)
    made.layer_done_counter.wait_until(0)
    first_s = time.perf_counter()
    assert made.finish_layer_wise_loading(index)
    times = {"promised": loaded_s, "first_layer": first_s, "all_layers": time.perf_counter()}
    return {name: 1000 * (at_s - begun_s) for name, at_s in times.items()}


def main(rounds: int) -> None:
    """Print medians and spreads."""
    found: dict[str, list[dict[str, float]]] = {"staged": [], "layerwise": []}
    with (
        get_context().override_server_args(),
        tempfile.TemporaryDirectory(dir=os.environ.get("TWFS_TEST_DIR")) as directory,
        running_daemon(Path(directory) / "warehouse", device_bytes=1 << 30) as daemon,
    ):
        pool = MHATokenToKVPool(
            2 * PAGES * TOKENS, page_size=TOKENS, dtype=torch.bfloat16, head_num=HEADS,
            head_dim=DIM, layer_num=LAYERS, device="cpu", enable_memory_saver=False,
        )  # fmt: skip
        keys = [f"{index:064x}" for index in range(PAGES)]
        linkers = {
            name: linker(pool, daemon.socket, layerwise=name == "layerwise") for name in found
        }
        first = linkers["staged"]
        slots = torch.arange(PAGES * TOKENS)
        first.offload([PoolTransfer(name=PoolName.KV, keys=keys, device_indices=slots)])
        while not first.num_completed_offloads():
            time.sleep(0.01)
        assert first.pop_completed_offload()
        for _ in range(rounds):
            for name, made in linkers.items():
                found[name].append(measure(made, keys))
        for made in linkers.values():
            made.close()
    report = {
        name: {
            what: {
                "median_ms": round(statistics.median(row[what] for row in rows), 1),
                "min_ms": round(min(row[what] for row in rows), 1),
                "max_ms": round(max(row[what] for row in rows), 1),
            }
            for what in rows[0]
        }
        for name, rows in found.items()
    }
    print(json.dumps({"mib": PAGES * 8, "layers": LAYERS, "rounds": rounds, **report}, indent=2))  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)

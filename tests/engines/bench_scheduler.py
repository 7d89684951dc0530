"""Scheduler-thread time that twfs takes of each of vLLM's steps, with simulated requests.

Run in the engine's environment by `python -m engines.bench_vllm scheduler` (see there).

The real manager, its real answers over the real socket; what is simulated is vLLM around it. Each
step asks for every waiting request as vLLM's scheduler does, lets one begin its load and end the
one before, finishes that, and takes in a new request; with stores, the new blocks of what was
finished are offered and a step later said to be stored, with events. Prints JSON: per block size,
without and with stores, the wall and CPU time of twfs's calls in the scheduler's thread per step,
in milliseconds.
"""

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from twfs.engines.transfers import Offer, Transfers, runs_of
from twfs.engines.vllm import TwfsManager, TwfsSpec, _Request
from twfs.engines.vllm_layout import IDENTITY
from twfs.engines.vllm_orders import RankReport

NEW_TOKENS = 2048  # of each request, behind those that the store holds
CHAINS = 8  # that the requests go on from: agents' sessions
STEP_S = 0.010  # of the engine's own, during which it leaves Python to others
BLOCK_BYTES = 4096


def spec_of(socket: Path, block_tokens: int) -> TwfsSpec:
    """The spec of a model that is not there."""
    return TwfsSpec(
        OffloadingConfig(
            groups=(OffloadingGroupConfig(block_tokens, ("layer",), 0),),
            worker_kv_bytes_per_block=BLOCK_BYTES, enable_kv_cache_events=True,
            extra_config={
                "socket": str(socket), "patience_s": 20.0, "arena_bytes": 128 << 20,
                IDENTITY: {"revision": "bench"},
            },
            engine_id="bench", model=OffloadingModelConfig(f"bench{block_tokens}", "bfloat16"),
            cache=OffloadingCacheConfig(block_tokens, 1),
            parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
        )
    )  # fmt: skip


def hashes_of(seed: int, blocks: int) -> list[bytes]:
    """Block hashes as vLLM's."""
    return [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(blocks)]


def fill(spec: TwfsSpec, manager: TwfsManager, chains: list[list[bytes]]) -> None:
    """Store all chains."""
    manager.finder.admit("fill")
    while (epoch := manager.finder.epoch("fill")) is None:
        time.sleep(0.01)
    attached = spec.attach(arena_bytes=spec.arena_bytes)
    transfers = Transfers(attached)
    payload = bytes(BLOCK_BYTES)
    for number, chain in enumerate(chains):
        for at in range(0, len(chain), 4096):
            indices = range(at, min(at + 4096, len(chain)))
            offer = Offer(runs_of(chain, indices), epoch)
            transfers.store(number * 100 + at // 4096, offer, [payload] * len(indices))
    wanted = sum(map(len, chains))
    while attached.statistics().get("stored blocks", 0) < wanted:
        time.sleep(0.1)
    transfers.close()
    attached.close()


class Simulation:
    """vLLM's scheduler, as far as its connector sees it."""

    def __init__(self, manager: TwfsManager, chains: list[list[bytes]], *, stores: bool) -> None:
        self.manager, self.chains, self.stores = manager, chains, stores
        self.numbers = itertools.count()
        self.waiting: list[tuple[Any, ReqContext]] = []
        self.loading: tuple[Any, ReqContext, int] | None = None
        self.storing: tuple[Any, ReqContext] | None = None
        self.ready = self.stored = 0

    def arrive(self) -> tuple[Any, ReqContext]:
        """A request that goes on from one of the chains."""
        number = next(self.numbers)
        chain = self.chains[number % len(self.chains)]
        new = hashes_of(-1 - number, NEW_TOKENS // self.manager.layout.block_tokens)
        hashes = [*chain, *new]
        context = ReqContext(req_id=f"r{number}")
        keys = [make_offload_key(key, 0) for key in hashes]
        for index, key in enumerate(keys):
            context.set_offload_key_position(key, (index + 1) * self.manager.layout.block_tokens)
        return SimpleNamespace(request_id=f"r{number}", block_hashes=hashes, keys=keys), context

    def step(self, fresh: tuple[Any, ReqContext] | None) -> None:
        """All that twfs does in one step."""
        manager = self.manager
        if fresh is not None:
            manager.requests[fresh[0].request_id] = _Request(fresh[0].block_hashes)
            manager.on_new_request(fresh[1])
            self.waiting.append(fresh)
        chosen = None
        for request, context in self.waiting:
            if manager.ready(request, 0):
                known = manager.requests[request.request_id]
                if chosen is None and known.blocks:
                    chosen = (request, context, known.blocks)
        if self.storing is not None:
            output, context = self.storing
            manager.complete_store(output.keys_to_store, context)
            held = len(output.keys_to_store)
            manager.stored(RankReport(stored={output.store_spec.number: [held]}))
            self.stored += sum(len(event.keys) for event in manager.take_events())
            manager.take_told()
            self.storing = None
        if self.loading is not None:
            request, context, blocks = self.loading
            manager.complete_load([], context)
            if self.stores:
                self.storing = (manager.prepare_store(request.keys[blocks:], context), context)
            manager.on_request_finished(context)
            self.loading = None
        if chosen is not None:
            request, context, blocks = chosen
            self.ready += 1
            manager.prepare_load(request.keys[:blocks], context)
            self.loading = (request, context, blocks)
            self.waiting.remove((request, context))


def measure(
    socket: Path, block_tokens: int, tokens: int, waiting: int, steps: int, *, stores: bool
) -> Any:
    """Run the simulation; milliseconds of twfs per step."""
    spec = spec_of(socket, block_tokens)
    manager = TwfsManager(spec)
    manager.breakeven.tokens_min = 0
    chains = [hashes_of(seed, tokens // block_tokens) for seed in range(CHAINS)]
    fill(spec, manager, chains)
    simulation = Simulation(manager, chains, stores=stores)
    wall, cpu = [], []
    for _ in range(waiting + steps):
        full = len(simulation.waiting) >= waiting
        fresh = None if full else simulation.arrive()
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        simulation.step(fresh)
        wall.append(1000 * (time.perf_counter() - wall_s))
        cpu.append(1000 * (time.thread_time() - cpu_s))
        time.sleep(STEP_S)
    loads, stored = simulation.ready, simulation.stored
    manager.shutdown()
    return {
        "block_tokens": block_tokens, "keys": tokens // block_tokens, "waiting": waiting,
        "steps": len(wall), "loads": loads, "stored": stored if stores else None,
        **{
            name: {
                "median": round(statistics.median(times), 3),
                "p99": round(sorted(times)[int(len(times) * 0.99)], 3),
                "most": round(max(times), 3),
            }
            for name, times in (("wall_ms", wall), ("cpu_ms", cpu))
        },
    }  # fmt: skip


def main() -> None:
    """Measure at 16 and 256 tokens per block."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket", type=Path)
    parser.add_argument("--tokens", type=int, default=122_880)
    parser.add_argument("--waiting", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    for block_tokens, stores in itertools.product((256, 16), (False, True)):
        found = measure(
            given.socket, block_tokens, given.tokens, given.waiting, given.steps, stores=stores
        )
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

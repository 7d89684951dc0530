"""Scheduler-thread time that twfs takes of each of vLLM's steps, with simulated requests.

Run in the engine's environment by `python -m engines.bench_vllm scheduler` (see there).

The real manager, its real answers over the real socket; what is simulated is vLLM around it. Each
step asks for every waiting request as vLLM's scheduler does, lets one of them begin, and takes in a
new one; a load takes a step, a prompt's rest 8,192 tokens a step, an answer 32 steps. With
stores, what was computed is offered step by step and a step later said to be stored, with events;
so is all of each sixteenth request, which the engine holds itself and nobody has stored. That is
9,728 new tokens a step, more than such an engine computes. Prints JSON: per block size, without and
with stores, the wall and CPU time of twfs's calls in the scheduler's thread per step, in
milliseconds. The wall time also of those steps in which the kernel did not give the thread's
processor to another process: on a machine of few cores that takes longer than all that twfs does.
The CPU time with and without what Python's garbage collector took: it
looks at all young lists, of which an engine's own of each waiting request are the longest.
"""

import argparse
import gc
import hashlib
import itertools
import json
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_THREAD, getrusage
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
from twfs.engines.vllm import TwfsManager, TwfsSpec
from twfs.engines.vllm_layout import IDENTITY
from twfs.engines.vllm_orders import RankReport
from twfs.engines.vllm_requests import Request

NEW_TOKENS = 2048  # of each request, behind those that the store holds
PREFILL_TOKENS = 8192  # that a step computes of a request
ANSWER_TOKENS = 32
HELD_ONE_IN = 16  # requests
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


@dataclass(eq=False)
class Simulated:
    """A request, as far as vLLM's scheduler knows it."""

    request_id: str
    keys: list[Any]
    hashes: list[bytes]
    context: ReqContext
    held: int  # blocks that the engine holds itself
    computed: int = 0  # blocks
    offered: int = 0  # of these
    answered: int = 0  # tokens


class Clock:
    """Milliseconds of this thread within its blocks, on the wall and of a processor."""

    collected_ms = 0.0  # since the start

    def __init__(self) -> None:
        self.wall_ms = self.cpu_ms = self.collector_ms = 0.0
        self.preempted = 0  # times: the kernel gave its processor to another

    def __enter__(self) -> None:
        self._preempted = getrusage(RUSAGE_THREAD).ru_nivcsw
        self._collector_ms = Clock.collected_ms
        self._wall_s, self._cpu_s = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.cpu_ms += 1000 * (time.thread_time() - self._cpu_s)
        self.wall_ms += 1000 * (time.perf_counter() - self._wall_s)
        self.collector_ms += Clock.collected_ms - self._collector_ms
        self.preempted += getrusage(RUSAGE_THREAD).ru_nivcsw - self._preempted

    @classmethod
    def collecting(cls, phase: str, _: object) -> None:
        """Take the time of Python's garbage collector, if it runs on this thread."""
        if threading.current_thread() is threading.main_thread():
            sign = -1 if phase == "start" else 1
            cls.collected_ms += sign * 1000 * time.thread_time()


class Simulation:
    """vLLM's scheduler, as far as its connector sees it."""

    def __init__(self, manager: TwfsManager, chains: list[list[bytes]], *, stores: bool) -> None:
        self.manager, self.chains, self.stores = manager, chains, stores
        self.block_tokens = manager.layout.block_tokens
        self.numbers = itertools.count()
        self.waiting: list[Simulated] = []
        self.loading: Simulated | None = None
        self.running: list[Simulated] = []
        self.storing: list[tuple[Any, ReqContext]] = []
        self.loads = self.offers = self.stored = self.asks = 0

    def arrive(self) -> Simulated:
        """A request that goes on from one of the chains; with stores some from another.

        That one the engine holds itself, and nobody has offered it.
        """
        number = next(self.numbers)
        chain, held = self.chains[number % len(self.chains)], 0
        if self.stores and number % HELD_ONE_IN == HELD_ONE_IN - 1:
            chain, held = hashes_of(-1_000_000 - number, len(chain)), len(chain)
        hashes = [*chain, *hashes_of(-1 - number, NEW_TOKENS // self.block_tokens)]
        context = ReqContext(req_id=f"r{number}")
        keys = [make_offload_key(key, 0) for key in hashes]
        for index, key in enumerate(keys):
            context.set_offload_key_position(key, (index + 1) * self.block_tokens)
        return Simulated(f"r{number}", keys, hashes, context, held)

    def step(self, fresh: Simulated | None, clock: Clock, *, full: bool) -> Any:
        """All that twfs does in one step, on the *clock*; what the engine lets go of is returned.

        As vLLM: it schedules, offers what was computed, and takes what workers report. Unless
        *full*, none of those that wait begins.
        """
        manager, loaded = self.manager, self.loading
        told = [(output, set(output.keys_to_store), context) for output, context in self.storing]
        with clock:
            if fresh is not None:
                manager.requests[fresh.request_id] = Request(fresh.hashes)
                manager.on_new_request(fresh.context)
                self.waiting.append(fresh)
            chosen = self._schedule(full=full)
            manager.on_schedule_end(None)
        ended = [one for one in self.running if one.answered == ANSWER_TOKENS]
        self.storing = []
        for one in self.running if self.stores else ():
            self._offer(one, clock)
        with clock:
            for one in ended:
                manager.on_request_finished(one.context)
            if loaded is not None:
                manager.complete_load([], loaded.context)
            for output, keys, context in told:
                manager.complete_store(keys, context)
                manager.stored(RankReport(stored={output.store_spec.number: [len(keys)]}))
            self.stored += sum(len(event.keys) for event in manager.take_events())
            manager.take_told()
        self.running = [one for one in self.running if one not in ended]
        self._compute(chosen)
        return ended, told

    def _schedule(self, *, full: bool) -> Simulated | None:
        """Ask for all that wait; the first that is ready begins."""
        manager, chosen = self.manager, None
        self.asks += len(self.waiting)
        for one in self.waiting:
            ready = manager.ready(one, one.held * self.block_tokens)
            if ready and full and chosen is None:
                chosen = one
        if chosen is not None:
            self.waiting.remove(chosen)
            chosen.computed = found = manager.requests[chosen.request_id].blocks or 0
            if found > chosen.held:
                chosen.offered = found
                manager.prepare_load(chosen.keys[:found], chosen.context)
        return chosen

    def _offer(self, one: Simulated, clock: Clock) -> None:
        """As _Scheduler bounds it."""
        ends, stop = one.answered == ANSWER_TOKENS, one.computed
        if not ends:
            with clock:
                for _ in range(2):  # vLLM asks twice
                    stop = self.manager.offers.bound(one.offered, stop)
        keys, one.offered = one.keys[one.offered : stop], stop
        if keys:
            with clock:
                output = self.manager.prepare_store(keys, one.context)
            if output.keys_to_store:
                self.offers += 1
                self.storing.append((output, one.context))

    def _compute(self, chosen: Simulated | None) -> None:
        """What the engine does of all that run: a load takes a step, a prompt one or more."""
        for one in self.running:
            if one.computed < len(one.keys):
                more = PREFILL_TOKENS // self.block_tokens
                one.computed = min(len(one.keys), one.computed + more)
            else:
                one.answered += 1
        if self.loading is not None:
            self.running.append(self.loading)
        self.loading = None
        if chosen is not None and chosen.computed > chosen.held:
            self.loading = chosen
            self.loads += 1
        elif chosen is not None:
            self.running.append(chosen)


def measure(
    socket: Path, block_tokens: int, tokens: int, waiting: int, steps: int, *, stores: bool
) -> Any:
    """Run the simulation; milliseconds of twfs per step."""
    spec = spec_of(socket, block_tokens)
    manager = TwfsManager(spec)
    manager.breakeven.tokens_min = 0
    chains = [hashes_of(seed, tokens // block_tokens) for seed in range(CHAINS)]
    fill(spec, manager, chains)
    gc.freeze()  # as vLLM does before it begins
    simulation = Simulation(manager, chains, stores=stores)
    gc.callbacks.append(Clock.collecting)
    # Of numbers, which are not for the collector.
    wall_ms, alone_ms, cpu_ms, own_ms = [], [], [], []
    for _ in range(waiting + steps):
        fresh = simulation.arrive() if len(simulation.waiting) < waiting else None
        clock, full = Clock(), len(simulation.waiting) + (fresh is not None) >= waiting
        over = simulation.step(fresh, clock, full=full)
        wall_ms.append(clock.wall_ms)
        if not clock.preempted:
            alone_ms.append(clock.wall_ms)
        cpu_ms.append(clock.cpu_ms)
        own_ms.append(clock.cpu_ms - clock.collector_ms)
        del over, fresh
        time.sleep(STEP_S)
    gc.callbacks.remove(Clock.collecting)
    manager.shutdown()
    return {
        "block_tokens": block_tokens, "keys": tokens // block_tokens, "waiting": waiting,
        "steps": len(wall_ms), "steps_preempted": len(wall_ms) - len(alone_ms),
        "asks": simulation.asks, "loads": simulation.loads,
        "offers": simulation.offers if stores else None,
        "stored": simulation.stored if stores else None,
        **{
            name: {
                "median": round(statistics.median(times), 3),
                "p99": round(sorted(times)[int(len(times) * 0.99)], 3),
                "most": round(max(times), 3),
            }
            for name, times in (
                ("wall_ms", wall_ms), ("wall_not_preempted_ms", alone_ms), ("cpu_ms", cpu_ms),
                ("cpu_without_collector_ms", own_ms),
            )
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

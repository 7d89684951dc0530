"""vLLM on twfs against vLLM without: time to first token, and agents' sessions through the server.

    export TWFS_ENGINES=... TWFS_ENGINES_REQUIRED="vllm lmcache" PYTHONPATH=tests
    python -m engines.bench_vllm ttft [--rounds 7] [--lengths 2000,4000,8000] [--lmcache]
    python -m engines.bench_vllm tiers [--rounds 30] [--lengths 2000,4000,8000]
    python -m engines.bench_vllm even [--rounds 15] [--lengths 70,135,200]
    python -m engines.bench_vllm agents
    python -m engines.bench_vllm scheduler [--rounds STEPS]

For a quiet machine, as root (the page cache is dropped before each warm answer). Prints JSON.

*ttft*: engines side by side, all but one paused, in interleaved rounds: the direct connector,
vLLM's CPU tier with twfs or vLLM's own `fs` tier below, none; with `--lmcache` the CPU tier with
twfs below, and vLLM on LMCache with twfs or its own `fs_native` with O_DIRECT below. Each round
answers a prompt of each length that nobody has seen (cold), then one that is held (warm); before
each the engine's own KV and the memory tier are emptied. Below the CPU tier both are of one engine
(support.vllmtier.EitherTier): two processes of the same code differ by 1 to 4 ms from start to
start. *tiers*: only these two, and only warm. *even*: the direct connector, with blocks as small as
the engine's own, and none: from how many tokens on a load is worth it.
*agents*: sessions of several turns at once, whose KV is more than three times the engine's; with
and without, turn about, and what loads and stores cost each. *scheduler*: bench_scheduler.py, with
a daemon.
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from support.daemon import Daemon, running_daemon
from support.engines import engine_environment, engine_python
from support.lmcaches import LMCacheServer
from support.vllmengine import prompt_of
from support.vllms import (
    GPU_BLOCK_TOKENS,
    STORED_TOKENS,
    Vllm,
    random_model,
    transfer_config,
    vllm_server,
)

LENGTHS: Final = "2000,4000,8000"
LAYERS: Final = 12
HIDDEN: Final = 512
THREADS: Final = 4  # readers of either tier
TIER_BYTES: Final = 120 << 20  # of the CPU tier: a prompt of 8,000 tokens has 96 MiB
PORT: Final = 18742
SESSIONS: Final = 8
TURNS: Final = 4
FIRST_TOKENS: Final = 1500
TURN_TOKENS: Final = 500
ANSWER_TOKENS: Final = 32
PATIENCE_S: Final = 60.0  # for what an engine does soon
CALM_STEPS: Final = 5  # without anything stored: all is
# In processes of its own, as LLM and the server have it: within the one that asks, an engine that
# has nothing to compute takes Python from all other threads, those that load too. One thread
# computes: two that wait for each other, beside a scheduler that waits at work, take now 60 and now
# 280 ms for the same few tokens on two processors.
AS_SERVED: Final = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
KV_TOKENS: Final = 8192  # of the engine's own; all sessions have 8 x 3,100


def tier_config(daemon: Daemon, **tiers: dict[str, Any]) -> dict[str, Any]:
    """The CPU tier with *tiers* below it, of which each request names one."""
    either = {"type": "EitherTier", "module_path": "support.vllmtier", "tiers": tiers}
    config = transfer_config(daemon.socket)
    config["kv_connector"] = "TwfsTierConnector"
    config["kv_connector_module_path"] = "twfs.engines.vllm_tier"
    config["kv_connector_extra_config"] = {
        "block_size": STORED_TOKENS, "offload_prompt_only": False, "cpu_bytes_to_use": TIER_BYTES,
        "spec_name": "CpuTieringSpec", "spec_module_path": "support.vllmtier",
        "secondary_tiers": [either],
    }  # fmt: skip
    return config


def drop_caches() -> None:
    """Let nothing come from the page cache."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")


@dataclass
class Contender:
    """An engine, and what its requests say; *stored* grows while it stores.

    *clear* empties all memory above the store but for the engine's own, if there is any.
    """

    vllm: Vllm
    stored: Callable[[], int] = lambda: 0
    clear: Callable[[], None] | None = None
    params: dict[str, str] = field(default_factory=dict)

    def generate(self, seed: int, length: int) -> dict[str, Any]:
        """Answer a prompt with one token."""
        return self.vllm.generate({"seed": seed, "tokens": length}, out=1, params=self.params)

    def settle(self) -> None:
        """Wait until no more is stored; the engine steps while it answers."""
        before, calm = self.stored(), 0
        late_s = time.monotonic() + PATIENCE_S
        while calm < CALM_STEPS:
            assert time.monotonic() < late_s, "it stores on and on"
            self.generate(999, 20)
            time.sleep(0.1)
            now = self.stored()
            calm = calm + 1 if now == before else 0
            before = now

    def forget(self) -> None:
        """Empty all memory above the store, once nobody uses a block of it."""
        late_s = time.monotonic() + PATIENCE_S
        while not self.vllm.ask(do="reset"):
            assert time.monotonic() < late_s, "some block is in use all the time"
            self.generate(999, 20)
            time.sleep(0.1)
        if self.clear is not None:
            self.clear()


def published(daemon: Daemon) -> int:
    """Blocks that the daemon has published."""
    with daemon.client(arena_bytes=0) as client:
        count: int = client._daemon_statistics()["counters"]["published_blocks"]
        return count


def files_in(folder: Path) -> int:
    """Bytes and files there are."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            found += 1 + path.stat().st_size
    return found


Contenders = dict[str, Contender]


class Engines:
    """Starts the engines that are compared; all are paused but for the one that is at work."""

    def __init__(self, stack: ExitStack, model: Path, folder: Path) -> None:
        self._stack, self._model, self._folder = stack, model, folder
        self._engines: list[Vllm] = []
        self._daemon = stack.enter_context(
            running_daemon(folder / "w", device_bytes=16 << 30, arena_bytes=2 << 30)
        )

    def _engine(self, config: dict[str, Any] | None, name: str = "vllm", **more: Any) -> Vllm:
        options: dict[str, Any] = {
            "max_model_len": 8448, "max_num_batched_tokens": 8448, "environment": AS_SERVED, **more,
        }  # fmt: skip
        made = self._stack.enter_context(Vllm(name, self._model, config, **options))
        self._stack.callback(made.resume)  # or it could not end
        made.pause()
        return made

    def _published(self) -> int:
        return published(self._daemon)

    def tiers(self) -> Contenders:
        """Below vLLM's CPU tier twfs and vLLM's own."""
        files = self._folder / "fs"
        twfs = {
            "type": "TwfsTier", "module_path": "twfs.engines.vllm_tier",
            "socket": str(self._daemon.socket), "patience_s": 5.0,
        }  # fmt: skip
        own = {
            "type": "fs", "root_dir": str(files), "n_read_threads": THREADS,
            "n_write_threads": THREADS,
        }  # fmt: skip
        vllm = self._engine(tier_config(self._daemon, twfs=twfs, fs=own))
        clear = partial(vllm.ask, do="reset", connector=True)
        return {
            "twfs tier": Contender(vllm, self._published, clear, {"tier": "twfs"}),
            "fs tier": Contender(vllm, lambda: files_in(files), clear, {"tier": "fs"}),
        }

    def alone(self, stored_tokens: int = STORED_TOKENS) -> Contenders:
        """The direct connector, and none."""
        direct = transfer_config(
            self._daemon.socket, arena_bytes=128 << 20, load_deadline_s=None,
            block_size=stored_tokens,
        )  # fmt: skip
        return {
            "direct": Contender(self._engine(direct), self._published),
            "none": Contender(self._engine(None)),
        }

    def lmcache(self) -> Contenders:
        """LMCache with twfs and with its own below."""
        native = self._folder / "native"
        native.mkdir()
        own = {"type": "fs_native", "base_path": str(native), "use_odirect": True}
        return {
            "lmcache twfs": self._lmcache(None, self._published),
            "lmcache fs_native": self._lmcache(own, lambda: files_in(native)),
        }

    def _lmcache(self, l2: dict[str, Any] | None, stored: Callable[[], int]) -> Contender:
        below = LMCacheServer(self._daemon.socket, l2, l1_gb=1.0, revisions={str(self._model): "1"})
        self._stack.enter_context(below)
        # LMCache keeps a block of the engine in use, which then cannot forget: it caches nothing.
        vllm = self._engine(below.transfer, "lmcache", enable_prefix_caching=False)
        return Contender(vllm, stored, below.clear)


def answer(engine: Contender, seed: int, length: int) -> dict[str, Any]:
    """One token behind a prompt that is in no memory, and all stored that comes of it."""
    engine.vllm.resume()
    engine.forget()
    drop_caches()
    answered = engine.generate(seed, length)
    engine.settle()
    engine.vllm.pause()
    return answered


def ttft(
    engines: Contenders, lengths: Sequence[int], rounds: int, *, cold: bool = True
) -> dict[str, Any]:
    """Seconds to the first token by engine, length and temperature."""
    for each in engines.values():
        for seed, length in enumerate(lengths):
            answer(each, seed, length)
    seconds: dict[tuple[str, int, str], list[float]] = {}
    held: dict[tuple[str, int], list[int]] = {}
    for number in range(rounds):
        sys.stderr.write(f"round {number + 1} of {rounds}, {time.strftime('%T')}\n")
        first = number % len(engines)  # nobody is always the one behind the same other
        order = [*list(engines.items())[first:], *list(engines.items())[:first]]
        for seed, length in enumerate(lengths):
            for name, each in order:
                if cold:
                    new = answer(each, 1000 + 10 * number + seed, length)
                    seconds.setdefault((name, length, "cold"), []).append(new["seconds"])
        for seed, length in enumerate(lengths):
            for name, each in order:
                warm = answer(each, seed, length)
                seconds.setdefault((name, length, "warm"), []).append(warm["seconds"])
                held.setdefault((name, length), []).extend(warm["cached"])
    return {
        "rounds": rounds, "layers": LAYERS, "hidden": HIDDEN,
        "held": {f"{name} {length}": min(found) for (name, length), found in held.items()},
        "seconds": {
            f"{name} {length} {kind}": spread(found)
            for (name, length, kind), found in sorted(seconds.items())
        },
    }  # fmt: skip


def spread(found: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(found), 4), "least": round(min(found), 4),
        "most": round(max(found), 4),
    }  # fmt: skip


def server(model: Path, config: dict[str, Any] | None) -> AbstractContextManager[None]:
    """VLLM's OpenAI server with little KV of its own."""
    extra = [] if config is None else ["--kv-transfer-config", json.dumps(config)]
    options = (
        "--disable-hybrid-kv-cache-manager", "--max-num-batched-tokens", "512",
        "--num-gpu-blocks-override", str(KV_TOKENS // GPU_BLOCK_TOKENS), *extra,
    )  # fmt: skip
    return vllm_server("vllm", model, "m", PORT, options)


class Sessions:
    """All sessions of one run, and what they saw."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.first: list[float] = []
        self.between: list[float] = []
        self.tokens = 0
        self._lock = threading.Lock()

    def run(self) -> float:
        """Run all at once; seconds."""
        begun_s = time.perf_counter()
        threads = [threading.Thread(target=self._session, args=(i,)) for i in range(SESSIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begun_s

    def _session(self, number: int) -> None:
        ids = prompt_of(self.seed + number, FIRST_TOKENS)
        for turn in range(TURNS):
            ids += self._turn(ids)
            ids += prompt_of(5000 + self.seed + 10 * number + turn, TURN_TOKENS)

    def _turn(self, ids: list[int]) -> list[int]:
        body = {
            "model": "m", "prompt": ids, "max_tokens": ANSWER_TOKENS, "temperature": 0,
            "stream": True, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        answer: list[int] = []
        last_s = begun_s = time.perf_counter()
        with urllib.request.urlopen(request) as stream:
            for line in stream:
                if not line.startswith(b"data: {"):
                    continue
                now_s = time.perf_counter()
                with self._lock:
                    if last_s == begun_s:
                        self.first.append(now_s - begun_s)
                    else:
                        self.between.append(now_s - last_s)
                    self.tokens += 1
                last_s = now_s
                answer += json.loads(line[6:])["choices"][0].get("token_ids") or []
        return answer


def agents(model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Throughput and latency without the connector and with it, turn about.

    And what each half of it costs: *stores* without loads, and *loads* of what the run before has
    stored all of.
    """
    found: dict[str, list[dict[str, float]]] = {}
    with running_daemon(folder / "w", device_bytes=8 << 30, arena_bytes=1 << 30) as daemon:
        usual = transfer_config(
            daemon.socket, arena_bytes=128 << 20, load_deadline_s=None, min_load_tokens=None
        )
        never = transfer_config(
            daemon.socket, arena_bytes=128 << 20, load_deadline_s=None, min_load_tokens=1 << 30
        )
        for number in range(rounds):
            seed = 100 * (number + 1)
            for name, config, first_seed in (
                ("none", None, seed), ("twfs", usual, seed), ("loads", usual, seed),
                ("stores", never, 50 * 100 + seed),
            ):  # fmt: skip
                with server(model, config):
                    sessions = Sessions(first_seed)
                    seconds = sessions.run()
                first, between = sorted(sessions.first), sorted(sessions.between)
                found.setdefault(name, []).append(
                    {
                        "output_tokens_per_s": sessions.tokens / seconds,
                        "ttft_p50_s": statistics.median(first),
                        "ttft_p99_s": first[int(0.99 * len(first))],
                        "itl_p50_s": statistics.median(between),
                        "itl_p99_s": between[int(0.99 * len(between))],
                    }
                )
    return {
        "sessions": SESSIONS, "turns": TURNS, "kv_tokens": KV_TOKENS, "rounds": rounds,
        **{
            name: {key: spread([run[key] for run in runs]) for key in runs[0]}
            for name, runs in found.items()
        },
    }  # fmt: skip


def scheduler(folder: Path, steps: int) -> list[Any]:
    """What bench_scheduler.py finds in the engine's environment."""
    with running_daemon(folder / "w", device_bytes=2 << 30) as daemon:
        done = subprocess.run(
            [engine_python("vllm"), Path(__file__).with_name("bench_scheduler.py"), daemon.socket,
             "--steps", str(steps)],
            check=True, env=engine_environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Measure one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["ttft", "tiers", "even", "agents", "scheduler"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--lengths", help="of prompts, in tokens, with commas")
    parser.add_argument("--lmcache", action="store_true", help="with ttft: LMCache's instead")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or engines would stay, paused
    folder = Path(tempfile.mkdtemp(prefix="twfs-bench-", dir=given.folder))
    try:
        if given.what == "scheduler":
            result: Any = scheduler(folder, given.rounds or 1000)
        else:
            model = random_model("vllm", folder / "model", 0, LAYERS, HIDDEN)
            if given.what == "agents":
                result = agents(model, folder, given.rounds or 3)
            else:
                usual, rounds = {"even": ("70,135,200", 15), "tiers": (LENGTHS, 30)}.get(
                    given.what, (LENGTHS, 7)
                )
                lengths = [int(length) for length in (given.lengths or usual).split(",")]
                with ExitStack() as stack:
                    start = Engines(stack, model, folder)
                    if given.what == "even":
                        engines = start.alone(GPU_BLOCK_TOKENS)
                    else:
                        engines = start.tiers()
                    if given.what == "ttft":
                        engines |= start.lmcache() if given.lmcache else start.alone()
                    cold = given.what != "tiers"
                    result = ttft(engines, lengths, given.rounds or rounds, cold=cold)
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

"""Drives vLLM processes (support.vllmengine) and makes the random models that they serve."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from support.asking import LOG, Generating
from support.daemon import Daemon
from support.engines import engine_environment, engine_python
from twfs.store import SessionInfo

GPU_BLOCK_TOKENS: Final = 64  # of the engine's own blocks; CPU attention wants multiples of 32
STORED_TOKENS: Final = 256  # of a block in the store
DEVICE_BYTES: Final = 256 << 20  # room for all that a test stores
ENVIRONMENT: Final = {
    "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


def random_model(engine: str, directory: Path, seed: int = 0, *more: int) -> Path:
    """Make a model in *directory*; see support.randommodel."""
    with Path(LOG).open("ab") as log:
        subprocess.run(
            [engine_python(engine), "-m", "support.randommodel", directory, str(seed),
             *map(str, more)],
            check=True, env=engine_environment(), stdout=log, stderr=log,
        )  # fmt: skip
    return directory


def transfer_config(socket: Path, **extra: Any) -> dict[str, Any]:
    """The connector's configuration as in docs/vllm.md, for a small model and a busy machine."""
    return {
        "kv_connector": "TwfsConnector",
        "kv_connector_module_path": "twfs.engines.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "socket": str(socket), "block_size": STORED_TOKENS, "patience_s": 20.0,
            "arena_bytes": 32 << 20, "min_load_tokens": 0,
            "load_deadline_s": 20.0, **extra,
        },
    }  # fmt: skip


def tier_config(socket: Path) -> dict[str, Any]:
    """As that, with vLLM's CPU tier; the worker of the CPU platform is support.vllmtier's."""
    tier = {
        "type": "TwfsTier", "module_path": "twfs.engines.vllm_tier", "socket": str(socket),
        "patience_s": 20.0,
    }  # fmt: skip
    return transfer_config(socket) | {
        "kv_connector": "TwfsTierConnector",
        "kv_connector_module_path": "twfs.engines.vllm_tier",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec", "spec_module_path": "support.vllmtier",
            "cpu_bytes_to_use": 64 << 20, "block_size": STORED_TOKENS, "secondary_tiers": [tier],
        },
    }  # fmt: skip


def sessions_of(daemon: Daemon) -> list[SessionInfo]:
    """All sessions of all models, as `twfs ls` lists them."""
    with daemon.client(arena_bytes=0) as client:
        return [each for info in client.models() for each in client.sessions(info.id)]


class Vllm(Generating):
    """One engine process; also a context manager."""

    def __init__(
        self, engine: str, model: Path, transfer: dict[str, Any] | None = None, *,
        wrapper: Sequence[str] = (), environment: dict[str, str] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        given = {
            "model": str(model), "dtype": "bfloat16", "max_model_len": 8192, "enforce_eager": True,
            "block_size": GPU_BLOCK_TOKENS, "max_num_batched_tokens": 8192,
            "disable_hybrid_kv_cache_manager": True, "disable_log_stats": False,
            "kv_transfer_config": transfer, **options,
        }  # fmt: skip
        super().__init__(
            [*wrapper, engine_python(engine), "-m", "support.vllmengine", json.dumps(given)],
            **ENVIRONMENT | (environment or {}),
        )

    def pause(self) -> None:
        """Stop all processes of the engine: an idle one looks for work for seconds."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        os.killpg(self.process.pid, signal.SIGCONT)


@contextmanager
def vllm_server(
    engine: str, model: Path, name: str, port: int, options: Sequence[str]
) -> Iterator[None]:
    """VLLM's OpenAI server with *model* as *name*, once it answers."""
    with Path(LOG).open("ab") as log:
        process = subprocess.Popen(
            [engine_python(engine), "-m", "vllm.entrypoints.openai.api_server", "--model", model,
             "--served-model-name", name, "--port", str(port), "--host", "127.0.0.1",
             "--dtype", "bfloat16", "--max-model-len", "4096", "--enforce-eager",
             "--block-size", str(GPU_BLOCK_TOKENS), *options],
            env=engine_environment(VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1",
                                   VLLM_CPU_OMP_THREADS_BIND="nobind"),
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            while process.poll() is None:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except OSError:
                    time.sleep(0.5)
            assert process.poll() is None, "the server has ended"
            yield
        finally:
            process.terminate()
            process.wait()

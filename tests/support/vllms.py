"""Drives vLLM processes (support.vllmengine) and makes the random models that they serve."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

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
LOG: Final = os.environ.get("TWFS_ENGINE_LOG", os.devnull)  # where the engines' own output goes


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


def sessions_of(daemon: Daemon) -> list[SessionInfo]:
    """All sessions of all models, as `twfs ls` lists them."""
    with daemon.client(arena_bytes=0) as client:
        return [each for info in client.models() for each in client.sessions(info.id)]


class Vllm:
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
        self._log = Path(LOG).open("ab")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            [*wrapper, engine_python(engine), "-m", "support.vllmengine", json.dumps(given)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=engine_environment(**ENVIRONMENT | (environment or {})), start_new_session=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def ask(self, **request: Any) -> Any:
        """Send a request and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine has ended: TWFS_ENGINE_LOG=file {' '.join(sys.argv[:1])} says why"
        return json.loads(line)

    def generate(self, *prompts: dict[str, Any], out: int = 4, **more: Any) -> dict[str, Any]:
        """Answer *prompts* (see support.vllmengine) in one batch."""
        answer: dict[str, Any] = self.ask(do="generate", prompts=prompts, out=out, **more)
        return answer

    def pause(self) -> None:
        """Stop all processes of the engine: an idle one looks for work for seconds."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the process and wait for its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

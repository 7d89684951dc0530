"""Drives real `lmcache server` processes whose L2 is a warehouse, and says what vLLM is told."""

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any, Final, Self

from support.engines import engine_environment, engine_python, free_port, until
from support.vllms import LOG

L1_GB: Final = 0.25


def adapter_spec(socket: Path, **params: Any) -> dict[str, Any]:
    """What `--l2-adapter` is given, as in docs/lmcache.md; patient on a busy machine."""
    return {
        "type": "plugin", "module_path": "twfs.engines.lmcache", "class_name": "TwfsL2Adapter",
        "adapter_params": {"socket": str(socket), "timeout_s": 20.0, "patience_s": 20.0, **params},
    }  # fmt: skip


class LMCacheServer:
    """One server process; also a context manager."""

    def __init__(self, socket: Path, *, l1_gb: float = L1_GB, **params: Any) -> None:
        self.port, self._http = free_port(), free_port()
        self._log = Path(LOG).open("ab")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            [
                engine_python("lmcache"), "-m", "lmcache.cli.main", "server", "--host", "localhost",
                "--port", str(self.port), "--http-port", str(self._http), "--l1-size-gb",
                str(l1_gb), "--no-l1-use-lazy", "--eviction-policy", "LRU", "--chunk-size", "256",
                "--disable-observability", "--supported-transfer-mode", "auto", "--l2-adapter",
                json.dumps(adapter_spec(socket, **params)),
            ],
            stdout=self._log, stderr=self._log,
            env=engine_environment(LMCACHE_TRACK_USAGE="false", DO_NOT_TRACK="1"),
        )  # fmt: skip
        until(self._is_up, "the server is healthy")

    def _is_up(self) -> bool:
        assert self.process.poll() is None, (
            f"the server has ended: TWFS_ENGINE_LOG says why ({LOG})"
        )
        try:
            return bool(self.ask("GET", "/healthcheck"))
        except OSError:
            return False

    @property
    def transfer(self) -> dict[str, Any]:
        """What vLLM's --kv-transfer-config is given."""
        return {
            "kv_connector": "LMCacheMPConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": self.port,
            },
        }  # fmt: skip

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request to its HTTP side, and the JSON that answers it. OSError."""
        request = urllib.request.Request(
            f"http://localhost:{self._http}{path}", method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def clear(self) -> None:
        """Empty its memory, so that the next lookup is answered by L2."""
        self.ask("POST", "/cache/clear", {"tier": "l1", "force": False})

    def close(self) -> None:
        """End the process and wait for its end."""
        self.process.terminate()
        self.process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

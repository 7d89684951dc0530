"""LMCache's own `fs` and `fs_native` L2, unmodified, with O_DIRECT below /files: restart hits."""

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from support.engines import engine_environment, engine_python
from support.filing import free_port
from support.mounting import mounted
from support.vllms import LOG, Vllm, random_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.fuse, pytest.mark.root,
              pytest.mark.timeout(900)]  # fmt: skip

TOKENS: Final = 2000
UNIT: Final = 256  # tokens of one of LMCache's own blocks
BLOCKS: Final = TOKENS // UNIT


@contextmanager
def served(adapter: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`lmcache server` with that L2; what vLLM's --kv-transfer-config is given."""
    port, http = free_port(), free_port()
    command = [
        str(engine_python("lmcache")), "-m", "lmcache.cli.main", "server", "--host", "localhost",
        "--port", str(port), "--http-port", str(http), "--l1-size-gb", "0.25",
        "--no-l1-use-lazy", "--eviction-policy", "LRU", "--chunk-size", str(UNIT),
        "--disable-observability", "--supported-transfer-mode", "auto", "--l2-adapter",
        json.dumps(adapter),
    ]  # fmt: skip
    environment = engine_environment(LMCACHE_TRACK_USAGE="false", DO_NOT_TRACK="1")
    with Path(LOG).open("ab") as log, subprocess.Popen(
        command, stdout=log, stderr=log, env=environment
    ) as server:  # fmt: skip
        try:
            while not is_healthy(http):
                assert server.poll() is None, f"the server has ended; see {LOG}"
                time.sleep(0.2)
            yield {
                "kv_connector": "LMCacheMPConnector", "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": port,
                },
            }  # fmt: skip
        finally:
            server.terminate()


def is_healthy(http: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{http}/healthcheck", timeout=60) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["fs", "fs_native"])
def test_lmcache_finds_its_files_after_a_restart(kind: str, scratch: Path, tmp_path: Path) -> None:
    model = random_model("lmcache", tmp_path / "model")
    prompt = {"seed": 1, "tokens": TOKENS}
    directory = tmp_path / "mnt/files/kv"
    adapter = {"type": kind, "base_path": str(directory), "use_odirect": True}
    with mounted(scratch, tmp_path / "mnt"):
        directory.mkdir()
        with served(adapter) as transfer, Vllm("lmcache", model, transfer) as vllm:
            cold = vllm.generate(prompt, out=8)
            assert cold["cached"] == [0]
            while len(list(directory.rglob("*.data"))) < BLOCKS:
                time.sleep(0.1)
    with mounted(scratch, tmp_path / "mnt") as mount:
        with served(adapter) as transfer, Vllm("lmcache", model, transfer) as vllm:
            warm = vllm.generate(prompt, out=8)
        assert warm["tokens"] == cold["tokens"]
        assert warm["cached"] == [BLOCKS * UNIT]
        assert mount.statistics()["counters"]["mount_reads"] >= BLOCKS

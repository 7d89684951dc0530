"""An engine whose ranks Ray places on several nodes is refused, on one not. A real cluster."""

import json
import subprocess
from pathlib import Path

import pytest

from support.engines import engine_environment, engine_python
from support.vllms import random_model, transfer_config

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]


def test_ranks_that_ray_places_on_two_nodes_are_refused(tmp_path: Path) -> None:
    model = random_model("ray", tmp_path / "model")
    options = {
        "model": str(model), "tensor_parallel_size": 2, "enforce_eager": True,
        "distributed_executor_backend": "ray",
    }  # fmt: skip
    done = subprocess.run(
        [engine_python("ray"), "-m", "support.raynodes",
         json.dumps([transfer_config(tmp_path / "socket"), options])],
        env=engine_environment(VLLM_NO_USAGE_STATS="1", RAY_USAGE_STATS_ENABLED="0"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line.startswith("STRICT")] == [
        "STRICT_PACK: accepted",
        "STRICT_SPREAD: one engine over 2 nodes: a warehouse is of one node, so its ranks would "
        "not find each other's shards; run one engine a node (data parallel)",
    ], done.stderr

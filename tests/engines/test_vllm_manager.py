"""The scheduler's side of vLLM's connector keeps its promises; see support.vllmmanager."""

import os
import subprocess
from pathlib import Path

import pytest

from support.daemon import running_daemon
from support.engines import engine_environment, engine_python

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("engine", ["vllm", "vllm33"])
def test_the_scheduler_s_side_keeps_its_promises(engine: str, scratch: Path) -> None:
    python = engine_python(engine)
    with running_daemon(scratch / "w") as daemon:
        with daemon.client(arena_bytes=0) as client:
            client.operate("tenant-add", name="other", owner=0, uids=[os.geteuid()], share="g")
        done = subprocess.run(
            [python, "-m", "support.vllmmanager", daemon.socket], env=engine_environment(),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["held"], done.stderr

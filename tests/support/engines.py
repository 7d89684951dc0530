"""The engines' own environments, for tests that run a real engine: made by tests/engines/venvs.sh.

`./run test-engines NAME` says which engines are to run; in any other run their tests skip.
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from support.daemon import Daemon

REPOSITORY: Final = Path(__file__).parents[2]
ENGINES: Final = Path(os.environ.get("TWFS_ENGINES", REPOSITORY / ".engines"))
PATIENT_S: Final = 120.0  # engines take their time on a busy machine
REQUIRED: Final = frozenset(os.environ.get("TWFS_ENGINES_REQUIRED", "").split())


def engine_python(name: str) -> Path:
    """The Python of engine *name*'s environment; skips the test unless it was asked for."""
    if name not in REQUIRED:
        pytest.skip(f"runs with ./run test-engines {name}")
    assert (ENGINES / name / ".stamp").exists(), f"not made: tests/engines/venvs.sh {name}"
    return ENGINES / name / "bin" / "python"


def engine_environment(**more: str) -> dict[str, str]:
    """Variables for an engine's process: twfs and tests on its path, no network, quiet."""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    return {
        **os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "2", **more,
    }  # fmt: skip


def check_inside(engine: str, program: Path, scratch: Path, **environment: str) -> None:
    """Run tests that need *engine*'s environment in it; fail if one fails."""
    done = subprocess.run(
        [
            engine_python(engine), "-m", "pytest", "-q", "-c", "/dev/null", "--noconftest",
            "-p", "no:cacheprovider", f"--basetemp={scratch / 'inside'}", program,
        ],
        env=engine_environment(**environment), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def until(claim: Callable[[], bool], what: str) -> None:
    """Wait until *claim* holds of an engine; fail if it never does."""
    deadline_s = time.monotonic() + PATIENT_S
    while not claim():
        assert time.monotonic() < deadline_s, f"never: {what}"
        time.sleep(0.1)


def blocks_in(daemon: Daemon) -> int:
    """Blocks that the daemon has published, of all models."""
    with daemon.client(arena_bytes=0) as client:
        return sum(info.blocks for info in client.models())


def until_stored(daemon: Daemon, count: int) -> None:
    """Wait until so many blocks are published; the engine does not."""
    until(lambda: blocks_in(daemon) >= count, f"{count} blocks are stored")

"""The engines' own environments, for tests that run a real engine: made by tests/engines/venvs.sh.

A test skips where the environment is absent, and fails there if `./run test-engines` asked for it.
"""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

REPOSITORY: Final = Path(__file__).parents[2]
ENGINES: Final = Path(os.environ.get("TWFS_ENGINES", REPOSITORY / ".engines"))
PATIENT_S: Final = 120.0  # engines take their time on a busy machine
REQUIRED: Final = frozenset(os.environ.get("TWFS_ENGINES_REQUIRED", "").split())


def engine_python(name: str) -> Path:
    """The Python of engine *name*'s environment; skips the test where there is none."""
    python = ENGINES / name / "bin" / "python"
    if not (ENGINES / name / ".stamp").exists():
        if name in REQUIRED:
            pytest.fail(f"{ENGINES / name} is not made: tests/engines/venvs.sh {name}")
        pytest.skip(f"no {name} in {ENGINES}: ./run test-engines {name}")
    return python


def engine_environment(**more: str) -> dict[str, str]:
    """Variables for an engine's process: twfs and tests on its path, no network, quiet."""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    return {
        **os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "2", **more,
    }  # fmt: skip


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

"""LMCache with a warehouse as its L2: its contract holds, and vLLM gets the right tokens.

Real packages in an environment of their own (`./run test-engines lmcache`), real processes.
"""

import subprocess
from pathlib import Path
from typing import Final

import pytest

from support.engines import engine_environment, engine_python

pytestmark = pytest.mark.engine

INSIDE: Final = Path(__file__).parent / "inside"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_adapter_holds_lmcaches_contract(scratch: Path) -> None:
    done = subprocess.run(
        [
            engine_python("lmcache"), "-m", "pytest", "-q", "-c", "/dev/null", "--noconftest",
            "-p", "no:cacheprovider", f"--basetemp={scratch / 'inside'}",
            INSIDE / "lmcache_l2.py",
        ],
        env=engine_environment(LMCACHE_TRACK_USAGE="false"), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]

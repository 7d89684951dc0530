"""A scrubber killed at any system call leaves a sound warehouse, and the pass finds the rest.

The whole sweep, every call of every kind, is
`TWFS_SCRUB_KILLS=300 ./run test tests/crash/test_scrub_killed.py`.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.tracing import STRACE, needs_strace
from support.warehouses import (
    DEVICE_BYTES,
    MHA,
    assert_memory_agrees,
    assert_sound,
    block_at,
    chain_of,
    flip_payload,
    make_warehouse,
    put,
    read_all,
)
from twfs.warehouse import Warehouse

REPOSITORY = Path(__file__).parents[2]
BLOCKS = 24
BAD = (3, 8, 9, 15, 23)
CALLS = ("preadv,preadv2,pread64", "pwrite64,pwritev,pwritev2", "fdatasync,fsync,msync")
QUICK = ((0, 20), (0, 33), (1, 8), (2, 3), (2, 6))
KILLS = int(os.environ.get("TWFS_SCRUB_KILLS", "0"))
MOMENTS = [(kind, n) for kind in range(3) for n in range(1, KILLS + 1)] or QUICK


def scrub(directory: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """Run the scrubber of support.scrubwork behind the command *before*."""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    return subprocess.run(
        [*before, sys.executable, "-m", "support.scrubwork", str(directory)],
        env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip


@needs_strace
@pytest.mark.slow
def test_a_scrubber_killed_at_the_nth_call_leaves_nothing_broken(scratch: Path) -> None:
    source = scratch / "source"
    make_warehouse(source, (DEVICE_BYTES,))
    with Warehouse.open(source) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        for index in BAD:
            flip_payload(warehouse, block_at(warehouse, model, names, index)[1])
    killed = 0
    for kind, number in MOMENTS:
        made = scratch / "made"
        shutil.copytree(source, made)
        inject = f"inject={CALLS[kind]}:signal=SIGKILL:when={number}"
        trace = (str(STRACE), "-f", "-qq", "-o", "/dev/null", "-e", f"trace={CALLS[kind]}")
        done = scrub(made, *trace, "-e", inject)
        ended = done.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}
        assert ended or done.stdout == f"{len(BAD)}\n", done  # fewer calls than that
        killed += ended
        with Warehouse.open(made) as warehouse:
            assert warehouse.check().findings == ()
            assert_memory_agrees(warehouse._core)
        assert scrub(made).returncode == 0
        with Warehouse.open(made) as warehouse:
            holes = [
                i for i in range(BLOCKS) if block_at(warehouse, model, names, i)[1].hole
            ]  # fmt: skip
            assert tuple(holes) == BAD
            assert_sound(warehouse)
            assert put(warehouse, model, names).held == BLOCKS
            assert read_all(warehouse, model, names) == BLOCKS
        shutil.rmtree(made)
    assert killed >= len(QUICK) - 2

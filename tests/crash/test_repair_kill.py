"""A repair that is killed at any write or flush leaves what the next repair finishes.

Also the first repair's own promise holds then: what was not broken is there with its bytes.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.breaking import assert_payloads, break_one, fill
from support.tracing import STRACE, needs_strace
from support.warehouses import make_warehouse, open_warehouse, records_of
from twfs.recovery import repair

REPOSITORY = Path(__file__).parents[2]
SYSCALLS = "pwrite64,pwritev,pwritev2,writev,fdatasync,fsync,msync"
BREAKAGES = (
    ("superblock", (0, 30, 1)), ("header", (3, 200, 1)), ("record", (5, 60, 7)),
    ("two in one place", (1, 4, 0)), ("free run anywhere", (3, 4, 0)), ("lost child", (1, 0, 0)),
    ("lost head", (0, 0, 0)), ("counter", (0, 1, 0)), ("roster", (0, 1, 1)), ("roster", (1, 1, 1)),
)  # fmt: skip


def repair_until(directory: Path, number: int) -> int:
    """Repair in a process that is killed at its *number*-th write or flush; how it ended."""
    code = "import sys; from pathlib import Path; from twfs.recovery import repair; "
    code += "repair.run(Path(sys.argv[1]), data=True)"
    command = [
        str(STRACE), "-f", "-qq", "-o", "/dev/null", "-e", f"trace={SYSCALLS}",
        "-e", f"inject={SYSCALLS}:signal=SIGKILL:when={number}",
        sys.executable, "-c", code, str(directory),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, check=False).returncode


@needs_strace
@pytest.mark.slow
def test_a_repair_killed_at_every_write_or_flush_is_finished_by_the_next(scratch: Path) -> None:
    make_warehouse(scratch / "broken")
    with open_warehouse(scratch / "broken") as warehouse:
        fill(warehouse)
    for kind, numbers in BREAKAGES:
        break_one(scratch / "broken", kind, numbers)
    killed = 0
    wanted = None
    for number in range(1, 100):
        directory = scratch / "killed"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(scratch / "broken", directory)
        code = repair_until(directory, number)
        if code not in {-signal.SIGKILL, 128 + signal.SIGKILL}:
            assert code == 0
            break
        killed += 1
        assert repair.run(directory, data=True).left == ()
        assert repair.run(directory, data=True).done == ()
        with open_warehouse(directory) as warehouse:
            assert_payloads(warehouse)
            there = records_of(warehouse._core)
            whole = {(key, block.hole, block.extents) for key, block in there.items()}
            wanted = whole if wanted is None else wanted
            assert whole == wanted  # killed or not, the same is mended in the end
    assert killed >= 5
